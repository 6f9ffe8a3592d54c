"""Joined layers in models of transformers: the same logits, the same state dict, and apart again."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from transformers import AutoModelForCausalLM

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.engine import Sampling
from tersor.integrations.transformers import fuse
from tersor.integrations.transformers.generate import Generator
from tersor.integrations.transformers.joined import GatedMLP, PackedPart
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear

# Architecture -> options: with biases and without, one scale a row and groups, with zero points.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"format": "fp6_e3m2"},
    "mistral": {"format": "mxfp6_e2m3"},
    "qwen2": {"format": "uint4", "group_size": 32},
    "qwen3": {"format": "int4", "group_size": 32},
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    plain = models.plain(request.param, folder / "plain")
    return models.compressed(plain, folder / "packed", **CASES[request.param])


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def fused(checkpoint: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert len(fuse.fuse(model)) == 2 * model.config.num_hidden_layers
    return model


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=models.token_ids()).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def joins(model: Any) -> set[Any]:
    return {module.join for module in model.modules() if isinstance(module, PackedPart)}


def test_logits_and_state_dict_are_those_of_the_parts(fused: Any, reference: Any) -> None:
    expected = logits(reference)
    before = reference.state_dict()
    for _ in range(2):
        assert close(logits(fused), expected)
        assert models.same(fused.state_dict(), before) and list(fused.state_dict()) == list(before)
    assert len(joins(fused)) == 2 * fused.config.num_hidden_layers
    assert all(join.weight is not None and not hasattr(join._shares, "round") for join in joins(fused))
    layer = fused.model.layers[0]
    assert isinstance(layer.mlp, GatedMLP)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert torch.equal(layer.get_submodule(name).weight, reference.model.layers[0].get_submodule(name).weight)


def test_queries_keys_and_values_take_one_product(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("linear", "gated_linear"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, real=real, name=name: calls.append((name, a[1].shape)) or real(*a))
    logits(fused)
    attention, mlp = fused.model.layers[0].self_attn, fused.model.layers[0].mlp
    wide = sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
    layers = fused.config.num_hidden_layers
    assert [name for name, _ in calls[: 4 * layers]] == ["linear", "linear", "gated_linear", "linear"] * layers
    assert calls[0][1][0] == wide and calls[2][1][0] == 2 * mlp.gate_proj.out_features


def test_parts_work_on_their_own(fused: Any, reference: Any) -> None:
    x, other = torch.randn(2, 3, fused.config.hidden_size), torch.randn(1, 3, fused.config.hidden_size)
    ours, theirs = (model.model.layers[0] for model in (fused, reference))
    names = ["self_attn.k_proj", "self_attn.q_proj", "self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj"]
    for name in names:
        for given in (x, other, x):
            assert close(ours.get_submodule(name)(given), theirs.get_submodule(name)(given))
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        mine = torch.randn(1, index + 1, fused.config.hidden_size, generator=torch.Generator().manual_seed(index))
        for _ in range(20):
            parts = [getattr(ours.self_attn, f"{name}_proj")(mine) for name in "qkv"]
        exact = [getattr(theirs.self_attn, f"{name}_proj")(mine) for name in "qkv"]
        results[index] = torch.tensor([close(a, b) for a, b in zip(parts, exact, strict=True)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(found.all() for found in results.values())


def test_loading_casting_and_new_biases_reach_the_joined_weight(fused: Any, reference: Any) -> None:
    expected = logits(reference)
    state = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    changed = copy.deepcopy(reference)
    first, second = (f"model.layers.0.self_attn.{name}_proj" for name in "vk")
    layer = changed.get_submodule(first)
    layer.weight_scale = layer.weight_scale * 2
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias + 1, requires_grad=False)
        fused.get_submodule(first).bias = torch.nn.Parameter(layer.bias.clone(), requires_grad=False)
        with torch.no_grad():
            for model in (changed, fused):
                model.get_submodule(second).bias.add_(0.5)
    fused.load_state_dict({**fused.state_dict(), f"{first}.weight_scale": layer.weight_scale.clone()})
    assert close(logits(fused), logits(changed)) and not close(logits(fused), expected)
    fused.load_state_dict(state)
    assert close(logits(fused), expected)
    cast = copy.deepcopy(reference)
    for model in (fused, cast):  # transformers' own `to` refuses a dtype for a compressed model
        for dtype in (torch.bfloat16, torch.float32):
            torch.nn.Module.to(model, dtype)
    assert models.same(fused.state_dict(), cast.state_dict())
    assert close(logits(fused), logits(cast))
    assert all(join.weight is not None for join in joins(fused))


def test_copies_stand_alone(fused: Any, reference: Any) -> None:
    expected = logits(reference)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert not joins(twin) & joins(fused)
        for join in joins(twin):
            join.weight.data.zero_()
        assert not close(logits(twin), expected)
        assert close(logits(fused), expected)


def test_saved_and_unfused_it_is_what_it_was(fused: Any, reference: Any, checkpoint: Path, tmp_path: Path) -> None:
    fused.save_pretrained(tmp_path / "saved")
    assert models.same(models.tensors(tmp_path / "saved"), models.tensors(checkpoint))
    expected = logits(reference)
    fuse.unfuse(fused)
    assert not joins(fused)
    assert {name: type(module) for name, module in fused.named_modules()} == {
        name: type(module) for name, module in reference.named_modules()
    }
    assert models.same(fused.state_dict(), reference.state_dict())
    assert close(logits(fused), expected)
    assert fuse.fuse(fused)
    assert close(logits(fused.dequantize()), expected)
    assert not any(isinstance(module, PackedLinear) for module in fused.modules())


def test_generate_gives_the_same_tokens(fused: Any, reference: Any) -> None:
    class Tokenizer:
        bos_token_id = eos_token_id = None

        def decode(self, ids: Any, **options: Any) -> str:
            return "".join(chr(65 + token % 26) for token in ids)

    found = []
    for model in (reference, fused):
        stream = Generator(model, Tokenizer()).stream([5, 6, 7], Sampling(max_new_tokens=12, ignore_eos=True))
        "".join(stream)
        found.append(stream.tokens)
    assert found[0] == found[1] and len(found[0]) == 12


def test_compiles_without_graph_breaks(fused: Any, reference: Any) -> None:
    x = torch.randn(2, 3, fused.config.hidden_size)
    ours, theirs = (model.model.layers[0] for model in (fused, reference))

    def products(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (*(getattr(ours.self_attn, f"{name}_proj")(x) for name in "qkv"), ours.mlp(x))

    with torch.inference_mode():
        compiled = torch.compile(products, fullgraph=True, backend="aot_eager")(x)
        exact = (*(getattr(theirs.self_attn, f"{name}_proj")(x) for name in "qkv"), theirs.mlp(x))
    assert all(close(a, b) for a, b in zip(compiled, exact, strict=True))


def test_what_cannot_be_joined_stays_apart(checkpoint: Path, reference: Any) -> None:
    model = copy.deepcopy(reference)
    layers = model.model.layers
    layers[0].self_attn.q_proj.register_forward_hook(lambda *a: None)
    layers[0].mlp.act_fn = torch.nn.GELU()
    key = layers[1].self_attn.k_proj
    swapped = torch.nn.Linear(key.in_features, key.out_features, bias=key.bias is not None)
    layers[1].self_attn.k_proj = swapped
    names = fuse.fuse(model)
    assert "model.layers.1.mlp" in names
    assert not {"model.layers.0.mlp", "model.layers.0.self_attn", "model.layers.1.self_attn"} & set(names)
    assert fuse.fuse(model) == []


class LlamaAttention(torch.nn.Module):
    """Has the name and the layers of transformers' class, in sizes of choice."""

    def __init__(self, sizes: tuple[int, ...], scheme: formats.Scheme, bias: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, size in zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True):
            encoded = quantize_rtn(torch.randn(size, 96, generator=generator), scheme)
            offsets = torch.randn(size, generator=generator) if bias else None
            setattr(self, name, PackedLinear.from_packed(PackedWeight.from_encoded(encoded), offsets))


@pytest.mark.parametrize("layout", ["stream", "tiles_float16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(128, 64, 64), (100, 60, 60), (64, 70, 10)])
def test_a_trace_takes_each_layers_own_rows(
    sizes: tuple[int, ...], bias: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any layout, whether or not its tiles can be cut between the layers."""
    x = torch.randn(3, 96)
    for scheme in (formats.get_scheme("fp6_e3m2"), formats.get_scheme("uint4", 32), formats.get_scheme("uint4")):
        plain = LlamaAttention(sizes, scheme, bias)
        model = torch.nn.ModuleDict({"attention": copy.deepcopy(plain)})
        with monkeypatch.context() as patched:
            patched.setattr(ops, "preferred_layout", lambda *a: layout)
            assert fuse.fuse(model) == ["attention"]
        join = model["attention"].q_proj.join
        assert join.weight.layout == layout and model["attention"].q_proj.layout == "joined"
        for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
            expected = getattr(plain, name)(x)
            assert close(join._alone(index, x, join.weight), expected)
            assert close(getattr(model["attention"], name)(x), expected)
        assert models.same(model["attention"].state_dict(), plain.state_dict())
