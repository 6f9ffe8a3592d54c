"""Gradients through packed linears: those of a plain linear with the decoded weight, however they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu
from torch.utils.checkpoint import checkpoint

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.errors import UnsupportedError
from tersor.integrations.transformers.joined import Join, PackedPart
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear
from tersor.ops import dequantized

WIDE = torch.float64
CASES = [
    ("fp6_e3m2", None, "stream"),
    ("uint4", 32, "stream"),
    ("fp6_e3m2", None, "tiles_float16"),
    ("uint4", 32, "tiles_bfloat16"),
    ("fp6_e3m2", None, "tiles_float8_e4m3fn"),
    ("uint4", 32, "tiles_int8"),
]


def packed(oc: int = 70, ic: int = 96, name: str = "fp6_e3m2", group: int | None = None, layout: str = "stream") -> Any:
    values = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc + ic))
    return PackedWeight.from_encoded(quantize_rtn(values, formats.get_scheme(name, group))).to_layout(layout)


def inputs(*shapes: tuple[int, ...], dtype: torch.dtype = WIDE) -> list[torch.Tensor]:
    torch.manual_seed(len(shapes))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gated(bias: bool = True) -> tuple[PackedWeight, list[torch.Tensor]]:
    """A gated weight whose last block is not full, and x, bias, residual."""
    weight = PackedWeight.gate_up(packed(13, 24), packed(13, 24))
    return weight, inputs((4, 24), (weight.shape[0],), (4, 13))


@pytest.mark.parametrize(("name", "group", "layout"), CASES, ids=str)
def test_gradients_are_those_of_a_plain_linear(name: str, group: int | None, layout: str) -> None:
    weight = packed(name=name, group=group, layout=layout)
    x, bias, residual = inputs((2, 3, 96), (70,), (2, 3, 70), dtype=torch.float32)
    above = torch.randn(2, 3, 70)
    ours = torch.autograd.grad(ops.linear(x, weight, bias, residual=residual), (x, bias, residual), above)
    plain = torch.nn.functional.linear(x, weight.dequantize(), bias) + residual
    for found, expected in zip(ours, torch.autograd.grad(plain, (x, bias, residual), above), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_plain_linear_has_exact_derivatives_of_first_and_second_order() -> None:
    weight = packed(7, 24)
    x, bias, residual = inputs((3, 24), (7,), (3, 7))
    call: Callable[..., Any] = lambda *given: ops.linear(given[0], weight, given[1], residual=given[2])  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, bias, residual), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (x, bias, residual))


def test_a_gated_linear_has_exact_derivatives_of_first_and_second_order() -> None:
    weight, given = gated()
    call: Callable[..., Any] = lambda *g: ops.gated_linear(g[0], weight, g[1], residual=g[2])  # noqa: E731
    assert torch.autograd.gradcheck(call, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


def test_transforms_of_torch_func_see_the_layer() -> None:
    weight, (x, bias, _) = packed(7, 24), inputs((3, 24), (7,), ())
    x, bias, dense = x.detach(), bias.detach(), weight.dequantize(WIDE)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, weight, bias).sin().sum()

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, dense, bias).sin().sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours)(x), transform(plain)(x))
    for nested in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(nested(torch.func.grad(ours))(x), nested(torch.func.grad(plain))(x))
    each = torch.vmap(torch.func.grad(ours))
    torch.testing.assert_close(each(x), torch.vmap(torch.func.grad(plain))(x))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x + 1,)), torch.func.jvp(plain, (x,), (x + 1,)))
    torch.testing.assert_close(torch.func.vjp(ours, x)[1](torch.ones((), dtype=WIDE)), (torch.func.grad(plain)(x),))
    found = torch.compile(torch.func.grad(ours), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, torch.func.grad(plain)(x))


def test_a_compiled_model_has_the_gradients_of_the_eager_one() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 96),
        PackedLinear.from_packed(packed(), torch.ones(70)),
        torch.nn.SiLU(),
        torch.nn.Linear(70, 2),
    )
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8)
    model(x).sum().backward()
    compiled(x).sum().backward()
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, compiled)]
    assert len(grads[0]) == 4 and float(grads[0][0].abs().sum()) > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_to_the_same_gradients(reentrant: bool) -> None:
    layer, (x,) = PackedLinear.from_packed(packed()), inputs((3, 96), dtype=torch.float32)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    checkpoint(lambda x: layer(x).square(), x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_a_plain_linear_casts(dtype: torch.dtype) -> None:
    weight = packed()
    layer, plain = PackedLinear.from_packed(weight, torch.randn(70)), torch.nn.Linear(96, 70)
    plain.weight.data, plain.bias.data = weight.dequantize(), layer.bias.data
    x = inputs((3, 96), dtype=torch.float32)[0]
    twin = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = layer(x), plain(twin)
        assert layer(x.detach().double().requires_grad_()).dtype == WIDE  # float64 stays, as everywhere
        assert layer(x.detach()).dtype == dtype
        ours.sum().backward()
        theirs.sum().backward()
    assert ours.dtype == theirs.dtype == dtype and x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=1e-1)
    torch.testing.assert_close(x.grad, twin.grad, rtol=2e-2, atol=1e-1)
    with torch.autocast("cpu", dtype=dtype, enabled=False):
        assert layer(x.detach()).dtype == torch.float32


def test_autocast_does_not_reach_into_the_product() -> None:
    layer, x = PackedLinear.from_packed(packed(), dtype=torch.float16), torch.randn(3, 96).half()
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(layer(x), expected)


def test_joined_layers_pass_gradients_and_train_their_biases() -> None:
    def parts() -> list[PackedLinear]:
        return [PackedLinear.from_packed(packed(oc, 96), torch.ones(oc)) for oc in (64, 24)]

    alone, joined = parts(), [PackedPart.of(layer) for layer in parts()]
    join = Join(joined, gated=False)
    for index, part in enumerate(joined):
        part.place(join, index)
    x = torch.randn(3, 96)
    for layer in joined:
        layer(x)  # joined, without a gradient
    assert join.weight is not None
    found = []
    for layers in (alone, joined):
        mine = x.clone().requires_grad_()
        for layer in layers:
            assert layer.bias is not None
            layer.bias.requires_grad_()
        with torch.no_grad():
            layers[0](mine)  # what is kept for the next layer must not lack a graph
        torch.cat([layer(mine) for layer in layers], dim=-1).square().sum().backward()
        found.append([mine.grad, *(layer.bias.grad for layer in layers if layer.bias is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    kept = [layer.bias for layer in joined]
    join.dissolve()
    joined[0](x)
    assert all(layer.bias is bias and bias.requires_grad for layer, bias in zip(joined, kept, strict=True))


def test_a_bias_of_another_dtype_is_cast() -> None:
    layer = PackedLinear.from_packed(packed(), torch.randn(70))
    x = torch.randn(3, 96).bfloat16()
    wide = torch.nn.functional.linear(x.float(), layer.packed_weight().dequantize(), layer.bias.bfloat16().float())
    assert torch.equal(layer(x), wide.bfloat16())
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_scales_that_ask_for_a_gradient_are_refused() -> None:
    layer = PackedLinear.from_packed(packed())
    layer.weight_scale.requires_grad_()
    with pytest.raises(UnsupportedError, match="scales of a packed weight have no gradient"):
        layer(torch.randn(2, 96, requires_grad=True))


def test_meta_tensors_have_gradients_without_memory() -> None:
    layer = PackedLinear.from_packed(packed(), torch.ones(70)).to("meta")
    x = torch.randn(3, 96, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and x.grad.device.type == "meta"


@pytest.mark.parametrize("group", [None, 32])
def test_on_a_gpu_slices_are_decoded_by_the_kernel(group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu("NVIDIA H200")
    gpu.install(monkeypatch)
    gpu.take_cpu_tensors(monkeypatch)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: mm(a.to(out_dtype), b.to(out_dtype)))
    monkeypatch.setattr(dequantized, "_SCRATCH_BYTES", 64 * 2 * 128)
    weight = packed(100, 128, group=group, layout="tiles_float16")
    dense = weight.dequantize(torch.float16)

    def decode(function: Any, stream: int, *, scratch: int, first_block: int, oc: int, **rest: Any) -> None:
        gpu_memory[scratch](first_block, oc)

    gpu_memory: dict[int, Callable[[int, int], None]] = {}
    empty = torch.empty

    def watched(*sizes: Any, **options: Any) -> torch.Tensor:
        made = empty(*sizes, **options)

        def fill(first_block: int, oc: int) -> None:
            rows = dense[16 * first_block : 16 * first_block + oc].float()
            if group is None:  # kernels leave a row's scale and factor to who follows
                rows = rows / (weight.stored_scales()[0][16 * first_block : 16 * first_block + oc].float() * factor)
            made[:oc] = rows

        gpu_memory[made.data_ptr()] = fill
        return made

    factor = weight.packing.factor
    monkeypatch.setattr(dequantized.dense, "launch_dequantize", decode)
    monkeypatch.setattr(dequantized.torch, "empty", watched)
    grad = torch.randn(3, 100).half()
    found = torch.ops.tersor.linear_input_grad(
        grad, weight.data, weight.scale, None, weight.scheme.key(), 100, 128, weight.layout
    )
    torch.testing.assert_close(found, (grad.float() @ dense.float()).half(), rtol=1e-2, atol=1e-2)
