"""What do models with half of their weights take and lose beside dense ones? The tables of docs/pruning.md.

Quality is that of the results of `bench/quality/run.py`. Times are those of one linear, with the weight cold: the best
tile that was timed of the kernel alone, and in place of it what `tersor bench linear` took, where that was run; and
those of decode steps of whole models, by `tersor bench latency`.
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
TILES, STEPS = "sparse_even_h200.json", "latency_h200_sparse.json"
"""Results of tiles of the kernel, and of decode steps."""
SIXTEEN = "16bit"
"""What weights of 16 bits are called in results of steps."""


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
    Choice("half, `fp8_e4m3`", "admm-50-fp8_e4m3", ("fp8_e4m3:s50", "fp8_e4m3:448:s50")),
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
    for row in json.loads((folder / TILES).read_text(encoding="utf-8"))["rows"]:
        here = (row["tokens"], row["sparsity"], row["activations"]) == (TOKENS, SPARSITY, "16bit")
        name = f"{row['values']}:s{100 * SPARSITY:g}"
        if here and (name not in found or row["microseconds"] < found[name].microseconds):
            found[name] = Timed(row["microseconds"], row["cublas"], round(row["bits"] * OC * IC / 8))
            found[CUBLAS] = Timed(row["cublas"], row["cublas"], 2 * OC * IC)
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
    other = "" if name == choice.kernels[0] else f" (`{name.rpartition(':')[0]}`)"
    bits, ratio = 8 * timed.nbytes / (OC * IC), timed.cublas / timed.microseconds
    return [f"{bits:.1f}{other}", f"{timed.microseconds:.1f}", f"{ratio:.2f}"]


def steps(folder: Path) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of a table of decode steps: milliseconds, and by how much those of 16 bits are longer.

    There are none where nothing was timed.
    """
    path = folder / STEPS
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    batches = sorted({row["batch"] for row in rows})
    heads = ["model", "tokens before", "weights", "GB read", *(f"{n} rows: ms" for n in batches)]
    cells = []
    for name, context in dict.fromkeys((row["name"], row["context"]) for row in rows):
        own = [row for row in rows if (row["name"], row["context"]) == (name, context)]
        plain = {row["batch"]: row["milliseconds"] for row in own if row["format"] == SIXTEEN}
        for form in dict.fromkeys(row["format"] for row in own):
            found = {row["batch"]: row for row in own if row["format"] == form}
            size = next(iter(found.values()))["weight_bytes"]
            took = [_step(found.get(n), plain.get(n)) for n in batches]
            cells.append([name, str(context), _weights(form), f"{size / 1e9:.2f}", *took])
    return heads, cells


def _step(row: Mapping[str, Any] | None, plain: float | None) -> str:
    """Return the milliseconds of a step, and how many times those of 16 bits are as long."""
    if row is None:
        return "-"
    took = row["milliseconds"]
    return f"{took:.2f}" + ("" if plain is None or row["format"] == SIXTEEN else f" ({plain / took:.2f} times)")


def _weights(form: str) -> str:
    """Return what weights are called whose format and zeros are written as in results."""
    name, _, zeros = form.partition(":s")
    shown = "16 bits" if name == SIXTEEN else f"`{name}`"
    return f"{zeros} % zero, {shown}" if zeros else f"all, {shown}"
