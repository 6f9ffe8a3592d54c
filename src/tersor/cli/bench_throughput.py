"""`tersor bench throughput`: how many requests a second does the engine answer?"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console, options
from tersor.cli.bench_latency import FORMAT, MODEL, PLAIN
from tersor.engine.config import MANY_ROWS, EngineConfig
from tersor.errors import InputError

if TYPE_CHECKING:
    import torch

    from tersor.bench.roofline import Speeds
    from tersor.bench.throughput import Skipped, Throughput
    from tersor.formats import Activations
    from tersor.models.config import DecoderConfig

WORKLOAD = "micro-small"
_ENGINE = EngineConfig()


def command(
    model: Annotated[str, typer.Argument(help="A model by name, or a folder with a config.json.")] = MODEL,
    workload: Annotated[
        list[str] | None,
        typer.Option(help=f"By name, such as micro, extreme, tree, control; repeatable; default: {WORKLOAD}."),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Of a workload, other than its own number.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="A size of the workload, such as prefix=500; repeatable.")
    ] = None,
    order: Annotated[str, typer.Option(help="How requests run.")] = "planned,sorted,shuffled",
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    format: Annotated[str, typer.Option(help=f"Of the weights, FORMAT[:gN] or {PLAIN}.")] = FORMAT,
    head_format: Annotated[
        str | None, typer.Option(help=f"Of the output head, or {PLAIN}; default: that of the weights.")
    ] = None,
    device: options.Device = _ENGINE.device,
    dtype: Annotated[str, typer.Option(help="auto (float16; on a CPU float32), or one of them or bfloat16.")] = "auto",
    activations: options.Activations = _ENGINE.activations,
    kv_dtype: options.KvDtype = _ENGINE.kv_dtype,
    max_rows: options.MaxRows = MANY_ROWS,
    max_step_tokens: options.MaxStepTokens = _ENGINE.max_step_tokens,
    memory: options.Memory = _ENGINE.memory,
    kv_bytes: options.KvBytes = _ENGINE.kv_bytes,
    against: options.AgainstVllm = None,
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Run nothing: show what --output wrote.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw requests a second (.png, .pdf, .svg).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: options.Json = False,
) -> None:
    """Answer workloads with random weights, planned and not, or show what was measured."""
    from tersor import plots
    from tersor.bench import plot_throughput, report, roofline, saved, throughput, workloads
    from tersor.bench.vllm import rows as rival
    from tersor.bench.vllm import variants as rivals
    from tersor.formats import Activations
    from tersor.models.config import DecoderConfig

    orders = [one.strip() for one in order.split(",")]
    for one in orders:
        throughput.check_order(one)
    sizes = _sizes(size or [])
    scheme = None if format == PLAIN else bench.schemes([format], [])[0]
    head = scheme if head_format is None else None if head_format == PLAIN else bench.schemes([head_format], [])[0]
    multiplied = Activations.of(activations)
    named = rivals.named(against)
    config = EngineConfig(
        device=device,
        dtype=dtype,
        activations=activations,
        kv_dtype=kv_dtype,
        max_rows=max_rows,
        max_step_tokens=max_step_tokens,
        memory=memory,
        kv_bytes=kv_bytes,
    )
    if plot is not None:
        plots.check_plot(plot)
    if output is not None:
        bench.check_folder("--output", output)
    if taken is not None:
        result = saved.read(taken, throughput.KIND, throughput.VERSION)
        if output is not None:
            report.write(output, report.text(result))
        bench.give(result, show, plot_throughput.plot, json=json, plot=plot, output=output)
        return
    described = _described(model)
    geometry = DecoderConfig.from_dict(described)
    asked = [
        workloads.make(one, requests=requests, seed=seed, vocabulary=geometry.vocabulary, **sizes)
        for one in workload or [WORKLOAD]
    ]
    context = max(map(throughput.context_of, asked))
    geometry = _reaching(geometry, context)
    unplanned = rival.check_orders(orders) if named else []
    variants = rivals.variants(named, [scheme], multiplied)
    where = _device(config, bool(named))
    plain = str(_plain(config, where)).removeprefix("torch.")
    shown = format if head_format in (None, format) else f"{format}/{head_format}"
    facts: dict[str, Any] = {
        "engine": {name: getattr(config, name) for name in ("dtype", "kv_dtype", "activations", "max_rows")},
        "max_step_tokens": max_step_tokens,
        "workloads": {one.name: one.settings for one in asked},
    }
    ours: list[Throughput] = []
    theirs: list[Throughput | Skipped] = []

    def found() -> dict[str, Any]:
        return throughput.result([*ours, *theirs], rivals.versions(named), **facts)

    def write() -> None:
        if output is not None:
            report.write(output, report.text(found()))

    with console.progress("answering by vllm") as move:  # first, while the GPU's memory is free
        for row in rival.throughputs(
            variants, described, model, asked, unplanned, config, dtype=plain, gpu=where.index
        ):
            theirs.append(row)
            move(len(theirs), len(variants) * len(asked) * len(unplanned))
            write()
    speeds = _speeds(where, Activations.NATIVE if scheme is None else multiplied)
    rooflines: dict[str, Any] = {}
    facts |= {"speeds": None if speeds is None else asdict(speeds), "rooflines": rooflines}
    with console.progress("answering") as move:
        runner, limits = _engine(geometry, scheme, head, config, where, context)
        for load in asked:
            seconds = None
            if speeds is not None:
                least = roofline.work(load, runner, max_rows)
                seconds = speeds.seconds(least)
                rooflines[load.name] = {**asdict(least), "seconds": seconds}
            for each in orders:
                move(len(ours), len(asked) * len(orders))
                ours.append(throughput.measure(runner, limits, load, each, model, shown, seconds))
                write()
    bench.give(found(), show, plot_throughput.plot, json=json, plot=plot, output=output)


def _sizes(given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in given:
        name, _, number = word.partition("=")
        if not number.isdecimal():
            raise InputError(f"--size {word!r}: expected a name and a number, such as prefix=500")
        found[name] = int(number)
    return found


def _described(model: str) -> dict[str, Any]:
    """Return the config.json of a model."""
    from tersor.checkpoint.source import read_config
    from tersor.models import geometries

    if model.lower() not in geometries.GEOMETRIES and Path(model).is_dir():
        return read_config(Path(model))
    return geometries.config_json(model)


def _reaching(geometry: DecoderConfig, context: int) -> DecoderConfig:
    """Return a geometry that takes texts of so many tokens: weights are random, and so may positions be new."""
    if context <= geometry.context:
        return geometry
    if geometry.positions:
        raise InputError(f"texts have {context} tokens, and the model positions for {geometry.context}")
    return replace(geometry, context=context)


def _device(config: EngineConfig, rivals: bool) -> torch.device:
    """Return where the model runs; beside rivals, a GPU."""
    from tersor.hardware import resolve_device

    if config.device == "auto":
        bench.need_gpu("--device cpu takes it, --from shows what was measured")
    where = resolve_device(config.device)
    if rivals and where.type == "cpu":
        raise InputError("--against vllm needs a GPU: leave out --device cpu")
    return where


def _plain(config: EngineConfig, where: torch.device) -> torch.dtype:
    """Return the dtype of activations."""
    import torch

    from tersor.formats import float_dtype_or_auto

    return float_dtype_or_auto(config.dtype) or (torch.float32 if where.type == "cpu" else torch.float16)


def _speeds(where: torch.device, activations: Activations) -> Speeds | None:
    """Return what a GPU does at most, whose memory is free but for 4 GB; `None` on a CPU."""
    import torch

    from tersor import hardware
    from tersor.bench import timing
    from tersor.bench.roofline import Speeds

    if where.type == "cpu":
        return None
    with torch.cuda.device(where):
        bandwidth = timing.read_bandwidth()
        torch.cuda.empty_cache()  # weights and pages get what was read
        return Speeds.of(hardware.of_device(torch.cuda.current_device()), activations, bandwidth)


def _engine(
    geometry: DecoderConfig, scheme: Any, head: Any, config: EngineConfig, where: torch.device, context: int
) -> Any:
    """Return a runner with random weights and pages for the longest text, and the limits of its engine."""
    from tersor.engine import ahead
    from tersor.engine.limits import Limits
    from tersor.engine.memory import make_pages, rows_of
    from tersor.engine.runner import Runner
    from tersor.engine.sampler import Sampler
    from tersor.models.random import random_decoder
    from tersor.ops.attention_form import PAGE

    if where.type == "cpu":
        console.choose_threads(8 * geometry.hidden * (geometry.vocabulary + geometry.ffn * len(geometry.layers)), where)
    decoder = random_decoder(
        geometry,
        scheme,
        where,
        _plain(config, where),
        head=head,
        activations=config.activations,
        context=context,
    )
    ahead.compile_for(decoder, ahead.steps_of(config, context))
    rows = rows_of(config, decoder)
    sampler = Sampler(rows + 1, geometry.vocabulary, where, most_length=context)
    runner = Runner(decoder, sampler, max_rows=rows, max_length=context, kv_dtype=config.pages_dtype)
    limits = Limits(
        pages=make_pages(runner, config),
        page_size=PAGE,
        max_rows=rows,
        max_step_tokens=config.max_step_tokens,
        context=context,
    )
    return runner, limits


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table; what did not run goes to stderr."""
    from tersor.bench import throughput

    for row in result["skipped"]:
        print(f"{row['name']} in {row['format']} is not measured: {row['why']}", file=sys.stderr)
    if json:
        console.print_json(result)
        return
    models = ", ".join(dict.fromkeys(row["name"] for row in result["rows"]))
    speeds = result.get("speeds")
    reached = "" if speeds is None else f"; a large read reaches {speeds['bandwidth'] / 1e12:.2f} TB/s"
    gpu = result["environment"].get("gpu", "no GPU")
    print(f"{gpu}, {models}, {result['engine']['max_rows']} rows a step{reached}")
    console.print_table(*throughput.columns(result))
