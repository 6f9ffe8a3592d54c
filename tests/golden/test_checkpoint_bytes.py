"""Bytes on disk, written out by hand from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tersor.checkpoint.header import TensorSpec
from tersor.checkpoint.reader import SafetensorsFile
from tersor.checkpoint.writer import ShardWriter
from tersor.convert import quantize

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "tie_word_embeddings": True,
}
UP = "model.layers.0.mlp.up_proj"


def make(tmp_path: Path, row: Sequence[float], second: Sequence[float] = (0.0,)) -> Path:
    """Write a model whose up_proj has the given first and second rows, zeros elsewhere, and return its directory."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"model.embed_tokens.weight": torch.zeros(8, 32), "model.norm.weight": torch.zeros(32)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = torch.zeros(32)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        tensors[f"model.layers.0.{name}.weight"] = torch.zeros(32, 32)
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"] = torch.zeros(32, 32)
    weight = tensors[f"{UP}.weight"]
    weight[0, : len(row)] = torch.tensor(row)
    weight[1, : len(second)] = torch.tensor(second)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, model / "model.safetensors")
    return model


def stored(directory: Path, name: str) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and bytes of a tensor."""
    with SafetensorsFile(directory / "model.safetensors") as file:
        spec = file.tensors[name]
        content = bytearray(spec.nbytes)
        file.read_into(spec, 0, memoryview(content))
        return spec.dtype, spec.shape, bytes(content)


def test_a_whole_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", [TensorSpec("s", "F16", (1, 1)), TensorSpec("w", "I32", (1, 1))])
    writer.write("s", 0, memoryview(b"\x00\x3c"))
    writer.write("w", 0, memoryview(b"\x01\x02\x03\x04"))
    writer.finish()
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"I32","shape":[1,1],"data_offsets":[0,4]},'
        b'"s":{"dtype":"F16","shape":[1,1],"data_offsets":[4,6]}}'
    )
    padding = b" " * (-len(header) % 8)
    length = (len(header) + len(padding)).to_bytes(8, "little")
    assert (tmp_path / "a").read_bytes() == length + header + padding + b"\x01\x02\x03\x04\x00\x3c"


# fp6_e3m2, sign | exponent (bias 3) | mantissa, with a scale of 28 / 28 = 1:
#   28 = 1.75 * 2^4    0 111 11      -28   1 111 11
#   1 = 1.0 * 2^0      0 011 00      0.0625, the smallest subnormal   0 000 01
#   -0.5 = -1.0*2^-1   1 010 00      2.5 = 1.25 * 2^1   0 100 01
# Four codes make three bytes, the first code in the lowest bits.
FP6_ROW = [28.0, -28.0, 1.0, 0.0625, -0.5, 2.5, 0.0, 0.0]
FP6_BYTES = bytes([0b11_011111, 0b1100_1111, 0b000001_00, 0b01_101000, 0b0000_0100, 0b000000_00])


@pytest.mark.parametrize("export", ["tersor", "humming"])
def test_fp6_e3m2_with_a_scale_a_row(tmp_path: Path, export: str) -> None:
    model = make(tmp_path, FP6_ROW, second=[-56.0, 1.0])
    quantize(model, tmp_path / "out", format="fp6_e3m2", scale_dtype="bfloat16", export=export, sparse="off")
    name = f"{UP}.weight_packed" if export == "tersor" else f"{UP}.weight"
    dtype, shape, content = stored(tmp_path / "out", name)
    assert (dtype, shape) == ("I32", (32, 6))
    assert content[:24] == FP6_BYTES + bytes(18)
    # The second row has scale 2: -28 and 0.5 = 0 010 00.
    assert content[24:48] == bytes([0b00_111111, 0b0000_0010]) + bytes(22)
    assert content[48:] == bytes(30 * 24)
    # bfloat16 1 and 2, then zeros for rows of zeros.
    dtype, shape, content = stored(tmp_path / "out", f"{UP}.weight_scale")
    assert (dtype, shape, content) == ("BF16", (32, 1), b"\x80\x3f\x00\x40" + bytes(60))


@pytest.mark.parametrize(
    ("export", "packed", "dtype", "scale"),
    [
        ("tersor", "weight_packed", "I32", "U8"),
        ("humming", "weight", "I32", "F8_E8M0"),
        ("quark", "weight", "U8", "U8"),
    ],
)
def test_mxfp6_e3m2(tmp_path: Path, export: str, packed: str, dtype: str, scale: str) -> None:
    """Largest magnitude 28 needs 2^0, 56 needs 2^1; the biased exponents are 127 and 128, that of zeros 0."""
    model = make(tmp_path, FP6_ROW, second=[-56.0, 1.0])
    quantize(model, tmp_path / "out", format="mxfp6_e3m2", export=export, sparse="off")
    found = stored(tmp_path / "out", f"{UP}.{packed}")
    assert found[:2] == (dtype, (32, 6) if dtype == "I32" else (32, 24))
    assert found[2][:48] == FP6_BYTES + bytes(18) + bytes([0b00_111111, 0b0000_0010]) + bytes(22)
    assert stored(tmp_path / "out", f"{UP}.weight_scale") == (scale, (32, 1), bytes([127, 128]) + bytes(30))


def test_mxfp6_e2m3_for_compressed_tensors(tmp_path: Path) -> None:
    """Bias 1: 7.5 = 0 11 111, -1 = 1 01 000, 0.125 = 0 00 001, 3.25 = 1.625 * 2 = 0 10 101."""
    quantize(
        make(tmp_path, [7.5, -1.0, 0.125, 3.25]), tmp_path / "out", format="mxfp6_e2m3", export="compressed-tensors"
    )
    dtype, shape, content = stored(tmp_path / "out", f"{UP}.weight_packed")
    assert (dtype, shape) == ("U8", (32, 24))
    assert content[:24] == bytes([0b00_011111, 0b0001_1010, 0b010101_00]) + bytes(21)
    assert stored(tmp_path / "out", f"{UP}.weight_scale") == ("U8", (32, 1), bytes([127]) + bytes(31))
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "mxfp6-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 6,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                    "scale_dtype": "torch.uint8",
                },
                "input_activations": None,
                "output_activations": None,
                "format": "mxfp6-pack-quantized",
            }
        },
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("export", ["tersor", "compressed-tensors", "humming"])
def test_int3(tmp_path: Path, export: str) -> None:
    """Offset binary, code = value + 4: 3, -3, 0, 1, -1, 2, -2, 0 is 7 1 4 5 3 6 2 4; zeros are 4."""
    model = make(tmp_path, [3.0, -3.0, 0.0, 1.0, -1.0, 2.0, -2.0, 0.0])
    quantize(model, tmp_path / "out", format="int3", scale_dtype="bfloat16", export=export, sparse="off")
    name = f"{UP}.weight" if export == "humming" else f"{UP}.weight_packed"
    dtype, shape, content = stored(tmp_path / "out", name)
    assert (dtype, shape) == ("I32", (32, 3))
    zeros = bytes([0b00_100_100, 0b0_100_100_1, 0b100_100_10])
    assert content[:12] == bytes([0b00_001_111, 0b0_011_101_1, 0b100_010_11]) + 3 * zeros
    assert content[12:24] == 4 * zeros
    assert stored(tmp_path / "out", f"{UP}.weight_scale")[2] == b"\x80\x3f" + bytes(62)
    if export == "compressed-tensors":
        expected = ("I64", (2,), (32).to_bytes(8, "little") * 2)
        assert stored(tmp_path / "out", f"{UP}.weight_shape") == expected


def test_uint4_with_a_zero_point(tmp_path: Path) -> None:
    """From -5 to 10 is 15 steps of 1, so the zero point is 5: -5, 10, 0, 3 is 0 15 5 8."""
    quantize(make(tmp_path, [-5.0, 10.0, 0.0, 3.0]), tmp_path / "out", format="uint4", sparse="off")
    assert stored(tmp_path / "out", f"{UP}.weight_packed")[2][:16] == bytes([0xF0, 0x85]) + bytes([0x55] * 14)
    assert stored(tmp_path / "out", f"{UP}.weight_scale")[2][:4] == b"\x00\x3c\x00\x00"
    assert stored(tmp_path / "out", f"{UP}.weight_zero_point") == ("U8", (32, 1), bytes([5]) + bytes(31))


def test_fp5_in_groups(tmp_path: Path) -> None:
    """fp5_e2m2, bias 1: 7 = 0 11 11, -1.25 = 1 01 01, 0.25 = 0 00 01; groups of 16 with scales 1, 0.5."""
    row = [7.0, -1.25, 0.25] + [0.0] * 13 + [-3.5, 0.625]
    quantize(
        make(tmp_path, row), tmp_path / "out", format="fp5_e2m2", group_size=16, scale_dtype="float32", sparse="off"
    )
    content = stored(tmp_path / "out", f"{UP}.weight_packed")[2]
    assert content[:10] == bytes([0b101_01111, 0b0_00001_10]) + bytes(8)
    # The second group starts at bit 80: -7 = 1 11 11 and 1.25 = 0 01 01.
    assert content[10:20] == bytes([0b101_11111, 0b00]) + bytes(8)
    scale = stored(tmp_path / "out", f"{UP}.weight_scale")
    assert scale[:2] == ("F32", (32, 2)) and scale[2][:8] == b"\x00\x00\x80\x3f\x00\x00\x00\x3f"


def test_what_is_left_of_a_pruned_weight(tmp_path: Path) -> None:
    """Columns 0, 3 and 9 are left; bfloat16 1.5 is 3fc0, -2 is c000, 0.25 is 3e80; -0.0 is pruned."""
    row = [1.5, 0.0, -0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25]
    model = make(tmp_path, row, second=[0.0, 1.5])
    quantize(model, tmp_path / "out", format="bf16")
    mask = bytes([0b0000_1001, 0b0000_0010, 0, 0]) + bytes([0b0000_0010, 0, 0, 0]) + bytes(30 * 4)
    assert stored(tmp_path / "out", f"{UP}.weight_mask") == ("U8", (32, 4), mask)
    content = bytes([0xC0, 0x3F, 0x00, 0xC0, 0x80, 0x3E, 0, 0]) + bytes([0xC0, 0x3F, 0, 0])
    assert stored(tmp_path / "out", f"{UP}.weight_values") == ("I32", (3,), content)
    gone = "model.layers.0.mlp.down_proj"
    assert stored(tmp_path / "out", f"{gone}.weight_values") == ("I32", (0,), b"")


def test_what_is_left_of_a_pruned_weight_in_codes(tmp_path: Path) -> None:
    """The codes of `FP6_ROW` without its zeros: six of six bits, and so two words; the second row -28 and 0.5."""
    model = make(tmp_path, FP6_ROW, second=[-56.0, 0.0, 1.0])
    quantize(model, tmp_path / "out", format="fp6_e3m2")
    mask = bytes([0b0011_1111, 0, 0, 0]) + bytes([0b0000_0101, 0, 0, 0]) + bytes(30 * 4)
    assert stored(tmp_path / "out", f"{UP}.weight_mask")[2] == mask
    content = FP6_BYTES[:5] + bytes(3) + bytes([0b00_111111, 0b0000_0010, 0, 0])
    assert stored(tmp_path / "out", f"{UP}.weight_values") == ("I32", (3,), content)
    assert stored(tmp_path / "out", f"{UP}.weight_scale") == ("F16", (32, 1), bytes([0, 0x3C, 0, 0x40]) + bytes(60))
