"""What is said of a plan? Its lines and its tables, which the terminal prints and the page shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tersor.planner.links import Links
from tersor.planner.plan import Cut, Memory, Plan, Rival
from tersor.report.words import size


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text.

    Attributes:
        title: a line above it.
        headings, rows: of its columns.
        words: whether cells are words, not numbers.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    words: bool = True


def lines(plan: Plan) -> Iterator[str]:
    """Yield what stands above all tables: what is planned, for what, how long it takes and how good that is."""
    workload, idle = plan.workload, f", {plan.idle} idle" if plan.idle else ""
    yield f"{plan.model} on {plan.devices} x {plan.chip} ({plan.mesh}{idle}), by {plan.objective}"
    parts = f", {plan.parts} micro-batches" if plan.parts > 1 else ""
    rows = f"{workload['batch']} rows of up to {workload['context']} tokens a replica"
    yield f"{rows}, prompts of {workload['prompt']}; {plan.axes()}{parts}"
    for name, seconds in plan.passes.items():
        alone = plan.apart[name]
        more = f"; {ms(alone)} ms if it alone counted" if alone < seconds * (1 - 1e-9) else ""
        yield f"{name}: {ms(seconds)} ms a pass{more}"
    yield (
        f"a step with its share of prefill: {ms(plan.step)} ms, {plan.rate:,.0f} tokens/s; {gap(plan)} "
        f"({plan.method}, {plan.searched:.2f} s)"
    )


def closing(plan: Plan, links: Links) -> Iterator[str]:
    """Yield what stands below all tables: what could not be cut, and whose links were counted with."""
    for words in plan.notes:
        yield f"note: {words}"
    small = "; all sums of up to 1 MiB inside a node are one-shot" if links.one_shot else ""
    yield f"links: {links.label}{small}"


def gap(plan: Plan) -> str:
    """Return how far a plan can be from the best one, in words."""
    return f"at most {100 * plan.gap:.2f} % above the best" if plan.bound else "how far from the best is not known"


def stage_table(plan: Plan) -> Table:
    """Return the stages of a replica, with the bytes of the rank that has most."""
    headings = ["stage", "layers", "devices", "weights", "keys, values", "activations", "other", "of", "decode ms"]
    rows = [_stage_row(number, plan) for number in range(plan.pipeline)]
    return Table("Stages of a replica, and bytes of the rank that has most", headings, rows, words=False)


def cut_table(plan: Plan) -> Table:
    """Return how every weight is cut."""
    headings = ["weight", "layers", "cut", "quantum", "slices", "bytes a rank"]
    return Table("Cuts", headings, [_cut_row(cut) for cut in plan.cuts])


def block_table(plan: Plan) -> Table:
    """Return how every block is computed in each phase."""
    names, rows = list(plan.passes), []
    of = {(one.group, one.block, one.phase): one for one in plan.chosen}
    for group, block in dict.fromkeys((one.group, one.block) for one in plan.chosen):
        own = [of[group, block, name] for name in names]
        label = block if group == block else f"{group} {block}"
        rows.append([label, *(f"{one.way} ({one.reads} to {one.gives})" for one in own)])
    return Table("Blocks: how each is computed, and the layouts that it reads and gives", ["block", *names], rows)


def by_kind(plan: Plan) -> dict[str, dict[str, float]]:
    """Return kind of a part -> phase -> its seconds of a pass."""
    found: dict[str, dict[str, float]] = {}
    for part in plan.times:
        own = found.setdefault(part.kind, dict.fromkeys(plan.passes, 0.0))
        own[part.name.partition(".")[0]] += part.seconds
    return found


def time_table(plan: Plan) -> Table:
    """Return the predicted time of each pass by kind of part."""
    rows = [[kind, *(ms(seconds) for seconds in own.values())] for kind, own in by_kind(plan).items()]
    return Table("Time (--explain PART says whence)", ["part", *(f"{name} ms" for name in plan.passes)], rows, False)


def rival_tables(plan: Plan) -> Iterator[Table]:
    """Yield other ways to deal out the GPUs, and plans by rule, where there are some."""
    for title, rivals in (("Other ways to deal out the GPUs", plan.rivals), ("Plans by rule", plan.rules)):
        if rivals:
            headings = ["plan", "axes", "ms a step", "tokens/s", "why not"]
            yield Table(title, headings, [_rival_row(rival) for rival in rivals])


def tables(plan: Plan) -> Iterator[Table]:
    """Yield all tables of a plan, in order."""
    yield from (stage_table(plan), cut_table(plan), block_table(plan), time_table(plan))
    yield from rival_tables(plan)


def ms(seconds: float) -> str:
    """Return milliseconds, without the unit."""
    return f"{seconds * 1e3:.3f}"


def devices(numbers: Sequence[int]) -> str:
    """Return numbers of devices that follow each other as text."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def fullest(memories: Sequence[Memory]) -> Memory:
    """Return the bytes of the rank that has most."""
    return max(memories, key=lambda memory: memory.total)


def axis_of(cut: Cut) -> str:
    """Return along what a weight is cut: `rows`, `columns`, `experts`, or nothing where every rank has all of it."""
    return next((name for name in ("rows", "columns", "experts") if getattr(cut.slices[0], name) is not None), "")


def spans_of(cut: Cut) -> list[tuple[tuple[int, int], ...]]:
    """Return the spans of every rank along that axis."""
    found = [getattr(one, axis_of(cut)) for one in cut.slices]
    return [(spans,) if isinstance(spans[0], int) else tuple(spans) for spans in found]


def _stage_row(number: int, plan: Plan) -> list[str]:
    stage = plan.stages[number]
    most = fullest(stage.memory)
    ends = (" + embedding" if stage.embedding else "") + (" + head" if stage.head else "")
    return [
        str(number),
        f"{stage.first}-{stage.last - 1}{ends}",
        devices(stage.devices),
        size(most.weights),
        size(most.kv),
        size(most.activations + most.logits),
        size(most.buffers),
        size(most.room),
        ms(stage.seconds.get("decode", 0.0)),
    ]


def _cut_row(cut: Cut) -> list[str]:
    axis = axis_of(cut)
    shown = f"{axis} {_runs([_widths(spans) for spans in spans_of(cut)])}" if axis else "all"
    sizes = sorted(set(cut.nbytes))
    words = size(sizes[-1]) if len(sizes) == 1 else f"{size(sizes[0])} to {size(sizes[-1])}"
    layers = "" if not cut.layers else f"{len(cut.layers)} of them" if len(cut.layers) > 1 else str(cut.layers[0])
    return [cut.module, layers, cut.way, str(cut.quantum), shown, words]


def _widths(spans: Any) -> str:
    return "+".join(str(last - first) for first, last in spans)


def _runs(words: Sequence[str]) -> str:
    """Return equal words side by side as one, such as `3 x 1024, 512`."""
    found = [(len(list(same)), word) for word, same in groupby(words)]
    return ", ".join(f"{count} x {word}" if count != 1 else word for count, word in found)


def _rival_row(rival: Rival) -> list[str]:
    if rival.seconds is None or rival.rate is None:
        return [rival.name, rival.axes, "-", "-", rival.why]
    return [rival.name, rival.axes, ms(rival.seconds), f"{rival.rate:,.0f}", rival.why]
