"""`tersor quantize`: compress the linear weights of a checkpoint."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import console, options
from tersor.cli.layers import collapse, scheme_words, shape_words
from tersor.errors import InputError

if TYPE_CHECKING:
    from tersor.convert.pipeline import Progress
    from tersor.convert.report import Report, Row

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?")
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms|us)")
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
        str, typer.Option(help="rtn: round to nearest; gptq: calibrated on a text, block by block.")
    ] = "rtn",
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

    with resumable(output), show_progress(f"{Path(model).name} to {format}") as progress:
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
        )
    give(report, json)


def give(report: Report, json: bool) -> None:
    """Print what was done, or in a dry run would be: as JSON where that is asked for; warnings go to stderr."""
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if json:
        console.print_json(report.to_dict())
    elif report.output is None:
        _print_dry_run(report)
    else:
        _print_report(report)


def parse_size(text: str) -> int:
    """Return the bytes a text such as `5GB` or `1.5G` means; units are decimal.

    Raises:
        InputError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    count = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1 <= count < float("inf"):
        raise InputError(f"size {text!r} is not a number of bytes such as 5GB or 500MB")
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


def _print_dry_run(report: Report) -> None:
    """Print a line for every kind of tensor: what would become of it."""
    _warn(report)
    alike = ((row, None if row.density is not None else row.bytes_after) for row in report.rows)
    named = ((row.name, (row.shape, row.scheme, row.note, after), row) for row, after in alike)
    lines = []
    for name, rows in collapse(named):
        first = rows[0]
        kept = f"kept: {first.note}" if first.note else "kept"
        lines.append(
            [
                name.removesuffix(".weight"),
                str(len(rows)),
                shape_words(first.shape),
                scheme_words(first.scheme) if first.scheme else kept,
                f"{_mean_bits(rows):.3f}",
                console.size(sum(row.bytes_before for row in rows)),
                console.size(sum(row.bytes_after for row in rows)),
            ]
        )
    _print_method(report)
    print(f"{report.source}: what would be written, in {_files(report)}")
    console.print_table(["tensor", "count", "shape", "becomes", "bits/weight", "before", "after"], lines)
    print(_totals(report))
    _print_pruned(report)
    if report.left:
        print(_left(report))


def _print_pruned(report: Report) -> None:
    """Print how much is left of the weights that are stored sparse, and which of them no kernel multiplies with."""
    from tersor.convert.zeros import unmultiplied
    from tersor.formats import Sparse

    found = [row for row in report.rows if row.density is not None]
    if found:
        sizes = [math.prod(row.shape) for row in found]
        left = sum(size * (row.density or 0.0) for size, row in zip(sizes, found, strict=True)) / sum(sizes)
        what = f"{len(found)} pruned weight{'s' * (len(found) > 1)}"
        print(f"{what} stored sparse, of whose elements {100 * left:.1f} % are left")
        for key in sorted({row.scheme or "" for row in found}):
            why = unmultiplied(Sparse.from_key(key))
            if why:
                print(f"every product decodes those in {scheme_words(key)} for cuBLAS: {why}")


def _print_report(report: Report) -> None:
    """Print a line for every scheme: tensors, bits per weight, sizes, worst error and where."""
    _warn(report)
    _print_method(report)
    groups: dict[str | None, list[Row]] = {}
    for row in report.rows:
        groups.setdefault(row.scheme, []).append(row)
    lines = []
    for scheme in sorted(groups, key=lambda scheme: (scheme is None, scheme or "")):
        rows = groups[scheme]
        worst = max(rows, key=lambda row: row.relative_error or 0.0)
        lines.append(
            [
                scheme_words(scheme) if scheme else "kept as they are",
                str(len(rows)),
                f"{_mean_bits(rows):.3f}",
                console.size(sum(row.bytes_before for row in rows)),
                console.size(sum(row.bytes_after for row in rows)),
                f"{100 * worst.relative_error:.2f} %" if worst.relative_error is not None else "-",
                worst.name.removesuffix(".weight") if scheme else "-",
            ]
        )
    console.print_table(
        ["format", "tensors", "bits/weight", "before", "after", "worst error", "where"],
        lines,
    )
    print(_totals(report))
    if report.mix is not None:
        print(_of_mix(report.mix))
    _print_pruned(report)
    if report.left:
        print(_left(report))
    rate = report.bytes_read / 1e6 / report.stream_seconds if report.stream_seconds else 0.0
    print(f"{report.output}: {_files(report)} written in {report.seconds:.1f} s, weights at {rate:.0f} MB/s")


def _warn(report: Report) -> None:
    """Say first where most of a model is not what was asked for."""
    if report.mostly_left:
        print(
            f"warning: only {100 * report.linear_share:.0f} % of the linear weights {_became(report)} compressed; what "
            "was left alone, and why, stands below"
        )


def _became(report: Report) -> str:
    return "would be" if report.output is None else "were"


def _left(report: Report) -> str:
    """Return a line for every reason for which tensors stayed as they are."""
    lines = [
        f"  {console.size(left.nbytes)} in {left.tensors} tensor{'s' * (left.tensors > 1)}: {left.reason}, such as "
        f"{left.example.removesuffix('.weight')}"
        for left in report.left
    ]
    return "\n".join(["left as they are:", *lines])


def _print_method(report: Report) -> None:
    """Print what a compressed source is decoded from: its errors come on top of those of the table."""
    if report.source_method:
        print(
            f"{report.source} is compressed by {report.source_method} already: decoded on the way, errors are against "
            "the decoded weights"
        )


def _totals(report: Report) -> str:
    ratio = report.bytes_before / report.bytes_after if report.bytes_after else 1.0
    times = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    return (
        f"{len(report.compressed)} of {len(report.rows)} tensors compressed to {report.bits_per_weight:.3f} bits a "
        f"weight; {console.size(report.bytes_before)} become {console.size(report.bytes_after)}, {times}"
    )


def _of_mix(mix: dict[str, Any]) -> str:
    """Return what the levels of output features take and are expected to lose."""
    taken = f"{mix['bits_per_weight']:.3f} true bits a weight, {console.size(mix['bytes'])}"
    if "predicted_seconds" in mix:
        taken += f", {1e3 * mix['predicted_seconds']:.4g} ms predicted for the linears of {mix['predicted_for']}"
    return f"output features have levels of {taken}: {mix['loss']:.3g} nats a token expected to be lost"


def _files(report: Report) -> str:
    return "1 file" if len(report.files) == 1 else f"{len(report.files)} files"


def _mean_bits(rows: list[Row]) -> float:
    from tersor.convert.report import mean_bits

    return mean_bits(rows)
