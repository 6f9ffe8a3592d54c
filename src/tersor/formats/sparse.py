"""How is a pruned weight represented? Which of its weights are left, and the numbers of those in a value format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tersor.errors import FormatError, ShapeError, did_you_mean
from tersor.formats.dtypes import FLOAT_DTYPES
from tersor.formats.scheme import Scheme

WORD_BITS = 32
"""The non-zeros of a row end with a whole word of so many bits."""
MASK_BITS = 8
"""Columns that share a byte of the mask."""

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers as they are, without codes and scales.

    Attributes:
        dtype: a key of `FLOAT_DTYPES`.
    """

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            near = did_you_mean(self.dtype, FLOAT_DTYPES)
            raise FormatError(f"unknown dtype {self.dtype!r}{near} (known: {', '.join(FLOAT_DTYPES)})")

    @property
    def name(self) -> str:
        """The name a user gives."""
        return self.dtype

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 * FLOAT_DTYPES[self.dtype].itemsize

    def key(self) -> str:
        """Return a short text that names the numbers exactly, such as `bfloat16`."""
        return self.dtype


Values: TypeAlias = Scheme | Plain
"""The numbers of weights that are left: codes with scales, or as they are."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """A pruned weight as a mask and the numbers of the weights that are left, row after row.

    A weight that is pruned is +0.0. Those left mean what they mean in a dense weight: a scale is of the input channels
    at its place, however many of them are left.

    Attributes:
        values: of the weights that are left.
    """

    values: Values

    def __post_init__(self) -> None:
        if isinstance(self.values, Scheme) and self.values.outliers is not None:
            raise FormatError("pruned weights keep no outliers")
        if isinstance(self.values, Scheme) and self.values.has_table:
            raise FormatError(f"pruned weights have no tables: use another format than {self.values.name}")

    @property
    def name(self) -> str:
        """The name a user reads: `sparse:` and that of the values."""
        return f"sparse:{self.values.name}"

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the values; `None` where they are plain numbers."""
        return self.values if isinstance(self.values, Scheme) else None

    @property
    def value_bits(self) -> int:
        """Bits of a weight that is left."""
        return self.values.format.bits if isinstance(self.values, Scheme) else self.values.bits

    def row_words(self, count: torch.Tensor) -> torch.Tensor:
        """Return how many 32-bit words rows take that have `count` weights left, int64 of the same shape."""
        return (count.to(torch.int64) * self.value_bits + WORD_BITS - 1) // WORD_BITS

    def key(self) -> str:
        """Return a short text that names it exactly, such as `sparse:fp6_e2m3:row:float16` or `sparse:bfloat16`."""
        return f"sparse:{self.values.key()}"

    @staticmethod
    def from_key(key: str) -> Sparse:
        """Return what `key()` named."""
        values = key.removeprefix("sparse:")
        return Sparse(Plain(values) if values in FLOAT_DTYPES else Scheme.from_key(values))


@dataclass(frozen=True, slots=True)
class Pruned:
    """A sparse representation, and how many weights are left in every row of one weight.

    Attributes:
        sparse: the representation.
        counts: int32, little-endian: the weights left in every row.
    """

    sparse: Sparse
    counts: bytes

    @staticmethod
    def of(sparse: Sparse, counts: torch.Tensor | Sequence[int]) -> Pruned:
        """Return the form of a weight with so many weights left in every row; a tensor may be on any device."""
        numbers = torch.as_tensor(counts, dtype=torch.int32, device="cpu")
        return Pruned(sparse, numbers.contiguous().numpy().astype("<i4", copy=False).tobytes())

    def numbers(self) -> torch.Tensor:
        """Return the weights left in every row, int64 [OC] on the CPU."""
        if not self.counts:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        return torch.frombuffer(bytearray(self.counts), dtype=torch.int32).to(torch.int64)

    @property
    def rows(self) -> int:
        """Output features."""
        return len(self.counts) // 4

    @property
    def nonzeros(self) -> int:
        """Weights left in all rows."""
        return int(self.numbers().sum())

    @property
    def words(self) -> int:
        """32-bit words that the weights left take."""
        return int(self.sparse.row_words(self.numbers()).sum())

    def starts(self) -> torch.Tensor:
        """Return the first word of every row, and the one after the last, int64 [OC + 1] on the CPU."""
        words = self.sparse.row_words(self.numbers())
        return torch.cat((words.new_zeros(1), words.cumsum(0)))

    def density(self, ic: int) -> float:
        """Return which part of the weights of a matrix with `ic` input channels is left."""
        return self.nonzeros / max(1, self.rows * ic)

    def key(self) -> str:
        """Return the key of the representation."""
        return self.sparse.key()

    def nbytes(self, ic: int) -> int:
        """Return the bytes that a weight of `ic` input channels takes on disk: mask, values, scales, zero points."""
        scheme = self.sparse.scheme
        scales = 0 if scheme is None else scheme.scale_bits(ic) // 8
        return 4 * self.words + self.rows * (mask_bytes(ic) + scales)

    def bits_per_weight(self, ic: int) -> float:
        """Return the mean bits stored for a weight of `ic` input channels, of those that are pruned too."""
        return 8 * self.nbytes(ic) / max(1, self.rows * ic)

    def cut(self, spans: Iterable[tuple[int, int]]) -> Pruned:
        """Return the form of the rows in spans, one span behind the other."""
        return Pruned(self.sparse, b"".join(self.counts[4 * first : 4 * last] for first, last in spans))

    def check(self, oc: int) -> None:
        """Hold that there is a count for every output feature.

        Raises:
            ShapeError: there are more or fewer.
        """
        if self.rows != oc:
            raise ShapeError(f"counts of {self.rows} rows for {oc} output features")


def mask_bytes(ic: int) -> int:
    """Return the bytes that the mask of a row of `ic` weights takes."""
    return -(-ic // MASK_BITS)


def plain_values(name: str) -> Plain | None:
    """Return the plain numbers that a user means by a name (`bf16`, `bfloat16`, ...); `None` where it is another."""
    dtype = _SHORT.get(name, name)
    return Plain(dtype) if dtype in FLOAT_DTYPES else None
