"""The layers of one expert, whose codes and scales lie together with those of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tersor import ops
from tersor.integrations.transformers.joined import Given, GivenLinear, moved
from tersor.layouts import MixedWeight, PackedWeight
from tersor.nn.linear import PackedLinear, cast_bias
from tersor.nn.mixed import MixedLinear, RowSet
from tersor.nn.packed import PackedModule

if TYPE_CHECKING:
    from tersor.integrations.transformers.experts import PackedExperts


class OfExpert(nn.Module):
    """Holds rows of one expert, whose codes and scales a `PackedExperts` may hold together with those of the others."""

    _place: tuple[Any, ...]
    """What holds them, and which rows these are there."""

    @property
    def experts(self) -> PackedExperts:
        """What holds the codes and scales."""
        found: PackedExperts = self._place[0]
        return found

    def prepare(self, dtype: torch.dtype) -> None:
        """Join the experts, if they are on one device, in the layout for activations of `dtype`."""
        if not self.experts.joins:
            super().prepare(dtype)  # type: ignore[misc]  # that of a packed module
        else:
            self.experts.ready(dtype)


class ExpertLayer(OfExpert):
    """A layer of one expert, dense or mixed."""

    bias: nn.Parameter | None
    packed_weight: Any
    """Returns the weight."""

    def place(self, experts: PackedExperts, expert: int, name: str) -> None:
        """Make this layer the one called `name` of an expert."""
        self._place = (experts, expert, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., IC] with this layer's weight alone: returns [..., OC] in x's dtype."""
        if not self.experts.joins:
            alone: torch.Tensor = super().forward(x)
            return alone
        return ops.linear(x, self.packed_weight(), cast_bias(self.bias, ops.activation_dtype(x)))


class ExpertPart(ExpertLayer, GivenLinear):
    """A dense layer of one expert."""

    def _own_rows(self) -> PackedWeight:
        experts, expert, name = self._place
        rows: PackedWeight = experts.part(expert, name)
        return rows


class ExpertRows(OfExpert, Given, RowSet):
    """The rows of a level of one expert's layer."""

    def _own_rows(self) -> PackedWeight:
        experts, expert, name, number = self._place
        rows: PackedWeight = experts.part(expert, name, number)
        return rows


class ExpertMixed(ExpertLayer, MixedLinear):
    """A mixed layer of one expert."""

    def place(self, experts: PackedExperts, expert: int, name: str) -> None:
        """Make this layer the one called `name` of an expert."""
        super().place(experts, expert, name)
        for number, rows in enumerate(self.row_sets):
            rows._place = (*self._place, number)  # type: ignore[assignment]

    def packed_weight(self) -> MixedWeight:
        """Return the weight; while the experts hold its rows a copy of them, which is not kept."""
        found = super().packed_weight()
        if self.experts.joins:
            self._held = None
        return found


def part_of(layer: Any, experts: PackedExperts, expert: int, name: str) -> ExpertPart | ExpertMixed:
    """Return a layer called `name` of an expert, with the weight of a `PackedLinear` or a `MixedLinear`."""
    part: ExpertPart | ExpertMixed = _mixed_part(layer) if isinstance(layer, MixedLinear) else moved(layer, ExpertPart)
    part.place(experts, expert, name)
    return part


def _mixed_part(layer: MixedLinear) -> ExpertMixed:
    form = layer.packed_weight().assignment
    new = ExpertMixed(layer.in_features, layer.out_features, form, device="meta", dtype=layer.dtype)
    new.weight_level, new.transposed = layer.weight_level, layer.transposed
    for number, own in layer.levels.items():
        assert isinstance(own, RowSet)
        rows = ExpertRows(own.shape, own.scheme, device="meta", dtype=own.dtype)
        PackedModule._set_weight(rows, own.packed_weight())
        rows.activations = own.activations
        new.levels[number] = rows
    return new.train(layer.training)


def rows_of(layer: Any) -> list[ExpertPart | ExpertRows]:
    """Return what holds the codes of a layer: itself, or the rows of every level."""
    if isinstance(layer, ExpertMixed):
        return [rows for rows in layer.row_sets if isinstance(rows, ExpertRows)]
    return [layer]


def kind_of(layer: Any) -> Any:
    """Return what layers that are stacked have to agree in, a scheme or levels; `None` of what is neither."""
    if type(layer) is PackedLinear and layer.bias is None:
        return layer.scheme
    if type(layer) is MixedLinear and layer.bias is None and layer.weight_level.device.type != "meta":
        return layer.packed_weight().assignment
    return None
