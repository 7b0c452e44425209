"""A picture of what the packed tensors of a checkpoint hold."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jax_mxfp4.checkpoints.statistics import PackedStatistics, TensorSummary
from jax_mxfp4.format import E2M1_VALUES, E8M0_BIAS, E8M0_NAN

# Tensors of more kinds than this would not be told apart by colour: the last line has the rest.
_MOST_KINDS = 8
# The share of the elements that may lie beyond each end of the axis.
_TAIL = 1e-4
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def require_picture(file: Path) -> None:
    """Refuse a picture that cannot be written, before anything is read for it.

    Raises:
      RuntimeError: matplotlib is not installed.
      ValueError: `file` lies in no folder, or its suffix is that of no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "a plot needs matplotlib, which is not installed: pip install 'jax-mxfp4[plot]'"
        ) from error
    suffixes = Figure().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in suffixes:
        known = ", ".join(f".{suffix}" for suffix in sorted(suffixes))
        raise ValueError(f"{file}: expected the name of a picture ({known})")
    if not file.parent.is_dir():
        raise ValueError(f"{file.parent}: expected a folder to write to: no such folder")


def plot_distributions(summaries: Iterable[TensorSummary], file: Path, title: str) -> None:
    """Write the distributions of weights, element codes and scales as a picture.

    Tensors that differ only in the number of their layer are one line.

    Args:
      summaries: of a checkpoint; those of tensors that are not packed are ignored.
      file: what to write; its suffix, such as `.png`, says in which format.
      title: what is said above.

    Raises:
      RuntimeError, ValueError: as `require_picture`, or no tensor is packed.
    """
    require_picture(file)
    from matplotlib.figure import Figure  # not pyplot: no window is wanted
    from matplotlib.ticker import MaxNLocator

    counts = _by_kind(summaries)
    if not counts:
        raise ValueError("no tensor is packed: there is nothing to plot")
    figure = Figure(figsize=(15, 5), layout="constrained")
    weights, codes, scales = figure.subplots(1, 3)
    for kind, one in counts.items():
        statistics = PackedStatistics(one)
        values, shares = cumulative_shares(one)
        weights.step(values, shares, where="post", label=kind)
        magnitudes = one.sum(axis=0).reshape(2, 8).sum(axis=0) / statistics.elements
        codes.plot(range(8), magnitudes, marker="o")
        used = statistics.scales[:E8M0_NAN]
        (shown,) = np.nonzero(used)
        scales.plot(shown - E8M0_BIAS, used[shown] / max(1, used.sum()), marker="o")
    limit = max(_magnitude(one) for one in counts.values())
    weights.set(xlabel="weight", ylabel="share of elements up to it", xlim=(-limit, limit))
    codes.set(xlabel="magnitude before scaling", ylabel="share of elements", ylim=(0, None))
    codes.set_xticks(range(8), [f"{value:g}" for value in E2M1_VALUES[:8]])
    scales.set(xlabel="power of two of the scale", ylabel="share of blocks", yscale="log")
    scales.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def cumulative_shares(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that occur, in ascending order, and the share of elements up to each.

    Args:
      counts: elements by scale byte and code, [256, 16]; NaN ones are left out.
    """
    numbers = counts[:E8M0_NAN]
    values, place = np.unique(_values()[numbers > 0], return_inverse=True)
    shares = np.bincount(place, numbers[numbers > 0], len(values)) / max(1, numbers.sum())
    return values, np.cumsum(shares)


def _values() -> np.ndarray:
    """What each code stands for under each scale that is a number, float64 [255, 16]."""
    exponents = np.arange(E8M0_NAN) - E8M0_BIAS
    return np.ldexp(np.array(E2M1_VALUES), exponents[:, None])


def _magnitude(counts: np.ndarray) -> float:
    """Return a magnitude above that of nearly all elements, and above 0."""
    values, shares = cumulative_shares(counts)
    within = (shares >= _TAIL) & (shares <= 1 - _TAIL)
    return 1.1 * float(np.max(np.abs(values[within]), initial=0.0)) or 1.0


def _by_kind(summaries: Iterable[TensorSummary]) -> dict[str, np.ndarray]:
    """Return the added counts of tensors with the same name but for the number of the layer."""
    found: dict[str, np.ndarray] = {}
    for summary in summaries:
        if summary.packed is not None and summary.packed.elements:
            kind = _LAYER.sub("*", summary.name)
            if kind not in found and len(found) >= _MOST_KINDS:
                kind = "others"
            found[kind] = found.get(kind, 0) + summary.packed.counts
    return found
