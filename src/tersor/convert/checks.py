"""What can be said against a compression before it starts: its output, its options, its size."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor import files
from tersor.checkpoint.config import finds
from tersor.checkpoint.conversion import Conversion, Step
from tersor.checkpoint.released import Released
from tersor.checkpoint.source import Source
from tersor.checkpoint.writer import output_error
from tersor.convert.resume import Workplace
from tersor.errors import InputError, OutputError

DEFAULT_FORMAT = "fp6"
DEFAULT_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64 << 20


def check_levels(
    scored: bool, given: bool, dry_run: bool, export: str, outliers: str | None, scales: bool, format: str
) -> None:
    """Hold that what is said of the levels of output features fits what is said beside it.

    Args:
        scored, given: whether they follow from a target, or are there.
        dry_run, export, outliers, format: as `tersor.quantize` takes them.
        scales: whether a group size or a scale dtype is asked for.

    Raises:
        InputError: it does not.
    """
    if scored and given:
        raise InputError("levels of output features are given, and a target by which they are chosen: keep one of them")
    if (scored or given) and format != DEFAULT_FORMAT:
        raise InputError(
            f"format {format!r} is given, and output features have levels in its place: leave it out, or make it one "
            f"of them (--level {format})"
        )
    if scored and dry_run:
        raise InputError("a dry run scores no output features: leave the target out")
    if scored and export != "tersor":
        raise InputError(f"{export} cannot say a mix of schemes in one layer: leave the target out")
    if outliers is not None and (scored or given):
        raise InputError("outliers stand beside one format: leave them out where output features have levels")
    if given and scales:
        raise InputError("group size and scale dtype belong into every level where output features have levels")


def check_destination(output: str | os.PathLike[str] | None, dry_run: bool) -> Path | None:
    """Return the directory to make, `None` for a dry run without one.

    Raises:
        InputError: none is given, it is no path, or it is there already.
        OutputError: it cannot be looked at.
    """
    if output is None:
        if not dry_run:
            raise InputError("no output directory given: name one (--output), or make it a dry run (--dry-run)")
        return None
    if not isinstance(output, str | os.PathLike):
        raise InputError(f"output is {output!r}: give the name of a directory to make")
    try:
        path = Path(os.path.abspath(files.user_path(output)))
        there = bool(files.mode_of(path)) or path.is_symlink()
    except OSError as error:
        raise output_error(error, Path(output)) from None
    if there:
        raise InputError(f"output {path} exists: choose another name, or remove it")
    return path


def check_apart(source: Source, destination: Path) -> None:
    """Check that an output does not lie inside of its source.

    Raises:
        InputError: it does.
    """
    inside = Path(os.path.realpath(source.directory))
    real = Path(os.path.realpath(destination.parent)) / destination.name
    if real == inside or inside in real.parents:
        raise InputError(f"output {destination} lies in the model's own directory {source.directory}: choose another")


def check_growth(source: Source, conversion: Conversion, released: Released, ignore: Sequence[str]) -> None:
    """Refuse to write more than there was because weights that stay uncompressed were compressed in the source.

    Those whose name an `ignore` pattern of the user finds are asked for as they are, decoded.

    Raises:
        InputError: that would be so.
    """
    grown = [
        step
        for step in conversion.steps
        if step.scheme is None
        and step.source.nbytes  # an output head that `rotate` untied takes nothing
        and step.output_bytes > step.source.nbytes
        and not any(finds(pattern, _names(step)) for pattern in ignore)
    ]
    before = sum(step.source.nbytes for step in conversion.steps)
    after = conversion.output_bytes
    growth = sum(step.output_bytes - step.source.nbytes for step in grown)
    if after <= before or after - growth > before:
        return
    first = max(grown, key=lambda step: step.output_bytes - step.source.nbytes).source.spec
    raise InputError(
        f"{source.directory} is already compressed by {released.method}, and {len(grown)} of its tensors, such as "
        f"{first.name!r}, cannot be compressed again: decoded, {before / 1e9:.2f} GB would become {after / 1e9:.2f} "
        f"GB; keep the model as it is, or ignore them by name (--ignore) to have them decoded to {first.dtype}"
    )


def _names(step: Step) -> tuple[str, ...]:
    """Return what patterns may find a step by: the name of its tensor, and those of its layer."""
    return (step.source.spec.name, *(step.layer.names if step.layer is not None else ()))


def check_space(conversion: Conversion, work: Workplace, more: int = 0) -> None:
    """Check that the disk has room for what is not written yet.

    Args:
        conversion: what is written.
        work: where.
        more: bytes that are needed beside it while the work lasts.

    Raises:
        OutputError: it has not.
    """
    first = len(work.rows)
    steps = [conversion.steps[index] for _, indices in conversion.shards[first:] for index in indices]
    needed = sum(step.output_bytes for step in steps) + more + _SPARE_BYTES
    try:
        free = shutil.disk_usage(work.directory).free
    except OSError as error:
        raise output_error(error, work.directory) from None
    if needed > free:
        raise OutputError(
            f"{work.directory} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free: free "
            "some and run again with --resume"
        )


def check_in_place(output: Any, resume: bool, export: str, shard_size: float, transforms: Sequence[str]) -> None:
    """Check that a module in memory is not asked for what only a checkpoint on disk has.

    Raises:
        InputError: it is.
    """
    if output is not None:
        raise InputError(
            f"a module is compressed in place, and output {output!r} is given: leave it out and call save_pretrained"
        )
    if resume or export != "tersor" or shard_size != DEFAULT_SHARD_BYTES:
        raise InputError("resume, export and shard_size are for a checkpoint on disk: a module is compressed in place")
    if transforms:
        raise InputError("transforms change a checkpoint on disk: save the module, and compress what is saved")


def check_shard_bytes(shard_size: Any) -> int:
    """Return the bytes of tensors in an output file.

    Raises:
        InputError: they are no positive number.
    """
    if isinstance(shard_size, bool) or not isinstance(shard_size, int | float) or not 1 <= shard_size < math.inf:
        raise InputError(f"shard size {shard_size!r} is not a positive number of bytes, such as 5e9")
    return int(shard_size)
