"""Draw time over the number of tokens, a panel a weight. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.bench.contenders import PDL
from tersor.bench.linear import roof
from tersor.errors import OutputError
from tersor.evaluate.plot import check_plot

_ACROSS = 4
"""Panels beside each other."""


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a picture: microseconds over tokens for every contender, both axes logarithmic.

    The dashed line of a contender's colour is its roofline: the bytes of its weight over the read bandwidth measured
    in the same run. Contenders that read as much share the line of the first.

    Args:
        result: what `bench.linear.result` returned.
        path: a .png, .pdf or .svg file.

    Raises:
        InputError, UnsupportedError: as `tersor.evaluate.plot.check_plot`.
        OutputError: the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    rows = result["rows"]
    shapes = list(dict.fromkeys((row["oc"], row["ic"]) for row in rows))
    lines = list(dict.fromkeys((row["kernel"], row["chain"]) for row in rows))
    kernels = list(dict.fromkeys(kernel for kernel, _ in lines))
    across = min(_ACROSS, len(shapes))
    down = -(-len(shapes) // across)
    figure = Figure(figsize=(3.8 * across + 2.2, 3.4 * down + 0.4), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for panel in panels[len(shapes) :]:
        panel.set_axis_off()
    for panel, (oc, ic) in zip(panels[: len(shapes)], shapes, strict=True):
        roofs: dict[float, str] = {}
        here = [row for row in rows if (row["oc"], row["ic"]) == (oc, ic)]
        for kernel, chain in lines:
            mine = sorted((row for row in here if (row["kernel"], row["chain"]) == (kernel, chain)), key=_tokens)
            if not mine:
                continue
            colour = f"C{kernels.index(kernel) % 10}"
            panel.plot(
                [row["n"] for row in mine],
                [row["microseconds"] for row in mine],
                color=colour,
                marker="o" if chain == PDL else "x",
                markersize=4,
                linewidth=1.2,
                label=f"{kernel}, pdl" if chain == PDL else kernel,
            )
            roofs.setdefault(roof(mine[0], result["read_bandwidth"]), colour)
        for height, colour in roofs.items():
            panel.axhline(height, color=colour, linestyle="--", linewidth=0.8, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(sorted({row["n"] for row in here}))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize=8, which="both")
        panel.set_title(f"{oc} x {ic}", fontsize=10)
        panel.set_xlabel("tokens")
        panel.set_ylabel("microseconds")
        panel.grid(alpha=0.25, which="both")
    known: dict[str, Any] = {}
    for panel in panels[: len(shapes)]:
        handles, labels = panel.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(list(known.values()), list(known), loc="outside right center", frameon=False)
    gpu = result["environment"].get("gpu", "")
    figure.suptitle(f"A linear on {gpu}, {result['dtype']}; dashed: reading the weight once", fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _tokens(row: dict[str, Any]) -> int:
    return row["n"]
