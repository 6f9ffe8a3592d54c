"""`tersor quantize`: compress the linear weights of a checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import console, options
from tersor.cli.converted import give
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.convert.pipeline import Progress

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?B|[kMGT])")
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms|us)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def command(
    model: options.Model,
    revision: options.Revision = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Directory to make; not needed for a dry run.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="Element format, such as fp6 (e2m3), int4, mxfp6_e2m3 or lut3 (a table for each row); bf16, fp16 or "
            "fp32, that of the checkpoint, only repacks pruned weights, without loss.",
        ),
    ] = "fp6",
    group_size: options.GroupSize = None,
    scale_dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16, float32 or e8m0; exports and tables take the model's dtype."),
    ] = None,
    ignore: options.Ignore = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=FORMAT",
            help="Another format for modules whose name it finds, FORMAT[:gN|:row][:SCALE]; repeatable, the "
            "first that finds a module decides. lm_head, embeddings and routers are left alone unless a pattern "
            "spells their name.",
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="rtn: round to nearest; gptq: calibrated on a text, block by block. If not given, gptq with "
            "--calibration, else rtn."
        ),
    ] = None,
    calibration: options.CalibrationText = None,
    calibration_tokens: options.CalibrationTokens = None,
    calibration_window: options.CalibrationWindow = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What is done beside choosing codes; repeatable. rotate: spread outliers by rotating the residual "
            "stream and heads; awq: scale channels by their inputs; tweak-norms: adjust norms to compressed blocks.",
        ),
    ] = None,
    effort: Annotated[
        str, typer.Option(help="normal; high: a backward pass through the model says which outputs matter; slower.")
    ] = "normal",
    seed: Annotated[int, typer.Option(help="Of what the backward pass and transforms draw.")] = 0,
    level: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT[:gN]",
            help="A format that output features may get where there is a target, by what each loses on the calibration "
            "text; repeatable. uint3:g128, uint4:g128, fp5_e2m2, fp6_e2m3 and int8 if not given.",
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="True bits a weight, scales and padding counted, that all features take.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Size of the checkpoint in place of bits, such as 5GB or 500MB.")
    ] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(
            help="In place of bits, what all linears together are predicted to take in a step, such as 1.8ms or 900us."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of that step; 1 if not given.")] = None,
    chip: Annotated[str | None, typer.Option(help="GPU that it is predicted for, such as h200 (the default).")] = None,
    target_shares: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...",
            help="In place of bits, the share of all output features that get each --level, such as 90%,10%: MixLLM's "
            "count rule, to compare with.",
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(
            help="By what output features are compared for a target: kl, the divergence expected of each; mixllm, "
            "MixLLM's score, to compare with."
        ),
    ] = "kl",
    sparse: Annotated[
        str,
        typer.Option(
            help="auto: a weight that was pruned, one with zeros, is stored as a mask and what is left where that is "
            "smaller; off: never."
        ),
    ] = "auto",
    outliers: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the weights of every row, such as 0.5%, kept in 16 bits beside the codes of --format: those "
            "that codes lose most on by the calibration text, without one the largest.",
        ),
    ] = None,
    export: Annotated[
        str, typer.Option(help="Checkpoint format: tersor, humming, compressed-tensors or quark.")
    ] = "tersor",
    device: options.WorkDevice = "cpu",
    shard_size: options.ShardSize = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    resume: options.Resume = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Compress, then print what became of the tensors."""
    from tersor.convert.job import quantize

    mixed = any(one is not None for one in (target_bits, target_size, target_latency, target_shares))
    label = f"{Path(model).name} to {'a mix' if mixed else format}"
    with resumable(output), show_progress(label) as progress, console.telling():
        report = quantize(
            model,
            output,
            format=format,
            group_size=group_size,
            scale_dtype=scale_dtype,
            algorithm=algorithm,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            calibration_window=calibration_window,
            effort=effort,
            seed=seed,
            ignore=ignore or (),
            overrides=override or (),
            dry_run=dry_run,
            resume=resume,
            sparse=sparse,
            outliers=outliers,
            device=device,
            export=export,
            shard_size=parse_size(shard_size),
            revision=revision,
            progress=progress,
            trust_remote_code=trust_remote_code,
            transforms=transform or (),
            levels=level or (),
            target_bits=target_bits,
            target_size=None if target_size is None else parse_size(target_size),
            target_latency=None if target_latency is None else parse_latency(target_latency),
            batch=batch,
            chip=chip,
            target_shares=None if target_shares is None else parse_shares(target_shares),
            score=score,
        )
    give(report, json)


def parse_size(text: str) -> int:
    """Return the bytes a text such as `5GB` or `1.5G` means; units are decimal, and one has to be there.

    Raises:
        InputError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    count = float(match[1]) * _UNITS[match[2].removesuffix("B")] if match else 0.0
    if not 1 <= count < float("inf"):
        raise InputError(f"size {text!r} is not a number of bytes with a unit, such as 5GB or 500MB")
    return int(count)


def parse_latency(text: str) -> float:
    """Return the seconds a text such as `1.8ms` or `900us` means.

    Raises:
        InputError: it is no time.
    """
    match = _LATENCY.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"latency {text!r} is not a time such as 1.8ms or 900us")
    return seconds


def parse_shares(text: str) -> list[float]:
    """Return the shares that a text such as `90%,10%` means, as parts of 1.

    Raises:
        InputError: it is no list of percentages.
    """
    matches = [_SHARE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(matches):
        raise InputError(f"shares {text!r} are not percentages such as 90%,10%")
    return [float(match[1]) / 100 for match in matches if match]


@contextmanager
def resumable(output: str | None) -> Iterator[None]:
    """Where a run is interrupted that leaves finished files, say that it can be continued, and stop.

    Args:
        output: the directory that the run makes; `None` of a dry run.
    """
    from tersor.convert.resume import partial_directory

    try:
        yield
    except KeyboardInterrupt:
        partial = partial_directory(Path(output)) if output is not None else None
        if partial is not None and partial.exists():
            print(f"{partial} keeps what is finished: add --resume to continue", file=sys.stderr)
        raise


@contextmanager
def show_progress(label: str) -> Iterator[Progress | None]:
    """Show bytes done, rate and time left on stderr while a person looks, and yield what moves it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening the model", total=None)

        def move(done: int, total: int, name: str) -> None:
            if not name:
                bar.reset(task, total=total, completed=done, description=label)
            else:
                bar.update(task, completed=done)

        yield move
