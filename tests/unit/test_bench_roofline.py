"""bench/roofline.py: what small workloads make a model do at least, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_configs import DENSE, MIXTURE

from tersor.bench import latency, roofline
from tersor.bench.roofline import Speeds, Work
from tersor.bench.workloads import Workload
from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.formats import Activations, get_scheme
from tersor.hardware import chip_named
from tersor.models import DecoderConfig
from tersor.models.random import random_decoder

QKV = 64 * 64 + 2 * 32 * 64  # weights
ATTENTION = QKV + 64 * 64
LAYER = ATTENTION + 3 * 128 * 64
FIRST, LAST = LAYER + QKV, LAYER - QKV  # of two layers what all tokens need, and what is behind the last attention
HEAD = 96 * 64
TOKEN = 2 * 2 * 16 * 4  # bytes of keys and values of two heads of 16 float32 numbers, in a layer


def runner(config: dict[str, object], window: int | None = None) -> Runner:
    """Make a runner; a window is that of the second layer."""
    described = DecoderConfig.from_dict(config)
    if window is not None:
        first, second = described.layers
        second = replace(second, attention=replace(second.attention, window=window))
        described = replace(described, layers=(first, second))
    decoder = random_decoder(described, get_scheme("fp6_e3m2"), "cpu", torch.float32)
    made = Runner(decoder, Sampler(5, 96, "cpu"), max_rows=4, max_length=64)
    made.allocate(4)
    return made


def workload(prompts: list[list[int]], outputs: list[int], samples: int = 1) -> Workload:
    tokens = [np.array(prompt, dtype=np.int32) for prompt in prompts]
    return Workload("own", tokens, np.array(outputs, dtype=np.int64), samples, {})


ALONE = workload([[1, 2, 3]], [4])
SHARED = workload([[1, 2, 3, 4, 5], [7, 8], [1, 2, 3, 9]], [3, 1, 5])
"""Three tokens that two prompts share, of which 2 and 1 are their own, and a prompt of 2."""


def test_one_request_is_read_and_multiplied_token_by_token() -> None:
    made = runner(DENSE)
    found = roofline.work(ALONE, made, 4)
    assert found.linear_operations == 2 * (FIRST * (3 + 3) + (LAST + HEAD) * 4)
    seen = 1 + 2 + 3 + 4 + 5 + 6  # by the last token but the one drawn at last
    assert found.attention_operations == 2 * seen * 4 * 4 * 16
    assert found.steps == 4
    assert found.weight_bytes == 4 * latency.step_bytes(made.decoder, 1)
    assert found.kv_bytes == 2 * TOKEN * (4 + 5 + 6)


def test_a_shared_prefix_is_computed_once_and_read_once_a_step() -> None:
    found = roofline.work(SHARED, runner(DENSE), 4)
    computed, decoded = 3 + 2 + 1 + 2, 2 + 0 + 4
    assert found.linear_operations == 2 * (FIRST * (computed + decoded) + (LAST + HEAD) * (3 + 1 + 5))
    seen = (1 + 2 + 3) + (4 + 5) + 4 + (1 + 2) + (6 + 7) + (5 + 6 + 7 + 8)
    assert found.attention_operations == 2 * seen * 4 * 4 * 16
    assert found.steps == 5  # as many as the longest answer, where 9 tokens would fit in 3
    own = (3 + 4) + (2 + 3 + 4 + 5)
    assert found.kv_bytes == 2 * TOKEN * (own + 4 * 3)


def test_fewer_rows_a_step_are_more_steps_and_a_prefix_is_read_in_each_of_its_own() -> None:
    made = runner(DENSE)
    found = roofline.work(SHARED, made, 1)
    assert found.steps == 9 and found.weight_bytes == 9 * latency.step_bytes(made.decoder, 1)
    assert found.kv_bytes == 2 * TOKEN * ((3 + 4) + (2 + 3 + 4 + 5) + (2 + 4) * 3)


def test_beside_a_window_no_token_sees_more_and_no_shared_prefix_is_counted() -> None:
    found = roofline.work(SHARED, runner(DENSE, window=3), 4)
    whole = (1 + 2 + 3) + (4 + 5) + 4 + (1 + 2) + (6 + 7) + (5 + 6 + 7 + 8)
    near = (1 + 2 + 3) + (3 + 3) + 3 + (1 + 2) + (3 + 3) + (3 + 3 + 3 + 3)
    assert found.attention_operations == (whole + near) * 4 * 4 * 16
    assert found.kv_bytes == TOKEN * ((3 + 4 + 2 + 3 + 4 + 5 + 4 * 3) + (3 + 3 + 2 + 3 + 3 + 3))


def test_continuations_read_their_prompt_once_a_step() -> None:
    found = roofline.work(workload([[1, 2, 3]], [4], samples=3), runner(DENSE), 4)
    assert found.linear_operations == 2 * (FIRST * (3 + 3 * 3) + (LAST + HEAD) * (1 + 3 * 3))
    assert found.steps == 4
    assert found.kv_bytes == 2 * TOKEN * (3 * 3 + 3 * (1 + 2 + 3))


def test_of_experts_those_of_a_token_are_multiplied_and_those_hit_are_read() -> None:
    made = runner(MIXTURE)
    found = roofline.work(ALONE, made, 4)
    layer = ATTENTION + 8 * 64 + 2 * 3 * 32 * 64
    assert found.linear_operations == 2 * ((layer + QKV) * 6 + (layer - QKV + HEAD) * 4)
    dense, full = latency.step_bytes(made.decoder, 0), latency.step_bytes(made.decoder, 4)
    assert found.weight_bytes == 4 * dense + (full - dense)  # the rows of four steps would fill one
    assert found.weight_bytes <= 4 * latency.step_bytes(made.decoder, 1)


def test_the_busier_of_tensor_cores_and_memory_says_how_long_it_takes() -> None:
    work = Work(linear_operations=600, attention_operations=200, steps=1, weight_bytes=30, kv_bytes=20)
    assert Speeds(linear_peak=200, attention_peak=100, bandwidth=100).seconds(work) == 5
    assert Speeds(linear_peak=200, attention_peak=100, bandwidth=5).seconds(work) == 10


@pytest.mark.parametrize(
    ("chip", "activations", "peak"),
    [
        ("h200", Activations.NATIVE, 989.4e12),
        ("h200", Activations.E4M3, 2 * 989.4e12),
        ("a100", Activations.E4M3, 312e12),
    ],
)
def test_linears_have_the_peak_of_what_they_multiply(chip: str, activations: Activations, peak: float) -> None:
    speeds = Speeds.of(chip_named(chip), activations, 4e12)
    assert speeds.linear_peak == peak and speeds.attention_peak == chip_named(chip).fp16_ops
    assert speeds.bandwidth == 4e12
