"""What a call does between Python and the driver: plans, who sees the operator, what threads share."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.hardware import CHIPS
from tersor.kernels import jit
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear
from tersor.ops import current, dispatch, prepared, workspace

host: Any = importlib.import_module("tersor.ops.linear")
HALF = torch.float16


def packed(oc: int = 256, ic: int = 1024, layout: str = "tiles_float16") -> PackedWeight:
    scheme = formats.get_scheme("fp6_e3m2")
    values = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc))
    return PackedWeight.from_encoded(quantize_rtn(values, scheme)).to_layout(layout)


class Gpu:
    """Remembers what was loaded and launched; `launches` holds stream, arguments and whether weights came early."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launches: list[tuple[int, tuple[Any, ...], bool]] = []
        self.local = threading.local()

    def get(self, source: jit.KernelSource, index: int) -> Any:
        self.loaded.append(source.name)
        return SimpleNamespace(launch=self.launch)

    def launch(
        self,
        grid: Any,
        block: Any,
        shared: int,
        stream: int,
        args: tuple[Any, ...],
        early: bool = False,
        cluster: Any = None,
    ) -> None:
        self.launches.append((stream, args, early))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Let tensors of the CPU pass for those of an A100: its schedule needs no tensor map."""
    fake = Gpu()
    monkeypatch.setattr(dispatch, "obstacle", lambda scheme, dtype, device: "")
    monkeypatch.setattr(dispatch, "chip", lambda device: CHIPS["NVIDIA A100"])
    monkeypatch.setattr(jit, "get", fake.get)
    monkeypatch.setattr(current, "stream", lambda index: getattr(fake.local, "stream", 7))
    monkeypatch.setattr(current, "capturing", lambda: False)
    monkeypatch.setattr(
        current, "empty", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype).fill_(0)
    )
    monkeypatch.setattr(workspace, "_streams", {(-1, s): (1 << 24, 1 << 12, 1000 + s, 2000 + s) for s in (7, 8, 9)})
    prepared.forget()
    yield fake
    prepared.forget()


def test_a_plan_is_made_once_for_each_number_of_tokens_and_alignment(gpu: Gpu) -> None:
    weight = packed()
    wide = torch.zeros(9, 1032, dtype=HALF)
    for x in (wide[:3, :1024], wide[:, :1024], wide[:9, 1:1025]) * 3:
        assert ops.linear(x, weight).shape == (x.shape[0], 256)
    kind = prepared.kind_of(weight)
    keys = [(n, HALF, -1, aligned, False, False) for n, aligned in ((3, True), (9, True), (9, False))]
    assert list(kind.plans) == keys and len(gpu.loaded) == 3
    assert [args[2] for _, args, _ in gpu.launches[-3:]] == [wide.data_ptr(), wide.data_ptr(), wide.data_ptr() + 2]
    assert {args[8] for _, args, _ in gpu.launches} == {1032}
    same = PackedWeight(weight.scheme, weight.shape, weight.data.clone(), weight.scale.clone(), None, weight.layout)
    ops.linear(wide[:, :1024], same)
    assert prepared.kind_of(same) is kind and len(gpu.loaded) == 3
    prepared.forget()
    ops.linear(wide[:, :1024], same)
    assert len(gpu.loaded) == 4


def test_plans_do_not_grow_without_end(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_MOST_PLANS", 4)
    weight = packed()
    for n in range(1, 11):
        ops.linear(torch.zeros(n, 1024, dtype=HALF), weight)
    assert len(prepared.kind_of(weight).plans) <= 4


def test_every_address_is_read_at_every_call(gpu: Gpu) -> None:
    weight = packed()
    bias, wide_bias = torch.zeros(256, dtype=HALF), torch.arange(512, dtype=HALF)[::2]
    results = []
    for x in (torch.zeros(2, 1024, dtype=HALF), torch.zeros(1, 2, 1024, dtype=HALF)):
        y = ops.linear(x, weight, bias)
        results.append(y)
        stream, args, _ = gpu.launches[-1]
        tensors = (weight.data, weight.scale, x, bias, y)
        pointers = [tensor.data_ptr() for tensor in tensors]
        assert args[:6] == (*pointers[:4], 0, pointers[4])
        assert (stream, args[6:8], args[8:13]) == (7, (1007, 2007), (1024, 256, 1024, 2, True))
        assert y.shape == (*x.shape[:-1], 256) and y.is_contiguous() and y.dtype == HALF
    ops.linear(torch.zeros(2, 1024, dtype=HALF), weight, wide_bias)
    assert gpu.launches[-1][1][3] not in (0, wide_bias.data_ptr())
    ops.linear(torch.zeros(2, 2, 2, 1024, dtype=HALF), weight)
    assert gpu.launches[-1][1][3] == 0 and gpu.launches[-1][1][11] == 8
    twice = torch.zeros(1, 1024, dtype=HALF).expand(5, 1024)
    ops.linear(twice, weight)
    assert gpu.launches[-1][1][8] == 1024 and gpu.launches[-1][1][2] != twice.data_ptr()


def test_residuals_and_gated_calls_reach_the_kernel(gpu: Gpu) -> None:
    weight, bias = packed(), torch.zeros(256, dtype=HALF)
    x, residual = torch.zeros(3, 1024, dtype=HALF), torch.zeros(3, 264, dtype=HALF)
    ops.linear(x, weight, bias, residual=residual[:, :256].contiguous())
    assert gpu.launches[-1][1][4] % 16 == 0 != gpu.launches[-1][1][4]
    same = torch.zeros(3, 256, dtype=HALF)
    ops.linear(x, weight, bias, residual=same)
    assert gpu.launches[-1][1][4] == same.data_ptr()
    for odd in (residual[:, :256], torch.zeros(769, dtype=HALF)[1:].view(3, 256)):
        ops.linear(x, weight, bias, residual=odd)
        assert gpu.launches[-1][1][4] not in (0, odd.data_ptr()) and gpu.launches[-1][1][4] % 16 == 0
    assert ops.gated_linear(x, weight).shape == (3, 128)
    assert gpu.loaded[0].endswith("_n8") and gpu.loaded[-1].endswith("_n8_gated")
    assert list(prepared.kind_of(weight).plans) == [(3, HALF, -1, True, gated, False) for gated in (False, True)]


def test_batch_invariant_calls_copy_and_take_turns(gpu: Gpu) -> None:
    weight, wide = packed(), torch.zeros(200, 1027, dtype=HALF)
    residual = torch.zeros(200, 256, dtype=HALF)
    ops.set_batch_invariant(True)
    assert ops.linear(wide[:, 1:1025], weight, residual=residual).shape == (200, 256)
    tokens = [args[11] for _, args, _ in gpu.launches]
    assert tokens == [64, 64, 64, 8]
    address = gpu.launches[0][1][2]
    for turn, (_, args, _) in enumerate(gpu.launches):
        assert args[2] == address + turn * 64 * 1024 * 2 and args[2] % 16 == 0 and args[8] == 1024 and args[12]
        assert args[4] == residual.data_ptr() + turn * 64 * 256 * 2
    ops.set_batch_invariant(False)
    ops.linear(wide[:5, 1:1025], weight)
    assert gpu.launches[-1][1][2] == wide.data_ptr() + 2 and not gpu.launches[-1][1][12]


def test_a_layer_follows_its_buffers(gpu: Gpu) -> None:
    layer = PackedLinear.from_packed(packed(), dtype=HALF)
    x = torch.zeros(2, 1024, dtype=HALF)
    layer(x)
    held = layer.packed_weight()
    assert layer.packed_weight() is held and layer._ready_for is HALF
    for name in ("weight_packed", "weight_scale"):
        moved = getattr(layer, name).clone()
        setattr(layer, name, moved)
        layer(x)
        assert gpu.launches[-1][1][name == "weight_scale"] == moved.data_ptr()
        assert layer.packed_weight() is not held
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(x)
        assert gpu.launches[-1][1][0] == other.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    layer.bias = torch.nn.Parameter(torch.ones(256, dtype=HALF), requires_grad=False)
    layer(x)
    assert gpu.launches[-1][1][3] == layer.bias.data_ptr()


def test_what_is_noted_on_a_weight_is_not_part_of_it() -> None:
    weight = packed(24, 64, "stream")
    text = repr(weight)
    ops.linear(torch.zeros(1, 64), weight)
    assert repr(weight) == text and "note" not in text
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert not hasattr(other, "note")
        assert torch.equal(ops.linear(torch.ones(1, 64), other), ops.linear(torch.ones(1, 64), weight))


def test_early_fetches_need_a_weight_that_lies_still(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.kernels.jit import tensor_map

    monkeypatch.setattr(tensor_map, "rows", lambda *sizes: sizes)
    monkeypatch.setattr(dispatch, "chip", lambda device: CHIPS["NVIDIA H200"])
    prepared.forget()
    weight, x = packed(), torch.zeros(16, 1024, dtype=HALF)
    for written in (None, None, weight.data, None, weight.scale, None):
        if written is not None:
            written.add_(0)
        ops.linear(x, weight)
        assert gpu.launches[-1][1][0][:4] == (x.data_ptr(), 16, 1024, 1024)
    assert [early for _, _, early in gpu.launches] == [False, True, False, True, False, True]


def test_threads_share_plans_and_nothing_else(gpu: Gpu) -> None:
    weight, together, failures = packed(), threading.Barrier(2), []
    xs = {stream: torch.zeros(4, 1024, dtype=HALF) for stream in (8, 9)}

    def work(stream: int) -> None:
        try:
            gpu.local.stream = stream
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
    for stream, args, _ in gpu.launches:
        assert args[2] == xs[stream].data_ptr() and args[6:8] == (1000 + stream, 2000 + stream)


class Seen(Exception):
    """The operator was called."""


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the registered operator raise."""

    def operator(*arguments: Any) -> None:
        raise Seen

    monkeypatch.setattr(host, "_operator", operator)


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
    with torch.autocast("cpu"):
        ops.linear(torch.nn.Parameter(x, requires_grad=False), weight)


def test_who_looks_sees_the_operator(spy: None) -> None:
    weight, x, bias = packed(24, 64, "stream"), torch.ones(2, 64), torch.ones(24)
    for mode in (Dispatch(), Overrides(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")):
        with mode, pytest.raises(Seen):
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
