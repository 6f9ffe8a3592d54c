"""Compress a checkpoint: from a directory or Hub id to a directory that appears when it is complete."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.config import check_pattern, parse_override
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import Export, get_export
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.released import Released, read_released
from tersor.checkpoint.source import (
    CONFIG_NAME,
    INDEX_NAME,
    Source,
    open_source,
    stated_dtype,
    without_quantization,
)
from tersor.checkpoint.writer import output_error, write_file
from tersor.compress import DEFAULT_RECIPE, get_recipe
from tersor.convert.card import model_card
from tersor.convert.pipeline import Pipeline, Progress, row_of
from tersor.convert.report import Report
from tersor.convert.resume import Workplace
from tersor.errors import InputError, OutputError
from tersor.formats import Scheme, dtype_name, get_scheme
from tersor.hardware import resolve_device
from tersor.integrations.transformers.architecture import read_architecture
from tersor.version import __version__

DEFAULT_SHARD_BYTES = 5_000_000_000
_SPARE_BYTES = 64 << 20


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    format: str = "fp6_e3m2",
    group_size: int | None = None,
    scale_dtype: str | None = None,
    algorithm: str = DEFAULT_RECIPE,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str] | Sequence[str] = (),
    dry_run: bool = False,
    resume: bool = False,
    device: str = "cpu",
    export: str = "tersor",
    shard_size: float = DEFAULT_SHARD_BYTES,
    revision: str | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Compress the linear weights of a checkpoint, tensor by tensor.

    A checkpoint that another method compressed (`checkpoint.released`) is decoded block by block on the way.

    Memory does not grow with the model: weights are read, encoded and written in blocks of rows. The output directory
    appears under its name when it is complete; until then the work is in `<output>.partial`.

    Args:
        model: a checkpoint directory, or a Hub id that is downloaded.
        output: the directory to make, which must not exist; `None` only for a dry run.
        format: element format of the weights, such as `fp6_e3m2`, `int4` or `mxfp6_e2m3`.
        group_size: consecutive input channels that share a scale; `None` is one scale a row.
        scale_dtype: `float16` (default), `bfloat16`, `float32` or `e8m0`; exports default to the model's dtype.
        algorithm: how codes are chosen, a key of `compress.RECIPES`: `rtn`, round to nearest.
        ignore: regular expressions of modules to leave alone; found anywhere in the module's name.
        overrides: `REGEX=FORMAT[:gN|:row][:SCALE_DTYPE]`, or a mapping of the two; the first that is found decides. The
            output head, embeddings and routers are left alone unless a pattern spells their name.
        dry_run: only report what would be done.
        resume: continue the work that an interrupted run left in `<output>.partial`.
        device: where weights are encoded: `cpu`, `cuda`, `cuda:N` or `auto`.
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
    get_export(export)
    get_recipe(algorithm)
    where = resolve_device(device)
    if not shard_size >= 1:
        raise InputError(f"shard size {shard_size} is not a positive number of bytes")
    get_scheme(format, group_size, scale_dtype)
    destination = _destination(output, dry_run)
    patterns = [check_pattern(pattern, "ignore") for pattern in ignore]
    texts = _override_texts(overrides)
    for text in texts:
        parse_override(text, group_size, scale_dtype)
    with open_source(model, revision) as source:
        if destination is not None:
            _check_apart(source, destination)
        released = read_released(source)
        if released is not None:
            source.tensors = released.tensors
        chosen_export = get_export(export, _model_dtype(source))
        if scale_dtype is None and not get_scheme(format).is_mx:
            scale_dtype = chosen_export.default_scale_dtype
        scheme = get_scheme(format, group_size, scale_dtype)
        conversion = make_conversion(
            source,
            read_architecture(source.directory, trust_remote_code=trust_remote_code),
            scheme=scheme,
            ignore=patterns,
            overrides=[parse_override(text, group_size, scale_dtype) for text in texts],
            export=chosen_export,
            shard_bytes=int(shard_size),
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
        if dry_run or destination is None:
            rows = tuple(row_of(step) for step in conversion.steps)
            files = tuple(name for name, _ in conversion.shards)
            seconds = time.monotonic() - started
            return Report(source.label, None, scheme.key(), export, rows, files, seconds, source_method=source_method)
        identity = {
            "tersor": __version__,
            "model": source.label,
            "export": export,
            "shard size": int(shard_size),
            **{key: value for key, value in conversion.config.to_dict().items() if key != "provenance"},
            "algorithm": algorithm,
            "source's compression": dict(released.settings) if released is not None else None,
            "weights": source.fingerprint(),
        }
        work = Workplace(destination, identity, resume)
        try:
            return _write(
                source, conversion, work, chosen_export, scheme, algorithm, destination, where, progress, started
            )
        finally:
            work.close()


def _write(
    source: Source,
    conversion: Conversion,
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
        _write_companions(source, conversion, chosen_export, recipe, work.directory)
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


def _write_companions(
    source: Source, conversion: Conversion, chosen_export: Export, recipe: str, directory: Path
) -> None:
    """Write config.json, the index and the model card, and copy the tokenizer and its like."""
    config = without_quantization(source.config)
    if not stated_dtype(config):
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
    write_file(directory / "README.md", model_card(source, conversion, chosen_export, recipe).encode())
    for path in source.companions():
        try:
            (directory / path).parent.mkdir(exist_ok=True)
            write_file(directory / path, (source.directory / path).read_bytes())
        except OSError as error:
            raise output_error(error, directory / path) from None


def _json(value: Any) -> bytes:
    return (json.dumps(_tagged(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _tagged(value: Any) -> Any:
    """Return a JSON value in which NaN and infinities are objects, as transformers writes and reads them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]}
    if isinstance(value, dict):
        return {key: _tagged(item) for key, item in value.items()}
    return [_tagged(item) for item in value] if isinstance(value, (list, tuple)) else value


def _destination(output: str | os.PathLike[str] | None, dry_run: bool) -> Path | None:
    if output is None:
        if not dry_run:
            raise InputError("no output directory given: name one, or make it a dry run")
        return None
    path = Path(os.path.abspath(Path(output).expanduser()))
    if path.exists() or path.is_symlink():
        raise InputError(f"output {path} exists: choose another name, or remove it")
    return path


def _check_apart(source: Source, destination: Path) -> None:
    inside = source.directory.resolve()
    real = destination.parent.resolve() / destination.name
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
        and not any(re.search(pattern, step.source.spec.name) for pattern in ignore)
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


def _check_space(conversion: Conversion, work: Workplace) -> None:
    first = len(work.rows)
    steps = [conversion.steps[index] for _, indices in conversion.shards[first:] for index in indices]
    needed = sum(step.output_bytes for step in steps) + _SPARE_BYTES
    free = shutil.disk_usage(work.directory).free
    if needed > free:
        raise OutputError(
            f"{work.directory} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free: free "
            "some and run again with --resume"
        )


def _model_dtype(source: Source) -> str:
    stated = stated_dtype(source.config)
    if stated:
        return stated
    first = next(iter(source.tensors.values())).spec.dtype
    return dtype_name(TORCH_DTYPES[first]) if first in WEIGHT_DTYPES else first


def _override_texts(overrides: Mapping[str, str] | Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise InputError(f"overrides is the text {overrides!r}: give a list of REGEX=FORMAT or a mapping")
    if isinstance(overrides, Mapping):
        return [f"{pattern}={value}" for pattern, value in overrides.items()]
    return list(overrides)
