"""The host side on a GPU: streams, threads, devices, graphs, compilation, memory, and what a call costs."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable

import pytest
import torch

from tersor import formats, ops
from tersor.compress import quantize_rtn
from tersor.layouts import PackedWeight
from tersor.nn import PackedLinear
from tersor.ops import current, prepared, workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CALL_MICROSECONDS = 30.0
"""Several times what a call costs on an idle machine."""
HALF = torch.float16
TOKENS = (1, 5, 16, 100)


def packed(oc: int = 256, ic: int = 4096, device: str = "cuda:0") -> PackedWeight:
    """A random weight in the layout of its kernel: with so few rows its channels are split."""
    scheme = formats.get_scheme("fp6_e3m2")
    values = torch.randn(oc, ic, generator=torch.Generator().manual_seed(oc))
    weight = PackedWeight.from_encoded(quantize_rtn(values, scheme))
    weight = PackedWeight(scheme, weight.shape, weight.data.to(device), weight.scale.to(device))
    return weight.to_layout(ops.preferred_layout(scheme, HALF, torch.device(device)))


def tokens(n: int, ic: int = 4096, seed: int = 0, device: str = "cuda:0") -> torch.Tensor:
    return torch.randn(n, ic, generator=torch.Generator().manual_seed(seed)).to(device, HALF)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in threads that start together, and raise what any of them raised."""
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            together.wait()
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_numbers_of_torch_agree_with_its_objects() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert current.stream(0) == torch.cuda.current_stream(0).cuda_stream == side.cuda_stream
    assert current.device() == torch.cuda.current_device()
    assert not current.capturing()
    fresh = current.empty((3, 5), (5, 1), HALF)
    assert fresh.shape == (3, 5) and fresh.is_contiguous() and fresh.dtype == HALF
    assert fresh.device == torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        assert current.empty((1,), (1,), HALF).is_inference()


@pytest.mark.parametrize("n", TOKENS)
def test_a_call_runs_on_the_current_stream(n: int) -> None:
    """The side stream is kept busy, then writes x: a call on another stream would read what was there before."""
    weight, x = packed(), tokens(n)
    expected = ops.linear(x, weight)
    side, late = torch.cuda.Stream(), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = ops.linear(late, weight)
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shared_stream", [False, True])
def test_threads_call_side_by_side(shared_stream: bool) -> None:
    """One weight, four threads, different numbers of tokens; on one stream they borrow the same memory."""
    weight, bias = packed(), torch.ones(256, dtype=HALF, device="cuda")
    xs = [tokens(n, seed=n) for n in TOKENS]
    expected = [ops.linear(x, weight, bias) for x in xs]
    one = torch.cuda.Stream()
    streams = [one if shared_stream else torch.cuda.Stream() for _ in xs]
    results: list[list[torch.Tensor]] = [[] for _ in xs]
    torch.cuda.synchronize()

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            for _ in range(200):
                results[i].append(ops.linear(xs[i], weight, bias))
            streams[i].synchronize()

    in_threads(len(xs), work)
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 200 and all(torch.equal(y, wanted) for y in found)


def test_threads_make_a_first_call_together() -> None:
    weight, x = packed(oc=384), tokens(7)
    prepared.forget()
    results: list[torch.Tensor] = []

    def work(i: int) -> None:
        results.append(ops.linear(x, weight))
        torch.cuda.synchronize()

    in_threads(6, work)
    assert len(results) == 6 and all(torch.equal(y, results[0]) for y in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("n", TOKENS)
def test_a_second_gpu_is_served_whatever_the_current_one(n: int) -> None:
    expected = ops.linear(tokens(n), packed()).cpu()
    weight, x = packed(device="cuda:1"), tokens(n, device="cuda:1")
    with torch.cuda.device(0):
        y = ops.linear(x, weight)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        again = ops.linear(x, weight)
    assert y.device == x.device and torch.equal(y.cpu(), expected) and torch.equal(again.cpu(), expected)


@pytest.mark.parametrize("n", TOKENS)
def test_graphs_replay_side_by_side(n: int) -> None:
    """Two graphs of the same calls, replayed on two streams at the same time, with eager calls on a third."""
    weight, x = packed(), tokens(n)
    layer = PackedLinear.from_packed(packed(4096, 256), dtype=HALF)
    layer.prepare(HALF)

    def chain(start: torch.Tensor) -> torch.Tensor:
        for _ in range(4):  # the factors keep the numbers as large as they were
            start = layer(ops.linear(start, weight) * 2**-6) * 2**-4
        return start

    expected = chain(x)
    graphs, outputs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(chain(x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for output in outputs:
            output.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = chain(x)
        torch.cuda.synchronize()
        assert torch.equal(eager, expected)
        assert all(torch.equal(output, expected) for output in outputs)


def test_the_first_call_of_all_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is loaded, its call prepared and its memory taken while a graph is captured."""
    weight, x = packed(oc=640), tokens(3)
    monkeypatch.setattr(workspace.SHARED, "_stock", {})
    prepared.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, weight)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, ops.linear(x, weight))


@pytest.mark.alone
def test_an_owner_gives_the_memory_of_split_sums_back() -> None:
    """Eagerly and in a graph; the results are those of the memory that the process shares."""
    weight, x = packed(), tokens(3)
    expected = ops.linear(x, weight)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # a capture begins with both, and would give back what tests before this one held
    free, _ = torch.cuda.mem_get_info()
    with ops.Workspace() as own:
        with ops.using(workspace=own):
            assert torch.equal(ops.linear(x, weight), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.linear(x, weight)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert own.nbytes >= 8 << 20
        taken, _ = torch.cuda.mem_get_info()
        assert taken <= free - own.nbytes + (4 << 20)
        del graph
    back, _ = torch.cuda.mem_get_info()
    assert back - taken >= 8 << 20
    assert torch.equal(ops.linear(x, weight), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_model_compiles_in_one_graph(mode: str) -> None:
    model = torch.nn.Sequential(
        PackedLinear.from_packed(packed(256, 4096), torch.ones(256, dtype=HALF, device="cuda"), HALF),
        torch.nn.SiLU(),
        PackedLinear.from_packed(packed(512, 256), dtype=HALF),
    )
    with torch.no_grad():
        for n in (1, 16):
            x = tokens(n)
            expected = model(x)
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
            for _ in range(5):
                error = (compiled(x).float() - expected.float()).norm()
                assert error <= 2e-3 * expected.float().norm()  # the compiler rounds less often


@pytest.mark.alone
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", TOKENS)
def test_nothing_but_the_output_is_allocated(n: int, bias: bool) -> None:
    """By torch's count of allocations; what the driver gave at the first call stays."""
    if n > 64 and torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("weights are decoded for cuBLAS")
    layer = PackedLinear.from_packed(packed(), torch.ones(256, dtype=HALF, device="cuda") if bias else None, HALF)
    x = tokens(n)
    with torch.inference_mode():
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        free = torch.cuda.mem_get_info()[0]
        kept = [layer(x) for _ in range(100)]
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
    assert after["allocation.all.allocated"] - before["allocation.all.allocated"] == len(kept)
    segments = after["segment.all.allocated"] - before["segment.all.allocated"]
    assert segments > 0 or torch.cuda.mem_get_info()[0] == free


def test_a_weight_that_was_just_written_is_read_as_written() -> None:
    """The kernel may fetch weights before the kernel ahead of it ends, but not where that one writes them."""
    first, x = packed(), tokens(16)
    other = PackedWeight(first.scheme, first.shape, first.data.flip(0), first.scale, None, first.layout)
    changing = copy.deepcopy(first)
    expected = [ops.linear(x, weight) for weight in (first, other)]
    for _ in range(20):
        for source, wanted in zip((first, other), expected, strict=True):
            changing.data.copy_(source.data)
            found = [ops.linear(x, changing) for _ in range(3)]
            assert all(torch.equal(y, wanted) for y in found)


@pytest.mark.alone
@pytest.mark.parametrize("n", [1, 16])
def test_a_call_costs_microseconds(n: int, capsys: pytest.CaptureFixture[str]) -> None:
    weight = packed(256, 512)
    layer, x = PackedLinear.from_packed(weight, dtype=HALF), tokens(n, 512)
    operator, key = torch.ops.tersor.linear.default, weight.scheme.key()
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: ops.linear(x, weight),
        "layer": lambda: layer(x),
        "operator": lambda: operator(x, weight.data, weight.scale, None, None, key, 256, 512, weight.layout),
    }
    best = {}
    with torch.inference_mode():
        for name, call in calls.items():
            samples = []
            for _ in range(30):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                samples.append((time.perf_counter() - start) / 200 * 1e6)
            best[name] = min(samples)
    torch.cuda.synchronize()
    with capsys.disabled():
        print(f"\nhost, {n} tokens: " + ", ".join(f"{name} {value:.2f} us" for name, value in best.items()))
    assert best["linear"] <= CALL_MICROSECONDS and best["layer"] <= CALL_MICROSECONDS
