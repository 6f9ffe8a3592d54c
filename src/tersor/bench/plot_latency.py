"""Draw what a decode step takes over its rows, a panel a model and context. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor import plots
from tersor.bench.latency import roof
from tersor.bench.plot import described, grid, legend, to_draw

VLLM = "vllm "
"""How formats of vLLM's rows begin."""


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a picture: milliseconds a step over rows, which stand on a logarithmic axis, for every format.

    A colour is a format, and marks of vLLM's are hollow. A dashed line of a colour is its roofline: the bytes that the
    step reads over the read bandwidth measured in the same run; vLLM's rows have none.

    Args:
        result: what `bench.latency.result` returned, or `bench.saved.read`.
        path: a .png, .pdf or .svg file; its metadata hold the commit and a hash of the times.

    Raises:
        InputError: there are no times, or as `tersor.plots.check_plot`.
        UnsupportedError: as there.
        OutputError: the file cannot be written.
    """
    rows = to_draw(result, path)
    kinds = list(dict.fromkeys((row["name"], row["context"]) for row in rows))
    colours = {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(row["format"] for row in rows))}
    figure, panels = grid(len(kinds))
    for panel, kind in zip(panels, kinds, strict=True):
        here = sorted((row for row in rows if (row["name"], row["context"]) == kind), key=lambda row: row["batch"])
        _panel(panel, here, result["read_bandwidth"], colours)
    legend(figure, panels)
    gpu = result["environment"].get("gpu", "no GPU")
    figure.suptitle(f"A decode step on one {gpu}, {result['dtype']}: time by rows, less is better", fontsize=12)
    keys = ("name", "format", "context", "batch", "milliseconds")
    plots.save(figure, path, described(result, [tuple(row[key] for key in keys) for row in rows]))


def format_words(format: str) -> str:
    """Name a format of a results file for people: `vllm fp8` is `vLLM fp8`, `fp6_e3m2` is Tersor's."""
    return f"vLLM {format.removeprefix(VLLM)}" if format.startswith(VLLM) else f"Tersor {format}"


def _panel(panel: Any, rows: list[dict[str, Any]], bandwidth: float | None, colours: dict[str, str]) -> None:
    """Draw the times of one model with texts of one length; rows are in order."""
    from matplotlib.ticker import NullLocator

    for format in dict.fromkeys(row["format"] for row in rows):
        mine, colour = [row for row in rows if row["format"] == format], colours[format]
        batches = [row["batch"] for row in mine]
        panel.plot(
            batches,
            [row["milliseconds"] for row in mine],
            color=colour,
            linewidth=1.6,
            marker="o",
            markerfacecolor="white" if format.startswith(VLLM) else colour,
            markersize=4,
            label=format_words(format),
        )
        roofs = [least for row in mine if (least := roof(row, bandwidth)) is not None]
        if roofs:
            panel.plot(batches, roofs, color=colour, linestyle="--", linewidth=1, label=f"{format}: roofline")
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({row["batch"] for row in rows}))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(bottom=0)
    panel.tick_params(labelsize=8, which="both")
    panel.set_title(f"{rows[0]['name']}, texts of {rows[0]['context']} tokens", fontsize=10)
    panel.set_xlabel("rows")
    panel.set_ylabel("milliseconds a step")
    panel.grid(alpha=0.25)
