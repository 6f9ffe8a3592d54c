"""How do the stored weights of a layer's experts become two stacks? An expert at a time, interleaved where packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tersor.errors import UnsupportedError
from tersor.layouts import MixedWeight, PackedWeight, SparseWeight, StackedWeight
from tersor.layouts.blocks import UNIT_OC
from tersor.models.config import DecoderConfig, Experts
from tersor.models.mixture import Mixture
from tersor.models.names import Names
from tersor.models.stored import Stored, joined
from tersor.models.weights import FeedForward, Matrix, Stack
from tersor.nn.experts import Rows
from tersor.ops import Gate

_TOGETHER = 1 << 25
"""Codes of the experts that go to their layout at once."""


def mixture(stored: Stored, config: DecoderConfig, names: Names, start: str, experts: Experts) -> Mixture:
    """Return the experts of the layer whose names start with `start`.

    Raises:
        UnsupportedError: gate and up, or down, of its experts are stored in several schemes, or mixed.
    """
    assert config.gate is not None
    if names.fused:
        first, second = (start + name for name in names.fused)
        gate_up, down = [first], [second]
    else:
        gate_names, up_names, down = (
            [start + name.format(expert=index) for index in range(experts.count)] for name in names.expert
        )
        gate_up = gate_names + up_names
    other = next((module for module in (*gate_up, *down) if not stored.is_dense(module)), None)
    if other is not None:
        raise UnsupportedError(f"{other} is mixed or sparse: the engine takes one scheme for all experts of a layer")
    for modules in (gate_up, down):
        if not stored.agree(modules):
            raise UnsupportedError(
                f"{modules[0]} and other experts of the layer are not stored alike: the engine takes one scheme for "
                "gate and up of all experts of a layer, and one for down"
            )
    # Rows are interleaved for kernels that take both weights.
    together = stored.is_packed(gate_up[0]) and stored.is_packed(down[0])

    def of_gate_up(index: int) -> Matrix:
        if names.fused:
            halves = _pairs(stored.expert(gate_up[0], index))
        else:
            halves = [stored.matrix(gate_up[index]), stored.matrix(gate_up[experts.count + index])]
        packed = [half for half in halves if isinstance(half, PackedWeight)]
        return PackedWeight.gate_up(*packed) if together else joined(halves)

    def of_down(index: int) -> Matrix:
        return stored.expert(down[0], index) if names.fused else stored.matrix(down[index])

    gate_up_bias = down_bias = None
    if experts.biased:
        bias = stored.vector(f"{gate_up[0]}_bias")
        gate_up_bias = Rows.PAIRS.arrange_bias(bias) if together else torch.cat(Rows.PAIRS.halves(bias), dim=1)
        down_bias = stored.vector(f"{down[0]}_bias") if stored.ranks.first else None
    return Mixture(
        form=experts,
        gate=config.gate,
        router=stored.router(start + names.router, experts.router_bias, experts.wide),
        gate_up=_stacked(stored, experts.count, of_gate_up),
        down=_stacked(stored, experts.count, of_down),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        choice_bias=stored.vector(start + names.choice_bias, torch.float32) if experts.choice_bias else None,
        shared=_shared(stored, config.gate, names, start) if experts.shared else None,
    )


def _shared(stored: Stored, gate: Gate, names: Names, start: str) -> FeedForward:
    up = stored.gate_up([start + name for name in names.shared_gate_up], gate, False)
    return FeedForward(up, stored.partial(start + names.shared_down, False))


def _pairs(weight: Matrix) -> Sequence[Matrix]:
    """Return gate and up [F, IC] of a weight [2 F, IC] in which their rows take turns."""
    if isinstance(weight, torch.Tensor):
        return [weight[0::2], weight[1::2]]
    assert isinstance(weight, PackedWeight)
    shape = (weight.shape[0] // 2, weight.shape[1])
    return [
        PackedWeight(weight.scheme, shape, data, scale, zero_point)
        for data, scale, zero_point in (
            (one.data[index::2], one.scale[index::2], None if one.zero_point is None else one.zero_point[index::2])
            for one, index in ((weight, 0), (weight, 1))
        )
    ]


def _stacked(stored: Stored, count: int, make: Callable[[int], Matrix]) -> Stack:
    """Return the weights of all experts, in the layout that their products are served from.

    Experts are read side by side, and go to that layout as many at a time as have `_TOGETHER` codes: tiles are whole
    units of rows, so those of several experts are those of each, and one expert alone is too little work for a GPU.
    What they become is put in place before the next are made.
    """
    first = make(0)
    rows, channels = first.shape
    together = max(1, min(_TOGETHER // (rows * channels), count)) if rows % UNIT_OC == 0 else 1
    wholes: list[torch.Tensor | None] = []
    for start in range(0, count, together):
        last = min(start + together, count)
        made = joined([*([] if start else [first]), *stored.each(make, range(start or 1, last))])
        ready = stored.ready(made)
        assert not isinstance(ready, MixedWeight | SparseWeight), "experts have one scheme"
        parts = (ready,) if isinstance(ready, torch.Tensor) else (ready.data, ready.scale, ready.zero_point)
        own = [None if part is None else part.unflatten(0, (last - start, -1)) for part in parts]
        wholes = wholes or [None if part is None else part.new_empty(count, *part.shape[1:]) for part in own]
        for whole, part in zip(wholes, own, strict=True):
            if whole is not None and part is not None:
                whole[start:last] = part
    if isinstance(ready, torch.Tensor):
        assert wholes[0] is not None
        return wholes[0]
    assert isinstance(ready, PackedWeight)
    data, scale, zero_point = wholes
    assert data is not None and scale is not None
    return StackedWeight(ready.scheme, (count, rows, channels), data, scale, zero_point, ready.layout)
