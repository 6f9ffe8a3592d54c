"""What decides which tensors a stored weight has? Read where it is data, and held against what is beside it.

Of a mixed weight that is the level of every output feature, of a pruned one what its mask leaves (`checkpoint.pruned`).
"""

from __future__ import annotations

from collections.abc import Mapping

from tersor.checkpoint.config import Represented
from tersor.checkpoint.names import DENSE, LEVEL, MIXED, SPARSE, Form, Storage, stored_forms
from tersor.checkpoint.pruned import read_pruned
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError, FormatError
from tersor.formats import Assignment, Mix, Sparse


def read_form(tensors: Mapping[str, StoredTensor], stem: str, storage: Storage, represented: Represented) -> Form:
    """Return what decides which tensors a stored weight has; of a mixed weight the levels are read.

    Args:
        tensors: of the checkpoint, by name.
        stem: of the weight.
        storage: how its tensors say that it is stored.
        represented: what quantization_config says of its module.

    Raises:
        CheckpointError: the two disagree, or levels are there that the mix has not.
    """
    if isinstance(represented, Sparse):
        if storage is SPARSE:
            return read_pruned(tensors, stem, represented)
        if storage is DENSE and represented.scheme is not None:  # which took fewer bytes
            return represented.scheme
    elif isinstance(represented, Mix) == (storage is MIXED) and storage is not SPARSE:
        return read_assignment(tensors, stem, represented) if isinstance(represented, Mix) else represented
    stored = f"tensor {stem}.{storage.marker} is of a {storage.name} weight"
    raise CheckpointError(f"{stored}, and quantization_config says {represented.key()}")


def read_assignment(tensors: Mapping[str, StoredTensor], stem: str, mix: Mix) -> Assignment:
    """Return the level of every output feature of a mixed weight.

    Raises:
        CheckpointError: no bytes, levels that the mix has not, or other rows beside them.
    """
    stored = tensors[f"{stem}.{LEVEL}"]
    spec = stored.spec
    if spec.dtype != "U8" or len(spec.shape) != 1 or not spec.shape[0]:
        raise CheckpointError(
            f"{stored.file.path}: {spec.name} is {spec.dtype} {list(spec.shape)}, expected U8 [output features]"
        )
    level = bytearray(spec.nbytes)
    stored.file.read_into(spec, 0, memoryview(level))
    try:
        found = Assignment(mix, bytes(level))
    except FormatError as error:
        raise CheckpointError(f"{stored.file.path}: {spec.name}: {error}") from None
    rows = {number: count for number, count in enumerate(found.rows) if count}
    beside = MIXED.rows(stem, {name: tensor.spec.shape for name, tensor in tensors.items()})
    if rows != beside:
        raise CheckpointError(
            f"{stored.file.path}: {spec.name} has {rows} output features by level, and the weights of levels "
            f"beside it have {beside} rows"
        )
    return found


def check_stored(tensors: Mapping[str, StoredTensor], stem: str, form: Form, shape: tuple[int, ...]) -> None:
    """Hold the tensors of a weight (OC, IC), or of those of experts (E, OC, IC), against what they should be.

    Raises:
        CheckpointError: one is missing, or has another dtype or shape.
    """
    for name, tensor in stored_forms(form, shape).items():
        found = tensors.get(f"{stem}.{name}")
        if found is None:
            raise CheckpointError(f"tensor {stem}.{name} is missing beside the others of {stem}")
        spec = found.spec
        if spec.shape != tensor.shape or spec.dtype != tensor.safetensors_dtype:
            raise CheckpointError(
                f"{found.file.path}: {spec.name} has dtype {spec.dtype} and shape {list(spec.shape)}, expected "
                f"{tensor.safetensors_dtype} {list(tensor.shape)} of {form.key()}"
            )
