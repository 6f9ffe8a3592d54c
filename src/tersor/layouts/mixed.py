"""A weight whose output features have different schemes: rows of each in a packed weight of their own.

The rows of a level stand in the order of their output features. So levels alone say where each row belongs, a cut by
rows is a cut of every row set, and a weight whose features were put in the order of their levels when it was made needs
no permutation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tersor.errors import ShapeError
from tersor.formats import Assignment, Mix, Scheme
from tersor.layouts.gated import gated_channels, gated_rows, interleave, separate
from tersor.layouts.shard import Part, Span
from tersor.layouts.stacked import StackedWeight
from tersor.layouts.weight import Noted, PackedWeight


@dataclass(frozen=True, slots=True)
class MixedWeight(Noted):
    """A weight [OC, IC], or gate and up of F channels in one, as row sets of different schemes.

    Attributes:
        mix: the levels.
        shape: (OC, IC); of gate and up (gated.gated_rows(F), IC), like that of a dense one.
        sets: the rows of every level that has any, in the order of levels; of gate and up each is a gated weight.
        features: int32, the output feature of every row of all sets, one behind the other: of gate and up [F], else
            [OC]; `None` where rows stand in the order of features.
        places: int32 likewise, the row of every output feature; what `features` undoes.
        gated: whether the weight is gate and up.
    """

    mix: Mix
    shape: tuple[int, int]
    sets: tuple[PackedWeight, ...]
    features: torch.Tensor | None
    places: torch.Tensor | None
    gated: bool = False

    @staticmethod
    def of(assignment: Assignment, sets: Sequence[PackedWeight], gated: bool = False) -> MixedWeight:
        """Make a weight of its row sets, without a copy of them.

        Args:
            assignment: the level of every output feature, [F] where gated.
            sets: the rows of every level that has any, in the order of levels and of output features.
            gated: whether every set is `PackedWeight.gate_up` of its channels.

        Raises:
            ShapeError: sets that are not those of the assignment.
        """
        rows = {scheme: count for scheme, count in zip(assignment.mix.levels, assignment.rows, strict=True) if count}
        expected = {scheme: gated_rows(count) if gated else count for scheme, count in rows.items()}
        found = {one.scheme: one.shape[0] for one in sets}
        if list(found.items()) != list(expected.items()) or len({one.shape[1] for one in sets}) != 1:
            raise ShapeError(
                f"row sets {[(one.scheme.key(), list(one.shape)) for one in sets]}, expected rows "
                f"{[(scheme.key(), count) for scheme, count in expected.items()]} of one IC"
            )
        count = len(assignment.level)
        shape = (gated_rows(count) if gated else count, sets[0].shape[1])
        features = places = None
        order = torch.frombuffer(bytearray(assignment.level), dtype=torch.uint8).argsort(stable=True)
        if not torch.equal(order, torch.arange(count)):
            features, places = (one.to(torch.int32).to(sets[0].data.device) for one in (order, order.argsort()))
        return MixedWeight(assignment.mix, shape, tuple(sets), features, places, gated)

    @staticmethod
    def stack(weights: Sequence[MixedWeight]) -> MixedWeight:
        """Put weights of one mix and IC one after the other, such as those of queries, keys and values.

        Returns:
            [sum of OC_i, IC], its row sets in the stored stream: those of one level become one.

        Raises:
            ShapeError: mixes or IC differ, or one is gate and up.
        """
        first = weights[0]
        for weight in weights:
            if weight.mix != first.mix or weight.shape[1] != first.shape[1] or weight.gated:
                raise ShapeError("mixed weights joined in one must be plain ones of one mix and IC")
        level = b"".join(weight.assignment.level for weight in weights)
        parts = [
            [one for weight in weights for one in weight.sets if one.scheme == scheme] for scheme in first.mix.levels
        ]
        return MixedWeight.of(Assignment(first.mix, level), [PackedWeight.stack(part) for part in parts if part])

    @staticmethod
    def gate_up(gate: MixedWeight, up: MixedWeight) -> MixedWeight:
        """Interleave the row sets of two weights whose features have the same levels, for `ops.gated_linear`.

        Args:
            gate, up: [F, IC] on one device, in any layout.

        Returns:
            [gated.gated_rows(F), IC], its row sets in the stored stream.

        Raises:
            ShapeError: shapes, or the levels of a channel, differ.
        """
        assignment = gate.assignment
        if gate.gated or up.gated or gate.shape != up.shape or up.assignment != assignment:
            raise ShapeError(
                f"gate is {list(gate.shape)}, up {list(up.shape)}: a gated weight takes two of one shape, whose "
                "channels have the same levels"
            )
        sets = [PackedWeight.gate_up(*pair) for pair in zip(gate.sets, up.sets, strict=True)]
        return MixedWeight.of(assignment, sets, gated=True)

    @property
    def rows(self) -> tuple[int, ...]:
        """Output channels of every set: of gate and up, of both together."""
        return tuple(gated_channels(one.shape[0]) if self.gated else one.shape[0] for one in self.sets)

    @property
    def channels(self) -> int:
        """Output channels of a product: OC, or F of gate and up."""
        return sum(self.rows)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.sets[0].data.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales, zero points and both permutations."""
        return bytes_of(self.sets, self.features, self.places)

    @property
    def assignment(self) -> Assignment:
        """The level of every output feature."""
        numbers = torch.tensor([self.mix.levels.index(one.scheme) for one in self.sets], dtype=torch.uint8)
        level = numbers.repeat_interleave(torch.tensor(self.rows))
        if self.places is not None:
            level = level[self.places.cpu().long()]
        return Assignment(self.mix, level.numpy().tobytes())

    def cut(self, part: Part) -> MixedWeight:
        """Return a part of the weight, its row sets in the stored stream.

        Args:
            part: spans of output features, and input channels that start at a quantum of every level.

        Raises:
            ShapeError: the weight is gate and up, or columns are not whole quanta.
        """
        if self.gated:
            raise ShapeError("a weight of gate and up is not cut: cut both before")
        spans: tuple[Span, ...] = part.rows or ((0, self.shape[0]),)
        assignment = self.assignment
        sets = []
        for one in self.sets:
            rows = assignment.spans(self.mix.levels.index(one.scheme), spans)
            if any(last > first for first, last in rows):
                sets.append(one.cut(Part(rows, part.columns)))
        return MixedWeight.of(assignment.of(spans), sets)

    def to_layout(self, choose: Callable[[Scheme], str]) -> MixedWeight:
        """Return the same weight with every row set in the layout that `choose` gives for its scheme.

        Exact, and undone by going back.

        Raises:
            FormatError: a zero point that kernels for a layout's dtype cannot apply exactly.
        """
        sets = tuple(one.to_layout(choose(one.scheme)) for one in self.sets)
        return MixedWeight(self.mix, self.shape, sets, self.features, self.places, self.gated)

    def to(self, device: torch.device) -> MixedWeight:
        """Return the weight on a device."""
        sets = []
        for one in self.sets:
            zero_point = None if one.zero_point is None else one.zero_point.to(device)
            data, scale = one.data.to(device), one.scale.to(device)
            sets.append(PackedWeight(one.scheme, one.shape, data, scale, zero_point, one.layout))
        features, places = (None if order is None else order.to(device) for order in (self.features, self.places))
        return MixedWeight(self.mix, self.shape, tuple(sets), features, places, self.gated)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the decoded weight [OC, IC], rows in the order of output features, rounded once to `dtype`."""
        return self.in_order([one.dequantize(dtype).T for one in self.sets]).T.contiguous()

    def in_order(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [..., OC] in the order of output features of what every set gives for its rows, [..., rows] each."""
        if not self.gated:
            return self.of_channels(parts)
        halves = [separate(part.movedim(-1, 0)) for part in parts]
        both = [self.of_channels([half[side].movedim(0, -1) for half in halves]) for side in (0, 1)]
        return interleave(*(one.movedim(-1, 0) for one in both)).movedim(0, -1)

    def of_channels(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [..., channels] in order of what every set gives for its channels, [..., channels of the set] each."""
        return put_in_order(parts, self.places)

    def by_set(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return the values [..., channels] of every set, [..., channels of the set] each: undoes `of_channels`."""
        stored = values if self.features is None else values.index_select(-1, self.features)
        return list(stored.split(self.rows, dim=-1))


def put_in_order(parts: Sequence[torch.Tensor], places: torch.Tensor | None) -> torch.Tensor:
    """Return [..., channels] in order of what row sets give for their channels, [..., channels of the set] each.

    Args:
        parts: of every row set, in their order.
        places: int32 [channels], where each channel is among them; `None` where they stand in order.
    """
    together = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
    return together if places is None else together.index_select(-1, places)


def bytes_of(sets: Sequence[PackedWeight | StackedWeight], *orders: torch.Tensor | None) -> int:
    """Return the bytes in memory of row sets and of the permutations that there are."""
    return sum(one.nbytes for one in sets) + sum(order.nbytes for order in orders if order is not None)
