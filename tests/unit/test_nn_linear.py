"""PackedLinear: what it holds, how it is cast, moved, copied, saved and compiled."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch

from tersor import ops
from tersor.checkpoint.names import TensorForm, stored_tensors
from tersor.compress import quantize_rtn
from tersor.errors import FormatError, ShapeError
from tersor.formats import Activations, Scheme, get_scheme
from tersor.layouts import STREAM, PackedWeight
from tersor.nn import PackedLinear

SCHEMES = [
    get_scheme("fp6_e3m2"),
    get_scheme("fp5_e2m2", 8, "bfloat16"),
    get_scheme("int4", 16, "float32"),
    get_scheme("uint3", 8),
    get_scheme("mxfp6_e2m3"),
]
TILES = "tiles_float16"


def make(
    scheme: Scheme = SCHEMES[0], oc: int = 24, ic: int = 64, bias: bool = True, dtype: torch.dtype = torch.float32
) -> PackedLinear:
    torch.manual_seed(oc * ic)
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(oc, ic), scheme))
    return PackedLinear.from_packed(weight, torch.randn(oc, dtype=dtype) if bias else None, dtype)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_forward_is_the_product_with_the_decoded_weight(scheme: Scheme) -> None:
    layer = make(scheme)
    x = torch.randn(3, 5, 64)
    expected = torch.nn.functional.linear(x.double(), layer.packed_weight().dequantize().double(), layer.bias.double())
    assert layer(x).shape == (3, 5, 24)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_buffers_have_the_stored_shapes_and_dtypes(scheme: Scheme) -> None:
    layer = make(scheme)
    expected = stored_tensors(scheme, 24, 64)
    state = layer.state_dict()
    assert set(state) == {*expected, "bias"}
    assert {name: TensorForm(tuple(state[name].shape), state[name].dtype) for name in expected} == expected
    assert layer.weight_packed.shape == (24, 2 * scheme.format.bits)
    assert ("weight_zero_point" in expected) == (scheme.format.kind == "uint")


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float16), lambda m: m.double()],
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key())
def test_casting_leaves_codes_and_scales_alone(
    scheme: Scheme, cast: Callable[[torch.nn.Module], torch.nn.Module]
) -> None:
    layer = make(scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    cast(layer)
    after = layer.state_dict()
    wanted = after.pop("bias").dtype
    assert same(before, after)
    assert wanted != torch.float32
    assert layer.dtype == layer.weight.dtype == wanted
    cast(layer.float())
    assert same(before, {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_after_a_cast_keeps_the_activation_dtype(dtype: torch.dtype) -> None:
    layer = make().to(dtype)
    x = torch.randn(2, 64, dtype=dtype)
    wide = torch.nn.functional.linear(x.float(), layer.packed_weight().dequantize(), layer.bias.float())
    assert torch.equal(layer(x), wide.to(dtype))


def test_the_device_changes_in_both_directions() -> None:
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 24)
    layer.to_empty(device="cpu").load_state_dict(before)
    assert same(before, layer.state_dict())


@pytest.mark.parametrize(
    "scheme", [SCHEMES[0], get_scheme("uint4", 32), get_scheme("uint8")], ids=lambda scheme: scheme.key()
)
def test_the_state_dict_shows_the_stream_whatever_the_layout(scheme: Scheme) -> None:
    layer = make(scheme, oc=70, ic=96)
    before = copy.deepcopy(layer.state_dict())
    decoded = layer.weight
    layer._set_weight(layer.packed_weight().to_layout(TILES))
    assert layer.layout == TILES
    assert layer.weight_packed.dim() == 1
    assert same(before, layer.state_dict())
    assert torch.equal(layer.weight, decoded)
    other = make(scheme, oc=70, ic=96)
    other._set_weight(other.packed_weight().to_layout(TILES))
    other.weight_packed.zero_()
    other.load_state_dict(before)
    assert other.layout == STREAM
    assert same(before, other.state_dict())
    # On a CPU the stream is what is multiplied, so the next forward goes back to it, holding one copy.
    layer(torch.randn(1, 96))
    assert layer.layout == STREAM
    assert same(before, layer.state_dict())


def test_prepare_follows_what_dispatch_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(oc=70, ic=100)
    asked = []

    def preferred(scheme: Scheme, dtype: torch.dtype, device: torch.device, activations: Activations | str) -> str:
        asked.append((scheme, dtype, device))
        return TILES

    monkeypatch.setattr(ops, "preferred_layout", preferred)
    x = torch.randn(2, 100)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for _ in range(3):
        torch.testing.assert_close(layer(x), expected)
    assert layer.layout == TILES
    assert asked == [(layer.scheme, torch.float32, torch.device("cpu"))]
    layer.half()
    layer.prepare(torch.float16)
    assert [dtype for _, dtype, _ in asked] == [torch.float32, torch.float16]


@pytest.mark.parametrize("layout", [STREAM, TILES])
def test_copies_are_exact_and_independent(layout: str) -> None:
    layer = make(oc=70, ic=100)
    layer._set_weight(layer.packed_weight().to_layout(layout))
    x = torch.randn(2, 100)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert other.layout == layout
        assert other.scheme == layer.scheme
        assert same(layer.state_dict(), other.state_dict())
        assert torch.equal(layer(x), other(x))
        other.weight_scale.zero_()
        assert layer.weight_scale.abs().sum() > 0


def test_wrapping_a_packed_weight_takes_no_copy() -> None:
    scheme = SCHEMES[0]
    weight = PackedWeight.from_encoded(quantize_rtn(torch.randn(8, 32), scheme))
    layer = PackedLinear.from_packed(weight)
    assert layer.weight_packed is weight.data
    assert layer.packed_weight().data is weight.data
    assert not list(layer.parameters())


def test_a_state_dict_of_another_scheme_is_refused() -> None:
    layer, other = make(get_scheme("fp6_e3m2")), make(get_scheme("fp5_e2m2"))
    with pytest.raises(RuntimeError, match=r"weight_packed is torch.int32 \[24, 10\]; fp6_e3m2:row:float16 stores"):
        layer.load_state_dict(other.state_dict())
    scaled = make(get_scheme("fp6_e3m2", scale_dtype="float32"))
    with pytest.raises(RuntimeError, match=r"weight_scale is torch\.float32"):
        layer.load_state_dict(scaled.state_dict())
    state = layer.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match="weight_scale"):
        layer.load_state_dict(state)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(FormatError, match="group size 48 does not divide the 64 input channels"):
        PackedLinear(64, 8, get_scheme("int4", 48))
    with pytest.raises(ShapeError, match="expected"):
        make()(torch.randn(2, 65))


def test_repr_says_shape_scheme_and_layout() -> None:
    layer = make(get_scheme("fp6_e3m2"))
    assert "in_features=64, out_features=24, bias=True, scheme=fp6_e3m2:row:float16" in repr(layer)
    assert "bits_per_weight=6.250" in repr(layer)
    layer._set_weight(layer.packed_weight().to_layout(TILES))
    assert f"layout={TILES}" in repr(layer)


@pytest.mark.parametrize("bias", [False, True])
def test_compiles_in_one_graph(bias: bool) -> None:
    layer = make(get_scheme("fp6_e3m2"), bias=bias)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (1, 3, 7):
        x = torch.randn(n, 64)
        assert torch.equal(compiled(x), layer(x))


def test_two_layers_compile_in_one_graph() -> None:
    model = torch.nn.Sequential(make(), torch.nn.SiLU(), make(SCHEMES[3], oc=16, ic=24))
    x = torch.randn(4, 64)
    expected = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_layer_with_a_zero_size_batch() -> None:
    assert make()(torch.empty(0, 64)).shape == (0, 24)


@pytest.mark.timeout(30)
def test_a_thread_that_asks_while_a_weight_changes_its_layout_gets_one_or_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, found = make(get_scheme("int4", 16)), []
    decoded, put = layer.weight, torch.nn.Module.__setattr__

    def asked(module: torch.nn.Module, name: str, value: object) -> None:
        if module is layer and name == "weight_scale":
            threads.append(threading.Thread(target=lambda: found.append(layer.packed_weight())))
            threads[-1].start()
            threads[-1].join(0.2)
        put(module, name, value)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(torch.nn.Module, "__setattr__", asked)
    monkeypatch.setattr(ops, "preferred_layout", lambda *_: TILES)
    layer.prepare(torch.float16)
    for thread in threads:
        thread.join()
    assert layer.layout == TILES and len(found) == 1
    assert torch.equal(found[0].dequantize(torch.float32), decoded)
