"""Draw time over the number of tokens, a panel a weight. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor import plots
from tersor.bench.contenders import CUBLAS, FP8, HUMMING, PDL, unlabelled
from tersor.bench.linear import roof
from tersor.errors import InputError
from tersor.formats import Activations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACROSS = 4
"""Panels beside each other."""
_GREY = "0.35"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Write a picture: microseconds over tokens for every contender, both axes logarithmic.

    A colour is a program and a format; products of 8-bit activations are dashed, with hollow marks. A dotted line of a
    colour is its roofline: the bytes of its weight over the read bandwidth measured in the same run. Formats of equal
    bytes share the line of the first.

    Args:
        result: what `bench.linear.result` or `bench.saved.narrowed` returned.
        path: a .png, .pdf or .svg file; its metadata hold `description(result)`.

    Raises:
        InputError: there are no times, or as `tersor.plots.check_plot`.
        UnsupportedError: as there.
        OutputError: the file cannot be written.
    """
    shapes = list(dict.fromkeys((row["oc"], row["ic"]) for row in to_draw(result, path)))
    figure, panels = grid(len(shapes))
    for panel, shape in zip(panels, shapes, strict=True):
        _panel(panel, result, shape)
    legend(figure, panels)
    gpu = result["environment"].get("gpu", "no GPU")
    title = f"One linear layer on one {gpu}, {result['dtype']}: time by number of tokens, less is better"
    figure.suptitle(title, fontsize=12)
    plots.save(figure, path, description(result))


def to_draw(result: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a result, of which a picture can be written.

    Raises:
        InputError: there are none, or as `tersor.plots.check_plot`.
        UnsupportedError: as there.
    """
    plots.check_plot(path)
    if not result["rows"]:
        raise InputError(f"{path}: there are no times to draw")
    return result["rows"]


def grid(count: int) -> tuple[Figure, list[Any]]:
    """Return a figure and `count` of its panels, some beside each other."""
    from matplotlib.figure import Figure

    across = min(_ACROSS, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(4.2 * across, 8.4), 3.5 * down + 1.2), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def legend(figure: Figure, panels: Iterable[Any]) -> None:
    """Name below a figure what its panels draw, each name once."""
    known: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=3.5,
    )


def description(result: dict[str, Any]) -> str:
    """Return what a picture says of the times that it shows: the commit they are of, and a hash of the rows drawn."""
    keys = ("oc", "ic", "n", "kernel", "chain", "microseconds")
    return described(result, [tuple(row[key] for key in keys) for row in result["rows"]])


def described(result: dict[str, Any], times: Iterable[tuple[Any, ...]]) -> str:
    """Return a description of a picture of a result.

    Args:
        result: what was measured; its environment names the commit.
        times: what is drawn of each row, in any order.
    """
    drawn = sorted(times)
    digest = hashlib.sha256(json.dumps(drawn, allow_nan=False).encode()).hexdigest()[:16]
    return f"commit {result['environment']['commit']}, {len(drawn)} times, sha256 {digest}"


_MULTIPLIED = {
    Activations.NATIVE: "",
    Activations.E4M3: ", 8-bit activations",
    Activations.INT8: ", int8 activations",
    Activations.INT8_GROUPS: ", int8 activations in groups",
}


def kernel_words(kernel: str, dtype: str) -> str:
    """Name a kernel of a results file for people: `cublas` is `cuBLAS FP16`, `fp6_e3m2:a8` Tersor's with 8 bits.

    Args:
        kernel: as rows name it.
        dtype: of the activations in that file, `float16` or `bfloat16`.
    """
    if kernel == CUBLAS:
        return f"cuBLAS {dtype.replace('bfloat', 'BF').replace('float', 'FP')}"
    if kernel == FP8:
        return "cuBLAS FP8"
    name, activations = unlabelled(kernel)
    words = name if name.startswith(f"{HUMMING} ") else f"Tersor {name}"
    return f"{words}{_MULTIPLIED[activations]}"


def _panel(panel: Any, result: dict[str, Any], shape: tuple[int, int]) -> None:
    """Draw the times of one weight."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = result["rows"]
    lines = list(dict.fromkeys((row["kernel"], row["chain"]) for row in rows))
    chains = {kernel: {chain for other, chain in lines if other == kernel} for kernel, _ in lines}
    colours = _colours([kernel for kernel, _ in lines])
    here = [row for row in rows if (row["oc"], row["ic"]) == shape]
    roofs: dict[float, str] = {}
    for kernel, chain in lines:
        mine = sorted((row for row in here if (row["kernel"], row["chain"]) == (kernel, chain)), key=_tokens)
        if not mine:
            continue
        bytewise = kernel == FP8 or unlabelled(kernel)[1] is not Activations.NATIVE
        second = chain != PDL and len(chains[kernel]) > 1
        colour = colours[_family(kernel)]
        panel.plot(
            [row["n"] for row in mine],
            [row["microseconds"] for row in mine],
            color=colour,
            linestyle="--" if bytewise else "-",
            linewidth=0.8 if second else 1.6,
            marker="x" if second else "o",
            markerfacecolor="white" if bytewise else colour,
            markersize=4,
            zorder=2 if kernel in (CUBLAS, FP8) or kernel.startswith(HUMMING) else 3,
            label=kernel_words(kernel, result["dtype"]) + (", plain launches" if second else ""),
        )
        roofs.setdefault(roof(mine[0], result["read_bandwidth"]), colour)
    for height, colour in roofs.items():
        panel.axhline(height, color=colour, linestyle=":", linewidth=1, zorder=1)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(sorted({row["n"] for row in here}))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=8, which="both")
    panel.set_title(f"weight of {shape[0]} x {shape[1]}; dotted: reading it once", fontsize=10)
    panel.set_xlabel("tokens")
    panel.set_ylabel("microseconds")
    panel.grid(alpha=0.25, which="both")


def _family(kernel: str) -> str:
    """Return what kernels of one colour have in common: a program and the format of its weights; cuBLAS has one."""
    return CUBLAS if kernel in (CUBLAS, FP8) else unlabelled(kernel)[0]


def _colours(kernels: list[str]) -> dict[str, str]:
    """Give every family a colour: grey for cuBLAS, the others by turns."""
    families = [family for family in dict.fromkeys(map(_family, kernels)) if family != CUBLAS]
    return {CUBLAS: _GREY, **{family: f"C{index % 10}" for index, family in enumerate(families)}}


def _tokens(row: dict[str, Any]) -> int:
    return row["n"]
