"""`tersor bench latency`: how long does a decode step of a whole model take?"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console, options, planned
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.bench.latency import Latency, Prefill, Skipped
    from tersor.planner.placement import Placement

MODEL = "llama-3-8b"
BATCHES, CONTEXTS = "1,8,32", "512"
FORMAT, PLAIN = "fp6_e3m2", "16bit"


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=f"Models by name; default: {MODEL}.", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows of a step.")] = BATCHES,
    context: Annotated[str, typer.Option(help="Tokens of each row's text.")] = CONTEXTS,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"Of the weights, FORMAT[:gN] or {PLAIN}; repeatable; default: {FORMAT}."),
    ] = None,
    head_format: Annotated[
        str | None, typer.Option(help=f"Of the output head, or {PLAIN}; default: that of the weights.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Part of the weights, but for the output head, that is pruned at random, such as 0.5, or several such "
            "as 0,0.5,0.7; 0 has them whole."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of activations: float16 or bfloat16.")] = "float16",
    kv_dtype: Annotated[str, typer.Option(help="Of keys and values: auto, float16, bfloat16 or fp8.")] = "auto",
    activations: options.Activations = "16bit",
    steps: Annotated[int, typer.Option(min=1, help="Of a timed run; the median of three counts.")] = 32,
    cuda_graph: Annotated[str, typer.Option(help="Steps as CUDA graphs: on or off.")] = "on",
    offload: options.Offload = None,
    resident_layers: options.ResidentLayers = None,
    offload_directory: options.OffloadDirectory = None,
    tensor_parallel: options.TensorParallel = 1,
    pipeline_parallel: options.PipelineParallel = 1,
    expert_parallel: options.ExpertParallel = 1,
    placement: options.Placed = None,
    plan: options.Planned = None,
    against: options.AgainstVllm = None,
    prefill: Annotated[
        int | None, typer.Option(min=1, help="Of rivals also time prompts of so many tokens; default: none.")
    ] = None,
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Time nothing: show what --output wrote.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw milliseconds a step over rows (.png, .pdf, .svg).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: options.Json = False,
) -> None:
    """Time decode steps of whole models with random weights, or show what was timed."""
    from tersor import plots
    from tersor.bench import latency, plot_latency, report, saved
    from tersor.bench.vllm import rows as rival
    from tersor.bench.vllm import variants as rivals
    from tersor.formats import Activations
    from tersor.models import geometries
    from tersor.ops import activations_for

    names = models or [MODEL]
    pages = EngineConfig(
        kv_dtype=kv_dtype,
        offload=offload,
        resident_layers=resident_layers,
        offload_directory=offload_directory,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        expert_parallel=expert_parallel,
        placement=placement_of(names, format or [FORMAT], head_format, placement, plan),
    )
    batches, contexts = bench.numbers("--batch", batch), bench.numbers("--context", context)
    if cuda_graph not in ("on", "off"):
        raise InputError(f"cuda graph {cuda_graph!r}{did_you_mean(cuda_graph, ['on', 'off'])}: use on or off")
    kinds = [(name, None if name == PLAIN else bench.schemes([name], [])[0]) for name in format or [FORMAT]]
    head = None if head_format in (None, PLAIN) else bench.schemes([head_format], [])[0]  # type: ignore[list-item]
    check_ranks(pages, names, against)
    for name in names:
        geometries.geometry(name)
    packed = [scheme for scheme in (*(scheme for _, scheme in kinds), head) if scheme is not None]
    multiplied = activations_for(activations, packed)
    named = rivals.named(against)
    if prefill is not None and not named:
        raise InputError("--prefill is timed of rivals: name one in --against")
    parts = [bench.sparsity(word) or None for word in (sparsity or "0").split(",")]
    if any(parts) and (named or multiplied is not Activations.NATIVE):
        raise InputError("--sparsity: no rival has such weights, nor are they multiplied with 8-bit activations")
    if plot is not None:
        plots.check_plot(plot)
    if output is not None:
        bench.check_folder("--output", output)
    if taken is not None:
        result = saved.read(taken, latency.KIND, latency.VERSION)
        if output is not None:
            report.write(output, report.text(result))
        bench.give(result, show, plot_latency.plot, json=json, plot=plot, output=output)
        return
    variants = rivals.variants(named, [scheme for _, scheme in kinds], multiplied)
    bench.need_gpu("--from shows what was timed")
    kernel_dtype = bench.dtype_named(dtype)
    import torch

    from tersor.bench import timing
    from tersor.engine import workers

    facts: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "activations": str(multiplied)}
    facts["read_bandwidth"] = None
    team = workers.Team(workers.Seat(torch.device("cuda")))
    if pages.ranks > 1:
        placed = pages.placed(len(geometries.geometry(names[0]).layers))
        team, facts["placement"] = workers.joined(pages, placed, torch.device("cuda")), placed.to_dict()
    seat = team.seat
    ours: list[Latency] = []
    theirs: list[Latency | Prefill | Skipped] = []

    def found() -> dict[str, Any]:
        return latency.result([*ours, *theirs], rivals.versions(named), **facts)

    def write() -> None:
        if output is not None and team.first:
            report.write(output, report.text(found()))

    with console.progress("timing vllm") as move:  # first, while the GPU's memory is free
        cells = len(names) * len(variants) * (len(batches) * len(contexts) + (prefill is not None))
        for name in names:
            for row in rival.latencies(
                variants,
                geometries.config_json(name),
                name,
                batches,
                contexts,
                steps,
                dtype=dtype,
                kv_dtype=kv_dtype,
                cuda_graph=cuda_graph == "on",
                prefill=prefill,
            ):
                theirs.append(row)
                move(len(theirs), cells)
                write()
    if team.first:
        facts["read_bandwidth"] = timing.read_bandwidth()
    with console.progress("timing") as move:
        for name in names:
            for (label, scheme), part in itertools.product(kinds, parts):
                runner = latency.runner_of(
                    seat,
                    pages,
                    name,
                    scheme,
                    kernel_dtype,
                    batches,
                    contexts,
                    cuda_graph=cuda_graph == "on",
                    told=_told,
                    head=scheme if head_format is None else head,
                    sparsity=part,
                    activations=multiplied,
                )
                shown = label if part is None else f"{label}:s{100 * part:g}"
                shown = shown if head_format in (None, label) else f"{shown}/{head_format}"
                if team.first:
                    ours += latency.measure(runner, name, shown, batches, contexts, steps, move)
                latency.let_go(runner, team)
                del runner
                torch.cuda.empty_cache()
                write()
    team.leave()
    if team.first:
        bench.give(found(), show, plot_latency.plot, json=json, plot=plot, output=output)


def placement_of(
    names: Sequence[str], formats: Sequence[str], head_format: str | None, given: str | None, plan: Path | None
) -> str | Placement | None:
    """Return what models are placed by; a plan is of one model in one format.

    Raises:
        InputError: a plan, and several models or formats; or it is of another model, or not run by the engine.
    """
    if plan is not None and (len(names) > 1 or len(formats) > 1 or head_format not in (None, formats[0])):
        raise InputError("--plan is of one model, all of whose linears have one format: time that alone")
    if plan is None:
        return given
    from tersor.models import geometries

    return planned.of_config(geometries.config_json(names[0]), names[0], formats[0], given, plan)


def check_ranks(config: EngineConfig, names: Sequence[str], against: str | None, verb: str = "latency") -> None:
    """Hold that a model of several ranks is one that all processes of torchrun make; `verb` is of `tersor bench`.

    Raises:
        InputError: it is not.
    """
    if config.ranks == 1:
        return
    from tersor.engine.workers import by_torchrun

    if not by_torchrun(config):
        raise InputError(
            f"{config.ranks_said}: start them all, torchrun --nproc-per-node {config.ranks} -m tersor bench {verb}"
        )
    if len(names) > 1 or against is not None:
        raise InputError(f"{config.ranks_said}: one model at a time is timed, and no rival")


def _told(line: str) -> None:
    print(f"tersor: {line}", file=sys.stderr, flush=True)


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table; what was not timed goes to stderr."""
    from tersor.bench import latency

    for row in result["skipped"]:
        what = f", {row['what']}" if row["what"] else ""
        print(f"{row['name']} in {row['format']}{what} is not timed: {row['why']}", file=sys.stderr)
    if json:
        console.print_json(result)
        return
    gpu = result["environment"].get("gpu", "no GPU")
    kv = result["dtype"] if result["kv_dtype"] == "auto" else result["kv_dtype"]
    bandwidth = result["read_bandwidth"]
    reached = "" if bandwidth is None else f"; a large read reaches {bandwidth / 1e12:.2f} TB/s"
    print(f"{gpu}, {result['dtype']} activations, keys and values in {kv}{reached}")
    console.print_table(*latency.columns(result))
    for row in result.get("prefills", []):
        asked = f"{row['prompts']} prompts of {row['prompt_tokens']} tokens"
        print(f"{row['name']} in {row['format']} reads {row['tokens_per_second']:,.0f} tokens a second of {asked}")
