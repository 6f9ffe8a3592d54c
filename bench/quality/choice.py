"""What does a linear with half of its weights take and lose beside dense ones? The table of docs/pruning.md.

Quality is that of the results of `bench/quality/run.py`. Times are those of one linear, with the weight cold: the best
tile of `bench/sparse.py tiles`, and in place of it what `tersor bench linear` took, where that was run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tersor.report.words import measured

OC, IC, TOKENS, SPARSITY = 28672, 7168, 16, 0.5
"""The linear that is timed."""
CUBLAS = "cublas"


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to store weights.

    Attributes:
        words: what it is called.
        recipe: whose quality it has; empty for the original's.
        kernels: names in results of its kernel; the first that was timed counts, named where it is another.
    """

    words: str
    recipe: str
    kernels: tuple[str, ...]


CHOICES = (
    Choice("all, 16 bits", "", (CUBLAS,)),
    Choice("all, `fp6_e2m3`", "fp6_e2m3-row-gptq", ("fp6_e2m3",)),
    Choice("all, `int4` in groups", "int4-g-gptq", ("int4:g128",)),
    Choice("half, 16 bits", "admm-50", ("float16:s50",)),
    Choice("half, `fp8_e4m3`", "admm-50-fp8_e4m3", ("fp8_e4m3:s50",)),
    Choice("half, `fp6_e2m3`", "admm-50-fp6_e2m3", ("fp6_e2m3:s50", "fp6_e3m2:s50")),
    Choice("half, `int4`", "admm-50-int4", ("int4:s50",)),
)
"""In the order of the table."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A linear of `TOKENS` tokens.

    Attributes:
        microseconds: of a call.
        cublas: of cuBLAS FP16 in the same run.
        nbytes: of the weight as it lies in the GPU's memory.
    """

    microseconds: float
    cublas: float
    nbytes: int


Times: TypeAlias = Mapping[str, Timed]
"""Name of a kernel -> its time."""


def read_times(folder: Path) -> Times:
    """Return what was timed of the linear, by the results in a folder."""
    found: dict[str, Timed] = {}
    tiles = json.loads((folder / "sparse_tiles_h200.json").read_text(encoding="utf-8"))["cells"]
    for cell in tiles:
        here = (cell["oc"], cell["ic"], cell["n"], cell["sparsity"]) == (OC, IC, TOKENS, SPARSITY)
        name = f"{cell['values']}:s{100 * SPARSITY:g}"
        if here and (name not in found or cell["us"] < found[name].microseconds):
            found[name] = Timed(cell["us"], cell["cublas"], cell["bytes"])
    found[CUBLAS] = Timed(tiles[0]["cublas"], tiles[0]["cublas"], 2 * OC * IC)
    for path in sorted(folder.glob("linear_h200*.json")):
        rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if _is_here(row)]
        own = {row["kernel"]: row for row in rows if row["chain"] == "pdl" or row["kernel"] == CUBLAS}
        if CUBLAS in own:
            reference = own[CUBLAS]["microseconds"]
            found |= {name: Timed(row["microseconds"], reference, row["weight_bytes"]) for name, row in own.items()}
    return found


def _is_here(row: Mapping[str, Any]) -> bool:
    return (row["oc"], row["ic"], row["n"]) == (OC, IC, TOKENS)


def cells(
    times: Times, models: Sequence[str], rows: Callable[[str, str], Sequence[Mapping[str, Any]] | None]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table, `-` where nothing was measured.

    Args:
        times: of `read_times`.
        models: in order.
        rows: (model, recipe) -> what was measured of it on every text, or `None`.
    """
    heads = ["weights", "bits a weight", "in memory", "us", "times cuBLAS FP16"]
    heads += [f"{model}: {what}" for model in models for what in ("KL x 1000", "loss, %")]
    lines = []
    for choice in CHOICES:
        qualities = [rows(model, choice.recipe) if choice.recipe else None for model in models]
        bits = next((found[0]["bits_per_weight"] for found in qualities if found), None)
        line = [choice.words, "16" if not choice.recipe else measured(bits), *_time(choice, times)]
        for found in qualities:
            if not choice.recipe:
                line += ["0", "0"]
            elif found is None:
                line += ["-", "-"]
            else:
                line.append(" / ".join(measured(1000 * row["kl"]) for row in found))
                line.append(" / ".join(f"{100 * (row['perplexity_ratio'] - 1):+.2f}" for row in found))
        lines.append(line)
    return heads, lines


def _time(choice: Choice, times: Times) -> list[str]:
    """Return the bits a weight in memory, the microseconds and how often cuBLAS takes them."""
    name = next((name for name in choice.kernels if name in times), None)
    if name is None:
        return ["-", "-", "-"]
    timed = times[name]
    other = "" if name == choice.kernels[0] else f" (`{name.partition(':')[0]}`)"
    bits, ratio = 8 * timed.nbytes / (OC * IC), timed.cublas / timed.microseconds
    return [f"{bits:.1f}{other}", f"{timed.microseconds:.1f}", f"{ratio:.2f}"]
