"""Experts that a checkpoint stores as one tensor a layer: compressed, loaded, saved, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints
from helpers import packed_models as models
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import tersor
from tersor.checkpoint.inspect import inspect
from tersor.errors import CheckpointError, FormatError, NonFiniteError
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.nn import PackedStack

CASES = {
    "gpt_oss": {"format": "fp4_e2m1", "group_size": 4, "overrides": {"down_proj": "int8"}},
    "llama4_text": {"format": "fp6_e3m2"},
    "granitemoe": {"format": "int4", "group_size": 16, "scale_dtype": "bfloat16"},
    "gemma4_text": {"format": "uint5"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> models.Case:
    return models.case(request.param, tmp_path_factory.mktemp(request.param), CASES[request.param])


@pytest.fixture(scope="module")
def loaded(case: models.Case) -> Any:
    return AutoModelForCausalLM.from_pretrained(case.packed)


def test_logits_are_those_of_the_decoded_weights(case: models.Case, loaded: Any) -> None:
    models.check_logits(case, loaded)
    assert all(
        isinstance(module.gate_up_proj, PackedStack) for module in loaded.modules() if type(module) is FusedExperts
    )
    assert any(type(module) is FusedExperts for module in loaded.modules())


def test_compressed_while_loading_and_saved_it_is_the_same_checkpoint(case: models.Case, loaded: Any) -> None:
    while_loading = AutoModelForCausalLM.from_pretrained(
        case.plain, quantization_config=tersor.TersorConfig(**case.options), dtype=torch.float32
    )
    assert models.same(while_loading.state_dict(), loaded.state_dict())
    for model in (while_loading, loaded):
        model.save_pretrained(case.folder / "again")
        assert models.same(models.tensors(case.folder / "again"), models.tensors(case.packed))


def test_dequantize_gives_the_plain_architecture_back(case: models.Case, loaded: Any) -> None:
    models.check_dequantize(case, loaded)


@pytest.mark.parametrize(("name", "pattern"), [("gpt_oss", r"layers\.0.*gate_up"), ("granitemoe", r"experts\.down")])
def test_one_of_the_two_weights_may_stay_as_it_is(name: str, pattern: str, tmp_path: Path) -> None:
    plain = models.plain(name, tmp_path / "plain")
    packed = models.compressed(plain, tmp_path / "packed", ignore=[pattern])
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert sum(isinstance(module, PackedStack) for module in model.modules()) == (3 if name == "gpt_oss" else 2)
    reference = AutoModelForCausalLM.from_pretrained(models.decoded(plain, packed, tmp_path / "decoded"))
    with torch.no_grad():
        got, expected = (each(models.token_ids()).logits for each in (model, reference))
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_patterns_find_the_module_that_holds_fused_experts(tmp_path: Path) -> None:
    plain = models.plain("gpt_oss", tmp_path / "plain")
    options = {"ignore": [r"layers\.0\.mlp\.experts$"], "overrides": {r"layers\.1\.mlp\.experts$": "int4"}}
    packed = models.compressed(plain, tmp_path / "packed", **options)
    model = AutoModelForCausalLM.from_pretrained(packed)
    stacks = {name: stack.scheme.name for name, stack in model.named_modules() if isinstance(stack, PackedStack)}
    assert stacks == {f"model.layers.1.mlp.experts.{name}": "int4" for name in ("gate_up_proj", "down_proj")}
    items = {item.name: item.format for item in inspect(packed, read_architecture).items}
    assert items["model.layers.1.mlp.experts.down_proj"] == "int4:row:float16"
    rows = {row.name: row.note for row in tersor.quantize(plain, None, dry_run=True, **options).rows}
    assert rows["model.layers.0.mlp.experts.down_proj"] == f"ignored by {options['ignore'][0]!r}"
    assert rows["model.layers.0.mlp.experts.down_proj_bias"] == ""


def test_a_model_that_is_cast_and_loaded_anew_has_the_biases_and_weights_of_now(tmp_path: Path) -> None:
    plain = models.plain("gpt_oss", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(models.compressed(plain, tmp_path / "packed"))
    ids, state = models.token_ids(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids).logits
        model.to(torch.float64)
        torch.testing.assert_close(model(ids).logits.float(), before, rtol=1e-3, atol=1e-4)
        model.to(torch.float32)
        other = {key: tensor.flip(0) if ".experts." in key else tensor for key, tensor in state.items()}
        model.load_state_dict(other)
        flipped = model(ids).logits
        assert float((flipped - before).abs().max()) > 0.01
        model.load_state_dict(state)
        torch.testing.assert_close(model(ids).logits, before)


def test_broken_and_missing_weights_of_fused_experts_are_named(tmp_path: Path) -> None:
    plain = models.plain("gpt_oss", tmp_path / "plain")
    packed, name = models.compressed(plain, tmp_path / "packed"), "model.layers.1.mlp.experts.down_proj"
    tensors = models.tensors(packed)
    del tensors[f"{name}.weight_scale"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_scale is missing"):
        AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_scale is missing"):
        inspect(packed, read_architecture)
    tensors = models.tensors(plain)
    tensors[name][2, 5, 7] = float("nan")
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    for broken in (plain, AutoModelForCausalLM.from_pretrained(plain)):
        with pytest.raises(NonFiniteError, match=rf"{name}' holds nan at \[2, 5, 7\]"):
            tersor.quantize(broken, **({"output": tmp_path / "out"} if broken is plain else {}))
    with pytest.raises(NonFiniteError, match=r"holds nan at \[2, 5, 7\]"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=tersor.TersorConfig())


def test_inspect_lists_the_experts_of_a_layer_as_one_weight(tmp_path: Path) -> None:
    packed = models.compressed(models.plain("granitemoe", tmp_path / "plain"), tmp_path / "packed", format="int4")
    found = {item.name: item for item in inspect(packed, read_architecture).items}
    item = found["model.layers.0.block_sparse_moe.input_linear.weight"]
    assert item.compressed and item.shape == (4, 96, 64) and item.format == "int4:row:float16"
    assert item.bits_per_weight == pytest.approx(4.25)


@pytest.mark.parametrize("export", ["compressed-tensors", "quark", "humming"])
def test_formats_of_engines_that_want_experts_one_by_one_refuse_fused_ones(export: str, tmp_path: Path) -> None:
    plain = models.plain("gpt_oss", tmp_path / "plain", torch.bfloat16, intermediate_size=64)
    scheme = {"compressed-tensors": "int8", "quark": "mxfp4_e2m1", "humming": "int8"}[export]
    with pytest.raises(FormatError, match=rf"{export} readers expect a tensor of each expert, and .*down_proj holds"):
        tersor.quantize(plain, tmp_path / "out", format=scheme, export=export)
    report = tersor.quantize(plain, tmp_path / "out", format=scheme, export=export, ignore=["experts"])
    assert len(report.compressed) == 8


QWEN3_VL = {
    "text_config": {
        **{name: size for name, size in checkpoints.SMALL.items() if name != "max_position_embeddings"},
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
    },
}


@pytest.mark.parametrize("turned", [False, True])
def test_experts_whose_axes_transformers_turns_while_loading_are_stored_one_way(turned: bool, tmp_path: Path) -> None:
    """Qwen3-VL releases keep [E, IC, OC], its model [E, OC, IC]; transformers turns what needs it."""
    plain, kind = tmp_path / "plain", AutoModelForImageTextToText
    kind.from_config(AutoConfig.for_model("qwen3_vl_moe", **QWEN3_VL), dtype=torch.float32).save_pretrained(plain)
    if turned:
        tensors = models.tensors(plain)
        released = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
        save_file(released, plain / "model.safetensors", {"format": "pt"})
    packed, ids = models.compressed(plain, tmp_path / "packed", format="int8"), models.token_ids()
    stored = {k: v.shape[:2] for k, v in models.tensors(packed).items() if k.endswith("gate_up_proj.weight_packed")}
    assert set(stored.values()) == {(4, 48)}
    loaded, before, live = (kind.from_pretrained(folder) for folder in (packed, plain, plain))
    while_loading = kind.from_pretrained(plain, quantization_config=tersor.TersorConfig(format="int8"))
    tersor.quantize(live, format="int8")
    for model in (loaded, while_loading, live):
        model.save_pretrained(tmp_path / "again")
        assert models.same(models.tensors(tmp_path / "again"), models.tensors(packed))
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "unpacked")
    unpacked = kind.from_pretrained(tmp_path / "unpacked")
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (before, live, unpacked)]
    assert float((logits[1] - logits[0]).abs().max()) < 0.05 * float(logits[0].abs().max())
    torch.testing.assert_close(logits[2], logits[1])
