"""Checkpoints of mixed weights in transformers: loaded, run, saved and decoded as any other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, packed_models
from helpers.mixes import compressed, plain_weights
from torch import nn
from transformers import AutoModelForCausalLM

from tersor.convert import quantize
from tersor.errors import CheckpointError, ShapeError, UnsupportedError
from tersor.formats import Activations, Assignment
from tersor.integrations.transformers.fuse import fuse
from tersor.integrations.transformers.replace import multiply_with
from tersor.nn import MixedLinear, bits_per_weight

Saved = tuple[Path, Path, dict[str, Assignment]]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model (with biases, with Conv1D), its mix, and the levels of every module."""
    return compressed(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(saved: Saved) -> Any:
    """The mix as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(saved: Saved) -> Any:
    """The model with the decoded weights."""
    source, _, assignments = saved
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in plain_weights(source, assignments).items():
        layer = model.get_submodule(name)
        layer.weight.data = weight if isinstance(layer, nn.Linear) else weight.T.contiguous()  # type: ignore[union-attr]
    return model


def logits(model: Any) -> torch.Tensor:
    """Return what a model says of some tokens."""
    with torch.no_grad():
        return model(packed_models.token_ids(2, 7)).logits


def test_logits_are_those_of_the_decoded_weights(saved: Saved, loaded: Any, plain: Any) -> None:
    mixed = {name for name, module in loaded.named_modules() if isinstance(module, MixedLinear)}
    assert mixed == set(saved[2])
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-4)
    assert loaded.num_parameters() == plain.num_parameters()
    sizes = {name: module.shape for name, module in loaded.named_modules() if isinstance(module, MixedLinear)}
    bits = sum(saved[2][name].bits_per_weight(shape[1]) * shape[0] * shape[1] for name, shape in sizes.items())
    assert bits_per_weight(loaded) == pytest.approx(bits / sum(oc * ic for oc, ic in sizes.values()))


def test_saved_again_it_is_the_same_checkpoint(saved: Saved, loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    assert packed_models.same(packed_models.tensors(tmp_path), packed_models.tensors(saved[1]))
    assert packed_models.config(tmp_path) == packed_models.config(saved[1])


def test_decoded_it_is_the_plain_architecture(loaded: Any, plain: Any) -> None:
    model = copy.deepcopy(loaded)
    model.dequantize()
    assert not any(isinstance(module, MixedLinear) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    torch.testing.assert_close(logits(model), logits(plain))


def test_it_is_copied_cast_pickled_and_loaded_anew(loaded: Any) -> None:
    before, model = logits(loaded), pickle.loads(pickle.dumps(loaded))
    assert torch.equal(logits(model), before)
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    torch.testing.assert_close(logits(half).float(), before, rtol=0.1, atol=0.1)
    layer = next(module for module in model.modules() if isinstance(module, MixedLinear))
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    same_counts = layer.weight_level[torch.randperm(layer.out_features, generator=torch.Generator().manual_seed(0))]
    layer.load_state_dict({**stored, "weight_level": same_counts})
    assert not torch.equal(logits(model), before)
    layer.load_state_dict(stored)
    assert torch.equal(logits(model), before)
    layer.load_state_dict({**stored, "weight_level": torch.zeros_like(layer.weight_level)})
    with pytest.raises(ShapeError, match="weight_level does not fit the weights of levels"):
        logits(model)


def test_what_a_mixed_layer_does_not_do_is_said(loaded: Any) -> None:
    assert fuse(copy.deepcopy(loaded)) == []
    layer = next(module for module in loaded.modules() if isinstance(module, MixedLinear))
    with pytest.raises(UnsupportedError, match="weight of a MixedLinear is packed"):
        layer.weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedError, match=r"levels\.2: activations fp8 with weights in int8"):
        multiply_with(loaded, "fp8")
    assert layer.activations is Activations.NATIVE
    assert "x fp5_e2m2:row:float16" in repr(layer)


def test_a_layer_wraps_a_mixed_weight(saved: Saved, loaded: Any) -> None:
    layer = next(module for module in loaded.modules() if isinstance(module, MixedLinear))
    own = MixedLinear.from_packed(layer.packed_weight(), layer.bias)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(own(x), layer(x)) and torch.equal(own.weight, layer.weight)
    assert own(torch.randn(2, 3, layer.in_features, device="cpu")).shape == (2, 3, layer.out_features)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (3, layer.out_features)


def test_config_and_tensors_that_disagree_are_refused(saved: Saved, tmp_path: Path) -> None:
    source, mixed, assignments = saved
    names = list(assignments)
    quantize(source, tmp_path / "dense", format="int8")
    (tmp_path / "dense" / "config.json").write_bytes((mixed / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="is of a dense weight, and quantization_config says uint3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    some = {name: assignments[name] for name in names[1:]}
    leaf = names[0].split(".", 1)[1].replace(".", r"\.")
    quantize(source, tmp_path / "part", assignments=some, overrides={leaf + "$": "int4"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert sum(isinstance(module, MixedLinear) for module in model.modules()) == len(some)
    assert checkpoints.weights(tmp_path / "part")


def test_an_adapter_is_merged_by_decoding(loaded: Any, plain: Any) -> None:
    peft = pytest.importorskip("peft")
    leaf = next(name for name, module in loaded.named_modules() if isinstance(module, MixedLinear)).rpartition(".")[2]
    config = peft.LoraConfig(r=2, target_modules=[leaf], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(copy.deepcopy(loaded), config)
    assert any(parameter.requires_grad for parameter in adapted.parameters())
    before = logits(adapted)
    assert not torch.allclose(before, logits(plain), atol=1e-3)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), before, rtol=1e-4, atol=1e-4)
