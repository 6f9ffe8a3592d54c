"""`tersor plan`: which device holds which part of a model, at what cost, and why not otherwise?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import chips, console, options
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.hardware import Chip
    from tersor.planner.links import Links
    from tersor.planner.parts import Model
    from tersor.planner.plan import Plan

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
        int | None, typer.Option(min=1, help="Replicas; as many as fit if not given. generate runs one.")
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
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page, with pictures.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="SYSTEM",
            help="Write settings of transformers, vllm, sglang or torchtitan instead: to --output, or print them.",
        ),
    ] = None,
) -> None:
    """Plan how a model is spread over GPUs; no weight is read, and no GPU is needed."""
    from tersor.checkpoint.config import parse_scheme
    from tersor.integrations.plans import check_system, exported
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

    if export is not None:
        check_system(export)
        if json or explain is not None:
            raise InputError("--export prints settings: give it without --json and --explain")
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
        own = _of_plan(found.chip)
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
    settings = None if export is None else exported(found, export)
    if output is not None and settings is None:
        found.save(output)
    if html is not None:
        _write_page(html, found, prices)
    if settings is not None:
        _give(settings, output)
    elif json:
        console.print_json(found.to_dict())
    elif explain is not None:
        rows = [[one.name, one.value, one.source] for one in sources.explain(found, explain)]
        console.print_table(["number", "value", "where it comes from"], rows, words=True)
    else:
        _show(found, prices)
        if taken is not None and described is not None:
            print(f"checked for {described.label}: every weight is there once, every sum is reduced, costs agree")
    for path in (output, html):
        if path is not None and not json:
            print(f"wrote {path}", file=sys.stdout if export is None else sys.stderr)


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
    from tersor import hardware

    return hardware.listed(chip.name, chip.memory_bytes) or chip


def _of_plan(name: str) -> Chip:
    """Return the chip that a plan is for: one of the datasheets, or the GPU here if it is none of them and called so.

    Raises:
        InputError: neither.
    """
    from tersor import hardware

    if name not in hardware.CHIPS and hardware.cuda_available():
        here = _known(chips.wanted(None, "to show a plan for")[0])
        if here.name == name:
            return here
    return hardware.chip_named(name)


def _with_own_plan(model: Model) -> Model:
    from tersor.integrations.transformers.tp_plan import base_plan

    return replace(model, own_plan=base_plan(model.architecture))


def _write_page(path: Path, plan: Plan, links: Links) -> None:
    from tersor.bench import report as written
    from tersor.report.plan_page import page

    written.write(path, page(plan, links))


def _give(settings: str, path: Path | None) -> None:
    """Write settings of another system, or print them."""
    from tersor.bench import report as written

    if path is None:
        print(settings, end="")
    else:
        written.write(path, settings)


def _show(plan: Plan, links: Links) -> None:
    from tersor.report import plan_tables

    for line in plan_tables.lines(plan):
        print(line)
    for table in plan_tables.tables(plan):
        console.print_table(table.headings, table.rows, title=table.title, words=table.words)
    for line in plan_tables.closing(plan, links):
        print(line)
