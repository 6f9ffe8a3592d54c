"""Sampling options: what they resolve to, what is refused, and that draws follow the distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tersor.engine.sampling import Sampling
from tersor.errors import InputError
from tersor.integrations.transformers.sampler import Sampler

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
HISTORY = torch.zeros(1, 1, dtype=torch.int64)


def frequencies(
    logits: torch.Tensor = LOGITS, history: torch.Tensor = HISTORY, draws: int = 4000, **options: Any
) -> torch.Tensor:
    sampler = Sampler(Sampling(**options).resolved(GenerationConfig()), torch.device("cpu"))
    sampler.seed(0)
    tokens = sampler(history.expand(draws, -1), logits.expand(draws, -1))
    return torch.bincount(tokens, minlength=logits.shape[1]) / draws


def close(measured: torch.Tensor, expected: torch.Tensor, draws: int = 4000) -> bool:
    """Within five standard errors of a binomial everywhere, and exactly 0 where 0 is expected."""
    bound = 5 * (expected * (1 - expected) / draws).sqrt()
    return bool(((measured - expected).abs() <= bound).all())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    assert close(frequencies(temperature=temperature), (LOGITS[0] / temperature).softmax(-1))


def test_top_k_keeps_the_most_probable() -> None:
    expected = torch.cat([LOGITS[0, :2].softmax(-1), torch.zeros(3)])
    assert close(frequencies(temperature=1.0, top_k=2), expected)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = LOGITS[0].softmax(-1)
    assert probabilities[0] < 0.7 < probabilities[:2].sum()
    expected = torch.cat([LOGITS[0, :2].softmax(-1), torch.zeros(3)])
    assert close(frequencies(top_p=0.7), expected)


def test_min_p_is_a_fraction_of_the_best() -> None:
    expected = torch.cat([LOGITS[0, :3].softmax(-1), torch.zeros(2)])
    assert close(frequencies(min_p=math.exp(-1.6)), expected)


def test_temperature_0_is_greedy_whatever_else_is_given() -> None:
    assert frequencies(temperature=0, top_k=3, draws=20)[0] == 1.0


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    history = torch.tensor([[0, 3, 3]])
    expected = torch.tensor([2.0 / 1.5, 1.0, 0.5, -1.0 * 1.5, -3.0]).softmax(-1)
    assert close(frequencies(history=history, temperature=1.0, repetition_penalty=1.5), expected)


def test_greedy_by_default_and_as_the_generation_config_says() -> None:
    plain = Sampling().resolved(GenerationConfig())
    assert (plain.temperature, plain.repetition_penalty, plain.max_new_tokens) == (0.0, 1.0, 256)
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7, repetition_penalty=1.1)
    chosen = Sampling().resolved(config)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p) == (0.6, 0.9, 0, 0.0)
    assert (chosen.max_new_tokens, chosen.repetition_penalty) == (7, 1.1)
    assert Sampling(temperature=0).resolved(config).temperature == 0.0
    assert Sampling(temperature=0.2).resolved(config).top_p == 0.9


def test_a_sampling_option_alone_turns_sampling_on() -> None:
    assert Sampling(top_k=5).resolved(GenerationConfig()).temperature == 1.0
    assert Sampling(seed=5).resolved(GenerationConfig()).temperature == 0.0


def test_a_single_stop_text_is_one_text() -> None:
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: it must be at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("a", "")}, "a stop text is empty"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**options)
