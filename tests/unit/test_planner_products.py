"""Every way to cut a block of a decoder, computed by its ranks on random numbers, is the whole product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import plan_products

from tersor.checkpoint.config import parse_scheme
from tersor.hardware import chip_named
from tersor.models.geometries import GEOMETRIES
from tersor.models.parts import of_config
from tersor.planner import links
from tersor.planner.blocks import Replica
from tersor.planner.check import LAYOUTS
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.parts import Model, Workload
from tersor.planner.problem import Problem
from tersor.planner.search import random
from tersor.planner.ways import Phase, Setting

CHIP = chip_named("h200")
KERNELS, LINKS = Kernels(CHIP), links.of_chip(CHIP)
WORK = Workload(batch=12, context=64, prompt=12)
SEEDS = range(3)


def sizes(numbers: np.random.Generator, ranks: int) -> dict[str, int]:
    """Random sizes that leave every rank something, evenly or not."""
    keys = int(numbers.integers(1, ranks + 2))
    heads = keys * max(int(numbers.integers(1, 4)), -(-ranks // keys))
    return {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": int(numbers.integers(ranks, 80)),
    }


def model(name: str, ranks: int, seed: int) -> Model:
    """A small decoder of random sizes, some of them in groups of 16 channels."""
    numbers = np.random.default_rng((seed, ranks))
    own, inner = sizes(numbers, ranks), int(numbers.integers(ranks, 3 * ranks + 1))
    changes: dict[str, dict[str, Any]] = {
        "llama-3-8b": {"head_dim": 8, "intermediate_size": 8 * inner},
        "qwen2.5-72b": {"head_dim": 16, "intermediate_size": 16 * inner},
        "phi-3": {"architectures": ["Phi3ForCausalLM"], "intermediate_size": 8 * inner, "head_dim": 8},
        "opt-13b": {"ffn_dim": 8 * inner, "hidden_size": 8 * own["num_attention_heads"]},
        "qwen3-30b-a3b": {
            "head_dim": 8, "moe_intermediate_size": 8 * inner, "num_experts": 9, "num_experts_per_tok": 3,
        },
        "gpt-oss-20b": {
            "head_dim": 8, "intermediate_size": 8 * inner, "num_local_experts": 8, "num_experts_per_tok": 2,
            "sliding_window": 4,
        },
        "deepseek-v3": {
            "num_key_value_heads": own["num_attention_heads"], "intermediate_size": 8 * inner, "q_lora_rank": 24,
            "moe_intermediate_size": 8 * inner, "n_routed_experts": 8, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "kv_lora_rank": 16, "first_k_dense_replace": 1, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8,
        },
    }  # fmt: skip
    scheme = parse_scheme("int4:g16", None, None, "format") if name == "qwen2.5-72b" else None
    return of_config({**GEOMETRIES.get(name, GEOMETRIES["llama-3-8b"]), **own, **changes[name]}, name, scheme)


def spread(of: Model, ranks: int) -> tuple[Replica, Problem]:
    """The problem of one stage of a model on so many ranks."""
    setting = Setting(of, Axes(Mesh((ranks,)), 1, 1, ranks), WORK, KERNELS, LINKS)
    return Replica.of(setting, 1, 1e18)


def only(problem: Problem, name: str, option: int) -> Problem:
    """The problem in which a block has one way."""
    blocks = [
        replace(one, seconds=np.where(np.arange(len(one.options)) == option, one.seconds, np.inf))
        if one.name == name
        else one
        for one in problem.blocks
    ]
    return replace(problem, blocks=tuple(blocks))


NAMES = ["llama-3-8b", "qwen2.5-72b", "opt-13b", "phi-3", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"]
RANKS = [2, 3, 4, 8]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_with_their_slices_give_what_one_device_gives(name: str, ranks: int) -> None:
    """Each way of each block once, beside others at random, in models of random sizes."""
    for seed in SEEDS:
        of = model(name, ranks, seed)
        weights = plan_products.draw(of, seed)
        alone, single = spread(of, 1)
        replica, problem = spread(of, ranks)
        phases = [Phase.of(phase, WORK, 1) for phase in WORK.phases]
        whole = random(single, count=1).choice
        wanted = {phase: plan_products.computed(alone, whole, phase, weights) for phase in phases}
        own = [(block.name, option) for block in problem.blocks for option in range(len(block.options))]
        for block_name, option in own[seed :: len(SEEDS)]:
            choice, place = (
                random(only(problem, block_name, option), seed=seed, count=8).choice,
                replica.places[block_name],
            )
            found = plan_products.computed(replica, choice, place.phase, weights)
            assert np.allclose(found, wanted[place.phase], rtol=1e-9, atol=1e-9), (block_name, place.ways[option].name)


def test_every_way_that_is_known_is_one_of_these() -> None:
    every = {(block, way) for block, own in LAYOUTS.items() for way in own}
    every |= {(norm, way) for norm in ("ffn_norm", "final_norm") for way in LAYOUTS["norm"]}
    replicas = [spread(model(name, ranks, seed), ranks)[0] for name in NAMES for ranks in RANKS for seed in SEEDS]
    places = [place for replica in replicas for place in replica.places.values()]
    assert {(place.block, way.name) for place in places for way in place.ways} == every
