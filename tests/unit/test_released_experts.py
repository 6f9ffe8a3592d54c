"""gpt-oss in MXFP4: experts are decoded as transformers decodes them, and compressed like any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import checkpoints, packed_models, released
from safetensors.torch import save_file

from tersor.checkpoint import QuantizationConfig
from tersor.compress import quantize_rtn
from tersor.convert import quantize
from tersor.errors import InputError, UnsupportedError
from tersor.formats import scale_values
from tersor.integrations.transformers import architecture
from tersor.layouts import StackedWeight

HIDDEN, INNER, EXPERTS = 64, 96, 4


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss as it is released: experts in blocks of 32 4-bit floats, all else in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=96,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt-oss") / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tensors = checkpoints.weights(directory)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for name, oc, ic in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stem]
            shape = (EXPERTS, oc, ic // 32, 16)
            tensors[f"{stem}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensors[f"{stem}_scales"] = torch.randint(110, 130, shape[:3], dtype=torch.uint8, generator=generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return directory


def test_experts_are_decoded_as_transformers_decodes_them(gpt_oss: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = checkpoints.weights(gpt_oss)
    found = released.decoded(gpt_oss, 3)
    assert len(found) == 4
    for name, weight in found.items():
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(weight, expected.float()), name


@pytest.mark.parametrize("scheme", ["mxfp4_e2m1", "int8"])
def test_experts_are_compressed_to_any_scheme(scheme: str, gpt_oss: Path, tmp_path: Path) -> None:
    report = quantize(gpt_oss, tmp_path / "out", format=scheme, overrides=["attn=int8"])
    found, config = released.decoded(gpt_oss, 3), packed_models.config(tmp_path / "out")
    written = packed_models.tensors(tmp_path / "out")
    assert {row.name for row in report.compressed} >= set(found)
    own = QuantizationConfig.from_dict(config).scheme
    for name, weight in found.items():
        rows = weight.transpose(1, 2)
        stored = StackedWeight(
            own, tuple(rows.shape), written[f"{name}.weight_packed"], written[f"{name}.weight_scale"]
        )
        for expert, matrix in enumerate(stored.dequantize()):
            encoded = quantize_rtn(rows[expert].contiguous(), own)
            assert torch.equal(
                matrix,
                own.format.decode(encoded.codes)
                * scale_values(encoded.scale, own).repeat_interleave(own.group_size or 1, 1),
            ), name
        assert f"{name}_bias" in written and f"{name}_blocks" not in written


def test_experts_that_would_be_written_larger_are_refused(
    gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "experts_form", checked_away)
    with pytest.raises(InputError, match=r"by mxfp4, and 4 of its tensors, such as 'model.layers.0.mlp.experts"):
        quantize(gpt_oss, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def checked_away(experts: Any) -> Any:
    raise UnsupportedError("a kind of experts that nobody knows")


def test_experts_that_are_ignored_by_name_are_written_decoded(gpt_oss: Path, tmp_path: Path) -> None:
    report = quantize(gpt_oss, tmp_path / "out", ignore=["experts"])
    written, found = checkpoints.weights(tmp_path / "out"), released.decoded(gpt_oss)
    for name, weight in found.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name].float(), weight)
    assert report.source_method == "mxfp4"
    assert report.compressed


def test_scales_of_another_shape_are_refused(gpt_oss: Path, tmp_path: Path) -> None:
    tensors = checkpoints.weights(gpt_oss)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :, :2].contiguous()
    broken = checkpoints.write(checkpoints.bytes_of(gpt_oss), tmp_path / "model")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"tensor '{name}' has shape \[4, 64, 2\]"):
        quantize(broken, tmp_path / "out")
