"""The linear operator on a CPU: the reference against float64, checks, the meta twin, reasons."""

from __future__ import annotations

import pytest
import torch

from tersor import formats, hardware, ops
from tersor.compress import quantize_rtn
from tersor.errors import ShapeError
from tersor.hardware import CHIPS
from tersor.kernels.tune import sm90
from tersor.layouts import PackedWeight
from tersor.ops import dispatch, prepared, reference


def packed(name: str, oc: int, ic: int, group: int | None = None) -> PackedWeight:
    scheme = formats.get_scheme(name, group)
    weight = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc))
    return PackedWeight.from_encoded(quantize_rtn(weight, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "group"),
    [("fp6_e3m2", None), ("fp5_e2m2", 32), ("int4", 48), ("uint4", 32), ("mxfp6_e2m3", None)],
)
def test_reference_is_within_tolerance(
    name: str, group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reference.BLOCK_ELEMENTS, "cpu", 1000)
    weight = packed(name, 70, 96, group)
    exact_weight = weight.dequantize().double()
    for layout in ("stream", "tiles_float16"):
        for shape in ((96,), (1, 96), (2, 3, 96)):
            x = torch.randn(shape).to(dtype)
            bias = torch.randn(70).to(dtype)
            y = ops.linear(x, weight.to_layout(layout), bias)
            assert y.shape == (*shape[:-1], 70)
            assert y.dtype == dtype
            flat = x.reshape(-1, 96).double()
            exact = flat @ exact_weight.T + bias.double()
            allowed = formats.product_tolerance(flat, exact_weight, dtype)
            allowed += bias.double().abs() * torch.finfo(dtype).eps
            assert ((y.reshape(-1, 70).double() - exact).abs() <= allowed).all()


def test_no_tokens_and_strides() -> None:
    weight = packed("fp6_e3m2", 8, 40)
    assert ops.linear(torch.randn(0, 40), weight).shape == (0, 8)
    wide = torch.randn(3, 80)
    assert torch.equal(ops.linear(wide[:, ::2], weight), ops.linear(wide[:, ::2].contiguous(), weight))


def test_meta_twin_agrees() -> None:
    weight = packed("int4", 24, 64)
    x = torch.randn(2, 5, 64)
    arguments = (x, weight.data, weight.scale, None, None, weight.scheme.key(), 24, 64, "stream")
    torch.library.opcheck(torch.ops.tersor.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))
    meta = ops.linear(x.to("meta"), PackedWeight(weight.scheme, weight.shape, weight.data.to("meta"), weight.scale))
    assert meta.shape == (2, 5, 24)


def test_compiles_without_graph_breaks() -> None:
    weight = packed("fp6_e3m2", 24, 64)
    x = torch.randn(3, 64)
    compiled = torch.compile(lambda x: ops.linear(x, weight) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.linear(x, weight) * 2)


def test_bad_calls_are_refused_with_both_sides() -> None:
    weight = packed("fp6_e3m2", 24, 64)
    with pytest.raises(ShapeError, match=r"x has shape \[3, 5\], expected \[..., 64\]"):
        ops.linear(torch.randn(3, 5), weight)
    with pytest.raises(ShapeError, match="int64"):
        ops.linear(torch.zeros(3, 64, dtype=torch.int64), weight)
    with pytest.raises(ShapeError, match=r"bias is \[5\]"):
        ops.linear(torch.randn(3, 64), weight, torch.randn(5))
    with pytest.raises(ShapeError, match="float16"):
        ops.linear(torch.randn(3, 64), weight, torch.randn(24).half())
    short = PackedWeight(weight.scheme, weight.shape, weight.data[:5], weight.scale)
    with pytest.raises(ShapeError, match="expected 288 int32 words"):
        ops.linear(torch.randn(3, 64), short)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = formats.get_scheme("fp6_e3m2")
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert "CUDA device" in ops.explain(scheme, 8, 64, 1, torch.float16, "cpu").why
    monkeypatch.setattr(dispatch, "_device_reason", lambda index: "")
    half = torch.float16
    shape = (128, 64)
    for chip, n, aligned, kernel, why in (
        ("NVIDIA A100", 64, True, "fused", "64 tokens are at most 64; sm80"),
        ("NVIDIA A100", 65, True, "dequantize + cuBLAS", "65 tokens are more than 64 on compute capability 8.0"),
        ("NVIDIA H200", 65, True, "fused", "rows start on 16 bytes; sm90"),
        ("NVIDIA H200", 65, False, "dequantize + cuBLAS", "rows do not start on 16 bytes"),
    ):
        monkeypatch.setattr(hardware, "of_device", lambda index, chip=chip: CHIPS[chip])
        decision = dispatch.decide(scheme, "tiles_float16", shape, n, half, gpu, aligned)
        assert decision.kernel == kernel and why in decision.why
        assert (decision.config is not None) == (kernel == "fused")
    for scheme_, layout, dtype, device, why in (
        (scheme, "stream", half, gpu, "stored stream"),
        (scheme, "tiles_bfloat16", half, gpu, "laid out for bfloat16"),
        (scheme, "tiles_float16", torch.float32, gpu, "float32"),
        (formats.get_scheme("fp8_e6m1"), "stream", half, gpu, "exponents"),
        (scheme, "stream", torch.float8_e4m3fn, gpu, "float8_e4m3fn"),
        (formats.get_scheme("int4", 24), "stream", half, gpu, "multiple of 16"),
        (scheme, "stream", half, cpu, "cpu"),
    ):
        reason = dispatch.decide(scheme_, layout, shape, 1, dtype, device)
        assert reason.kernel == "reference"
        assert why in reason.why
    assert ops.preferred_layout(scheme, torch.bfloat16, gpu) == "tiles_bfloat16"
    assert ops.preferred_layout(scheme, torch.float32, gpu) == "stream"


def test_the_environment_is_read_once_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, gpu = formats.get_scheme("fp6_e3m2"), torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "_device_reason", lambda index: "")
    prepared.forget()
    assert ops.preferred_layout(scheme, torch.float16, gpu) == "tiles_float16"
    monkeypatch.setenv("TERSOR_KERNEL", "reference")
    assert dispatch.unsupported_reason(scheme, torch.float16, gpu) == ""
    prepared.forget()
    assert dispatch.unsupported_reason(scheme, torch.float16, gpu) == "TERSOR_KERNEL is set to reference"
    assert ops.preferred_layout(scheme, torch.float16, gpu) == "stream"
    monkeypatch.undo()
    prepared.forget()


def test_kernels_for_a_model() -> None:
    def names(name: str, group: int | None, chip: str) -> list[str]:
        sources = ops.kernels_for(formats.get_scheme(name, group), torch.float16, CHIPS[chip])
        return [source.name.removeprefix("tersor_") for source in sources]

    older = [f"linear_sm80_fp6_e3m2_float16_n{tile}" for tile in (8, 16, 32, 64)]
    rest = ["dequantize_fp6_e3m2_float16", "epilogue_float16"]
    assert names("fp6_e3m2", None, "NVIDIA A100") == [*older, *rest]
    for group, in_block in ((None, 0), (128, 1)):
        newer = [
            f"linear_sm90_fp6_e3m2_float16_{tile.rows}x{tile.tokens}_k{tile.channel_groups}c{tile.cluster}r{tile.resident}"
            for tile in sm90.tiles(in_block)
        ]
        assert names("fp6_e3m2", group, "NVIDIA H200") == [*older, *newer, *rest]
    assert len(sm90.tiles(1)) < len(sm90.tiles(0)) < 45
    assert names("fp8_e6m1", None, "NVIDIA H200") == []
    assert names("uint4", None, "NVIDIA A100")[0] == "linear_sm80_uint4_float16_n8"


def test_weights_just_written_are_not_fetched_early() -> None:
    from tersor.ops.settled import settled

    data, scale = torch.zeros(4, dtype=torch.int32), torch.ones(4)
    assert [settled(data, scale) for _ in range(3)] == [False, True, True]
    for written in (data, scale):
        written.add_(1)
        assert [settled(data, scale) for _ in range(2)] == [False, True]
    assert not settled(data.clone(), scale)
    assert not settled(data, scale.clone())
    assert [settled(data, scale) for _ in range(2)] == [False, True]
    with torch.inference_mode():
        fixed = torch.zeros(4, dtype=torch.int32)
    assert [settled(fixed, scale) for _ in range(2)] == [False, True]


def test_what_is_remembered_of_a_weight_dies_with_it() -> None:
    from tersor.ops.settled import _used, settled

    before = set(_used)
    data, scale = torch.zeros(4, dtype=torch.int32), torch.ones(4)
    settled(data, scale)
    assert set(_used) - before == {id(data)}
    del data
    assert set(_used) == before
