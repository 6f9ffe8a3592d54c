"""Tiles for the experts of a layer: how many blocks of tokens are expected, and which tiles that makes the best."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from tersor.formats import Activations
from tersor.hardware import CHIPS
from tersor.kernels.tune import experts as tune

CHIP = CHIPS["NVIDIA H200"]
QWEN3 = tune.ExpertsProblem(experts=128, oc=1536, ic=2048, tokens=1, top_k=8, bits=6)
"""Gate and up of Qwen3-30B-A3B."""


def down_of(up: tune.ExpertsProblem) -> tune.ExpertsProblem:
    """The second product of a layer."""
    return replace(up, oc=up.ic, ic=up.oc // 2)


@pytest.mark.parametrize(("tokens", "share", "width"), [(5, 0.3, 2), (9, 0.5, 4), (7, 0.05, 8), (12, 0.9, 1)])
def test_blocks_are_expected_as_often_as_they_come(tokens: int, share: float, width: int) -> None:
    chances = [math.comb(tokens, count) * share**count * (1 - share) ** (tokens - count) for count in range(tokens + 1)]
    blocks = sum(chance * -(-count // width) for count, chance in enumerate(chances))
    assert tune.expected_blocks(tokens, share, width) == pytest.approx((1 - chances[0], blocks))


def test_an_expert_of_all_tokens_has_as_many_blocks_as_they_fill() -> None:
    assert tune.expected_blocks(17, 1.0, 8) == (1.0, 3.0)
    assert tune.expected_blocks(100000, 0.5, 128) == pytest.approx((1.0, 50000 / 128 + 0.5))


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
    times = [tune.seconds(replace(QWEN3, tokens=tokens), tune.tiles(QWEN3)[0], CHIP) for tokens in (1, 4, 16, 64)]
    assert all(before < after for before, after in itertools.pairwise(times))
