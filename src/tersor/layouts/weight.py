"""A compressed weight in memory: codes in some layout, scales, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tersor.errors import ShapeError
from tersor.formats import Encoded, Scheme, add_outliers, cut_outliers, dequantize
from tersor.layouts import outliers as outlier_rounds
from tersor.layouts import scales, stream, tiles
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.decode_groups import PAIR_TARGETS
from tersor.layouts.gated import gated_channels, interleave, separate
from tersor.layouts.packing import LAYOUTS, Packing
from tersor.layouts.shard import Part

STREAM = "stream"
"""The layout of the stored stream; every other name is a kernel layout of `tersor.layouts.packing`."""


class PackedTensors:
    """What every kind of packed weight says of its tensors.

    Attributes:
        scheme, data, scale, zero_point, layout: as the kind has them.
        outliers: what is kept beside the codes; `None` of kinds that keep nothing.
        arranged: the same as kernels read it; `None` where none does.
    """

    __slots__ = ()
    scheme: Scheme
    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    layout: str
    outliers: torch.Tensor | None = None
    arranged: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and outliers in memory."""
        tensors = (self.data, self.scale, self.zero_point, self.outliers, self.arranged)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def packing(self) -> Packing:
        """What the scheme means in the kernel layout that the weight lies in; there is none in the stored stream."""
        return Packing.of(self.scheme, LAYOUTS[self.layout])


class Noted:
    """Room for what `ops` remembers of a weight: no part of its value, neither copied nor stored with it."""

    __slots__ = ("note",)


@dataclass(frozen=True, slots=True)
class PackedWeight(PackedTensors, Noted):
    """A weight [OC, IC] as packed codes and scales.

    Attributes:
        scheme: what codes and scales mean.
        shape: (OC, IC).
        data: int32; [OC, words] in the stored stream, flat in a kernel layout.
        scale: [OC, G] in the scheme's scale dtype; in a kernel layout uint8, flat, zero points included (`scales`).
        zero_point: uint8 [OC, G] for `uint` formats in the stored stream, else `None`.
        layout: `stream`, or the name of a kernel layout.
        outliers: int32 [OC, K], the weights kept beside the codes where the scheme has some, in every layout; codes
            decode to zero where they stand.
        arranged: int32, flat: outliers once more, as kernels read them (`layouts.outliers.arrange`);
            `None` where there are none, and where none of these kernels takes them.
    """

    scheme: Scheme
    shape: tuple[int, int]
    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    layout: str = STREAM
    outliers: torch.Tensor | None = None
    arranged: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if (self.outliers is None) != (self.scheme.outliers is None):
            there = "no outliers" if self.outliers is None else "outliers"
            raise ShapeError(f"a weight in {self.scheme.key()} comes with {there}")

    @property
    def dense(self) -> PackedWeight:
        """The codes and scales alone, zero where outliers stand."""
        if self.outliers is None:
            return self
        return PackedWeight(self.scheme.dense, self.shape, self.data, self.scale, self.zero_point, self.layout)

    def beside(self, outliers: torch.Tensor | None, scheme: Scheme) -> PackedWeight:
        """Return this weight, which has no outliers, with some; `scheme` is that of both."""
        if outliers is None:
            return self
        return PackedWeight(scheme, self.shape, self.data, self.scale, self.zero_point, self.layout, outliers)

    @staticmethod
    def from_encoded(encoded: Encoded) -> PackedWeight:
        """Pack codes [OC, IC] into the stored stream; scales and zero points are shared, not copied."""
        oc, ic = encoded.codes.shape
        packed = stream.pack(encoded.codes, encoded.scheme.format.bits)
        of = (encoded.scheme, (oc, ic), packed, encoded.scale, encoded.zero_point)
        return PackedWeight(*of, outliers=encoded.outliers)

    @staticmethod
    def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
        """Put weights of one scheme and IC one after the other, such as those of queries, keys and values.

        Args:
            weights: at least one, [OC_i, IC] on one device, in any layout.

        Returns:
            [sum of OC_i, IC] in the stored stream; `split` undoes it.

        Raises:
            ShapeError: schemes or IC differ.
        """
        return _joined(weights, torch.cat)

    def split(self, sizes: Sequence[int]) -> list[PackedWeight]:
        """Undo `stack`: return weights of so many rows each, in the stored stream."""
        return _split(self, lambda tensor: tensor.split(list(sizes)))

    def rows(self, first: int, last: int) -> PackedWeight:
        """Return rows first .. last - 1 as a weight in the same layout that shares memory with this one, but for
        scales that lie in two places (`Packing.by_ratios`).

        Raises:
            ShapeError: in a kernel layout, where it does not start and end with a unit of rows (or the last row).
        """
        unit = 1 if self.layout == STREAM else UNIT_OC
        if first % unit or (last % unit and last != self.shape[0]):
            raise ShapeError(f"rows {first} to {last} of a weight in {self.layout} are not whole units of {unit}")

        def part(tensor: torch.Tensor) -> torch.Tensor:
            if unit == 1:
                return tensor[first:last]
            return tensor.view(-(-self.shape[0] // unit), -1)[first // unit : -(-last // unit)].reshape(-1)

        zero_point = None if self.zero_point is None else part(self.zero_point)
        kept = None if self.outliers is None else self.outliers[first:last]
        shape = (last - first, self.shape[1])
        if self.layout != STREAM and self.packing.by_ratios:
            scale = torch.cat([part(each) for each in scales.split(self.scale, self.shape[0])])
        else:
            scale = part(self.scale)
        found = PackedWeight(self.scheme, shape, part(self.data), scale, zero_point, self.layout, kept)
        return found if self.arranged is None else found._arranged()

    def cut(self, part: Part) -> PackedWeight:
        """Return a part of the weight, in the stored stream.

        Args:
            part: spans of output channels, and input channels that start at a quantum.

        Raises:
            ShapeError: columns are not whole quanta.
        """
        if self.outliers is not None:
            kept = _part(self.outliers, Part(part.rows))
            kept = kept if part.columns is None else cut_outliers(kept, part.columns)
            return self.dense.cut(part).beside(kept, self.scheme)
        stored = self.to_layout(STREAM)
        words, groups = part.stored(self.scheme)
        data, scale = _part(stored.data, words), _part(stored.scale, groups)
        zero_point = None if stored.zero_point is None else _part(stored.zero_point, groups)
        return PackedWeight(self.scheme, (len(data), part.shape(self.shape)[1]), data, scale, zero_point)

    @staticmethod
    def gate_up(gate: PackedWeight, up: PackedWeight) -> PackedWeight:
        """Interleave two weights of one scheme and shape for `ops.gated_linear`.

        Args:
            gate, up: [F, IC] on one device, in any layout.

        Returns:
            [gated.gated_rows(F), IC] in the stored stream, 2 F rows where F is a multiple of 8; `split_gate_up` undoes
            it.

        Raises:
            ShapeError: schemes or shapes differ.
        """
        if gate.shape != up.shape:
            raise ShapeError(f"gate is {list(gate.shape)}, up {list(up.shape)}: a gated weight takes two of one shape")
        return _joined((gate, up), lambda tensors: interleave(*tensors))

    def split_gate_up(self) -> tuple[PackedWeight, PackedWeight]:
        """Undo `gate_up`: return gate and up, [F, IC] each, in the stored stream.

        Raises:
            ShapeError: the weight has not the rows of a gated one.
        """
        gated_channels(self.shape[0])
        gate, up = _split(self, separate)
        return gate, up

    def to_layout(self, layout: str) -> PackedWeight:
        """Return the same weight in another layout; exact, and undone by going back.

        Raises:
            FormatError: a zero point that kernels for the layout's dtype cannot apply exactly.
        """
        if layout == self.layout:
            return self
        if self.outliers is not None:
            return self.dense.to_layout(layout).beside(self.outliers, self.scheme)._arranged()
        fmt, codes = self.scheme.format, self.codes()
        scale, zero_point = self.stored_scales()
        if layout == STREAM:
            return PackedWeight(self.scheme, self.shape, stream.pack(codes, fmt.bits), scale, zero_point)
        packing = Packing.of(self.scheme, LAYOUTS[layout])
        data = tiles.pack(codes, packing)
        scale = scales.pack(scale, zero_point, packing, self.shape[1])
        return PackedWeight(self.scheme, self.shape, data, scale, None, layout)

    def _arranged(self) -> PackedWeight:
        """Return the same weight with what kernels read of its outliers."""
        kept, target = self.scheme.outliers, LAYOUTS.get(self.layout)
        if self.outliers is None or kept is None or target not in PAIR_TARGETS:
            return self
        return replace(self, arranged=outlier_rounds.arrange(self.outliers, kept, target, self.shape[1]))

    def codes(self) -> torch.Tensor:
        """Return the uint8 codes [OC, IC]."""
        fmt = self.scheme.format
        if self.layout == STREAM:
            return stream.unpack(self.data, fmt.bits, self.shape[1])
        return tiles.unpack(self.data, self.packing, self.shape)

    def stored_scales(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scales as they are stored, [OC, G] in the scheme's scale dtype, and the zero points, if any."""
        if self.layout == STREAM:
            return self.scale, self.zero_point
        return scales.unpack(self.scale, self.packing, self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the decoded weight [OC, IC], computed in float32 and rounded once to `dtype`."""
        weight = dequantize(self.codes(), *self.stored_scales(), self.scheme)
        if self.outliers is not None and self.scheme.outliers is not None:
            add_outliers(weight, self.outliers, self.scheme.outliers.dtype)
        return weight.to(dtype)


def _joined(weights: Sequence[PackedWeight], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> PackedWeight:
    scheme, ic = weights[0].scheme, weights[0].shape[1]
    for weight in weights:
        if weight.scheme != scheme or weight.shape[1] != ic:
            raise ShapeError(
                f"weights joined in one must have one scheme and IC: {scheme.key()} with {ic} channels and "
                f"{weight.scheme.key()} with {weight.shape[1]}"
            )
    stored = [weight.to_layout(STREAM) for weight in weights]
    data, scale = join([weight.data for weight in stored]), join([weight.scale for weight in stored])
    zero_points = [weight.zero_point for weight in stored if weight.zero_point is not None]
    kept = [weight.outliers for weight in stored if weight.outliers is not None]
    most = max((words.shape[1] for words in kept), default=0)  # cuts of columns differ in what their rows keep
    kept = [torch.nn.functional.pad(words, (0, most - words.shape[1])) for words in kept]
    zero_point, outliers = (join(one) if one else None for one in (zero_points, kept))
    return PackedWeight(scheme, (data.shape[0], ic), data, scale, zero_point, outliers=outliers)


def _part(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    rows = torch.cat([tensor[first:last] for first, last in part.rows or ((0, len(tensor)),)])
    return rows if part.columns is None else rows[:, slice(*part.columns)].contiguous()


def _split(weight: PackedWeight, split: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> list[PackedWeight]:
    """Return the parts of a weight in the stored stream; they are copies, so that each stands alone."""
    stored = weight.to_layout(STREAM)
    zero_points = None if stored.zero_point is None else split(stored.zero_point)
    kept = None if stored.outliers is None else split(stored.outliers)
    parts = []
    for index, (data, scale) in enumerate(zip(split(stored.data), split(stored.scale), strict=True)):
        zero_point = None if zero_points is None else zero_points[index].clone()
        outliers = None if kept is None else kept[index].clone()
        shape = (data.shape[0], weight.shape[1])
        of = (weight.scheme, shape, data.clone(), scale.clone(), zero_point)
        parts.append(PackedWeight(*of, outliers=outliers))
    return parts
