"""What drawing a token means: by the definition alone, one row at a time, and by chi-squared."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.sampling_rows import logits_of, moved, plain, random_rows

from tersor import ops
from tersor.errors import ShapeError
from tersor.ops import Allowed, Listed, SamplingRows, sampling_reference

DRAWS = 40_000
"""Of one row; a chi-squared of 31 degrees of freedom is above 70 once in ten thousand times, and seeds are fixed."""
VOCABULARY = 32


def kept_by_definition(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens kept, by sums of float64 probabilities in order."""
    scaled = logits.double() / temperature
    values = scaled.tolist()
    found = set(range(len(values)))
    if 0 < top_k < len(values):
        least = sorted(values, reverse=True)[top_k - 1]
        found = {token for token in found if values[token] >= least}
    if top_p < 1:
        total, reached, least = sum(math.exp(values[token]) for token in found), 0.0, -math.inf
        for value in sorted((values[token] for token in found), reverse=True):
            reached += math.exp(value) / total
            if reached >= top_p:
                least = value
                break
        found = {token for token in found if values[token] >= least}
    return {token for token in found if math.exp(values[token] - max(values)) >= min_p}


OPTIONS = (
    (1.0, 0, 1.0, 0.0),
    (0.6, 0, 1.0, 0.0),
    (1.7, 0, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.3, 20, 0.9, 0.02),
)


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), OPTIONS)
def test_tokens_come_as_often_as_the_softmax_of_those_kept_says(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(1, VOCABULARY, torch.float32, 1.5, 3)
    rows = plain(DRAWS, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    counts = ops.draw(logits.expand(DRAWS, -1), rows).bincount(minlength=VOCABULARY).double()
    kept = kept_by_definition(logits[0], temperature, top_k, top_p, min_p)
    expected = (logits[0].double() / temperature).softmax(0)
    expected[[token for token in range(VOCABULARY) if token not in kept]] = 0
    expected = expected / expected.sum() * DRAWS
    assert {token for token in range(VOCABULARY) if counts[token]} <= kept
    some = expected > 0
    chi_squared = float(((counts - expected)[some].square() / expected[some]).sum())
    assert chi_squared < 70, chi_squared


def test_noise_of_positions_and_tokens_is_gumbels() -> None:
    """Their mean is Euler's constant, their variance pi^2 / 6; neighbours are independent."""
    rows = plain(2000)
    rows.positions = torch.arange(2000, dtype=torch.int32)
    noise = sampling_reference.noise(torch.zeros(2000, dtype=torch.int64), rows.positions, 500).double()
    gumbel = noise * math.log(2) - math.log(math.log(2))
    assert abs(gumbel.mean() - 0.5772157) < 0.005
    assert abs(gumbel.var() - math.pi**2 / 6) < 0.02
    levels = torch.linspace(-1.5, 8, 20, dtype=torch.float64)
    below = torch.stack([(gumbel < level).double().mean() for level in levels])
    torch.testing.assert_close(below, torch.exp(-torch.exp(-levels)), rtol=0, atol=0.003)
    centred = gumbel - gumbel.mean()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(shifted.mean()) < 0.01
    assert gumbel.max() > 12, "a million numbers have one above 13.8 on average"


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_is_what_the_definition_keeps(seed: int) -> None:
    """Logits of 16 bits have many equals; all of them are kept, or none."""
    logits = logits_of(200, 90, torch.bfloat16, 1.0, seed).float()
    rows = random_rows(200, 90, seed, lists=False, masks=False)
    rows.temperature = rows.temperature.clamp(min=0.3)
    scale = torch.full_like(rows.temperature, sampling_reference.LOG2E) / rows.temperature
    kept = sampling_reference.kept(logits, scale, rows)
    for row in range(200):
        if not logits[row].isfinite().all():
            continue
        options = (float(rows.temperature[row]), int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row]))
        assert set(kept[row].nonzero().flatten().tolist()) == kept_by_definition(logits[row], *options), options


def test_greedy_rows_take_the_lowest_of_equal_maxima_and_nothing_but_finite_logits_is_drawn_from() -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [[1.0, 3, 3, 2], [-0.0, 0.0, -1, -1], [1, nan, 2, 0], [1, inf, 2, 0], [-inf] * 4, [-inf, -inf, -5, -inf]]
    )
    for temperature in (0.0, 1e-6):
        assert ops.draw(logits, plain(6, temperature=temperature)).tolist() == [1, 0, -1, -1, -1, 2]
    assert ops.draw(logits, plain(6, temperature=1.0))[2:].tolist() == [-1, -1, -1, 2]
    assert ops.draw(logits, plain(6, temperature=-1.0)).tolist() == [-1] * 6


def test_a_row_draws_the_same_token_in_any_batch_and_another_one_with_another_seed_or_position() -> None:
    logits = logits_of(64, 500, torch.float32, 0.5, 1)
    rows = random_rows(64, 500, 1)
    together = ops.draw(logits, moved(rows, "cpu"))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    slots = moved(rows, "cpu")
    slots.slots, slots.positions = order.int(), rows.positions[order]
    assert torch.equal(ops.draw(logits[order], slots), together[order])
    alike = logits[:1].expand(64, -1)
    one = plain(64)
    first = ops.draw(alike, one)
    assert len(first.unique()) > 40
    one.positions += 1
    assert (ops.draw(alike, one) == first).sum() < 8


def penalised(value: float, count: int, repetition: float, presence: float, frequency: float, bias: float) -> float:
    """A logit after penalties and bias, by their definitions."""
    if count >= 0:
        value = value / repetition if value > 0 else value * repetition
    if count > 0:
        value -= frequency * count + presence
    return value + bias


def test_penalties_and_bias_change_the_logits_of_listed_tokens_and_the_newest_is_counted_once() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0], [2.0, -1.0, 0.5, 1.0], [2.0, -1.0, 0.5, 1.0]])
    rows = plain(3, temperature=0.0)
    rows.listed = Listed(
        starts=torch.tensor([0, 3, 5], dtype=torch.int32),
        ends=torch.tensor([3, 5, 5], dtype=torch.int32),
        tokens=torch.tensor([0, 1, -1, 3, -1, 2], dtype=torch.int32),
        counts=torch.tensor([2, 0, 0, -1, 0, 9], dtype=torch.int32),
        biases=torch.tensor([0.0, 0.25, 0.0, 4.0, 0.0, 9.0]),
        newest=torch.tensor([0, 2, 3]),
        pending=torch.tensor([1, 1, 1], dtype=torch.int32),
        repetition=torch.tensor([1.5, 2.0, 1.0]),
        presence=torch.tensor([0.25, 0.5, 0.0]),
        frequency=torch.tensor([0.125, 0.0, 0.0]),
    )
    expected = [
        [penalised(2.0, 3, 1.5, 0.25, 0.125, 0), penalised(-1.0, 0, 1.5, 0.25, 0.125, 0.25), 0.5, 1.0],
        [2.0, -1.0, penalised(0.5, 1, 2.0, 0.5, 0.0, 0), 5.0],
        [2.0, -1.0, 0.5, 1.0],
    ]
    torch.testing.assert_close(sampling_reference.adjusted(logits, rows), torch.tensor(expected))
    assert ops.draw(logits, rows).tolist() == [3, 3, 0]
    assert rows.listed.newest.tolist() == [3, 3, 0]
    rows.listed.pending.zero_()
    rows.listed.newest.fill_(0)
    counted = sampling_reference.adjusted(logits, rows)[0, 0]
    torch.testing.assert_close(counted, torch.tensor(penalised(2.0, 2, 1.5, 0.25, 0.125, 0)))


def test_forbidden_tokens_are_never_drawn_and_a_row_without_bits_may_draw_all() -> None:
    logits = torch.zeros(3000, 40)
    rows = plain(3000)
    bits = torch.tensor([[0b1010, 1 << 7]], dtype=torch.int32)
    rows.allowed = Allowed(bits=bits, rows=torch.where(torch.arange(3000) < 1000, -1, 0).int())
    drawn = ops.draw(logits, rows)
    assert set(drawn[1000:].tolist()) == {1, 3, 39}
    assert len(drawn[:1000].unique()) == 40
    rows.allowed.bits.zero_()
    assert (ops.draw(logits, rows)[1000:] == -1).all()


def test_logprobs_are_the_log_softmax_before_temperature_with_ranks_and_the_most_probable_tokens() -> None:
    logits = logits_of(5, 60, torch.float16, 2.0, 0)[:3]
    asks = torch.tensor([3, -1, 0], dtype=torch.int32)
    rows = plain(3, temperature=0.3)
    tokens, found = ops.draw_with_logprobs(logits, rows, asks, 4)
    expected = logits.float().log_softmax(1)
    assert torch.equal(tokens, ops.draw(logits, rows))
    torch.testing.assert_close(found.chosen[[0, 2]], expected.gather(1, tokens[:, None])[[0, 2], 0])
    best = expected[0].topk(3)
    assert found.tokens[0].tolist() == [*best.indices.tolist(), -1]
    torch.testing.assert_close(found.values[0, :3], best.values)
    assert found.ranks[0] == 1 + (logits[0] > logits[0, tokens[0]]).sum()
    assert found.chosen[1] == -math.inf and found.ranks[1] == 0
    assert (found.tokens[1:] == -1).all() and (found.values[1:] == -math.inf).all()
    given = ops.logprobs(logits, torch.tensor([5, 6, 60]), torch.tensor([1, 1, 1], dtype=torch.int32), 1)
    torch.testing.assert_close(given.chosen[:2], expected[[0, 1], [5, 6]])
    assert given.chosen[2] == -math.inf


def broken(rows: SamplingRows, **changes: torch.Tensor) -> SamplingRows:
    """Rows with other tensors in some places."""
    return replace(rows, **changes)


def test_what_does_not_fit_is_one_line_that_names_both_sides() -> None:
    logits, rows = torch.zeros(2, 8), plain(2)
    with pytest.raises(ShapeError, match=r"^draw: logits are \[2, 8\] torch.int64, expected \[S, V\]"):
        ops.draw(logits.long(), rows)
    with pytest.raises(
        ShapeError, match=r"^draw: seeds is \[2\] torch.int32 on cpu, expected \[2\] torch.int64 on cpu"
    ):
        ops.draw(logits, broken(rows, seeds=torch.zeros(2, dtype=torch.int32)))
    with pytest.raises(ShapeError, match=r"^draw: top_p is \[3\] torch.float32 on cpu, expected \[2\]"):
        ops.draw(logits, broken(rows, top_p=torch.ones(3)))
    with pytest.raises(ShapeError, match=r"^draw: logits have strides \[1, 2\]"):
        ops.draw(torch.zeros(8, 2).t(), rows)
    with pytest.raises(ShapeError, match=r"^draw: bits of allowed tokens is \[1, 2\]"):
        bits = Allowed(bits=torch.zeros(1, 2, dtype=torch.int32), rows=torch.zeros(2, dtype=torch.int32))
        ops.draw(logits, replace(rows, allowed=bits))
    with pytest.raises(ShapeError, match=r"^logprobs: most is 21, expected 0 to 20"):
        ops.logprobs(logits, torch.zeros(2).long(), torch.zeros(2, dtype=torch.int32), 21)
