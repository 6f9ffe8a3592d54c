"""Products with pruned weights: against float64, with what is not finite, with gradients; and the layer of one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import pruned
from torch.nn import functional

from tersor import ops
from tersor.errors import InputError, ShapeError, UnsupportedError
from tersor.formats import Activations, Plain, Pruned, Scheme, Sparse, get_scheme
from tersor.layouts import SparseWeight
from tersor.layouts.gated import interleave
from tersor.nn import SparseLinear, bits_per_weight
from tersor.ops import Gate


def made(
    oc: int = 24, ic: int = 64, density: float = 0.5, values: Scheme | Plain | None = None
) -> tuple[SparseWeight, torch.Tensor]:
    """Return a pruned weight, and what it decodes to."""
    chosen = values or get_scheme("fp6")
    return pruned.sparse(pruned.random(oc, ic), pruned.kept(oc, ic, density), chosen)


@pytest.mark.parametrize("values", pruned.VALUES, ids=lambda values: values.key())
@pytest.mark.parametrize("density", pruned.DENSITIES)
def test_a_product_is_that_of_the_decoded_weight(values: Scheme | Plain, density: float) -> None:
    weight, decoded = made(19, 96, density, values)
    x, bias, residual = pruned.random(6, 96, 5).view(2, 3, 96), pruned.random(1, 19, 6)[0], pruned.random(6, 19, 7)
    wanted = functional.linear(x.double(), decoded.double(), bias.double()) + residual.view(2, 3, 19).double()
    found = ops.linear(x, weight, bias, residual=residual.view(2, 3, 19))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    half = ops.linear(x.bfloat16(), weight)
    exact = functional.linear(x.bfloat16().double(), decoded.double())
    torch.testing.assert_close(half.double(), exact, rtol=2**-8, atol=1e-4)
    with ops.using(batch_invariant=True):
        assert torch.equal(ops.linear(x, weight)[1, 2], ops.linear(x[1, 2], weight))


@pytest.mark.parametrize("gate", Gate)
def test_gate_and_up_are_one_product(gate: Gate) -> None:
    (first, one), (second, two) = (
        made(11),
        pruned.sparse(pruned.random(11, 64, 3), pruned.kept(11, 64, 0.2, 3), get_scheme("fp6")),
    )
    x, biases, residual = pruned.random(4, 64, 5), pruned.random(2, 11, 6), pruned.random(4, 11, 7)
    weight, bias = SparseWeight.gate_up(first, second), interleave(biases[0], biases[1])
    wanted = gate.combine(functional.linear(x, one, biases[0]), functional.linear(x, two, biases[1])) + residual
    torch.testing.assert_close(ops.gated_linear(x, weight, bias, residual=residual, gate=gate), wanted)
    x.requires_grad_()
    found = ops.gated_linear(x, weight, bias, residual=residual, gate=gate)
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_pruned_weight_multiplies_as_the_zero_that_it_is(bad: float) -> None:
    """0 * infinity is NaN: one that is pruned does not hide what is wrong with activations."""
    weight, decoded = made(density=0.3)
    x = pruned.random(3, 64, 5)
    x[1, 7] = bad
    found, wanted = ops.linear(x, weight), functional.linear(x, decoded)
    assert torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
    assert found[1, ~weight.kept()[:, 7]].isnan().all() and found[[0, 2]].isfinite().all()


def test_activations_have_gradients_of_any_order() -> None:
    weight, decoded = made(values=Plain("float32"))
    x, bias = pruned.random(3, 64, 5).double().requires_grad_(), pruned.random(1, 24, 6)[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: ops.linear(x, weight, bias), (x, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.linear(x, weight).square(), (x,))
    ops.linear(x, weight, bias).square().sum().backward()
    ours, x.grad = x.grad, None
    functional.linear(x, decoded.double(), bias).square().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_traces_and_autocast_see_the_operator() -> None:
    weight, _ = made()
    x, bias = pruned.random(3, 64), torch.zeros(24)
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (x, torch.cat((x, x))):
        assert torch.equal(compiled(tokens), ops.linear(tokens, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(x, weight, bias), ops.linear(x.bfloat16(), weight, bias.bfloat16()))
    meta = ops.linear(x.to("meta"), weight.to(torch.device("meta")), residual=torch.empty(3, 24, device="meta"))
    assert meta.shape == (3, 24) and meta.device.type == "meta"


def test_calls_that_do_not_fit_are_refused() -> None:
    weight, x = made()[0], torch.zeros(2, 64)
    for words, call in {
        r"x has shape \[2, 63\], expected \[..., 64\]": lambda: ops.linear(x[:, 1:], weight),
        "x is torch.int64": lambda: ops.linear(x.long(), weight),
        r"bias is \[23\]": lambda: ops.linear(x, weight, torch.zeros(23)),
        r"residual is \[2, 24\] torch.float16": lambda: ops.linear(x, weight, residual=torch.zeros(2, 24).half()),
        "is no gated one": lambda: ops.gated_linear(x, made(7)[0]),
    }.items():
        with pytest.raises(ShapeError, match=words):
            call()
    assert ops.linear(x[:0], weight).shape == (0, 24)
    assert "CUDA" in ops.explain_sparse(weight.sparse, weight.shape, 0.5, 1, device="cpu").why


def test_the_layer_keeps_its_weight_through_casts_copies_and_state_dicts() -> None:
    weight, decoded = made()
    layer = SparseLinear.from_packed(weight, torch.zeros(24), torch.float32)
    x = pruned.random(2, 64)
    assert layer.packed_weight() is layer.packed_weight() and torch.equal(layer.weight, decoded)
    assert bits_per_weight(layer) == weight.form.bits_per_weight(64)
    half = copy.deepcopy(layer).half()
    assert half.weight_scale is not None and half.weight_scale.dtype == torch.float16 and half.dtype == torch.float16
    wide = copy.deepcopy(layer).double()
    assert wide.weight_scale is not None and wide.weight_scale.dtype == torch.float16
    assert torch.equal(half.packed_weight().dequantize(), decoded)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    empty = SparseLinear(64, 24, weight.form, bias=True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x)) and set(layer.state_dict()) == {*layer.own_tensors(), "bias"}
    other, another = pruned.sparse(pruned.random(24, 64, 9), weight.kept().flip(0), get_scheme("fp6"))
    empty.load_state_dict({**SparseLinear.from_packed(other).state_dict(), "bias": torch.zeros(24)})
    assert torch.equal(empty.weight, another)


def test_a_layer_multiplies_activations_in_e4m3() -> None:
    weight, decoded = made()
    layer, x = SparseLinear.from_packed(weight), pruned.random(5, 64, 3)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.multiply_with("fp8")
    codes, scale = Activations.E4M3.quantize(x)
    torch.testing.assert_close(layer(x), (codes.float() * scale.view(-1, 1)) @ decoded.T)
    after = layer.state_dict()
    assert not layer.as_stored and all(torch.equal(after[name], before[name]) for name in before)
    layer.multiply_with("16bit")
    torch.testing.assert_close(layer(x), x @ decoded.T)
    assert layer.as_stored


def test_the_layer_refuses_what_it_cannot_be() -> None:
    layer = SparseLinear(64, 24, Pruned.of(made()[0].sparse, [0] * 24), device="meta")
    assert "sparse:fp6_e2m3:row:float16" in repr(layer)
    layer.multiply_with("16bit")
    with pytest.raises(UnsupportedError, match="16-bit activations alone: int8 activations have no kernel"):
        layer.multiply_with("int8")
    with pytest.raises(UnsupportedError, match="alone: int8 has numbers that e4m3 has not"):
        SparseLinear(64, 24, Pruned.of(Sparse(get_scheme("int8")), [0] * 24), device="meta").multiply_with("fp8")
    with pytest.raises(InputError):
        layer.multiply_with("int9")
    with pytest.raises(UnsupportedError, match="cannot be set"):
        layer.weight = torch.nn.Parameter(torch.zeros(24, 64))  # type: ignore[misc]
    with pytest.raises(ShapeError, match="counts of 24 rows for 25"):
        SparseLinear(64, 25, Pruned.of(made()[0].sparse, [0] * 24))
