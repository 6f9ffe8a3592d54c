"""What a call does between Python and the driver: what is prepared, who sees the operator, what threads share."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu, pretended
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear
from tersor.ops import Gate, mode, prepared
from tersor.ops import dense as ops_dense
from tersor.ops.workspace import SHARED

HALF = torch.float16


def packed(oc: int = 256, ic: int = 1024, layout: str = "tiles_float16") -> PackedWeight:
    scheme = formats.get_scheme("fp6_e3m2")
    values = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc))
    return PackedWeight.from_encoded(quantize_rtn(values, scheme)).to_layout(layout)


gpu = pretended("NVIDIA A100")
"""Tensors of the CPU pass for those of an A100, or of the chip a test names: its kernels need no tensor map."""


on_an_h200 = pytest.mark.parametrize("gpu", ["NVIDIA H200"], indirect=True)


def test_a_call_is_prepared_once_for_each_number_of_tokens_and_alignment(gpu: FakeGpu) -> None:
    weight = packed()
    wide = torch.zeros(9, 1032, dtype=HALF)
    for x in (wide[:3, :1024], wide[:, :1024], wide[:9, 1:1025]) * 3:
        assert ops.linear(x, weight).shape == (x.shape[0], 256)
    of = prepared.type_of(weight)
    keys = [(n, HALF, -1, aligned, False, 0) for n, aligned in ((3, True), (9, True), (9, False))]
    assert list(of._few) == keys and len(gpu.asked) == 3
    assert [launch["x"] for launch in gpu.launches[-3:]] == [wide.data_ptr(), wide.data_ptr(), wide.data_ptr() + 2]
    assert {launch["x_stride"] for launch in gpu.launches} == {1032}
    same = PackedWeight(weight.scheme, weight.shape, weight.data.clone(), weight.scale.clone(), None, weight.layout)
    ops.linear(wide[:, :1024], same)
    assert prepared.type_of(same) is of and len(gpu.asked) == 3
    prepared.forget()
    ops.linear(wide[:, :1024], same)
    assert len(gpu.asked) == 4


@on_an_h200
def test_a_server_that_sees_every_number_of_tokens_keeps_its_decode_steps(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, now = prepared.type_of(packed()), mode.current()

    def call(n: int) -> prepared.Prepared:
        return of.prepared((n, HALF, -1, True, False, 0), now)

    decode = {n: call(n) for n in range(1, 257)}
    started = len(gpu.asked)
    for n in range(257, 8193):
        call(n)
        call(300)  # in use all the time, so never the least recently used
    assert all(call(n) is found for n, found in decode.items())
    assert len(of._long) == prepared._MOST_LONG
    assert len(gpu.asked) - started == 8192 - 256  # 300 was never made again
    assert len({key for key in of._long if key[0] != 300 and key[0] <= 8192 - prepared._MOST_LONG}) == 0


def test_every_address_is_read_at_every_call(gpu: FakeGpu) -> None:
    weight = packed()
    bias, wide_bias = torch.zeros(256, dtype=HALF), torch.arange(512, dtype=HALF)[::2]
    for x in (torch.zeros(2, 1024, dtype=HALF), torch.zeros(1, 2, 1024, dtype=HALF)):
        y = ops.linear(x, weight, bias)
        expected = {"weight": weight.data, "scale": weight.scale, "x": x, "bias": bias, "y": y}
        assert {name: gpu.last[name] for name in expected} == {
            name: tensor.data_ptr() for name, tensor in expected.items()
        }
        assert (gpu.last.stream, gpu.last["residual"]) == (7, 0)
        assert gpu.last["partial"] in gpu.memory and gpu.last["arrived"] > gpu.last["partial"]
        sizes = ("x_stride", "oc", "ic", "n", "x_aligned")
        assert [gpu.last[name] for name in sizes] == [1024, 256, 1024, 2, True]
        assert y.shape == (*x.shape[:-1], 256) and y.is_contiguous() and y.dtype == HALF
    ops.linear(torch.zeros(2, 1024, dtype=HALF), weight, wide_bias)
    assert gpu.last["bias"] not in (0, wide_bias.data_ptr())
    ops.linear(torch.zeros(2, 2, 2, 1024, dtype=HALF), weight)
    assert gpu.last["bias"] == 0 and gpu.last["n"] == 8
    twice = torch.zeros(1, 1024, dtype=HALF).expand(5, 1024)
    ops.linear(twice, weight)
    assert gpu.last["x_stride"] == 1024 and gpu.last["x"] != twice.data_ptr()


def test_residuals_and_gated_calls_reach_the_kernel(gpu: FakeGpu) -> None:
    weight, bias = packed(), torch.zeros(256, dtype=HALF)
    x, residual = torch.zeros(3, 1024, dtype=HALF), torch.zeros(3, 264, dtype=HALF)
    ops.linear(x, weight, bias, residual=residual[:, :256].contiguous())
    assert gpu.last["residual"] % 16 == 0 != gpu.last["residual"]
    same = torch.zeros(3, 256, dtype=HALF)
    ops.linear(x, weight, bias, residual=same)
    assert gpu.last["residual"] == same.data_ptr()
    for odd in (residual[:, :256], torch.zeros(769, dtype=HALF)[1:].view(3, 256)):
        ops.linear(x, weight, bias, residual=odd)
        assert gpu.last["residual"] not in (0, odd.data_ptr()) and gpu.last["residual"] % 16 == 0
    assert ops.gated_linear(x, weight).shape == (3, 128)
    assert gpu.asked[0].endswith("_n8") and gpu.asked[-1].endswith("_n8_gated")
    assert ops.gated_linear(x, weight, gate=Gate.GELU_TANH).shape == (3, 128) and gpu.asked[-1].endswith("_n8_gated2")
    assert list(prepared.type_of(weight)._few) == [(3, HALF, -1, True, gate, 0) for gate in range(3)]


def test_batch_invariant_calls_copy_and_take_turns(gpu: FakeGpu) -> None:
    weight, wide = packed(), torch.zeros(200, 1027, dtype=HALF)
    residual = torch.zeros(200, 256, dtype=HALF)
    with ops.using(batch_invariant=True):
        assert ops.linear(wide[:, 1:1025], weight, residual=residual).shape == (200, 256)
    assert [launch["n"] for launch in gpu.launches] == [64, 64, 64, 8]
    address = gpu.launches[0]["x"]
    for turn, launch in enumerate(gpu.launches):
        assert launch["x"] == address + turn * 64 * 1024 * 2 and launch["x"] % 16 == 0
        assert launch["x_stride"] == 1024 and launch["x_aligned"]
        assert launch["residual"] == residual.data_ptr() + turn * 64 * 256 * 2
    ops.linear(wide[:5, 1:1025], weight)
    assert gpu.last["x"] == wide.data_ptr() + 2 and not gpu.last["x_aligned"]


def test_a_layer_follows_its_buffers(gpu: FakeGpu) -> None:
    layer = PackedLinear.from_packed(packed(), dtype=HALF)
    x = torch.zeros(2, 1024, dtype=HALF)
    layer(x)
    held = layer.packed_weight()
    assert layer.packed_weight() is held and layer._ready_for is HALF
    for name, argument in (("weight_packed", "weight"), ("weight_scale", "scale")):
        moved = getattr(layer, name).clone()
        setattr(layer, name, moved)
        layer(x)
        assert gpu.last[argument] == moved.data_ptr()
        assert layer.packed_weight() is not held
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(x)
        assert gpu.last["weight"] == other.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    layer.bias = torch.nn.Parameter(torch.ones(256, dtype=HALF), requires_grad=False)
    layer(x)
    assert gpu.last["bias"] == layer.bias.data_ptr()


def test_split_sums_lie_in_the_workspace_of_the_call(gpu: FakeGpu) -> None:
    weight, x = packed(), torch.zeros(2, 1024, dtype=HALF)
    places = []
    for workspace in (ops.Workspace(), SHARED, ops.Workspace()):
        with ops.using(workspace=workspace):
            ops.linear(x, weight)
            places.append((gpu.last["partial"], gpu.last["arrived"]))
            ops.linear(x, weight)
            assert (gpu.last["partial"], gpu.last["arrived"]) == places[-1]
        assert workspace.nbytes == gpu.memory[gpu.last["partial"]][1]
    assert [partial for partial, _ in places] == list(gpu.memory) and len(set(places)) == 3


def test_what_is_noted_on_a_weight_is_not_part_of_it() -> None:
    weight = packed(24, 64, "stream")
    text = repr(weight)
    ops.linear(torch.zeros(1, 64), weight)
    assert repr(weight) == text and "note" not in text
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert not hasattr(other, "note")
        assert torch.equal(ops.linear(torch.ones(1, 64), other), ops.linear(torch.ones(1, 64), weight))


@on_an_h200
def test_early_fetches_need_a_weight_that_lies_still(gpu: FakeGpu) -> None:
    weight, x = packed(), torch.zeros(16, 1024, dtype=HALF)
    for written in (None, None, weight.data, None, weight.scale, None):
        if written is not None:
            written.add_(0)
        ops.linear(x, weight)
        x_map = gpu.last["x_map"]
        assert (x_map.address, x_map.sizes, x_map.strides) == (x.data_ptr(), (1024, 16), (2048,))
    assert [launch.programmatic for launch in gpu.launches] == [False, True, False, True, False, True]


def test_threads_share_prepared_calls_and_nothing_else(gpu: FakeGpu) -> None:
    weight, together, failures = packed(), threading.Barrier(2), []
    xs = {stream: torch.zeros(4, 1024, dtype=HALF) for stream in (8, 9)}

    def work(stream: int) -> None:
        try:
            gpu.stream = stream
            together.wait()
            for _ in range(300):
                ops.linear(xs[stream], weight)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(gpu.launches) == 600
    assert {(launch.stream, launch["x"]) for launch in gpu.launches} == {(s, x.data_ptr()) for s, x in xs.items()}
    assert {(launch.stream, launch["partial"]) for launch in gpu.launches} in (
        set(zip(streams, gpu.memory, strict=True)) for streams in ((8, 9), (9, 8))
    )


class Seen(Exception):
    """The operator was called."""


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the registered operator raise."""

    def operator(*arguments: Any) -> None:
        raise Seen

    monkeypatch.setattr(ops_dense, "_operator", operator)


class Sub(torch.Tensor):
    """A subclass that has nothing of its own."""


class Dispatch(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Overrides(TorchFunctionMode):
    """A mode that changes nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_nobody_looks_so_the_dispatcher_is_not_asked(spy: None) -> None:
    weight, x = packed(24, 64, "stream"), torch.ones(2, 64)
    bias = torch.nn.Parameter(torch.ones(24))
    ops.linear(x, weight, bias.detach())
    with torch.no_grad():
        ops.linear(x.clone().requires_grad_(), weight, bias)
    with torch.inference_mode():
        ops.linear(torch.ones(2, 64), weight, bias)
    ops.linear(torch.nn.Parameter(x, requires_grad=False), weight)


def test_who_looks_sees_the_operator(spy: None) -> None:
    weight, x, bias = packed(24, 64, "stream"), torch.ones(2, 64), torch.ones(24)
    lookers = (
        *(Dispatch(), Overrides(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")),
        *(torch.autocast("cpu"), torch.autograd.forward_ad.dual_level()),
    )
    for looker in lookers:
        with looker, pytest.raises(Seen):
            ops.linear(x, weight)
    with torch.profiler.profile(), pytest.raises(Seen):
        ops.linear(x, weight)
    imaginary = torch.ones(2, 64, dtype=torch.complex64).conj().imag
    for odd in (x.as_subclass(Sub), x.to("meta"), imaginary, x.clone().requires_grad_()):
        with pytest.raises(Seen):
            ops.linear(odd, weight)
    for odd in (bias.as_subclass(Sub), torch.nn.Parameter(bias)):
        with pytest.raises(Seen):
            ops.linear(x, weight, odd)
    for transform in (torch.vmap, torch.func.functionalize, lambda f: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(Seen):
            transform(lambda x: ops.linear(x, weight))(x)
    with pytest.raises(Seen):
        torch.jit.trace(lambda x: ops.linear(x, weight), (x,))
    with pytest.raises(Seen):
        torch.fx.experimental.proxy_tensor.make_fx(lambda x: ops.linear(x, weight))(x)


def test_both_ways_give_the_same() -> None:
    for layout in ("stream", "tiles_float16"):
        weight = packed(70, 96, layout)
        for x in (torch.randn(3, 96), torch.randn(2, 3, 96).half(), torch.randn(96), torch.randn(0, 96)):
            bias = torch.randn(70).to(x.dtype)
            plain = ops.linear(x, weight, bias)
            with Dispatch():
                seen = ops.linear(x, weight, bias)
            assert torch.equal(plain, seen) and plain.dtype == seen.dtype and plain.stride() == seen.stride()
    imaginary = torch.randn(3, 96, dtype=torch.complex64).conj().imag
    assert torch.equal(ops.linear(imaginary, weight), ops.linear(imaginary.resolve_neg(), weight))
    empty = PackedWeight(weight.scheme, (0, 96), weight.data[:0], weight.scale[:0], None, "stream")
    assert ops.linear(torch.ones(2, 96), empty).shape == (2, 0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_compiles_in_one_graph_after_it_has_run(backend: str) -> None:
    model = torch.nn.Sequential(
        PackedLinear.from_packed(packed(48, 64, "stream"), torch.ones(48)),
        torch.nn.SiLU(),
        PackedLinear.from_packed(packed(16, 48, "stream")),
    )
    x = torch.randn(3, 64)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), expected)
    with torch.no_grad():
        model[0].weight_scale.mul_(2)
    assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), expected)


def test_an_exported_layer_keeps_its_buffers() -> None:
    layer = PackedLinear.from_packed(packed(48, 64, "stream"), torch.ones(48))
    x = torch.randn(3, 64)
    layer(x)
    exported = torch.export.export(layer, (x,))
    assert set(exported.state_dict) == {"weight_packed", "weight_scale", "bias"}
    assert "tersor.linear" in exported.graph_module.code
    assert torch.equal(exported.module()(x), layer(x))
