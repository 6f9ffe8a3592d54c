"""`tersor bench experts`: how fast is a layer of experts, and what do its rivals take?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import bench, console, options
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.bench.experts.measure import Row, Skipped

TOKENS = "1,8,32,64,512,2048,8192"
FORMATS = ("fp6_e3m2",)
ACTIVATIONS = "16bit"
DTYPE = "bfloat16"


def command(
    geometries: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Models whose experts are meant (qwen3-30b-a3b).", show_default=False),
    ] = None,
    tokens: Annotated[str | None, typer.Option("--n", help=f"Numbers of tokens; default: {TOKENS}.")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"Format of the weights, FORMAT[:gN]; repeatable; default: {FORMATS[0]}."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the activations: float16 or bfloat16; default: {DTYPE}; torch: bfloat16.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(help=f"What weights are multiplied with: 16bit, fp8, int8, or several; default: {ACTIVATIONS}."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Rivals: torch, compiled (by torch.compile), humming, or none; default: all there are."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of weights, activations and routing; default: 0.")] = None,
    taken: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Time nothing: show what --output wrote; options narrow it."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    json: options.Json = False,
) -> None:
    """Time layers of experts, from the router's logits to the output, by CUDA graphs, or show what was timed."""
    from tersor.bench import contenders as linears
    from tersor.bench import report, timing
    from tersor.bench.experts import contenders, geometry, measure

    if taken is not None and (dtype is not None or seed is not None):
        raise InputError("--from shows times that were taken: leave out --dtype and --seed")
    wanted = geometry.resolve(geometries or geometry.DEFAULT)
    numbers = bench.numbers("--n", tokens or TOKENS)
    schemes = bench.schemes(format or FORMATS, [shape for layer in wanted for shape in layer.linears()])
    multiplied = bench.activations(activations or ACTIVATIONS)
    kernel_dtype = bench.dtype_named(dtype or DTYPE)
    if output is not None:
        bench.check_folder("--output", output)
    if taken is not None:
        from tersor.bench import saved

        result = measure.narrowed(
            saved.read(taken, measure.KIND, measure.VERSION),
            names=None if not geometries else {layer.name for layer in wanted},
            tokens=None if tokens is None else numbers,
            formats=None if not format else {linears.label(scheme) for scheme in schemes},
            activations=None if activations is None else multiplied,
            rivals=None if against is None else linears.named_rivals(against, contenders.RIVALS),
        )
        if output is not None:
            report.write(output, report.text(result))
    else:
        rivals = linears.parse_rivals(against, contenders.RIVALS)
        bench.need_gpu("--from shows what was timed")
        import torch

        runners = contenders.contenders(schemes, kernel_dtype, rivals, multiplied)
        bandwidth = timing.read_bandwidth()
        found: list[Row | Skipped] = []
        facts: dict[str, Any] = {"dtype": dtype or DTYPE, "seed": seed or 0, "read_bandwidth": bandwidth}
        result = measure.result(found, **facts)
        with console.progress("timing") as move:
            for of_layer in measure.measure(
                wanted,
                numbers,
                runners,
                timing.graph_microseconds,
                dtype=kernel_dtype,
                device=torch.device("cuda", torch.cuda.current_device()),
                seed=seed or 0,
                progress=move,
            ):
                found += of_layer
                result = measure.result(found, **facts)
                if output is not None:
                    report.write(output, report.text(result))
    show(result, json)
    bench.say_written(json, output)


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table; who was skipped goes to stderr."""
    from tersor.bench.experts import measure

    for row in result["skipped"]:
        tokens = "" if row["n"] is None else f", {row['n']} tokens"
        kernel = f"{row['kernel']} ({row['way']})" if row["way"] else row["kernel"]
        print(f"{kernel} is not timed at {row['name']}{tokens}: {row['why']}", file=sys.stderr)
    if json:
        console.print_json(result)
        return
    gpu = result["environment"].get("gpu", "no GPU")
    print(f"{gpu}, {result['dtype']} activations; a large read reaches {result['read_bandwidth'] / 1e12:.2f} TB/s")
    console.print_table(*measure.columns(result))
