"""Loading and launching, against a driver that only remembers: what is passed, refused and said."""

from __future__ import annotations

import ctypes
import enum
import struct
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.jit_kernels import axpy

from tersor.errors import KernelError, UnsupportedError
from tersor.kernels.jit import Function, get, module, native, nvrtc, tensor_map

HANDLE = 2**46 + 16


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400


class Attribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 256
    CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 0
    CU_FUNC_ATTRIBUTE_NUM_REGS = 40
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class Driver:
    """The part of the CUDA driver that a function uses; attributes answer with their own number."""

    CUresult = Status
    CUfunction_attribute = Attribute
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=232448)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")

    def __init__(self) -> None:
        self.current = 0
        self.capture_modes: list[str] = []
        self.needs_context = False
        self.refuses = Status.CUDA_SUCCESS
        self.launches: list[tuple[Any, ...]] = []
        self.dynamic_limit = 0
        self.images: list[bytes] = []

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, index

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, attribute

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, 1000 + device

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.current = context
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        popped, self.current = self.current, 0
        return Status.CUDA_SUCCESS, popped

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, self.current

    def cuThreadExchangeStreamCaptureMode(self, mode: str) -> tuple[Any, ...]:
        self.capture_modes.append(mode)
        return Status.CUDA_SUCCESS, "before"

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:
        assert self.current == 1003 and self.capture_modes == ["relaxed"]
        self.images.append(image)
        return Status.CUDA_SUCCESS, "module"

    def cuModuleGetFunction(self, loaded: str, name: bytes) -> tuple[Any, ...]:
        assert (loaded, name) == ("module", b"tersor_test_axpy")
        return Status.CUDA_SUCCESS, HANDLE

    def cuFuncGetAttribute(self, attribute: int, function: int) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, int(attribute)

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[Any, ...]:
        self.dynamic_limit = value
        return (Status.CUDA_SUCCESS,)

    def cuGetErrorName(self, status: Status) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, Status(status).name.encode()

    def cuGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return Status.CUDA_SUCCESS, b"the driver's words"

    def cuLaunchKernelEx(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        assert function == HANDLE and extra is None
        if self.refuses:
            return self.refuses
        if self.needs_context and self.current != 1003:
            return Status.CUDA_ERROR_INVALID_CONTEXT
        shape = struct.unpack("<7I", ctypes.string_at(config, 28))
        stream, attributes, count = struct.unpack("<2QI", ctypes.string_at(config + 32, 20))
        found = []
        for start in range(attributes, attributes + 72 * count, 72):
            (kind,) = struct.unpack("<i", ctypes.string_at(start, 4))
            found.append((kind, *struct.unpack("<3I", ctypes.string_at(start + 8, 12))))
        addresses = (ctypes.c_void_p * 4).from_address(parameters)
        values = b"".join(
            ctypes.string_at(address, size) for address, size in zip(addresses, (8, 8, 8, 4), strict=True)
        )
        self.launches.append((shape, stream, struct.unpack("<QQqf", values), found))
        return Status.CUDA_SUCCESS


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(module, "load_driver", lambda: fake)
    address = ctypes.c_void_p
    launch = ctypes.CFUNCTYPE(ctypes.c_int, address, address, address, address)(fake.cuLaunchKernelEx)
    monkeypatch.setattr(native, "function", {"cuLaunchKernelEx": launch}.__getitem__)
    return fake


@pytest.fixture(scope="module")
def binary() -> nvrtc.Binary:
    return nvrtc.compile_source(axpy(), "sm_90a")


PROGRAMMATIC = (6, 1, 0, 0)
GRID, BLOCK = (5, 2, 1), (256, 1, 1)
ARGUMENTS = (2**47 + 8, 16, -3, 0.5)


def test_a_function_is_loaded_in_the_context_of_its_device(driver: Driver, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    assert driver.images == [binary.data]
    assert driver.current == 0 and driver.capture_modes == ["relaxed", "before"]
    assert function.max_shared_bytes == driver.dynamic_limit == 232448 - 256
    assert function.resources.registers == 40 and function.resources.spill_store_bytes == 0
    assert repr(function) == "Function(tersor_test_axpy, cuda:3, 40 registers)"


def test_a_launch_passes_every_number(driver: Driver, binary: nvrtc.Binary) -> None:
    function = Function(axpy(), 3, binary)
    function.launch(GRID, BLOCK, 1024, 2**47 + 77, ARGUMENTS)
    function.launch((1, 1, 1), BLOCK, 2048, 0, (0, 0, 1, 2))
    function.launch(GRID, BLOCK, 512, 78, ARGUMENTS, programmatic=True)
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS, cluster=(5, 2, 1))
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS, programmatic=True, cluster=(1, 2, 1))
    function.launch(GRID, BLOCK, 0, 78, ARGUMENTS)
    assert driver.launches == [
        ((5, 2, 1, 256, 1, 1, 1024), 2**47 + 77, ARGUMENTS, []),
        ((1, 1, 1, 256, 1, 1, 2048), 0, (0, 0, 1, 2.0), []),
        ((5, 2, 1, 256, 1, 1, 512), 78, ARGUMENTS, [PROGRAMMATIC]),
        ((5, 2, 1, 256, 1, 1, 0), 78, ARGUMENTS, [(4, 5, 2, 1)]),
        ((5, 2, 1, 256, 1, 1, 0), 78, ARGUMENTS, [(4, 1, 2, 1), PROGRAMMATIC]),
        ((5, 2, 1, 256, 1, 1, 0), 78, ARGUMENTS, []),
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
    assert native._FLOAT16 == kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    assert native._BFLOAT16 == kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert native._NO_INTERLEAVE == cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert native._SWIZZLE_128B == cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert native._PROMOTE_TO_256B == cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    assert native._ZERO_BEYOND == cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


def test_a_tensor_map_is_encoded_from_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def encode(place: int, kind: int, rank: int, address: int, *rest: Any) -> int:
        sizes, strides, box, steps, *modes = rest
        assert place % 64 == 0
        ctypes.memset(place, len(calls) + 1, 128)
        read = ((sizes, "<2Q", 16), (strides, "<Q", 8), (box, "<2I", 8), (steps, "<2I", 8))
        numbers = [struct.unpack(letters, ctypes.string_at(start, size)) for start, letters, size in read]
        calls.append((kind, rank, address, *numbers, *modes))
        return 0 if address else 1

    types = native._ARGUMENTS["cuTensorMapEncodeTiled"]
    encoder = ctypes.CFUNCTYPE(ctypes.c_int, *types)(encode)
    monkeypatch.setattr(native, "function", {"cuTensorMapEncodeTiled": encoder}.__getitem__)
    tensor_map.rows.cache_clear()
    first = tensor_map.rows(2**47, 5, 300, 304, tensor_map.BFLOAT16, 8)
    assert first == tensor_map.rows(2**47, 5, 300, 304, tensor_map.BFLOAT16, 8) == bytes([1]) * 128
    assert tensor_map.rows(2**47, 5, 300, 304, tensor_map.FLOAT16, 16) == bytes([2]) * 128
    ends = ((300, 5), (608,))
    assert calls == [
        (9, 2, 2**47, *ends, (64, 8), (1, 1), 0, 3, 3, 0),
        (6, 2, 2**47, *ends, (64, 16), (1, 1), 0, 3, 3, 0),
    ]
    with pytest.raises(KernelError, match=r"no tensor map for \[5, 300\] with 304 elements a row at 0x0: CUDA error 1"):
        tensor_map.rows(0, 5, 300, 304, tensor_map.FLOAT16, 16)
    tensor_map.rows.cache_clear()


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    native.function.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", "libcuda_of_nobody.so.1")
    with pytest.raises(UnsupportedError, match=r"no kernel can be launched \(libcuda_of_nobody.*\): install NVIDIA's"):
        native.function("cuLaunchKernelEx")


@pytest.mark.parametrize("grid", [(-1, 1, 1), (1, 2), (1.5, 1, 1)])
def test_a_grid_that_is_none_is_refused(driver: Driver, binary: nvrtc.Binary, grid: Any) -> None:
    function = Function(axpy(), 3, binary)
    with pytest.raises(KernelError, match=r"kernel tersor_test_axpy: grid \(.*\), block .* cannot be: "):
        function.launch(grid, BLOCK, 0, 0, ARGUMENTS)
    assert driver.launches == []


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
    driver: Driver, binary: nvrtc.Binary, arguments: tuple[Any, ...]
) -> None:
    function = Function(axpy(), 3, binary)
    with pytest.raises(KernelError, match=r"kernel tersor_test_axpy: \d arguments .* do not fit 'PPqf': "):
        function.launch(GRID, BLOCK, 0, 0, arguments)
    assert driver.launches == []


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_refused_launch_says_everything(driver: Driver, binary: nvrtc.Binary, programmatic: bool) -> None:
    function = Function(axpy(), 3, binary)
    driver.refuses = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError) as caught:
        function.launch(GRID, BLOCK, 1024, 0, ARGUMENTS, programmatic)
    assert str(caught.value) == (
        "kernel tersor_test_axpy does not launch: CUDA_ERROR_INVALID_VALUE, the driver's words "
        "(grid (5, 2, 1), block (256, 1, 1), 1024 bytes of shared memory of at most 232192, 40 registers, "
        "cuda:3)"
    )


@pytest.mark.parametrize("programmatic", [False, True])
def test_a_thread_without_the_context_launches_all_the_same(
    driver: Driver, binary: nvrtc.Binary, programmatic: bool
) -> None:
    function = Function(axpy(), 3, binary)
    driver.needs_context = True
    function.launch(GRID, BLOCK, 0, 0, ARGUMENTS, programmatic)
    assert len(driver.launches) == 1 and driver.current == 0


def test_threads_do_not_share_parameter_memory(driver: Driver, binary: nvrtc.Binary) -> None:
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


def test_threads_launch_their_own_arguments(driver: Driver, binary: nvrtc.Binary) -> None:
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
    assert len(driver.launches) == 1000
    for number in (1, 2):
        mine = [launch for launch in driver.launches if launch[1] == number]
        assert [launch[2] for launch in mine] == [(number, repeat, number, 1.0) for repeat in range(500)]
        assert {(launch[0][0], len(launch[3])) for launch in mine} == {(number, number - 1)}


def test_get_on_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="torch sees no CUDA device"):
        get(axpy(), 0)
    with pytest.raises(UnsupportedError, match="runs on a CUDA device, not on cpu"):
        get(axpy(), torch.device("cpu"))


def test_get_loads_once_for_each_device(driver: Driver, binary: nvrtc.Binary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_functions", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(module.build, "obtain", lambda source, arch: binary if arch == "sm_90a" else None)
    function = get(axpy(), torch.device("cuda", 3))
    assert get(axpy(), 3) is function and get(axpy(), torch.device("cuda")) is function
    assert len(driver.images) == 1
    with pytest.raises(UnsupportedError, match="there is no cuda:4, torch sees 4 devices"):
        get(axpy(), 4)
