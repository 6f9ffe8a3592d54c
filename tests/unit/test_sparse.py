"""Pruned weights in memory: masks, what is left behind them, and how they are cut and joined."""

from __future__ import annotations

import pytest
import torch
from helpers import pruned

from tersor.checkpoint.names import SPARSE, stored_weights
from tersor.checkpoint.pack import pack_sparse
from tersor.compress import encode
from tersor.errors import CheckpointError, FormatError, NonFiniteError, ShapeError
from tersor.formats import Plain, Pruned, Scheme, Sparse, get_scheme, plain_values
from tersor.layouts import SparseWeight, bitmap
from tersor.layouts.gated import gated_rows
from tersor.layouts.shard import Part, quantum


def same(one: SparseWeight, other: SparseWeight) -> bool:
    """Tell whether two weights have the same form and bytes."""
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return one.form == other.form and one.shape == other.shape and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("values", pruned.VALUES, ids=lambda values: values.key())
@pytest.mark.parametrize("density", pruned.DENSITIES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 96), (17, 64)], ids=str)
def test_what_is_left_of_any_density_and_shape_comes_back_exactly(
    values: Scheme | Plain, density: float, shape: tuple[int, int]
) -> None:
    if isinstance(values, Scheme) and values.group_size and shape[1] % values.group_size:
        values = get_scheme(values.name)
    weight, mask = pruned.random(*shape), pruned.kept(*shape, density)
    found, wanted = pruned.sparse(weight, mask, values)
    assert torch.equal(found.kept(), mask)
    assert torch.equal(found.dequantize(), wanted) and not found.dequantize().signbit()[~mask].any()
    assert torch.equal(found.dequantize(rows=(shape[0] // 2, shape[0])), wanted[shape[0] // 2 :])
    stored = SPARSE.pack(found)
    assert {name: (tuple(one.shape), one.dtype) for name, one in stored.items()} == {
        name: (form.shape, form.dtype) for name, form in SPARSE.tensors(found.form, *shape).items()
    }
    assert sum(one.nbytes for one in stored.values()) == found.form.nbytes(shape[1])
    again = SparseWeight.from_stored(
        found.sparse, shape, found.mask.clone(), found.values.clone(), found.scale, found.zero_point
    )
    assert same(again, found) and Sparse.from_key(found.form.key()) == found.sparse


@pytest.mark.parametrize("where", ["row", "column", "tile"])
@pytest.mark.parametrize("values", [Plain("float16"), get_scheme("fp5_e2m2")], ids=lambda values: values.key())
def test_one_dense_row_column_or_tile_is_as_good_as_any(where: str, values: Scheme | Plain) -> None:
    mask = pruned.kept(80, 200, 0.02)
    places = {"row": (7, slice(None)), "column": (slice(None), 9), "tile": (slice(16), slice(64, 128))}
    mask[places[where]] = True
    found, wanted = pruned.sparse(pruned.random(80, 200), mask, values)
    assert torch.equal(found.dequantize(), wanted)
    assert found.form.numbers().tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("values", pruned.VALUES, ids=lambda values: values.key())
def test_masks_and_values_are_the_bits_that_the_format_says(values: Scheme | Plain) -> None:
    mask = pruned.kept(4, 64, 0.4)
    found, _ = pruned.sparse(pruned.random(4, 64), mask, values)
    bits = found.sparse.value_bits
    numbers = found.numbers().to(torch.int64) & ((1 << bits) - 1)
    rows = numbers.split(mask.sum(1).tolist())
    assert found.values.numpy().tobytes() == b"".join(pruned.bit_stream(row.tolist(), bits) for row in rows)
    said = [[bool(byte >> bit & 1) for byte in row for bit in range(8)] for row in found.mask.tolist()]
    assert said == mask.tolist()


def test_minus_zero_is_pruned_and_what_a_mask_keeps_is_kept_whatever_it_is() -> None:
    weight = torch.tensor([[1.0, -0.0, 0.0, -2.0]], dtype=torch.bfloat16)
    assert SparseWeight.from_plain(weight).kept().tolist() == [[True, False, False, True]]
    found = SparseWeight.from_plain(weight, torch.tensor([[False, True, True, True]]))
    assert found.dequantize().tolist() == [[0.0, 0.0, 0.0, -2.0]]
    assert found.dequantize().signbit().tolist() == [[False, True, False, True]]


def test_weights_are_stacked_interleaved_and_taken_apart() -> None:
    scheme = get_scheme("uint4", 32)
    first, one = pruned.sparse(pruned.random(11, 64, 1), pruned.kept(11, 64, 0.3, 1), scheme)
    second, two = pruned.sparse(pruned.random(11, 64, 2), pruned.kept(11, 64, 0.9, 2), scheme)
    both = SparseWeight.stack([first, second])
    assert torch.equal(both.dequantize(), torch.cat((one, two)))
    assert all(same(*pair) for pair in zip(both.split([11, 11]), (first, second), strict=True))
    gated = SparseWeight.gate_up(first, second)
    assert gated.shape == (gated_rows(11), 64) and gated.form.nonzeros == both.form.nonzeros
    assert all(same(*pair) for pair in zip(gated.split_gate_up(), (first, second), strict=True))
    plain, _ = pruned.sparse(pruned.random(11, 64), pruned.kept(11, 64, 0.5), Plain("float16"))
    with pytest.raises(ShapeError, match="must have one scheme and IC: sparse:uint4:g32:float16 with 64"):
        SparseWeight.stack([first, plain])
    with pytest.raises(ShapeError, match="a gated weight takes two of one shape"):
        SparseWeight.gate_up(first, both)


@pytest.mark.parametrize(
    "values", [Plain("bfloat16"), get_scheme("uint4", 32), get_scheme("fp6")], ids=lambda values: values.key()
)
def test_a_weight_is_cut_by_rows_and_whole_quanta_of_columns(values: Scheme | Plain) -> None:
    found, wanted = pruned.sparse(pruned.random(20, 96), pruned.kept(20, 96, 0.5), values)
    assert quantum(found.form) == (32 if isinstance(values, Scheme) and values.group_size else 8)
    rows = found.cut(Part(((2, 5), (11, 20))))
    assert torch.equal(rows.dequantize(), torch.cat((wanted[2:5], wanted[11:])))
    columns = found.cut(Part(columns=(32, 96)))
    assert torch.equal(columns.dequantize(), wanted[:, 32:])
    with pytest.raises(ShapeError, match="do not start at a whole quantum"):
        found.cut(Part(columns=(4, 96)))


def test_stored_tensors_that_do_not_fit_are_refused() -> None:
    found, _ = pruned.sparse(pruned.random(3, 12), pruned.kept(3, 12, 0.5), Plain("bfloat16"))
    mask, values, sparse = found.mask.clone(), found.values, found.sparse
    with pytest.raises(ShapeError, match=r"the mask is \[3, 2\], expected \[3, 3\]"):
        SparseWeight.from_stored(sparse, (3, 20), mask, values)
    with pytest.raises(ShapeError, match="weights left take"):
        SparseWeight.from_stored(sparse, (3, 12), mask, values[:-1])
    mask[1, 1] |= 0x10
    with pytest.raises(ShapeError, match="bits set behind the 12 weights of a row"):
        SparseWeight.from_stored(sparse, (3, 12), mask, values)


@pytest.mark.parametrize("values", [Plain("bfloat16"), get_scheme("int3", 16)], ids=lambda values: values.key())
def test_blocks_of_rows_are_packed_to_the_bytes_of_the_whole(values: Scheme | Plain) -> None:
    weight = (pruned.random(13, 48) * pruned.kept(13, 48, 0.5)).bfloat16()
    form = Pruned.of(Sparse(values), (weight != 0).sum(1))
    whole = pack_sparse(weight, form, block_elements=100)
    values_of = torch.zeros_like(whole.tensors["weight_values"])
    for first in (0, 4, 9):
        part = pack_sparse(weight[first : {0: 4, 4: 9, 9: 13}[first]], form, first_row=first)
        words, start = part.tensors["weight_values"], part.starts["weight_values"]
        values_of[start : start + len(words)] = words
    assert torch.equal(values_of, whole.tensors["weight_values"])
    assert whole.squared_error == 0.0 or isinstance(values, Scheme)
    weight[5, 3] = 0.0 if weight[5, 3] else 1.0
    with pytest.raises(CheckpointError, match="changed while it was read"):
        pack_sparse(weight, form)
    weight[5, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"nan at \[5, 3\]"):
        pack_sparse(weight, form)


def test_sizes_follow_from_what_is_left() -> None:
    form = Pruned.of(Sparse(get_scheme("fp6")), [0, 1, 5, 6])
    assert form.starts().tolist() == [0, 0, 1, 2, 4] and form.words == 4  # 0, 6, 30 and 36 bits
    assert form.nbytes(64) == 4 * 4 + 4 * (8 + 2) and form.density(64) == 12 / 256
    assert form.cut([(3, 4), (0, 1)]) == Pruned.of(Sparse(get_scheme("fp6")), [6, 0])
    half = Pruned.of(Sparse(Plain("bfloat16")), [2048] * 8)
    assert half.bits_per_weight(4096) == 9.0
    with pytest.raises(ShapeError, match="counts of 8 rows for 9"):
        half.check(9)


def test_plain_numbers_are_named_as_users_do() -> None:
    assert [plain_values(name) for name in ("bf16", "float16", "fp6")] == [Plain("bfloat16"), Plain("float16"), None]
    with pytest.raises(FormatError, match=r"unknown dtype 'bfloat61', did you mean 'bfloat16'"):
        Plain("bfloat61")


@pytest.mark.parametrize("ic", [1, 8, 1000, 1024, 2100])
def test_what_is_kept_is_counted_row_by_row(ic: int) -> None:
    mask = pruned.kept(3, ic, 0.9)
    mask[0] = True
    assert torch.equal(bitmap.count_kept(mask), mask.sum(1))


def test_masks_are_counted_by_their_bits() -> None:
    mask = torch.arange(256, dtype=torch.uint8).view(64, 4)
    assert bitmap.count(mask).tolist() == [sum(byte.bit_count() for byte in row) for row in mask.tolist()]


def test_a_stem_with_a_mask_is_a_pruned_weight_alone() -> None:
    names = ["a.weight_mask", "a.weight_scale", "a.weight_values", "b.weight_packed", "b.weight_scale"]
    assert {stem: storage.name for stem, storage in stored_weights(names).items()} == {"a": "sparse", "b": "dense"}


def test_codes_of_what_is_kept_are_those_of_the_dense_weight() -> None:
    weight, mask = pruned.random(6, 64), pruned.kept(6, 64, 0.5)
    encoded = encode(weight, get_scheme("fp4", 32))
    assert torch.equal(SparseWeight.from_encoded(encoded, mask).numbers(), encoded.codes[mask])
