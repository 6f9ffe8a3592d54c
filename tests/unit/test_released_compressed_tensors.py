"""Checkpoints of compressed-tensors are decoded as that library decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import checkpoints, released

from tersor.convert import quantize

pytest.importorskip("compressed_tensors")


def config(form: str, **weights: Any) -> dict[str, Any]:
    """The `quantization_config` of a model with one scheme."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}, "format": form}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def library(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> released.Compress:
    """What the library itself compresses a weight to, and decodes of it in float32."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    args = scheme.weights
    assert args is not None
    compressor = BaseCompressor.get_value_from_registry(settings["format"])

    def compress(weight: torch.Tensor, random: np.random.Generator) -> released.Stored:
        oc, ic = weight.shape
        if args.strategy == "tensor":
            views, shape = weight.reshape(1, -1), (1,)
        elif args.strategy == "channel":
            views, shape = weight, (oc, 1)
        elif args.strategy == "block":
            height, width = args.block_structure
            views = weight.view(oc // height, height, ic // width, width).transpose(1, 2).flatten(2)
            shape = (oc // height, ic // width)
        else:
            views = weight.view(oc, -1, args.group_size)
            shape = (oc, ic // args.group_size)
        extra = {}
        if args.strategy == "tensor_group":
            extra["weight_global_scale"] = torch.tensor([2688.0]) / weight.abs().max()
        scale, zero = calculate_qparams(views.amin(-1), views.amax(-1), args, *extra.values())
        state = {"weight": weight, "weight_scale": scale.reshape(shape).to(dtype), **extra}
        if not args.symmetric:
            state["weight_zero_point"] = zero.reshape(shape)
        stored = compressor.compress(state, scheme)
        again = {
            key: value.float()
            if key == "weight_scale" and dtype != torch.float32 and value.is_floating_point()
            else value
            for key, value in stored.items()
        }
        means = compressor.decompress(again, scheme)["weight"].float()
        return {f".{key}": torch.as_tensor(value) for key, value in stored.items()}, means

    return compress


EXACT = {
    f"int{bits} {strategy} {'symmetric' if symmetric else 'asymmetric'}": config(
        "pack-quantized", num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=size
    )
    for bits in (2, 3, 4, 6, 8)
    for strategy, size in (("group", 32), ("channel", None))
    for symmetric in (True, False)
} | {
    "w8a8 channel": config("int-quantized", num_bits=8, type="int", strategy="channel"),
    "w8a8 tensor": config("int-quantized", num_bits=8, type="int", strategy="tensor"),
    "w8a8 asymmetric": config("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
    "fp8 channel": config("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8 tensor": config("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8 block": config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
    "fp8 naive": config("naive-quantized", num_bits=8, type="float", strategy="channel"),
    "mxfp4": config("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "mxfp6": config("mxfp6-pack-quantized", num_bits=6, type="float", strategy="group", group_size=32),
    "mxfp8": config(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_a_checkpoint_is_decoded_as_the_library_decodes_it(case: str, tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, EXACT[case], library(EXACT[case]))
    found, expected = released.decoded(packed), checkpoints.weights(plain)
    assert len(found) == 14
    for name, weight in found.items():
        assert torch.equal(weight, expected[name].float()), name


def test_scales_in_bfloat16_are_taken_as_they_are(tmp_path: Path) -> None:
    settings = EXACT["int4 group asymmetric"]
    packed, plain = released.save(tmp_path, settings, library(settings, torch.bfloat16))
    expected = checkpoints.weights(plain)
    for name, weight in released.decoded(packed).items():
        assert torch.equal(weight, expected[name]), name


def test_nvfp4_is_what_the_library_makes_of_it_but_for_its_bfloat16(tmp_path: Path) -> None:
    settings = config("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    packed, plain = released.save(tmp_path, settings, library(settings))
    expected = checkpoints.weights(plain)
    for name, weight in released.decoded(packed).items():
        assert torch.allclose(weight, expected[name], rtol=2**-6, atol=0), name


@pytest.mark.parametrize("case", ["int4 group asymmetric", "fp8 block"])
def test_a_checkpoint_compresses_to_what_the_plain_one_does(case: str, tmp_path: Path) -> None:
    packed, plain = released.save(tmp_path, EXACT[case], library(EXACT[case]))
    report = quantize(packed, tmp_path / "out")
    quantize(plain, tmp_path / "expected", sparse="off")
    released.same(tmp_path / "out", tmp_path / "expected")
    assert report.source_method == f"compressed-tensors ({EXACT[case]['format']})"


def test_channels_in_another_order_have_the_scales_of_their_groups(tmp_path: Path) -> None:
    settings = config("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, actorder="group")

    def compress(weight: torch.Tensor, random: np.random.Generator) -> released.Stored:
        oc, ic = weight.shape
        groups = np.arange(ic) // 32
        random.shuffle(groups)
        codes = random.integers(0, 16, (oc, ic))
        scales = torch.from_numpy(random.uniform(0.1, 1, (oc, ic // 32))).float()
        tensors = {
            ".weight_packed": released.words_of(codes, 4),
            ".weight_scale": scales,
            ".weight_g_idx": torch.from_numpy(groups.astype(np.int32)),
            ".weight_shape": torch.tensor([oc, ic]),
        }
        return tensors, torch.from_numpy(codes - 8).float() * scales[:, groups]

    packed, plain = released.save(tmp_path, settings, compress)
    expected = checkpoints.weights(plain)
    for name, weight in released.decoded(packed).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("format", ["int4", "int3", "mxfp6_e2m3", "mxfp4_e2m1"])
def test_an_export_of_our_own_is_read_again(format: str, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    quantize(source, tmp_path / "ours", format=format)
    quantize(source, tmp_path / "theirs", format=format, export="compressed-tensors", scale_dtype=None)
    report = quantize(tmp_path / "theirs", tmp_path / "again", format=format, export="compressed-tensors")
    assert report.worst is not None
    assert report.worst.relative_error < (1e-6 if format.startswith("mx") else 0.02)


@pytest.mark.parametrize("export", ["quark"])
@pytest.mark.parametrize("format", ["mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1"])
def test_an_export_to_quark_is_read_again(format: str, export: str, tmp_path: Path) -> None:
    source = checkpoints.save("llama", tmp_path / "model")
    quantize(source, tmp_path / "theirs", format=format, export=export)
    report = quantize(tmp_path / "theirs", tmp_path / "again", format=format)
    quantize(source, tmp_path / "ours", format=format)
    assert report.worst is not None
    assert report.worst.relative_error == 0.0
