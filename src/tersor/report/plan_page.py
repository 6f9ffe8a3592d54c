"""What does a plan look like? One page: its mesh, stages, cuts, bytes, times, rivals, and where numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from tersor.planner import sources
from tersor.planner.links import Links
from tersor.planner.parts import spans_words
from tersor.planner.plan import Cut, Memory, Plan, Rival
from tersor.report import plan_tables
from tersor.report.frame import framed, note
from tersor.report.mesh_picture import MOST_NODES, axes_of, mesh_picture, speed
from tersor.report.plan_tables import ms
from tersor.report.svg import COLOURS, Markup, bar, element, stack, text
from tersor.report.tables import table
from tersor.report.words import size
from tersor.version import __version__

_PIECES = ("weights", "kv", "activations", "logits", "buffers")
"""Of the bytes of a rank, in the order of their colours."""
_NAMES = {"kv": "keys, values"}
_KINDS = ("products", "attention", "small", "sums", "pipeline")
"""Of the parts of a time, in the order of their colours."""
_TOLD = {
    "products": "with weights",
    "small": "norms, embedding, drawing tokens",
    "sums": "and other exchanges of a stage's ranks",
    "pipeline": "what stages hand on",
}
_LETTERS = (
    "Layouts: R, every rank has all; S, some tokens; H, some heads; I, some inner channels; C, some channels; V, a "
    "part of the vocabulary; P, an addend each, whose sum is pending."
)
_MOST_SPANS = 16
"""Ranks whose spans are written out."""


def page(plan: Plan, links: Links) -> str:
    """Return a plan as HTML.

    Args:
        plan: what is shown.
        links: whose tables it was priced with; where they are called otherwise than the plan's, no bandwidth is shown.
    """
    own = links if links.label == plan.links else None
    head, *rest = plan_tables.lines(plan)
    parts: list[Markup] = [element("h1", text(f"Plan: {head}")), *map(note, rest), _tiles(plan)]
    parts += [element("h2", "Mesh"), *_mesh(plan, own)]
    stages = plan_tables.stage_table(plan)
    parts += [element("h2", "Stages"), note(stages.title), _table(stages), *_memory(plan)]
    parts += [element("h2", "Cuts"), *_cuts(plan)]
    blocks = plan_tables.block_table(plan)
    parts += [element("h3", "Blocks"), note(blocks.title), _table(blocks), note(_LETTERS)]
    parts += [element("h2", "Predicted time"), *_times(plan)]
    parts += [element("h2", "How good it is"), *_proof(plan), *_rivals(plan)]
    parts += [element("h2", "Sources"), *_sources(plan, own)]
    parts += [note(line) for line in plan_tables.closing(plan, links)]
    parts.append(note(f"Made by Tersor {__version__} for model {plan.digest}."))
    return framed(f"Plan: {plan.model}, {plan.axes()}", parts)


def _tiles(plan: Plan) -> Markup:
    """Return what matters most, large."""
    found = [(f"{ms(seconds)} ms", f"a pass of {name}") for name, seconds in plan.passes.items()]
    found += [(f"{ms(plan.step)} ms", "a step"), (f"{plan.rate:,.0f}", "tokens/s")]
    found.append((f"{plan.rate / plan.devices:,.0f}", "tokens/s a GPU"))
    if plan.bound:
        found.append((f"{100 * plan.gap:.2f} %", "above the best at most"))
    tiles = [element("div", element("b", text(value)) + element("span", text(words))) for value, words in found]
    return element("div", "".join(tiles), class_="tiles")


def _table(found: plan_tables.Table, words: int | None = None) -> Markup:
    left = (len(found.headings) if found.words else 1) if words is None else words
    return table(found.headings, found.rows, left)


def _legend(names: Sequence[str]) -> Markup:
    """Return what the colours of a stack mean."""
    square = element("rect", x=0, y=0, width=10, height=10, class_="fill")
    own = [
        element(
            "span", element("svg", square, viewBox="0 0 10 10", class_=f"c{number}", aria_hidden="true") + text(name)
        )
        for number, name in enumerate(names)
    ]
    return element("p", "".join(own), class_="legend")


def _mesh(plan: Plan, links: Links | None) -> Iterator[Markup]:
    axes = axes_of(plan)
    yield mesh_picture(plan, links)
    words = "r: replica, s: stage, t: rank of the stage; a frame is a tensor group, an arrow goes to the next stage."
    more = len(axes.mesh.nodes) - MOST_NODES
    if more > 0:
        words += f" {more} more nodes go on in the same order."
    yield note(words)
    yield table(["axis", "ranks", "where", "over", "what passes"], list(_axes(plan, links)), 5)


def _axes(plan: Plan, links: Links | None) -> Iterator[list[str]]:
    """Yield a row for every axis: its ranks, where they stand, over which link they talk, and how long that takes."""
    axes, kinds = axes_of(plan), plan_tables.by_kind(plan)

    def passing(kind: str) -> str:
        own = kinds.get(kind, {})
        return "; ".join(f"{ms(seconds)} ms of {name}" for name, seconds in own.items()) or "nothing"

    def over(group: Sequence[int]) -> str:
        return "nothing" if sum(group) == 1 else "links of a node" if len(group) == 1 else "links of nodes and between"

    yield ["tensor", str(plan.tensor), _stands(axes.tensor_group), over(axes.tensor_group), f"sums: {passing('sums')}"]
    if plan.expert > 1:
        ranks = f"{plan.expert} replicas x {plan.tensor}"
        yield [
            "expert",
            ranks,
            _stands(axes.expert_group),
            over(axes.expert_group),
            "tokens to experts and back, counted with products",
        ]
    far = axes.crossings if plan.pipeline > 1 else 0
    near = plan.pipeline - 1 - far
    both = [(near, "inside a node", "links of a node"), (far, "between nodes", "links between nodes")]
    where = (
        ", ".join(f"{count} {'boundary' if count == 1 else 'boundaries'} {words}" for count, words, _ in both if count)
        or "one stage"
    )
    how = " and ".join(link for count, _, link in both if count)
    yield ["pipeline", str(plan.pipeline), where, how or "nothing", f"states: {passing('pipeline')}"]
    shared = "; experts as above" if plan.expert > 1 else ""
    yield [
        "data",
        str(plan.data),
        "replicas side by side" if plan.data > 1 else "one replica",
        "nothing",
        f"nothing{shared}",
    ]
    if plan.idle:
        yield ["idle", str(plan.idle), "no group takes them", "nothing", "nothing"]


def _stands(group: Sequence[int]) -> str:
    if len(group) == 1:
        return f"{group[0]} side by side in a node" if group[0] > 1 else "one GPU"
    return f"{' + '.join(map(str, group))} in {len(group)} nodes"


def _memory(plan: Plan) -> Iterator[Markup]:
    """Yield the bytes of every rank against what a device has; ranks that are alike are one line."""
    yield element("h3", "Bytes a rank")
    yield _legend([_NAMES.get(name, name) for name in _PIECES])
    rows: list[list[object]] = []
    for number, stage in enumerate(plan.stages):
        rank = 0
        for memory, alike in groupby(stage.memory):
            count = len(list(alike))
            rows.append(
                [str(number), plan_tables.devices(range(rank, rank + count)), _bytes_bar(memory), *_bytes(memory)]
            )
            rank += count
    headings = ["stage", "ranks", "", *(_NAMES.get(name, name) for name in _PIECES), "all", "of", "used"]
    yield table(headings, rows, 3)
    yield note(
        "Activations: the most at a time. Buffers: of a process and its collectives. A bar is as long as the room."
    )


def _bytes(memory: Memory) -> list[str]:
    own = [size(getattr(memory, name)) for name in _PIECES]
    return [*own, size(memory.total), size(memory.room), f"{memory.total / memory.room:.0%}"]


def _bytes_bar(memory: Memory) -> Markup:
    shares = [(getattr(memory, name) / memory.room, f"c{number}") for number, name in enumerate(_PIECES)]
    return stack(shares, f"{size(memory.total)} of {size(memory.room)}")


def _cuts(plan: Plan) -> Iterator[Markup]:
    found = plan_tables.cut_table(plan)
    rows = [
        [element("span", text(name), class_="name"), *row, _slices(cut), _spans(cut)]
        for (name, *row), cut in zip(found.rows, plan.cuts, strict=True)
    ]
    yield table([*found.headings, "", "of each rank, in order"], rows, len(found.headings) + 2)
    yield note(
        "A weight has its output channels down and its input channels across; a colour is a rank, grey is on every "
        "rank. Cuts keep to the quantum. Slices of experts are whole experts."
    )


def _slices(cut: Cut) -> Markup:
    """Draw a weight, cut into what its ranks have."""
    axis = plan_tables.axis_of(cut)
    if not axis:
        inner = element("rect", x=0, y=0, width=60, height=20, class_="room")
    else:
        owned = plan_tables.spans_of(cut)
        end = max(last for spans in owned for _, last in spans)
        inner = Markup("")
        for rank, spans in enumerate(owned):
            for first, last in spans:
                at, long = first / end, (last - first) / end
                x, y, width, height = (
                    (0.0, 20 * at, 60.0, 20 * long) if axis == "rows" else (60 * at, 0.0, 60 * long, 20.0)
                )
                kind = f"fill c{rank % COLOURS}"
                inner = Markup(inner + element("rect", x=x, y=y, width=width, height=height, class_=kind))
    words = f"{cut.module}: {axis or 'all on every rank'}"
    return element(
        "svg",
        element("title", text(words)) + inner,
        viewBox="0 0 60 20",
        preserveAspectRatio="none",
        role="img",
        aria_label=words,
        class_="slices",
    )


def _spans(cut: Cut) -> str:
    if not plan_tables.axis_of(cut):
        return ""
    owned = [spans_words(spans) for spans in plan_tables.spans_of(cut)]
    if len(owned) > _MOST_SPANS:
        owned = [*owned[: _MOST_SPANS - 2], "...", owned[-1]]
    return ", ".join(owned)


def _times(plan: Plan) -> Iterator[Markup]:
    found = plan_tables.time_table(plan)
    kinds = plan_tables.by_kind(plan)
    names = [kind for kind in _KINDS if kind in kinds]
    yield _legend([f"{kind}: {_TOLD[kind]}" if kind in _TOLD else kind for kind in _KINDS])
    rows: list[list[object]] = []
    for phase, whole in plan.passes.items():
        shares = [
            (kinds[kind][phase] / whole if kind in names else 0.0, f"c{number}") for number, kind in enumerate(_KINDS)
        ]
        rows.append([phase, stack(shares, f"{phase}: {ms(whole)} ms"), ms(whole)])
    yield table(["pass", "", "ms"], rows, 2)
    yield table(found.headings, found.rows, 1)


def _proof(plan: Plan) -> Iterator[Markup]:
    value = ms(plan.step) if plan.objective == "latency" else f"{1e6 * plan.devices / plan.rate:.3f}"
    unit = "ms a step" if plan.objective == "latency" else "us of a GPU for a token"
    bound = 1e3 * plan.bound if plan.objective == "latency" else 1e6 * plan.bound
    if plan.bound:
        yield note(
            f"This plan: {value} {unit}. No plan of the searched space is below {bound:.3f}: it is "
            f"{plan_tables.gap(plan)}, found by {plan.method} in {plan.searched:.2f} s."
        )
    else:
        yield note(f"This plan: {value} {unit}; {plan_tables.gap(plan)}, since {plan.method} gives no bound.")


def _rivals(plan: Plan) -> Iterator[Markup]:
    groups = [own for own in (plan.rivals, plan.rules) if own]
    known = [rival.seconds for own in groups for rival in own if rival.seconds is not None]
    longest = max([plan.step, *known])
    for found, own in zip(plan_tables.rival_tables(plan), groups, strict=True):
        yield element("h3", text(found.title))
        this = ["this plan", plan.axes(), ms(plan.step), f"{plan.rate:,.0f}", ""]
        bars = [bar(plan.step / longest, f"{ms(plan.step)} ms", "kept"), *(_rival_bar(rival, longest) for rival in own)]
        rows = [[*row[:2], one, *row[2:]] for row, one in zip([this, *found.rows], bars, strict=True)]
        yield table([*found.headings[:2], "", *found.headings[2:]], rows, 6)


def _rival_bar(rival: Rival, longest: float) -> Markup:
    if rival.seconds is None:
        return Markup("")
    return bar(rival.seconds / longest, f"{ms(rival.seconds)} ms")


def _sources(plan: Plan, links: Links | None) -> Iterator[Markup]:
    yield note("Every number that the plan is made of. Of bytes, those of the rank of a stage that has most.")
    rows = [[one.name, one.kind, one.value, one.source] for one in sources.told(plan)]
    yield table(["number", "kind", "value", "where it comes from"], rows, 4)
    if links is not None:
        yield element("h3", "Links")
        tables = {f"inside a node, {name}": found for name, found in links.inside.items()}
        tables |= {"inside a node, one_shot": links.one_shot} if links.one_shot is not None else {}
        tables |= {f"between nodes, {name}": found for name, found in links.between.items()}
        yield table(
            ["table", "large payloads", "where it comes from"], [[n, speed(t), t.source] for n, t in tables.items()], 3
        )
