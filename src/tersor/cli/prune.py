"""`tersor prune`: make weights of a checkpoint zero, and store it smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import console, options
from tersor.cli.converted import give
from tersor.cli.quantize import parse_size, resumable, show_progress


def command(
    model: options.Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory to make.")],
    revision: options.Revision = None,
    sparsity: Annotated[
        str | None, typer.Option(help="The share of weights that become zero, such as 0.5; a pattern has its own.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(metavar="N:M", help="At most N weights of M consecutive input channels stay, such as 2:4.")
    ] = "",
    scope: Annotated[
        str | None,
        typer.Option(help="layer or row: where the share holds; as in the algorithm's paper if not given."),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="Which weights stay: magnitude, which needs no text, wanda, sparsegpt or admm, each better and slower."
        ),
    ] = "admm",
    values: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT[:gN|:row][:SCALE]",
            help="What weights that stay are stored as: bf16, fp16, fp32, or a format such as fp6 or int4:g128; the "
            "model's dtype if not given.",
        ),
    ] = None,
    group_size: options.GroupSize = None,
    scale_dtype: Annotated[str | None, typer.Option(help="float16, bfloat16, float32 or e8m0.")] = None,
    update: Annotated[
        bool | None,
        typer.Option("--update/--no-update", help="Fit the weights that stay to their mask; default: with a text."),
    ] = None,
    allocate: Annotated[
        bool,
        typer.Option("--allocate", help="Give every matrix a share of its own, by what its zeros cost on the text."),
    ] = False,
    dead_neurons: Annotated[
        str | None,
        typer.Option(
            metavar="report|drop",
            help="report: count the MLP units that never fire on the text; drop: make their weights zero as well.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the labels by which costs are measured.")] = 0,
    ignore: options.Ignore = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=SPARSITY",
            help="Another share for modules whose name it finds, SPARSITY[:N:M][:row|:layer]; repeatable, the first "
            "that finds a module decides.",
        ),
    ] = None,
    calibration: options.CalibrationText = None,
    calibration_tokens: options.CalibrationTokens = None,
    calibration_window: options.CalibrationWindow = None,
    device: options.WorkDevice = "cpu",
    shard_size: options.ShardSize = "5GB",
    resume: options.Resume = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Prune, then print what became of the tensors."""
    from tersor.convert.prune import prune

    with resumable(output), show_progress(f"{Path(model).name} pruned by {algorithm}") as progress, console.telling():
        report = prune(
            model,
            output,
            sparsity=sparsity,
            pattern=pattern,
            scope=scope,
            algorithm=algorithm,
            values=values,
            group_size=group_size,
            scale_dtype=scale_dtype,
            update=update,
            allocate=allocate,
            dead_neurons=dead_neurons,
            seed=seed,
            ignore=ignore or (),
            overrides=override or (),
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            calibration_window=calibration_window,
            resume=resume,
            device=device,
            shard_size=parse_size(shard_size),
            revision=revision,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    give(report, json)
    if report.dead_units is not None and not json:
        dead = sum(report.dead_units.values())
        what = "became zero" if dead_neurons == "drop" else "could be dropped"
        print(f"{dead} MLP units never fire on the text and {what}; tersor-calibration.json has their numbers")
