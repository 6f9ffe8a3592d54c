"""Norms whose result is e4m3 at once, and products of such rows: by the torch code, and what is launched for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.fakes import FakeGpu, pretended
from helpers.small_decoders import config_of

from tersor import ops
from tersor.compress import quantize_rtn
from tersor.errors import ShapeError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.layouts import PackedWeight
from tersor.models.decoder import Decoder
from tersor.models.random import random_decoder
from tersor.models.weights import Activated, FeedForward, GatedProduct, Product
from tersor.ops import Gate, Rows, dispatch, needed_small
from tersor.ops.quantized import common_activations

gpu = pretended("NVIDIA H200")
H200 = CHIPS["NVIDIA H200"]


def packed(oc: int, ic: int) -> PackedWeight:
    weight = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc))
    return PackedWeight.from_encoded(quantize_rtn(weight, get_scheme("fp6_e3m2"))).to_layout(dispatch.E4M3_LAYOUT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_product_of_quantised_rows_is_that_of_the_norm(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, added = (torch.randn(5, size, generator=generator).to(dtype) for size in (96, 32))
    weight, bias, of_outputs = (torch.randn(size, generator=generator).to(dtype) for size in (96, 96, 32))
    product = packed(32, 96)
    for rows, plain in (
        (ops.rms_norm_quantized(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6)),
        (ops.rms_norm_quantized(x, weight, 1e-6, offset=1.0), ops.rms_norm(x, weight, 1e-6, offset=1.0)),
        (ops.rms_norm_quantized(x, weight, 1e-6, residual=x), ops.rms_norm(x, weight, 1e-6, residual=x)),
        (ops.layer_norm_quantized(x, weight, bias, 1e-5), ops.layer_norm(x, weight, bias, 1e-5)),
    ):
        assert rows.dtype == dtype and rows.shape == x.shape
        y = ops.linear_quantized(rows, product, of_outputs, residual=added)
        assert y.dtype == dtype and torch.equal(y, ops.linear(plain, product, of_outputs, residual=added))
        y = ops.linear_quantized(rows, product, of_outputs, gate=Gate.GELU)
        assert torch.equal(y, ops.gated_linear(plain, product, of_outputs, gate=Gate.GELU))
    empty = ops.linear_quantized(ops.rms_norm_quantized(x[:0], weight, 1e-6), product, of_outputs)
    assert empty.shape == (0, 32) and empty.dtype == dtype


def test_what_does_not_fit_is_one_line_that_names_both_sides() -> None:
    rows, weight = ops.Quantized.of(torch.randn(3, 96)), packed(32, 96)
    for given, message in (
        (replace(rows, codes=rows.codes.float()), r"codes are \[3, 96\] torch.float32, .* torch.float8_e4m3fn"),
        (replace(rows, scales=rows.scales[:2]), r"scales are \[2\] .*, expected \[3\] torch.float32 on cpu"),
        (ops.Quantized.of(torch.randn(3, 64)), r"x has shape \[3, 64\], expected \[..., 96\]"),
    ):
        with pytest.raises(ShapeError, match=message):
            ops.linear_quantized(given, weight)
    with pytest.raises(ShapeError, match="the weight lies in stream, expected one of tiles_float8_e4m3fn, tiles_int8"):
        ops.linear_quantized(rows, weight.to_layout("stream"))
    with pytest.raises(ShapeError, match=r"^rms_norm_quantized: weight is \[96\] .*, expected \[64\]"):
        ops.rms_norm_quantized(torch.randn(3, 64), torch.ones(96), 1e-6)


def decoder_of(name: str, dtype: torch.dtype = torch.bfloat16, activations: Activations = Activations.E4M3) -> Decoder:
    scheme = get_scheme("uint4", 32) if activations is Activations.INT8 else get_scheme("fp6_e3m2")
    return random_decoder(config_of(name), scheme, "cpu", dtype, activations=activations, context=64)


def logits_of(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(1, 20) * 7
    with torch.inference_mode():
        return decoder(ids, Rows.of_text(len(ids), decoder.device), decoder.caches(1), None)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have every norm that may do it quantise, by the torch code, and note whose rows."""
    made: list[int] = []

    def every(x: torch.Tensor, weights: tuple[PackedWeight, ...], *norm: torch.Tensor | None) -> Activations | None:
        made.append(x.shape[1])
        found = common_activations(weights)
        return found if found.dtype else None

    with monkeypatch.context() as patch:
        patch.setattr(ops, "takes_quantized", every)
        yield made


@pytest.mark.parametrize(
    ("name", "norms"), [("llama", 4), ("gemma2", 4), ("opt", 4), ("qwen3-moe", 2), ("deepseek-v3", 7)]
)
def test_a_decoders_logits_are_those_of_two_steps(name: str, norms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(name, activations=Activations.INT8 if name == "opt" else Activations.E4M3)
    expected = logits_of(decoder)
    with counted(monkeypatch) as made:
        assert torch.equal(logits_of(decoder), expected)
    assert len(made) == norms, "of two layers"


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_a_layer_quantises_in_its_norms_and_launches_it_elsewhere_alone(gpu: FakeGpu, kind: str) -> None:
    logits_of(decoder_of("llama", activations=Activations.INT8 if kind == "int8" else Activations.E4M3))
    normed = f"rms_norm_bfloat16_1_{kind}"
    kinds = (normed, "quantize_activations", "linear")
    names = [next((kind for kind in kinds if kind in launch.kernel), "") for launch in gpu.launches]
    layer = [normed, "linear", "quantize_activations", "linear"]
    assert [name for name in names if name] == 2 * 2 * layer
    first = next(number for number, name in enumerate(names) if name)
    norm, product = gpu.launches[first : first + 2]
    assert product["x_map"].address == norm["out"] and product["x_scale"] == norm["scales"] > 0
    assert norm["out_stride"] == 256 and product["x_map"].strides == (256,)
    assert norm.grid == (19, 1, 1) and norm["rows"] == 19 and norm.programmatic


def test_rows_that_lie_otherwise_are_copied_for_a_kernel(gpu: FakeGpu) -> None:
    rows, weight = ops.Quantized.of(torch.randn(3, 100).half()), packed(32, 100)
    assert ops.linear_quantized(rows, weight).shape == (3, 32)
    assert gpu.last["x_map"].strides == (112,) and gpu.last["x_map"].address != rows.codes.data_ptr()


def test_other_norms_do_not_quantise(gpu: FakeGpu) -> None:
    x, weight = torch.randn(3, 96).half(), torch.ones(96).half()
    product = packed(32, 96)
    assert ops.takes_quantized(x, (product,), weight)
    assert not ops.takes_quantized(x, (product, product.to_layout("stream")), weight)
    assert not ops.takes_quantized(x.float(), (product,), weight.float())
    assert not ops.takes_quantized(x.requires_grad_(), (product,), weight)
    with ops.using(reference=True):
        assert not ops.takes_quantized(x.detach(), (product,), weight)


@pytest.mark.parametrize(
    ("gpu", "most"), [("NVIDIA H200", 4 * 132), ("NVIDIA GeForce RTX 4090", 3 * 128)], indirect=["gpu"]
)
def test_a_norm_of_many_rows_has_as_many_ctas_as_there_is_room_for(gpu: FakeGpu, most: int) -> None:
    weight = torch.ones(4096).half()
    for rows in (most - 1, most + 1, 17 * most):
        ops.rms_norm(torch.ones(rows, 4096).half(), weight, 1e-6)
        assert gpu.last.grid == (min(rows, most), 1, 1) and gpu.last.block == (512, 1, 1) and gpu.last["rows"] == rows


@pytest.mark.parametrize("gpu", ["NVIDIA H200"], indirect=True)
def test_of_many_rows_that_a_norm_makes_e4m3_of_four_warps_of_a_cta_have_one_each(gpu: FakeGpu) -> None:
    """All have as many in turn; beside a residual a CTA has a row."""
    weight, rows = torch.ones(4096).half(), torch.ones(17 * 132, 4096).half()
    for given, ctas, threads in ((rows[: 12 * 132 - 1], 528, 512), (rows[: 12 * 132], 3 * 132, 128), (rows, 281, 128)):
        ops.rms_norm_quantized(given, weight, 1e-6)
        assert gpu.last.grid == (ctas, 1, 1) and gpu.last.block == (threads, 1, 1) and gpu.last["rows"] == len(given)
    ops.rms_norm_quantized(rows, weight, 1e-6, residual=rows)
    assert gpu.last.block == (512, 1, 1)


@pytest.mark.parametrize("gpu", ["NVIDIA A100"], indirect=True)
def test_a_gpu_without_such_products_does_not_quantise(gpu: FakeGpu) -> None:
    x, weight = torch.randn(3, 96).half(), torch.ones(96).half()
    assert not ops.takes_quantized(x, (packed(32, 96),), weight)


@pytest.mark.parametrize("activations", [Activations.E4M3, Activations.INT8, Activations.INT8_GROUPS])
@pytest.mark.parametrize("gate", [Gate.SILU, Gate.CLAMPED, None])
def test_rows_of_an_activation_are_those_of_two_steps(gate: Gate | None, activations: Activations) -> None:
    x = torch.randn(5, 64 if gate is None else 128).half()
    made = ops.activated_quantized(x, gate, activations)
    expected = ops.Quantized.of(ops.relu(x) if gate is None else ops.gated(x, gate), activations)
    assert torch.equal(made.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(made.scales, expected.scales) and made.dtype == x.dtype
    assert ops.takes_activated(x, (packed(32, 64),), gate) is None, "no GPU"
    with pytest.raises(ShapeError, match=r"^activated_quantized: x is \[128\]"):
        ops.activated_quantized(x[0, :1].expand(128), gate, activations)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_an_activation_that_is_a_launch_of_its_own_quantises(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Relu has no place in a product's epilogue, nor has a gate whose halves have different schemes."""
    decoder = decoder_of("opt") if name == "opt" else apart(decoder_of("llama"))
    logits_of(decoder)
    ending = "_relu" if name == "opt" else "_g1"
    quantised = [launch.kernel.endswith(ending) for launch in gpu.launches if "quantize_act" in launch.kernel]
    assert quantised == [False, True] * 2, "what attention leaves, and what stands ahead of down"
    assert not any(launch.kernel.startswith(("tersor_relu", "tersor_gate")) for launch in gpu.launches)
    number = next(number for number, launch in enumerate(gpu.launches) if launch.kernel.endswith(ending))
    made, product = gpu.launches[number : number + 2]
    assert product["x_map"].address == made["codes"] and product["x_scale"] == made["scales"]
    found = needed_small.activation(256, torch.bfloat16, None if name == "opt" else Gate.SILU, H200, (packed(32, 256),))
    assert made.kernel in {source.name for source in found}


def apart(decoder: Decoder) -> Decoder:
    """The same decoder, whose gates and ups are one behind the other and become one in a launch of their own."""
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer.ffn, FeedForward) and isinstance(layer.ffn.up, GatedProduct)
        up = Activated(Product(layer.ffn.up.weight), layer.ffn.up.gate)
        layers.append(replace(layer, ffn=FeedForward(up, layer.ffn.down)))
    return Decoder(decoder.config, decoder.embedding, layers, decoder.norm, decoder.head)
