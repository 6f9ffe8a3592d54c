"""Weights as other engines store them, made by straightforward code that shares nothing with what reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from helpers import checkpoints
from tersor.checkpoint.released import DecodedTensor, read_released
from tersor.checkpoint.source import open_source

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors that stand for `<stem>.weight`, by what follows the stem, and the float32 weight that they mean."""

Compress = Callable[[torch.Tensor, np.random.Generator], Stored]

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def save(directory: Path, settings: dict[str, Any], compress: Compress, model: str = "llama") -> tuple[Path, Path]:
    """Write a tiny model compressed, and the plain one that it means, and return both directories.

    Args:
        directory: where to.
        settings: the `quantization_config`.
        compress: makes the stored tensors of a weight.
        model: a key of `checkpoints.CONFIGS`; every weight with `proj` in its name is compressed.
    """
    plain, packed = directory / "plain" / "model", directory / "packed" / "model"
    source = checkpoints.save(model, plain)
    shutil.copytree(source, packed)
    random = np.random.default_rng(0)
    means, stored = {}, {}
    for name, tensor in checkpoints.weights(source).items():
        means[name] = stored[name] = tensor
        if "proj" in name:
            stem = name.removesuffix(".weight")
            del stored[name]
            tensors, mean = compress(tensor.float(), random)
            means[name] = mean.contiguous()
            stored |= {stem + key: value.contiguous() for key, value in tensors.items()}
    save_file(means, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return packed, plain


def words_of(fields: np.ndarray, bits: int) -> torch.Tensor:
    """Pack the last axis of unsigned numbers into 32-bit words, bit by bit, the lowest first."""
    digits = (fields[..., None] >> np.arange(bits)) & 1
    flat = digits.reshape(*fields.shape[:-1], -1).astype(np.uint8)
    padding = -flat.shape[-1] % 32
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little")).view(torch.int32)


def fp8_blocks(height: int, width: int, dtype: torch.dtype = torch.float32) -> Compress:
    """float8 with a scale for each block, as DeepSeek and Qwen release."""

    def compress(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        oc, ic = weight.shape
        scales = torch.zeros(-(-oc // height), -(-ic // width), dtype=dtype)
        codes, means = torch.zeros(oc, ic, dtype=torch.float8_e4m3fn), torch.zeros(oc, ic)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
                scales[row, column] = (weight[block].abs().max() / 448).to(dtype)
                codes[block] = (weight[block] / scales[row, column].float()).to(torch.float8_e4m3fn)
                means[block] = codes[block].float() * scales[row, column].float()
        return {".weight": codes, ".weight_scale_inv": scales, ".input_scale": torch.ones(1)}, means

    return compress


def fp8_scaled(shape: str, key: str) -> Compress:
    """float8 with one scale, or one a row."""

    def compress(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        scale = weight.abs().max() / 448 if shape == "tensor" else weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {".weight": codes, key: scale.reshape(-1) if shape == "flat" else scale}, codes.float() * scale

    return compress


def gptq(bits: int, size: int, *, version: int = 1, shuffled: bool = False) -> Compress:
    """GPTQ: words of input channels, zero points less one in version 1; `shuffled` gives channels groups at random."""

    def compress(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        oc, ic = weight.shape
        size_ = size if size > 0 else ic
        groups = np.arange(ic) // size_
        if shuffled:
            random.shuffle(groups)
        codes = random.integers(0, 1 << bits, (oc, ic))
        zeros = random.integers(1, 1 << bits, (ic // size_, oc))
        scales = torch.from_numpy(random.uniform(0.01, 0.1, (ic // size_, oc))).half()
        tensors = {
            ".qweight": words_of(codes, bits).T,
            ".qzeros": words_of(zeros - (2 - version), bits),
            ".scales": scales,
            ".g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        means = torch.from_numpy(codes - zeros[groups].T).float() * scales.float()[groups].T
        return tensors, means

    return compress


def awq(size: int) -> Compress:
    """AWQ, gemm: eight output channels in a word, 0 2 4 6 1 3 5 7 from the low end."""

    def pack(fields: np.ndarray) -> torch.Tensor:
        eights = fields.reshape(len(fields), -1, 8)
        word = np.zeros(eights.shape[:2], dtype=np.uint32)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            word |= eights[:, :, column].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(word.view(np.int32))

    def compress(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        oc, ic = weight.shape
        codes = random.integers(0, 16, (ic, oc))
        zeros = random.integers(0, 16, (ic // size, oc))
        scales = torch.from_numpy(random.uniform(0.01, 0.1, (ic // size, oc))).half()
        groups = np.arange(ic) // size
        means = torch.from_numpy(codes - zeros[groups]).float() * scales.float()[groups]
        return {".qweight": pack(codes), ".qzeros": pack(zeros), ".scales": scales}, means.T

    return compress


def bitsandbytes(kind: str, *, nested: bool = False, storage: torch.dtype = torch.uint8, size: int = 64) -> Compress:
    """bitsandbytes in 4 bits: the first of two weights in the high half of a byte, scales of flat blocks."""

    def compress(weight: torch.Tensor, random: np.random.Generator) -> Stored:
        oc, ic = weight.shape
        table = torch.linspace(-1, 1, 16) ** 3
        codes = random.integers(0, 16, oc * ic)
        blocks = -(-oc * ic // size)
        state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": [oc, ic]}
        packed = torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))
        tensors = {".weight": packed.view(storage).reshape(-1, 1), ".weight.quant_map": table}
        if nested:
            outer = torch.from_numpy(random.uniform(0.5, 1, -(-blocks // 256))).float()
            inner = torch.from_numpy(random.integers(0, 256, blocks).astype(np.uint8))
            inner_table = torch.linspace(-0.1, 0.1, 256)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.125}
            tensors |= {
                ".weight.absmax": inner,
                ".weight.nested_absmax": outer,
                ".weight.nested_quant_map": inner_table,
            }
            absmax = inner_table[inner.long()] * outer.repeat_interleave(256)[:blocks] + 0.125
        else:
            absmax = torch.from_numpy(random.uniform(0.1, 1, blocks)).float()
            tensors[".weight.absmax"] = absmax
        text = json.dumps(state).encode()
        tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        means = table[torch.from_numpy(codes)] * absmax.repeat_interleave(size)[: oc * ic]
        return tensors, means.view(oc, ic)

    return compress


def llm_int8(weight: torch.Tensor, random: np.random.Generator) -> Stored:
    """bitsandbytes in 8 bits: a largest value a row."""
    largest = weight.abs().amax(1)
    codes = torch.round(weight / largest[:, None] * 127).to(torch.int8)
    state = torch.zeros((), dtype=torch.uint8)
    tensors = {".weight": codes, ".SCB": largest, ".weight_format": state}
    return tensors, codes.float() * largest[:, None] / 127


def nvfp4(weight: torch.Tensor, random: np.random.Generator) -> Stored:
    """ModelOpt's NVFP4: scales of 16 in float8, times one number."""
    oc, ic = weight.shape
    codes = random.integers(0, 16, (oc, ic))
    scales = torch.from_numpy(random.uniform(0.5, 400, (oc, ic // 16))).to(torch.float8_e4m3fn)
    second = torch.tensor(0.0003)
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    means = FP4[torch.from_numpy(codes)] * (scales.float() * second).repeat_interleave(16, 1)
    tensors = {".weight": packed, ".weight_scale": scales, ".weight_scale_2": second, ".input_scale": torch.ones(())}
    return tensors, means


CASES: dict[str, tuple[dict[str, Any], Compress]] = {
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, fp8_blocks(48, 40)),
    "fp8 bfloat16": (
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        fp8_blocks(32, 32, torch.bfloat16),
    ),
    "fp8 tensor": ({"quant_method": "fp8"}, fp8_scaled("tensor", ".weight_scale_inv")),
    "fp8 qscale": ({"quant_method": "fp8"}, fp8_scaled("tensor", ".qscale_weight")),
    "fp8 rows": ({"quant_method": "fbgemm_fp8"}, fp8_scaled("rows", ".weight_scale")),
    "fp8 flat rows": ({"quant_method": "quark"}, fp8_scaled("flat", ".weight_scale")),
    "gptq 2": ({"quant_method": "gptq", "bits": 2, "group_size": 32}, gptq(2, 32)),
    "gptq 3": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, gptq(3, 32)),
    "gptq 4": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, gptq(4, 16, shuffled=True)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, -1)),
    "gptq_v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        gptq(4, 32, version=2),
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"},
        gptq(4, 32),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq(32)),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, bitsandbytes("nf4")),
    "nf4 nested": ({"quant_method": "bitsandbytes"}, bitsandbytes("nf4", nested=True)),
    "fp4 in bfloat16": (
        {"quant_method": "bitsandbytes"},
        bitsandbytes("fp4", storage=torch.bfloat16, size=128),
    ),
    "llm.int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
}


def decoded(directory: Path, block: int = 7) -> dict[str, torch.Tensor]:
    """Every compressed weight of a directory as float32, read in blocks of rows."""
    with open_source(directory) as source:
        found = read_released(source)
        assert found is not None
        return {
            name: torch.cat(
                [
                    tensor.read_rows(row, min(row + block, tensor.spec.shape[0]))
                    for row in range(0, tensor.spec.shape[0], block)
                ]
            )
            for name, tensor in found.tensors.items()
            if isinstance(tensor, DecodedTensor)
        }


def same(directory: Path, other: Path) -> None:
    """Both directories hold the same tensors, byte for byte."""
    ours, theirs = checkpoints.weights(directory), checkpoints.weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
