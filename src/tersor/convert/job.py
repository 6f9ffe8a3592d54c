"""Compress a checkpoint: from a directory or Hub id to a directory that appears when it is complete."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from tersor import files
from tersor.checkpoint.config import finds, parse_ignore, parse_overrides
from tersor.checkpoint.conversion import Conversion, Step, make_conversion
from tersor.checkpoint.exports import Export, get_export
from tersor.checkpoint.released import Released, read_released
from tersor.checkpoint.source import (
    Source,
    open_source,
)
from tersor.checkpoint.writer import output_error
from tersor.compress import DEFAULT_RECIPE, get_recipe
from tersor.convert.beside import model_dtype, write_beside
from tersor.convert.module import quantize_module
from tersor.convert.pipeline import Pipeline, Progress, row_of
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.errors import InputError, OutputError
from tersor.formats import Scheme, get_scheme
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture
from tersor.version import __version__

DEFAULT_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64 << 20


@overload
def quantize(
    model: nn.Module,
    output: None = None,
    *,
    format: str = ...,
    group_size: int | None = ...,
    scale_dtype: str | None = ...,
    algorithm: str = ...,
    ignore: Sequence[str] = ...,
    overrides: Mapping[str, Any] | Sequence[str] = ...,
    dry_run: bool = ...,
    device: str | None = ...,
    progress: Progress | None = ...,
) -> Report: ...


@overload
def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = ...,
    *,
    format: str = ...,
    group_size: int | None = ...,
    scale_dtype: str | None = ...,
    algorithm: str = ...,
    ignore: Sequence[str] = ...,
    overrides: Mapping[str, Any] | Sequence[str] = ...,
    dry_run: bool = ...,
    resume: bool = ...,
    device: str | None = ...,
    export: str = ...,
    shard_size: float = ...,
    revision: str | None = ...,
    progress: Progress | None = ...,
    trust_remote_code: bool = ...,
) -> Report: ...


def quantize(
    model: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "fp6",
    group_size: int | None = None,
    scale_dtype: str | None = None,
    algorithm: str = DEFAULT_RECIPE,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Any] | Sequence[str] = (),
    dry_run: bool = False,
    resume: bool = False,
    device: str | None = None,
    export: str = "tersor",
    shard_size: float = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Compress the linear weights of a checkpoint, tensor by tensor, or those of a module, in place.

    A module in memory (any `nn.Module`; `convert.module`) takes neither output nor `resume`, `export`, `shard_size`.

    A checkpoint that another method compressed (`checkpoint.released`) is decoded block by block on the way.

    Memory does not grow with the model: weights are read, encoded and written in blocks of rows. The output directory
    appears under its name when it is complete; until then the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded; or a module.
        output: the directory to make, which must not exist; `None` only for a dry run or a module.
        format: element format of the weights, such as `fp6` (`fp6_e2m3`), `int4` or `mxfp6_e2m3`.
        group_size: consecutive input channels that share a scale; `None` is one scale a row.
        scale_dtype: `float16` (default), `bfloat16`, `float32` or `e8m0`; exports default to the model's dtype.
        algorithm: how codes are chosen, a key of `compress.RECIPES`: `rtn`, round to nearest.
        ignore: regular expressions of modules to leave alone; found anywhere in the module's name.
        overrides: `REGEX=FORMAT[:gN|:row][:SCALE_DTYPE]`, or a mapping of the two (or of a pattern to a mapping with
            `format`, `group_size`, `scale_dtype`); the first that is found decides. The output head, embeddings and
            routers are left alone unless a pattern spells their name.
        dry_run: only report what would be done.
        resume: continue the work that an interrupted run left in `<output>.partial`.
        device: where weights are encoded: `cpu`, `cuda`, `cuda:N` or `auto`; `None` is the CPU, or where a module's
            weights are.
        export: checkpoint format: `tersor`, `humming`, `compressed-tensors` or `quark`.
        shard_size: bytes of tensors in an output file.
        revision: branch, tag or commit of a Hub id.
        progress: called with bytes done, bytes in all, and a tensor's name.
        trust_remote_code: whether Python code that comes with the model is run, to know its layers.

    Returns:
        What was done, tensor by tensor.

    Raises:
        InputError: bad options or a bad checkpoint; nothing is left behind.
        OutputError: the output cannot be written; the work so far stays for `resume`.
    """
    started = time.monotonic()
    if isinstance(model, nn.Module):
        _check_in_place(output, resume, export, shard_size)
        return quantize_module(
            model,
            format=format,
            group_size=group_size,
            scale_dtype=scale_dtype,
            algorithm=algorithm,
            ignore=ignore,
            overrides=overrides,
            dry_run=dry_run,
            device=device,
            progress=progress,
        )
    get_export(export)
    get_recipe(algorithm)
    where = resolve_device(device or "cpu")
    shard_bytes = _shard_bytes(shard_size)
    get_scheme(format, group_size, scale_dtype)
    destination = _destination(output, dry_run)
    patterns = parse_ignore(ignore)
    parse_overrides(overrides, group_size, scale_dtype)
    with open_source(model, revision) as source:
        if destination is not None:
            _check_apart(source, destination)
        released = read_released(source)
        if released is not None:
            source.tensors = released.tensors
        chosen_export = get_export(export, model_dtype(source))
        if scale_dtype is None and not get_scheme(format).is_mx:
            scale_dtype = chosen_export.default_scale_dtype
        scheme = get_scheme(format, group_size, scale_dtype)
        conversion = make_conversion(
            source,
            read_architecture(source.directory, trust_remote_code=trust_remote_code),
            scheme=scheme,
            ignore=patterns,
            overrides=parse_overrides(overrides, group_size, scale_dtype),
            export=chosen_export,
            shard_bytes=shard_bytes,
            provenance={
                "tersor": __version__,
                "algorithm": algorithm,
                "source": source.label,
                **({"source_revision": revision} if revision is not None else {}),
                **({"source_method": released.method} if released is not None else {}),
            },
        )
        if released is not None:
            _check_growth(source, conversion, released, patterns)
        source_method = released.method if released is not None else ""
        companions = source.companions()
        if dry_run or destination is None:
            rows = tuple(row_of(step) for step in conversion.steps)
            files = tuple(name for name, _ in conversion.shards)
            seconds = time.monotonic() - started
            return Report(source.label, None, scheme.key(), export, rows, files, seconds, source_method=source_method)
        identity = {
            "tersor": __version__,
            "model": source.label,
            "export": export,
            "shard size": shard_bytes,
            **{key: value for key, value in conversion.config.to_dict().items() if key != "provenance"},
            "algorithm": algorithm,
            "source's compression": dict(released.settings) if released is not None else None,
            "weights": source.fingerprint(),
        }
        work = Workplace(destination, identity, resume)
        try:
            return _write(
                source,
                conversion,
                companions,
                work,
                chosen_export,
                scheme,
                algorithm,
                destination,
                where,
                progress,
                started,
            )
        finally:
            work.close()


def _write(
    source: Source,
    conversion: Conversion,
    companions: Sequence[Path],
    work: Workplace,
    chosen_export: Export,
    scheme: Scheme,
    recipe: str,
    destination: Path,
    device: torch.device,
    progress: Progress | None,
    started: float,
) -> Report:
    names = [name for name, _ in conversion.shards]
    first = len(work.rows)
    try:
        _check_space(conversion, work)
        pipeline = Pipeline(conversion, recipe, work.directory, device, progress)
        streaming = time.monotonic()
        pipeline.run(first, lambda number, rows: work.finished(rows, names[: number + 1]))
        stream_seconds = time.monotonic() - streaming
        write_beside(source, conversion, chosen_export, recipe, companions, work.directory)
        work.publish()
    except InputError:
        # The input is at fault, so there is nothing to continue.
        work.discard()
        raise
    done = {row.name: row for rows in work.rows for row in rows}
    skipped = {index for _, indices in conversion.shards[:first] for index in indices}
    read = [step.source.nbytes for index, step in enumerate(conversion.steps) if index not in skipped]
    return Report(
        source=source.label,
        output=str(destination),
        scheme=scheme.key(),
        export=chosen_export.name,
        rows=tuple(done[step.source.spec.name] for step in conversion.steps),
        files=tuple(names),
        seconds=time.monotonic() - started,
        stream_seconds=stream_seconds,
        bytes_read=sum(read),
        source_method=conversion.config.provenance.get("source_method", ""),
    )


def _destination(output: str | os.PathLike[str] | None, dry_run: bool) -> Path | None:
    if output is None:
        if not dry_run:
            raise InputError("no output directory given: name one, or make it a dry run")
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


def _check_apart(source: Source, destination: Path) -> None:
    inside = Path(os.path.realpath(source.directory))
    real = Path(os.path.realpath(destination.parent)) / destination.name
    if real == inside or inside in real.parents:
        raise InputError(f"output {destination} lies in the model's own directory {source.directory}: choose another")


def _check_growth(source: Source, conversion: Conversion, released: Released, ignore: Sequence[str]) -> None:
    """Refuse to write more than there was because weights that stay uncompressed were compressed in the source.

    Those whose name an `ignore` pattern of the user finds are asked for as they are, decoded.
    """
    grown = [
        step
        for step in conversion.steps
        if step.scheme is None
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


def _check_space(conversion: Conversion, work: Workplace) -> None:
    first = len(work.rows)
    steps = [conversion.steps[index] for _, indices in conversion.shards[first:] for index in indices]
    needed = sum(step.output_bytes for step in steps) + _SPARE_BYTES
    try:
        free = shutil.disk_usage(work.directory).free
    except OSError as error:
        raise output_error(error, work.directory) from None
    if needed > free:
        raise OutputError(
            f"{work.directory} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free: free "
            "some and run again with --resume"
        )


def _check_in_place(output: Any, resume: bool, export: str, shard_size: float) -> None:
    if output is not None:
        raise InputError(
            f"a module is compressed in place, and output {output!r} is given: leave it out and call save_pretrained"
        )
    if resume or export != "tersor" or shard_size != DEFAULT_SHARD_BYTES:
        raise InputError("resume, export and shard_size are for a checkpoint on disk: a module is compressed in place")


def _shard_bytes(shard_size: Any) -> int:
    if isinstance(shard_size, bool) or not isinstance(shard_size, int | float) or not 1 <= shard_size < math.inf:
        raise InputError(f"shard size {shard_size!r} is not a positive number of bytes, such as 5e9")
    return int(shard_size)
