"""The weights of a layer's experts whose output features have different schemes: one mix for all of them.

The level of an output feature is the same in every expert. So the rows of a level are a stack of their own, one
permutation says where they belong in all experts, and one launch can multiply all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from tersor.errors import ShapeError
from tersor.formats import Assignment, Mix, Scheme
from tersor.layouts.mixed import MixedWeight, bytes_of, put_in_order
from tersor.layouts.stacked import StackedWeight


@dataclass(frozen=True, slots=True)
class StackedMixedWeight:
    """E mixed weights [OC, IC] whose output features have the same levels, those of the experts of one layer.

    Attributes:
        mix: the levels.
        shape: (E, OC, IC); of gate and up (E, gated.gated_rows(F), IC), like that of a `StackedWeight`.
        sets: the rows of every level that has any, of all experts, in the order of levels; of gate and up each is a
            stack of gated weights.
        features: int32, the output feature of every row of all sets, as in a `MixedWeight`.
        places: int32, the row of every output feature; what `features` undoes.
        gated: whether the weights are gate and up.
    """

    mix: Mix
    shape: tuple[int, int, int]
    sets: tuple[StackedWeight, ...]
    features: torch.Tensor | None
    places: torch.Tensor | None
    gated: bool = False

    @staticmethod
    def of(assignment: Assignment, sets: Sequence[StackedWeight], gated: bool = False) -> StackedMixedWeight:
        """Make the weights of their row sets, without a copy of them.

        Args:
            assignment: the level of every output feature, [F] where gated.
            sets: the rows of every level that has any, [E, rows, IC] each, in the order of levels and of features.
            gated: whether every set is `StackedWeight.gate_up` of its channels.

        Raises:
            ShapeError: sets that are not those of the assignment, or of different numbers of experts.
        """
        counts = {one.experts for one in sets}
        if len(counts) > 1:
            raise ShapeError(f"row sets of {sorted(counts)} experts: a layer has one number of them")
        one = MixedWeight.of(assignment, [own.expert(0) for own in sets], gated)
        shape = (sets[0].experts, *one.shape)
        return StackedMixedWeight(assignment.mix, shape, tuple(sets), one.features, one.places, gated)

    @staticmethod
    def stack(weights: Sequence[MixedWeight]) -> StackedMixedWeight:
        """Put mixed weights one behind the other; `expert` undoes it.

        Args:
            weights: of one shape and of the same levels of output features, all of them gate and up or none.

        Raises:
            ShapeError: they differ, or there are none.
        """
        if not weights:
            raise ShapeError("a layer of experts has at least one expert")
        first = weights[0]
        level = first.assignment
        for weight in weights:
            if (weight.shape, weight.gated) != (first.shape, first.gated) or weight.assignment != level:
                raise ShapeError("experts of one layer have one mix: the levels of their output features differ")
        sets = [StackedWeight.stack([weight.sets[index] for weight in weights]) for index in range(len(first.sets))]
        return StackedMixedWeight(
            first.mix, (len(weights), *first.shape), tuple(sets), first.features, first.places, first.gated
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
        return self.sets[0].data.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales, zero points and both permutations."""
        return bytes_of(self.sets, self.features, self.places)

    @property
    def assignment(self) -> Assignment:
        """The level of every output feature, of gate and up of every channel."""
        return self.expert(0).assignment

    def expert(self, index: int) -> MixedWeight:
        """Return the weight [OC, IC] of an expert, sharing memory with this one."""
        sets = tuple(one.expert(index) for one in self.sets)
        return MixedWeight(self.mix, self.matrix, sets, self.features, self.places, self.gated)

    def to_layout(self, choose: Callable[[Scheme], str]) -> StackedMixedWeight:
        """Return the same weights with every row set in the layout that `choose` gives for its scheme.

        Exact, and undone by going back.

        Raises:
            FormatError: a zero point that kernels for a layout's dtype cannot apply exactly.
        """
        return replace(self, sets=tuple(one.to_layout(choose(one.scheme)) for one in self.sets))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the decoded weights [E, OC, IC], rows in the order of output features, rounded once to `dtype`."""
        return torch.stack([self.expert(index).dequantize(dtype) for index in range(self.experts)])

    def of_channels(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return [..., channels] in order of what every set gives for its channels, [..., channels of the set] each."""
        return put_in_order(parts, self.places)


Stacked: TypeAlias = StackedWeight | StackedMixedWeight
"""The packed weights [E, OC, IC] of all experts of a layer, of one scheme or of one mix."""


def sets_of(weight: Stacked) -> tuple[StackedWeight, ...]:
    """Return the stacks that kernels multiply with: a row set of each level, or the whole weight."""
    return weight.sets if isinstance(weight, StackedMixedWeight) else (weight,)
