"""Kernel tiles of pruned weights: laid out and back for every density, and what a byte of them stands for."""

from __future__ import annotations

import pytest
import torch

from tersor import formats
from tersor.errors import FormatError, ShapeError
from tersor.layouts import sparse_tiles
from tersor.layouts.sparse_cuts import Cuts
from tersor.layouts.sparse_packing import FP8, SparsePacking, unsupported_reason

SHAPE = (150, 700)


def numbers(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def random(shape: tuple[int, int], density: float) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < density


def skewed() -> torch.Tensor:
    """A tenth of the weights, and all of a row, a column, a block, a unit's first half; a unit without any."""
    kept = random((200, 1100), 0.1)
    kept[5], kept[:, 301], kept[64:128] = True, True, False
    kept[130:190, 512:640] = True
    kept[128:192, :500] = True
    return kept


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@pytest.mark.parametrize("density", [0, 0.01, 0.1, 0.5, 0.94, 1])
def test_tiles_of_every_density_come_back(density: float, dtype: torch.dtype) -> None:
    kept, values = random(SHAPE, density), numbers(SHAPE, dtype)
    tiles = sparse_tiles.pack(kept, values, 2)
    left, back = sparse_tiles.unpack(tiles)
    assert torch.equal(left, kept)
    assert torch.equal(back, torch.where(kept, values, torch.zeros_like(values)))


@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (65, 129), (3, 900)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_tiles_of_odd_shapes_come_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    kept, values = random(shape, 0.5), numbers(shape, dtype)
    left, back = sparse_tiles.unpack(sparse_tiles.pack(kept, values, 1))
    assert torch.equal(left, kept)
    assert torch.equal(back[kept], values[kept])


@pytest.mark.parametrize("places", [0, 1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_tiles_of_rows_columns_and_blocks_with_all_weights_come_back(places: int, dtype: torch.dtype) -> None:
    kept = skewed()
    values = numbers((200, 1100), dtype)
    left, back = sparse_tiles.unpack(sparse_tiles.pack(kept, values, places))
    assert torch.equal(left, kept)
    assert torch.equal(back[kept], values[kept])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_no_lane_reads_further_back_than_a_ring_reaches(dtype: torch.dtype) -> None:
    """And a block reaches at most as many layers further as its weights have words."""
    tiles = sparse_tiles.pack(skewed(), numbers((200, 1100), dtype), 3)
    marks = tiles.marks.long() & 0xFFFFFFFF
    reached, done = marks & 0xFFFF, marks >> 16
    assert bool((reached - done <= sparse_tiles.LAG).all() and (done[:, 1:] >= done[:, :-1]).all())
    steps = torch.diff(reached, dim=1, prepend=torch.zeros(len(marks), 1, dtype=torch.int64))
    assert bool((steps >= 0).all() and (steps <= 2 * tiles.bits).all())
    for begin in (
        tiles.starts[:12].view(3, 4)[1:, 0].tolist()
    ):  # a place reads nothing that lies ahead of its first block
        assert torch.equal(done[:, begin], reached[:, begin - 1])


@pytest.mark.parametrize("places", [1, 5, 7, 63])
def test_places_have_blocks_that_take_equally_long(places: int) -> None:
    """To a block, whatever rows and columns are dense, and each of them knows who has the rest of its tiles."""
    kept = torch.cat([random((1900, 1100), 0.05), random((400, 1100), 1.0)])
    kept[300:320], kept[:, 500:600] = True, True
    cuts = Cuts.of(kept, 8, places, 2000)
    table = cuts.places.tolist()
    assert [one[0] for one in table[1:]] == [one[1] for one in table[:-1]]
    assert (table[0][0], table[-1][1]) == (0, 9 * 9) and all(begin < end for begin, end, *_ in table)
    padded = torch.nn.functional.pad(kept, (0, 52, 0, 4))
    costs = (padded.view(36, 64, 9, 128).sum((1, 3)) + 1024).clamp_min(2000).view(9, 4, 9).sum(1).view(-1)
    shares = [int(costs[begin:end].sum()) for begin, end, *_ in table]
    assert max(shares) - int(costs.sum()) / places <= int(costs.max())
    for number, (begin, end, before, after) in enumerate(table):
        tile_of = [range(first // 9, (last - 1) // 9 + 1) for first, last, *_ in table]
        assert before == sum(begin // 9 in other for other in tile_of[:number])
        assert after == sum((end - 1) // 9 in other for other in tile_of[number + 1 :])
        assert begin % 9 == 0 or bool(cuts.anew[begin // 9 * 4, begin % 9])
    assert int(cuts.anew[::4].sum()) == sum(begin % 9 > 0 for begin, *_ in table)


def test_chunks_of_rows_are_one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, values = skewed(), numbers((200, 1100), torch.uint8)
    whole = sparse_tiles.pack(kept, values, 3)
    monkeypatch.setattr(sparse_tiles, "_CHUNK_WEIGHTS", 1)
    parts = sparse_tiles.pack(kept, values, 3)
    for name in ("mask", "layers", "starts", "marks"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    assert all(
        torch.equal(one, other) for one, other in zip(sparse_tiles.unpack(parts), (kept, values * kept), strict=True)
    )


def test_queues_are_little_longer_than_their_values() -> None:
    kept = random((128, 4096), 0.5)
    tiles = sparse_tiles.pack(kept, numbers((128, 4096), torch.uint8), 1)
    assert tiles.layers.nbytes <= 1.1 * int(kept.sum())


def test_more_places_than_blocks_are_refused() -> None:
    with pytest.raises(ShapeError, match="6 blocks of 256 rows cannot be dealt out to 7 places"):
        sparse_tiles.pack(random(SHAPE, 0.5), numbers(SHAPE, torch.uint8), 7)


def expanded(packing: SparsePacking, bytes_of: torch.Tensor) -> torch.Tensor:
    """What sparse/expand.cuh makes of bytes, before it finishes: 16 bits."""
    other = packing.others >> 8
    halves = bytes_of << 8 | other if packing.high else bytes_of | other << 8
    return (halves ^ halves >> packing.turn) & packing.mask & 0xFFFF if packing.turn else halves


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in formats.names() if name[0] != "u"])
def test_a_byte_stands_for_every_code_and_zero_is_what_pruned_weights_have(name: str, target: str) -> None:
    scheme = formats.get_scheme(name)
    if unsupported_reason(scheme, target):
        pytest.skip("no kernel decodes it")
    packing = SparsePacking.of(scheme, target)
    codes = torch.arange(1 << scheme.format.bits, dtype=torch.uint8)
    packed = packing.pack(codes)
    assert torch.equal(packing.unpack(packed), codes)
    zero = scheme.format.encode(torch.zeros(1)).to(torch.uint8)
    assert packing.pack(zero).tolist() == [packing.others & 0xFF]
    if packing.finish in (0, 1):  # as they are, up to a power of two
        dtype = getattr(torch, target)
        bits = expanded(packing, packed.int())
        floats = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(dtype).double()
        power = packing.factor
        if packing.finish == 1:
            constant = torch.tensor([packing.constant & 0xFFFF], dtype=torch.int32).to(torch.int16)
            power *= float(constant.view(dtype))
        assert torch.equal(floats * power, scheme.format.values().double())


@pytest.mark.parametrize(
    "name", ["fp8_e4m3", "fp7_e3m3", "fp6_e3m2", "fp6_e2m3", "fp5_e3m1", "fp4_e2m1", "int5", "int4"]
)
def test_beside_e4m3_a_byte_is_the_number_itself(name: str) -> None:
    """Up to one power of two: all numbers, but 480, which halves of all stand for where they are there."""
    scheme = formats.get_scheme(name)
    codes = torch.arange(1 << scheme.format.bits, dtype=torch.uint8)
    numbers = scheme.format.values().double()
    for packing in SparsePacking.choices(scheme, FP8):
        there = codes[torch.tensor(packing.bytes_of) >= 0]
        bytes_of = packing.pack(there)
        found = bytes_of.view(torch.float8_e4m3fn).double() * packing.factor
        assert torch.equal(found, numbers[there.long()]) and torch.equal(packing.unpack(bytes_of), there)
        assert SparsePacking.holding(scheme, FP8, there) in SparsePacking.choices(scheme, FP8)
    usual = SparsePacking.of(scheme, FP8)
    assert usual.bytewise and (min(usual.bytes_of) >= 0) == (name != "fp8_e4m3")


def test_numbers_without_a_common_multiple_in_e4m3_are_said() -> None:
    scheme = formats.get_scheme("fp8_e4m3")
    largest, odd = torch.tensor([0x7F, 0x40], dtype=torch.uint8), torch.tensor([0x01, 0x40], dtype=torch.uint8)
    assert SparsePacking.holding(scheme, FP8, largest).factor == 2 * SparsePacking.holding(scheme, FP8, odd).factor
    with pytest.raises(FormatError, match="leave activations in 16 bits"):
        SparsePacking.holding(scheme, FP8, torch.cat([largest, odd]))


@pytest.mark.parametrize("shape", [(1, 1), (65, 129), (200, 1100)])
def test_tiles_of_four_weights_a_register_come_back(shape: tuple[int, int]) -> None:
    kept, values = random(shape, 0.5), numbers(shape, torch.uint8)
    tiles = sparse_tiles.pack(kept, values, 1, four=True)
    left, back = sparse_tiles.unpack(tiles)
    assert torch.equal(left, kept) and torch.equal(back[kept], values[kept])
    assert shape[1] < 8 or not torch.equal(tiles.mask, sparse_tiles.pack(kept, values, 1).mask)


def test_what_no_kernel_expands_is_named() -> None:
    grouped = formats.get_scheme("fp6_e3m2", group_size=128)
    for values, target, reason in (
        (grouped, "float16", "scales in groups"),
        (formats.get_scheme("uint4"), "float16", "zero points"),
        (formats.get_scheme("fp8_e4m3"), "int8", "not expanded for int8"),
        (formats.get_scheme("int8"), FP8, "int8 has numbers that e4m3 has not"),
        (formats.get_scheme("fp8_e5m2"), FP8, "fp8_e5m2 has numbers that e4m3 has not"),
        ("float16", FP8, "plain values meet activations as they come"),
        ("bfloat16", "float16", "values in bfloat16 do not meet float16"),
    ):
        assert reason in unsupported_reason(values, target)
        with pytest.raises(FormatError, match=reason):
            SparsePacking.of(values, target)
