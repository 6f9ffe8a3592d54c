"""A budget of predicted time is spent where it saves most, and a further level is taken only where it is worth it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tersor.compress.allocate_time import Clock, allocate_time, feasible_time
from tersor.compress.allocation import Floats, Fused
from tersor.convert.latency import Steps, top_k_of
from tersor.convert.shared import Shared
from tersor.errors import InputError
from tersor.formats import Mix, get_scheme
from tersor.hardware import chip_named
from tersor.kernels import tune
from tersor.kernels.tune import mixed as tune_mixed
from tersor.kernels.tune.forecast import GATHERED
from tersor.layouts.packing import Packing

LEVELS = [get_scheme("uint3", 32), get_scheme("fp5_e2m2"), get_scheme("int8")]
H200 = chip_named("h200")


@dataclass
class Launches:
    """A clock of launches: each takes something, and its rows take their bits."""

    each: float = 5.0
    words: str = "a test"

    def layer(self, layer: Fused, rows: Sequence[int]) -> float:
        """Return the seconds of a layer."""
        return sum(self.each + bits * count for bits, count in zip((3.0, 5.0, 8.0), rows, strict=True) if count)

    def total(self, layers: Sequence[Fused], rows: Sequence[Sequence[int]]) -> float:
        """Return the seconds of all layers."""
        return sum(self.layer(layer, own) for layer, own in zip(layers, rows, strict=True))


def falling(rows: int, seed: int) -> Floats:
    """Return losses [levels, rows] that fall by every level, of features of very different weight."""
    random = np.random.default_rng(seed)
    losses = random.lognormal(0, 2, rows) * random.uniform(0.1, 0.5, (len(LEVELS), rows)).cumprod(axis=0)
    return np.asarray(losses)


def every_choice(layers: Sequence[Fused], clock: Clock) -> list[tuple[float, float]]:
    """Return seconds and loss of every way to choose, feature by feature."""
    found = []
    for choice in itertools.product(range(len(LEVELS)), repeat=sum(layer.rows for layer in layers)):
        rows, loss, left = [], 0.0, list(choice)
        for layer in layers:
            own, left = left[: layer.rows], left[layer.rows :]
            rows.append([own.count(level) for level in range(len(LEVELS))])
            (losses,) = layer.losses.values()
            loss += float(losses[own, range(layer.rows)].sum())
        found.append((clock.total(layers, rows), loss))
    return found


@pytest.mark.parametrize("each", [0.0, 5.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_choice_that_takes_as_long_loses_much_less(seed: int, each: float) -> None:
    layers, clock = [Fused({"a": falling(4, seed)}, 64), Fused({"b": falling(3, seed + 9)}, 64)], Launches(each)
    choices, (low, high), met = every_choice(layers, clock), feasible_time(layers, LEVELS, clock), 0
    for budget in np.linspace(low, high, 15).tolist():
        found = allocate_time(layers, LEVELS, clock, budget, unit=1)
        counts = [np.bincount(found.chosen[name], minlength=3).tolist() for name in "ab"]
        assert found.seconds == pytest.approx(clock.total(layers, counts)) and found.seconds <= budget * (1 + 1e-9)
        best = min(loss for seconds, loss in choices if seconds <= budget * (1 + 1e-9))
        coarser = min(loss for seconds, loss in choices if seconds <= max(low, budget - 2 * (each + 8)) * (1 + 1e-9))
        assert best * (1 - 1e-9) <= found.loss <= coarser * (1 + 1e-9)
        met += found.loss <= best * 1.3
    assert met >= 8


def test_a_launch_that_costs_much_leaves_a_layer_with_few_levels() -> None:
    layers = [Fused({name: falling(256, seed)}, 64) for seed, name in enumerate("abc")]
    levels = []
    for each in (1.0, 300.0):
        clock = Launches(each)
        budget = sum(feasible_time(layers, LEVELS, clock)) / 2
        found = allocate_time(layers, LEVELS, clock, budget)
        levels.append(sum(len(set(own.tolist())) for own in found.chosen.values()))
        assert found.seconds is not None and 0.8 * budget < found.seconds <= budget
        for own in found.chosen.values():
            assert all(count % 64 == 0 for count in np.bincount(own))
    assert levels[1] < levels[0]


def test_a_latency_outside_of_what_levels_take_is_refused_with_the_range() -> None:
    layers, clock = [Fused({"a": falling(64, 0)}, 64)], Launches()
    for budget, word in ((100.0, "below"), (1000.0, "above")):
        with pytest.raises(
            InputError, match=rf"{word} what the .* take: feasible are 1.97e\+05 to 5.17e\+05 ms.*a test"
        ):
            allocate_time(layers, LEVELS, clock, budget)


def test_the_time_of_a_mix_is_that_of_the_launch_that_has_a_kernel() -> None:
    steps, layer = Steps(Mix(tuple(LEVELS)), H200, 8, torch.bfloat16), Fused({"a": falling(4096, 0)}, 4096)
    problems, alone = [], []
    for scheme, count in zip(LEVELS, (1024, 0, 3072), strict=True):
        problems.append(tune.LinearProblem.of(Packing.of(scheme, "bfloat16"), (count, 4096), 8))
    whole = tune_mixed.MixedProblem(levels=tuple(problems))
    expected = tune_mixed.seconds(whole, tune_mixed.choose(whole, H200), H200)
    assert steps.layer(layer, [1024, 0, 3072]) == expected and steps.words == "a step of 8 rows on NVIDIA H200"
    assert steps.total([layer, layer], [[4096, 0, 0]] * 2) == 2 * steps.layer(layer, [4096, 0, 0])
    older = chip_named("a100")
    for problem in problems:
        if problem.oc:
            alone.append(tune.seconds(problem, tune.predict(problem, older), older))
    found = Steps(Mix(tuple(LEVELS)), older, 8, torch.bfloat16).layer(layer, [1024, 0, 3072])
    assert found == pytest.approx(sum(alone) + GATHERED)


def test_experts_take_what_both_products_take_in_tiles_of_as_many_tokens() -> None:
    steps = Steps(Mix(tuple(LEVELS)), H200, 32, torch.float16, 8)
    up = Shared(("u",), 128, 2048, 768, 2, "halves").fused("e.gate_up_proj", falling(1536, 0))
    down = Shared(("d",), 128, 768, 2048).fused("e.down_proj", falling(2048, 1))
    both = steps.total([up, down], [[1536, 0, 0], [2048, 0, 0]])
    parts = [steps.layer(up, [1536, 0, 0]), steps.layer(down, [2048, 0, 0])]
    assert sum(parts) <= both < 1.2 * sum(parts)
    assert steps.layer(up, [768, 0, 768]) > steps.layer(up, [1536, 0, 0])
    found = allocate_time([up, down], LEVELS, steps, 1.25 * both)
    assert found.seconds is not None and both < found.seconds <= 1.25 * both
    assert np.array_equal(found.chosen["e.gate_up_proj[0]"], found.chosen["e.gate_up_proj[1]"])
    with pytest.raises(InputError, match="does not say how many experts of e a token has"):
        Steps(Mix(tuple(LEVELS)), H200, 1, torch.float16).layer(up, [1536, 0, 0])


def test_what_has_no_kernel_is_said_at_once() -> None:
    with pytest.raises(InputError, match="level uint3:g8:float16 has no kernel"):
        Steps(Mix((get_scheme("uint3", 8), LEVELS[2])), H200, 1, torch.bfloat16)
    with pytest.raises(InputError, match=r"NVIDIA A100.* has no kernel for steps of 512 rows"):
        Steps(Mix(tuple(LEVELS)), chip_named("a100"), 512, torch.bfloat16)
    assert top_k_of(object()) is None


def test_a_model_of_eight_billion_weights_takes_seconds() -> None:
    layers = []
    for index in range(4):
        own = [
            Fused({"q": falling(4096, 1), "k": falling(1024, 2), "v": falling(1024, 3)}, 4096),
            Fused({"o": falling(4096, 6)}, 4096),
            Fused({"gate": falling(14336, 4), "up": falling(14336, 5)}, 4096, paired=True),
            Fused({"down": falling(4096, 7)}, 14336),
        ]
        layers += [
            Fused({f"{index}.{key}": loss for key, loss in one.losses.items()}, one.ic, one.paired) for one in own
        ]
    steps = Steps(Mix(tuple(LEVELS)), H200, 1, torch.bfloat16)
    low, high = feasible_time(layers, LEVELS, steps)
    started = time.monotonic()
    found = allocate_time(layers, LEVELS, steps, (2 * low + high) / 3)
    assert time.monotonic() - started < 10  # an eighth of the layers
    assert found.seconds is not None and found.seconds <= (2 * low + high) / 3
    assert found.loss >= found.pairs_loss >= found.free_loss
