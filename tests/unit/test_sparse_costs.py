"""Predicted times of the kernel of pruned weights are near the measured ones, and so are the choices made by them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tersor.formats import get_scheme
from tersor.hardware import chip_named
from tersor.kernels.tune import sparse as tune
from tersor.layouts.sparse_packing import SparsePacking

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "sparse_even_h200.json"
OC, IC = 28672, 7168
H200 = chip_named("H200")


def packing_of(values: str, bytewise: bool) -> SparsePacking:
    """Return the packing of a row of the file: plain numbers, all codes of a format, or those up to a magnitude."""
    if values == "float16":
        return SparsePacking.of(values, values)
    name, _, largest = values.partition(":")
    numbers = get_scheme(name).format.values().abs()
    kept = (numbers <= float(largest or "inf")).nonzero()[:, 0]
    return SparsePacking.holding(get_scheme(name), "float8_e4m3fn" if bytewise else "float16", kept)


def problem_of(row: dict[str, Any]) -> tune.SparseProblem:
    """Return what was measured, as the chooser is asked for it."""
    bytewise = row["activations"] == "fp8"
    packing, nbytes = packing_of(row["values"], bytewise), round(OC * IC * row["bits"] / 8)
    sizes = {"oc": OC, "ic": IC, "n": row["tokens"], "places": row["places"], "nbytes": nbytes}
    return tune.SparseProblem(**sizes, bits=packing.bits, instructions=packing.instructions, bytewise=bytewise)


def tile_of(row: dict[str, Any]) -> tune.SparseTile:
    """Return the tile that was measured."""
    tokens = next(tokens for tokens in tune.TOKENS if row["tokens"] <= tokens)
    shape = {name: row[name] for name in ("row_groups", "resident", "layers")}
    return tune.tile_for(tokens, H200, **shape, bytewise=row["activations"] == "fp8")


def test_times_and_choices_are_near_the_measured_ones() -> None:
    """Of tiles that may be chosen."""
    rows = [row for row in json.loads(RESULTS.read_text())["rows"] if row["unrolled"] in (None, 4)]
    errors, kinds = [], dict[tuple[Any, ...], list[tuple[float, float]]]()
    for row in rows:
        problem, tile = problem_of(row), tile_of(row)
        if tile not in tune.tiles(tile.tokens, problem.bits, H200, problem.bytewise):
            continue
        found = 1e6 * tune.seconds(problem, tune.config(tile, OC, row["places"], H200, row["tokens"]), H200)
        errors.append(abs(math.log(found / row["microseconds"])))
        kind = tuple(row[name] for name in ("values", "activations", "sparsity", "tokens"))
        kinds.setdefault(kind, []).append((found, row["microseconds"]))
    assert len(errors) >= 30 and sum(errors) / len(errors) < 0.04 and max(errors) < 0.15
    for kind, times in kinds.items():
        assert min(times)[1] <= 1.05 * min(measured for _, measured in times), kind
