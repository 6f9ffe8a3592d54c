"""A pruned weight in kernel tiles, and the way back to what is stored, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor.errors import FormatError, ShapeError
from tersor.formats import FLOAT_DTYPES, Plain, Pruned, Scheme, Sparse, mask_bytes, scale_values
from tersor.layouts import bitmap, sparse_tiles
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.shard import Span
from tersor.layouts.sparse import SparseWeight
from tersor.layouts.sparse_packing import SparsePacking, unsupported_reason
from tersor.layouts.sparse_tiles import SparseTiles

_CHUNK_WEIGHTS = 1 << 24
"""Weights rearranged at a time: bounds the scratch memory to some 300 MB."""
_CODES = 256


@dataclass(frozen=True)
class TiledSparseWeight:
    """A pruned weight [OC, IC] as a kernel reads it, for activations of one dtype.

    Attributes:
        form: the representation, and how many weights are left in every row, known to the host.
        packing: what values in queues mean, and for which activations.
        key: names representation and packing exactly; `packing_of` reads it.
        tiles: masks, queues, starts and marks.
        scale: float32 [OC], of every row; ones where values are plain numbers.
        stored_scale: [OC, 1] in the scheme's scale dtype; `None` where values are plain numbers.
    """

    form: Pruned
    packing: SparsePacking
    key: str
    tiles: SparseTiles
    scale: torch.Tensor
    stored_scale: torch.Tensor | None

    @staticmethod
    def of(weight: SparseWeight, target: str, places: int, least: int = 0) -> TiledSparseWeight:
        """Put a weight into kernel tiles, on the device that it is on.

        Args:
            weight: as it is stored.
            target: dtype of the activations, `float16` or `bfloat16`.
            places, least: how it is cut (`sparse_cuts.Cuts.of`).

        Raises:
            FormatError: no kernel expands such values.
            ShapeError: as `sparse_tiles.pack`.
        """
        (oc, ic), values = weight.shape, values_of(weight.sparse)
        packing = SparsePacking.choices(values, target)[-1]
        if len(SparsePacking.choices(values, target)) > 1:
            packing = SparsePacking.with_bytes_for(values, target, _codes_left(weight))
        kept = weight.kept()
        numbers = torch.zeros(oc, ic, dtype=torch.int16 if packing.bits == 16 else torch.uint8, device=weight.device)
        for first, last in _spans(oc, ic) if weight.values.numel() else ():
            found = bitmap.values_at(
                weight.values, weight.starts[first:last], kept[first:last], weight.sparse.value_bits
            )
            plain = packing.bits == 16
            numbers[first:last] = found if plain else packing.pack(found.masked_fill_(~kept[first:last], 0))
        tiles = sparse_tiles.pack(kept, numbers, places, least, packing.bytewise)
        key = key_of(weight.sparse, packing)
        return TiledSparseWeight(weight.form, packing, key, tiles, row_scale(weight), weight.scale)

    @staticmethod
    def described(form: Pruned, shape: tuple[int, int], target: str) -> TiledSparseWeight:
        """Return what says how a weight will lie of which nothing is there, with the packing that most have."""
        packing, nothing = SparsePacking.of(values_of(form.sparse), target), torch.empty(0, device="meta")
        tiles = SparseTiles(shape, packing.bits, packing.bytewise, nothing, nothing, nothing, nothing)
        return TiledSparseWeight(form, packing, key_of(form.sparse, packing), tiles, nothing, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(OC, IC)."""
        return self.tiles.shape

    @property
    def sparse(self) -> Sparse:
        """The representation."""
        return self.form.sparse

    @property
    def scheme(self) -> Scheme | None:
        """The scheme of the weights left; `None` where they are plain numbers."""
        return self.sparse.scheme

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.tiles.mask.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that the weight is held in."""
        tiles = self.tiles
        held = (tiles.mask, tiles.layers, tiles.starts, tiles.marks, self.scale, self.stored_scale)
        return [tensor for tensor in held if tensor is not None]

    def stored(self) -> SparseWeight:
        """Undo `of`: return what is stored, bit for bit."""
        masks, found = [], []
        for first, last in _spans(*self.shape):
            kept, numbers = sparse_tiles.unpack(self.tiles.units(first // UNIT_OC, -(-last // UNIT_OC)))
            masks.append(bitmap.pack_mask(kept))
            found.append(self.packing.unpack(numbers[kept]))
        numbers = torch.cat(found) if found else torch.zeros(0, dtype=torch.uint8, device=self.device)
        if self.packing.bits == 16:
            numbers = numbers.view(torch.int16)
        mask = torch.cat(masks) if masks else torch.zeros(0, mask_bytes(self.shape[1]), dtype=torch.uint8)
        words = bitmap.pack_values(numbers, self.form.numbers().to(self.device), self.sparse.value_bits)
        return SparseWeight.of(self.form, self.shape, mask, words, self.stored_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: Span | None = None) -> torch.Tensor:
        """Return the decoded weight [OC, IC], or some of its rows, as `SparseWeight.dequantize` does."""
        return decode(self.sparse, self.packing, self.tiles, self.scale, dtype, rows or (0, self.shape[0]))


def decode(
    sparse: Sparse, packing: SparsePacking, tiles: SparseTiles, scale: torch.Tensor, dtype: torch.dtype, rows: Span
) -> torch.Tensor:
    """Return the decoded rows of a span, [rows, ic] in `dtype`, on any device; the device is waited for."""
    first, last = rows
    unit = first // UNIT_OC
    kept, values = sparse_tiles.unpack(tiles.units(unit, -(-last // UNIT_OC)))
    inside = slice(first - unit * UNIT_OC, last - unit * UNIT_OC)
    kept, found = kept[inside], packing.unpack(values[inside].contiguous())
    if isinstance(sparse.values, Plain):
        decoded = found.view(FLOAT_DTYPES[sparse.values.dtype]).clone()
    else:
        decoded = sparse.values.format.decode(found) * scale[first:last, None]
    return decoded.masked_fill_(~kept, 0).to(dtype)


def key_of(sparse: Sparse, packing: SparsePacking) -> str:
    """Return a short text that names representation and packing exactly."""
    number = SparsePacking.choices(values_of(sparse), packing.target).index(packing)
    return f"{sparse.key()}@{packing.target}@{number}"


def packing_of(key: str) -> tuple[Sparse, SparsePacking]:
    """Return what `key_of` named.

    Raises:
        FormatError: it is no such key.
    """
    name, _, rest = key.partition("@")
    target, _, number = rest.partition("@")
    sparse = Sparse.from_key(name)
    choices = SparsePacking.choices(values_of(sparse), target)
    if not number.isdecimal() or int(number) >= len(choices):
        raise FormatError(f"{key!r} names no packing of a pruned weight")
    return sparse, choices[int(number)]


def values_of(sparse: Sparse) -> Scheme | str:
    """Return the values of a representation as `SparsePacking` takes them."""
    return sparse.values.dtype if isinstance(sparse.values, Plain) else sparse.values


def tiles_reason(sparse: Sparse, target: str) -> str:
    """Return why no kernel expands a representation for activations of a dtype, or an empty string when one does."""
    return unsupported_reason(values_of(sparse), target)


def row_scale(weight: SparseWeight) -> torch.Tensor:
    """Return the scale of every row, float32 [OC]."""
    oc, scheme = weight.shape[0], weight.scheme
    if scheme is None or weight.scale is None:
        return torch.ones(oc, dtype=torch.float32, device=weight.device)
    if weight.scale.shape != (oc, 1):
        raise ShapeError(f"scales are {list(weight.scale.shape)}, and kernel tiles have one a row")
    return scale_values(weight.scale, scheme).to(torch.float32).reshape(oc).contiguous()


def _codes_left(weight: SparseWeight) -> torch.Tensor:
    """Return which codes there are among the weights left, bool [256] on the CPU."""
    there = torch.zeros(_CODES, dtype=torch.bool, device=weight.device)
    if weight.values.numel():
        for first, last in _spans(*weight.shape):
            kept = bitmap.unpack_mask(weight.mask[first:last], weight.shape[1])
            found = bitmap.values_at(weight.values, weight.starts[first:last], kept, weight.sparse.value_bits)
            there |= torch.bincount(found[kept].int(), minlength=_CODES).bool()
    return there.cpu()


def _spans(oc: int, ic: int) -> Iterator[Span]:
    """Yield spans of rows, whole units but for the last."""
    step = max(1, _CHUNK_WEIGHTS // max(1, UNIT_OC * ic)) * UNIT_OC
    return ((first, min(first + step, oc)) for first in range(0, oc, step))
