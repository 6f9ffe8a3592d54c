"""Where does a number of a plan come from? Times by part, bytes of the fullest rank of a stage, and their sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tersor.errors import InputError
from tersor.planner import memory
from tersor.planner.plan import Plan
from tersor.planner.ways import DECODE, PREFILL


@dataclass(frozen=True, slots=True)
class Told:
    """A number and its source.

    Attributes:
        name: such as `decode.layers.0-79.out`, `memory.stage 0.kv` or `step`.
        kind: that of a part of the time, or `memory` or `total`.
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
    for number, stage in enumerate(plan.stages):
        most = max(stage.memory, key=lambda one: one.total)
        for name, source in sources.items():
            yield Told(f"memory.stage {number}.{name}", "memory", f"{getattr(most, name) / 1e9:.3f} GB", source)
    for name, seconds in plan.passes.items():
        yield Told(f"{name} pass", "total", f"{seconds * 1e3:.3f} ms", "sum of its parts over all stages")
    yield Told("step", "total", f"{plan.step * 1e3:.3f} ms", _step_words(plan))
    of = f"{plan.data} replicas x {sizes['batch']} rows over a step" if DECODE in plan.passes else "tokens of prompts"
    yield Told("rate", "total", f"{plan.rate:,.0f} tokens/s", of)
    words = "least bound of all ways to deal out the GPUs: what was found for each, or bytes in even shares"
    yield Told("bound", "total", f"{plan.bound:.6g} s", words)


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
