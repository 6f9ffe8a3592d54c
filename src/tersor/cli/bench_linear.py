"""`tersor bench linear`: how fast is a packed linear, and what do its rivals take?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import hardware
from tersor.cli import bench, console
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.bench.linear import Row, Skipped

TOKENS = "1,2,4,8,16,32,64,128,256,1024"


def command(
    shapes: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL|OCxIC", help=bench.SHAPES_HELP, show_default=False)
    ] = None,
    n: Annotated[str, typer.Option("--n", help="Numbers of tokens.")] = TOKENS,
    format: Annotated[
        list[str] | None, typer.Option("--format", help="Format of the weights, FORMAT[:gN]; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: float16 or bfloat16.")] = "float16",
    activations: Annotated[
        str, typer.Option(help="What weights are multiplied with: 16bit, fp8, or 16bit,fp8.")
    ] = "16bit",
    chain: Annotated[
        str, typer.Option(help="Launches with programmatic dependence (pdl), without (plain), or both.")
    ] = "both",
    against: Annotated[
        str | None, typer.Option(help="Rivals: cublas, fp8, humming, or none; default: those installed.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time over tokens (.png, .pdf, .svg).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, rooflines and configurations; nothing is timed.")
    ] = False,
    chip: Annotated[str | None, typer.Option(help="GPU of a dry run, such as h200; default: the one here.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON; - prints it instead.")] = None,
) -> None:
    """Time linears by CUDA graphs, or show what would be timed."""
    from tersor.bench import contenders, linear, report, timing
    from tersor.bench import plot as drawing
    from tersor.bench import shapes as known
    from tersor.evaluate.plot import check_plot
    from tersor.formats import Activations

    tokens = bench.numbers("--n", n)
    if chain not in contenders.CHAINS:
        raise InputError(f"--chain {chain!r}{did_you_mean(chain, contenders.CHAINS)}: use plain, pdl or both")
    kinds = tuple(kind.strip() for kind in activations.split(","))
    for one in kinds:
        Activations.of(one)
    wanted = known.resolve(shapes or known.DEFAULT)
    schemes = bench.schemes(format or ["fp6_e3m2"], wanted)
    kind = bench.dtype_named(dtype)
    if chip is not None and not dry_run:
        raise InputError("--chip names the GPU of a dry run: add --dry-run")
    if plot is not None and dry_run:
        raise InputError("a dry run has no times to draw: leave out --plot or --dry-run")
    if plot is not None:
        check_plot(plot)
    if json is not None:
        bench.check_folder("--json", json)
    if dry_run:
        place = _chip(chip)
        _dry_run(linear.forecast(wanted, tokens, schemes, place, kinds), place, json)
        return
    rivals = contenders.parse_rivals(against)
    bench.need_gpu("--dry-run shows what would be timed")
    runners = contenders.contenders(schemes, kind, contenders.CHAINS[chain], rivals, kinds)
    bandwidth = timing.read_bandwidth()
    found: list[Row | Skipped] = []
    result = linear.result(found, dtype=dtype, read_bandwidth=bandwidth)
    with console.progress("timing") as move:
        for of_shape in linear.measure(wanted, tokens, runners, timing.graph_microseconds, move):
            found += of_shape
            result = linear.result(found, dtype=dtype, read_bandwidth=bandwidth)
            if json is not None and str(json) != "-":
                report.write(json, report.text(result))
    show(result, json)
    if plot is not None:
        drawing.plot(result, plot)


def show(result: dict[str, Any], json: Path | None) -> None:
    """Print a result: as JSON where that is asked for, else as a table; who was skipped goes to stderr."""
    from tersor.bench import linear

    for row in result["skipped"]:
        tokens = "" if row["n"] is None else f", {row['n']} tokens"
        print(f"{row['kernel']} is not timed at {row['oc']}x{row['ic']}{tokens}: {row['why']}", file=sys.stderr)
    if str(json) == "-":
        console.print_json(result)
        return
    gpu = result["environment"].get("gpu", "no GPU")
    print(f"{gpu}, {result['dtype']} activations; a large read reaches {result['read_bandwidth'] / 1e12:.2f} TB/s")
    console.print_table(*linear.columns(result))
    if json is not None:
        print(f"written to {json}")


def _chip(name: str | None) -> hardware.Chip:
    import torch

    if name is not None:
        return hardware.chip_named(name)
    if not hardware.cuda_available():
        raise InputError(f"torch sees no GPU to plan for: name one with --chip ({', '.join(hardware.CHIPS)})")
    return hardware.of_device(torch.cuda.current_device())


def _dry_run(rows: list[dict[str, Any]], chip: hardware.Chip, json: Path | None) -> None:
    from tersor.bench import linear, report

    result = {"chip": chip.name, "bandwidth": chip.bandwidth, "rows": rows}
    if str(json) == "-":
        console.print_json(result)
        return
    print(f"{chip.name}, {chip.bandwidth / 1e12:.2f} TB/s by its datasheet; nothing is timed")
    console.print_table(*linear.forecast_columns(rows))
    if json is not None:
        report.write(json, report.text(result))
        print(f"written to {json}")
