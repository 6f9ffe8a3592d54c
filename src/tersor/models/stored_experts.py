"""How do the stored weights of a layer's experts become two stacks? An expert at a time, interleaved where packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tersor.errors import UnsupportedError
from tersor.formats import Assignment
from tersor.layouts import MixedWeight, PackedWeight, StackedMixedWeight, StackedWeight
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
        UnsupportedError: gate and up, or down, of its experts are stored in several schemes, or in several mixes.
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
    for modules in (gate_up, down):
        if not stored.agree(modules, levels=True):
            raise UnsupportedError(
                f"{modules[0]} and other experts of the layer are not stored alike: the engine takes one scheme, or "
                "the same levels, for gate and up of all experts of a layer, and for down"
            )
    # Rows are interleaved for kernels that take both weights.
    together = stored.is_packed(gate_up[0]) and stored.is_packed(down[0])

    def of_gate_up(index: int) -> Matrix:
        if names.fused:
            halves = _pairs(stored.expert(gate_up[0], index))
        else:
            halves = [stored.matrix(gate_up[index]), stored.matrix(gate_up[experts.count + index])]
        if not together:
            return joined(halves)
        gate, up = halves
        if isinstance(gate, MixedWeight) and isinstance(up, MixedWeight):
            return MixedWeight.gate_up(gate, up)
        assert isinstance(gate, PackedWeight) and isinstance(up, PackedWeight)
        return PackedWeight.gate_up(gate, up)

    def of_down(index: int) -> Matrix:
        return stored.expert(down[0], index) if names.fused else stored.matrix(down[index])

    share = stored.share
    own = share.experts or (0, experts.count)
    gate_up_bias = down_bias = None
    if experts.biased:
        bias = stored.vector(f"{gate_up[0]}_bias")[slice(*own)]
        gate_up_bias = Rows.PAIRS.arrange_bias(bias) if together else torch.cat(Rows.PAIRS.halves(bias), dim=1)
        once = share.whole("experts") or share.place.expert_rank == 0
        down_bias = stored.vector(f"{down[0]}_bias")[slice(*own)] if once else None
    return Mixture(
        form=experts,
        gate=config.gate,
        router=stored.router(start + names.router, experts.router_bias, experts.wide),
        gate_up=_stacked(stored, own[1] - own[0], lambda index: of_gate_up(own[0] + index)),
        down=_stacked(stored, own[1] - own[0], lambda index: of_down(own[0] + index)),
        first=own[0],
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
    if isinstance(weight, PackedWeight):
        return [_turns(weight, first) for first in (0, 1)]
    assert isinstance(weight, MixedWeight), "held by `expected.check`"
    mix, level = weight.mix, weight.assignment.level
    if level[0::2] != level[1::2]:
        raise UnsupportedError("gate and up of a channel of experts are stored at different levels")
    half = Assignment(mix, level[0::2])
    return [MixedWeight.of(half, [_turns(one, first) for one in weight.sets]) for first in (0, 1)]


def _turns(weight: PackedWeight, first: int) -> PackedWeight:
    """Return every second row of a weight in the stored stream."""
    zero_point = None if weight.zero_point is None else weight.zero_point[first::2]
    shape = (weight.shape[0] // 2, weight.shape[1])
    return PackedWeight(weight.scheme, shape, weight.data[first::2], weight.scale[first::2], zero_point)


def _stacked(stored: Stored, count: int, make: Callable[[int], Matrix]) -> Stack:
    """Return the weights of all experts, in the layout that their products are served from.

    Experts are read side by side, and go to that layout as many at a time as have `_TOGETHER` codes: tiles are whole
    units of rows, so those of several experts are those of each, and one expert alone is too little work for a GPU.
    What they become is put in place before the next are made.
    """
    first = make(0)
    if isinstance(first, MixedWeight):
        return _stacked_mixed(stored, count, first, make)
    rows, channels = first.shape
    together = max(1, min(_TOGETHER // (rows * channels), count)) if rows % UNIT_OC == 0 else 1
    wholes: list[torch.Tensor | None] = []
    for start in range(0, count, together):
        last = min(start + together, count)
        made = joined([*([] if start else [first]), *stored.each(make, range(start or 1, last))])
        ready = stored.ready(made)
        assert isinstance(ready, torch.Tensor | PackedWeight), "as the first was"
        for index in range(start, last):
            one = _rows(ready, (index - start) * rows, (index - start + 1) * rows)
            parts = (one,) if isinstance(one, torch.Tensor) else (one.data, one.scale, one.zero_point)
            wholes = wholes or [None if part is None else part.new_empty(count, *part.shape) for part in parts]
            for whole, part in zip(wholes, parts, strict=True):
                if whole is not None and part is not None:
                    whole[index] = part
    if isinstance(ready, torch.Tensor):
        assert wholes[0] is not None
        return wholes[0]
    assert isinstance(ready, PackedWeight)
    data, scale, zero_point = wholes
    assert data is not None and scale is not None
    return StackedWeight(ready.scheme, (count, rows, channels), data, scale, zero_point, ready.layout)


def _rows(weight: torch.Tensor | PackedWeight, first: int, last: int) -> torch.Tensor | PackedWeight:
    return weight[first:last] if isinstance(weight, torch.Tensor) else weight.rows(first, last)


def _stacked_mixed(stored: Stored, count: int, first: MixedWeight, make: Callable[[int], Matrix]) -> StackedMixedWeight:
    """Return mixed weights of all experts: each level is a stack of its own, in the layout that serves it.

    Every expert is read once, and stays in memory until its levels are in their stacks.
    """
    every = [first, *stored.each(make, range(1, count))]

    def of_level(level: int) -> StackedWeight:
        found = _stacked(stored, count, lambda index: _level_of(every[index], level))
        assert isinstance(found, StackedWeight)
        return found

    sets = [of_level(level) for level in range(len(first.sets))]
    return StackedMixedWeight.of(first.assignment, sets, first.gated)


def _level_of(weight: Matrix, level: int) -> PackedWeight:
    assert isinstance(weight, MixedWeight), "all experts of a layer are stored alike"
    return weight.sets[level]
