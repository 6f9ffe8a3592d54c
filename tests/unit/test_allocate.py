"""A budget of true bytes is spent where it saves most, against every choice there is, and what units cost is said."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from tersor.compress.allocate import allocate, allocate_by_count
from tersor.compress.allocation import INDEX_BYTES, Floats, Fused, feasible, row_bytes
from tersor.errors import FormatError, InputError, ShapeError
from tersor.formats import get_scheme

LEVELS = [get_scheme("uint3", 32), get_scheme("uint4", 32), get_scheme("fp5_e2m2"), get_scheme("int8", 32)]


def falling(rows: int, seed: int, levels: int = len(LEVELS)) -> Floats:
    """Return losses [levels, rows] that fall about four times a level, of features of very different weight."""
    random = np.random.default_rng(seed)
    losses = random.lognormal(0, 2, rows) * random.uniform(0.1, 0.5, (levels, rows)).cumprod(axis=0)
    return np.asarray(losses)


def every_choice(layers: list[Fused]) -> list[tuple[int, float]]:
    """Return bytes and loss of every way to choose, feature by feature."""
    tables = [
        [(int(row_bytes(LEVELS, layer.ic)[level]), float(loss[level, row])) for level in range(len(LEVELS))]
        for layer in layers
        for loss in layer.losses.values()
        for row in range(loss.shape[1])
    ]
    fixed = INDEX_BYTES * len(tables)
    return [
        (fixed + sum(one[0] for one in choice), sum(one[1] for one in choice)) for choice in itertools.product(*tables)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_of_as_many_bytes_loses_less(seed: int) -> None:
    layers = [Fused({"a": falling(3, seed)}, 64), Fused({"b": falling(3, seed + 9)}, 160)]
    choices = every_choice(layers)
    low, high = feasible(layers, LEVELS, unit=1)
    largest_move = int(row_bytes(LEVELS, 160).max())
    met = 0
    for budget in np.linspace(low, high, 25).astype(int).tolist():
        found = allocate(layers, LEVELS, budget, unit=1)
        assert low <= found.nbytes <= budget and found.padding == 0
        best = min(loss for nbytes, loss in choices if nbytes <= budget)
        coarser = min(loss for nbytes, loss in choices if nbytes <= max(low, budget - largest_move))
        assert best * (1 - 1e-9) <= found.loss <= coarser * (1 + 1e-9)
        met += found.loss <= best * (1 + 1e-9)
        exact = allocate(layers, LEVELS, found.nbytes, unit=1)
        assert exact.loss == pytest.approx(found.loss)
    assert met >= 12  # budgets between two corners of the hull are spent by later moves that fit


def test_a_level_that_is_larger_and_worse_is_given_to_nobody() -> None:
    losses = falling(64, 3)
    losses[2] = losses[1] * 1.01
    found = allocate([Fused({"a": losses}, 64)], LEVELS, 64 * 50, unit=1)
    assert {0, 1, 3} == set(found.chosen["a"].tolist())


def test_blocks_are_units_of_rows_and_cost_what_they_cost() -> None:
    layers = [
        Fused({"q": falling(192, 1), "k": falling(64, 2), "v": falling(64, 3)}, 128),
        Fused({"o": falling(100, 4)}, 192),
    ]
    low, high = feasible(layers, LEVELS)
    found = allocate(layers, LEVELS, (2 * low + high) // 3)
    together = np.concatenate([found.chosen[name] for name in "qkv"])
    assert all(count % 64 == 0 for count in np.bincount(together, minlength=4))
    assert sorted(np.bincount(found.chosen["o"], minlength=4) % 64)[-1] == 36  # 100 rows are a unit and 36 more
    row = row_bytes(LEVELS, 192)
    short = int(np.flatnonzero(np.bincount(found.chosen["o"], minlength=4) % 64)[0])
    assert found.padding == 28 * row[short]
    assert found.nbytes <= (2 * low + high) // 3
    assert found.free_loss < found.loss < 2 * found.free_loss


def test_gate_and_up_of_a_channel_have_one_level() -> None:
    layers = [Fused({"gate": falling(96, 5), "up": falling(96, 6)}, 128, paired=True)]
    low, high = feasible(layers, LEVELS)
    found = allocate(layers, LEVELS, (low + high) // 2)
    assert np.array_equal(found.chosen["gate"], found.chosen["up"])
    assert all(count % 32 == 0 for count in np.bincount(found.chosen["up"], minlength=4))
    apart = allocate([Fused(layers[0].losses, 128)], LEVELS, (low + high) // 2)
    assert found.free_loss == pytest.approx(apart.free_loss) == apart.pairs_loss
    assert found.free_loss < found.pairs_loss < found.loss


def test_a_budget_outside_of_what_levels_take_is_refused_with_the_range() -> None:
    layers = [Fused({"a": falling(64, 0)}, 128)]
    low, high = feasible(layers, LEVELS)
    for budget, word in ((low - 1, "below"), (high + 1, "above")):
        with pytest.raises(
            InputError,
            match=f"{word} what the .* levels take: feasible are 3.904e-06 to 8.768e-06 GB, 3.813 to 8.562 bits",
        ):
            allocate(layers, LEVELS, budget)
    assert allocate(layers, LEVELS, low).bits == pytest.approx(3.8125)
    assert allocate(layers, LEVELS, high).loss == pytest.approx(layers[0].losses["a"][3].sum())


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (Fused({"a": falling(64, 0)}, 100), FormatError, "group size 32 does not divide the 100"),
        (Fused({"a": falling(64, 0, 3)}, 128), ShapeError, r"a: losses \[3, 64\], expected \[4, OC\]"),
        (Fused({"a": falling(64, 0) * np.nan}, 128), InputError, "a: a loss is not finite"),
        (Fused({"a": falling(64, 0), "b": falling(63, 0)}, 128, paired=True), ShapeError, "not the same number"),
    ],
)
def test_losses_that_do_not_fit_are_refused(layer: Fused, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        allocate([layer], LEVELS, 10_000)


def test_the_count_rule_upgrades_so_many_features_whatever_they_take() -> None:
    layers = [Fused({"a": falling(150, 7)}, 128), Fused({"b": falling(50, 8)}, 4096)]
    levels = [get_scheme("uint4", 128), get_scheme("int8", 128)]
    two = [Fused({name: loss[:2] for name, loss in layer.losses.items()}, layer.ic) for layer in layers]
    found = allocate_by_count(two, levels, [0.9, 0.1])
    pooled = np.concatenate([two[0].losses["a"][0], two[1].losses["b"][0]])
    top = np.zeros(200, dtype=np.uint8)
    top[np.argsort(-pooled, kind="stable")[:20]] = 1
    assert np.array_equal(np.concatenate([found.chosen["a"], found.chosen["b"]]), top)
    with pytest.raises(InputError, match="give one a level, which add up to 1"):
        allocate_by_count(two, levels, [0.9, 0.2])


def test_a_model_of_eight_billion_weights_takes_seconds() -> None:
    qkv = Fused({"q": falling(4096, 1), "k": falling(1024, 2), "v": falling(1024, 3)}, 4096)
    gate_up = Fused({"gate": falling(14336, 4), "up": falling(14336, 5)}, 4096, paired=True)
    layers = [qkv, Fused({"o": falling(4096, 6)}, 4096), gate_up, Fused({"down": falling(4096, 7)}, 14336)] * 4
    layers = [
        Fused({f"{index}.{name}": loss for name, loss in layer.losses.items()}, layer.ic, layer.paired)
        for index, layer in enumerate(layers)
    ]
    low, high = feasible(layers, LEVELS)
    started = time.monotonic()
    found = allocate(layers, LEVELS, (2 * low + high) // 3)
    assert time.monotonic() - started < 5  # an eighth of the layers
    assert found.loss < 1.3 * found.free_loss
