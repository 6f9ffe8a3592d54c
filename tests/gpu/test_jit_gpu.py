"""Loading and launching on a GPU: results, limits, errors, threads, graphs, and what a launch costs."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.jit_kernels import axpy

from tersor.errors import KernelError
from tersor.kernels.jit import Function, KernelSource, arch_for, build, cache, get, module, nvrtc, obtain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAUNCH_MICROSECONDS = 10.0
LOAD_MILLISECONDS = 10.0
STATIC_BYTES = 256  # of shared memory in axpy

_ADD = """
extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(float* y, int n, float a) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) y[i] += a;
}
"""

_EMPTY = """
extern "C" __global__ void TERSOR_ENTRY(
    const void* a, const void* b, const void* c, const void* d, void* e, void* f, void* g, long long stride, int oc,
    int ic, int n, int aligned, float factor) {}
"""


def launch_axpy(function: Function, x: torch.Tensor, y: torch.Tensor, a: float, shared_bytes: int = 1024) -> None:
    """y = a * x + offset on the current stream: the kernel doubles what it is given."""
    grid = (-(-x.numel() // 256), 1, 1)
    stream = torch.cuda.current_stream().cuda_stream
    function.launch(grid, (256, 1, 1), shared_bytes, stream, (x.data_ptr(), y.data_ptr(), x.numel(), a / 2))


@pytest.fixture(autouse=True)
def empty_cache(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test with nothing compiled and nothing loaded."""
    monkeypatch.setattr(module, "_functions", {})


@pytest.mark.parametrize("side_stream", [False, True])
def test_a_launch_computes(side_stream: bool) -> None:
    function = get(axpy(3), torch.device("cuda"))
    assert get(axpy(3), torch.cuda.current_device()) is function
    stream = torch.cuda.Stream() if side_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        x = torch.randn(100_003, device="cuda")
        y = torch.full_like(x, float("nan"))
        launch_axpy(function, x, y, 0.5)
        stream.synchronize()
    assert torch.equal(y, x * 0.5 + 3)


def test_the_driver_and_the_compiler_agree() -> None:
    function = get(axpy(0), 0)
    compiled = obtain(axpy(0), arch_for(torch.cuda.get_device_capability(0))).resources
    assert compiled is not None
    assert function.resources == compiled


def test_shared_memory_up_to_the_limit_of_the_chip() -> None:
    properties = torch.cuda.get_device_properties(0)
    whole = properties.shared_memory_per_block_optin - STATIC_BYTES
    function = get(axpy(0, slot=whole // 4 - 256), 0)
    assert function.max_shared_bytes == whole > 48 * 1024
    x = torch.randn(4096, device="cuda")
    y = torch.zeros_like(x)
    launch_axpy(function, x, y, 2.0, shared_bytes=whole)
    assert torch.equal(y, x * 2)
    with pytest.raises(KernelError, match=rf"does not launch: CUDA_ERROR_.* {whole + 1} bytes of shared memory"):
        launch_axpy(function, x, y, 2.0, shared_bytes=whole + 1)
    launch_axpy(function, x, y, 3.0, shared_bytes=whole)  # a refused launch leaves the context usable
    assert torch.equal(y, x * 3)


def test_a_refused_launch_is_an_error_with_the_grid() -> None:
    function = get(axpy(0), 0)
    for grid, block in (((1, 1, 1), (2048, 1, 1)), ((0, 1, 1), (256, 1, 1))):
        with pytest.raises(KernelError) as caught:
            function.launch(grid, block, 0, 0, (0, 0, 0, 0.0))
        assert "CUDA_ERROR_INVALID_VALUE" in str(caught.value)
        assert f"grid {grid}, block {block}" in str(caught.value) and "cuda:0" in str(caught.value)


def test_what_is_no_binary_does_not_load() -> None:
    broken = nvrtc.Binary(name="tersor_test_axpy", arch="compute_80", data=b"not a binary\0", log="")
    with pytest.raises(KernelError, match=r"kernel tersor_test_axpy does not load \(load\): CUDA_ERROR_"):
        Function(axpy(0), 0, broken)


def test_ptx_is_finished_by_the_driver() -> None:
    """The way of a GPU that is newer than NVRTC knows."""
    capability = torch.cuda.get_device_capability(0)
    binary = nvrtc.compile_source(axpy(1), "compute_{}{}".format(*capability))
    function = Function(axpy(1), 0, binary)
    x = torch.randn(1000, device="cuda")
    y = torch.zeros_like(x)
    launch_axpy(function, x, y, 4.0)
    assert torch.equal(y, x * 4 + 1)
    assert function.resources.spill_store_bytes is None and function.resources.local_bytes == 0


def test_threads_launch_side_by_side() -> None:
    """Each thread has its own stream, arguments and results; the first launch of a thread needs no torch call."""
    function = get(axpy(0), 0)
    count, repeats = 4, 300
    xs = [torch.full((1000,), float(i + 1), device="cuda") for i in range(count)]
    ys = [torch.zeros(repeats, 1000, device="cuda") for _ in range(count)]
    streams = [torch.cuda.Stream() for _ in range(count)]
    torch.cuda.synchronize()
    together = threading.Barrier(count)
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            together.wait()
            handle = streams[i].cuda_stream
            for repeat in range(repeats):
                arguments = (xs[i].data_ptr(), ys[i][repeat].data_ptr(), 1000, repeat / 2)
                function.launch((4, 1, 1), (256, 1, 1), 1024, handle, arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert failures == []
    factors = torch.arange(repeats, device="cuda", dtype=torch.float32)[:, None]
    for i in range(count):
        assert torch.equal(ys[i], (factors * (i + 1)).expand(-1, 1000))


def test_a_fresh_thread_launches_on_the_default_stream() -> None:
    function = get(axpy(0), 0)
    x = torch.randn(1000, device="cuda")
    y = torch.zeros_like(x)
    arguments = (x.data_ptr(), y.data_ptr(), 1000, 1.0)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            function.launch((4, 1, 1), (256, 1, 1), 1024, 0, arguments)
        except BaseException as error:
            failures.append(error)

    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert failures == [] and torch.equal(y, x * 2)


def test_threads_load_a_kernel_once() -> None:
    functions: list[Function] = []
    threads = [threading.Thread(target=lambda: functions.append(get(axpy(9), 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(functions) == 8 and len({id(function) for function in functions}) == 1


def test_launches_and_first_loads_are_captured_in_a_graph() -> None:
    x = torch.randn(5000, device="cuda")
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    loaded = get(axpy(1), 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_axpy(loaded, x, y, 2.0)
        launch_axpy(get(axpy(5), 0), y, z, 3.0)
    assert torch.count_nonzero(z) == 0
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 2 + 1)
    torch.testing.assert_close(z, y * 3 + 5)  # the kernel fuses the product and the sum


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability(0) < (9, 0), reason="needs sm_90 or newer"
)
@pytest.mark.parametrize("captured", [False, True])
def test_programmatic_launches_keep_their_order(captured: bool) -> None:
    source = KernelSource("tersor_test_add", "add.cuh", {}, "Pif", texts={"add.cuh": _ADD})
    function = get(source, 0)
    y = torch.zeros(100_000, device="cuda")

    def chain() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(64):
            arguments = (y.data_ptr(), y.numel(), 1.0)
            function.launch((-(-y.numel() // 256), 1, 1), (256, 1, 1), 0, stream, arguments, programmatic=True)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        graph.replay()
    else:
        chain()
    torch.cuda.synchronize()
    assert torch.equal(y, torch.full_like(y, 64.0))


@pytest.mark.alone
@pytest.mark.parametrize("programmatic", [False, True])
def test_a_launch_costs_microseconds(programmatic: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments_of_linear = "PPPPPPPqiiiif"
    texts = {"empty.cuh": _EMPTY}
    function = get(KernelSource("tersor_test_empty", "empty.cuh", {}, arguments_of_linear, texts=texts), 0)
    arguments = (8, 16, 24, 32, 40, 48, 56, 8192, 8192, 8192, 16, 1, 1.0)
    stream = torch.cuda.current_stream().cuda_stream
    samples = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            function.launch((1, 1, 1), (32, 1, 1), 0, stream, arguments, programmatic)
        samples.append((time.perf_counter() - start) / 200 * 1e6)
    torch.cuda.synchronize()
    typical = statistics.median(samples)
    with capsys.disabled():
        kind = "programmatic launch" if programmatic else "launch"
        print(f"\n{kind} of 13 arguments: {typical:.2f} us (best {min(samples):.2f})")
    assert typical <= LAUNCH_MICROSECONDS


@pytest.mark.alone
def test_a_cached_kernel_is_ready_in_milliseconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tersor.formats import get_scheme
    from tersor.hardware import chip_named
    from tersor.kernels import dense

    capability = torch.cuda.get_device_capability(0)
    arch = arch_for(capability)
    sources = dense.kernels_for(get_scheme("fp6_e3m2"), torch.float16, chip_named("H200"))
    source = max(sources, key=lambda source: int(source.parameters.get("N_TILE", 0)))
    start = time.perf_counter()
    obtain(source, arch)
    compile_seconds = time.perf_counter() - start
    hits, loads = [], []
    for _ in range(5):
        monkeypatch.setattr(build, "_memory", {})
        monkeypatch.setattr(module, "_functions", {})
        start = time.perf_counter()
        binary = cache.load(cache.key(source, arch))
        hits.append((time.perf_counter() - start) * 1e3)
        assert binary is not None
        start = time.perf_counter()
        get(source, 0)
        loads.append((time.perf_counter() - start) * 1e3)
    with capsys.disabled():
        print(
            f"\n{source.name}: compiled in {compile_seconds:.2f} s; from the cache {statistics.median(hits):.2f} ms, "
            f"ready to launch in {statistics.median(loads):.2f} ms (worst {max(loads):.2f})"
        )
    assert statistics.median(loads) <= LOAD_MILLISECONDS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_is_served_whatever_the_current_one() -> None:
    function = get(axpy(0), 1)
    assert get(axpy(0), 0) is not function
    x = torch.randn(1000, device="cuda:1")
    y = torch.zeros_like(x)
    for stream in (0, torch.cuda.Stream(1).cuda_stream):
        y.zero_()
        torch.cuda.synchronize(1)
        function.launch((4, 1, 1), (256, 1, 1), 1024, stream, (x.data_ptr(), y.data_ptr(), 1000, 1.0))
        torch.cuda.synchronize(1)
        assert torch.equal(y, x * 2)
