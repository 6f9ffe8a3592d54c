"""Exports: layers that engines join, routers, experts and heads are said as the readers take them, or refused."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor.checkpoint.exports import get_export
from tersor.checkpoint.exports.joined import routers_and_experts
from tersor.checkpoint.modules import Architecture, Linear, LinearLayer, Skipped
from tersor.convert import quantize
from tersor.errors import FormatError
from tersor.formats import Scheme, get_scheme

EXPORTS = {"humming": "mxfp4_e2m1", "compressed-tensors": "mxfp4_e2m1", "quark": "mxfp4_e2m1"}
"""Every export with a format that it can say."""


def architecture(*names: str, tied: bool = False) -> Architecture:
    linears = {name: Linear((64, 64)) for name in names}
    modules = frozenset(names)
    return Architecture("Fake", linears, {}, {}, {}, modules, "lm_head", tied, "model", lambda _: {}, lambda _: [])


def layers(**schemes: Scheme | None) -> list[tuple[LinearLayer, Scheme | None]]:
    return [
        (LinearLayer(f"model.layers.0.{name.replace('__', '.')}", name, (64, 64)), scheme)
        for name, scheme in schemes.items()
    ]


PAIRS = [
    ("attn__q_proj", "attn__k_proj"),
    ("attn__k_proj", "attn__v_proj"),
    ("attn__wq", "attn__wv"),
    ("attn__query", "attn__value"),
    ("attn__q", "attn__k"),
    ("attn__q_lin", "attn__k_lin"),
    ("mlp__gate_proj", "mlp__up_proj"),
    ("mlp__w1", "mlp__w3"),
    ("mlp__c_fc_0", "mlp__c_fc_1"),
    ("attn__q_a_proj", "attn__kv_a_proj_with_mqa"),
    ("linear_attn__in_proj_qkv", "linear_attn__in_proj_z"),
    ("linear_attn__in_proj_b", "linear_attn__in_proj_a"),
    ("mlp__experts__0__w1", "mlp__experts__0__w2"),
    ("mlp__experts__0__up_proj", "mlp__experts__7__up_proj"),
]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("other", ["mxfp6_e2m3", None])
@pytest.mark.parametrize("pair", PAIRS)
def test_layers_that_engines_join_need_one_scheme(export: str, other: str | None, pair: tuple[str, str]) -> None:
    one = get_scheme(EXPORTS[export])
    second = None if other is None else get_scheme(other)
    found = layers(**{pair[0]: one, pair[1]: second})
    with pytest.raises(
        FormatError, match=f"^{export} readers serve .* as one layer, so they need one scheme: "
    ) as caught:
        get_export(export, "bfloat16").check_model(architecture(), found)
    assert all(layer.module in str(caught.value) for layer, _ in found) and "\n" not in str(caught.value)
    get_export(export, "bfloat16").check_model(architecture(), layers(**dict.fromkeys(pair, one)))


@pytest.mark.parametrize("export", EXPORTS)
def test_layers_of_different_modules_may_differ(export: str) -> None:
    one, other = get_scheme("mxfp4_e2m1"), get_scheme("mxfp6_e2m3")
    found = layers(attn__q_proj=one, cross__k_proj=other, attn__o_proj=None, mlp__down_proj=other, mlp__w2=one)
    get_export(export, "bfloat16").check_model(architecture(), found)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_head_that_is_tied_is_not_exported_compressed(export: str) -> None:
    head = [(LinearLayer("lm_head", "lm_head", (96, 64), skipped=Skipped.HEAD), get_scheme(EXPORTS[export]))]
    with pytest.raises(FormatError, match=r"readers tie lm_head to the embedding.*leave lm_head out of the overrides"):
        get_export(export, "bfloat16").check_model(architecture("lm_head", tied=True), head)


@pytest.mark.parametrize("export", ["humming", "quark"])
def test_a_head_that_readers_never_compress_is_refused(export: str, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    with pytest.raises(FormatError, match="readers never compress lm_head"):
        quantize(source, tmp_path / "out", format="mxfp4_e2m1", overrides=["lm_head=mxfp4_e2m1"], export=export)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("export", EXPORTS)
def test_transposed_layers_are_named(export: str, tmp_path: Path) -> None:
    source = checkpoints.save("gpt2", tmp_path / "model")
    with pytest.raises(FormatError, match=r"transposed layers of GPT2LMHeadModel \(transformer.h.0.attn.c_attn\)"):
        quantize(source, tmp_path / "out", format="mxfp4_e2m1", export=export)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_layers_whose_names_begin_alike_need_one_scheme_for_quark() -> None:
    found = layers(mlp__fc=get_scheme("mxfp4_e2m1"), mlp__fc_out=get_scheme("mxfp6_e2m3"))
    with pytest.raises(FormatError, match=r"quark readers take model.layers.0.mlp.fc for model.layers.0.mlp.fc_out"):
        get_export("quark", "bfloat16").check_model(architecture(), found)
    get_export("compressed-tensors", "bfloat16").check_model(architecture(), found)


def test_a_float32_model_is_not_exported_for_humming(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model", dtype=torch.float32)
    with pytest.raises(FormatError, match=r"humming readers run float16 and bfloat16 models, .* float32"):
        quantize(source, tmp_path / "out", format="int4", scale_dtype="e8m0", group_size=32, export="humming")


def test_layers_that_humming_readers_rename_need_one_scheme() -> None:
    names = ("model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.down_proj")
    found = [
        (LinearLayer(name, name, (64, 64)), get_scheme(scheme, None, "bfloat16"))
        for name, scheme in zip(names, ("int4", "int8"), strict=True)
    ]
    with pytest.raises(FormatError, match=r"by other names, .* leave the overrides out"):
        get_export("humming", "bfloat16").check_model(architecture(*names), found)


# Routers and experts


def test_routers_and_experts_have_the_names_of_the_checkpoint_too() -> None:
    modules = ["model.layers.0.mlp", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts", "model.layers.1.mlp"]
    stems = ["model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.self_attn.q_proj"]
    names = routers_and_experts(modules, [LinearLayer(stem, stem, (8, 8)) for stem in stems])
    assert names == {
        f"model.layers.0.{parent}.{leaf}" for parent in ("mlp", "block_sparse_moe") for leaf in ("gate", "experts")
    }


def found_by(config: dict[str, Any], name: str, kind: str) -> bool:
    """Tell whether a reader that knows only names takes a linear layer for a compressed one."""
    if config["quant_method"] == "humming":
        skipped = any(part in name for part in config["ignore"])
        return not skipped and not any(key[0] == "-" and re.match(key[2:], name) for key in config["dynamic"])
    if config["quant_method"] == "quark":
        return not any(fnmatch.fnmatch(name, pattern) for pattern in config["exclude"])

    def matches(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else target in (name, kind)

    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    return any(map(matches, targets)) and not any(map(matches, config["ignore"]))


@pytest.mark.parametrize("export", EXPORTS)
def test_routers_are_left_alone_and_experts_found(export: str, tmp_path: Path) -> None:
    source = checkpoints.save("mixtral", tmp_path / "model")
    report = quantize(source, tmp_path / "out", format=EXPORTS[export], export=export)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    for row in report.rows:
        if len(row.shape) == 2 and "embed_tokens" not in row.name:
            stem = row.name.removesuffix(".weight")
            assert found_by(config, stem, "Linear") == (row.scheme is not None), stem
    experts = "model.layers.0.block_sparse_moe.experts"
    assert found_by(config, experts, "Linear") and found_by(config, f"{experts}.0.gate_proj", "Linear")


@pytest.mark.parametrize("export", EXPORTS)
def test_experts_that_are_left_alone_are_said(export: str, tmp_path: Path) -> None:
    source = checkpoints.save("mixtral", tmp_path / "model")
    quantize(source, tmp_path / "out", format=EXPORTS[export], export=export, ignore=[r"layers\.0\..*experts"])
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    experts = "model.layers.{}.block_sparse_moe.experts"
    assert not found_by(config, experts.format(0), "Linear") and found_by(config, experts.format(1), "Linear")
    if export == "compressed-tensors":
        assert not found_by(config, f"{experts.format(0)}.0.gate_proj", "Linear")
        assert found_by(config, f"{experts.format(1)}.0.gate_proj", "Linear")


def test_experts_of_another_scheme_are_found_by_the_readers_names(tmp_path: Path) -> None:
    source = checkpoints.save("mixtral", tmp_path / "model")
    overrides = [r"layers\.0\..*experts=int8", r"layers\.1\.self_attn\.(q|k|v)_proj=int3"]
    quantize(source, tmp_path / "out", format="int4", export="compressed-tensors", overrides=overrides)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    bits = {}
    for group in config["config_groups"].values():
        assert "Linear" not in group["targets"], "a class would come before the parts of a joined layer"
        for name in ("model.layers.0.block_sparse_moe.experts.0.gate_proj", "model.layers.1.self_attn.k_proj"):
            if any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in group["targets"]):
                bits[name.rpartition(".")[2]] = group["weights"]["num_bits"]
    assert bits == {"gate_proj": 8, "k_proj": 3}


def test_an_ignored_head_hides_no_other_layer() -> None:
    """Readers of humming leave alone what an ignored name is a part of."""
    one = get_scheme("int4", None, "bfloat16")
    found: list[tuple[LinearLayer, Scheme | None]] = [
        (LinearLayer("encoder.0.output.dense", "encoder.0.output.dense", (64, 64)), one),
        (LinearLayer("output", "output", (64, 64), skipped=Skipped.HEAD), None),
    ]
    export = get_export("humming", "bfloat16")
    export.check_model(architecture(), found)
    from tersor.checkpoint.config import QuantizationConfig

    config = export.quantization_config(QuantizationConfig(one, (), (), {}), found, "output")
    assert found_by(config, "encoder.0.output.dense", "Linear") and not found_by(config, "output", "Linear")


@pytest.mark.parametrize("export", ["humming", "quark"])
def test_a_scheme_that_every_layer_overrides_is_not_stated(export: str, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    quantize(source, tmp_path / "out", format="uint4", overrides=[".=mxfp4_e2m1"], export=export)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    if export == "humming":
        assert config["b_dtype"] == "float4e2m1" and not any(key[0] == "+" for key in config["dynamic"])
    else:
        assert config["global_quant_config"]["weight"]["dtype"] == "fp4" and config["layer_quant_config"] == {}


# Read back by transformers


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mixtral", {"format": "int4", "group_size": 16}),
        ("qwen2", {"format": "int6", "group_size": 8}),
        ("qwen2_moe", {"format": "mxfp4_e2m1", "ignore": ["shared_expert_gate"]}),
        ("phi", {"format": "int8"}),
        ("llama", {"format": "int3", "group_size": 20, "ignore": ["self_attn"]}),
        ("llama", {"format": "int7"}),
        ("deepseek_v3", {"format": "int4", "overrides": [r"(q_a_proj|kv_a_proj_with_mqa)$=int8"]}),
    ],
)
def test_transformers_reads_what_tersor_means(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Logits of the export are those of a plain model that holds our decoded weights, biases and experts too."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from transformers import AutoModelForCausalLM

    changes = {"hidden_size": 60, "num_attention_heads": 2, "intermediate_size": 100} if model == "llama" else {}
    source = checkpoints.save(model, tmp_path / "model", **changes)
    quantize(source, tmp_path / "export", export="compressed-tensors", **options)
    report = quantize(source, tmp_path / "own", **{"scale_dtype": "bfloat16", **_own(options)})
    own, plain = checkpoints.weights(tmp_path / "own"), checkpoints.weights(source)
    for row in report.compressed:
        stem = row.name.removesuffix(".weight")
        plain[row.name] = checkpoints.decode(own, stem, Scheme.from_key(row.scheme), row.shape[1]).bfloat16()
    from safetensors.torch import save_file

    save_file(plain, source / "model.safetensors", {"format": "pt"})
    x = torch.arange(7)[None]
    expected = AutoModelForCausalLM.from_pretrained(source)(x).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export")(x).logits
    assert torch.equal(found, expected)


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "scale_dtype": None} if options["format"].startswith("mx") else options
