"""Which stored tensors make one weight, and what are its rows? Found by name, checked, and read in blocks of rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.names import TORCH_DTYPES
from tersor.checkpoint.source import StoredTensor
from tersor.errors import CheckpointError
from tersor.layouts import stream

Decode: TypeAlias = Callable[[int, int], torch.Tensor]
"""Returns rows `first` to `last` (exclusive) of a weight's first axis as float32."""

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""What scales are stored as; U8 holds exponents, as F8_E8M0 does."""


@dataclass(frozen=True, slots=True)
class DecodedTensor(StoredTensor):
    """A weight that is stored compressed, seen as the plain tensor it stands for, or any that is computed of others.

    Attributes:
        file: where the tensor of its codes is.
        spec: the plain tensor; its dtype is the model's.
        parts: the tensors that it is stored as, codes first.
        decode: reads its rows.
        whole: rows of the tensor that this one is a part of; 0 where it is whole itself.
        all_rows: whether each row takes all that is stored, so that they are better read at once.
    """

    parts: tuple[StoredTensor, ...]
    decode: Decode
    whole: int = 0
    all_rows: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and the rest take on disk, of a part of a tensor its share."""
        total = sum(part.nbytes for part in self.parts)
        return total * self.spec.shape[0] // self.whole if self.whole else total

    def part(self, name: str, first: int, rows: int) -> DecodedTensor:
        """Return rows `first` to `first + rows` of the tensor as one of its own, called `name`."""
        spec = replace(self.spec, name=name, shape=(rows, *self.spec.shape[1:]))
        decode = self.decode
        whole = self.whole or self.spec.shape[0]
        return DecodedTensor(
            self.file, spec, self.parts, lambda start, stop: decode(first + start, first + stop), whole, self.all_rows
        )

    def read_rows(self, first: int, last: int) -> torch.Tensor:
        """Read and decode rows `first` to `last` (exclusive) of the first axis.

        Returns:
            float32 [last - first, ...], rounded nowhere but in float32.

        Raises:
            CheckpointError: the disk does not give them, or what it gives is no such weight.
        """
        return self.decode(first, last).contiguous()


class Assembly:
    """The tensors of a compressed checkpoint while plain ones are made of them.

    Attributes:
        settings: what config.json says of the compression.
        dtype: safetensors dtype of the model, that of decoded tensors.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], dtype: str) -> None:
        self.settings = settings
        self.dtype = dtype
        self._tensors = tensors
        self._used: set[str] = set()
        self._decoded: dict[str, DecodedTensor] = {}

    def ending(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """Yield (start of the name, tensor) of every tensor whose name ends so."""
        for name, tensor in self._tensors.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), tensor

    def of_dtype(self, dtypes: Sequence[str]) -> Iterator[tuple[str, StoredTensor]]:
        """Yield (name, tensor) of every tensor of these dtypes that is part of nothing yet."""
        for name, tensor in self._tensors.items():
            if tensor.spec.dtype in dtypes and name not in self._used:
                yield name, tensor

    def find(self, name: str, dtypes: Sequence[str] = ()) -> StoredTensor | None:
        """Return the tensor called so, or `None`.

        Raises:
            CheckpointError: it has none of these dtypes.
        """
        found = self._tensors.get(name)
        if found is not None and dtypes:
            check_dtype(found, dtypes)
        return found

    def part(self, names: str | Sequence[str], beside: StoredTensor, dtypes: Sequence[str]) -> StoredTensor:
        """Return the first of the tensors called so, which belongs to the tensor `beside`.

        Raises:
            CheckpointError: there is none, or its dtype is none of these.
        """
        choices = (names,) if isinstance(names, str) else names
        for name in choices:
            found = self.find(name, dtypes)
            if found is not None:
                return found
        raise CheckpointError(
            f"{beside.file.path}: tensor {choices[0]!r} is missing beside {beside.spec.name!r} ({beside.spec.dtype})"
        )

    def put(self, name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor | None], decode: Decode) -> None:
        """Make a plain tensor of some stored ones, those of its codes first; `None` among them is passed over."""
        there = tuple(part for part in parts if part is not None)
        first = there[0]
        self._decoded[first.spec.name] = DecodedTensor(first.file, TensorSpec(name, self.dtype, shape), there, decode)
        self._used.update(part.spec.name for part in there)

    def drop(self, pattern: str) -> None:
        """Leave the tensors out whose whole name the pattern matches: what only the other engine has a use for."""
        matches = re.compile(pattern).fullmatch
        self._used.update(name for name in self._tensors if matches(name))

    def finish(self, companions: str) -> dict[str, StoredTensor]:
        """Return the plain tensors by name, in the order of the bytes on disk.

        Args:
            companions: pattern of the names of tensors that mean nothing without a weight.

        Raises:
            CheckpointError: such a tensor is left over, or two tensors have one name.
        """
        matches = re.compile(companions).fullmatch
        result: dict[str, StoredTensor] = {}
        for name, tensor in self._tensors.items():
            plain: StoredTensor
            if name in self._decoded:
                plain = self._decoded[name]
            elif name in self._used:
                continue
            else:
                if matches(name):
                    raise CheckpointError(f"{tensor.file.path}: tensor {name!r} belongs to no compressed weight there")
                plain = tensor
            if plain.spec.name in result:
                raise CheckpointError(f"{tensor.file.path}: {plain.spec.name!r} is there twice, plain and compressed")
            result[plain.spec.name] = plain
        return result


def check_dtype(tensor: StoredTensor, dtypes: Sequence[str]) -> None:
    """Check the dtype of a stored tensor.

    Raises:
        CheckpointError: it is none of these.
    """
    if tensor.spec.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.file.path}: tensor {tensor.spec.name!r} has dtype {tensor.spec.dtype}, not {' or '.join(dtypes)}"
        )


def check_shape(tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Check the shape of a stored tensor.

    Raises:
        CheckpointError: it is none of these.
    """
    if tensor.spec.shape not in shapes:
        wanted = " or ".join(dict.fromkeys(str(list(shape)) for shape in shapes))
        raise CheckpointError(
            f"{tensor.file.path}: tensor {tensor.spec.name!r} has shape {list(tensor.spec.shape)}, and its weight "
            f"wants {wanted}"
        )


def check_rank(tensor: StoredTensor, *ranks: int) -> None:
    """Check how many axes a stored tensor has.

    Raises:
        CheckpointError: another number, or one of them is empty.
    """
    shape = tensor.spec.shape
    if len(shape) not in ranks or not all(shape):
        raise CheckpointError(
            f"{tensor.file.path}: tensor {tensor.spec.name!r} has shape {list(shape)}, which is no compressed weight's"
        )


def read(tensor: StoredTensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """Read a stored tensor, or rows of its first axis, as it is."""
    return tensor.file.read(tensor.spec.name, rows)


def read_float(tensor: StoredTensor, rows: tuple[int, int] | None = None) -> torch.Tensor:
    """Read scales, or rows of them, as float32; U8 is an exponent with a bias of 127."""
    found = read(tensor, rows)
    if found.dtype == torch.uint8:
        found = found.view(TORCH_DTYPES["F8_E8M0"])
    return found.float()


def codes_of(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack rows of a little-endian bit stream: uint8 codes [..., count] of words or bytes [..., n]."""
    raw = packed.contiguous().view(torch.uint8)
    padding = -raw.shape[-1] % bits
    if padding:
        raw = torch.nn.functional.pad(raw, (0, padding))
    return stream.unpack(raw, bits, count)
