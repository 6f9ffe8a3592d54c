"""Whatever cuts, joins, stacks, copies or moves packed weights leaves every number where it was, in every layout."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.every_layout import (
    MIXES,
    OF_EXPERTS,
    PLACED,
    check,
    check_gated,
    check_mixed,
    check_stack,
    mixed,
    mixed_of,
    named,
    same,
    stored,
    tensors_of,
    to,
)

from tersor import ops
from tersor.formats import Assignment, Scheme
from tersor.integrations.transformers.joined import Join, PackedPart
from tersor.layouts import (
    STREAM,
    MixedWeight,
    PackedWeight,
    StackedMixedWeight,
    StackedWeight,
    stacked,
)
from tersor.layouts.shard import Part
from tersor.models import stored_experts
from tersor.nn import MixedLinear, PackedLinear, PackedStack, Rows
from tersor.nn.mixed_stack import MixedStack
from tersor.offload.image import Image
from tersor.ops import row_sets, stacks

NAMES = ("weight_packed", "weight_scale", "weight_zero_point")
SIZES = (1, 136)
"""Rows: one alone, and no whole units."""


def through_bytes(tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    """Return tensors as they lie in one piece of bytes that they were copied to."""
    there = [one for one in tensors if one is not None]
    image = Image.of(there)
    memory = torch.full((image.nbytes,), 255, dtype=torch.uint8)
    image.write(memory, there)
    views = iter(image.views(memory))
    return [None if one is None else next(views) for one in tensors]


def moved(weight: PackedWeight) -> PackedWeight:
    data, scale, zero_point, outliers, arranged = through_bytes(tensors_of(weight))
    return replace(weight, data=data, scale=scale, zero_point=zero_point, outliers=outliers, arranged=arranged)


def spans(rows: int, unit: int) -> list[tuple[int, int]]:
    """Rows that may be taken alone: a unit at a time, and all but the first."""
    ends = [*range(0, rows, unit), rows]
    return [*pairwise(ends), (unit if rows > unit else 0, rows)]


@pytest.mark.parametrize(("scheme", "layout"), named(PLACED))
def test_a_weight_keeps_its_numbers(scheme: Scheme, layout: str) -> None:
    for rows in SIZES:
        first, second = (stored(scheme, rows, seed) for seed in (0, 1))
        here, other = first.to_layout(layout), second.to_layout(layout)
        decoded, also = first.dequantize(), second.dequantize()
        check(here, decoded, layout)
        assert same(moved(here), here)
        check(here.dense, first.dense.dequantize(), layout)
        for begin, end in spans(rows, 67 if layout == STREAM else 64):
            check(here.rows(begin, end), decoded[begin:end], layout)
        stack = PackedWeight.stack([here, other]).to_layout(layout)
        check(stack, torch.cat([decoded, also]), layout)
        for one, wanted in zip(stack.split([rows, rows]), (decoded, also), strict=True):
            check(one, wanted, STREAM)
        both = PackedWeight.gate_up(here, other).to_layout(layout)
        check_gated(both, decoded, also, layout)
        for one, wanted in zip(both.split_gate_up(), (decoded, also), strict=True):
            check(one, wanted, STREAM)
        pieces = [Part(((0, rows // 2 + 1), (rows // 3, rows))), Part(columns=(96, 192)), Part(((0, 1),), (0, 96))]
        for part in pieces[1:] if rows == 1 else pieces:
            wanted = torch.cat([decoded[begin:end] for begin, end in part.rows or ((0, rows),)])
            wanted = wanted if part.columns is None else wanted[:, slice(*part.columns)]
            if part.columns is None or not scheme.group_size or not 96 % scheme.group_size:
                check(here.cut(part).to_layout(layout), wanted, layout)


@pytest.mark.parametrize(("scheme", "layout"), named(PLACED))
def test_a_layer_shows_what_is_stored(scheme: Scheme, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    first, other = stored(scheme, 72), stored(scheme, 72, 1)
    layer = PackedLinear.from_packed(first, dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    layer.prepare(torch.float32)
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half().float()):
        check(one.packed_weight(), first.dequantize(), layout)
        after = one.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    layer.load_state_dict(PackedLinear.from_packed(other).state_dict())
    layer.prepare(torch.float32)
    check(layer.packed_weight(), other.dequantize(), layout)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("scheme", "layout"), named(PLACED))
def test_joined_layers_are_those_that_they_were(
    scheme: Scheme, layout: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    sizes = (72, 72) if gated else (64, 72)
    made = [stored(scheme, rows, seed) for seed, rows in enumerate(sizes)]
    parts = [PackedPart.of(PackedLinear.from_packed(one, dtype=torch.float32)) for one in made]
    join = Join(parts, gated)
    for index, part in enumerate(parts):
        part.place(join, index)
    whole = join.ready(torch.float32)
    assert whole is not None
    decoded = [one.dequantize() for one in made]
    if gated:
        check_gated(whole, decoded[0], decoded[1], layout)
    else:
        check(whole, torch.cat(decoded), layout)
        check(whole.rows(0, 64), decoded[0], layout)
    for part, one in zip(parts, made, strict=True):
        check(part.packed_weight(), one.dequantize(), STREAM)
        assert torch.equal(part.state_dict()["weight_scale"], one.scale)
    parts[0].to(torch.float64)
    for part, one in zip(parts, made, strict=True):
        check(part.packed_weight().to_layout(layout), one.dequantize(), layout)


@pytest.mark.parametrize(("rows", "experts"), [(64, 3), (72, 2), (136, 1)])
@pytest.mark.parametrize(("scheme", "layout"), named(OF_EXPERTS))
def test_experts_keep_their_numbers(
    scheme: Scheme, layout: str, rows: int, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "_TOGETHER", {"cpu": 2 * rows * 192})
    each = [stored(scheme, rows, seed) for seed in range(experts)]
    decoded = torch.stack([one.dequantize() for one in each])
    stack = StackedWeight.stack(each).to_layout(layout)
    check_stack(stack, decoded, layout)
    assert same(StackedWeight.stack([one.to_layout(layout) for one in each]), stack)
    assert torch.equal(stack.to_layout(STREAM).dequantize(), decoded)
    assert same(stacks.weight_of(*stacks.tensors_of(stack)), stack)
    data, scale, zero_point, *_ = through_bytes(tensors_of(stack))
    assert same(replace(stack, data=data, scale=scale, zero_point=zero_point), stack)
    check(stack.expert(experts - 1).rows(0, rows), decoded[-1], layout)
    both = StackedWeight.gate_up(stack, StackedWeight.stack(each[::-1])).to_layout(layout)
    check_gated(both.expert(0), decoded[0], decoded[-1], layout)
    for half, wanted in zip(both.split_gate_up(), (decoded, decoded.flip(0)), strict=True):
        assert half.layout == STREAM and torch.equal(half.dequantize(), wanted)


def read_by(layout: str) -> Any:
    """What stands for a checkpoint of which experts are read."""
    return SimpleNamespace(
        each=lambda make, indices: [make(index) for index in indices],
        ready=lambda weight: weight.to_layout(layout),
    )


@pytest.mark.parametrize(("rows", "together"), [(64, 2), (72, 2), (128, 9)])
@pytest.mark.parametrize(("scheme", "layout"), named(OF_EXPERTS))
def test_experts_that_are_read_together_are_those_of_each(
    scheme: Scheme, layout: str, rows: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_experts, "_TOGETHER", together * rows * 192)
    each = [stored(scheme, rows, seed) for seed in range(3)]
    found = stored_experts._stacked(read_by(layout), 3, each.__getitem__)
    assert same(found, StackedWeight.stack([one.to_layout(layout) for one in each]))


@pytest.mark.parametrize("rows", [Rows.HALVES, Rows.PAIRS])
@pytest.mark.parametrize(("scheme", "layout"), named(OF_EXPERTS[::2]))
def test_a_layer_of_experts_shows_what_is_stored(
    scheme: Scheme, layout: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    whole = StackedWeight.stack([stored(scheme, 72, seed) for seed in range(2)])
    module = PackedStack((2, 72, 192), scheme, rows, dtype=torch.float32)
    state = {name: one for name, one in zip(NAMES, tensors_of(whole), strict=False) if one is not None}
    module.load_state_dict(state)
    for one in (module, module.half().float()):
        ready = one.ready(torch.float32)
        assert ready.layout == layout and torch.equal(one.weight, whole.dequantize())
        check_stack(ready, ready.dequantize(), layout)
        after = one.state_dict()
        assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


@pytest.mark.parametrize("layout", MIXES)
def test_a_mixed_weight_keeps_its_numbers(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    mix, here = MIXES[layout], to(layout)
    for rows in (9, 200):
        first, second = (mixed(mix, rows, seed).to_layout(here) for seed in (0, 1))
        decoded, also = (mixed(mix, rows, seed).dequantize() for seed in (0, 1))
        check_mixed(first, decoded, layout)
        for one in (
            first.to(torch.device("cpu")),
            row_sets.weight_of(*row_sets.tensors_of(first)),
            replace(first, sets=tuple(map(moved, first.sets))),
        ):
            assert same(one, first) and torch.equal(one.dequantize(), decoded)
        check_mixed(MixedWeight.stack([first, second]).to_layout(here), torch.cat([decoded, also]), layout)
        check_mixed(MixedWeight.gate_up(first, second).to_layout(here), torch.cat([decoded, also]), layout)
        cut = first.cut(Part(((0, 3), (5, rows)), (96, 192))).to_layout(here)
        check_mixed(cut, torch.cat([decoded[:3], decoded[5:]])[:, 96:], layout)
        layer = MixedLinear.from_packed(mixed(mix, rows), dtype=torch.float32)
        before = copy.deepcopy(layer.state_dict())
        layer.prepare(torch.float32)
        for one in (layer, copy.deepcopy(layer), layer.half().float()):
            check_mixed(one.packed_weight(), decoded, layout)
            assert all(torch.equal(before[name], own) for name, own in one.state_dict().items())
        for index, row in enumerate(torch.cat(first.by_set(decoded.T), dim=-1).T):
            assert torch.equal(row, decoded[index if first.features is None else int(first.features[index])])


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("layout", MIXES)
def test_mixed_experts_keep_their_numbers(layout: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    monkeypatch.setattr(stored_experts, "_TOGETHER", 3 * 64 * 192)
    mix, here = MIXES[layout], to(layout)
    each = [mixed(mix, 200, seed) for seed in range(experts)]
    gates = [MixedWeight.gate_up(one, two) for one, two in zip(each, each[::-1], strict=True)]
    decoded = torch.stack([one.dequantize() for one in each])
    both = torch.cat([decoded, decoded.flip(0)], dim=1)
    for parts, wanted in ((each, decoded), (gates, both)):
        stack = StackedMixedWeight.stack(parts).to_layout(here)
        check_mixed(stack, wanted, layout)
        assert same(stacks.weight_of(*stacks.tensors_of(stack)), stack)
        check_mixed(stack.to_layout(to(STREAM)), wanted, STREAM)
        assert same(stack.expert(experts - 1), parts[-1].to_layout(here))
        assert same(stored_experts._stacked(read_by(layout), experts, parts.__getitem__), stack)


@pytest.mark.parametrize("rows", Rows)
@pytest.mark.parametrize("layout", MIXES)
def test_a_layer_of_mixed_experts_shows_what_is_stored(
    layout: str, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: layout)
    mix = MIXES[layout]
    half = torch.randint(len(mix.levels), (100,), generator=torch.Generator().manual_seed(1))
    level = half.repeat_interleave(2) if rows is Rows.PAIRS else half.repeat(2)
    form = Assignment(mix, bytes(level.tolist()))
    whole = StackedMixedWeight.stack([mixed_of(form, seed) for seed in range(2)])
    module = MixedStack((2, 200, 192), form, rows, dtype=torch.float32)
    state = {"weight_level": level.to(torch.uint8)}
    for number, one in enumerate(whole.sets):
        state |= {
            f"levels.{number}.{name}": own for name, own in zip(NAMES, tensors_of(one), strict=False) if own is not None
        }
    module.load_state_dict(state)
    for one in (module, copy.deepcopy(module), module.half().float()):
        ready = one.ready(torch.float32)
        assert torch.equal(one.weight, whole.dequantize())
        wanted = whole.dequantize() if rows is Rows.PLAIN else torch.cat(rows.halves(whole.dequantize()), dim=1)
        check_mixed(ready, wanted, layout)
        after = one.state_dict()
        assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
