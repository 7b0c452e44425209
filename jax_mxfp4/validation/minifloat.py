"""Rounding to small floating-point element types, in plain arithmetic."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Minifloat:
    """A signed binary floating-point type without infinities, as far as rounding needs it.

    Attributes:
      mantissa_bits: stored bits of the significand.
      min_exponent: exponent of the smallest normal number; below it lie subnormals.
      largest: largest finite magnitude.
    """

    mantissa_bits: int
    min_exponent: int
    largest: float

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest power of two in the type, emax in OCP MX v1.0."""
        return int(np.frexp(self.largest)[1]) - 1

    def round(self, x: np.ndarray) -> np.ndarray:
        """Round to the nearest value of the type, ties to even, saturating.

        Args:
          x: float32 [...], finite.

        Returns:
          float32 [...].
        """
        exponent = np.frexp(x)[1] - 1
        step = np.ldexp(np.float32(1), np.maximum(exponent, self.min_exponent) - self.mantissa_bits)
        # Both the quotient and the product by a power of two are exact, rint rounds ties to even.
        rounded = np.rint(x / step) * step
        return np.clip(rounded, -np.float32(self.largest), np.float32(self.largest))


# OCP Microscaling Formats (MX) v1.0, section 5.3, and for E4M3 and E5M2 OCP 8-bit Floating Point
# Specification v1.0, table 1.
E2M1 = Minifloat(mantissa_bits=1, min_exponent=0, largest=6.0)
E2M3 = Minifloat(mantissa_bits=3, min_exponent=0, largest=7.5)
E3M2 = Minifloat(mantissa_bits=2, min_exponent=-2, largest=28.0)
E4M3 = Minifloat(mantissa_bits=3, min_exponent=-6, largest=448.0)
E5M2 = Minifloat(mantissa_bits=2, min_exponent=-14, largest=57344.0)
