"""Tile choice: pure functions with exact expectations, and what must hold for any problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tersor.hardware import CHIPS, Chip
from tersor.kernels.tune import LinearProblem, choose, fused, table
from tersor.kernels.tune import linear as tuning

H200 = CHIPS["NVIDIA H200"]
A100 = CHIPS["NVIDIA A100"]


@pytest.fixture(autouse=True)
def only_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No measured choices: neither the user's nor those that are shipped."""
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(table, "SHIPPED", tmp_path)
    table.forget()
    yield
    table.forget()


@pytest.mark.parametrize(
    ("oc", "ic", "n", "schedule", "n_tile", "splits"),
    [
        (8192, 8192, 1, "sm80", 8, 4),
        (4096, 4096, 1, "sm80", 8, 8),
        (57344, 8192, 1, "sm90", 8, 2),
        (8192, 8192, 16, "sm90", 16, 2),
        (10240, 8192, 16, "sm90", 16, 3),
        (4096, 14336, 16, "sm90", 16, 4),
        (4096, 4096, 16, "sm90", 16, 4),
        (8192, 8192, 64, "sm90", 64, 2),
        (8192, 8192, 256, "sm90", 128, 1),
        (57344, 8192, 256, "sm90", 128, 1),
        (8192, 8192, 1024, "sm90", 256, 1),
        (57344, 8192, 4096, "sm90", 256, 1),
        (256, 256, 1, "sm80", 8, 2),
    ],
)
def test_choices_on_an_h200(oc: int, ic: int, n: int, schedule: str, n_tile: int, splits: int) -> None:
    config = choose(LinearProblem(oc=oc, ic=ic, n=n, bits=6), H200)
    assert (config.schedule, config.n_tile, config.splits) == (schedule, n_tile, splits)
    assert config.row_tiles == -(-oc // 128)
    assert config.token_tiles == -(-n // n_tile)


@pytest.mark.parametrize(("n", "n_tile"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_the_smallest_tile_that_holds_the_tokens(n: int, n_tile: int) -> None:
    for chip in (H200, A100):
        assert choose(LinearProblem(oc=8192, ic=8192, n=n, bits=6), chip).n_tile == n_tile


def test_who_is_fused() -> None:
    few, many = (LinearProblem(oc=64, ic=64, n=n, bits=6) for n in (64, 65))
    crooked = LinearProblem(oc=64, ic=60, n=65, bits=6, aligned=False)
    assert fused(few, A100)
    assert not fused(many, A100)
    assert fused(many, H200)
    assert not fused(crooked, H200)
    assert choose(LinearProblem(oc=9999, ic=9999, n=5, bits=6, aligned=False), H200).schedule == "sm80"


def test_scales_in_groups_keep_two_sets_of_sums() -> None:
    for n in (65, 1000, 8192):
        config = choose(LinearProblem(oc=8192, ic=8192, n=n, bits=6, scale_groups=1), H200)
        assert config.n_tile == 64
        assert config.token_tiles == -(-n // 64)


@pytest.mark.parametrize("chip", list(CHIPS.values()), ids=lambda chip: chip.name)
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 8])
def test_rings_fit_every_chip(chip: Chip, groups: int) -> None:
    for bits in range(1, 9):
        for tile in tuning.SM80_TILES:
            depth, resident = tuning.sm80_stages(tile, bits, 6 * groups, chip)
            used = depth * tuning.sm80_stage_bytes(tile, bits, 6 * groups)
            assert depth >= 2
            assert resident * (used + 1024) <= chip.shared_bytes + 1024
            assert used >= tile * 132 * 4
        for tile in tuning.sm90_tiles(groups) if chip.capability == (9, 0) else ():
            slot = tuning.sm90_stage_bytes(tile, bits, 6 * groups)
            assert slot % 1024 == 0
            for resident in tuning.SM90_RESIDENT[tile]:
                depth = tuning.sm90_stages(tile, resident, bits, 6 * groups, chip)
                assert depth >= 2
                assert resident * (depth * slot + 2048) <= chip.shared_bytes + 1024


def test_no_split_is_empty() -> None:
    for ic in (1, 128, 129, 1000, 4096):
        for oc in (1, 200, 5000):
            for n in (3, 20, 500):
                config = choose(LinearProblem(oc=oc, ic=ic, n=n, bits=6), H200)
                assert 1 <= config.splits <= -(-ic // 128)
    assert str(choose(LinearProblem(oc=5000, ic=4096, n=3, bits=6), H200)).startswith("sm80 schedule, 8 tokens, 4")
