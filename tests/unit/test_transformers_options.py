"""Compressed models in transformers: dtypes, devices, names, overrides, shards, other heads, copies, compilation."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed_models as models
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import tersor
from tersor.integrations.transformers.experts import PackedExperts
from tersor.nn import PackedLinear


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    plain = models.plain("llama", folder / "plain", torch.bfloat16)
    return plain, models.compressed(plain, folder / "packed", format="fp6")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixtral")
    plain = models.plain("mixtral", folder / "plain", torch.bfloat16)
    return plain, models.compressed(plain, folder / "packed", format="fp6")


def packed_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".weight_" in name}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float16),
        ("mixtral", torch.float16),
        ("mixtral", torch.float32),
        ("gpt2", torch.bfloat16),
        ("qwen2", torch.float32),
    ],
    ids=str,
)
def test_the_dtype_asked_for_is_that_of_everything_plain(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = models.plain(name, tmp_path / "plain", torch.bfloat16)
    packed = models.compressed(plain, tmp_path / "packed", format="fp6")
    stored = {key: tensor for key, tensor in models.tensors(packed).items() if ".weight_" in key}
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    while_loading = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype, quantization_config=tersor.TersorConfig())
    for model in (loaded, while_loading):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {module.dtype for module in model.modules() if isinstance(module, PackedLinear)} == {dtype}
        # Weights are compressed from the dtype they are stored in, whatever dtype the model takes.
        held = packed_tensors(model)
        assert len(held) == len(stored)
        assert {t.dtype for t in held.values()} == {t.dtype for t in stored.values()} == {torch.int32, torch.float16}
        with torch.no_grad():
            assert model(models.token_ids()).logits.dtype == dtype
    assert models.same(packed_tensors(loaded), packed_tensors(while_loading))
    assert all(torch.equal(stored[key], value) for key, value in packed_tensors(loaded).items() if key in stored)


def test_without_a_dtype_the_checkpoint_decides(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, packed = llama
    assert AutoModelForCausalLM.from_pretrained(packed).dtype == torch.bfloat16
    stated = json.loads((plain / "config.json").read_text())
    del stated["dtype"]
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in plain.glob("*.safetensors"):
        save_file(models.tensors(plain), silent / file.name, {"format": "pt"})
    (silent / "config.json").write_text(json.dumps(stated))
    out = models.compressed(silent, tmp_path / "packed", format="fp6")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=lambda value: str(value)
)
@pytest.mark.parametrize("while_loading", [False, True])
def test_device_map(llama: tuple[Path, Path], device_map: dict[str, Any] | str, while_loading: bool) -> None:
    plain, packed = llama
    options = {"quantization_config": tersor.TersorConfig()} if while_loading else {}
    model = AutoModelForCausalLM.from_pretrained(plain if while_loading else packed, device_map=device_map, **options)
    expected = AutoModelForCausalLM.from_pretrained(packed)
    assert models.same(model.state_dict(), expected.state_dict())
    ids = models.token_ids()
    with torch.no_grad():
        got, wanted = model(ids.to(model.device)).logits.cpu(), expected(ids).logits
    assert float((got - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())


def test_a_device_map_is_made_from_compressed_sizes(llama: tuple[Path, Path]) -> None:
    from accelerate.utils import compute_module_sizes

    plain, packed = llama
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    quantizer = AutoModelForCausalLM.from_pretrained(plain, quantization_config=tersor.TersorConfig()).hf_quantizer
    weight = torch.empty(96, 64, dtype=torch.bfloat16, device="meta")
    packed_size = quantizer.param_element_size(loaded, "model.layers.0.mlp.up_proj.weight", weight)
    assert packed_size == pytest.approx((6 + 16 / 64) / 8)
    assert quantizer.param_element_size(loaded, "lm_head.weight", weight) == 2
    assert compute_module_sizes(loaded)["model.layers.0.mlp.up_proj"] == 96 * (64 * 6 // 8 + 2)


def test_disk_offload_is_refused(llama: tuple[Path, Path]) -> None:
    with pytest.raises(tersor.errors.UnsupportedError, match="cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(llama[1], device_map={"model": "cpu", "lm_head": "disk"})


def test_ignore_and_overrides_reach_the_modules(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    overrides = {r"layers\.0\.mlp\.down_proj": "int8:g32", "down_proj": "int4", r"^lm_head": "fp8_e4m3"}
    options = {"format": "fp5_e2m2", "ignore": [r"layers\.1\.self_attn"], "overrides": overrides}
    packed = models.compressed(plain, tmp_path / "packed", **options)
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    while_loading = AutoModelForCausalLM.from_pretrained(plain, quantization_config=tersor.TersorConfig(**options))
    for model in (loaded, while_loading):
        schemes = {name: m.scheme.key() for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        assert schemes["model.layers.0.mlp.down_proj"] == "int8:g32:float16"
        assert schemes["model.layers.1.mlp.down_proj"] == "int4:row:float16"
        assert schemes["lm_head"] == "fp8_e4m3:row:float16"
        assert schemes["model.layers.0.self_attn.q_proj"] == "fp5_e2m2:row:float16"
        assert not any("layers.1.self_attn" in name for name in schemes)
    assert models.same(loaded.state_dict(), while_loading.state_dict())
    # transformers sorts the keys of config.json; the order of overrides must survive that.
    assert sorted(overrides) != list(overrides)
    loaded.save_pretrained(tmp_path / "again")
    assert models.config(tmp_path / "again") == models.config(packed)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert models.same(again.state_dict(), loaded.state_dict())
    assert again.model.layers[0].mlp.down_proj.scheme.key() == "int8:g32:float16"


def test_an_output_head_of_its_own_is_packed_though_the_config_ties_it(tmp_path: Path) -> None:
    plain = models.plain("llama", tmp_path / "plain", tie_word_embeddings=False)
    said = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
    packed = models.compressed(plain, tmp_path / "packed", overrides={"lm_head": "int8"})
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    config = tersor.TersorConfig(overrides={"lm_head": "int8"})
    while_loading = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    for model in (loaded, while_loading):
        model.tie_weights()
        assert model.lm_head.scheme.name == "int8"
        expected = models.tensors(packed)["lm_head.weight_packed"]
        assert torch.equal(model.lm_head.weight_packed, expected)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))


def test_an_override_may_be_a_mapping() -> None:
    text = tersor.TersorConfig("fp5", overrides={"a": "int8:g32:bfloat16", "b": "int4"}, group_size=64)
    mapping = tersor.TersorConfig(
        "fp5_e2m2",
        group_size=64,
        overrides={
            "a": {"format": "int8", "group_size": 32, "scale_dtype": "bfloat16"},
            "b": {"format": "int4", "group_size": 64},
        },
    )
    assert text == mapping
    assert text != tersor.TersorConfig()
    assert dict(text) == text.to_dict() == json.loads(text.to_json_string())
    assert (
        tersor.TersorConfig.from_dict(text.to_dict()) == text == copy.deepcopy(text) == pickle.loads(pickle.dumps(text))
    )


def test_experts_may_differ_and_be_left_alone(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = mixtral
    options = {
        "format": "fp6_e3m2",
        "ignore": [r"layers\.0\..*experts", r"experts\.1\.w2"],
        "overrides": {r"experts\.2\.": "int4", r"experts\.\d\.w3": "fp8_e4m3:g16"},
    }
    packed = models.compressed(plain, tmp_path / "packed", **options)
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    experts = {name: m.scheme.key() for name, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    prefix = "model.layers.1.mlp.experts"
    assert experts[f"{prefix}.2.w3"] == "int4:row:float16"
    assert experts[f"{prefix}.3.w3"] == "fp8_e4m3:g16:float16"
    assert experts[f"{prefix}.3.w1"] == "fp6_e3m2:row:float16"
    assert f"{prefix}.1.w2" not in experts
    assert not any("layers.0.mlp" in name for name in experts)
    assert isinstance(loaded.model.layers[0].mlp.experts, PackedExperts)
    decoded = models.decoded(plain, packed, tmp_path / "decoded")
    reference = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
    while_loading = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=tersor.TersorConfig(**options), dtype=torch.float32
    )
    assert models.same(loaded.state_dict(), while_loading.state_dict())
    # The decoded checkpoint is bfloat16, so compare what stayed plain exactly and the rest within its rounding.
    with torch.no_grad():
        got, expected = loaded(models.token_ids()).logits, reference(models.token_ids()).logits
    assert float((got - expected).abs().max()) < 0.02 * float(expected.abs().max())
    loaded.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))


def test_experts_left_alone_altogether_stay_fused(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    packed = models.compressed(mixtral[0], tmp_path / "packed", ignore=["experts"])
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    assert not any(isinstance(module, PackedExperts) for module in loaded.modules())
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, PackedLinear)
    loaded.save_pretrained(tmp_path / "again")
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))


def test_experts_without_a_token_do_nothing(mixtral: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral[1], dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    x = torch.randn(3, 64)
    chosen, factors = torch.tensor([[2, 0], [2, 0], [0, 2]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0]])
    expected = torch.zeros(3, 64)
    for token in range(3):
        for expert, factor in zip(chosen[token], factors[token], strict=True):
            layers = experts._modules[str(int(expert))]
            gate, up = (layers[name](x[token]) for name in ("w1", "w3"))
            expected[token] += factor * layers["w2"](torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(experts(x, chosen, factors), expected)
    assert experts(torch.empty(0, 64), chosen[:0], factors[:0]).shape == (0, 64)
    assert "num_experts=4" in repr(experts)


def test_sharded_checkpoints(tmp_path: Path) -> None:
    plain = models.plain("qwen3_moe", tmp_path / "plain", torch.bfloat16, max_shard_size="40KB")
    packed = models.compressed(plain, tmp_path / "packed", shard_size=30_000)
    assert len(list(plain.glob("*.safetensors"))) > 2 and len(list(packed.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    while_loading = AutoModelForCausalLM.from_pretrained(plain, quantization_config=tersor.TersorConfig())
    assert models.same(loaded.state_dict(), while_loading.state_dict())
    loaded.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))


def test_names_without_the_base_model_prefix(tmp_path: Path) -> None:
    # The GPT-2 of the Hub calls its tensors h.0.attn.c_attn.weight, without "transformer.".
    plain = models.plain("gpt2", tmp_path / "plain")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in models.tensors(plain).items()}
    save_file(renamed, plain / "model.safetensors", {"format": "pt"})
    packed = models.compressed(plain, tmp_path / "packed", overrides={r"^transformer\.h\.1\.": "int8"})
    assert "h.0.attn.c_attn.weight_packed" in models.tensors(packed)
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    assert loaded.transformer.h[1].attn.c_attn.scheme.name == "int8"
    assert loaded.transformer.h[0].attn.c_attn.transposed
    assert loaded.transformer.h[0].attn.c_attn.weight_packed.shape[0] == 192
    reference = AutoModelForCausalLM.from_pretrained(models.plain("gpt2", tmp_path / "other"))
    with torch.no_grad():
        got, expected = loaded(models.token_ids()).logits, reference(models.token_ids()).logits
    assert float((got - expected).abs().max()) < 0.5 * float(expected.abs().max())
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert models.same(again.state_dict(), loaded.state_dict())


def test_the_base_model_alone(llama: tuple[Path, Path]) -> None:
    base = AutoModel.from_pretrained(llama[1])
    whole = AutoModelForCausalLM.from_pretrained(llama[1])
    with torch.no_grad():
        expected = whole.model(models.token_ids()).last_hidden_state
        assert torch.equal(base(models.token_ids()).last_hidden_state, expected)


def test_another_head_on_a_compressed_base(llama: tuple[Path, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama[1], num_labels=3)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert isinstance(model.score, torch.nn.Linear)
    with torch.no_grad():
        assert model(models.token_ids()).logits.shape == (2, 3)


def test_models_can_be_copied_pickled_and_cast(llama: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    ids = models.token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(ids).logits, expected)
            assert models.same(other.state_dict(), model.state_dict())
        wide = copy.deepcopy(model).to(torch.float32)
        assert models.same(packed_tensors(wide), packed_tensors(model))
        assert wide(ids).logits.dtype == torch.float32


def test_a_state_dict_travels_between_models(llama: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    other = AutoModelForCausalLM.from_pretrained(llama[1])
    for module in other.modules():
        if isinstance(module, PackedLinear):
            module.weight_packed.zero_()
    assert not models.same(model.state_dict(), other.state_dict())
    assert not any(other.load_state_dict(model.state_dict()))
    assert models.same(model.state_dict(), other.state_dict())


def test_save_pretrained_takes_the_stream_from_kernel_layouts(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    layer = model.model.layers[0].mlp.up_proj
    layer._set_weight(layer.packed_weight().to_layout("tiles_bfloat16"))
    model.save_pretrained(tmp_path / "again")
    assert layer.layout == "tiles_bfloat16"
    assert not layer._state_dict_hooks
    assert models.same(models.tensors(tmp_path / "again"), models.tensors(llama[1]))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_compiles_in_one_graph(name: str, tmp_path: Path) -> None:
    plain = models.plain(name, tmp_path / "plain", num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(models.compressed(plain, tmp_path / "packed"))
    assert model.hf_quantizer.is_compileable
    ids = models.token_ids()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_what_transformers_asks_of_a_quantizer(llama: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    assert model.is_quantized and model.quantization_method == "tersor"
    assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable
