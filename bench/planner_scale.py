"""How long does it take to plan, by GPUs and by model? On one core of a CPU; nothing of a GPU is timed.

`python bench/planner_scale.py` plans for 8 to 16,384 H200 in nodes of eight, by latency and by throughput, among what the
engine runs, as `tersor plan` does, and among all that there is (`--any`). It writes `bench/results/planner_scale.json`:
seconds of each search, and the axes it found. With `--write` it plans nothing and makes the table of docs/planning.md.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from tersor.checkpoint.config import parse_scheme
from tersor.hardware import chip_named
from tersor.models.parts import model_of
from tersor.planner import links
from tersor.planner.asked import Asked
from tersor.planner.choose import plan
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Workload

RESULT = Path(__file__).parent / "results" / "planner_scale.json"
MODELS = (
    ("llama-3-8b", "fp6_e3m2"),
    ("llama-3-70b", "16bit"),
    ("llama-3-70b", "int4:g128"),
    ("qwen3-30b-a3b", "fp6_e3m2"),
)
DEVICES = (8, 16, 64, 256, 1024, 4096, 16384)
RUNS = 2


def rows() -> list[dict[str, Any]]:
    """Return a row for every model, objective and number of GPUs; seconds are the faster of the runs."""
    chip, found = chip_named("h200"), []
    for name, format in MODELS:
        model = model_of(name, None if format == "16bit" else parse_scheme(format, None, None, "format"))
        for objective in ("latency", "throughput"):
            for devices in DEVICES:
                seconds = []
                for _ in range(RUNS):
                    mesh, prices = Mesh.of(devices, None, 8), links.of_chip(chip)
                    best = plan(Asked(model, mesh, Workload(), Kernels(chip), prices, objective))
                    seconds.append(best.searched)
                row = {
                    "model": name,
                    "format": format,
                    "objective": objective,
                    "devices": devices,
                    "seconds": round(min(seconds), 4),
                    "axes": best.axes(),
                    "gap": round(best.gap, 6),
                }
                print(" ".join(map(str, row.values())), flush=True)
                found.append(row)
    return found


def main() -> None:
    """Plan all, and write the result."""
    result = {
        "kind": "planner scale",
        "version": 1,
        "method": "seconds of a search on one core, the faster of two, prices of kernels asked anew each time",
        "environment": {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()},
        "rows": rows(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
