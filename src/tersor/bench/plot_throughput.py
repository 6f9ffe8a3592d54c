"""Draw requests a second, a group of bars a workload. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor import plots
from tersor.bench.plot import described, legend, to_draw
from tersor.bench.plot_latency import format_words
from tersor.bench.throughput import ORDERS, rate, roof

_COLOURS = {order: f"C{index}" for index, order in enumerate(ORDERS)}
_BAR, _AROUND = 0.3, 0.9
"""Inches of a bar, and of the title and axis of its workload."""


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a picture: a bar for every format and order, as long as its requests a second; workloads below each other.

    A colour is an order. An upright mark in the line of a bar is its roofline; vLLM's bars have none, nor have results
    of a CPU. Every workload has an axis of its own.

    Args:
        result: what `bench.throughput.result` returned, or `bench.saved.read`.
        path: a .png, .pdf or .svg file; its metadata hold the commit and a hash of the times.

    Raises:
        InputError: there are no times, or as `tersor.plots.check_plot`.
        UnsupportedError: as there.
        OutputError: the file cannot be written.
    """
    rows = to_draw(result, path)
    from matplotlib.figure import Figure

    names = dict.fromkeys(row["workload"] for row in rows)
    loads = {name: [row for row in rows if row["workload"] == name] for name in names}
    heights = [_AROUND + _BAR * len(mine) for mine in loads.values()]
    figure = Figure(figsize=(8.4, sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(loads), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (name, mine) in zip(panels, loads.items(), strict=True):
        _panel(panel, name, mine)
    legend(figure, panels)
    models = ", ".join(dict.fromkeys(row["name"] for row in rows))
    gpu = result["environment"].get("gpu", "no GPU")
    figure.suptitle(f"{models} on one {gpu}: requests a second, more is better", fontsize=12)
    keys = ("name", "format", "workload", "order", "requests", "seconds")
    plots.save(figure, path, described(result, [tuple(row[key] for key in keys) for row in rows]))


def _panel(panel: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """Draw the bars of one workload, the first row above."""
    places = range(len(rows))
    rates = [rate(row) for row in rows]
    bars = panel.barh(places, rates, height=0.7, color=[_COLOURS[row["order"]] for row in rows])
    panel.bar_label(bars, labels=[_short(each) for each in rates], padding=3, fontsize=8)
    roofs = [(most, place) for place, row in zip(places, rows, strict=True) if (most := roof(row)) is not None]
    if roofs:
        panel.plot(
            *zip(*roofs, strict=True),
            linestyle="",
            marker="|",
            markersize=14,
            markeredgewidth=2,
            color="black",
            label="roofline: the most that this GPU could answer",
        )
    panel.set_yticks(places, [f"{format_words(row['format'])}, {row['order']}" for row in rows])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.12 * max([*rates, *(most for most, _ in roofs)]))
    panel.tick_params(labelsize=8)
    panel.set_title(f"{name}, {rows[0]['requests']} requests", fontsize=10)
    panel.set_xlabel("requests a second", fontsize=8)
    panel.grid(alpha=0.25, axis="x")
    panel.set_axisbelow(True)


def _short(number: float) -> str:
    """Return a number with three digits, or all those before its point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
