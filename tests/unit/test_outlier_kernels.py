"""The kernels that sum up outliers and the dense one that adds them itself, on a CPU as C++, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated, tensor_map
from helpers.emulated_dense import product

from tersor.compress import encode
from tersor.formats import Outliers, get_scheme, outlier_columns, outlier_values, outlier_words
from tersor.hardware import CHIPS
from tersor.kernels import dense, outliers
from tersor.kernels.jit import tensor_map as maps
from tersor.kernels.tune import ROUND_ROW_BYTES, LinearProblem, choose_beside, sm90, takes_outliers
from tersor.layouts import PackedWeight
from tersor.layouts import outliers as layouts
from tersor.layouts.outliers import rounds_of
from tersor.layouts.packing import Packing
from tersor.ops.dispatch import INT8_LAYOUT

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
H200 = CHIPS["NVIDIA H200"]
TILES = {
    "8 tokens, two warpgroups in turn": sm90.Tile(8, 1, 2, 1, 2),
    "16 tokens, 128 rows in turn": sm90.Tile(16, 2, 1, 1, 2),
    "32 tokens": sm90.Tile(32, 2, 1, 1, 1),
    "128 tokens": sm90.Tile(128, 1, 1, 1, 2),
}


def _sums(
    folder: Path, x: torch.Tensor, words: torch.Tensor, kept: str, residual: torch.Tensor | None, stride: int
) -> torch.Tensor:
    """Return what the kernels make of x [n, ic], whose rows lie `stride` apart."""
    (n, ic), (oc, count), target = x.shape, words.shape, str(x.dtype).removeprefix("torch.")
    tokens = outliers.tile(n)
    address = x.data_ptr()
    turned = torch.full((ic, outliers.turned_stride(n)), torch.nan, dtype=x.dtype)
    if tokens == outliers.TURNED:
        turn = outliers.prepare_turn(Emulated(outliers.turn_source(), folder, 900), ic=ic, n=n)  # type: ignore[arg-type]
        turn(stream=0, x=address, stride=stride, turned=turned.data_ptr(), early=True)
        assert torch.equal(turned[:, :n], x.T) and not turned[:, n:].any()
        address, stride = turned.data_ptr(), turned.stride(0)
    function = Emulated(outliers.sums_source(target, kept, tokens), folder, 900)
    launch = outliers.prepare_sums(function, count=count, oc=oc, n=n)  # type: ignore[arg-type]
    out = torch.full((n, oc), torch.nan, dtype=x.dtype)
    added = 0 if residual is None else residual.data_ptr()
    launch(stream=0, x=address, stride=stride, words=words.data_ptr(), residual=added, out=out.data_ptr(), early=True)
    return out


@pytest.mark.parametrize(
    ("n", "oc", "ic", "count", "dtype", "kept", "added"),
    [
        (1, 70, 300, 2, "bfloat16", "bfloat16", False),
        (2, 64, 96, 33, "float16", "bfloat16", True),
        (3, 5, 1000, 40, "float16", "float16", True),
        (5, 130, 257, 1, "bfloat16", "float16", True),
        (19, 66, 64, 64, "float16", "float16", False),
    ],
)
def test_outliers_are_summed_up_with_the_residual_and_rounded_once(
    n: int, oc: int, ic: int, count: int, dtype: str, kept: str, added: bool, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(n)
    long = torch.randn(n, ic + 8, generator=generator).to(_DTYPES[dtype])
    x = long[:, :ic]  # rows are longer
    columns = torch.stack([torch.randperm(ic, generator=generator)[:count].sort().values for _ in range(oc)])
    values = torch.randn(oc, count, generator=generator).to(_DTYPES[kept])
    residual = torch.randn(n, oc, generator=generator).to(_DTYPES[dtype]) if added else None
    dense = torch.zeros(oc, ic, dtype=torch.float64).scatter_(1, columns, values.double())
    expected = x.double() @ dense.T + (0.0 if residual is None else residual.double())
    found = _sums(tmp_path, x, outlier_words(columns, values), kept, residual, long.stride(0))
    eps = torch.finfo(_DTYPES[dtype]).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps / 2 + 1e-6, atol=1e-5)


def test_a_token_has_the_same_sums_whatever_the_number_of_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(9, 200, generator=generator).half()
    columns = torch.stack([torch.randperm(200, generator=generator)[:50] for _ in range(66)])
    words = outlier_words(columns, torch.randn(66, 50, generator=generator).half())
    many = _sums(tmp_path, x, words, "float16", None, 200)
    for n in (1, 2, 4):
        assert torch.equal(_sums(tmp_path, x[:n].contiguous(), words, "float16", None, 200), many[:n])


def test_what_is_not_finite_reaches_the_rows_whose_outliers_meet_it_and_no_others(tmp_path: Path) -> None:
    x = torch.ones(1, 64, dtype=torch.float16)
    x[0, 0] = torch.inf
    columns = torch.arange(1, 41).repeat(3, 1)
    columns[1, 0] = 0
    words = outlier_words(columns, torch.ones(3, 40, dtype=torch.float16))
    found = _sums(tmp_path, x, words, "float16", None, 64)
    assert found.tolist() == [[40.0, torch.inf, 40.0]]


def test_kernels_of_a_call_are_those_that_its_numbers_of_tokens_ask_for() -> None:
    assert [outliers.tile(n) for n in (1, 2, 3, 4, 5, 4096)] == [1, 2, 4, 4, 8, 8]
    names = [source.name for source in outliers.sources("float16", "bfloat16", 2)]
    assert names == ["tersor_outlier_sums_float16_bfloat16_1", "tersor_outlier_sums_float16_bfloat16_2"]
    assert outliers.turn_source() in outliers.sources("float16", "bfloat16", 64)
    assert len(outliers.sources("float16", "bfloat16", 64)) == 5


# Added by the dense kernel itself


def _weight(form: str, size: int | None, share: str, target: str, shape: tuple[int, int], places: str) -> PackedWeight:
    """Return a random weight in kernel tiles.

    Its outliers stand at random places, in a column of all rows, in the first columns or, of one row in three, in the
    last ones.
    """
    (oc, ic), generator = shape, torch.Generator().manual_seed(shape[0])
    of = replace(get_scheme(form, size), outliers=Outliers.parse(share, "float16"))
    assert of.outliers is not None
    count = of.outliers.per_row(ic)
    encoded = encode(torch.randn(shape, generator=generator), of.dense)
    columns = torch.stack([torch.randperm(ic, generator=generator)[:count] for _ in range(oc)])
    if places == "column":
        columns[:, 0] = torch.where((columns == ic - 1).any(dim=1), columns[:, 0], ic - 1)
    elif places == "first":
        columns = torch.arange(count).repeat(oc, 1)
    elif places == "last":
        columns[::3] = torch.arange(ic - count, ic)
    values = (8 * torch.randn(oc, count, generator=generator)).bfloat16().half()  # either dtype has them
    zeros = torch.full_like(encoded.codes, of.format.zero_code)
    if encoded.zero_point is not None:
        zeros = encoded.zero_point.repeat_interleave(ic // encoded.zero_point.shape[1], dim=1)
    codes = encoded.codes.scatter(1, columns, zeros.gather(1, columns))
    made = replace(encoded, scheme=of, codes=codes, outliers=outlier_words(columns, values))
    return PackedWeight.from_encoded(made).to_layout(f"tiles_{target}")


def _product(
    weight: PackedWeight,
    tile: sm90.Tile,
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    splits: int,
    folder: Path,
) -> torch.Tensor:
    """Return what three CTAs make of x [n, ic] with a tile's kernel."""
    (oc, ic), n, target = weight.shape, len(x), str(x.dtype).removeprefix("torch.")
    packing, kept = Packing.of(weight.scheme.dense, target), weight.scheme.outliers
    assert kept is not None
    rounds, problem = rounds_of(kept, ic), LinearProblem.of(packing, (oc, ic), n)
    problem = replace(problem, scale_bytes=problem.scale_bytes + ROUND_ROW_BYTES * rounds)
    tiles = -(-oc // tile.rows) * -(-n // tile.tokens)
    config = sm90.config(problem, tile, 0 if splits > 1 else tiles, splits, 3, H200)
    return product(weight, config, x, bias, residual, folder, 900, rounds)


@pytest.mark.parametrize(
    ("name", "n", "form", "share", "dtype", "splits", "places"),
    [
        ("8 tokens, two warpgroups in turn", 3, ("int4", 32), "3%", "float16", 1, "first"),
        ("16 tokens, 128 rows in turn", 13, ("fp6_e3m2", None), "0.5%", "bfloat16", 2, "column"),
        ("32 tokens", 20, ("uint4", 32), "10%", "float16", 1, "last"),
        ("128 tokens", 150, ("fp6_e3m2", None), "0.5%", "bfloat16", 1, "column"),
    ],
)
def test_a_dense_kernel_adds_outliers_wherever_they_stand(
    name: str,
    n: int,
    form: tuple[str, int | None],
    share: str,
    dtype: str,
    splits: int,
    places: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(maps, "rows", tensor_map)
    oc, ic, native = 200, 352, _DTYPES[dtype]
    generator = torch.Generator().manual_seed(n)
    weight = _weight(*form, share, dtype, (oc, ic), places)
    x, bias, residual = (torch.randn(size, generator=generator).to(native) for size in ((n, ic), (oc,), (n, oc)))
    found = _product(weight, TILES[name], x, bias, residual, splits, tmp_path)
    decoded = weight.dequantize().double()
    exact = x.double() @ decoded.T + bias.double() + residual.double()
    summed = 1e-6 * (x.double().abs() @ decoded.abs().T)
    assert bool(((found.double() - exact).abs() <= exact.abs() * torch.finfo(native).eps / 2 + summed).all())


def test_kernels_are_known_by_the_rounds_of_outliers_that_their_slots_have_room_for() -> None:
    packing = Packing.of(get_scheme("int4", 128), "float16")
    problem = LinearProblem.of(packing, (8192, 8192), 16)
    config = choose_beside(problem, 2, H200)
    assert config is not None
    beside = dense.fused_source(packing, "float16", config, outliers=2)
    assert beside.name.endswith("_beside2") and beside.parameters["OUTLIERS"] == 2
    slots = sm90.tile_of(config).slots(4, packing.scale_row_bytes, H200)
    assert (config.weight_slots, config.x_slots) != (slots.weights, slots.x) or config.shared_bytes > 0
    for n in (1, 16, 64, 300, 4096):
        by_rows = replace(problem, n=n, scale_groups=0, scale_bytes=0)
        chosen = choose_beside(by_rows, 1, H200)
        assert chosen is not None and takes_outliers(chosen, 1, by_rows) and chosen.n_tile <= 128


# In the order of kernels


def _read(arranged: torch.Tensor, kept: Outliers, target: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return the matrix, in float64, that a kernel sees in arranged outliers, as it would walk through them."""
    (oc, ic), rounds = shape, rounds_of(kept, shape[1])
    units, blocks = -(-oc // 64), -(-ic // 128)
    kept_units, found = units + 2, torch.zeros(units * 64, blocks * 128, dtype=torch.float64)
    words = arranged.long() & 0xFFFFFFFF
    own, rest = words.split([kept_units * blocks * 64 * rounds, len(words) - kept_units * blocks * 64 * rounds])
    own = own.view(kept_units, blocks, 4, rounds, 4, 4)
    firsts, further = rest[: (kept_units + 4) // 4 * 4], rest[(kept_units + 4) // 4 * 4 :].view(-1, 4, 4)
    read = 0

    def add(one: torch.Tensor, row: int, column: int) -> bool:
        for lane, which, half in itertools.product(range(4), (0, 2), (0, 16)):
            number, place = (int(one[lane, which + i]) >> half & 0xFFFF for i in (0, 1))
            value = torch.tensor(number).to(torch.uint16).view(_DTYPES[target]).double()
            of_row, upper = place >> 7 & 7 | place >> 11 & 8, place >> 10 & 15
            assert upper in (0, 15)
            found[row + of_row, column + (upper & 1) * 64 + (place >> 1 & 63)] += value
        flags = {int(word) & 1 for word in one[:, 1]}
        assert len(flags) == 1
        return bool(flags.pop())

    for unit, block, rows in itertools.product(range(units), range(blocks), range(4)):
        assert rows or block or int(firsts[unit]) == read
        follows, turn = True, 0
        while follows:
            one = own[unit, block, rows, turn] if turn < rounds else further[read]
            if turn == rounds:  # the last of its own says where the others begin
                bits = [(int(p) >> 15 & 3 | int(p) >> 31 << 2, int(q)) for p, q in own[unit, block, rows, -1][:, 1::2]]
                parts = [p | (q & 1) << 3 | (q >> 15 & 3) << 4 | q >> 31 << 6 for p, q in bits]
                assert sum(part << 7 * i for i, part in enumerate(parts)) == read
            read += turn >= rounds
            follows, turn = add(one, unit * 64 + rows * 16, block * 128), turn + 1
    assert read == len(further) and all(int(first) == read for first in firsts[units : kept_units + 1])
    assert not own[units:].any()
    return found[:oc, :ic]


@pytest.mark.parametrize(
    ("oc", "ic", "share", "target", "places"),
    [
        (70, 300, "3%", "bfloat16", "random"),
        (130, 257, "10%", "float16", "first"),
        (64, 128, "0.5%", "float16", "column"),
        (37, 640, "5%", "bfloat16", "last"),
    ],
)
def test_arranged_outliers_are_all_that_a_kernel_finds(oc: int, ic: int, share: str, target: str, places: str) -> None:
    weight = _weight("int4", None, share, target, (oc, ic), places)
    kept, words = weight.scheme.outliers, weight.outliers
    assert kept is not None and words is not None and weight.arranged is not None
    exact = torch.zeros(oc, ic, dtype=torch.float64)
    exact.scatter_(1, outlier_columns(words), outlier_values(words, kept.dtype).double())
    assert torch.equal(_read(weight.arranged, kept, target, (oc, ic)), exact)


def test_a_block_has_rounds_for_most_of_what_stands_there_and_none_are_lost() -> None:
    shares = ("0.1%", "0.5%", "1%", "2%", "10%")
    assert [rounds_of(Outliers.parse(share, "float16"), 8192) for share in shares] == [1, 1, 2, 4, 8]
    of = Outliers.parse("0.5%", "float16")
    generator = torch.Generator().manual_seed(1)
    columns = torch.stack([torch.randperm(4096, generator=generator)[:20] for _ in range(512)])
    words = outlier_words(columns, torch.ones(512, 20, dtype=torch.float16))
    arranged = layouts.arrange(words, of, "float16", 4096)
    assert arranged is not None
    blocks = 512 // 16 * 4096 // 128
    further = (arranged.numel() - (512 // 64 + 2) * 32 * 64 - 12) / layouts.ROUND_WORDS
    assert 0 < further < 0.05 * blocks
    empty = layouts.arrange(torch.zeros(70, 3, dtype=torch.int32), of, "float16", 300)
    assert empty is not None and empty.shape == ((2 + 2) * 3 * 4 * rounds_of(of, 300) * 16 + 8,) and not empty.any()


def test_four_lanes_read_from_other_banks_nearly_always() -> None:
    """A lane reads a pair of channels in one of eight pieces of 16 bytes, whichever its token is: the pair counts."""
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(512, 4096, generator=generator).argsort(1)[:, :20]
    words = outlier_words(columns, torch.ones(512, 20, dtype=torch.float16))
    arranged = layouts.arrange(words, Outliers.parse("0.5%", "float16"), "float16", 4096)
    assert arranged is not None
    rounds = arranged[: 512 // 16 * 32 * layouts.ROUND_WORDS].view(-1, 4, 4).long()
    places = torch.stack([rounds[..., i] >> shift for i in (1, 3) for shift in (0, 16)], dim=1)  # of a load, by lanes
    pairs = (places >> 1 & 63) // 2 + (places >> 10 & 1) * 32
    same = [(pairs[:, :, i, None] % 4 == pairs % 4) & (pairs[:, :, i, None] != pairs) for i in range(4)]
    accesses = 1 + torch.stack([one.sum(dim=2) for one in same]).amax(dim=0)
    assert float(accesses.double().mean()) < 1.2


def test_outliers_that_a_dtype_of_activations_does_not_have_are_not_arranged_for_it() -> None:
    columns = torch.arange(4).repeat(3, 1)
    for value, kept, target in ((1e5, "bfloat16", "float16"), (1.0009765625, "float16", "bfloat16")):
        words = outlier_words(columns, torch.full((3, 4), value, dtype=_DTYPES[kept]))
        assert layouts.arrange(words, Outliers(5, kept), target, 80) is None
        assert layouts.arrange(words, Outliers(5, kept), kept, 80) is not None


def test_a_weight_has_them_arranged_in_the_layouts_of_kernels_alone() -> None:
    weight = _weight("int4", None, "2%", "float16", (130, 256), "random")
    stored = weight.to_layout("stream")
    assert stored.arranged is None and weight.arranged is not None and stored.outliers is weight.outliers
    assert weight.nbytes == weight.dense.nbytes + weight.arranged.nbytes + stored.outliers.nbytes
    part = weight.rows(64, 130)
    assert part.arranged is not None and weight.outliers is not None
    assert torch.equal(part.arranged, layouts.arrange(weight.outliers[64:], weight.scheme.outliers, "float16", 256))
    assert weight.to_layout(INT8_LAYOUT).arranged is None
