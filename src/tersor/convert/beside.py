"""What is written beside the weights: config.json, the index, the model card, and what is copied from the source."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tersor import files
from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.exports import Export
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.source import CONFIG_NAME, INDEX_NAME, Source, stated_dtype, without_quantization
from tersor.checkpoint.writer import output_error, write_file
from tersor.convert.card import model_card
from tersor.errors import CheckpointError
from tersor.formats import dtype_name

_COPY_BYTES = 1 << 23


def write_beside(
    source: Source,
    conversion: Conversion,
    chosen_export: Export,
    recipe: str,
    companions: Sequence[Path],
    directory: Path,
) -> None:
    """Write config.json, the index and the model card, and copy the tokenizer and its like.

    Args:
        source: what was compressed.
        conversion: what became of it.
        chosen_export: whose names and metadata the checkpoint has.
        recipe: as for `card.model_card`.
        companions: files of the source to copy, relative to its directory.
        directory: where the shards are.

    Raises:
        CheckpointError: a file of the source cannot be read.
        OutputError: the disk is full or does not let us write.
    """
    config = without_quantization(source.config)
    if not stated_dtype(config):
        # A reader that infers the dtype from the first float tensor could take a scale for a weight.
        config["dtype"] = model_dtype(source)
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


def _json(value: Any) -> bytes:
    return (json.dumps(_tagged(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _tagged(value: Any) -> Any:
    """Return a JSON value in which NaN and infinities are objects, as transformers writes and reads them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]}
    if isinstance(value, dict):
        return {key: _tagged(item) for key, item in value.items()}
    return [_tagged(item) for item in value] if isinstance(value, (list, tuple)) else value


def model_dtype(source: Source) -> str:
    """Return the dtype of a model's activations, as config.json says it, or that of its first tensor."""
    stated = stated_dtype(source.config)
    if stated:
        return stated
    first = next(iter(source.tensors.values())).spec.dtype
    return dtype_name(TORCH_DTYPES[first]) if first in WEIGHT_DTYPES else first
