"""What of a plan can another system not be told? Sentences made of the plan, and lines that stand above settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersor.planner.plan import Chosen, Cut, Plan

_CUT = ("qkv", "attention", "out", "gate_up", "down", "experts", "embedding", "head")
"""Blocks that other systems cut by all ranks of a stage."""
_WHOLE = ("replicate", "sequence")
_MEGATRON = {"out": "row", "down": "row"}
_NAMED = 3
"""Weights that a sentence names; what is beyond is counted."""


def above(plan: Plan, what: str, limits: Iterable[str]) -> list[str]:
    """Return lines of text for the head of a file of settings.

    Args:
        plan: what is written.
        what: whose settings these are, and how they are used.
        limits: sentences of what of the plan they do not say.
    """
    parts = f", {plan.parts} micro-batches" if plan.parts > 1 else ""
    found = [f"{plan.model} on {plan.devices} x {plan.chip} ({plan.mesh}): {plan.axes()}{parts}", what]
    said = list(limits)
    return [
        *found,
        *(("Not said by these settings:", *(f"- {one}" for one in said)) if said else ("They say all of it.",)),
    ]


def chosen(plan: Plan, block: str) -> list[Chosen]:
    """Return what was chosen for a block, of every kind of layers and phase."""
    return [one for one in plan.chosen if one.block == block]


def first_phase(plan: Plan) -> str:
    """Return the phase whose layouts count where there can be one: decode, where it is planned."""
    return next(iter(plan.passes))


def layers_of(plan: Plan) -> list[int]:
    """Return the layers of every stage."""
    return [stage.last - stage.first for stage in plan.stages]


def heads_of(plan: Plan) -> list[list[int]]:
    """Return the query heads of every rank, for every kind of layers whose attention is cut by them."""
    return [[last - first for first, last in one.heads] for one in chosen(plan, "attention") if one.heads]


def with_experts(plan: Plan) -> bool:
    """Whether the model has experts."""
    return bool(chosen(plan, "experts"))


def whole_experts(plan: Plan) -> bool:
    """Whether whole experts are dealt out to the ranks that have them together."""
    return any(one.way == "expert" for one in chosen(plan, "experts")) or plan.expert > 1


def uneven(plan: Plan, system: str) -> Iterator[str]:
    """Yield that weights are cut into unequal slices, which the system does not do."""
    found = [(cut, _widths(cut)) for cut in plan.cuts]
    odd = [(cut, widths) for cut, widths in found if len(set(widths)) > 1]
    if odd:
        words = [
            f"{cut.module} ({', '.join(map(str, widths[:4]))}{', ...' if len(widths) > 4 else ''})"
            for cut, widths in odd
        ]
        more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
        yield f"{system} cuts evenly; the plan has unequal slices of {', '.join(words[:_NAMED])}{more}"


def whole_blocks(plan: Plan, system: str) -> Iterator[str]:
    """Yield that blocks stay whole on every rank, or are cut otherwise than Megatron's."""
    if plan.tensor == 1:
        return
    phase = first_phase(plan)
    of = [one for one in plan.chosen if one.phase == phase and one.block in _CUT]
    whole = [_label(one) for one in of if one.way in _WHOLE]
    if whole:
        yield f"{system} cuts every block; the plan leaves whole on every rank: {', '.join(whole)}"
    other = [
        f"{_label(one)} by {one.way}"
        for one in of
        if one.way not in _WHOLE and _MEGATRON.get(one.block, one.way) != one.way
    ]
    if other:
        yield f"{system} cuts these blocks by row; the plan cuts {', '.join(other)}"


def phases(plan: Plan, system: str) -> Iterator[str]:
    """Yield that prompts have other layouts than decode steps, which the system has not."""
    names = list(plan.passes)
    if any(one.way in ("sequence", "batch") for one in plan.chosen if one.phase == names[0]):
        yield f"{system} has all tokens on every rank; the plan has some on each for blocks by sequence or batch"
    if len(names) < 2:
        return
    of = {(one.group, one.block, one.phase): one for one in plan.chosen}
    apart = [
        f"{_label(one)} by {of[one.group, one.block, names[1]].way}"
        for one in plan.chosen
        if one.phase == names[0] and of[one.group, one.block, names[1]].way != one.way
    ]
    if apart:
        yield f"{system} has one layout for both phases; the plan has another one for {names[1]}: {', '.join(apart)}"


def batches(plan: Plan, system: str) -> Iterator[str]:
    """Yield that the micro-batches of a step are the system's own choice."""
    if plan.pipeline > 1:
        yield f"{system} itself chooses how many batches go through the stages at once; the plan counts {plan.parts}"


def _label(one: Chosen) -> str:
    return one.block if one.group == one.block else f"{one.group} {one.block}"


def _widths(cut: Cut) -> list[int]:
    """Return what every rank has of a weight, along the axis that it is cut along."""
    found = []
    for one in cut.slices:
        if one.rows is not None:
            found.append(sum(last - first for first, last in one.rows))
        else:
            span = one.columns or one.experts or (0, 0)
            found.append(span[1] - span[0])
    return found
