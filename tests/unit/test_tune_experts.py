"""Tiles for the experts of a layer: how many blocks of tokens are expected, and which tiles that makes the best."""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tersor.formats import Activations, Scheme, get_scheme
from tersor.hardware import CHIPS, Chip
from tersor.kernels.tune import experts as tune
from tersor.kernels.tune import experts_sm80, experts_sm90
from tersor.kernels.tune.forecast import GATHERED, experts_seconds
from tersor.layouts.packing import BYTEWISE, Packing

OLDER = CHIPS["NVIDIA A100"]
CHIP = CHIPS["NVIDIA H200"]
QWEN3 = tune.ExpertsProblem(experts=128, oc=1536, ic=2048, tokens=1, top_k=8, bits=6)
"""Gate and up of Qwen3-30B-A3B."""
BENCH = Path(__file__).resolve().parents[2] / "bench"
SWEEP = BENCH / "results" / "sweep_experts_h200.csv"


@pytest.fixture(name="sweep", scope="module")
def sweep_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep_experts", BENCH / "sweep_experts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def down_of(up: tune.ExpertsProblem) -> tune.ExpertsProblem:
    """The second product of a layer."""
    return replace(up, oc=up.ic, ic=up.oc // 2)


@pytest.mark.parametrize(("tokens", "share", "width"), [(5, 0.3, 2), (9, 0.5, 4), (7, 0.05, 8), (12, 0.9, 1)])
def test_blocks_are_expected_as_often_as_they_come(tokens: int, share: float, width: int) -> None:
    chances = [math.comb(tokens, count) * share**count * (1 - share) ** (tokens - count) for count in range(tokens + 1)]
    blocks = sum(chance * -(-count // width) for count, chance in enumerate(chances))
    found = tune.expected_blocks(tokens, share, width)
    assert found[:2] == pytest.approx((1 - chances[0], blocks))
    square = sum(chance * (-(-count // width)) ** 2 for count, chance in enumerate(chances))
    product = sum(chance * count * -(-count // width) for count, chance in enumerate(chances)) - blocks * tokens * share
    assert found.variance == pytest.approx(square - blocks**2 - product**2 / (tokens * share * (1 - share)), abs=1e-9)


def test_an_expert_of_all_tokens_has_as_many_blocks_as_they_fill() -> None:
    assert tune.expected_blocks(17, 1.0, 8) == (1.0, 3.0, 0.0)
    assert tune.expected_blocks(100000, 0.5, 128)[:2] == pytest.approx((1.0, 50000 / 128 + 127 / 256))


def test_tokens_that_all_experts_get_as_many_of_make_no_block_more_or_less() -> None:
    assert tune.expected_blocks(1, 1 / 16, 8)[1:] == pytest.approx((1 / 16, 0.0))
    assert tune.expected_blocks(8192, 1 / 16, 192)[1:] == pytest.approx((3.0, 0.0), abs=0.01)


def test_many_tokens_have_as_many_blocks_counted_one_by_one_and_by_a_normal_distribution() -> None:
    for width in (48, 112, 144):
        few, many = tune.expected_blocks(4096, 1 / 16, width), tune.expected_blocks(4100, 1 / 16, width)
        assert few[:2] == pytest.approx(many[:2], rel=0.005) and few.variance == pytest.approx(many.variance, abs=0.02)


@pytest.mark.parametrize("activations", list(Activations))
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_both_products_have_blocks_of_as_many_tokens_for_every_number_of_them(
    activations: Activations, batch_invariant: bool
) -> None:
    of = replace(QWEN3, activations=activations, batch_invariant=batch_invariant)
    for tokens in (1, 3, 8, 33, 64, 200, 512, 3000, 65536):
        up = replace(of, tokens=tokens)
        configs = tune.choose_pair(up, down_of(up), CHIP)
        assert configs[0].tile.tokens == configs[1].tile.tokens
        for config in configs:
            assert config.shared_bytes + config.tile.static_bytes <= CHIP.shared_bytes
            assert config.ctas == CHIP.sms * config.tile.resident
            assert (config.most_splits == 1) == batch_invariant and config.few_tokens * batch_invariant == 0
            assert config.floats == config.counters * config.most_splits * config.tile.rows * config.tile.tokens


def test_tiles_grow_with_the_tokens_of_an_expert() -> None:
    widths = [
        tune.choose_pair(up, down_of(up), CHIP)[0].tile.tokens
        for up in (replace(QWEN3, tokens=tokens) for tokens in (1, 8, 64, 512, 8192))
    ]
    assert widths == sorted(widths) and widths[0] == 8 and widths[-1] >= 96


def test_few_tokens_are_fetched_by_the_kernel_and_many_put_in_order() -> None:
    few, many = (tune.choose_pair(up, down_of(up), CHIP)[0] for up in (QWEN3, replace(QWEN3, tokens=4096)))
    assert few.gathers and not many.gathers


def test_more_experts_hit_take_longer() -> None:
    times = [tune.seconds(replace(QWEN3, tokens=tokens), tune.tiles(QWEN3)[0], CHIP, True) for tokens in (1, 4, 16, 64)]
    assert all(before < after for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_older_gpus_have_a_grid_for_every_routing_and_memory_for_what_is_split(batch_invariant: bool) -> None:
    of, split = replace(QWEN3, batch_invariant=batch_invariant), set()
    for tokens in (1, 3, 8, 33, 200, 3000, 1 << 20):
        up = replace(of, tokens=tokens)
        pair = tune.choose_pair(up, down_of(up), OLDER)
        assert pair[0].block_tokens == pair[1].block_tokens
        for config, problem in zip(pair, (up, down_of(up)), strict=True):
            assert isinstance(config, tune.Sm80ExpertsConfig)
            run, rows, runs = config.grid
            assert run <= 32 and rows * 128 >= problem.oc and runs % config.splits == 0 and runs < 1 << 16
            assert run * runs >= config.most_blocks * config.splits
            assert config.counters == (config.most_blocks * rows if config.splits > 1 else 0)
            assert config.floats == config.counters * config.splits * 128 * config.block_tokens <= 1 << 24
            split.add(config.splits > 1)
    assert split == ({False} if batch_invariant else {False, True})


def test_older_gpus_take_wider_tiles_for_more_tokens_of_an_expert() -> None:
    widths = [
        tune.choose_pair(up, down_of(up), OLDER)[0].block_tokens
        for up in (replace(QWEN3, tokens=tokens) for tokens in (1, 8, 64, 512, 8192))
    ]
    assert widths == sorted(widths) and widths[0] == 8 and widths[-1] >= 32


def test_every_tile_of_an_older_gpu_is_compiled_once_and_8_bit_activations_have_none() -> None:
    assert [config.block_tokens for config in tune.shapes(QWEN3, OLDER)] == list(experts_sm80.TILES)
    assert not tune.shapes(replace(QWEN3, activations=Activations.E4M3), OLDER)
    assert len(tune.shapes(QWEN3, CHIP)) == len(tune.tiles(QWEN3))


def test_splits_that_exchange_more_sums_take_longer_where_the_chip_is_full() -> None:
    full = replace(QWEN3, tokens=512)
    times = [experts_sm80.seconds(full, experts_sm80.config(full, 32, splits, OLDER), OLDER) for splits in (1, 2, 4)]
    assert times == sorted(times)


def test_the_device_splits_the_last_tiles_where_that_makes_the_last_wave_shorter() -> None:
    assert experts_sm90.splits(rest=44, slots=132, blocks=16, most=4) == 3  # 16, 12, 10.5, 9 + 5 blocks
    assert experts_sm90.splits(rest=44, slots=132, blocks=6, most=4) == 1  # an exchange takes as long as it saves
    assert experts_sm90.splits(rest=100, slots=132, blocks=16, most=2) == 1  # two waves of halves
    assert experts_sm90.splits(rest=0, slots=132, blocks=16, most=4) == 1
    header = resources.files("tersor.kernels") / "cuda" / "experts" / "sm90_work.cuh"
    exchange, part = experts_sm90.EXCHANGE_BLOCKS, experts_sm90.PART_BLOCKS
    assert f"kExchangeBlocks = {exchange}f, kPartBlocks = {part}f;" in header.read_text(encoding="utf-8")


@pytest.mark.parametrize("chip", [CHIP, OLDER], ids=lambda chip: chip.name)
def test_every_number_of_tokens_takes_tiles_that_choices_have(chip: Chip) -> None:
    most, known = replace(QWEN3, tokens=3000), set()
    for pair in tune.choices(most, down_of(most), chip):
        known.add(
            tuple(config.tile if isinstance(config, tune.ExpertsConfig) else config.block_tokens for config in pair)
        )
    for tokens in (1, 63, 65, 130, 777, 1000, 2999, 3000):
        up = replace(QWEN3, tokens=tokens)
        pair = tune.choose_pair(up, down_of(up), chip)
        tiles = (config.tile if isinstance(config, tune.ExpertsConfig) else config.block_tokens for config in pair)
        assert tuple(tiles) in known
    assert [tune.deciding(tokens) for tokens in (64, 65, 128, 129, 1000, 1025)] == [64, 72, 128, 144, 1024, 1152]


def test_what_the_choice_of_tiles_loses_by_the_kept_sweep(sweep: ModuleType) -> None:
    times = sweep.read([SWEEP])
    assert sum(len(timed) for cell in times.values() for timed in cell) == len(SWEEP.read_text().splitlines()) - 1
    losses = [sweep.loss(*cell, timed)[0] for cell, timed in times.items()]
    assert len(losses) == 56
    assert sum(losses) / len(losses) < 0.0075
    assert max(losses) < 0.056


def test_a_fit_makes_the_choice_lose_no_more(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {cell: timed for cell, timed in sweep.read([SWEEP]).items() if cell[1] in (32, 512)}
    wrong = replace(experts_sm90.CONSTANTS, row=0.0127, item=2.0)
    monkeypatch.setattr(experts_sm90, "CONSTANTS", wrong)
    monkeypatch.setattr(sweep, "GENERATIONS", 3)

    def lost() -> float:
        return sum(sweep.loss(*cell, timed)[0] for cell, timed in times.items())

    before = lost()
    sweep.report_fit(times, leave_out=False)
    assert experts_sm90.CONSTANTS is wrong, "a fit is printed, and changes nothing"
    assert "Constants(start=" in capsys.readouterr().out
    monkeypatch.setattr(experts_sm90, "CONSTANTS", sweep.fit(times))
    assert lost() < before


def test_a_judged_sweep_says_what_was_taken_and_what_was_best(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.judge({("olmoe", 4096): sweep.read([SWEEP])["olmoe", 4096]})
    said = capsys.readouterr().out
    assert "best 192x112k1r1 525.0, 192x112k1r1 257.0" in said
    assert "takes 128x176k1r1, 128x176k1r1, which were not timed" in said
    assert said.splitlines()[-1].startswith("mean loss ")


def mixture(*names: str, rows: tuple[int, ...], tokens: int, activations: Activations = Activations.NATIVE) -> Any:
    """The row sets of a mix of 64 experts, of which a token has 8."""
    target = BYTEWISE.get(activations, "float16")
    pairs = zip(names, rows, strict=True)
    return tuple(
        tune.ExpertsProblem.of(Packing.of(scheme_of(name), target), (64, count, 2048), tokens, 8, activations)
        for name, count in pairs
    )


def scheme_of(name: str) -> Scheme:
    return get_scheme(name, 128) if name == "uint4" else get_scheme(name)


@pytest.mark.parametrize("tokens", [1, 16, 300, 8192])
@pytest.mark.parametrize("activations", [Activations.NATIVE, Activations.INT8])
def test_row_sets_of_one_launch_have_one_tile_and_ctas_by_what_they_cost(tokens: int, activations: Activations) -> None:
    ups = mixture("uint4", "int8", rows=(1843, 205), tokens=tokens, activations=activations)
    downs = mixture("uint4", "int8", rows=(900, 124), tokens=tokens, activations=activations)
    chosen = tune.choose_sets(ups, downs, CHIP)
    for problems, configs in zip((ups, downs), chosen, strict=True):
        assert tune.together(problems, CHIP) and len({config.tile for config in configs}) == 1
        assert configs[0].tile in tune.common_tiles(problems)
        many, few = tune.counts(problems, configs[0].tile, CHIP, problems is ups)
        assert many + few == configs[0].ctas and many >= few > 0, "nine of ten rows, of half as many bits"
    assert len({config.tile.tokens for configs in chosen for config in configs}) == 1
    apart = sum(tune.predicted_seconds((up,), (down,), CHIP) for up, down in zip(ups, downs, strict=True))
    assert 0.5 * apart < experts_seconds(ups, downs, CHIP) < 1.1 * (apart + 2 * GATHERED), "nothing is gathered"


def test_row_sets_are_launches_of_their_own_elsewhere() -> None:
    sets = mixture("uint4", "int8", rows=(128, 128), tokens=4)
    assert tune.together(sets, CHIP) and not tune.together(sets[:1], CHIP)
    assert not tune.together(sets, OLDER)
    assert not tune.together(tuple(replace(one, batch_invariant=True) for one in sets), CHIP)
    tiny = tuple(replace(one, oc=1) for one in sets * 4)
    config = tune.config(tiny[0], tune.common_tiles(tiny)[0], CHIP)
    ctas = tune.counts(tiny, config.tile, CHIP, False)
    assert min(ctas) > 0 and sum(ctas) == config.ctas
