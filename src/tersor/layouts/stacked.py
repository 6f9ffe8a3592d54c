"""The weights of a layer's experts as one: E matrices of one scheme and shape, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.formats import Scheme
from tersor.layouts.blocks import UNIT_OC
from tersor.layouts.weight import STREAM, PackedTensors, PackedWeight

_TOGETHER = {"cpu": 1, "cuda": 1 << 25}
"""Codes of the experts that change their layout at once; on a CPU one at a time is faster."""


@dataclass(frozen=True, slots=True)
class StackedWeight(PackedTensors):
    """E weights [OC, IC] as packed codes and scales, those of the experts of one layer.

    In a kernel layout the tiles of every expert start with a unit of rows, so that each is a `PackedWeight` of its own.

    Attributes:
        scheme: what codes and scales mean.
        shape: (E, OC, IC).
        data: int32; [E, OC, words] in the stored stream, [E, words of an expert's tiles] in a kernel layout.
        scale: [E, OC, G] in the scheme's scale dtype; in a kernel layout uint8 [E, bytes], zero points included.
        zero_point: uint8 [E, OC, G] for `uint` formats in the stored stream, else `None`.
        layout: `stream`, or the name of a kernel layout.
    """

    scheme: Scheme
    shape: tuple[int, int, int]
    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    layout: str = STREAM

    @staticmethod
    def stack(weights: Sequence[PackedWeight]) -> StackedWeight:
        """Put weights of one scheme, shape, layout and device one behind the other; `expert` undoes it.

        Raises:
            ShapeError: there are none, or they differ.
        """
        if not weights:
            raise ShapeError("a layer of experts has at least one expert")
        first = weights[0]
        for weight in weights:
            if (weight.scheme, weight.shape, weight.layout) != (first.scheme, first.shape, first.layout):
                raise ShapeError(
                    f"experts of one layer must be of one kind: {first.scheme.key()} {list(first.shape)} in "
                    f"{first.layout} and {weight.scheme.key()} {list(weight.shape)} in {weight.layout}"
                )
        zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
        return StackedWeight(
            first.scheme,
            (len(weights), *first.shape),
            torch.stack([weight.data for weight in weights]),
            torch.stack([weight.scale for weight in weights]),
            torch.stack(zero_points) if zero_points else None,
            first.layout,
        )

    @property
    def experts(self) -> int:
        """E."""
        return self.shape[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """(OC, IC) of each expert."""
        return self.shape[1:]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.data.device

    def expert(self, index: int) -> PackedWeight:
        """Return the weight [OC, IC] of an expert, sharing memory with this one, in the same layout."""
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return PackedWeight(self.scheme, self.matrix, self.data[index], self.scale[index], zero_point, self.layout)

    @staticmethod
    def gate_up(gate: StackedWeight, up: StackedWeight) -> StackedWeight:
        """Interleave gate and up, [E, F, IC] each, inside of every expert, as `PackedWeight.gate_up` does.

        Returns:
            [E, gated.gated_rows(F), IC] in the stored stream; `split_gate_up` undoes it.

        Raises:
            ShapeError: schemes or shapes differ.
        """
        if gate.experts != up.experts:
            raise ShapeError(f"gate has {gate.experts} experts, up {up.experts}")
        pairs = zip(range(gate.experts), range(up.experts), strict=True)
        return StackedWeight.stack([PackedWeight.gate_up(gate.expert(i), up.expert(j)) for i, j in pairs])

    def split_gate_up(self) -> tuple[StackedWeight, StackedWeight]:
        """Undo `gate_up`: return gate and up, [E, F, IC] each, in the stored stream.

        Raises:
            ShapeError: the weights have not the rows of gated ones.
        """
        halves = [self.expert(index).split_gate_up() for index in range(self.experts)]
        return StackedWeight.stack([gate for gate, _ in halves]), StackedWeight.stack([up for _, up in halves])

    def to_layout(self, layout: str) -> StackedWeight:
        """Return the same weights in another layout; exact, and undone by going back.

        Experts change it as many at a time as have `_TOGETHER` codes, where each is whole units of rows: their tiles
        are then those of one weight, and one expert alone is too little work for a GPU. What they become is put in
        place before the next are made.

        Raises:
            FormatError: a zero point that kernels for the layout's dtype cannot apply exactly.
        """
        if layout == self.layout:
            return self
        oc, ic = self.matrix
        apart = oc % UNIT_OC > 0 or (self.layout != STREAM and self.packing.by_ratios)
        step = 1 if apart else max(1, _TOGETHER.get(self.device.type, 1) // (oc * ic))
        wholes: list[torch.Tensor | None] = []
        for start in range(0, self.experts, step):
            some = self._rows_of_one(start, min(start + step, self.experts)).to_layout(layout)
            for index in range(some.shape[0] // oc):
                new = some.rows(index * oc, (index + 1) * oc)
                parts = (new.data, new.scale, new.zero_point)
                wholes = wholes or [None if one is None else one.new_empty(self.experts, *one.shape) for one in parts]
                for whole, part in zip(wholes, parts, strict=True):
                    if whole is not None and part is not None:
                        whole[start + index] = part
        data, scale, zero_point = wholes
        assert data is not None and scale is not None
        return StackedWeight(self.scheme, self.shape, data, scale, zero_point, layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the decoded weights [E, OC, IC], computed in float32 and rounded once to `dtype`."""
        result = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        for index in range(self.experts):
            result[index] = self.expert(index).dequantize(dtype)
        return result

    def _rows_of_one(self, first: int, last: int) -> PackedWeight:
        """Return experts first .. last - 1 as the rows of one weight, sharing memory with this one."""
        if last - first == 1:
            return self.expert(first)
        data, scale = self.data[first:last].flatten(0, 1), self.scale[first:last].flatten(0, 1)
        zero_point = None if self.zero_point is None else self.zero_point[first:last].flatten(0, 1)
        oc, ic = self.matrix
        return PackedWeight(self.scheme, ((last - first) * oc, ic), data, scale, zero_point, self.layout)
