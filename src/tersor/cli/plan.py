"""`tersor plan`: which device holds which part of a model, at what cost, and why not otherwise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import chips, console, options
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.hardware import Chip
    from tersor.planner.links import Links
    from tersor.planner.parts import Model
    from tersor.planner.plan import Cut, Plan, Rival

CALIBRATE = "calibrate"
PHASES = {"both": ("decode", "prefill"), "decode": ("decode",), "prefill": ("prefill",)}
_KV = {"16bit": 2, "fp8": 1}


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help=(
                "Checkpoint directory, hub id, a folder with a config.json alone, or a name such as llama-3-70b. The "
                "word calibrate measures the links of this machine, and writes them to --output."
            ),
            show_default=False,
        ),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="GPUs in all; nodes of eight, or see --mesh.")] = None,
    mesh: Annotated[
        str | None, typer.Option(help="Nodes and GPUs of each, such as 2x8, or GPUs of unequal nodes, such as 8+4.")
    ] = None,
    chip: Annotated[str | None, typer.Option(help="The GPU, such as h200; default: the one here.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a decode step of one replica.")] = 64,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the longest text.")] = 2048,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    objective: Annotated[
        str, typer.Option(help="latency: seconds of a step; throughput: tokens a second of a GPU.")
    ] = "latency",
    phase: Annotated[str, typer.Option(help="What counts: both, decode or prefill.")] = "both",
    search: Annotated[
        str, typer.Option(help="How the best cuts are found: fast, full, dqn, random or rules.")
    ] = "fast",
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="Ranks of a stage; chosen if not given.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, help="Stages; chosen if not given.")] = None,
    copies: Annotated[
        int | None, typer.Option(min=1, help="Replicas; as many as fit if not given. One is what a server is.")
    ] = None,
    any_way: Annotated[
        bool, typer.Option("--any", help="Search what the engine does not run, too: a plan to read, not for --plan.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="Of the weights, FORMAT[:gN], of a model that has none here; default: 16 bits.")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="Keys and values: 16bit or fp8.")] = "16bit",
    links: Annotated[Path | None, typer.Option(metavar="FILE", help="Tables of links, instead of the chip's.")] = None,
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Search nothing: show a plan, and check it for MODEL.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Say where numbers come from: a name or a part of one, or sums, products, memory, total, ...",
        ),
    ] = None,
    revision: options.Revision = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan how a model is spread over GPUs; no weight is read, and no GPU is needed."""
    from tersor.checkpoint.config import parse_scheme
    from tersor.hardware import chip_named
    from tersor.models.parts import model_of
    from tersor.planner import links as tables
    from tersor.planner import plan as plans
    from tersor.planner import sources
    from tersor.planner.asked import Asked
    from tersor.planner.check import check
    from tersor.planner.choose import plan
    from tersor.planner.cost import Kernels
    from tersor.planner.mesh import Mesh
    from tersor.planner.parts import Workload

    if model is None and taken is None:
        raise InputError("name a model, or a plan to show with --from FILE")
    if model == CALIBRATE:
        _calibrate(devices, chip, output)
        return
    for name, value, known in (("phase", phase, PHASES), ("kv dtype", kv_dtype, _KV)):
        if value not in known:
            raise InputError(f"{name} {value!r}{did_you_mean(value, known)}: use one of {', '.join(known)}")
    scheme = None if format in (None, "16bit") else parse_scheme(str(format), None, None, "--format")
    described = None if model is None else model_of(model, scheme, revision)
    if taken is not None:
        found = plans.read(taken)
        own = chip_named(found.chip)
        prices = tables.of_chip(own) if links is None else tables.read(links)
        if described is not None:
            check(found, described, Kernels(own), prices)
    else:
        assert described is not None
        target = _known(chips.wanted(chip, "to plan for")[0])
        prices = tables.of_chip(target) if links is None else tables.read(links)
        workload = Workload(
            batch=batch, context=context, prompt=min(prompt, context), kv_bytes=_KV[kv_dtype], phases=PHASES[phase]
        )
        kernels = Kernels(target)
        wanted = Mesh.of(devices, mesh, prices.reach)
        asked = Asked(
            _with_own_plan(described),
            wanted,
            workload,
            kernels,
            prices,
            objective,
            search,
            served=not any_way,
            data=copies,
            pipeline=pipeline_parallel,
            tensor=tensor_parallel,
        )
        found = plan(asked)
        check(found, described, kernels, prices)
    if output is not None:
        found.save(output)
    if json:
        console.print_json(found.to_dict())
    elif explain is not None:
        rows = [[one.name, one.value, one.source] for one in sources.explain(found, explain)]
        console.print_table(["number", "value", "where it comes from"], rows, words=True)
    else:
        _show(found, prices)
        if taken is not None and described is not None:
            print(f"checked for {described.label}: every weight is there once, every sum is reduced, costs agree")
    if output is not None and not json:
        print(f"wrote {output}")


def _calibrate(devices: int | None, chip: str | None, output: Path | None) -> None:
    """Measure the links of this machine's GPUs; where there are none, those of its processes."""
    from tersor.bench import links as measuring
    from tersor.hardware import cuda_available

    if output is None:
        raise InputError("say where the tables go: tersor plan calibrate -o links.json")
    target = _known(chips.wanted(chip, "whose links could be measured")[0])
    gpus = cuda_available()
    if devices is None:
        import torch

        devices = torch.cuda.device_count() if gpus else 2
    measuring.write(output, measuring.measured(devices, target, gpus=gpus))
    print(f"wrote {output}: links of {devices} {'GPUs' if gpus else 'processes on CPUs'}")


def _known(chip: Chip) -> Chip:
    """Return the chip of the datasheet that a device is, where one is known, so that a plan holds on other machines."""
    from tersor.hardware import CHIPS

    names = [name for name in CHIPS if chip.name.startswith(name)]
    return CHIPS[max(names, key=len)] if names else chip


def _with_own_plan(model: Model) -> Model:
    from tersor.integrations.transformers.tp_plan import base_plan

    return replace(model, own_plan=base_plan(model.architecture))


def _show(plan: Plan, links: Links) -> None:
    workload, idle = plan.workload, f", {plan.idle} idle" if plan.idle else ""
    print(f"{plan.model} on {plan.devices} x {plan.chip} ({plan.mesh}{idle}), by {plan.objective}")
    print(
        f"{workload['batch']} rows of up to {workload['context']} tokens a replica, prompts of {workload['prompt']}; "
        f"{plan.axes()}" + (f", {plan.parts} micro-batches" if plan.parts > 1 else "")
    )
    for name, seconds in plan.passes.items():
        alone = plan.apart[name]
        more = f"; {alone * 1e3:.3f} ms if it alone counted" if alone < seconds * (1 - 1e-9) else ""
        print(f"{name}: {seconds * 1e3:.3f} ms a pass{more}")
    gap = f"at most {100 * plan.gap:.2f} % above the best" if plan.bound else "how far from the best is not known"
    print(
        f"a step with its share of prefill: {plan.step * 1e3:.3f} ms, {plan.rate:,.0f} tokens/s; {gap} "
        f"({plan.method}, {plan.searched:.2f} s)"
    )
    console.print_table(
        ["stage", "layers", "devices", "weights", "keys, values", "activations", "other", "of", "decode ms"],
        [_stage_row(number, plan) for number in range(plan.pipeline)],
        title="Stages of a replica, and bytes of the rank that has most",
    )
    headings = ["weight", "layers", "cut", "quantum", "slices", "bytes a rank"]
    console.print_table(headings, [_cut_row(cut) for cut in plan.cuts], title="Cuts", words=True)
    names = list(plan.passes)
    _show_chosen(plan, names)
    kinds = list(dict.fromkeys(part.kind for part in plan.times))
    rows = []
    for kind in kinds:
        own = [
            sum(one.seconds for one in plan.times if one.kind == kind and one.name.startswith(f"{n}.")) for n in names
        ]
        rows.append([kind, *(f"{seconds * 1e3:.3f}" for seconds in own)])
    console.print_table(["part", *(f"{name} ms" for name in names)], rows, title="Time (--explain PART says whence)")
    for title, rivals in (("Other ways to deal out the GPUs", plan.rivals), ("Plans by rule", plan.rules)):
        if rivals:
            cells = [_rival_row(rival) for rival in rivals]
            console.print_table(["plan", "axes", "ms a step", "tokens/s", "why not"], cells, title=title, words=True)
    for note in plan.notes:
        print(f"note: {note}")
    print(
        f"links: {links.label}; all sums of up to 1 MiB inside a node are one-shot"
        if links.one_shot
        else f"links: {links.label}"
    )


def _stage_row(number: int, plan: Plan) -> list[str]:
    stage = plan.stages[number]
    most = max(stage.memory, key=lambda memory: memory.total)
    ends = (" + embedding" if stage.embedding else "") + (" + head" if stage.head else "")
    spans = f"{stage.devices[0]}-{stage.devices[-1]}" if len(stage.devices) > 1 else str(stage.devices[0])
    return [
        str(number),
        f"{stage.first}-{stage.last - 1}{ends}",
        spans,
        console.size(most.weights),
        console.size(most.kv),
        console.size(most.activations + most.logits),
        console.size(most.buffers),
        console.size(most.room),
        f"{stage.seconds.get('decode', 0.0) * 1e3:.3f}",
    ]


def _cut_row(cut: Cut) -> list[str]:
    axis, spans = "", [""]
    for name in ("rows", "columns", "experts"):
        found = [getattr(one, name) for one in cut.slices]
        if found[0] is not None:
            axis, spans = name, [_widths(one) for one in found]
    shown = "all" if not axis else f"{axis} {_runs(spans)}"
    sizes = sorted(set(cut.nbytes))
    words = console.size(sizes[-1]) if len(sizes) == 1 else f"{console.size(sizes[0])} to {console.size(sizes[-1])}"
    layers = "" if not cut.layers else f"{len(cut.layers)} of them" if len(cut.layers) > 1 else str(cut.layers[0])
    return [cut.module, layers, cut.way, str(cut.quantum), shown, words]


def _widths(spans: Any) -> str:
    pairs = [spans] if isinstance(spans[0], int) else spans
    return "+".join(str(last - first) for first, last in pairs)


def _runs(words: Sequence[str]) -> str:
    """Return equal words side by side as one, such as `3 x 1024, 512`."""
    found: list[list[object]] = []
    for word in words:
        if found and found[-1][1] == word:
            found[-1][0] = int(str(found[-1][0])) + 1
        else:
            found.append([1, word])
    return ", ".join(f"{count} x {word}" if count != 1 else str(word) for count, word in found)


def _show_chosen(plan: Plan, names: Sequence[str]) -> None:
    of = {(one.group, one.block, one.phase): one for one in plan.chosen}
    rows = []
    for group, block in dict.fromkeys((one.group, one.block) for one in plan.chosen):
        own = [of[group, block, name] for name in names]
        label = block if group == block else f"{group} {block}"
        rows.append([label, *(f"{one.way} ({one.reads} to {one.gives})" for one in own)])
    title = "Blocks: how each is computed, and the layouts that it reads and gives"
    console.print_table(["block", *names], rows, title=title, words=True)


def _rival_row(rival: Rival) -> list[str]:
    if rival.seconds is None or rival.rate is None:
        return [rival.name, rival.axes, "-", "-", rival.why]
    return [rival.name, rival.axes, f"{rival.seconds * 1e3:.3f}", f"{rival.rate:,.0f}", rival.why]
