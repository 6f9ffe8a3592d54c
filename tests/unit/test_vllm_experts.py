"""The experts of a layer in vLLM: two stacks of this rank's, whoever chose among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import checkpoints, mixes, packed_models, vllm_stand_in
from helpers.vllm_layers import HIDDEN, LAYER, config_of, loading
from safetensors.torch import save_file

from tersor.checkpoint.pack import Packed, pack
from tersor.convert import quantize
from tersor.errors import CheckpointError, NonFiniteError, UnsupportedError
from tersor.formats import Scheme
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


def loaded(directory: Path, changed: dict[str, torch.Tensor] | None = None) -> Any:
    """Return the experts of the first layer of a mixture, with some of their tensors changed."""
    prefix = f"{LAYER}.mlp.experts"
    layer: Any = vllm_stand_in.RoutedExperts(config_of(directory), prefix, 4, HIDDEN, HIDDEN)
    with loading():
        for name, tensor in {**checkpoints.weights(directory), **(changed or {})}.items():
            if name.startswith(f"{prefix}."):
                expert, projection, own = name.removeprefix(f"{prefix}.").split(".", 2)
                assert layer.load(int(expert), projection, own, tensor)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def test_plain_experts_are_packed_together_and_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_to: list[torch.Tensor] = []

    def seen(weight: torch.Tensor, scheme: Scheme) -> Packed:
        packed_to.append(weight)
        return pack(weight, scheme)

    monkeypatch.setattr("tersor.integrations.vllm.arriving.pack", seen)
    made = packed_models.case("qwen3_moe", tmp_path, {}, moe_intermediate_size=HIDDEN)
    layer, wanted = loaded(made.plain), loaded(made.packed)
    assert [len(weight) for weight in packed_to] == [4 * 3 * HIDDEN]
    for name, tensor in wanted.tersor.named_buffers():
        assert torch.equal(layer.tersor.get_buffer(name), tensor), name
    monkeypatch.setattr("tersor.integrations.vllm.experts._TOGETHER", 2 * HIDDEN * HIDDEN * 4)
    packed_to.clear()
    few = loaded(made.plain)
    assert [len(weight) for weight in packed_to] == [2 * HIDDEN] * 6
    for name, tensor in layer.tersor.named_buffers():
        assert torch.equal(few.tersor.get_buffer(name), tensor), name


def test_a_plain_expert_that_cannot_be_packed_is_named(tmp_path: Path) -> None:
    plain = packed_models.plain("qwen3_moe", tmp_path, moe_intermediate_size=HIDDEN)
    name = f"{LAYER}.mlp.experts.2.up_proj.weight"
    tensor = checkpoints.weights(plain)[name].clone()
    tensor[5, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"'{name}' holds nan at \[5, 7\]"):
        loaded(plain, {name: tensor})
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('.weight')}: the weight is \[64, 60\]"):
        loaded(plain, {name: tensor[:, :60]})


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

    class Other(vllm_stand_in.RoutedExperts):
        activation = "relu2"

    class Biased(vllm_stand_in.RoutedExperts):
        biased = True

    class Clamped(vllm_stand_in.ClampedExperts):
        biased, swiglu_limit = False, 5.0

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, self.swiglu_limit if name == "swiglu_limit" else value)

    for kind, why in ((Other, "by relu2"), (Biased, "they have biases"), (Clamped, "clamped at other numbers")):
        with pytest.raises(UnsupportedError, match=rf"{prefix}: packed experts do not run here: .*{why}"):
            kind(config, prefix, 4, HIDDEN, 32)


STACKED = {
    "granitemoe": ("block_sparse_moe", 2, {"intermediate_size": HIDDEN}),
    "llama4_text": ("feed_forward", 1, {"intermediate_size": HIDDEN, "num_experts_per_tok": 1}),
}
"""Architecture -> block of experts, experts of a token, and what makes ranks cut at quanta."""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["fp6", "int4", "plain", "mixed"])
@pytest.mark.parametrize("name", STACKED)
def test_experts_in_one_tensor_are_taken_apart_while_they_are_loaded(
    tmp_path: Path, vllm: SimpleNamespace, name: str, kind: str, ranks: int
) -> None:
    block, top, changes = STACKED[name]
    if kind == "mixed":
        packed = read = mixes.compressed(name, tmp_path, ignore=["self_attn"], **changes)[1]
    else:
        grouped = {"format": "int4" if name == "llama4_text" else "uint4", "group_size": 32}
        made = packed_models.case(name, tmp_path, grouped if kind == "int4" else {}, **changes)
        packed, read = made.packed, made.plain if kind == "plain" else made.packed
    prefix = f"model.layers.1.{block}.experts"
    model = dict(load_model(packed, "cpu", "float32").named_modules())
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


GPT_OSS = vllm_stand_in.Mapper(
    suffixes={
        ".gate_up_proj": ".w13_weight",
        ".down_proj": ".w2_weight",
        ".gate_up_proj_bias": ".w13_bias",
        ".down_proj_bias": ".w2_bias",
        ".gate_up_proj_blocks": ".w13_weight",
        ".down_proj.weight": ".w2_weight",
    }
)
"""How vLLM's gpt-oss renames weights of its experts."""


def handed(read: Path, first: int = 0) -> Any:
    """Return a layer of the experts of gpt-oss, loaded as vLLM loads it."""
    config, prefix = config_of(read), f"{LAYER}.mlp.experts"
    mapper = GPT_OSS | config.get_cache_scale_mapper()
    config.apply_vllm_mapper(GPT_OSS)
    layer: Any = vllm_stand_in.ClampedExperts(config, prefix, 4, HIDDEN, HIDDEN, first=first)
    with loading():
        taken = [
            layer.take(name.removeprefix(f"{prefix}.routed_experts."), tensor)
            for name, tensor in mapper.apply(checkpoints.weights(read).items())
            if name.startswith(f"{prefix}.")
        ]
        layer.quant_method.process_weights_after_loading(layer)
    assert all(taken) and len(taken) >= 4 and not dict(layer.named_parameters())
    return layer


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["fp6", "uint4", "plain", "mixed"])
def test_experts_of_gpt_oss_have_their_biases_and_their_gate(
    tmp_path: Path, vllm: SimpleNamespace, kind: str, ranks: int
) -> None:
    if kind == "mixed":
        packed = read = mixes.compressed("gpt_oss", tmp_path, intermediate_size=HIDDEN)[1]
    else:
        options = {"format": "uint4", "group_size": 32} if kind == "uint4" else {}
        made = packed_models.case("gpt_oss", tmp_path, options, intermediate_size=HIDDEN)
        packed, read = made.packed, made.plain if kind == "plain" else made.packed
    model = load_model(packed, "cpu", "float32")
    x, index, weights = 4 * torch.randn(6, HIDDEN), torch.randint(4, (6, 2)), torch.rand(6, 2)
    total = torch.zeros(6, HIDDEN)
    for rank in range(ranks):
        vllm.ranks, vllm.rank = ranks, rank
        layer = handed(read)
        total += layer.quant_method.apply(layer, x, weights, index.int(), None, None)
    torch.testing.assert_close(total, model.model.layers[0].mlp.experts(x, index, weights))


def released(directory: Path, source: Path) -> Path:
    """Write a gpt-oss with its experts in MXFP4."""
    shutil.copytree(source, directory)
    tensors, generator = checkpoints.weights(source), torch.Generator().manual_seed(0)
    for stem in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, ic, oc = tensors.pop(stem).shape
        shape = (count, oc, ic // 32, 16)
        tensors[f"{stem}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{stem}_scales"] = torch.randint(118, 122, shape[:3], dtype=torch.uint8, generator=generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return directory


def test_mxfp4_experts_of_gpt_oss_are_packed_anew_while_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = packed_models.plain("gpt_oss", tmp_path / "plain", intermediate_size=HIDDEN)
    source = released(tmp_path / "released", plain)
    monkeypatch.setenv("TERSOR_VLLM_FORMAT", "mxfp4_e2m1")
    layer = handed(source)
    quantize(source, tmp_path / "packed", format="mxfp4_e2m1")
    model = load_model(tmp_path / "packed", "cpu", "float32")
    x, index, weights = torch.randn(6, HIDDEN), torch.randint(4, (6, 2)), torch.rand(6, 2)
    y = layer.quant_method.apply(layer, x, weights, index.int(), None, None)
    torch.testing.assert_close(y, model.model.layers[0].mlp.experts(x, index, weights))


def test_tersor_is_taken_for_a_method_that_it_decodes_where_it_is_asked_for() -> None:
    asked = vllm_stand_in.REGISTERED["tersor"].override_quantization_method
    assert asked({"quant_method": "gpt_oss_mxfp4"}, "tersor", hf_config=None) == "tersor"
    assert asked({"quant_method": "mxfp4"}, None, hf_config=None) is None
    assert asked({"quant_method": "fp8"}, "tersor", hf_config=None) is None


def test_a_gpt_oss_without_a_checkpoint_is_handed_whole_experts(tmp_path: Path) -> None:
    made = packed_models.case("gpt_oss", tmp_path, {}, intermediate_size=HIDDEN)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(made.plain / "config.json", alone)
    config, prefix = config_of(alone), f"{LAYER}.mlp.experts"
    layer: Any = vllm_stand_in.ClampedExperts(config, prefix, 4, HIDDEN, HIDDEN)
    for name, tensor in (config.get_cache_scale_mapper() | GPT_OSS).apply(checkpoints.weights(made.plain).items()):
        if name.startswith(f"{prefix}."):
            assert layer.take(name.removeprefix(f"{prefix}.routed_experts."), tensor)
    layer.quant_method.process_weights_after_loading(layer)
    model = load_model(made.packed, "cpu", "float32")
    x, index, weights = torch.randn(6, HIDDEN), torch.randint(4, (6, 2)), torch.rand(6, 2)
    y = layer.quant_method.apply(layer, x, weights, index.int(), None, None)
    torch.testing.assert_close(y, model.model.layers[0].mlp.experts(x, index, weights))


def test_a_rank_of_whole_experts_of_gpt_oss_has_the_biases_of_its_own(tmp_path: Path) -> None:
    made = packed_models.case("gpt_oss", tmp_path, {}, intermediate_size=HIDDEN)
    layer = handed(made.packed, first=2)
    model = load_model(made.packed, "cpu", "float32")
    x, index = torch.randn(2, HIDDEN), torch.tensor([[0, 1], [3, 0]])
    y = layer.quant_method.apply(layer, x, torch.ones(2, 2), index, None, None)
    alone = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(y, model.model.layers[0].mlp.experts(x, index, alone))


def test_biases_of_gpt_oss_that_do_not_arrive_are_named(tmp_path: Path) -> None:
    packed = packed_models.case("gpt_oss", tmp_path, {}, intermediate_size=HIDDEN).packed
    config, prefix = config_of(packed), f"{LAYER}.mlp.experts"
    layer: Any = vllm_stand_in.ClampedExperts(config, prefix, 4, HIDDEN, HIDDEN)
    for name, tensor in config.get_cache_scale_mapper().apply(checkpoints.weights(packed).items()):
        if name.startswith(f"{prefix}.") and not name.endswith("down_proj_bias"):
            assert layer.take(name.removeprefix(f"{prefix}.routed_experts."), tensor)
    with pytest.raises(CheckpointError, match=r"vLLM read no tensor .*mlp.experts.down_proj_bias"):
        layer.quant_method.process_weights_after_loading(layer)


def test_random_experts_of_gpt_oss_have_biases_of_zero(tmp_path: Path, vllm: SimpleNamespace) -> None:
    config = config_of(packed_models.case("gpt_oss", tmp_path, {}, intermediate_size=HIDDEN).packed)
    vllm.load_config.load_format = "dummy"
    layer: Any = vllm_stand_in.ClampedExperts(config, f"{LAYER}.mlp.experts", 4, HIDDEN, HIDDEN)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.tersor.gate_up_bias.shape == (4, 2 * HIDDEN) and not layer.tersor.gate_up_bias.any()
    assert layer.tersor.down_bias.shape == (4, HIDDEN) and not layer.tersor.down_bias.any()
