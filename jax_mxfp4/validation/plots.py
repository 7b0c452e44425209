"""Pictures of results. Needs matplotlib, which the extra `bench` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# KL below this is float32 rounding; a logarithmic axis cannot show zero.
_FLOOR = 1e-6
_MARKERS = "osD^v<>pP*Xhd"


def plot_sensitivity(path: Path, title: str, parts: Sequence[str], kls: Sequence[float]) -> None:
    """Draw one point for each part, the most sensitive on top.

    Args:
      path: what to create; the ending decides the format (png, svg, pdf).
      title: above the picture.
      parts: names.
      kls: mean KL divergence in nats for each.

    Raises:
      RuntimeError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    figure = _figure((7.0, 1.2 + 0.22 * len(parts)))
    axes = figure.subplots()
    order = sorted(range(len(parts)), key=lambda i: kls[i])
    # Points, because bars on a logarithmic axis have no meaningful length.
    axes.plot([max(kls[i], _FLOOR) for i in order], [parts[i] for i in order], "o")
    axes.set_xscale("log")
    axes.set_xlabel("mean KL divergence from the unquantized model (nats)")
    axes.set_title(title, fontsize="medium")
    axes.tick_params(axis="y", labelsize="x-small")
    axes.margins(y=0.02)
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_formats(
    path: Path, title: str, names: Sequence[str], bits: Sequence[float], kls: Sequence[float]
) -> None:
    """Draw the mean KL divergence of formats over their bits per weight.

    Formats that change nothing are left out.

    Args:
      path: what to create; the ending decides the format (png, svg, pdf).
      title: above the picture.
      names: of the formats.
      bits: per weight.
      kls: mean KL divergence in nats for each.

    Raises:
      RuntimeError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    figure = _figure((8.0, 5.0))
    axes = figure.subplots()
    # From the worst to the best, as the points lie; formats crowd too much for labels.
    for rank, i in enumerate(sorted(range(len(names)), key=lambda i: -kls[i])):
        if kls[i] < _FLOOR:
            continue
        ours = names[i].startswith("mxfp4")
        axes.plot(
            bits[i],
            kls[i],
            _MARKERS[rank % len(_MARKERS)],
            color="C3" if ours else "C0",
            fillstyle="full" if ours else "none",
            label=names[i],
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("mean KL divergence from the unquantized model (nats)")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "plots need matplotlib, which is not installed: pip install 'jax-mxfp4[bench]'"
        ) from error
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context

    # Without a date and random names in the file, equal results give equal files.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, dpi=150, metadata=metadata)
