"""Mixtures of experts whose decode step is a CUDA graph: packed ones and plain ones, one row and several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from helpers import tiny_lm

from tersor.engine import Sampling
from tersor.errors import UnsupportedError
from tersor.integrations.transformers import load
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.integrations.transformers.generate import Generator

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a CUDA device of compute capability 9.0",
)

PROMPT = [5, 9, 33, 70, 12]
GREEDY = Sampling(max_new_tokens=24, ignore_eos=True, temperature=0.0)
DRAWN = Sampling(max_new_tokens=24, ignore_eos=True, temperature=1.0, seed=4, repetition_penalty=1.1)
WIDTHS = {"gpt_oss": {"intermediate_size": 64}}
"""Sizes of experts that kernels take, where those of the tests' models are others."""


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    plain = models.plain(request.param, folder / "plain", torch.bfloat16, **WIDTHS.get(request.param, {}))
    return load.load_model(models.compressed(plain, folder / "packed", format="fp6_e3m2"), "cuda")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.plain("qwen3_moe", tmp_path_factory.mktemp("plain") / "model", torch.bfloat16)


def rows(model: Any, graph: bool, samples: int, options: Sampling) -> list[list[int]]:
    found, numbers = Generator(model, tiny_lm.tokenizer(), cuda_graph=graph).samples(PROMPT, samples, options)
    assert numbers.cuda_graph is graph
    return [row.tokens for row in found]


@pytest.mark.parametrize("samples", [1, 5])
def test_a_packed_mixture_as_a_graph_gives_the_tokens_of_eager_steps(packed: Any, samples: int) -> None:
    greedy = rows(packed, True, samples, GREEDY)
    assert greedy == rows(packed, False, samples, GREEDY) and len(greedy) == samples
    assert len({tuple(row) for row in greedy}) == 1
    drawn = rows(packed, True, samples, DRAWN)
    assert drawn == rows(packed, False, samples, DRAWN)
    assert len({tuple(row) for row in drawn}) == samples


def test_experts_that_choose_by_logits_give_the_logits_of_the_router(packed: Any) -> None:
    ids = torch.tensor([PROMPT], device="cuda")
    with torch.no_grad():
        got = packed(ids).logits.float()
        layers = [module for module in packed.modules() if isinstance(module, PackedExperts | FusedExperts)]
        choosers = [layer.chooser for layer in layers if layer.chooser is not None]
        for chooser in choosers:
            chooser.release()
        expected = packed(ids).logits.float()
    for chooser in choosers:
        chooser.router.forward = chooser
    assert float((got - expected).abs().max()) <= 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_plain_mixture_runs_as_a_graph(plain: Path, dtype: str) -> None:
    model = load.load_model(plain, "cuda", dtype)
    own = model.config._experts_implementation
    graph, eager = (rows(model, which, 3, GREEDY) for which in (True, False))
    assert len(set(map(tuple, graph))) == 1 and graph[0][0] == eager[0][0]
    assert model.config._experts_implementation == own
    if dtype == "bfloat16":
        assert graph == eager


def test_experts_one_after_the_other_are_no_graph_and_say_so(plain: Path) -> None:
    model = load.load_model(plain, "cuda")
    model.set_experts_implementation("eager")
    with pytest.raises(UnsupportedError, match=r"runs one expert after the other: load the model with experts_impl"):
        rows(model, True, 1, GREEDY)
    assert len(rows(model, False, 1, GREEDY)[0]) == 24
