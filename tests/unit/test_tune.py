"""Tile choice: pure functions with exact expectations, and what must hold for any problem."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tersor import formats
from tersor.formats import Activations
from tersor.hardware import CHIPS, Chip
from tersor.kernels import dense as family
from tersor.kernels.tune import (
    LinearConfig,
    LinearProblem,
    candidates,
    choose,
    cost,
    fused,
    predict,
    seconds,
    sm80,
    sm90,
)
from tersor.layouts.packing import Packing

H200 = CHIPS["NVIDIA H200"]
A100 = CHIPS["NVIDIA A100"]
ALL_CHIPS = list(CHIPS.values())
MULTIPLIED = {
    Activations.NATIVE: formats.get_scheme("fp6_e3m2"),
    Activations.E4M3: formats.get_scheme("fp6_e3m2"),
    Activations.INT8: formats.get_scheme("int6"),
    Activations.INT8_GROUPS: formats.get_scheme("int6"),
}
SCHEMES = [formats.get_scheme(name, group) for name, group in (("fp6_e3m2", None), ("int3", 16), ("uint8", 128))]


def problem_of(oc: int, ic: int, n: int, scheme: formats.Scheme = SCHEMES[0], aligned: bool = True) -> LinearProblem:
    """The problem of a weight [oc, ic] and n tokens."""
    return family.problem_of(scheme, (oc, ic), n, aligned=aligned)


TOKENS = (1, 16, 64, 128, 200, 256, 1024, 4096)
ON_AN_H200 = {
    (10240, 8192): (
        (8, 3, 1, 1, 1, 0, 2, 108),
        (16, 3, 1, 1, 1, 0, 2, 108),
        (64, 3, 1, 1, 1, 0, 2, 108),
        (128, 3, 1, 1, 1, 0, 2, 108),
        (112, 2, 1, 1, 1, 132, 4, 132),
        (128, 2, 1, 1, 1, 132, 4, 132),
        (128, 2, 1, 1, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
    (8192, 8192): (
        (8, 1, 4, 1, 1, 0, 1, 128),
        (16, 2, 2, 1, 1, 0, 2, 128),
        (64, 2, 1, 1, 1, 0, 2, 128),
        (128, 2, 1, 1, 1, 0, 2, 128),
        (112, 2, 1, 1, 1, 0, 1, 128),
        (128, 2, 1, 1, 1, 0, 1, 128),
        (256, 2, 1, 2, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
    (57344, 8192): (
        (8, 1, 4, 1, 1, 0, 1, 132),
        (16, 3, 1, 1, 1, 264, 3, 132),
        (64, 3, 1, 1, 1, 264, 3, 132),
        (128, 2, 1, 1, 1, 396, 2, 132),
        (208, 2, 1, 1, 1, 396, 2, 132),
        (256, 2, 1, 2, 1, 198, 2, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 3564, 3, 132),
    ),
    (8192, 28672): (
        (8, 1, 4, 1, 1, 0, 1, 128),
        (16, 2, 2, 1, 1, 0, 2, 128),
        (64, 2, 1, 1, 1, 0, 2, 128),
        (128, 2, 1, 1, 1, 0, 2, 128),
        (208, 2, 1, 1, 1, 0, 2, 128),
        (128, 2, 1, 1, 1, 0, 1, 128),
        (256, 2, 1, 2, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
    (6144, 4096): (
        (8, 1, 2, 1, 2, 0, 2, 192),
        (16, 2, 2, 1, 1, 0, 2, 96),
        (64, 1, 1, 1, 2, 0, 2, 192),
        (128, 2, 1, 1, 1, 0, 2, 96),
        (112, 3, 1, 1, 1, 0, 2, 128),
        (128, 3, 1, 1, 1, 0, 2, 128),
        (128, 3, 1, 1, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
    (4096, 4096): (
        (8, 1, 4, 1, 1, 0, 2, 128),
        (16, 1, 4, 1, 1, 0, 2, 128),
        (64, 1, 1, 1, 2, 0, 3, 192),
        (64, 2, 1, 1, 1, 0, 2, 128),
        (112, 1, 1, 1, 2, 0, 2, 256),
        (128, 2, 1, 1, 1, 0, 2, 128),
        (256, 2, 1, 2, 1, 0, 1, 128),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
    (28672, 4096): (
        (8, 1, 2, 1, 2, 0, 1, 264),
        (16, 2, 1, 1, 2, 0, 1, 224),
        (64, 2, 1, 1, 1, 0, 1, 132),
        (128, 2, 1, 1, 1, 0, 1, 132),
        (208, 2, 1, 1, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 0, 1, 132),
        (256, 2, 1, 2, 1, 1782, 4, 132),
    ),
    (4096, 14336): (
        (8, 1, 4, 1, 1, 0, 2, 128),
        (16, 1, 4, 1, 1, 0, 2, 128),
        (64, 2, 1, 1, 1, 0, 4, 128),
        (64, 2, 1, 1, 1, 0, 2, 128),
        (112, 2, 1, 1, 1, 0, 2, 128),
        (128, 2, 1, 1, 1, 0, 2, 128),
        (256, 2, 1, 2, 1, 0, 1, 128),
        (256, 2, 1, 2, 1, 0, 1, 132),
    ),
}
"""(OC, IC) -> for each of TOKENS, 6-bit weights: n_tile, row_groups, channel_groups, cluster, resident, whole_tiles,
splits, ctas."""


@pytest.mark.parametrize(("oc", "ic"), ON_AN_H200)
def test_choices_on_an_h200(oc: int, ic: int) -> None:
    for n, expected in zip(TOKENS, ON_AN_H200[oc, ic], strict=True):
        config = choose(problem_of(oc, ic, n), H200)
        tile = (config.n_tile, config.row_groups, config.channel_groups, config.cluster, config.resident)
        assert (config.schedule, *tile, config.whole_tiles, config.splits, config.ctas) == ("sm90", *expected), n
        assert config.token_tiles == -(-n // config.n_tile)
        width = 64 * config.row_groups * config.cluster
        assert config.row_tiles == -(-oc // width) * config.cluster


@pytest.mark.parametrize(
    ("n", "n_tile"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 48), (48, 48), (49, 64), (64, 64)],
)
def test_the_smallest_tile_that_holds_the_tokens(n: int, n_tile: int) -> None:
    assert choose(problem_of(8192, 8192, n), H200).n_tile == n_tile
    assert {config.n_tile for config in sm90.candidates(problem_of(8192, 8192, n), H200)} == {n_tile}


@pytest.mark.parametrize("n", (1, 8, 9, 16, 17, 32, 33, 64))
def test_the_smallest_tile_of_the_sm80_schedule(n: int) -> None:
    n_tile = max(8, 1 << (n - 1).bit_length())
    assert choose(problem_of(8192, 8192, n), A100).n_tile == n_tile
    assert {config.n_tile for config in candidates(problem_of(8192, 8192, n), A100)} == {n_tile}


@pytest.mark.parametrize(
    ("n", "widths"),
    [
        (65, {64, 80}),
        (129, {64, 80, 144}),
        (200, {64, 80, 112, 208, 256}),
        (333, {96, 112, 176, 256}),
        (5000, {128, 192, 256}),
    ],
)
def test_tiles_fit_the_tokens(n: int, widths: set[int]) -> None:
    """As many tiles as could make sense, each the narrowest that so many hold all tokens with."""
    assert {config.n_tile for config in candidates(problem_of(8192, 8192, n), H200)} == widths


@pytest.mark.parametrize("activations", list(Activations))
@pytest.mark.parametrize("groups", [0, 1, 4])
def test_every_number_of_tokens_has_tiles_and_few_of_them(groups: int, activations: Activations) -> None:
    available = sm90.tiles(groups, activations)
    holding = sorted({tile.tokens for tile in available})
    for n in range(1, 4097):
        found = sm90.fitting(available, n)
        assert 1 <= len(found) <= 20
        assert len(set(found)) == len(found)
        narrowest = next((tokens for tokens in holding if n <= tokens), holding[-1])
        assert max(tile.tokens for tile in found) <= 1.25 * narrowest
        assert n > sm90.MANY_TOKENS or min(-(-n // tile.tokens) for tile in found) == -(-n // narrowest)
        for tile in found:
            assert tile.tokens >= min(64, narrowest)
            assert n <= sm90.MANY_TOKENS or tile.tokens % sm90.WIDE_STEP == 0


@pytest.mark.parametrize("activations", list(Activations))
def test_every_number_of_tokens_has_a_batch_invariant_configuration(activations: Activations) -> None:
    problem = family.problem_of(MULTIPLIED[activations], (2560, 4096), 1, activations=activations, batch_invariant=True)
    found = [set(sm90.candidates(replace(problem, n=n), H200)) for n in (*range(1, 321, 8), 500, 1000, 2049, 5000)]
    assert all(found)
    configs = set[LinearConfig]().union(*found)
    assert not any(sm90.tile_of(config).fast_sums for config in configs)
    assert len({config.splits for config in configs}) == len({config.few_tokens for config in configs}) == 1


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("activations", list(Activations))
def test_what_is_predicted_is_the_first_candidate_of_the_least_time(activations: Activations, invariant: bool) -> None:
    for shape, n in (((6144, 4096), 7), ((28672, 4096), 300), ((4096, 14336), 1008), ((256, 512), 8192)):
        problem = family.problem_of(
            MULTIPLIED[activations], shape, n, activations=activations, batch_invariant=invariant
        )
        options = list(sm90.candidates(problem, H200))
        best = min(options, key=lambda config: seconds(problem, config, H200))
        assert predict(problem, H200) == best
    assert sm90.predict(replace(problem, aligned=False), H200) is None


def test_a_step_of_tokens_shares_its_choice_and_fills_the_same_tiles() -> None:
    problem, chosen = problem_of(8192, 8192, 1), set()
    for n in range(1, 4097):
        config = choose(replace(problem, n=n), H200)
        assert config.token_tiles == -(-n // config.n_tile), n
        assert n <= sm90.MANY_TOKENS or config == choose(replace(problem, n=-(-n // 64) * 64), H200)
        chosen.add(config)
    assert len(chosen) < 100


def test_who_is_fused() -> None:
    few, many = (problem_of(64, 64, n) for n in (64, 65))
    assert fused(few, A100)
    assert not fused(many, A100)
    assert fused(many, H200)
    assert not fused(problem_of(64, 60, 65, aligned=False), H200)
    assert choose(problem_of(9999, 9999, 5, aligned=False), H200).schedule == "sm80"
    assert choose(problem_of(9999, 9999, 5), A100).schedule == "sm80"


def test_scales_in_groups_keep_two_sets_of_sums() -> None:
    scheme = formats.get_scheme("fp6_e3m2", 128)
    for n in (65, 1000, 8192):
        assert choose(problem_of(8192, 8192, n, scheme), H200).n_tile <= 128
    for activations in Activations:
        narrow = {tile for tile in sm90.tiles(1, activations) if tile.tokens <= 128}
        by_rows = set(sm90.tiles(0, activations))
        assert narrow < by_rows
        for tile in by_rows:  # registers that are left beside two sets of sums
            assert (tile.tokens <= 128 and tile.registers - tile.tokens >= 64) == (tile in narrow), tile
    registers = {tile: tile.registers for tile in sm90.tiles(0)}
    assert registers[sm90.Tile(256, 2, 1, 2, 1)] == 224
    assert registers[sm90.Tile(128, 3, 1, 1, 1)] == 152
    assert registers[sm90.Tile(64, 1, 1, 1, 2)] == 216


def test_more_than_128_tokens_are_multiplied_in_pieces_where_scales_are_in_groups() -> None:
    """For one scale of a row in a block, or of a token."""
    wide = {(count, kind): {tile.tokens for tile in sm90.tiles(count, kind) if tile.in_pieces and tile.tokens > 128}
            for count in (1, 2) for kind in Activations}  # fmt: skip
    some = {160, 192, 224, 256}
    assert wide == {key: set() for key in wide} | {
        (1, Activations.E4M3): some,
        (1, Activations.INT8): some,
        (1, Activations.INT8_GROUPS): {256},
    }


def test_the_kernel_of_a_tile_knows_whether_it_multiplies_pieces() -> None:
    found = set()
    cases = (("uint6", 128, 256), ("uint6", 128, 128), ("uint6", None, 256), ("uint6", 32, 256), ("uint4", 128, 256))
    for name, size, tokens in cases:
        packing = Packing.of(formats.get_scheme(name, size), "int8")
        one = sm90.Tile(tokens, 2, 1, 1, 1, Activations.INT8)
        source = family.sm90_source(packing, "float16", one, one.slots(6, 0, H200), 0)
        if source.parameters["PIECES"]:
            found.add((name, size, tokens))
    assert found == {("uint6", 128, 256)}, "of whole rows, by one scale or by ratios, no sum of a block is scaled"


@pytest.mark.parametrize("chip", ALL_CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 8])
def test_rings_fit_every_chip(chip: Chip, groups: int) -> None:
    """Scales of 4 bytes and zero points of 2 in each group are the most there is."""
    scale_bytes = 6 * groups
    for bits in range(1, 9):
        for tokens in sm80.TILES:
            depth, resident = sm80.stages(tokens, bits, scale_bytes, chip)
            used = depth * sm80.stage_bytes(tokens, bits, scale_bytes)
            assert depth >= 2
            assert resident * (used + 1024) <= chip.shared_bytes + 1024
            assert used + 128 <= chip.shared_bytes, "a launch with all of a chip's memory leaves the kernel's flag none"
            assert used >= tokens * 132 * 4
        bytewise = sm90.tiles(groups, Activations.E4M3) if groups <= 4 else ()
        for tile in (*sm90.tiles(groups), *bytewise) if chip.capability == (9, 0) else ():
            weight_slots, x_slots, gather_room = tile.slots(bits, scale_bytes, chip)
            used = tile.shared_bytes(bits, scale_bytes, chip)
            assert used == (
                weight_slots * tile.weight_slot_bytes(bits, scale_bytes)
                + x_slots * tile.x_slot_bytes
                + tile.exchange_bytes
                + gather_room * tile.part_bytes
            )
            assert 0 <= gather_room <= tile.gathered - 1
            rings = used - tile.exchange_bytes - gather_room * tile.part_bytes
            assert (tile.gathered - 1) * tile.part_bytes <= rings  # where parts without room go
            assert weight_slots == x_slots or not tile.few
            assert tile.resident * (used + tile.static_bytes + 1024) <= chip.shared_bytes + 1024, (tile, bits)
            assert weight_slots % tile.turns == x_slots % (tile.turns * tile.x_slots_of_block) == 0
            least = tile.turns * (1 if groups == 8 and tile.turns > 2 else 2)
            assert least <= weight_slots <= 16
            assert least * tile.x_slots_of_block <= x_slots <= 16
            # two barriers of 8 bytes a slot, two more, a flag, and the scales of 8-bit activations
            assert 16 * (weight_slots + x_slots + 1) + 8 + 4 * tile.bytewise * tile.tokens <= tile.static_bytes
            assert tile.weight_slot_bytes(bits, scale_bytes) % 16 == tile.x_slot_bytes % 1024 == 0
            assert tile.threads <= 1024


def check(problem: LinearProblem, config: LinearConfig, chip: Chip) -> None:
    """What holds for every configuration of a problem."""
    blocks = -(-problem.ic // 128)
    tiles_of_cluster = config.token_tiles * config.row_tiles // config.cluster
    rest = tiles_of_cluster - config.whole_tiles
    assert 1 <= config.splits <= blocks
    assert 0 <= config.whole_tiles <= tiles_of_cluster
    assert config.row_tiles % config.cluster == config.ctas % config.cluster == 0
    assert config.row_tiles * config.row_groups * 64 >= problem.oc
    assert config.token_tiles * config.n_tile >= problem.n > (config.token_tiles - 1) * config.n_tile
    if config.splits > 1:
        assert rest > 0
    assert 1 <= config.ctas // config.cluster <= config.whole_tiles + rest * config.splits
    assert config.shared_bytes <= chip.shared_bytes
    assert seconds(problem, config, chip) > 0
    if config.schedule == "sm90":
        assert config.ctas <= chip.sms * config.resident
        rows, tile = sm90.box_rows(config, problem.n), sm90.tile_of(config)
        assert 1 <= rows <= min(problem.n, 256)
        boxes = max(1, config.cluster * tile.x_slots_of_block // (1 if tile.bytewise else 2))
        tokens = boxes * rows  # of a tile
        assert tokens <= tile.tokens
        assert boxes == 1 or rows % 8 == 0 or rows == problem.n
        assert (config.token_tiles - 1) * tokens < problem.n <= config.token_tiles * tokens, "none is empty"
    else:
        assert config.ctas == config.row_tiles * config.splits


@pytest.mark.parametrize("chip", ALL_CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_what_holds_for_any_problem(chip: Chip, scheme: formats.Scheme) -> None:
    warmed = set(family.sources(Packing.of(scheme, "float16"), chip))
    for ic in (1, 128, 136, 1000, 4096, 28672):
        for oc in (1, 64, 200, 5000, 57344):
            for n in (1, 9, 20, 64, 65, 100, 129, 500, 5000):
                for aligned in (True, False):
                    problem = problem_of(oc, ic, n, scheme, aligned)
                    options = candidates(problem, chip)
                    assert bool(options) == fused(problem, chip)
                    assert len(set(options)) == len(options)
                    for config in options:
                        check(problem, config, chip)
                    if options:
                        choice = predict(problem, chip)
                        assert choice in options
                        assert family.fused_source(Packing.of(scheme, "float16"), "float16", choice) in warmed


def test_every_candidate_has_a_kernel_that_is_warmed() -> None:
    for scheme in SCHEMES:
        warmed = set(family.sources(Packing.of(scheme, "bfloat16"), H200))
        for n in (1, 16, 32, 64, 100, 300):
            for config in candidates(problem_of(3000, 4096, n, scheme), H200):
                assert family.fused_source(Packing.of(scheme, "bfloat16"), "bfloat16", config) in warmed


def test_one_multiprocessor_takes_no_more_than_its_share_of_the_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 132; where one has two CTAs the others wait for it, though together they could read faster."""
    tile, times = sm90.Tile(8, 2, 1, 1, 2), []
    costs = cost.of(H200.name)
    monkeypatch.setitem(costs, tile, replace(costs[tile], block=0.0, lonely=0.0))
    for ctas in (66, 132, 133, 264):
        problem = problem_of(tile.rows * ctas, 8192, 1, SCHEMES[2])
        config = sm90.config(problem, tile, 0, 1, ctas, H200)
        times.append(seconds(problem, config, H200) * 1e6 - costs[tile].start)
    assert [time / times[-1] for time in times] == pytest.approx([0.5 / 1.4, 0.5, 1 / 1.4, 1])


def test_a_choice_reads_as_a_sentence() -> None:
    assert str(choose(problem_of(4096, 4096, 3), H200)) == (
        "sm90 schedule, tiles of 64 rows and 8 tokens, 64 tiles, 2 splits in clusters, 128 CTAs, 138 KiB shared"
    )
    assert str(choose(problem_of(5000, 4096, 3), A100)).startswith("sm80 schedule, tiles of 128 rows and 8 tokens, 40")
