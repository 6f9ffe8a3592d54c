"""`tersor bench throughput`: how many requests a second does the engine answer?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console, options
from tersor.cli.bench_latency import FORMAT, MODEL, PLAIN
from tersor.engine.config import EngineConfig
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.bench.throughput import Throughput
    from tersor.bench.workloads import Workload
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
    max_rows: options.MaxRows = _ENGINE.max_rows,
    max_step_tokens: options.MaxStepTokens = _ENGINE.max_step_tokens,
    memory: options.Memory = _ENGINE.memory,
    kv_bytes: options.KvBytes = _ENGINE.kv_bytes,
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Run nothing: show what --output wrote.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer workloads with random weights, planned and not, or show what was measured."""
    from tersor.bench import report, saved, throughput, workloads
    from tersor.formats import Activations

    orders = [one.strip() for one in order.split(",")]
    for one in orders:
        throughput.check_order(one)
    sizes = _sizes(size or [])
    scheme = None if format == PLAIN else bench.schemes([format], [])[0]
    head = scheme if head_format is None else None if head_format == PLAIN else bench.schemes([head_format], [])[0]
    Activations.of(activations)
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
    if output is not None:
        bench.check_folder("--output", output)
    if taken is not None:
        show(saved.read(taken, throughput.KIND, throughput.VERSION), json)
        return
    geometry = _geometry(model)
    asked = [
        workloads.make(one, requests=requests, seed=seed, vocabulary=geometry.vocabulary, **sizes)
        for one in workload or [WORKLOAD]
    ]
    shown = format if head_format in (None, format) else f"{format}/{head_format}"
    facts: dict[str, Any] = {
        "engine": {name: getattr(config, name) for name in ("dtype", "kv_dtype", "activations", "max_rows")},
        "max_step_tokens": max_step_tokens,
        "workloads": {one.name: one.settings for one in asked},
    }
    rows: list[Throughput] = []
    with console.progress("answering") as move:
        runner, limits = _engine(geometry, scheme, head, config, asked)
        for load in asked:
            for each in orders:
                move(len(rows), len(asked) * len(orders))
                rows.append(throughput.measure(runner, limits, load, each, model, shown))
                if output is not None:
                    report.write(output, report.text(throughput.result(rows, **facts)))
    show(throughput.result(rows, **facts), json)
    if output is not None:
        print(f"written to {output}", file=sys.stderr if json else sys.stdout)


def _sizes(given: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in given:
        name, _, number = word.partition("=")
        if not number.isdecimal():
            raise InputError(f"--size {word!r}: expected a name and a number, such as prefix=500")
        found[name] = int(number)
    return found


def _geometry(model: str) -> DecoderConfig:
    from tersor.checkpoint.source import read_config
    from tersor.models import geometries
    from tersor.models.config import DecoderConfig

    if model.lower() not in geometries.GEOMETRIES and Path(model).is_dir():
        return DecoderConfig.from_dict(read_config(Path(model)))
    return geometries.geometry(model)


def _engine(geometry: DecoderConfig, scheme: Any, head: Any, config: EngineConfig, asked: list[Workload]) -> Any:
    """Return a runner with random weights and pages for the longest text, and the limits of its engine."""
    import torch

    from tersor.bench import throughput
    from tersor.engine import ahead
    from tersor.engine.limits import Limits
    from tersor.engine.memory import make_pages
    from tersor.engine.runner import Runner
    from tersor.engine.sampler import Sampler
    from tersor.formats import FLOAT_DTYPES, float_dtype
    from tersor.hardware import resolve_device
    from tersor.models.random import random_decoder
    from tersor.ops.attention_form import PAGE

    if config.device == "auto":
        bench.need_gpu("--device cpu takes it, --from shows what was measured")
    where = resolve_device(config.device)
    context = max(map(throughput.context_of, asked))
    if context > geometry.context:
        if geometry.positions:
            raise InputError(f"texts have {context} tokens, and the model positions for {geometry.context}")
        geometry = replace(geometry, context=context)  # weights are random, and so may positions be new
    if where.type == "cpu":
        console.choose_threads(8 * geometry.hidden * (geometry.vocabulary + geometry.ffn * len(geometry.layers)), where)
    plain = torch.float32 if where.type == "cpu" else torch.float16
    chosen = plain if config.dtype == "auto" else float_dtype(config.dtype, ("auto", *FLOAT_DTYPES))
    decoder = random_decoder(
        geometry, scheme, where, chosen, head=head, activations=config.activations, context=context
    )
    ahead.compile_for(decoder, ahead.steps_of(config, context))
    sampler = Sampler(config.max_rows + 1, geometry.vocabulary, where, most_length=context)
    runner = Runner(decoder, sampler, max_rows=config.max_rows, max_length=context, kv_dtype=config.pages_dtype)
    limits = Limits(
        pages=make_pages(runner, config),
        page_size=PAGE,
        max_rows=config.max_rows,
        max_step_tokens=config.max_step_tokens,
        context=context,
    )
    return runner, limits


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table."""
    from tersor.bench import throughput

    if json:
        console.print_json(result)
        return
    models = ", ".join(dict.fromkeys(f"{row['name']} in {row['format']}" for row in result["rows"]))
    print(f"{result['environment'].get('gpu', 'no GPU')}, {models}, {result['engine']['max_rows']} rows a step")
    console.print_table(*throughput.columns(result))
