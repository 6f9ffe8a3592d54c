"""How a launch with a mixed weight is planned: every block of every row set once, no CTA much longer than another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense
from tersor.kernels.tune import mixed as tune
from tersor.kernels.tune import sm90

H200 = CHIPS["NVIDIA H200"]
FLOATS = tuple((name, None) for name in ("fp4_e2m1", "fp5_e2m2", "fp6_e2m3", "int8"))
INTEGERS = (("uint4", 128), ("int8", None))


def problem(
    levels: tuple[tuple[str, int | None], ...],
    rows: tuple[int, ...],
    ic: int,
    n: int,
    activations: Activations = Activations.NATIVE,
) -> tune.MixedProblem:
    return tune.MixedProblem(
        levels=tuple(
            dense.problem_of(get_scheme(*level), (count, ic), n, activations=activations)
            for level, count in zip(levels, rows, strict=True)
        )
    )


def items(config: tune.MixedConfig, of: tune.MixedProblem) -> list[list[tuple[int, int, int, int]]]:
    """Return (level, tile, first block, last block) of every CTA's items: `Work` of mixed/sm90_work.cuh."""
    blocks, tile = -(-of.ic // 128), config.tile
    found = []
    before = 0
    for level, (share, one) in enumerate(zip(config.shares, of.levels, strict=True)):
        ctas, tiles = share.end - before, -(-one.oc // tile.rows) * -(-of.n // tile.tokens)
        before = share.end
        for cta in range(ctas):
            if config.splits > 1:
                least, more = divmod(blocks, config.splits)
                bounds = [part * least + min(part, more) for part in range(config.splits + 1)]
                found += [[(level, cta, bounds[part], bounds[part + 1])] for part in range(config.splits)]
                continue
            own = []
            left = (tiles - share.whole_tiles) * blocks
            start, stop = cta * left // ctas, (cta + 1) * left // ctas
            while start < stop:
                first, end = start % blocks, min(stop, (start // blocks + 1) * blocks)
                own.append((level, share.whole_tiles + start // blocks, first, first + end - start))
                start = end
            own += [(level, one, 0, blocks) for one in range(cta, share.whole_tiles, ctas)]
            found.append(own)
    return found


@pytest.mark.parametrize(
    ("levels", "percents", "activations"),
    [
        (FLOATS, (25, 25, 25, 25), Activations.NATIVE),
        (FLOATS, (1, 90, 9, 0), Activations.NATIVE),
        (INTEGERS, (90, 10), Activations.INT8),
    ],
)
def test_every_block_is_multiplied_once(
    levels: tuple[tuple[str, int | None], ...], percents: tuple[int, ...], activations: Activations
) -> None:
    kinds = set()
    for oc, ic in ((4096, 4096), (14336, 4096), (777, 1088)):
        rows = tuple(oc * share // 100 for share in percents)
        for n in (1, 33, 600):
            of = problem(levels, rows, ic, n, activations)
            chosen = tune.choose(of, H200)
            for config in (
                chosen,
                *tune.candidates(of, H200),
                tune.configured(of, chosen.tile, 29, 1, H200, deals=True),
            ):
                of_ctas = items(config, of)
                assert len(of_ctas) == config.ctas <= H200.sms * config.tile.resident
                covered = sorted(item for own in of_ctas for item in own)
                ends: dict[tuple[int, int], int] = {}
                for level, tile, first, last in covered:
                    assert first == ends.get((level, tile), 0) < last
                    ends[level, tile] = last
                tiles = [-(-count // config.tile.rows) * -(-n // config.tile.tokens) for count in rows]
                assert ends == {(i, tile): -(-ic // 128) for i, count in enumerate(tiles) for tile in range(count)}
                assert all(len([one for one in own if one[3] - one[2] < -(-ic // 128)]) <= 2 for own in of_ctas)
                parts = {place: sum(item[:2] == place for item in covered) for place in ends}
                assert config.splits > 1 or max(parts.values()) == config.parts
                kinds.add((config.splits > 1, config.dealt > 0))
    assert len(kinds) >= 3


def test_ctas_are_shared_by_what_row_sets_cost() -> None:
    """No CTA has more bytes than a third above the mean: a multiprocessor takes so much more than its share."""
    for n in (1, 16):
        of = problem(FLOATS, (3584,) * 4, 4096, n)
        config = tune.choose(of, H200)
        bits = [level.bits for level in of.levels]
        loads = [sum(bits[level] * (last - first) for level, _, first, last in own) for own in items(config, of)]
        assert max(loads) <= 1.34 * sum(loads) / H200.sms


def test_a_choice_is_that_of_the_predicted_times_and_near_the_best_of_all_tiles() -> None:
    for levels, rows, activations in (
        (FLOATS, (1024,) * 4, Activations.NATIVE),
        (INTEGERS, (3686, 410), Activations.INT8),
        (INTEGERS, (12902, 1434), Activations.INT8),
    ):
        for n in (1, 8, 16, 24, 32, 64, 128, 512, 2048):
            of = problem(levels, rows, 4096, n, activations)
            least = min(tune.seconds(of, config, H200) for config in tune.candidates(of, H200))
            assert tune.seconds(of, tune.choose(of, H200), H200) <= 1.12 * least, (rows, n)


def test_tiles_that_are_asked_for_are_those_of_every_number_of_tokens() -> None:
    of = problem(FLOATS, (700, 300, 20, 4), 2048, 300)
    asked = tune.asked(of, H200)
    assert {tune.choose(of.of_tokens(n), H200).tile for n in range(1, 301)} == set(asked)
    assert len(asked) <= 8


def test_levels_with_scales_in_groups_have_tiles_with_registers_for_them() -> None:
    grouped = problem((("uint3", 16), ("int8", None)), (64, 64), 512, 2048)
    assert {tile.tokens for tile in tune.tiles(grouped)} and max(tile.tokens for tile in tune.tiles(grouped)) <= 128
    assert all(tile in sm90.tiles(8) for tile in tune.tiles(grouped))


def test_no_row_set_waits_for_ctas_because_another_cannot_be_done_sooner() -> None:
    of = problem(INTEGERS, (12902, 1434), 4096, 16, Activations.INT8)
    config = tune.choose(of, H200)
    assert config.dealt == 0 and config.ctas == -(-12902 // config.tile.rows) - (-1434 // config.tile.rows)


def test_results_that_lie_apart_take_time_and_get_ctas() -> None:
    """Of a row set that is a tenth of all features, which a warp's stores are spread over."""
    found = []
    for n in (2048, 4096):
        apart = problem(INTEGERS, (12902, 1434), 4096, n, Activations.INT8)
        configs = [tune.choose(one, H200) for one in (apart, replace(apart, apart=False))]
        ctas = [config.shares[1].end - config.shares[0].end for config in configs]
        times = [tune.seconds(apart, configs[0], H200), tune.seconds(replace(apart, apart=False), configs[1], H200)]
        assert times[0] > times[1] and times[0] <= tune.seconds(apart, configs[1], H200)
        found.append((ctas, times[0] / times[1]))
    assert 1.02 < found[0][1] < 1.3 and found[1][0][0] > found[1][0][1]
