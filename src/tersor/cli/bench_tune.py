"""`tersor bench tune`: measure every configuration of a kernel and keep the fastest for this GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor import hardware
from tersor.cli import bench, console, options
from tersor.errors import InputError


def command(
    shapes: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL|OCxIC", help=bench.SHAPES_HELP, show_default=False)
    ] = None,
    n: Annotated[str | None, typer.Option("--n", help="Numbers of tokens; default: both ends of every tile.")] = None,
    format: Annotated[
        list[str] | None, typer.Option("--format", help="Format of the weights, FORMAT[:gN]; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the activations: float16 or bfloat16.")] = "float16",
    output: Annotated[
        Path | None, typer.Option(help="The table; default: the one in the cache directory that kernels look at.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Measure, and add to the table that decides before the model does."""
    import torch

    from tersor.bench import report, tune
    from tersor.bench import shapes as known
    from tersor.kernels.tune import choice, table

    tokens = list(tune.tokens_with_edges()) if n is None else bench.numbers("--n", n)
    wanted = known.resolve(shapes or known.DEFAULT, trust_remote_code=trust_remote_code)
    schemes = bench.schemes(format or ["fp6_e3m2"], wanted)
    kind = bench.dtype_named(dtype)
    if output is not None:
        bench.check_folder("--output", output)
    bench.need_gpu("run it on the machine whose GPU the table is for")
    chip = hardware.of_device(torch.cuda.current_device())
    path = table.user_path(chip) if output is None else output
    tune.merged(path, chip, [])  # a file that is no table is refused before the measuring
    found = tune.problems(wanted, tokens, schemes, chip)
    if not found:
        raise InputError(f"no fused kernel takes these problems on {chip.name}: fewer tokens may do")
    with console.progress("measuring configurations") as move:
        choices = tune.measure(found, chip, tune.on_gpu(kind, chip), move)
    report.write(path, tune.merged(path, chip, choices).text())
    choice.forget()
    rows = tune.rows(choices, chip)
    if json:
        console.print_json({"chip": chip.name, "table": str(path), "choices": rows})
        return
    console.print_table(*tune.columns(rows))
    print(f"choices written: {len(choices)} to {path}")
