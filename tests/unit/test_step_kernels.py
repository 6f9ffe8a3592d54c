"""A decode step on a GPU is made of our kernels, each of which may start early: what torch computes in it is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.checkpoints import CONFIGS, FUSED, SMALL
from helpers.fakes import FakeGpu, pretended
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from tersor.engine.runner import Runner
from tersor.engine.sampler import Sampler
from tersor.engine.step_buffer import Layout
from tersor.formats import get_scheme
from tersor.models.config import DecoderConfig
from tersor.models.random import random_decoder
from tersor.ops import dense

gpu = pretended("NVIDIA H200")
"""Tensors of the CPU pass for those of an H200, or of the chip a test names."""

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 256}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 64}),
    "gpt_oss": ("GptOssForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {"moe_intermediate_size": 64, "head_dim": 16, "v_head_dim": 24}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"moe_intermediate_size": 64, "head_dim": 16}),
}
_MAKES_MEMORY = ("aten.empty", "aten.new_empty", "aten.fill_.Scalar")


class Computed(TorchDispatchMode):
    """Notes which operators of torch write memory: those would be kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), str(func)
        given, made = (
            {one.untyped_storage().data_ptr() for one in tree_leaves(of) if isinstance(one, torch.Tensor)}
            for of in ((args, kwargs), result)
        )
        if not name.startswith(_MAKES_MEMORY) and (made - given or func._schema.is_mutable):
            self.names.append(name)
        return result


@pytest.mark.parametrize("name", CASES)
def test_a_packed_decoders_step_is_made_of_our_kernels_but_for_a_plain_head(
    name: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, own = CASES[name]
    config = AutoConfig.for_model(name, **{**SMALL, **{**CONFIGS, **FUSED}[name], **SIZES, **own}).to_dict()
    parsed = DecoderConfig.from_dict({**config, "architectures": [architecture]})
    decoder = random_decoder(parsed, get_scheme("fp6_e3m2"), torch.device("cpu"), torch.bfloat16)
    runner = Runner(decoder, Sampler(3, parsed.vocabulary, "cpu"), max_rows=2, max_length=64)
    runner.allocate(2)
    layout = Layout(2, 2, 1)
    views = layout.split(torch.zeros(layout.size, dtype=torch.int32))
    views["starts"].copy_(torch.arange(3))
    views["places"].copy_(torch.arange(2))
    views["slots"].fill_(2)
    monkeypatch.setattr(dense, "_dispatch_modes", lambda: 0)  # the watch below changes nothing
    with torch.inference_mode():
        runner._decode(views, 2)  # from now on weights are settled
        before, watch = len(gpu.launches), Computed()
        with watch:
            runner._decode(views, 2)
    assert watch.names == ["aten.linear.default"]
    launches = gpu.launches[before:]
    assert launches and all(launch.programmatic for launch in launches)
    assert all(launch["ready"] for launch in launches if "ready" in launch.arguments)
