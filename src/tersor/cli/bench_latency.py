"""`tersor bench latency`: how long does a decode step of a whole model take?"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console, options
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.bench.latency import Latency, Skipped

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
    dtype: Annotated[str, typer.Option(help="Of activations: float16 or bfloat16.")] = "float16",
    kv_dtype: Annotated[str, typer.Option(help="Of keys and values: auto, float16, bfloat16 or fp8.")] = "auto",
    activations: options.Activations = "16bit",
    steps: Annotated[int, typer.Option(min=1, help="Of a timed run; the median of three counts.")] = 32,
    cuda_graph: Annotated[str, typer.Option(help="Steps as CUDA graphs: on or off.")] = "on",
    sparsity: Annotated[
        float | None, typer.Option(help="Prune so much of every linear but the head, at random; as a fraction.")
    ] = None,
    offload: options.Offload = None,
    resident_layers: options.ResidentLayers = None,
    offload_directory: options.OffloadDirectory = None,
    against: options.AgainstVllm = None,
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Time nothing: show what --output wrote.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw milliseconds a step over rows (.png, .pdf, .svg).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time decode steps of whole models with random weights, or show what was timed."""
    from tersor import plots
    from tersor.bench import latency, plot_latency, report, saved
    from tersor.bench.vllm import rows as rival
    from tersor.bench.vllm import variants as rivals
    from tersor.formats import Activations
    from tersor.models import geometries

    pages = EngineConfig(
        kv_dtype=kv_dtype,
        offload=offload,
        resident_layers=resident_layers,
        offload_directory=offload_directory,
    )
    if sparsity is not None and not 0 <= sparsity < 1:
        raise InputError(f"sparsity is {sparsity}: it must be at least 0 and below 1")
    batches, contexts = bench.numbers("--batch", batch), bench.numbers("--context", context)
    if cuda_graph not in ("on", "off"):
        raise InputError(f"cuda graph {cuda_graph!r}{did_you_mean(cuda_graph, ['on', 'off'])}: use on or off")
    kinds = [(name, None if name == PLAIN else bench.schemes([name], [])[0]) for name in format or [FORMAT]]
    head = None if head_format in (None, PLAIN) else bench.schemes([head_format], [])[0]  # type: ignore[list-item]
    names = models or [MODEL]
    for name in names:
        geometries.geometry(name)
    multiplied = Activations.of(activations)
    named = rivals.named(against)
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
    if variants:
        rival.check_room([geometries.config_json(name) for name in names], contexts, steps, dtype=dtype)
    import torch

    from tersor.bench import timing
    from tersor.engine import ahead
    from tersor.engine.offloading import offload_of
    from tersor.engine.runner import Runner
    from tersor.engine.sampler import Sampler
    from tersor.models.kernels import Steps
    from tersor.models.random import random_decoder
    from tersor.one_prompt import page_bytes
    from tersor.ops.attention_form import PAGE

    facts: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "activations": activations, "read_bandwidth": None}
    ours: list[Latency] = []
    theirs: list[Latency | Skipped] = []

    def found() -> dict[str, Any]:
        return latency.result([*ours, *theirs], rivals.versions(named), **facts)

    def write() -> None:
        if output is not None:
            report.write(output, report.text(found()))

    with console.progress("timing vllm") as move:  # first, while the GPU's memory is free
        cells = len(names) * len(variants) * len(batches) * len(contexts)
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
            ):
                theirs.append(row)
                move(len(theirs), cells)
                write()
    facts["read_bandwidth"] = timing.read_bandwidth()
    with console.progress("timing") as move:
        for name in names:
            for label, scheme in kinds:
                model, most = geometries.geometry(name), max(batches)
                kv_bytes = latency.pages_for(batches, contexts) * page_bytes(model, pages.pages_dtype or kernel_dtype)
                needed = replace(pages, max_rows=most, max_step_tokens=most, kv_bytes=kv_bytes)
                away = offload_of(needed, model, kernel_dtype, torch.device("cuda", torch.cuda.current_device()))
                decoder = random_decoder(
                    name,
                    scheme,
                    "cuda",
                    kernel_dtype,
                    head=scheme if head_format is None else head,
                    activations=activations,
                    context=max(contexts),
                    sparsity=sparsity,
                    offload=None if away is None else replace(away, told=_told),
                )
                sampler = Sampler(max(batches) + 1, decoder.config.vocabulary, decoder.device)
                runner = Runner(
                    decoder, sampler, max_rows=max(batches), max_length=max(contexts), kv_dtype=pages.pages_dtype
                )
                length = -(-max(contexts) // PAGE) * PAGE
                ahead.compile_for(
                    decoder, Steps(tokens=most, rows=most, queries=1, length=length, pages=pages.pages_dtype)
                )
                runner.allocate(latency.pages_for(batches, contexts))
                if cuda_graph == "on":
                    runner.capture(batches)
                shown = label if head_format in (None, label) else f"{label}/{head_format}"
                shown = shown if sparsity is None else f"{sparsity:.0%} sparse {shown}"
                ours += latency.measure(runner, name, shown, batches, contexts, steps, move)
                del decoder, sampler, runner
                torch.cuda.empty_cache()
                write()
    bench.give(found(), show, plot_latency.plot, json=json, plot=plot, output=output)


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
