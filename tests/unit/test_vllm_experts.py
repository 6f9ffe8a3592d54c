"""The experts of a layer in vLLM: two stacks of this rank's, whoever chose among them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import checkpoints, mixes, packed_models, vllm_stand_in
from helpers.vllm_layers import HIDDEN, LAYER, config_of, loading

from tersor.errors import UnsupportedError
from tersor.integrations.transformers.load import load_model

pytestmark = pytest.mark.usefixtures("one_vllm_rank")


@pytest.mark.parametrize("kind", ["fp6", "mixed", "plain"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_are_two_stacks_of_a_rank(tmp_path: Path, vllm: SimpleNamespace, kind: str, ranks: int) -> None:
    changes = {"moe_intermediate_size": HIDDEN}
    if kind == "mixed":
        packed = read = mixes.compressed("qwen3_moe", tmp_path, **changes)[1]
    else:
        made = packed_models.case("qwen3_moe", tmp_path, {}, **changes)
        packed, read = made.packed, made.packed if kind == "fp6" else made.plain
    tensors, model = checkpoints.weights(read), load_model(packed, "cpu", "float32")
    x, index, weights = torch.randn(6, HIDDEN), torch.randint(4, (6, 2)), torch.rand(6, 2)
    total = torch.zeros(6, HIDDEN)
    for rank in range(ranks):
        vllm.ranks, vllm.rank = ranks, rank
        prefix = f"{LAYER}.mlp.experts"
        layer: Any = vllm_stand_in.RoutedExperts(config_of(read), prefix, 4, HIDDEN, HIDDEN)
        with loading():
            for name, tensor in tensors.items():
                if name.startswith(f"{prefix}."):
                    expert, projection, own = name.removeprefix(f"{prefix}.").split(".", 2)
                    assert layer.load(int(expert), projection, own, tensor)
            layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x, weights, index.int(), None, None)
    torch.testing.assert_close(total, model.model.layers[0].mlp.experts(x, index, weights))


def test_experts_of_other_ranks_are_passed_over(tmp_path: Path) -> None:
    packed = packed_models.case("qwen3_moe", tmp_path, {}).packed
    prefix = f"{LAYER}.mlp.experts"
    layer: Any = vllm_stand_in.RoutedExperts(config_of(packed), prefix, 4, HIDDEN, 32, first=2)
    for name, tensor in checkpoints.weights(packed).items():
        if name.startswith(f"{prefix}."):
            expert, projection, own = name.removeprefix(f"{prefix}.").split(".", 2)
            assert layer.load(int(expert), projection, own, tensor) is (int(expert) >= 2)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, HIDDEN)
    y = layer.quant_method.apply(layer, x, torch.ones(2, 2), torch.tensor([[0, 1], [3, 0]]), None, None)
    assert not y[0].any() and y[1].any()


def test_experts_that_kernels_do_not_compute_are_refused(tmp_path: Path) -> None:
    packed = packed_models.case("qwen3_moe", tmp_path, {}).packed
    config = config_of(packed)
    prefix = f"{LAYER}.mlp.experts"

    class Clamped(vllm_stand_in.RoutedExperts):
        """Those of gpt-oss."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, vllm_stand_in.Activation.SWIGLUOAI if name == "activation" else value)

    with pytest.raises(UnsupportedError, match=rf"{prefix}: packed experts do not run here: .* swigluoai"):
        Clamped(config, prefix, 4, HIDDEN, 32)


STACKED = {
    "granitemoe": ("block_sparse_moe", 2, {"intermediate_size": HIDDEN}),
    "llama4_text": ("feed_forward", 1, {"intermediate_size": HIDDEN, "num_experts_per_tok": 1}),
}
"""Architecture -> block of experts, experts of a token, and what makes ranks cut at quanta."""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["fp6", "int4", "plain"])
@pytest.mark.parametrize("name", STACKED)
def test_experts_in_one_tensor_are_taken_apart_while_they_are_loaded(
    tmp_path: Path, vllm: SimpleNamespace, name: str, kind: str, ranks: int
) -> None:
    block, top, changes = STACKED[name]
    made = packed_models.case(
        name, tmp_path, {"format": "uint4", "group_size": 32} if kind == "int4" else {}, **changes
    )
    if (name, kind) == ("llama4_text", "int4"):
        made = packed_models.case(name, tmp_path / "again", {"format": "int4", "group_size": 32}, **changes)
    read = made.plain if kind == "plain" else made.packed
    prefix = f"model.layers.1.{block}.experts"
    model = dict(load_model(made.packed, "cpu", "float32").named_modules())
    x, index, weights = torch.randn(6, HIDDEN), torch.randint(4, (6, top)), torch.rand(6, top)
    total = torch.zeros(6, HIDDEN)
    for rank in range(ranks):
        vllm.ranks, vllm.rank = ranks, rank
        config = config_of(read)
        mapper = vllm_stand_in.Mapper({"model.layers.0": "elsewhere"}) | config.get_cache_scale_mapper()
        layer: Any = vllm_stand_in.RoutedExperts(config, prefix, 4, HIDDEN, HIDDEN)
        layer.apply_router_weight_on_input = name == "llama4_text"
        names = set()
        for full, tensor in (mapper | vllm_stand_in.Mapper()).apply(checkpoints.weights(read).items()):
            if full.startswith(f"{prefix}."):
                expert, projection, own = full.removeprefix(f"{prefix}.").split(".", 2)
                names.add(projection)
                assert layer.load(int(expert), projection, own, tensor)
        assert names == ({"w1", "w3", "w2"} if name == "granitemoe" else {"gate_proj", "up_proj", "down_proj"})
        layer.quant_method.process_weights_after_loading(layer)
        total += layer.quant_method.apply(layer, x, weights, index.int(), None, None)
    if name == "llama4_text":  # every expert takes all tokens, scaled before
        factors = torch.zeros(6, 4).scatter(1, index, weights).T[..., None]
        wanted = model[prefix]((x * factors).reshape(-1, HIDDEN)).view(4, 6, HIDDEN).sum(dim=0)
    else:
        wanted = next(one for full, one in model.items() if full in (prefix, prefix.replace(block, "mlp")))(
            x, index, weights
        )
    torch.testing.assert_close(total, wanted)
