"""Time layers of experts against their rivals and the memory's speed, all in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tersor.bench import report
from tersor.bench.contenders import HUMMING, Calls, UnfitError, foreign, unlabelled
from tersor.bench.experts.contenders import RIVALS, Contender
from tersor.bench.experts.geometry import Geometry
from tersor.bench.experts.layer import Layer, expected, random_layer, route
from tersor.compress import quantize_rtn
from tersor.errors import InputError
from tersor.formats import Activations

KIND = "tersor bench experts"
VERSION = 1
METHOD = (
    "microseconds a call from the router's logits to the output, median of 9 replays, after 20 ms of replays, of a "
    "CUDA graph that walks over copies of the layer, each call routed by logits of its own, 0.7 GB of weights or more "
    "in all, so that none stays in L2; the first time taken after weights were made is thrown away; random weights, "
    "activations and logits; hit: experts that the tokens of a call were routed to, mean of the calls, and their "
    "bytes; a call's output is compared with the layer in float32 before it is timed; Tersor is launched with "
    "programmatic dependence; torch has bfloat16, compiled is the same by torch.compile; the faster of a rival's ways "
    "counts"
)

_READ = 700 << 20
"""Bytes of weights, at half a byte each, that the calls of a graph read at least."""
_BETWEEN = 256 << 20
"""Bytes that are read at least before the same copy of a layer is read again: five times the L2 cache of an H200."""
_ROUNDED = 0.05
"""Error of a product in 16 bits or of activations in 8, relative by the norm, that is certainly no fault."""
_SPREAD = 3
"""Two products of rounded weights are off by up to so many times what a weight is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One time.

    Attributes:
        name: of the geometry.
        n: tokens.
        kernel: the contender: a format, `torch`, `compiled`, or `humming` and a format.
        way: how it was run, where a contender has several ways, or an empty string.
        experts_hit: experts that tokens were routed to, mean of the calls.
        hit_bytes: bytes of their weights.
        microseconds: time of a call.
    """

    name: str
    n: int
    kernel: str
    way: str
    experts_hit: float
    hit_bytes: int
    microseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A contender, or one of its ways, that did not take a geometry, or a number of tokens, and its reason."""

    name: str
    n: int | None
    kernel: str
    way: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a layer is given.

    Attributes:
        x: [T, H] in the dtype of the layer.
        logits: float32 [T, E] of every call.
        hit: experts that a call's tokens are routed to, mean of the calls.
        y: float32 [T, H], what the first call returns.
    """

    x: torch.Tensor
    logits: list[torch.Tensor]
    hit: float
    y: torch.Tensor


def measure(
    geometries: Sequence[Geometry],
    tokens: Sequence[int],
    contenders: Sequence[Contender],
    microseconds: Callable[[Calls], float],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[Row | Skipped]]:
    """Time every contender at every geometry and number of tokens; yield what was found, a geometry at a time.

    One layer of plain weights is in memory, and the copies of one contender at a time.

    Args:
        geometries: layers.
        tokens: numbers of tokens.
        contenders: who is timed.
        microseconds: times one graph of calls (`timing.graph_microseconds`).
        dtype: of weights and activations before a contender has its own.
        device: where.
        seed: of weights, activations and logits.
        progress: told (done, in all) after every contender.
    """
    total = len(geometries) * len(contenders)
    for number, geometry in enumerate(geometries):
        layer = random_layer(geometry, dtype, device, seed)
        problems = [problem_of(layer, n, seed) for n in tokens]
        found: list[Row | Skipped] = []
        for index, contender in enumerate(contenders):
            found += _measure_one(layer, problems, contender, microseconds)
            progress(number * len(contenders) + index + 1, total)
        yield found


def problem_of(layer: Layer, n: int, seed: int) -> Problem:
    """Return activations of `n` tokens, and logits of as many calls as read enough weights."""
    geometry, device = layer.geometry, layer.down.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + n)
    x = torch.randn(n, geometry.hidden, generator=generator)
    logits: list[torch.Tensor] = []
    hits: list[int] = []
    while len(logits) < 2 or sum(hits) * geometry.parameters / 2 < _READ:
        logits.append(torch.randn(n, geometry.experts, generator=generator).to(device))
        hits.append(len(route(geometry, logits[-1], layer.choice_bias)[0].unique()))
    x = x.to(device, layer.down.dtype)
    return Problem(x=x, logits=logits, hit=sum(hits) / len(hits), y=expected(layer, x, logits[0]))


def copies(geometry: Geometry, expert_bytes: int, calls: int) -> int:
    """Return how many copies of a layer keep any expert from staying in L2, for graphs of so many calls at most.

    A call of one token reads the least: so many others must lie between two calls of one copy that what they read
    pushes out what the first of them did.
    """
    return min(calls, max(2, -(-_BETWEEN // (geometry.top_k * expert_bytes))))


def _measure_one(
    layer: Layer, problems: Sequence[Problem], contender: Contender, microseconds: Callable[[Calls], float]
) -> list[Row | Skipped]:
    geometry = layer.geometry
    expert_bytes = contender.expert_bytes(geometry)

    def skipped(n: int | None, way: str, error: UnfitError) -> Skipped:
        return Skipped(name=geometry.name, n=n, kernel=contender.name, way=way, why=str(error))

    try:
        count = copies(geometry, expert_bytes, max(len(problem.logits) for problem in problems))
        ways = contender.build(layer, count)
    except UnfitError as error:
        return [skipped(None, "", error)]
    allowed = allowed_error(layer, contender)
    found: list[Row | Skipped] = []
    warm = False
    for problem in problems:
        x = problem.x.to(contender.dtype)
        for way, forwards in ways.items():
            try:
                check(forwards[0](x, problem.logits[0]), problem.y, allowed)
                calls = [
                    partial(forwards[index % len(forwards)], x, logits) for index, logits in enumerate(problem.logits)
                ]
                if not warm:
                    _timed(calls, microseconds, contender)  # thrown away, as in `linear`
                    warm = True
                time = _timed(calls, microseconds, contender)
            except UnfitError as error:
                found.append(skipped(len(x), way, error))
                continue
            row = Row(
                name=geometry.name,
                n=len(x),
                kernel=contender.name,
                way=way,
                experts_hit=round(problem.hit, 1),
                hit_bytes=round(problem.hit * expert_bytes),
                microseconds=round(time, 2),
            )
            found.append(row)
    return found


def _timed(calls: Calls, microseconds: Callable[[Calls], float], contender: Contender) -> float:
    """Time calls; where they are another package's, what capturing or replaying them raises is why they are not."""
    return foreign(lambda: microseconds(calls)) if _is_rival(contender.name) else microseconds(calls)


def allowed_error(layer: Layer, contender: Contender) -> float:
    """Return by how much of its norm a contender's output may be off: a few times what rounding does to a weight."""
    allowed = _ROUNDED
    if contender.scheme is not None:
        encoded = quantize_rtn(layer.down[0], contender.scheme)
        allowed += _SPREAD * (encoded.squared_error / encoded.squared_norm) ** 0.5
    return allowed if contender.activations == Activations.NATIVE else allowed + _ROUNDED


def check(y: torch.Tensor, exact: torch.Tensor, allowed: float) -> None:
    """Compare an output with what the layer computes.

    Raises:
        UnfitError: it is off by more than is allowed, or not finite.
    """
    error = float((y.float() - exact).norm() / exact.norm())
    if not error <= allowed:
        raise UnfitError(f"its output is off by {error:.3f} of the norm, where {allowed:.3f} is allowed")


def result(found: Sequence[Row | Skipped], *, dtype: str, seed: int, read_bandwidth: float) -> dict[str, Any]:
    """Return what is written as JSON.

    Args:
        found: rows and who was skipped, in order.
        dtype: of the activations; torch's own experts always have bfloat16.
        seed: of weights, activations and logits.
        read_bandwidth: bytes per second that a large read reached in the same run.
    """
    facts = {"dtype": dtype, "seed": seed, "read_bandwidth": read_bandwidth}
    rows = [row for row in found if isinstance(row, Row)]
    skipped = [row for row in found if isinstance(row, Skipped)]
    return report.result(KIND, VERSION, METHOD, facts, rows, skipped)


def _is_rival(kernel: str) -> bool:
    return kernel.partition(" ")[0] in RIVALS


def fastest(rows: Sequence[dict[str, Any]], name: str, n: int, kernel: str) -> float | None:
    """Return the time of a contender at a geometry and a number of tokens, by its fastest way, or `None`."""
    times = [row["microseconds"] for row in rows if (row["name"], row["n"], row["kernel"]) == (name, n, kernel)]
    return min(times, default=None)


def columns(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table: the bytes hit, the roofline, Tersor's time and its rivals'.

    The roofline is the time in which the packed weights of the experts hit could be read once.
    """
    rows = result["rows"]
    rivals = [name for name in RIVALS if any(row["kernel"].partition(" ")[0] == name for row in rows)]
    kernels = [row["kernel"] for row in (*rows, *result["skipped"]) if not _is_rival(row["kernel"])]
    cells = []
    for name, n, hit in dict.fromkeys((row["name"], row["n"], row["experts_hit"]) for row in rows):
        for kernel in dict.fromkeys(kernels or ["-"]):
            time = fastest(rows, name, n, kernel)
            theirs = [fastest(rows, name, n, f"{HUMMING} {kernel}" if rival == HUMMING else rival) for rival in rivals]
            same = [row for row in rows if (row["name"], row["n"], row["kernel"]) == (name, n, kernel)]
            nbytes = same[0]["hit_bytes"] if same else None
            roof = None if nbytes is None else nbytes / result["read_bandwidth"] * 1e6
            cells.append(
                [
                    name,
                    str(n),
                    kernel,
                    f"{hit:.1f}",
                    _shown(nbytes and nbytes / 1e6),
                    _shown(roof),
                    _shown(time),
                    "-" if roof is None or time is None else f"{100 * roof / time:.0f} %",
                    *(_shown(other) for other in theirs),
                    *(_shown(None if time is None or other is None else other / time, 2) for other in theirs),
                ]
            )
    headings = ["experts", "tokens", "format", "hit", "MB hit", "roofline us", "Tersor us", "of roofline"]
    return [*headings, *(f"{name} us" for name in rivals), *(f"x {name}" for name in rivals)], cells


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def narrowed(
    result: dict[str, Any],
    *,
    names: Collection[str] | None = None,
    tokens: Collection[int] | None = None,
    formats: Collection[str] | None = None,
    activations: Collection[Activations] | None = None,
    rivals: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return a result with the rows that are asked for; `None` asks for all.

    Args:
        result: what `saved.read` returned.
        names: of geometries.
        tokens: numbers of tokens.
        formats: of the weights of Tersor and humming, as `contenders.label` names them (`int4:g128`).
        activations: what Tersor and humming multiply them with.
        rivals: of `contenders.RIVALS`.

    Raises:
        InputError: no row is left.
    """

    def stays(row: dict[str, Any]) -> bool:
        if names is not None and row["name"] not in names:
            return False
        if tokens is not None and row["n"] not in tokens:
            return False
        program, _, of_humming = row["kernel"].partition(" ")
        if rivals is not None and _is_rival(row["kernel"]) and program not in rivals:
            return False
        if program in RIVALS and program != HUMMING:
            return True
        kernel = of_humming or program
        name, multiplied = unlabelled(kernel)
        known = formats is None or name in formats
        return known and (activations is None or multiplied in activations)

    rows = [row for row in result["rows"] if stays(row)]
    if not rows:
        raise InputError("the results file has no such times: ask for fewer things, or for others")
    return {**result, "rows": rows}
