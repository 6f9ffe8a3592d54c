"""A pruned weight: a mask of the weights that are left, and their numbers, row after row.

A pruned weight is +0.0 wherever it is looked at: `dequantize` gives it, and a product multiplies with it, so that a NaN
or an infinity among activations makes NaN of it as in a product with any other zero. What is zero in a dense tensor is
pruned, -0.0 too, which code that multiplies a weight by its mask leaves behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.formats import FLOAT_DTYPES, Encoded, Plain, Pruned, Scheme, Sparse, dequantize, dtype_name, mask_bytes
from tersor.formats.sparse import MASK_BITS
from tersor.layouts import bitmap
from tersor.layouts.gated import gated_channels, interleave, separate
from tersor.layouts.shard import Part, Span


@dataclass(frozen=True, slots=True)
class SparseWeight:
    """A pruned weight [OC, IC] as it is stored.

    Attributes:
        form: the representation, and how many weights are left in every row, known to the host.
        shape: (OC, IC).
        mask: uint8 [OC, ceil(IC / 8)], bit i of byte j is column 8j + i.
        values: int32 [words], codes or plain numbers of the weights left (`layouts.bitmap`).
        scale: [OC, G] in the scheme's scale dtype; `None` where values are plain numbers.
        zero_point: uint8 [OC, G] for `uint` formats, else `None`.
        starts: int64 [OC + 1], the first word of every row, and the one after the last.
    """

    form: Pruned
    shape: tuple[int, int]
    mask: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    starts: torch.Tensor

    @staticmethod
    def of(
        form: Pruned,
        shape: tuple[int, int],
        mask: torch.Tensor,
        values: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> SparseWeight:
        """Make a weight of its stored tensors, without a copy of them.

        Raises:
            ShapeError: another number of rows or words than the form has.
        """
        form.check(shape[0])
        if values.shape != (form.words,):
            raise ShapeError(f"values are {list(values.shape)}, and {form.nonzeros} weights left take [{form.words}]")
        return SparseWeight(form, shape, mask, values, scale, zero_point, form.starts().to(mask.device))

    @staticmethod
    def from_stored(
        sparse: Sparse,
        shape: tuple[int, int],
        mask: torch.Tensor,
        values: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> SparseWeight:
        """Make a weight of its stored tensors alone, whose mask is counted; on the meta device it has no counts.

        Raises:
            ShapeError: another shape of the mask, bits set behind its rows, or values of another number of weights.
        """
        oc, ic = shape
        if mask.shape != (oc, mask_bytes(ic)):
            raise ShapeError(f"the mask is {list(mask.shape)}, expected {[oc, mask_bytes(ic)]} of a weight {[oc, ic]}")
        if mask.device.type == "meta":
            starts = torch.empty(oc + 1, dtype=torch.int64, device="meta")
            return SparseWeight(Pruned(sparse, b""), shape, mask, values, scale, zero_point, starts)
        if ic % MASK_BITS and bool((mask[:, -1] >> (ic % MASK_BITS)).any()):
            raise ShapeError(f"the mask has bits set behind the {ic} weights of a row")
        return SparseWeight.of(Pruned.of(sparse, bitmap.count(mask)), shape, mask, values, scale, zero_point)

    @staticmethod
    def from_plain(weight: torch.Tensor, kept: torch.Tensor | None = None) -> SparseWeight:
        """Take the zeros out of a weight; what is left keeps its bits.

        Args:
            weight: [OC, IC], float16, bfloat16 or float32, on any device.
            kept: bool [OC, IC], which weights are left; `None` is those that are not zero (-0.0 is).
        """
        kept = weight != 0 if kept is None else kept
        sparse = Sparse(Plain(dtype_name(weight.dtype)))
        return _packed(sparse, kept, weight[kept].view(bitmap.holder(sparse.value_bits)), None, None)

    @staticmethod
    def from_encoded(encoded: Encoded, kept: torch.Tensor) -> SparseWeight:
        """Take the codes of pruned weights out; scales and zero points are shared, not copied.

        Args:
            encoded: of the whole weight [OC, IC], on any device.
            kept: bool [OC, IC], which weights are left, whatever their codes.
        """
        return _packed(Sparse(encoded.scheme), kept, encoded.codes[kept], encoded.scale, encoded.zero_point)

    @staticmethod
    def stack(weights: Sequence[SparseWeight]) -> SparseWeight:
        """Put weights of one representation and IC one after the other; `split` undoes it.

        Raises:
            ShapeError: representations or IC differ.
        """
        first = weights[0]
        for weight in weights:
            if weight.sparse != first.sparse or weight.shape[1] != first.shape[1]:
                raise ShapeError(
                    f"weights joined in one must have one scheme and IC: {first.form.key()} with {first.shape[1]} "
                    f"channels and {weight.form.key()} with {weight.shape[1]}"
                )
        form = Pruned(first.sparse, b"".join(weight.form.counts for weight in weights))
        scales = [weight.scale for weight in weights if weight.scale is not None]
        zeros = [weight.zero_point for weight in weights if weight.zero_point is not None]
        return SparseWeight.of(
            form,
            (form.rows, first.shape[1]),
            torch.cat([weight.mask for weight in weights]),
            torch.cat([weight.values for weight in weights]),
            torch.cat(scales) if scales else None,
            torch.cat(zeros) if zeros else None,
        )

    def split(self, sizes: Sequence[int]) -> list[SparseWeight]:
        """Undo `stack`: return weights of so many rows each; they are copies, so that each stands alone."""
        ends = torch.tensor(list(sizes)).cumsum(0).tolist()
        return [self.cut(Part(((end - size, end),))) for size, end in zip(sizes, ends, strict=True)]

    @staticmethod
    def gate_up(gate: SparseWeight, up: SparseWeight) -> SparseWeight:
        """Interleave the rows of two weights of one representation and shape, for `ops.gated_linear`.

        Returns:
            [gated.gated_rows(F), IC]; `split_gate_up` undoes it.

        Raises:
            ShapeError: representations or shapes differ.
        """
        if gate.shape != up.shape:
            raise ShapeError(f"gate is {list(gate.shape)}, up {list(up.shape)}: a gated weight takes two of one shape")
        channels = gate.shape[0]
        both = SparseWeight.stack((gate, up, _empty_row(gate)))
        rows = torch.arange(1, channels + 1)
        order = interleave(rows, rows + channels) - 1  # rows of zeros fill a block up
        return both.take(torch.where(order < 0, 2 * channels, order))

    def split_gate_up(self) -> tuple[SparseWeight, SparseWeight]:
        """Undo `gate_up`.

        Raises:
            ShapeError: the weight has not the rows of a gated one.
        """
        gated_channels(self.shape[0])
        gate, up = (self.take(rows) for rows in separate(torch.arange(self.shape[0])))
        return gate, up

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
        return self.mask.device

    @property
    def density(self) -> float:
        """Which part of the weights is left."""
        return self.form.density(self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory: mask, values, scales, zero points, and where rows start."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that the weight is held in."""
        held = (self.mask, self.values, self.scale, self.zero_point, self.starts)
        return [tensor for tensor in held if tensor is not None]

    def take(self, rows: torch.Tensor) -> SparseWeight:
        """Return some rows, int64 [rows] on the CPU, in that order, as a weight of its own."""
        index = rows.to(self.device)
        form = Pruned.of(self.sparse, self.form.numbers()[rows])
        return SparseWeight.of(
            form,
            (len(rows), self.shape[1]),
            self.mask[index],
            bitmap.take_rows(self.values, self.starts, index),
            None if self.scale is None else self.scale[index],
            None if self.zero_point is None else self.zero_point[index],
        )

    def cut(self, part: Part) -> SparseWeight:
        """Return a part of the weight.

        Args:
            part: spans of output features, and input channels that start at a quantum.

        Raises:
            ShapeError: columns are not whole quanta.
        """
        spans: tuple[Span, ...] = part.rows or ((0, self.shape[0]),)
        found = self.take(torch.cat([torch.arange(first, last) for first, last in spans]))
        if part.columns is None:
            return found
        columns, groups = slice(*part.columns), slice(*part.groups(self.form) or (None, None))
        kept = found.kept()
        inside = torch.zeros_like(kept)
        inside[:, columns] = True
        left = found.numbers()[inside[kept]]
        scale, zero_point = (None if one is None else one[:, groups] for one in (found.scale, found.zero_point))
        return _packed(
            self.sparse,
            kept[:, columns],
            left,
            None if scale is None else scale.contiguous(),
            None if zero_point is None else zero_point.contiguous(),
        )

    def to(self, device: torch.device) -> SparseWeight:
        """Return the weight on a device."""
        mask, values, starts = (one.to(device) for one in (self.mask, self.values, self.starts))
        scale, zero_point = (None if one is None else one.to(device) for one in (self.scale, self.zero_point))
        return SparseWeight(self.form, self.shape, mask, values, scale, zero_point, starts)

    def kept(self) -> torch.Tensor:
        """Return which weights are left, bool [OC, IC]."""
        return bitmap.unpack_mask(self.mask, self.shape[1])

    def numbers(self) -> torch.Tensor:
        """Return the codes or plain numbers of the weights left, row after row, in `bitmap.holder` of their bits."""
        counts = self.form.numbers().to(self.device)
        return bitmap.unpack_values(self.values, counts, self.sparse.value_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: Span | None = None) -> torch.Tensor:
        """Return the decoded weight [OC, IC], or some of its rows, with +0.0 for what is pruned.

        Codes are decoded in float32 and rounded once to `dtype`. The device is not waited for.
        """
        held = (self.mask, self.values, self.scale, self.zero_point, self.starts)
        return decode(self.sparse, self.shape[1], *held, dtype, rows or (0, self.shape[0]))


def decode(
    sparse: Sparse,
    ic: int,
    mask: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    starts: torch.Tensor,
    dtype: torch.dtype,
    rows: Span,
) -> torch.Tensor:
    """Return the decoded rows of a span, [rows, ic] in `dtype`; tensors are those of a `SparseWeight`, of all rows."""
    first, last = rows
    scale, zero_point = (None if one is None else one[first:last] for one in (scale, zero_point))
    mask, starts = mask[first:last], starts[first:last]
    kept = bitmap.unpack_mask(mask, ic)
    if not values.numel():
        return torch.zeros(kept.shape, dtype=dtype, device=mask.device)
    found = bitmap.values_at(values, starts, kept, sparse.value_bits)
    if isinstance(sparse.values, Plain):
        decoded = found.view(FLOAT_DTYPES[sparse.values.dtype])
    else:
        assert scale is not None
        decoded = dequantize(found, scale, zero_point, sparse.values)
    return decoded.masked_fill_(~kept, 0).to(dtype)


def _packed(
    sparse: Sparse,
    kept: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
) -> SparseWeight:
    """Make a weight of which weights are left, and their numbers."""
    counts = bitmap.count_kept(kept)
    words = bitmap.pack_values(values, counts, sparse.value_bits)
    form = Pruned.of(sparse, counts)
    shape = (kept.shape[0], kept.shape[1])
    return SparseWeight.of(form, shape, bitmap.pack_mask(kept), words, scale, zero_point)


def _empty_row(like: SparseWeight) -> SparseWeight:
    """Return a row of nothing but pruned weights."""
    scale, zero_point = (None if one is None else torch.zeros_like(one[:1]) for one in (like.scale, like.zero_point))
    mask, values = like.mask.new_zeros(1, like.mask.shape[1]), like.values.new_zeros(0)
    return SparseWeight.of(Pruned.of(like.sparse, [0]), (1, like.shape[1]), mask, values, scale, zero_point)
