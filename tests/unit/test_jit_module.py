"""Loading and launching, against a driver that only remembers: what is passed, refused and said."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch
from helpers.fake_driver import STATIC_BYTES, Status
from helpers.fakes import FakeGpu, TensorMap
from helpers.jit_kernels import axpy

from tersor import hardware
from tersor.errors import KernelError, UnsupportedError
from tersor.kernels.jit import Function, get, module, native, nvrtc, tensor_map

H200 = hardware.CHIPS["NVIDIA H200"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(*[H200] * 4)
    fake.install(monkeypatch)
    fake.knows(axpy())
    return fake


@pytest.fixture(scope="module")
def binary() -> nvrtc.Binary:
    return nvrtc.compile_source(axpy(), "sm_90a")


GRID, BLOCK = (5, 2, 1), (256, 1, 1)
ARGUMENTS = (2**47 + 8, 16, -3, 0.5)


def test_a_function_is_loaded_in_the_context_of_its_device(gpu: FakeGpu, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    assert gpu.images == [binary.data] and gpu.loaded == ["tersor_test_axpy"]
    assert gpu.driver.context == 0 and gpu.driver.capture_mode == "global"
    assert function.max_shared_bytes == gpu.dynamic_limit == H200.shared_bytes - STATIC_BYTES
    assert function.resources.registers == 40 and function.resources.spill_store_bytes == 0
    assert repr(function) == "Function(tersor_test_axpy, cuda:3, 40 registers)"


def test_a_launch_passes_every_number(gpu: FakeGpu, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    function.launch(GRID, BLOCK, 1024, 2**47 + 77, ARGUMENTS)
    function.launch((1, 1, 1), BLOCK, 2048, 0, (0, 0, 1, 2))
    function.launch(GRID, BLOCK, 512, 78, ARGUMENTS, programmatic=True)
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS, cluster=(5, 2, 1))
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS, programmatic=True, cluster=(1, 2, 1))
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS)
    assert [tuple(launch.arguments.items()) for launch in gpu.launches] == [
        tuple(zip(("x", "y", "n", "a"), values, strict=True))
        for values in (ARGUMENTS, (0, 0, 1, 2.0), ARGUMENTS, ARGUMENTS, ARGUMENTS, ARGUMENTS)
    ]
    assert {(launch.kernel, launch.device, launch.block) for launch in gpu.launches} == {("tersor_test_axpy", 3, BLOCK)}
    assert [(one.grid, one.shared_bytes, one.stream, one.programmatic, one.cluster) for one in gpu.launches] == [
        (GRID, 1024, 2**47 + 77, False, None),
        ((1, 1, 1), 2048, 0, False, None),
        (GRID, 512, 78, True, None),
        (GRID, 0, 78, False, (5, 2, 1)),
        (GRID, 0, 78, True, (1, 2, 1)),
        (GRID, 0, 78, False, None),
    ]


def test_memory_lies_as_cuda_bindings_lays_it() -> None:
    from cuda.bindings import driver as cuda

    source = axpy()
    memory = native.LaunchMemory(source)
    memory.set_cluster((2, 3, 1))
    memory.pack(memory.buffer, 0, 1, 2, 3, 4, 5, 6, 7, 8, memory.clustered, 2, *ARGUMENTS)
    cluster, serialized = cuda.CUlaunchAttribute(), cuda.CUlaunchAttribute()
    cluster.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    serialized.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value = cuda.CUlaunchAttributeValue()
    value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = 2, 3, 1
    cluster.value = value
    value = cuda.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    serialized.value = value
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 1, 2, 3
    config.blockDimX, config.blockDimY, config.blockDimZ = 4, 5, 6
    config.sharedMemBytes, config.hStream, config.attrs, config.numAttrs = 7, 8, [cluster, serialized], 2
    theirs, ours = ctypes.string_at(config.getPtr(), 56), ctypes.string_at(memory.config, 56)
    assert ours[:40] == theirs[:40] and ours[48:] == theirs[48:]
    attributes = ctypes.c_void_p.from_buffer_copy(theirs, 40).value
    assert ctypes.string_at(memory.clustered, 144) == ctypes.string_at(attributes, 144)
    kinds = cuda.CUtensorMapDataType
    assert tensor_map.FLOAT16 == kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    assert tensor_map.BFLOAT16 == kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert native._NO_INTERLEAVE == cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert native._SWIZZLE_128B == cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert native._PROMOTE_TO_256B == cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    assert native._ZERO_BEYOND == cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


def test_a_tensor_map_is_encoded_from_every_number_and_kept(gpu: FakeGpu) -> None:
    rows = tensor_map.rows
    first = rows(2**47, 5, 300, 304, tensor_map.BFLOAT16, 8)
    assert first == rows(2**47, 5, 300, 304, tensor_map.BFLOAT16, 8) and len(first) == 128
    assert rows(2**47, 5, 300, 304, tensor_map.FLOAT16, 16) != first
    assert gpu.maps == [
        TensorMap(9, 2**47, (300, 5), (608,), (64, 8), (1, 1), (0, 3, 3, 0)),
        TensorMap(6, 2**47, (300, 5), (608,), (64, 16), (1, 1), (0, 3, 3, 0)),
    ]
    with pytest.raises(KernelError, match=r"no tensor map for \[5, 300\] with 304 elements a row at 0x0: CUDA error 1"):
        rows(0, 5, 300, 304, tensor_map.FLOAT16, 16)


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    native.function.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", "libcuda_of_nobody.so.1")
    with pytest.raises(UnsupportedError, match=r"no kernel can be launched \(libcuda_of_nobody.*\): install NVIDIA's"):
        native.function("cuLaunchKernelEx")


@pytest.mark.parametrize("grid", [(-1, 1, 1), (1, 2), (1.5, 1, 1)])
def test_a_grid_that_is_none_is_refused(gpu: FakeGpu, binary: nvrtc.Binary, grid: Any) -> None:
    function = Function(axpy(), 3, binary)
    with pytest.raises(KernelError, match=r"kernel tersor_test_axpy: grid \(.*\), block .* cannot be: "):
        function.launch(grid, BLOCK, 0, 0, ARGUMENTS)
    assert gpu.launches == []


@pytest.mark.parametrize(
    "arguments",
    [
        (1, 2, 3),
        (1, 2, 3, 4.0, 5),
        (1, 2, 3.5, 1.0),
        (None, 2, 3, 1.0),
        (2**64, 2, 3, 1.0),
        (1, 2, 2**63, 1.0),
    ],
)
def test_arguments_that_do_not_fit_are_not_launched(
    gpu: FakeGpu, binary: nvrtc.Binary, arguments: tuple[Any, ...]
) -> None:
    function = Function(axpy(), 3, binary)
    with pytest.raises(KernelError, match=r"kernel tersor_test_axpy: \d arguments .* do not fit 'PPqf': "):
        function.launch(GRID, BLOCK, 0, 0, arguments)
    assert gpu.launches == []


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_refused_launch_says_everything(gpu: FakeGpu, binary: nvrtc.Binary, programmatic: bool) -> None:
    function = Function(axpy(), 3, binary)
    gpu.refuses = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError) as caught:
        function.launch(GRID, BLOCK, 1024, 0, ARGUMENTS, programmatic)
    assert str(caught.value) == (
        "kernel tersor_test_axpy does not launch: CUDA_ERROR_INVALID_VALUE, the driver's words "
        "(grid (5, 2, 1), block (256, 1, 1), 1024 bytes of shared memory of at most 232192, 40 registers, "
        "cuda:3)"
    )


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_thread_without_the_context_launches_all_the_same(
    gpu: FakeGpu, binary: nvrtc.Binary, programmatic: bool
) -> None:
    function = Function(axpy(), 3, binary)
    gpu.needs_context = True
    function.launch(GRID, BLOCK, 0, 0, ARGUMENTS, programmatic)
    assert len(gpu.launches) == 1 and gpu.driver.context == 0


def test_threads_do_not_share_parameter_memory(gpu: FakeGpu, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    addresses: dict[str, int] = {}
    together = threading.Barrier(2)

    def record(name: str) -> None:
        addresses[name] = function._threads.memory.arguments
        together.wait()

    threads = [threading.Thread(target=record, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert addresses["one"] != addresses["two"]


def test_threads_launch_their_own_arguments(gpu: FakeGpu, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    together = threading.Barrier(2)

    def work(number: int) -> None:
        together.wait()
        for repeat in range(500):
            function.launch((number, 1, 1), BLOCK, 0, number, (number, repeat, number, 1.0), number == 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.launches) == 1000
    for number in (1, 2):
        mine = [launch for launch in gpu.launches if launch.stream == number]
        values = [tuple(launch.arguments.values()) for launch in mine]
        assert values == [(number, repeat, number, 1.0) for repeat in range(500)]
        assert {(launch.grid[0], launch.programmatic) for launch in mine} == {(number, number == 2)}


def test_get_on_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    with pytest.raises(UnsupportedError, match="torch sees no CUDA device"):
        get(axpy(), 0)
    with pytest.raises(UnsupportedError, match="runs on a CUDA device, not on cpu"):
        get(axpy(), torch.device("cpu"))


def test_get_loads_once_for_each_device(gpu: FakeGpu, binary: nvrtc.Binary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.build, "obtain", lambda source, arch: binary if arch == "sm_90a" else None)
    function = get(axpy(), torch.device("cuda", 0))
    assert get(axpy(), 0) is function and get(axpy(), torch.device("cuda")) is function
    assert len(gpu.images) == 1
    assert get(axpy(), 3) is not function and len(gpu.images) == 2
    with pytest.raises(UnsupportedError, match="there is no cuda:4, torch sees 4 devices"):
        get(axpy(), 4)
