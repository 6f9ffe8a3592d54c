"""Exports: what other engines read is what Tersor means, and what they cannot say is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints

from tersor.convert import quantize
from tersor.errors import FormatError
from tersor.formats import Scheme


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("llama", tmp_path_factory.mktemp("llama") / "model", intermediate_size=160)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save("mixtral", tmp_path_factory.mktemp("moe") / "model")


def both(
    source: Path, tmp_path: Path, export: str, **options: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, tuple[Scheme, torch.Tensor]]]:
    """Return the export's tensors and config, and module -> (scheme, float32 weight) of Tersor's own checkpoint."""
    quantize(source, tmp_path / "export", export=export, **options)
    report = quantize(source, tmp_path / "own", **{"scale_dtype": "bfloat16", **options})
    own = checkpoints.weights(tmp_path / "own")
    expected = {}
    for row in report.compressed:
        stem = row.name.removesuffix(".weight")
        scheme = Scheme.from_key(row.scheme)
        expected[stem] = (scheme, checkpoints.decode(own, stem, scheme, row.shape[1]))
    config = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]
    return checkpoints.weights(tmp_path / "export"), config, expected


# compressed-tensors

CT_OPTIONS = {
    **{f"int{bits}": {"format": f"int{bits}"} for bits in range(2, 9)},
    "int4 in groups": {"format": "int4", "group_size": 32},
    "int5 in groups of 1": {"format": "int5", "group_size": 1},
    "mxfp6": {"format": "mxfp6_e2m3", "scale_dtype": None},
    "mxfp4": {"format": "mxfp4_e2m1", "scale_dtype": None},
    "mixed": {
        "format": "int3",
        "overrides": [r"down_proj=int8:g32", r"layers\.1\.self_attn\.(q|k|v)_proj=mxfp6_e2m3"],
        "ignore": [r"layers\.0\.self_attn\.(q|k|v)_proj"],
    },
}


@pytest.mark.parametrize("case", CT_OPTIONS)
def test_compressed_tensors_reads_the_same_values(llama: Path, tmp_path: Path, case: str) -> None:
    """The library's own decompression of every layer, with the scheme it parses from config.json."""
    pytest.importorskip("compressed_tensors", minversion="0.20")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    tensors, raw, expected = both(llama, tmp_path, "compressed-tensors", **CT_OPTIONS[case])
    config = QuantizationConfig.model_validate(raw)
    schemes: dict[str, QuantizationScheme] = {}
    for stem in expected:
        named = [scheme for scheme in config.config_groups.values() if stem in scheme.targets]
        schemes[stem] = named[0] if named else next(s for s in config.config_groups.values() if "Linear" in s.targets)
    for stem, (own, wanted) in expected.items():
        scheme = schemes[stem]
        local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{stem}.")}
        compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        assert compressor.can_compress(torch.nn.Linear, scheme)
        assert set(compressor.compression_param_names(scheme)) == set(local)
        read = compressor.decompress(local, scheme)["weight"]
        assert torch.equal(read, wanted.to(read.dtype)), (stem, own)
    left = {name.removesuffix(".weight") for name in tensors if name.endswith("proj.weight")} | {"lm_head"}
    assert set(raw["ignore"]) == left


@pytest.mark.parametrize("case", ["int5 in groups of 1", "mxfp6", "mixed"])
def test_transformers_loads_the_compressed_tensors_export(llama: Path, tmp_path: Path, case: str) -> None:
    pytest.importorskip("compressed_tensors", minversion="0.20")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    _, _, expected = both(llama, tmp_path, "compressed-tensors", **CT_OPTIONS[case])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.bfloat16)
    model(torch.arange(5)[None])
    for stem, (_, wanted) in expected.items():
        assert torch.equal(model.get_submodule(stem).weight.float(), wanted.bfloat16().float()), stem


def test_compressed_tensors_rows_end_with_the_last_word(tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model", hidden_size=72, num_attention_heads=2, intermediate_size=100)
    tensors, _, expected = both(source, tmp_path, "compressed-tensors", format="int3")
    stem = "model.layers.0.mlp.down_proj"
    assert tensors[f"{stem}.weight_packed"].shape == (72, 10)
    assert tensors[f"{stem}.weight_shape"].tolist() == [72, 100]
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    for name, (scheme, wanted) in expected.items():
        shape = tuple(tensors[f"{name}.weight_shape"].tolist())
        integers = unpack_from_int32(tensors[f"{name}.weight_packed"], scheme.format.bits, shape)
        assert torch.equal(integers.float() * tensors[f"{name}.weight_scale"].float(), wanted)


# humming


def humming_scheme(config: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """The layer's configuration as vLLM's reader finds it, `None` where the layer is left alone."""
    if any(name in prefix for name in config["ignore"]) or "lm_head" in prefix:
        return None
    for key, value in config["dynamic"].items():
        if re.match(key[2:], prefix):
            return None if key[0] == "-" else {**config, **value}
    return config


@pytest.mark.parametrize(
    ("options", "dtype", "scale"),
    [
        ({"format": "fp6_e3m2"}, "float6e3m2", torch.bfloat16),
        ({"format": "fp5_e2m2", "group_size": 32}, "float5e2m2", torch.bfloat16),
        ({"format": "int5", "group_size": 16}, "int5", torch.bfloat16),
        ({"format": "mxfp4_e2m1", "scale_dtype": None}, "float4e2m1", torch.float8_e8m0fnu),
    ],
)
def test_humming_names_shapes_and_values(
    llama: Path, tmp_path: Path, options: dict[str, Any], dtype: str, scale: torch.dtype
) -> None:
    tensors, config, expected = both(llama, tmp_path, "humming", **options)
    assert config["quant_method"] == "humming" and config["b_dtype"] == dtype
    assert config["weight_scale_group_size"] == (options.get("group_size") or (32 if dtype == "float4e2m1" else 0))
    assert config["bs_dtype"] == ("float8e8m0" if scale == torch.float8_e8m0fnu else None)
    assert config["ignore"] == ["lm_head"] and config["dynamic"] == {}
    assert not {"dtype", "group_size", "a_dtype"} & set(config), "these would be read for the activations"
    for stem, (scheme, wanted) in expected.items():
        oc, ic = wanted.shape
        packed, scales = tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"]
        assert packed.dtype == torch.int32 and packed.shape == (oc, ic * scheme.format.bits // 32)
        assert scales.dtype == scale and scales.shape == (oc, scheme.groups(ic))
        codes = torch.from_numpy(checkpoints.unpack_bits(packed, scheme.format.bits, ic))
        values = scheme.format.values()[codes] * scales.float().repeat_interleave(ic // scales.shape[1], dim=1)
        assert torch.equal(values, wanted)


def test_humming_finds_layers_by_the_names_servers_give(moe: Path, tmp_path: Path) -> None:
    _, config, _ = both(
        moe,
        tmp_path,
        "humming",
        overrides=[r"layers\.0\.self_attn\.(q|k|v)_proj=int8", r"layers\.1\..*experts=int4:g32"],
        ignore=[r"layers\.1\.self_attn\.o_proj"],
    )
    dtypes = {
        "model.layers.0.self_attn.qkv_proj": "int8",
        "model.layers.0.self_attn.q_proj": "int8",
        "model.layers.0.self_attn.o_proj": "float6e2m3",
        "model.layers.0.block_sparse_moe.experts": "float6e2m3",
        "model.layers.1.self_attn.qkv_proj": "float6e2m3",
        "model.layers.1.self_attn.o_proj": None,
        "model.layers.1.block_sparse_moe.experts": "int4",
        "lm_head": None,
    }
    for name, dtype in dtypes.items():
        found = humming_scheme(config, name)
        assert (found and found["b_dtype"]) == dtype, name
    assert humming_scheme(config, "model.layers.1.block_sparse_moe.experts")["weight_scale_group_size"] == 32
    assert humming_scheme(config, "model.layers.0.self_attn.qkv_proj")["weight_scale_group_size"] == 0


# Quark


@pytest.mark.parametrize(
    ("format", "dtype"), [("mxfp6_e3m2", "fp6_e3m2"), ("mxfp6_e2m3", "fp6_e2m3"), ("mxfp4_e2m1", "fp4")]
)
def test_quark_names_shapes_and_values(llama: Path, tmp_path: Path, format: str, dtype: str) -> None:
    tensors, config, expected = both(llama, tmp_path, "quark", format=format, ignore=["o_proj"], scale_dtype=None)
    weight = config["global_quant_config"]["weight"]
    assert (weight["dtype"], weight["qscheme"], weight["group_size"], weight["scale_format"]) == (
        dtype,
        "per_group",
        32,
        "e8m0",
    )
    assert config["quant_method"] == "quark" and config["global_quant_config"]["input_tensors"] is None
    assert config["export"]["kv_cache_group"] == [] and config["layer_quant_config"] == {}
    assert config["exclude"] == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    for stem, (scheme, wanted) in expected.items():
        oc, ic = wanted.shape
        packed, scales = tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"]
        assert packed.dtype == scales.dtype == torch.uint8
        assert packed.shape == (oc, ic * scheme.format.bits // 8) and scales.shape == (oc, ic // 32)
        codes = torch.from_numpy(checkpoints.unpack_bits(packed, scheme.format.bits, ic))
        scale = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)
        assert torch.equal(scheme.format.values()[codes] * scale, wanted)


def test_quark_layers_of_another_format(llama: Path, tmp_path: Path) -> None:
    _, config, _ = both(
        llama, tmp_path, "quark", format="mxfp6_e3m2", overrides=["down_proj=mxfp4_e2m1"], scale_dtype=None
    )
    assert set(config["layer_quant_config"]) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert config["layer_quant_config"]["model.layers.0.mlp.down_proj"]["weight"]["dtype"] == "fp4"


# What they cannot say


@pytest.mark.parametrize(
    ("export", "options", "message"),
    [
        (
            "compressed-tensors",
            {"format": "fp6_e3m2"},
            "cannot say fp6_e3m2 with one scale a row in bfloat16.*it can say mxfp6",
        ),
        ("compressed-tensors", {"format": "mxfp6_e3m2"}, "cannot say mxfp6_e3m2"),
        ("compressed-tensors", {"format": "uint4"}, "cannot say uint4"),
        (
            "compressed-tensors",
            {"format": "int4", "scale_dtype": "float32"},
            "cannot say int4 with one scale a row in float32 .*in the model's dtype",
        ),
        ("compressed-tensors", {"format": "int4", "scale_dtype": "float16"}, "cannot say .* in float16"),
        ("compressed-tensors", {"format": "int4", "group_size": 32, "scale_dtype": "e8m0"}, "cannot say mxint4"),
        ("humming", {"format": "uint4"}, "cannot say uint4"),
        ("humming", {"format": "fp8_e4m3"}, "cannot say fp8_e4m3"),
        (
            "humming",
            {"format": "fp6_e3m2", "scale_dtype": "float16"},
            "cannot say .* in float16 .*in the model's dtype",
        ),
        ("humming", {"format": "fp6_e3m2", "group_size": 8}, "cannot say .*groups of 8"),
        (
            "humming",
            {"overrides": ["q_proj=int8"]},
            "serve model.layers.0.self_attn.* as one layer, so they need one scheme",
        ),
        ("humming", {"ignore": ["gate_proj"]}, "as one layer, so they need one scheme"),
        ("humming", {"overrides": ["lm_head=int8"]}, "never compress lm_head"),
        (
            "quark",
            {"format": "fp6_e3m2"},
            "quark cannot say fp6_e3m2 with one scale a row .*it can say mxfp6_e3m2, mxfp6_e2m3",
        ),
        ("quark", {"format": "mxfp8_e4m3"}, "cannot say mxfp8_e4m3"),
        ("quark", {"format": "mxfp6_e3m2", "ignore": ["k_proj"]}, "as one layer, so they need one scheme"),
    ],
)
def test_what_an_export_cannot_say_is_refused(
    llama: Path, tmp_path: Path, export: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        quantize(llama, tmp_path / "out", export=export, **options)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_transposed_layers_are_not_exported(tmp_path: Path) -> None:
    source = checkpoints.save("gpt2", tmp_path / "model")
    with pytest.raises(FormatError, match="transposed layers of GPT2LMHeadModel"):
        quantize(source, tmp_path / "out", format="int4", export="compressed-tensors")
