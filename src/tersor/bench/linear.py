"""Time packed linears against their rivals and the memory's speed, all in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor import ops
from tersor.bench import report
from tersor.bench.blend import Blend
from tersor.bench.contenders import CUBLAS, FP8, HUMMING, PDL, Calls, Contender, UnfitError, label, packed_bytes
from tersor.bench.shapes import Shape
from tersor.bench.thinned import Thinned
from tersor.formats import Activations, Plain, Scheme
from tersor.hardware import Chip
from tersor.kernels import dense, tune
from tersor.kernels.tune import choice, mixed, sparse
from tersor.layouts.packing import target_of
from tersor.ops import sparse_layout

KIND = "tersor bench linear"
VERSION = 1
METHOD = (
    "microseconds a call, median of 9 replays, after 20 ms of replays, of a CUDA graph that walks over copies of the "
    "weight, 0.7 GB in all, so that none stays in L2; the first time taken after weights were made is thrown away; "
    "random data; pdl: launches captured with programmatic dependent launch, plain: without"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One time.

    Attributes:
        name: what the weight is called, or an empty string.
        oc, ic, n: sizes.
        kernel: the contender: a format, `cublas`, `fp8`, or `humming` and a format.
        chain: `plain` or `pdl`.
        microseconds: time of a call.
        weight_bytes: bytes of the weight that it reads.
    """

    name: str
    oc: int
    ic: int
    n: int
    kernel: str
    chain: str
    microseconds: float
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A contender that did not take a shape, or a number of tokens of it, and its reason."""

    kernel: str
    oc: int
    ic: int
    n: int | None
    why: str


def measure(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    contenders: Sequence[Contender],
    microseconds: Callable[[Calls], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[Row | Skipped]]:
    """Time every contender at every shape and number of tokens; yield what was found, a shape at a time.

    Only one contender's weights are in memory at a time.

    Args:
        shapes: weights.
        tokens: numbers of tokens.
        contenders: who is timed.
        microseconds: times one graph of calls (`timing.graph_microseconds`).
        progress: told (done, in all) after every contender.
    """
    total = len(shapes) * len(contenders)
    for shape_index, shape in enumerate(shapes):
        found: list[Row | Skipped] = []
        for index, contender in enumerate(contenders):
            found += _measure_one(shape, tokens, contender, microseconds)
            progress(shape_index * len(contenders) + index + 1, total)
        yield found


def _measure_one(
    shape: Shape, tokens: Sequence[int], contender: Contender, microseconds: Callable[[Calls], float]
) -> list[Row | Skipped]:
    def skipped(n: int | None, error: UnfitError) -> Skipped:
        return Skipped(kernel=contender.name, oc=shape.oc, ic=shape.ic, n=n, why=str(error))

    try:
        schedule = contender.build(shape.oc, shape.ic)
    except UnfitError as error:
        return [skipped(None, error)]
    found: list[Row | Skipped] = []
    warm = False
    for n in tokens:
        for chain in contender.chains:
            try:
                calls = schedule(n, chain)
                if not warm:
                    microseconds(calls)  # thrown away: clocks fall while weights are made, and rise slowly
                    warm = True
                time = microseconds(calls)
            except UnfitError as error:
                found.append(skipped(n, error))
                continue
            row = Row(
                name=shape.name,
                oc=shape.oc,
                ic=shape.ic,
                n=n,
                kernel=contender.name,
                chain=chain,
                microseconds=round(time, 2),
                weight_bytes=contender.weight_bytes(shape.oc, shape.ic),
            )
            found.append(row)
    return found


def result(found: Sequence[Row | Skipped], *, dtype: str, read_bandwidth: float) -> dict[str, Any]:
    """Return what is written as JSON.

    Args:
        found: rows and contenders that were skipped, in order.
        dtype: of the activations.
        read_bandwidth: bytes per second that a large read reached in the same run.
    """
    facts = {"dtype": dtype, "read_bandwidth": read_bandwidth}
    rows = [row for row in found if isinstance(row, Row)]
    skipped = [row for row in found if isinstance(row, Skipped)]
    return report.result(KIND, VERSION, METHOD, facts, rows, skipped)


def roof(row: dict[str, Any], read_bandwidth: float) -> float:
    """Return the microseconds in which the weight of a row could be read once."""
    return row["weight_bytes"] / read_bandwidth * 1e6


def rival(row: dict[str, Any], name: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the time of `cublas`, `fp8` or `humming` for the product of a row, or `None`; humming in its format."""
    wanted = name if name != HUMMING else f"{HUMMING} {row['kernel'].removeprefix(HUMMING + ' ')}"
    same = ("oc", "ic", "n")
    times = [
        other["microseconds"]
        for other in rows
        if other["kernel"] == wanted and all(other[key] == row[key] for key in same)
    ]
    return times[0] if times else None


def columns(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table: time, speed, share of the roofline, ratio to every rival measured."""
    rows = result["rows"]
    rivals = {
        heading: name
        for name, heading in ((CUBLAS, "x cuBLAS"), (FP8, "x FP8"), (HUMMING, "x humming"))
        if any(row["kernel"].partition(" ")[0] == name for row in rows)
    }
    cells = []
    for row in rows:
        time = row["microseconds"]
        theirs = [rival(row, name, rows) for name in rivals.values()]
        cells.append(
            [
                _weight(row),
                str(row["n"]),
                f"{row['kernel']}, pdl" if row["chain"] == PDL else row["kernel"],
                f"{time:.1f}",
                f"{row['weight_bytes'] / time / 1e3:.0f}",
                f"{100 * roof(row, result['read_bandwidth']) / time:.0f} %",
                *("-" if other is None else f"{other / time:.2f}" for other in theirs),
            ]
        )
    return ["weight", "N", "kernel", "us", "GB/s", "of roofline", *rivals], cells


def forecast(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    schemes: Sequence[Scheme | Blend | Thinned],
    chip: Chip,
    activations: Sequence[Activations | str] = (Activations.NATIVE,),
) -> list[dict[str, Any]]:
    """Return what Tersor would run on a chip: bytes, roofline by its datasheet, configuration, predicted time.

    Returns:
        For each shape, scheme, kind of activations and number of tokens: name, oc, ic, n, kernel, weight_bytes,
        roof_microseconds, config (or why there is none), from (`measured`, `predicted` or `-`) and
        predicted_microseconds (`None` without one).
    """
    rows = []
    for shape in shapes:
        for scheme, kind in [(scheme, kind) for kind in activations for scheme in schemes]:
            for n in tokens:
                nbytes = packed_bytes(scheme, shape.oc, shape.ic)
                rows.append(
                    {
                        "name": shape.name,
                        "oc": shape.oc,
                        "ic": shape.ic,
                        "n": n,
                        "kernel": label(scheme, kind),
                        "weight_bytes": nbytes,
                        "roof_microseconds": round(nbytes / chip.bandwidth * 1e6, 2),
                        **_choice(shape, scheme, n, chip, kind),
                    }
                )
    return rows


def problem_of(
    shape: Shape, scheme: Scheme, n: int, activations: Activations | str = Activations.NATIVE
) -> tune.LinearProblem:
    """Return the problem that contiguous activations [n, IC] make with a weight."""
    chosen = Activations.of(activations)
    aligned = chosen is not Activations.NATIVE or shape.ic % 8 == 0
    return dense.problem_of(scheme, (shape.oc, shape.ic), n, aligned=aligned, activations=chosen)


def _choice(
    shape: Shape, scheme: Scheme | Blend | Thinned, n: int, chip: Chip, activations: Activations | str
) -> dict[str, Any]:
    nothing = {"from": "-", "predicted_microseconds": None}
    if isinstance(scheme, Thinned):
        return _pruned_choice(shape, scheme, n, chip, Activations.of(activations), nothing)
    if isinstance(scheme, Blend):
        return _mixed_choice(shape, scheme, n, chip, Activations.of(activations), nothing)
    if not ops.kernels_for(scheme, torch.float16, chip, activations):
        return {"config": "no kernel decodes it", **nothing}
    problem = problem_of(shape, scheme, n, activations)
    if not tune.fused(problem, chip):
        return {"config": "decoded once for cuBLAS", **nothing}
    config = tune.choose(problem, chip)
    return {
        "config": str(config),
        "from": "predicted" if choice.measured(problem, chip) is None else "measured",
        "predicted_microseconds": round(tune.seconds(problem, config, chip) * 1e6, 2),
    }


def _pruned_choice(
    shape: Shape, thinned: Thinned, n: int, chip: Chip, activations: Activations, nothing: dict[str, Any]
) -> dict[str, Any]:
    own = str(thinned.values.dtype) if isinstance(thinned.values, Plain) else "float16"
    sizes, dtype = (shape.oc, shape.ic), getattr(torch, own)
    target = target_of(activations, dtype)
    if target is None or sparse_layout.chip_reason(thinned.sparse, sizes, dtype, chip, activations):
        native = activations is Activations.NATIVE
        return {"config": "decoded for cuBLAS" if native else "decoded by blocks", **nothing}
    packing, (places, _) = thinned.packing(target), sparse_layout.cut_of(thinned.sparse, sizes, dtype, chip)
    problem = sparse_layout.problem_of(packing, sizes, n, places, thinned.packed_bytes(*sizes))
    reason, config = sparse_layout.decide(problem, chip)
    time = sparse.decompress_seconds(problem, chip) if config is None else sparse.seconds(problem, config, chip)
    return {
        "config": "decoded for cuBLAS" if config is None else reason.why,
        "from": "predicted",
        "predicted_microseconds": round(time * 1e6, 2),
    }


def mixed_problem(shape: Shape, blend: Blend, n: int, activations: Activations) -> mixed.MixedProblem:
    """Return the problem that activations [n, IC] make with a mixed weight."""
    rows = blend.assignment(shape.oc).rows
    return mixed.MixedProblem(
        levels=tuple(
            dense.problem_of(level, (count, shape.ic), n, activations=activations)
            for level, count in zip(blend.levels, rows, strict=True)
        ),
        apart=not blend.in_order,
    )


def _mixed_choice(
    shape: Shape, blend: Blend, n: int, chip: Chip, activations: Activations, nothing: dict[str, Any]
) -> dict[str, Any]:
    kernels = all(ops.kernels_for(level, torch.float16, chip, activations) for level in blend.levels)
    if not kernels or chip.capability != (9, 0):
        return {"config": "a product a row set", **nothing}
    problem = mixed_problem(shape, blend, n, activations)
    config = mixed.choose(problem, chip)
    predicted = round(mixed.seconds(problem, config, chip) * 1e6, 2)
    return {"config": str(config), "from": "predicted", "predicted_microseconds": predicted}


def forecast_columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table of a `plan`."""
    cells = []
    for row in rows:
        predicted = row["predicted_microseconds"]
        cells.append(
            [
                _weight(row),
                str(row["n"]),
                row["kernel"],
                f"{row['weight_bytes'] / 1e6:.1f}",
                f"{row['roof_microseconds']:.1f}",
                "-" if predicted is None else f"{predicted:.1f}",
                row["config"] + (" (measured)" if row["from"] == "measured" else ""),
            ]
        )
    return ["weight", "N", "format", "MB", "roofline us", "predicted us", "configuration"], cells


def _weight(row: dict[str, Any]) -> str:
    sizes = f"{row['oc']}x{row['ic']}"
    return f"{row['name']} {sizes}" if row["name"] else sizes
