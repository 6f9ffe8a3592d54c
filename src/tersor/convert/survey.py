"""Which weights of a checkpoint are pruned so far that a mask and what is left of them take fewer bytes?

What is zero was pruned, whoever did it; -0.0 is zero. A few rows, spread over a weight, tell whether all are counted:
where they have next to no zeros, a weight that is pruned alike in its rows is no smaller sparse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tersor.checkpoint.config import Alike, Override, parse_overrides
from tersor.checkpoint.header import WEIGHT_DTYPES
from tersor.checkpoint.modules import LinearLayer
from tersor.checkpoint.names import TORCH_DTYPES, stored_tensors
from tersor.checkpoint.released import DecodedTensor
from tersor.checkpoint.source import StoredTensor
from tersor.errors import InputError
from tersor.formats import (
    FLOAT_DTYPES,
    TABLE_DTYPES,
    Outliers,
    Plain,
    Pruned,
    Scheme,
    Sparse,
    dtype_name,
    get_scheme,
    plain_values,
)
from tersor.layouts import bitmap

SAMPLED_ROWS = 64
"""Rows, spread evenly, that tell whether a weight is pruned at all."""
FEWEST_ZEROS = 0.01
"""The share of zeros in these rows from which on a weight is counted. A mask takes a bit, so that a 32nd of the weights
has to be zero before anything is smaller."""
_BLOCK_BYTES = 1 << 21


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user asks weights to be represented in.

    Attributes:
        format, group_size, scale_dtype, overrides: as `tersor.quantize` takes them.
        looked: whether pruned weights are looked for.
        outliers: as `tersor.quantize` takes them; beside `format`, not in overrides.
        own_dtype: what they are stored in, and tables for which the user asked for no dtype.
    """

    format: str
    group_size: int | None
    scale_dtype: str | None
    overrides: Mapping[str, Any] | Sequence[str]
    looked: bool = False
    outliers: str | None = None
    own_dtype: str = "float16"

    def check(self, sparse: str, obstacle: str) -> Asked:
        """Return the same once it is known whether pruned weights are looked for.

        Args:
            sparse: what the user said, `auto` or `off`.
            obstacle: why none can be stored, else an empty string.

        Raises:
            InputError: `sparse` is neither, or numbers of pruned weights are asked for and not looked for.
            FormatError: an unknown format, or options that contradict it.
        """
        if sparse not in ("auto", "off"):
            raise InputError(f"sparse is {sparse!r}: use auto or off")
        said = (self.scheme(), *(each.scheme for each in self.parsed_overrides()))
        plain = next((one.values for one in said if isinstance(one, Sparse)), None)
        why = "sparse is off" if sparse == "off" else obstacle
        if plain is not None and why:
            raise InputError(f"{plain.name} only repacks weights that are pruned, and {why}: ask for a format")
        return replace(self, looked=not why)

    def with_scales(self, scale_dtype: str | None) -> Asked:
        """Return the same with scales of a dtype where the user asked for none, and the format leaves it open."""
        if self.scale_dtype is not None or plain_values(self.format) is not None or get_scheme(self.format).is_mx:
            return self
        return replace(self, scale_dtype=scale_dtype)

    def beside(self, dtype: str) -> Asked:
        """Return the same with outliers and tables in the model's dtype, where that has 16 bits; else in float16."""
        return replace(self, own_dtype=dtype) if dtype in TABLE_DTYPES else self

    def scheme(self) -> Alike:
        """Return what weights are represented in that no override finds.

        Raises:
            InputError: scales or outliers for plain numbers.
            FormatError: an unknown format, or options that contradict it; outliers that are no share within reach.
        """
        plain = plain_values(self.format) if isinstance(self.format, str) else None
        kept = None if self.outliers is None else Outliers.parse(self.outliers, self.own_dtype)
        if plain is None:
            scheme = get_scheme(self.format, self.group_size, self.scale_dtype, self.own_dtype)
            return self._maybe_sparse(scheme) if kept is None else replace(scheme, outliers=kept)
        if kept is not None:
            raise InputError(f"{plain.name} keeps every weight as it is: outliers stand beside a format of codes")
        if self.group_size is not None or self.scale_dtype is not None:
            raise InputError(f"{plain.name} numbers have no scales: leave group size and scale dtype out")
        return Sparse(plain)

    def parsed_overrides(self) -> list[Override]:
        """Return the overrides, in order.

        Raises:
            InputError: they cannot be parsed.
        """
        parsed = parse_overrides(self.overrides, self.group_size, self.scale_dtype, self.own_dtype)
        return [replace(one, scheme=self._maybe_sparse(one.scheme)) for one in parsed]

    def _maybe_sparse(self, scheme: Alike) -> Alike:
        if not self.looked or not isinstance(scheme, Scheme) or scheme.has_table:
            return scheme
        return Sparse(scheme)


class Survey:
    """Counts what is left of weights; each weight is read once, however often it is asked about."""

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor | None] = {}

    def find(self, tensor: StoredTensor, layer: LinearLayer, sparse: Sparse) -> Pruned | None:
        """Return what is left of a layer's weight where storing that takes fewer bytes than a dense weight.

        Args:
            tensor: the weight; one that is stored compressed is not looked at.
            layer: whose weight it is.
            sparse: the representation that is asked for; its values are those of the dense weight.

        Raises:
            CheckpointError: the disk does not give the weight.
            InputError: it has numbers of another dtype than those asked for.
        """
        name = tensor.spec.name
        if name not in self._counts:
            self._counts[name] = _counts(tensor, layer)
        counts = self._counts[name]
        if counts is None:
            return None
        found, (oc, ic) = Pruned.of(sparse, counts), layer.shape
        if found.nbytes(ic) >= dense_bytes(sparse, oc, ic):
            return None
        _check_dtype(tensor, sparse)
        return found


def dense_bytes(sparse: Sparse, oc: int, ic: int) -> int:
    """Return the bytes of a dense weight [oc, ic] with the values of a sparse one."""
    if sparse.scheme is None:
        return oc * ic * sparse.value_bits // 8
    forms = stored_tensors(sparse.scheme, oc, ic).values()
    return sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)


def _check_dtype(tensor: StoredTensor, sparse: Sparse) -> None:
    """Hold that a weight whose numbers are kept has the dtype that is asked for.

    Raises:
        InputError: it does not.
    """
    spec, values = tensor.spec, sparse.values
    own = dtype_name(TORCH_DTYPES[spec.dtype])
    if isinstance(values, Plain) and own != values.dtype:
        raise InputError(
            f"{tensor.file.path}: tensor {spec.name!r} is {spec.dtype}, and what is left of it keeps its bits: ask "
            f"for {own if own in FLOAT_DTYPES else 'a format of codes'}, not {values.dtype}"
        )


def _counts(tensor: StoredTensor, layer: LinearLayer) -> torch.Tensor | None:
    """Return the weights left in every row, int32 [OC], or `None` where the weight is not pruned."""
    if isinstance(tensor, DecodedTensor) or tensor.spec.dtype not in WEIGHT_DTYPES or not all(layer.shape):
        return None
    rows, columns = tensor.spec.shape
    step = max(1, rows // SAMPLED_ROWS)
    sampled = [_left(tensor, row, row + 1) for row in range(0, rows, step)]
    zeros = 1 - float(torch.cat(sampled).sum()) / (len(sampled) * columns)
    if zeros < FEWEST_ZEROS:
        return None
    height = max(1, _BLOCK_BYTES // max(1, tensor.spec.nbytes // rows))
    blocks = (_left(tensor, first, min(first + height, rows)) for first in range(0, rows, height))
    if layer.transposed:  # rows on disk are input channels
        return torch.stack([block.sum(0) for block in blocks]).sum(0).to(torch.int32)
    return torch.cat([bitmap.count_kept(block) for block in blocks]).to(torch.int32)


def _left(tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
    """Return which weights of some rows on disk are not zero, bool [rows, columns]."""
    spec = tensor.spec
    row_bytes = spec.nbytes // spec.shape[0]
    flat = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
    tensor.file.read_into(spec, first * row_bytes, flat.numpy().data)
    return flat.view(TORCH_DTYPES[spec.dtype]).view(last - first, spec.shape[1]) != 0
