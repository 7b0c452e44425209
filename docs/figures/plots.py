"""Draw the documents' figures from precision.json as SVG files.

    python docs/figures/plots.py [FOLDER]

Needs matplotlib. FOLDER is where the SVG files go, by default beside this file.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
Results = dict[str, Any]


def code_error(axes: Axes, _: Results) -> None:
    """The rounding error of one element, in units of its scale."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    midpoints = (values[1:] + values[:-1]) / 2
    x = np.sort(np.concatenate([values, midpoints, [8]]))  # the error is linear in between
    axes.fill_between(x, np.abs(x[:, None] - values).min(axis=1), alpha=0.4)
    axes.plot(values, [0] * len(values), "o", color="black", clip_on=False)
    axes.axvspan(6, 8, color="tab:red", alpha=0.15, label="floor saturates here")
    axes.axvline(7, color="tab:green", label="even doubles the scale from here")
    axes.set(xlabel="|x| / scale (dots: the E2M1 magnitudes)", ylabel="error / scale", xlim=(0, 8))
    axes.set_ylim(0, 2)
    axes.legend(loc="upper left")


def scale_position(axes: Axes, results: Results) -> None:
    """SQNR of each rule against where the data lies in an octave."""
    curves = dict(results["position_in_octave"])
    fraction = curves.pop("fraction")
    for rule, values in curves.items():
        axes.plot(fraction, values, label=rule)
    axes.set(xlabel="fractional part of log2 of the deviation", ylabel="SQNR, dB", xlim=(0, 1))
    axes.set_ylim(18.3, None)
    axes.legend(ncols=4, loc="lower center")


def block_sizes(axes: Axes, results: Results) -> None:
    """SQNR against bits per weight for scale formats and block sizes."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, value in results["block_sizes"]["Gaussian"].items():
        scale = name.split(", block ")[0]
        series.setdefault(scale, []).append((value["bits"], value["SQNR dB"]))
    for scale, points in series.items():
        axes.plot(*zip(*points, strict=True), "o-", label=f"{scale} scale")
    mxfp4 = results["block_sizes"]["Gaussian"]["E8M0, block 32"]
    axes.annotate(
        "MXFP4", (mxfp4["bits"], mxfp4["SQNR dB"]), (4.3, 18.7), arrowprops={"arrowstyle": "-"}
    )
    axes.set(xlabel="bits per weight (blocks of 128, 64, 32, 16)", ylabel="SQNR on Gaussian, dB")
    axes.set_xlim(4, 5.1)
    axes.legend(loc="lower right")


def depth(axes: Axes, results: Results) -> None:
    """Relative error of hidden states against depth."""
    for name, errors in results["depth"].items():
        axes.plot(range(1, len(errors) + 1), errors, label=name)
    axes.set(
        xlabel="layer", ylabel="relative error of the hidden state", xlim=(1, 32), ylim=(0, None)
    )
    axes.legend()


FIGURES: dict[str, Callable[[Axes, Results], None]] = {
    function.__name__: function for function in (code_error, scale_position, block_sizes, depth)
}


def main(folder: Path) -> None:
    """Draw all figures into `folder`."""
    mpl.rcParams["svg.hashsalt"] = "jax-mxfp4"  # the same identifiers on every run
    mpl.rcParams["svg.fonttype"] = "none"
    results = json.loads((FOLDER / "precision.json").read_text())
    for name, draw in FIGURES.items():
        figure = Figure(figsize=(6, 3), layout="constrained")
        draw(figure.subplots(), results)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
