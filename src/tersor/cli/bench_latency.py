"""`tersor bench latency`: how long does a decode step of a whole model take?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console
from tersor.engine.config import EngineConfig
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.bench.latency import Latency

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
    activations: Annotated[str, typer.Option(help="What weights are multiplied with: 16bit or fp8.")] = "16bit",
    steps: Annotated[int, typer.Option(min=1, help="Of a timed run; the median of three counts.")] = 32,
    cuda_graph: Annotated[str, typer.Option(help="Steps as CUDA graphs: on or off.")] = "on",
    taken: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Time nothing: show what --output wrote.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time decode steps of whole models with random weights, or show what was timed."""
    from tersor.bench import latency, report, saved
    from tersor.formats import Activations
    from tersor.models import geometries

    pages = EngineConfig(kv_dtype=kv_dtype)
    batches, contexts = bench.numbers("--batch", batch), bench.numbers("--context", context)
    if cuda_graph not in ("on", "off"):
        raise InputError(f"cuda graph {cuda_graph!r}{did_you_mean(cuda_graph, ['on', 'off'])}: use on or off")
    kinds = [(name, None if name == PLAIN else bench.schemes([name], [])[0]) for name in format or [FORMAT]]
    head = None if head_format in (None, PLAIN) else bench.schemes([head_format], [])[0]  # type: ignore[list-item]
    names = models or [MODEL]
    for name in names:
        geometries.geometry(name)
    Activations.of(activations)
    if output is not None:
        bench.check_folder("--output", output)
    if taken is not None:
        show(saved.read(taken, latency.KIND, latency.VERSION), json)
        return
    bench.need_gpu("--from shows what was timed")
    import torch

    from tersor.bench import timing
    from tersor.engine import ahead
    from tersor.engine.runner import Runner
    from tersor.engine.sampler import Sampler
    from tersor.models.kernels import Steps
    from tersor.models.random import random_decoder

    facts: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "activations": activations}
    facts["read_bandwidth"] = timing.read_bandwidth()
    rows: list[Latency] = []
    with console.progress("timing") as move:
        for name in names:
            for label, scheme in kinds:
                decoder = random_decoder(
                    name,
                    scheme,
                    "cuda",
                    bench.dtype_named(dtype),
                    head=scheme if head_format is None else head,
                    activations=activations,
                    context=max(contexts),
                )
                sampler = Sampler(max(batches) + 1, decoder.config.vocabulary, decoder.device)
                runner = Runner(
                    decoder, sampler, max_rows=max(batches), max_length=max(contexts), kv_dtype=pages.pages_dtype
                )
                ahead.compile_for(decoder, Steps(tokens=max(batches), queries=1, pages=pages.pages_dtype))
                runner.allocate(latency.pages_for(batches, contexts))
                if cuda_graph == "on":
                    runner.capture(batches)
                shown = label if head_format in (None, label) else f"{label}/{head_format}"
                rows += latency.measure(runner, name, shown, batches, contexts, steps, move)
                del decoder, sampler, runner
                torch.cuda.empty_cache()
                if output is not None:
                    report.write(output, report.text(latency.result(rows, **facts)))
    show(latency.result(rows, **facts), json)
    if output is not None:
        print(f"written to {output}", file=sys.stderr if json else sys.stdout)


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table."""
    from tersor.bench import latency

    if json:
        console.print_json(result)
        return
    gpu = result["environment"].get("gpu", "no GPU")
    kv = result["dtype"] if result["kv_dtype"] == "auto" else result["kv_dtype"]
    print(
        f"{gpu}, {result['dtype']} activations, keys and values in {kv}; "
        f"a large read reaches {result['read_bandwidth'] / 1e12:.2f} TB/s"
    )
    console.print_table(*latency.columns(result))
