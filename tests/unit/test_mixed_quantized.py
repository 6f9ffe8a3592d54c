"""Norms that hand bytes to mixed weights: products of them, whole decoders, and what is launched for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import decoders, tiny_lm
from helpers.fakes import FakeGpu, pretended
from helpers.mixes import compressed, levels, matrix, mixed

import tersor
from tersor import models, ops
from tersor.engine import ahead
from tersor.errors import ShapeError
from tersor.formats import Activations, Mix, get_scheme
from tersor.kernels import jit
from tersor.kernels.jit import KernelSource
from tersor.layouts import MixedWeight, PackedWeight
from tersor.models import Decoder
from tersor.ops import Gate
from tersor.ops.quantized import common_activations

gpu = pretended("NVIDIA H200")
INTEGERS = Mix((get_scheme("uint4", 32), get_scheme("int8")))
FLOATS = Mix((get_scheme("fp5_e2m2"), get_scheme("fp7_e3m3")))
OC = 77
KINDS = [(INTEGERS, Activations.INT8), (INTEGERS, Activations.INT8_GROUPS), (FLOATS, Activations.E4M3)]


def laid_out(weight: MixedWeight, activations: Activations, dtype: torch.dtype = torch.float16) -> MixedWeight:
    cpu = torch.device("cpu")
    return weight.to_layout(lambda scheme: ops.preferred_layout(scheme, dtype, cpu, activations))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("mix", "activations"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_of_quantised_rows_is_that_of_the_norm(
    mix: Mix, activations: Activations, dtype: torch.dtype, invariant: bool
) -> None:
    form = levels(OC, mix=mix)
    weight, *halves = (mixed(matrix(OC, seed), form) for seed in range(3))
    plain, both = (laid_out(one, activations) for one in (weight, MixedWeight.gate_up(*halves)))
    x, added = (torch.randn(5, size, dtype=dtype) for size in (192, OC))
    gain, bias, of_both = (torch.randn(size, dtype=dtype) for size in (192, OC, both.shape[0]))
    rows, normed = ops.rms_norm_quantized(x, gain, 1e-6, activations=activations), ops.rms_norm(x, gain, 1e-6)
    with ops.using(batch_invariant=invariant):
        y = ops.linear_quantized(rows, plain, bias, residual=added)
        assert y.dtype == dtype and torch.equal(y, ops.linear(normed, plain, bias, residual=added))
        y = ops.linear_quantized(rows, both, of_both, residual=added, gate=Gate.GELU)
        assert torch.equal(y, ops.gated_linear(normed, both, of_both, residual=added, gate=Gate.GELU))
    empty = ops.linear_quantized(ops.Quantized.of(x[:0], activations), plain, bias)
    assert empty.shape == (0, OC) and empty.dtype == dtype


def test_what_does_not_fit_is_one_line_that_names_both_sides() -> None:
    weight = laid_out(mixed(matrix(OC), levels(OC, mix=INTEGERS)), Activations.INT8)
    x = torch.randn(3, 192).half()
    for rows, options, message in (
        (ops.Quantized.of(x), {}, r"codes are \[3, 192\] torch.float8_e4m3fn, expected \[T, IC\] torch.int8"),
        (ops.Quantized.of(x[:, :96], Activations.INT8), {}, r"x has shape \[3, 96\], expected \[..., 192\]"),
        (ops.Quantized.of(x, Activations.INT8), {"gate": 1}, "is not MixedWeight.gate_up of two"),
        (ops.Quantized.of(x, Activations.INT8), {"bias": torch.zeros(5).half()}, r"bias is \[5\], expected \[77\]"),
    ):
        with pytest.raises(ShapeError, match=message):
            ops.linear_quantized(rows, weight, **options)
    with pytest.raises(ShapeError, match="the weight lies in stream, expected one of tiles_float8_e4m3fn, tiles_int8"):
        ops.linear_quantized(ops.Quantized.of(x, Activations.INT8), weight.to_layout(lambda _: "stream"))


@pytest.mark.parametrize(("mix", "activations"), KINDS)
def test_all_row_sets_read_the_bytes_of_the_norm_in_one_launch(
    gpu: FakeGpu, mix: Mix, activations: Activations
) -> None:
    weight, gain = laid_out(mixed(matrix(OC), levels(OC, mix=mix)), activations), torch.ones(192).half()
    x = torch.randn(40, 192).half()
    assert ops.takes_quantized(x, (weight,), gain) is activations
    ops.linear_quantized(ops.rms_norm_quantized(x, gain, 1e-6, activations=activations), weight)
    norm, product = gpu.launches
    assert norm.kernel.startswith("tersor_rms_norm") and "mixed" in product.kernel
    assert product["x_map"].address == norm["out"] and product["x_scale"] == norm["scales"] > 0
    gpu.launches.clear()
    with ops.using(batch_invariant=True):  # a dense product a row set, all of the same bytes
        ops.linear_quantized(ops.Quantized.of(x, activations), weight)
    assert len(gpu.launches) == 2 and not any("quantize" in launch.kernel for launch in gpu.launches)
    assert len({launch["x_scale"] for launch in gpu.launches}) == 1 or activations.group_size


def test_a_mix_and_a_dense_weight_share_bytes_of_one_kind_alone(gpu: FakeGpu) -> None:
    x, gain = torch.randn(3, 192).half(), torch.ones(192).half()
    mixture = mixed(matrix(OC), levels(OC, mix=INTEGERS))
    dense = PackedWeight.stack([one for one in mixture.sets if one.scheme.name == "int8"])
    for activations, same in ((Activations.INT8, True), (Activations.INT8_GROUPS, False)):
        beside = dense.to_layout(ops.preferred_layout(dense.scheme, x.dtype, x.device, Activations.INT8))
        taken = ops.takes_quantized(x, (laid_out(mixture, activations), beside), gain)
        assert taken is (activations if same else None)
    assert ops.takes_quantized(x, (mixture.to_layout(lambda _: "tiles_float16"),), gain) is None


def decoder_of(name: str, tmp_path: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A small decoder with mixed weights beside int8 activations."""
    _, path, _ = compressed(name, tmp_path, mix=INTEGERS, max_position_embeddings=256)
    return models.load(path, "cpu", dtype, activations="int8")


@pytest.mark.parametrize(("name", "norms"), [("llama", 4), ("gemma2", 4), ("opt", 4), ("qwen3_moe", 2)])
def test_a_decoders_logits_are_those_of_two_steps(
    name: str, norms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, text = decoder_of(name, tmp_path), decoders.texts(96)[1]
    expected = decoders.whole(decoder, text)
    made: list[Activations] = []

    def every(x: torch.Tensor, weights: Any, *norm: torch.Tensor | None) -> Activations | None:
        made.append(common_activations(weights))
        return made[-1] if made[-1].dtype else None

    monkeypatch.setattr(ops, "takes_quantized", every)
    assert torch.equal(decoders.whole(decoder, text), expected)
    assert made == [Activations.INT8] * norms, "of two layers"


def test_nothing_but_a_norm_is_launched_ahead_of_the_products_that_read_it(gpu: FakeGpu, tmp_path: Path) -> None:
    decoder = decoder_of("llama", tmp_path)
    decoders.whole(decoder, decoders.texts(96)[1])
    kinds = ("rms_norm_bfloat16_1_int8", "quantize_activations", "mixed")
    names = [next((kind for kind in kinds if kind in launch.kernel), "") for launch in gpu.launches]
    norm, quantize, product = kinds
    # What attention and a gated product leave lies in parts with many CTAs, so its scales are found afterwards.
    layer = [norm, product, quantize, product, norm, product, quantize, product]
    assert [name for name in names if name] == 2 * layer


def test_kernels_that_hand_bytes_to_mixed_weights_are_compiled_ahead(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, _ = compressed("llama", tmp_path, mix=INTEGERS, max_position_embeddings=256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm.TINY / name, path)
    compiled: set[KernelSource] = set()
    asked: set[KernelSource] = set()
    get = jit.get

    def recording(source: KernelSource, device: Any) -> jit.Function:
        asked.add(source)
        return get(source, device if isinstance(device, int) else -1)

    monkeypatch.setattr(ahead, "compile_many", lambda sources, arch, on_done: compiled.update(sources))
    monkeypatch.setattr(jit, "get", recording)
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "kv_bytes": 8 << 20, "activations": "int8"}
    model = tersor.LLM(path, max_rows=4, max_step_tokens=40, max_length=100, **options)
    before = set(compiled)
    params = tersor.SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)
    model.generate([list(range(2, 2 + length)) for length in (1, 20, 37)], params)
    assert {source.name for source in asked - before} == set()
    assert any("rms_norm_bfloat16_1_int8" in source.name for source in asked)
