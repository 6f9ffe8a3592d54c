"""Compress a checkpoint: from a directory or Hub id to a directory that appears when it is complete."""

from __future__ import annotations

import json
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
from tersor.checkpoint.config import parse_ignore, parse_overrides
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import Export, get_export
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.source import CONFIG_NAME, INDEX_NAME, Source, open_source, quantization_of
from tersor.checkpoint.writer import output_error, write_file
from tersor.compress import DEFAULT_RECIPE, get_recipe
from tersor.convert.module import quantize_module
from tersor.convert.pipeline import Pipeline, Progress, row_of
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.errors import CheckpointError, InputError, OutputError
from tersor.formats import Scheme, dtype_name, get_scheme
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture
from tersor.version import __version__

DEFAULT_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64 << 20
_COPY_BYTES = 1 << 23


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
    progress: Progress | None = ...,
) -> Report: ...


def quantize(
    model: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "fp6_e3m2",
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
    progress: Progress | None = None,
) -> Report:
    """Compress the linear weights of a checkpoint, tensor by tensor, or those of a module, in place.

    A module in memory (any `nn.Module`; `convert.module`) takes neither output nor `resume`, `export`, `shard_size`.

    Memory does not grow with the model: weights are read, encoded and written in blocks of rows. The output directory
    appears under its name when it is complete; until then the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded; or a module.
        output: the directory to make, which must not exist; `None` only for a dry run or a module.
        format: element format of the weights, such as `fp6_e3m2`, `int4` or `mxfp6_e2m3`.
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
        progress: called with bytes done, bytes in all, and a tensor's name.

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
    with open_source(model) as source:
        if destination is not None:
            _check_apart(source, destination)
        _check_uncompressed(source)
        chosen_export = get_export(export, _model_dtype(source))
        if scale_dtype is None and not get_scheme(format).is_mx:
            scale_dtype = chosen_export.default_scale_dtype
        scheme = get_scheme(format, group_size, scale_dtype)
        conversion = make_conversion(
            source,
            read_architecture(source.directory),
            scheme=scheme,
            ignore=patterns,
            overrides=parse_overrides(overrides, group_size, scale_dtype),
            export=chosen_export,
            shard_bytes=shard_bytes,
            provenance={"tersor": __version__, "algorithm": algorithm, "source": source.label},
        )
        companions = source.companions()
        if dry_run or destination is None:
            rows = tuple(row_of(step) for step in conversion.steps)
            files = tuple(name for name, _ in conversion.shards)
            return Report(source.label, None, scheme.key(), export, rows, files, time.monotonic() - started)
        identity = {
            "tersor": __version__,
            "model": source.label,
            "export": export,
            "shard size": shard_bytes,
            **{key: value for key, value in conversion.config.to_dict().items() if key != "provenance"},
            "algorithm": algorithm,
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
        _write_companions(source, conversion, chosen_export, recipe, companions, work.directory)
        work.publish()
    except InputError:
        # The input is at fault, so there is nothing to continue.
        work.discard()
        raise
    done = {row.name: row for rows in work.rows for row in rows}
    skipped = {index for _, indices in conversion.shards[:first] for index in indices}
    read = [step.source.spec.nbytes for index, step in enumerate(conversion.steps) if index not in skipped]
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
    )


def _write_companions(
    source: Source,
    conversion: Conversion,
    chosen_export: Export,
    recipe: str,
    companions: Sequence[Path],
    directory: Path,
) -> None:
    """Write config.json, the index and the model card, and copy the tokenizer and its like."""
    config = dict(source.config)
    if not _stated_dtype(config):
        # A reader that infers the dtype from the first float tensor could take a scale for a weight.
        config["dtype"] = _model_dtype(source)
    config["quantization_config"] = chosen_export.quantization_config(
        conversion.config, conversion.layers, conversion.head
    )
    write_file(directory / CONFIG_NAME, _json(config))
    if len(conversion.shards) > 1:
        weight_map = {
            spec.name: name
            for name, indices in conversion.shards
            for index in indices
            for spec in conversion.steps[index].outputs
        }
        index = {
            "metadata": {"total_size": conversion.output_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_file(directory / INDEX_NAME, _json(index))
    write_file(directory / "README.md", _model_card(source, conversion, chosen_export, recipe).encode())
    for path in companions:
        _copy(source.directory / path, directory / path)


def _copy(path: Path, target: Path) -> None:
    """Copy a file of the source, whatever its size.

    Raises:
        CheckpointError: it cannot be read.
        OutputError: the disk is full or does not let us write.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    with file:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(target, iter(lambda: file.read(_COPY_BYTES), b""))
        except OSError as error:
            raise output_error(error, target) from None


def _model_card(source: Source, conversion: Conversion, chosen_export: Export, recipe: str) -> str:
    scheme = conversion.config.scheme
    base = [f"base_model: {source.label}", "base_model_relation: quantized"] if source.from_hub else []
    front = ["---", *base, "library_name: transformers", "tags:", "- tersor", f"- {scheme.name}", "---"]
    use = "Load it with `import tersor` and then `AutoModelForCausalLM.from_pretrained`."
    if chosen_export.name != "tersor":
        use = f"The metadata is that of {chosen_export.name}; load it with an engine that reads it."
    group = "row" if scheme.group_size is None else f"group of {scheme.group_size}"
    body = [
        f"# {source.label} in {scheme.name}",
        "",
        f"Linear weights are {scheme.format.name} codes with one {scheme.scale_dtype} scale a {group}, "
        f"{get_recipe(recipe).summary} by Tersor {__version__}.",
        use,
    ]
    return "\n".join([*front, "", *body, ""])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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


def _check_uncompressed(source: Source) -> None:
    found = quantization_of(source.config)
    if found is not None:
        method = found.get("quant_method", "a method it does not name")
        raise InputError(f"{source.directory} is already compressed by {method}: start from the uncompressed model")


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


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    for holder in (config, config.get("text_config")):
        if isinstance(holder, dict):
            found = holder.get("dtype") or holder.get("torch_dtype")
            if isinstance(found, str):
                return found
    return None


def _model_dtype(source: Source) -> str:
    stated = _stated_dtype(source.config)
    if stated:
        return stated
    first = next(iter(source.tensors.values())).spec.dtype
    return dtype_name(TORCH_DTYPES[first]) if first in WEIGHT_DTYPES else first


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
