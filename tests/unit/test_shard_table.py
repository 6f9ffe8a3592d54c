"""layouts/shard.py: who has which channels, for sizes alone."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from tersor.errors import ShapeError
from tersor.formats import get_scheme
from tersor.layouts import shard
from tersor.layouts.shard import Heads, Part


def test_shares_are_whole_units_that_cover_all_once_and_the_largest_is_no_more_tiles_than_it_must_be() -> None:
    draw = random.Random(1)
    for _ in range(500):
        ranks, unit, tile = draw.randint(1, 9), draw.choice([1, 8, 32, 96, 128]), draw.choice([1, 64, 128])
        size = draw.randint(ranks * unit, 40 * ranks * unit)
        spans = shard.cut(size, ranks, unit, tile=tile)
        assert len(spans) == ranks and spans[0][0] == 0 and spans[-1][1] == size
        assert all(one[1] == other[0] and one[0] < one[1] for one, other in pairwise(spans))
        assert all(first % unit == 0 for first, _ in spans)
        even = math.ceil(math.ceil(size / unit) / ranks) * unit
        most = max(math.ceil((last - first) / tile) for first, last in spans)
        assert most <= math.ceil(min(even, size) / tile)


@pytest.mark.parametrize(
    ("size", "scheme", "ranks", "sizes"),
    [
        (29568, "int4:g128:float16", 2, (14848, 14720)),  # 231 groups
        (29568, "int4:g128:float16", 8, (3712,) * 7 + (3584,)),
        (14336, "fp6_e3m2:row:float16", 3, (4864, 4736, 4736)),  # whole tiles of 128
        (160, "int4:g32:float16", 3, (64, 64, 32)),
        (96, "fp6_e3m2:row:float16", 2, (64, 32)),
        (1000, "fp6_e3m2:row:float16", 4, (256, 256, 256, 232)),  # the last word of a row is not full
        (768, "mxfp4_e2m1", 4, (256, 256, 128, 128)),
        (52, None, 2, (32, 20)),
    ],
)
def test_a_known_size_is_cut_like_this(size: int, scheme: str | None, ranks: int, sizes: tuple[int, ...]) -> None:
    kind = None if scheme is None else get_scheme(*_parts(scheme))
    spans = shard.cut(size, ranks, shard.quantum(kind))
    assert tuple(last - first for first, last in spans) == sizes


def _parts(key: str) -> tuple[str, int | None]:
    name, _, rest = key.partition(":")
    group = rest.partition(":")[0]
    return name, int(group[1:]) if group.startswith("g") else None


def test_a_quantum_is_whole_words_and_whole_groups() -> None:
    sizes = {("fp6_e3m2", None): 32, ("int4", 128): 128, ("int4", 16): 32, ("uint5", 48): 96, ("mxfp4_e2m1", None): 32}
    assert {key: shard.quantum(get_scheme(*key)) for key in sizes} == sizes
    assert shard.quantum(None) == 8


def test_heads_go_with_the_queries_that_read_them() -> None:
    assert shard.cut_heads(32, 8, 128, 2) == (Heads((0, 16), (0, 4)), Heads((16, 32), (4, 8)))
    assert [one.keys for one in shard.cut_heads(32, 8, 128, 3)] == [(0, 3), (3, 6), (6, 8)]
    assert shard.cut_heads(28, 4, 128, 3)[2] == Heads((21, 28), (3, 4))


def test_a_kv_head_is_on_several_ranks_where_there_are_more_of_them() -> None:
    found = shard.cut_heads(14, 2, 64, 4)
    assert [one.keys for one in found] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [one.queries for one in found] == [(0, 4), (4, 7), (7, 11), (11, 14)]
    assert [one.keys for one in shard.cut_heads(16, 2, 64, 3)] == [(0, 1), (0, 1), (1, 2)]


def test_heads_stay_together_where_a_group_of_the_output_spans_them() -> None:
    assert [one.keys for one in shard.cut_heads(8, 8, 64, 2, 256)] == [(0, 4), (4, 8)]
    assert [one.keys for one in shard.cut_heads(12, 6, 32, 2, 128)] == [(0, 4), (4, 6)]
    with pytest.raises(ShapeError, match=r"^o_proj, kv heads: 2 in units of 2 are 1 shares, and there are 2 ranks$"):
        shard.cut_heads(4, 2, 16, 2, 64, what="o_proj")
    with pytest.raises(ShapeError, match="the 48 channels of a kv head's queries are not whole units of 32"):
        shard.cut_heads(3, 1, 16, 2, 32)


def test_columns_are_words_and_groups_of_the_stored_stream() -> None:
    assert shard.stored_columns(get_scheme("fp6_e3m2"), (64, 100)) == ((12, 24), None)
    assert shard.stored_columns(get_scheme("int4", 64), (64, 192)) == ((8, 24), (1, 3))
    with pytest.raises(ShapeError, match="columns 32 to 64 of a weight in int4:g64:float16 do not start at a whole"):
        shard.stored_columns(get_scheme("int4", 64), (32, 64))


def test_the_shape_of_a_part_is_that_of_its_spans() -> None:
    assert Part(((0, 3), (8, 10))).shape((12, 7)) == (5, 7)
    assert Part(columns=(2, 6)).shape((4, 12, 7)) == (4, 12, 4)
    assert Part(((0, 3),)).shape((12,)) == (3,)
    assert Part(((2, 6),)).transposed() == Part(columns=(2, 6))
