"""What of a plan does the engine run? Layouts between its blocks are whole, and layers cut alike; in a line, why not.

The engine (`models.share`) has every activation on every rank but inside an attention and inside a feed-forward network
or experts, so sums are whole again behind `out` and down. Of P stages P steps are under way, each with a P-th of the
rows that decode. What else a plan may say (tokens or rows dealt out inside a group, experts that several replicas have
together, one block cut and the next one not, a step that passes all stages as one batch) costs less here and there, and
is for reading: `tersor plan --any` searches it too.
"""

from __future__ import annotations

from collections.abc import Collection

from tersor.errors import InputError
from tersor.planner.plan import Chosen, Plan

WAYS: dict[str, tuple[str, ...]] = {
    "norm": ("replicate",),
    "qkv": ("replicate", "column"),
    "attention": ("replicate", "head"),
    "out": ("replicate", "row"),
    "ffn_norm": ("replicate",),
    "gate_up": ("replicate", "column"),
    "down": ("replicate", "row"),
    "experts": ("replicate", "tensor", "expert"),
    "embedding": ("replicate", "vocabulary"),
    "final_norm": ("replicate",),
    "head": ("replicate", "vocabulary"),
    "sample": ("replicate",),
}
"""Block -> ways that the engine has of it."""
TOGETHER = (("qkv", "attention", "out"), ("gate_up", "down"), ("experts",))
"""Blocks of a layer that are all cut or all whole, alike in all layers."""
INSIDE = ("H", "I")
"""Layouts that stay between such blocks: nothing is gathered or dealt out there."""


def under_way(stages: int, batch: int, phases: Collection[str]) -> int:
    """Return the micro-batches that the engine makes of the rows of a decode step: one a stage (`engine.turns`).

    Args:
        stages: of a replica.
        batch: rows.
        phases: that count; of prompts alone nothing is dealt out.
    """
    return min(stages, batch) if "decode" in phases else 1


def why_not(plan: Plan) -> str | None:
    """Return why the engine does not run a plan, in a line without its end; `None` if it does."""
    if plan.expert > 1:
        return f"experts of a layer are dealt out over {plan.expert} replicas, which send each other tokens"
    made = under_way(plan.pipeline, plan.workload["batch"], plan.workload["phases"])
    if plan.parts != made:
        return f"a decode step goes through {plan.pipeline} stages in {plan.parts} parts, and the engine makes {made}"
    found: dict[str, Chosen] = {}
    for one in plan.chosen:
        where = one.block if one.block == one.group else f"{one.block} of {one.group}"
        if one.way not in WAYS.get(one.block, ()):
            return f"{where} is cut by {one.way} in {one.phase}"
        first = found.setdefault(one.block, one)
        if first.way != one.way:
            return f"{where} is {one.way} in {one.phase}, and that of {first.group} {first.way} in {first.phase}"
    for blocks in TOGETHER:
        own = [found[block] for block in blocks if block in found]
        if len({one.way == "replicate" for one in own}) > 1:
            return "in a layer " + ", ".join(f"{one.block} is {one.way}" for one in own)
    ends = [found[block].way for block in ("embedding", "head") if block in found]
    if plan.pipeline == 1 and len(set(ends)) > 1:
        return f"embedding is {ends[0]} and head {ends[1]} on the same ranks"
    return None


def check(plan: Plan) -> None:
    """Hold that the engine runs a plan.

    Raises:
        InputError: it does not; the line says why.
    """
    why = why_not(plan)
    if why is not None:
        raise InputError(f"the engine does not run this plan: {why}; tersor plan without --any makes one that it runs")
