"""Checking checkpoints, comparing two, and drawing what they hold."""

from jax_mxfp4.inspection.comparing import Difference, diff
from jax_mxfp4.inspection.opening import open_parameters
from jax_mxfp4.inspection.verifying import Verified, verify

__all__ = ["Difference", "Verified", "diff", "open_parameters", "verify"]
