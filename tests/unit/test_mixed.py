"""A weight whose output features have different schemes: levels say where rows belong, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers.mixes import IC, MIX, levels, matrix, mixed, pack

from tersor.compress import encode
from tersor.errors import FormatError, ShapeError
from tersor.formats import Assignment, Mix, get_scheme
from tersor.layouts import STREAM, MixedWeight
from tersor.layouts.gated import interleave
from tersor.layouts.shard import Part


def decoded(weight: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """Return what the rows decode to, each encoded alone."""
    schemes = [assignment.mix.levels[level] for level in assignment.level]
    return torch.cat([encode(row[None], scheme).dequantize() for row, scheme in zip(weight, schemes, strict=True)])


@pytest.mark.parametrize("layout", [STREAM, "tiles_float16", "tiles_bfloat16"])
def test_rows_decode_as_they_would_alone_in_every_layout(layout: str) -> None:
    weight, assignment = matrix(75), levels(75)
    own = mixed(weight, assignment)
    there = own.to_layout(lambda scheme: layout)
    assert {one.layout for one in there.sets} == {layout}
    assert torch.equal(there.dequantize(), decoded(weight, assignment))
    back = there.to_layout(lambda scheme: STREAM)
    for one, again in zip(own.sets, back.sets, strict=True):
        assert torch.equal(one.data, again.data) and torch.equal(one.scale, again.scale)
    assert back.assignment == assignment
    assert own.nbytes == sum(one.nbytes for one in own.sets) + 2 * 4 * 75


def test_features_in_the_order_of_their_levels_need_no_permutation() -> None:
    assignment = Assignment(MIX, bytes([0] * 9 + [2] * 7))
    own = mixed(matrix(16), assignment)
    assert own.features is None and own.places is None and len(own.sets) == 2
    assert own.assignment == assignment
    assert torch.equal(own.dequantize(), decoded(matrix(16), assignment))


def test_stacked_weights_have_one_row_set_a_level() -> None:
    parts = [mixed(matrix(rows, rows), levels(rows, rows)) for rows in (40, 24, 23)]
    stacked = MixedWeight.stack(parts)
    assert stacked.shape == (87, IC) and len(stacked.sets) == 3
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))
    with pytest.raises(ShapeError, match="one mix and IC"):
        MixedWeight.stack([parts[0], MixedWeight(Mix(MIX.levels[:2]), (1, IC), (), None, None)])


@pytest.mark.parametrize("channels", [48, 43])
def test_gate_and_up_are_interleaved_set_by_set(channels: int) -> None:
    assignment = levels(channels, 5)
    gate, up = (mixed(matrix(channels, seed), assignment) for seed in (1, 2))
    both = MixedWeight.gate_up(gate, up)
    assert both.channels == channels and both.gated
    assert torch.equal(both.dequantize(), interleave(gate.dequantize(), up.dequantize()))
    assert both.assignment == assignment
    with pytest.raises(ShapeError, match="channels have the same levels"):
        MixedWeight.gate_up(gate, mixed(matrix(channels, 2), levels(channels, 6)))
    with pytest.raises(ShapeError, match="cut both before"):
        both.cut(Part())


def test_a_cut_is_the_same_part_of_the_plain_weight() -> None:
    own, plain = mixed(matrix(75), levels(75)), decoded(matrix(75), levels(75))
    rows = own.cut(Part(rows=((10, 31), (60, 75))))
    assert torch.equal(rows.dequantize(), torch.cat([plain[10:31], plain[60:]]))
    assert torch.equal(own.cut(Part(columns=(64, 192))).dequantize(), plain[:, 64:])
    few = own.cut(Part(rows=((3, 4),), columns=(0, 128)))
    assert len(few.sets) == 1 and torch.equal(few.dequantize(), plain[3:4, :128])
    with pytest.raises(ShapeError, match="do not start at a whole quantum"):
        own.cut(Part(columns=(32, 192)))


def test_levels_and_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FormatError, match="level int8:g64:float16 stands there twice"):
        Mix((get_scheme("int8", 64), get_scheme("int8", 64)))
    with pytest.raises(FormatError, match="0 levels, expected 1 to 8"):
        Mix(())
    with pytest.raises(FormatError, match="output feature 2 has level 3, and there are 3 levels"):
        Assignment(MIX, bytes([0, 1, 3]))
    with pytest.raises(ShapeError, match="2 levels for 3 output features"):
        Assignment(MIX, bytes([0, 1])).check(3)
    with pytest.raises(ShapeError, match="row sets"):
        MixedWeight.of(Assignment(MIX, b""), [])
    with pytest.raises(ShapeError, match=r"row sets .* expected rows \[\('uint3:g32:float16', 4\)\] of one IC"):
        MixedWeight.of(Assignment(MIX, bytes(4)), [pack(matrix(3), MIX.levels[0])])


def test_bits_count_scales_and_levels() -> None:
    assignment = Assignment(MIX, bytes([0] * 3 + [2]))
    expected = (3 * (3 + 24 / 32) + (8 + 16 / 64)) / 4 + 8 / IC
    assert assignment.bits_per_weight(IC) == pytest.approx(expected)
    stored = sum(one.nbytes for one in mixed(matrix(4), assignment).sets)
    assert 8 * (stored + 4) / (4 * IC) == pytest.approx(expected)
