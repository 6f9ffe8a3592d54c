"""How long does it take to plan, by GPUs and by model? On one core of a CPU; nothing of a GPU is timed.

`python bench/planner_scale.py` plans for 8 to 16,384 H200 in nodes of eight, by latency and by throughput, among what
the engine runs, as `tersor plan` does, and among all that there is (`--any`). It writes the seconds of each search, and
the axes it found, to `bench/results/planner_scale.json`. With `--write` it plans nothing and makes the table of
docs/planning.md of that file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import results_file

from tersor.checkpoint.config import parse_scheme
from tersor.hardware import chip_named
from tersor.models.parts import model_of
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.choose import plan
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Workload

NAME = "planner_scale"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
MODELS = (
    ("llama-3-8b", "fp6_e3m2"),
    ("llama-3-70b", "16bit"),
    ("llama-3-70b", "int4:g128"),
    ("qwen3-30b-a3b", "fp6_e3m2"),
)
DEVICES = (8, 16, 64, 256, 1024, 4096, 16384)
SHOWN = (8, 64, 1024, 16384)
"""Numbers of GPUs that are in the table."""
OBJECTIVES = ("latency", "throughput")
SPACES = ("engine", "any")
RUNS = 2
METHOD = (
    "seconds of the processor that a search takes in one thread, the faster of two, prices of kernels asked anew each "
    "time; engine: among plans that the engine runs, any: among all"
)


def row(name: str, format: str, space: str, objective: str, devices: int, runs: int = RUNS) -> dict[str, Any]:
    """Return what one search took, the fastest of some runs, and what it found."""
    model = model_of(name, None if format == "16bit" else parse_scheme(format, None, None, "format"))
    chip, seconds = chip_named("h200"), []
    for _ in range(runs):
        mesh, prices = Mesh.of(devices, None, 8), links.of_chip(chip)
        asked = Asked(model, mesh, Workload(), Kernels(chip), prices, objective, served=space == "engine")
        began = time.process_time()
        best = plan(asked)
        seconds.append(time.process_time() - began)
    return {
        "model": name,
        "format": format,
        "space": space,
        "objective": objective,
        "devices": devices,
        "seconds": round(min(seconds), 4),
        "axes": best.axes(),
        "gap": round(best.gap, 6),
    }


def table(result: dict[str, Any]) -> str:
    """Return the table of a result: seconds of every search for some numbers of GPUs, what the engine runs and any."""
    of = {(one["model"], one["format"], one["objective"], one["devices"], one["space"]): one for one in result["rows"]}
    lines = [
        "| model, weights | by | " + " | ".join(f"{devices:,} GPUs" for devices in SHOWN) + " |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    for name, format in MODELS:
        for objective in OBJECTIVES:
            cells = []
            for devices in SHOWN:
                own, every = (of[name, format, objective, devices, space]["seconds"] for space in SPACES)
                cells.append(f"{own:.1f} s ({every:.1f})")
            lines.append(f"| {name} {format} | {objective} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, result: dict[str, Any]) -> str:
    """Return a page with the table of a result between its marks."""
    return results_file.marked(text, "scale", table(result))


def main() -> None:
    """Plan all and write the result, or write the page."""
    if results_file.rewrote(__doc__, PAGE, lambda text: page(text, results_file.read(NAME))):
        return
    rows = []
    for name, format in MODELS:
        for objective in OBJECTIVES:
            for devices in DEVICES:
                for space in SPACES:
                    rows.append(row(name, format, space, objective, devices))
                    print(" ".join(map(str, rows[-1].values())), flush=True)
    results_file.write(NAME, {"kind": "planner scale", "version": 2, "method": METHOD, "rows": rows})


if __name__ == "__main__":
    main()
