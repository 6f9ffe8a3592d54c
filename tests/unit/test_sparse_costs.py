"""Predicted times of the kernel of pruned weights are near the measured ones, and so are the choices made by them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tersor.formats import get_scheme
from tersor.hardware import chip_named
from tersor.kernels.tune import sparse as tune
from tersor.layouts.sparse_packing import SparsePacking

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "sparse_tiles_h200.json"
H200 = chip_named("H200")


def packing_of(values: str) -> SparsePacking:
    """Return the packing of a column of the file: plain numbers, all codes of a format, or those up to a magnitude."""
    if values == "float16":
        return SparsePacking.of(values, values)
    name, _, largest = values.partition(":")
    numbers = get_scheme(name).format.values().abs()
    return SparsePacking.holding(get_scheme(name), "float16", (numbers <= float(largest or "inf")).nonzero()[:, 0])


def predicted(cell: dict[str, Any]) -> float:
    """Return the predicted microseconds of a measured configuration."""
    found = re.match(r"(\d+)x(\d+)r(\d+)l(\d+)", cell["tile"])
    assert found is not None
    rows, tokens, resident, layers = map(int, found.groups())
    tile = tune.tile_for(tokens, H200, row_groups=rows // 64, resident=resident, layers=layers)
    packing = packing_of(cell["values"])
    problem = tune.SparseProblem(
        oc=cell["oc"],
        ic=cell["ic"],
        n=cell["n"],
        bits=packing.bits,
        instructions=packing.instructions + 22,  # of the kernel that was measured
        places=0,
        nbytes=cell["bytes"],
    )
    return 1e6 * tune.seconds(problem, tune.config(tile, cell["oc"], 0, H200, cell["n"]), H200)


def test_times_and_choices_of_whole_tiles_are_near_the_measured_ones() -> None:
    """Those of one run: channels of the others were split evenly, as no layout is any more."""
    cells = [cell for cell in json.loads(RESULTS.read_text())["cells"] if cell["runs"] == 1]
    times = [(cell, predicted(cell)) for cell in cells]
    errors = [abs(math.log(time / cell["us"])) for cell, time in times]
    assert len(cells) == 18 and sum(errors) / len(errors) < 0.09 and max(errors) < 0.35
    for kind in {(cell["values"], cell["sparsity"]) for cell in cells}:
        own = [(cell, time) for cell, time in times if (cell["values"], cell["sparsity"]) == kind]
        chosen = min(own, key=lambda one: one[1])[0]["us"]
        assert chosen <= 1.09 * min(cell["us"] for cell, _ in own), kind
