"""How does a checkpoint become one whose residual stream is rotated? Its tensors are seen as what they become.

The gains of norms go into the layers behind them first; then what layers read and write between blocks is rotated, and
so are values and what reads them, head by head. The model computes the same, up to the rounding of what stays in its
dtype: embedding, output head, and what is left alone. Rows are computed when they are read, so that calibration,
scores and recipes meet the rotated model and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import replace

import torch

from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.modules import Target
from tersor.checkpoint.released import DecodedTensor
from tersor.checkpoint.source import Source, StoredTensor
from tersor.compress.rotation import Rotation
from tersor.errors import CheckpointError, InputError
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.residual import Place, Residual, read_residual

_TIED = "tie_word_embeddings"
_WHOLE = threading.Semaphore(2)
"""Weights that are rotated whole at a time: each takes some times its float32 size of memory."""


def rotate(source: Source, seed: int, *, trust_remote_code: bool = False) -> None:
    """Replace the tensors of an open checkpoint by rotated ones, and what its config says of the output head.

    An output head that shares the embedding's weight gets one of its own, since the last norm's gains go into it alone.

    Args:
        source: the checkpoint.
        seed: of the signs of both rotations.
        trust_remote_code: whether Python code that comes with the model is run.

    Raises:
        CheckpointError: transformers cannot build the model, or changes tensors while it loads them.
        InputError: the model's residual stream cannot be rotated; what is in the way is named.
    """
    residual = read_residual(source.directory, trust_remote_code=trust_remote_code)
    architecture = read_architecture(source.directory, trust_remote_code=trust_remote_code, untied=True)
    stored = _by_parameter(source, architecture.find(source.tensors), residual)
    if residual.tied and residual.embedding in stored:
        origin = stored[residual.embedding]
        spec = replace(origin.spec, name=residual.output)
        stored[residual.output] = DecodedTensor(origin.file, spec, (), lambda first, last: _rows(origin, first, last))
    rotations = {
        "hidden": Rotation.of(residual.hidden, seed),
        "heads": Rotation.of(residual.head, seed + 1),
    }
    tensors = dict(source.tensors)
    for parameter, place in residual.places.items():
        tensor = stored.get(parameter)
        if tensor is not None:
            tensors[tensor.spec.name] = _turned(tensor, place, stored, rotations)
    source.tensors = tensors
    source.config = {
        **{key: {**value, _TIED: False} if key == "text_config" else value for key, value in source.config.items()},
        _TIED: False,
    }


def _by_parameter(source: Source, targets: Mapping[str, Target], residual: Residual) -> dict[str, StoredTensor]:
    """Return the stored tensor of every parameter that a rotation changes or reads.

    Raises:
        CheckpointError: transformers makes a parameter of another tensor, or a tensor has no float dtype.
    """
    found: dict[str, StoredTensor] = {}
    for name, target in targets.items():
        if target.parameter not in residual.places:
            continue
        tensor = source.tensors[name]
        if target.conversion:
            raise InputError(
                f"transform 'rotate': transformers changes {name!r} while loading ({target.conversion}): leave the "
                "transform out"
            )
        if tensor.spec.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{tensor.file.path}: tensor {name!r} has dtype {tensor.spec.dtype}: only {', '.join(WEIGHT_DTYPES)} "
                "can be rotated"
            )
        found[target.parameter] = tensor
    return found


def _turned(
    tensor: StoredTensor, place: Place, stored: Mapping[str, StoredTensor], rotations: Mapping[str, Rotation]
) -> DecodedTensor:
    """Return a tensor seen as what it becomes in its place."""
    rows = tensor.spec.shape[0]

    def decode(first: int, last: int) -> torch.Tensor:
        if place.emptied is not None:
            return torch.full((last - first, *tensor.spec.shape[1:]), place.emptied)
        with _WHOLE if place.rows else contextlib.nullcontext():
            weight = _rows(tensor, 0, rows) if place.rows else _rows(tensor, first, last)
            if place.norm:
                gains = stored[place.norm]
                weight = weight * (_rows(gains, 0, gains.spec.shape[0]) + place.offset)
            if place.columns:
                weight = rotations[place.columns].columns(weight)
            return rotations[place.rows].rows(weight)[first:last].contiguous() if place.rows else weight

    parts = tensor.parts if isinstance(tensor, DecodedTensor) else (tensor,)
    whole = tensor.whole if isinstance(tensor, DecodedTensor) else 0
    return DecodedTensor(tensor.file, tensor.spec, parts, decode, whole, all_rows=bool(place.rows))


def _rows(tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
    """Read rows of a tensor's first axis as float32."""
    if isinstance(tensor, DecodedTensor):
        return tensor.read_rows(first, last)
    return tensor.file.read_part(tensor.spec, [(first, last)], None).float()
