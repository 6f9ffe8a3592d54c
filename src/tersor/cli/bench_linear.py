"""`tersor bench linear`: how fast is a packed linear, and what do its rivals take?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor import hardware
from tersor.cli import bench, chips, console, options
from tersor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from tersor.bench.blend import Blend
    from tersor.bench.linear import Row, Skipped
    from tersor.bench.thinned import Thinned
    from tersor.formats import Scheme

TOKENS = "1,2,4,8,16,32,64,128,256,1024"
FORMATS = ("fp6_e3m2",)
ACTIVATIONS = "16bit"
CHAIN = "both"
DTYPE = "float16"


def command(
    shapes: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL|OCxIC", help=bench.SHAPES_HELP, show_default=False)
    ] = None,
    n: Annotated[str | None, typer.Option("--n", help=f"Numbers of tokens; default: {TOKENS}.")] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=(
                f"Format of the weights, FORMAT[:gN]; repeatable; default: {FORMATS[0]}. A mix names shares of rows: "
                "uint4:g128=90+int8=10."
            ),
        ),
    ] = None,
    in_order: Annotated[
        bool, typer.Option("--in-order", help="Rows of a mix stand in the order of its levels; else levels are drawn.")
    ] = False,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Part of the weights that is pruned at random, or several such as 0.5,0.7; --format is then of values."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the activations: float16 or bfloat16; default: {DTYPE}.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help=f"What weights are multiplied with: 16bit, fp8, int8, int8:g128, or several; default: {ACTIVATIONS}."
        ),
    ] = None,
    chain: Annotated[
        str | None,
        typer.Option(help=f"Launches with programmatic dependence (pdl), without (plain), or both; default: {CHAIN}."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Rivals: cublas, fp8, humming, or none; default: those installed.")
    ] = None,
    taken: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Time nothing: show what --output wrote; options narrow it."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time over tokens (.png, .pdf, .svg).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write JSON to a file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, rooflines and configurations; nothing is timed.")
    ] = False,
    chip: Annotated[str | None, typer.Option(help="GPU of a dry run, such as h200; default: the one here.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Time linears by CUDA graphs, or show what would be timed, or what was."""
    from tersor import plots
    from tersor.bench import contenders, linear, report, timing
    from tersor.bench import plot as drawing
    from tersor.bench import shapes as known

    if chip is not None and not dry_run:
        raise InputError("--chip names the GPU of a dry run: add --dry-run")
    if plot is not None and dry_run:
        raise InputError("a dry run has no times to draw: leave out --plot or --dry-run")
    if taken is not None and (dry_run or dtype is not None):
        raise InputError("--from shows times that were taken: leave out --dry-run and --dtype")
    tokens = bench.numbers("--n", n or TOKENS)
    chosen_chain = chain or CHAIN
    if chosen_chain not in contenders.CHAINS:
        raise InputError(f"--chain {chain!r}{did_you_mean(chosen_chain, contenders.CHAINS)}: use plain, pdl or both")
    multiplied = bench.activations(activations or ACTIVATIONS)
    wanted = known.resolve(shapes or known.DEFAULT, trust_remote_code=trust_remote_code)
    if sparsity is not None and any(one.dtype is not None for one in multiplied):
        raise InputError("--sparsity: pruned weights are multiplied with 16-bit activations alone")
    schemes = _schemes(format or FORMATS, wanted, in_order, sparsity)
    kernel_dtype = bench.dtype_named(dtype or DTYPE)
    if plot is not None:
        plots.check_plot(plot)
    if output is not None:
        bench.check_folder("--output", output)
    if dry_run:
        (gpu, *_) = chips.wanted(chip, "to plan for")
        _show_forecast(linear.forecast(wanted, tokens, schemes, gpu, multiplied), gpu, output, json)
        return
    if taken is not None:
        result = _narrowed(
            taken, shapes, n, format, in_order, sparsity, activations, chosen_chain, against, trust_remote_code
        )
        if output is not None:
            report.write(output, report.text(result))
    else:
        rivals = contenders.parse_rivals(against)
        bench.need_gpu("--dry-run shows what would be timed, --from what was")
        runners = contenders.contenders(schemes, kernel_dtype, contenders.CHAINS[chosen_chain], rivals, multiplied)
        bandwidth = timing.read_bandwidth()
        found: list[Row | Skipped] = []
        result = linear.result(found, dtype=dtype or DTYPE, read_bandwidth=bandwidth)
        with console.progress("timing") as move:
            for of_shape in linear.measure(wanted, tokens, runners, timing.graph_microseconds, move):
                found += of_shape
                result = linear.result(found, dtype=dtype or DTYPE, read_bandwidth=bandwidth)
                if output is not None:
                    report.write(output, report.text(result))
    bench.give(result, show, drawing.plot, json=json, plot=plot, output=output)


def show(result: dict[str, Any], json: bool) -> None:
    """Print a result: as JSON where that is asked for, else as a table; who was skipped goes to stderr."""
    from tersor.bench import linear

    for row in result["skipped"]:
        tokens = "" if row["n"] is None else f", {row['n']} tokens"
        print(f"{row['kernel']} is not timed at {row['oc']}x{row['ic']}{tokens}: {row['why']}", file=sys.stderr)
    if json:
        console.print_json(result)
        return
    gpu = result["environment"].get("gpu", "no GPU")
    print(f"{gpu}, {result['dtype']} activations; a large read reaches {result['read_bandwidth'] / 1e12:.2f} TB/s")
    console.print_table(*linear.columns(result))


def _narrowed(
    taken: Path,
    shapes: list[str] | None,
    n: str | None,
    format: list[str] | None,
    in_order: bool,
    sparsity: str | None,
    activations: str | None,
    chain: str,
    against: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Return the times of a results file that the options ask for; an option that was not given asks for all."""
    from tersor.bench import contenders, saved
    from tersor.bench import shapes as known

    result = saved.read(taken)
    wanted = known.resolve(shapes, trust_remote_code=trust_remote_code) if shapes else None
    asked = format or (FORMATS if sparsity is not None else None)
    schemes = None if not asked else _schemes(asked, wanted or (), in_order, sparsity)
    return saved.narrowed(
        result,
        shapes=None if wanted is None else {(shape.oc, shape.ic) for shape in wanted},
        tokens=None if n is None else bench.numbers("--n", n),
        formats=None if schemes is None else {contenders.label(scheme) for scheme in schemes},
        activations=None if activations is None else bench.activations(activations),
        chains=contenders.CHAINS[chain],
        rivals=None if against is None else contenders.named_rivals(against),
    )


def _schemes(
    names: Sequence[str], shapes: Sequence[Any], in_order: bool, sparsity: str | None
) -> Sequence[Scheme | Blend | Thinned]:
    """Return what the options mean by formats: of whole weights, or of what is left of pruned ones."""
    return bench.blends(names, shapes, in_order) if sparsity is None else bench.thinned(names, shapes, sparsity)


def _show_forecast(rows: list[dict[str, Any]], chip: hardware.Chip, output: Path | None, json: bool) -> None:
    from tersor.bench import linear, report

    result = {"chip": chip.name, "bandwidth": chip.bandwidth, "rows": rows}
    if output is not None:
        report.write(output, report.text(result))
    if json:
        console.print_json(result)
    else:
        print(f"{chip.name}, {chip.bandwidth / 1e12:.2f} TB/s by its datasheet; nothing is timed")
        console.print_table(*linear.forecast_columns(rows))
    bench.say_written(json, output)
