"""What `quantize_model` did, module by module."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModuleReport:
    """One module that a rule matched.

    Attributes:
      path: attribute names and indices joined by dots; "" is the model itself.
      aliases: further paths of the same object.
      kind: class name before packing.
      shape: shape of the unpacked kernel or table; None where there is no single one.
      action: "packed"; "kept", when it cannot be packed; "excluded", when its rule says so.
      reason: why a module was kept, else "".
      bytes_before: bytes of the module's own variables.
      bytes_after: the same after packing.
      sqnr_db: 10 log10 (sum w^2 / sum (w - packed)^2) of the kernel in dB; None when nothing was
        packed or the model is abstract.
    """

    path: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] | None
    action: Literal["packed", "kept", "excluded"]
    reason: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """All modules that a rule matched, in the order of the model's attributes.

    Attributes:
      modules: one entry for each module.
      model_bytes_before: bytes of all variables of the given model, matched or not.
      model_bytes_after: bytes of all variables of the returned model.
    """

    modules: tuple[ModuleReport, ...]
    model_bytes_before: int
    model_bytes_after: int

    @property
    def packed(self) -> tuple[ModuleReport, ...]:
        """The modules that now have packed weights."""
        return tuple(m for m in self.modules if m.action == "packed")

    @property
    def kept(self) -> tuple[ModuleReport, ...]:
        """The modules that matched and cannot be packed."""
        return tuple(m for m in self.modules if m.action == "kept")

    def __str__(self) -> str:
        """Formats a table with one line for each module, and the totals."""
        header = ("path", "kind", "shape", "bytes", "packed", "SQNR dB", "")
        lines = [header, *(_row(m) for m in self.modules)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        left = (True, True, True, False, False, False, True)
        table = [
            "  ".join(
                cell.ljust(width) if to_left else cell.rjust(width)
                for cell, width, to_left in zip(line, widths, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        before, after = self.model_bytes_before, self.model_bytes_after
        table.append(
            f"{len(self.packed)} of {len(self.modules)} matched modules packed; "
            f"model {before:,} -> {after:,} bytes"
        )
        return "\n".join(table)


def _row(module: ModuleReport) -> tuple[str, ...]:
    packed = module.action == "packed"
    note = module.action if module.action != "kept" else f"kept: {module.reason}"
    return (
        " = ".join((module.path or "(model)", *module.aliases)),
        module.kind,
        "x".join(map(str, module.shape)) if module.shape is not None else "",
        f"{module.bytes_before:,}",
        f"{module.bytes_after:,}" if packed else "",
        f"{module.sqnr_db:.1f}" if module.sqnr_db is not None else "",
        "" if packed else note,
    )
