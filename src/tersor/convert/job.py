"""Compress a checkpoint: from a directory or Hub id to a directory that appears when it is complete."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tersor.checkpoint.config import parse_ignore, parse_overrides
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import Export, get_export
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.source import CONFIG_NAME, INDEX_NAME, Source, open_source, quantization_of
from tersor.checkpoint.writer import output_error, write_file
from tersor.compress import DEFAULT_RECIPE, get_recipe
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
    overrides: Mapping[str, Any] | Sequence[str] = (),
    dry_run: bool = False,
    resume: bool = False,
    device: str = "cpu",
    export: str = "tersor",
    shard_size: float = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Report:
    """Compress the linear weights of a checkpoint, tensor by tensor.

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
        overrides: `REGEX=FORMAT[:gN|:row][:SCALE_DTYPE]`, or a mapping of the two (or of a pattern to a mapping with
            `format`, `group_size`, `scale_dtype`); the first that is found decides. The output head, embeddings and
            routers are left alone unless a pattern spells their name.
        dry_run: only report what would be done.
        resume: continue the work that an interrupted run left in `<output>.partial`.
        device: where weights are encoded: `cpu`, `cuda`, `cuda:N` or `auto`.
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
    get_export(export)
    get_recipe(algorithm)
    where = resolve_device(device)
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
    source: Source, conversion: Conversion, chosen_export: Export, recipe: str, directory: Path
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
    for path in source.companions():
        try:
            (directory / path).parent.mkdir(exist_ok=True)
            write_file(directory / path, (source.directory / path).read_bytes())
        except OSError as error:
            raise output_error(error, directory / path) from None


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
    path = Path(os.path.abspath(Path(output).expanduser()))
    if path.exists() or path.is_symlink():
        raise InputError(f"output {path} exists: choose another name, or remove it")
    return path


def _check_apart(source: Source, destination: Path) -> None:
    inside = source.directory.resolve()
    real = destination.parent.resolve() / destination.name
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
    free = shutil.disk_usage(work.directory).free
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


def _shard_bytes(shard_size: Any) -> int:
    if isinstance(shard_size, bool) or not isinstance(shard_size, int | float) or not 1 <= shard_size < math.inf:
        raise InputError(f"shard size {shard_size!r} is not a positive number of bytes, such as 5e9")
    return int(shard_size)
