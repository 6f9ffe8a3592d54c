"""How much slower are other ways to plan, at the same costs? On a CPU; nothing of a GPU is timed.

`python bench/planner_baselines.py` plans for 2, 4 and 8 H200 by latency with every search and by every rule, and writes
`bench/results/planner_baselines.json`: ms of a step with its share of prefill, axes, and seconds of each search. With
`--write` it plans nothing and makes the table of docs/planning.md of that file.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import results_file

from tersor.checkpoint.config import parse_scheme
from tersor.hardware import chip_named
from tersor.integrations.transformers.tp_plan import base_plan
from tersor.models.parts import model_of
from tersor.planner import links, rules
from tersor.planner.asked import Asked
from tersor.planner.choose import plan
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Workload

NAME = "planner_baselines"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
MODELS = (
    ("llama-3-8b", "16bit"),
    ("llama-3-70b", "int4:g128"),
    ("llama-3-70b", "16bit"),
    ("qwen3-30b-a3b", "16bit"),
)
DEVICES = (2, 4, 8)
SEARCHES = ("full", "fast", "dqn", "random")
ENGINE = "engine"
ALL = rules.Rule("all TP", lambda mesh: [max(mesh.nodes)], lambda setting: rules.MEGATRON)
"""Megatron's cuts over all GPUs of a node, whether fewer could hold the model or not."""
RULES = (ALL.name, "redco", "model's own", "all tensor", "bytes only")


def asked(name: str, format: str, devices: int) -> Asked:
    """Return what is asked of a model, with the plan that transformers has for it."""
    scheme = None if format == "16bit" else parse_scheme(format, None, None, "format")
    model, chip = model_of(name, scheme), chip_named("h200")
    own = replace(model, own_plan=base_plan(model.architecture))
    return Asked(own, Mesh.of(devices, None, 8), Workload(), Kernels(chip), links.of_chip(chip))


def cell(ms: float | None, axes: str, seconds: float | None = None) -> dict[str, Any]:
    """Return what is kept of a plan; `ms` is `None` where nothing fits."""
    found: dict[str, Any] = {"ms": None if ms is None else round(ms, 6), "axes": axes}
    return found if seconds is None else found | {"searched": round(seconds, 4)}


def row(name: str, format: str, devices: int, searches: tuple[str, ...] = SEARCHES) -> dict[str, Any]:
    """Return the plans of one model on so many GPUs, by search and by rule."""
    question, plans = asked(name, format, devices), {}
    for label in (*searches, ENGINE):
        own = replace(question, served=True) if label == ENGINE else replace(question, method=label)
        found = plan(own)
        plans[label] = cell(1e3 * found.step, found.axes(), found.searched)
    (every,) = ALL.tried(question.ruled, question.mesh, question.workload)
    plans[ALL.name] = cell(None if every.made is None else 1e3 * every.made.step, every.axes.words())
    for rule in found.rules:
        plans[rule.name] = cell(None if rule.seconds is None else 1e3 * rule.seconds, rule.axes)
    return {"model": name, "format": format, "devices": devices, "plans": plans}


def table(result: dict[str, Any]) -> str:
    """Return the table of a result: ms of a step, and for what is slower than the first column by how much."""
    names = (*SEARCHES, ENGINE, *RULES)
    lines = [
        "| model, weights, GPUs | full, ms | " + " | ".join(names[1:]) + " |",
        "|---|---|" + "---|" * (len(names) - 1),
    ]
    for one in result["rows"]:
        best = one["plans"][names[0]]["ms"]
        cells = [f"{best:.2f}", *(_beside(one["plans"].get(name), best) for name in names[1:])]
        lines.append(f"| {one['model']} {one['format']}, {one['devices']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(found: dict[str, Any] | None, best: float) -> str:
    if found is None or found["ms"] is None:
        return "-"
    more = 100 * (found["ms"] / best - 1)
    return "=" if abs(more) < 0.05 else f"{more:+.1f} %"


def page(text: str, result: dict[str, Any]) -> str:
    """Return a page with the table of a result between its marks."""
    return results_file.marked(text, "baselines", table(result))


def main() -> None:
    """Plan all and write the result, or write the page."""
    if results_file.rewrote(__doc__, PAGE, lambda text: page(text, results_file.read(NAME))):
        return
    rows = []
    for name, format in MODELS:
        for devices in DEVICES:
            rows.append(row(name, format, devices))
            print(json.dumps(rows[-1]), flush=True)
    results_file.write(NAME, {"kind": "planner baselines", "version": 1, "rows": rows})


if __name__ == "__main__":
    main()
