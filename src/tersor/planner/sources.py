"""Where does a number of a plan come from? Times by part, bytes of ranks and weights, sums, and other plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tersor.errors import InputError
from tersor.planner import memory
from tersor.planner.plan import Cut, Plan
from tersor.planner.ways import DECODE, PREFILL


@dataclass(frozen=True, slots=True)
class Told:
    """A number and its source.

    Attributes:
        name: such as `decode.layers.0-79.out`, `memory.stage 0.kv` or `step`.
        kind: that of a part of the time, or `memory`, `weights`, `total`, `other` (ways to deal GPUs out) or `rule`.
        value: with its unit, as text.
        source: where it comes from.
    """

    name: str
    kind: str
    value: str
    source: str


def explain(plan: Plan, part: str) -> tuple[Told, ...]:
    """Return the numbers of a plan whose kind a text is, or in whose names it is.

    Raises:
        InputError: there are none.
    """
    every = tuple(told(plan))
    found = tuple(one for one in every if part == one.kind or part in one.name)
    if not found:
        raise InputError(f"the plan has no part {part!r}: it has {', '.join(dict.fromkeys(one.name for one in every))}")
    return found


def told(plan: Plan) -> Iterator[Told]:
    """Yield every number of a plan."""
    for part in plan.times:
        each = f" ({part.count} x {part.seconds / part.count * 1e6:.2f} us)" if part.count > 1 else ""
        yield Told(part.name, part.kind, f"{part.seconds * 1e3:.3f} ms{each}", part.source)
    sizes = plan.workload
    kv = (
        f"pages of 64 tokens for {sizes['batch']} rows of {sizes['context']} tokens, {sizes['kv_bytes']} bytes a number"
    )
    sources = {
        "weights": "bytes of the stored tensors' shapes, of this rank's slices; norms are on every rank",
        "kv": f"{kv}, of this rank's heads",
        "activations": "16-bit: three streams of all tokens of a pass, and the widest block behind them",
        "logits": "16-bit logits of the rows of a step; twice where ranks gather them",
        "buffers": f"{memory.PROCESS} of a process, {memory.COLLECTIVES} of collectives (aiconfigurator, h200_sxm)",
        "room": f"{memory.USABLE:.0%} of the memory of {plan.chip} (hardware.py)",
    }
    sources["total"] = "sum of weights, kv, activations, logits and buffers"
    for number, stage in enumerate(plan.stages):
        most = max(stage.memory, key=lambda one: one.total)
        for name, source in sources.items():
            yield Told(f"memory.stage {number}.{name}", "memory", f"{getattr(most, name) / 1e9:.3f} GB", source)
        for rank, own in enumerate(stage.memory):
            for name, source in sources.items():
                if getattr(own, name) != getattr(most, name):
                    value = f"{getattr(own, name) / 1e9:.3f} GB"
                    yield Told(f"memory.stage {number}.rank {rank}.{name}", "memory", value, source)
    for cut in plan.cuts:
        yield Told(f"weights.{cut.module}", "weights", _sizes(cut), _cut_words(cut))
    for number, stage in enumerate(plan.stages):
        for name, seconds in stage.seconds.items():
            words = f"sum of the parts of layers {stage.first} to {stage.last - 1}"
            ends = " and of the embedding" * stage.embedding + " and of what is behind all layers" * stage.head
            yield Told(f"{name} stage {number}", "total", f"{seconds * 1e3:.3f} ms", words + ends)
    for name, seconds in plan.passes.items():
        yield Told(f"{name} pass", "total", f"{seconds * 1e3:.3f} ms", "sum of its parts over all stages")
    for name, seconds in plan.apart.items():
        words = f"another search on the same axes, in which {name} alone counts"
        yield Told(f"{name} apart", "total", f"{seconds * 1e3:.3f} ms", words)
    yield Told("step", "total", f"{plan.step * 1e3:.3f} ms", _step_words(plan))
    of = f"{plan.data} replicas x {sizes['batch']} rows over a step" if DECODE in plan.passes else "tokens of prompts"
    yield Told("rate", "total", f"{plan.rate:,.0f} tokens/s", of)
    words = "least bound of all ways to deal out the GPUs: what was found for each, or bytes in even shares"
    yield Told("bound", "total", f"{plan.bound:.6g} s", words)
    yield Told("gap", "total", f"{100 * plan.gap:.3f} %", "1 less the bound over what was searched for")
    yield Told("searched", "total", f"{plan.searched:.2f} s", f"clock of the machine that planned, {plan.method}")
    for name, rivals in (("other", plan.rivals), ("rule", plan.rules)):
        for rival in rivals:
            if rival.seconds is not None and rival.rate is not None:
                value = f"{rival.seconds * 1e3:.3f} ms, {rival.rate:,.0f} tokens/s"
                of = "its own search" if name == "other" else "its rule"
                yield Told(f"{name}.{rival.name}", name, value, f"the same costs on {rival.axes}, cut by {of}")


def _sizes(cut: Cut) -> str:
    least, most = min(cut.nbytes), max(cut.nbytes)
    return f"{most:,} bytes a rank" if least == most else f"{least:,} to {most:,} bytes a rank"


def _cut_words(cut: Cut) -> str:
    own = cut.slices[0]
    axis = next((name for name in ("rows", "columns", "experts") if getattr(own, name) is not None), "")
    part = (
        f"a rank's {axis}, in quanta of {cut.quantum}" if axis == "columns" else f"a rank's {axis}" if axis else "all"
    )
    return f"bytes of the stored tensors' shapes: {part}"


def _step_words(plan: Plan) -> str:
    words = []
    if DECODE in plan.passes:
        longest = max(stage.seconds[DECODE] for stage in plan.stages)
        words.append(
            "the pass of decode"
            if plan.parts == 1
            else f"the pass of decode, or {plan.parts} times its longest stage, {longest * 1e3:.3f} ms"
        )
    if PREFILL in plan.passes:
        sizes = plan.workload
        share = f"{sizes['batch']} / ({sizes['context']} - {sizes['prompt']})" if words else "1"
        words.append(f"{share} x {'the pass' if plan.parts == 1 else 'the longest stage'} of prefill")
    return " + ".join(words)
