"""Tile choice: pure functions with exact expectations, and what must hold for any problem."""

from __future__ import annotations

import pytest

from tersor.hardware import CHIPS
from tersor.kernels import tune
from tersor.kernels.tune import LinearProblem, choose
from tersor.kernels.tune.linear import stage_bytes, stages

H200 = CHIPS["NVIDIA H200"]


@pytest.mark.parametrize(
    ("oc", "ic", "n", "splits"),
    [
        (8192, 8192, 1, 4),
        (8192, 8192, 16, 4),
        (57344, 8192, 1, 5),
        (4096, 4096, 1, 8),
        (4096, 14336, 1, 8),
        (10240, 8192, 1, 3),
        (8192, 8192, 64, 4),
        (256, 256, 1, 2),
    ],
)
def test_choices_on_an_h200(oc: int, ic: int, n: int, splits: int) -> None:
    config = choose(LinearProblem(oc=oc, ic=ic, n=n, bits=6), H200)
    assert config.splits == splits
    assert config.row_tiles == oc // 128


def test_the_smallest_tile_that_holds_the_tokens() -> None:
    assert [tune.n_tile(n) for n in (1, 8, 9, 16, 17, 32, 33, 64)] == [8, 8, 16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize("chip", list(CHIPS.values()), ids=lambda chip: chip.name)
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 8])
def test_rings_fit_every_chip(chip: object, groups: int) -> None:
    for bits in range(1, 9):
        for tile in (8, 16, 32, 64):
            depth, resident = stages(tile, bits, groups, chip)
            used = depth * stage_bytes(tile, bits, groups)
            assert depth >= 2
            assert used <= chip.shared_bytes
            assert resident * (used + 1024) <= chip.shared_bytes + 1024
            assert used >= tile * 132 * 4


def test_no_split_is_empty() -> None:
    for ic in (1, 128, 129, 1000, 4096):
        for oc in (1, 200, 5000):
            config = choose(LinearProblem(oc=oc, ic=ic, n=3, bits=6), H200)
            assert 1 <= config.splits <= -(-ic // 128)
    assert "8 tokens" not in str(config)
    assert str(config).startswith("n_tile 8, 4 stages, grid 40 x")
