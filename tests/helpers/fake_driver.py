"""The part of the CUDA driver that Tersor uses, as cuda-bindings shows it, without a device behind it."""

from __future__ import annotations

import enum
import threading
from types import SimpleNamespace
from typing import Protocol

from tersor.hardware import Chip

STATIC_BYTES = 256
"""Static shared memory of every function that is loaded, as `FakeDriver` says."""


class Status(enum.IntEnum):
    """Answers of the driver, as in cuda.h."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_UNKNOWN = 999


class _FunctionAttribute(enum.IntEnum):
    CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES = 0
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CU_FUNC_ATTRIBUTE_NUM_REGS = 40
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = STATIC_BYTES


class Gpu(Protocol):
    """What stands behind the driver: `fakes.FakeGpu`."""

    images: list[bytes]
    memory: dict[int, tuple[int, int]]
    dynamic_limit: int

    def chip_of(self, index: int) -> Chip: ...

    def handle_of(self, name: str, device: int) -> int: ...

    def allocate(self, nbytes: int, device: int) -> tuple[Status, int]: ...


class FakeDriver:
    """Answers what cuda-bindings would; contexts and capture modes are those of a thread, as in CUDA.

    A module loads only where its device's context is current and capture is relaxed, as torch needs it.
    """

    CUresult = Status
    CUfunction_attribute = _FunctionAttribute
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="optin")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, gpu: Gpu) -> None:
        self.failure = ""
        """What went wrong inside the fake: the text of CUDA_ERROR_UNKNOWN."""
        self._gpu = gpu
        self._local = threading.local()

    @property
    def context(self) -> int:
        """The context that is current in this thread: 1000 and the device's index, or 0."""
        contexts = self._contexts
        return contexts[-1] if contexts else 0

    @property
    def capture_mode(self) -> str:
        """What this thread may do while somebody captures."""
        mode: str = getattr(self._local, "capture_mode", "global")
        return mode

    @property
    def _contexts(self) -> list[int]:
        if not hasattr(self._local, "contexts"):
            self._local.contexts = []
        contexts: list[int] = self._local.contexts
        return contexts

    def cuInit(self, flags: int) -> tuple[Status]:
        return (Status.CUDA_SUCCESS,)

    def cuDeviceGet(self, index: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, index

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Status, int]:
        assert attribute == "optin"
        return Status.CUDA_SUCCESS, self._gpu.chip_of(device).shared_bytes

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, 1000 + device

    def cuCtxPushCurrent(self, context: int) -> tuple[Status]:
        self._contexts.append(context)
        return (Status.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self._contexts.pop()

    def cuCtxGetCurrent(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self.context

    def cuThreadExchangeStreamCaptureMode(self, mode: str) -> tuple[Status, str]:
        before, self._local.capture_mode = self.capture_mode, mode
        return Status.CUDA_SUCCESS, before

    def cuModuleLoadData(self, image: bytes) -> tuple[Status, bytes]:
        assert self.context and self.capture_mode == "relaxed"
        self._gpu.images.append(image)
        return Status.CUDA_SUCCESS, image

    def cuModuleGetFunction(self, loaded: bytes, name: bytes) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self._gpu.handle_of(name.decode(), self.context - 1000)

    def cuFuncGetAttribute(self, attribute: int, function: int) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, int(attribute)

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[Status]:
        assert attribute == _FunctionAttribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._gpu.dynamic_limit = value
        return (Status.CUDA_SUCCESS,)

    def cuGetErrorName(self, status: Status) -> tuple[Status, bytes]:
        return Status.CUDA_SUCCESS, Status(status).name.encode()

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes]:
        unknown = status == Status.CUDA_ERROR_UNKNOWN
        return Status.CUDA_SUCCESS, self.failure.encode() if unknown else b"the driver's words"

    def cuMemAlloc(self, nbytes: int) -> tuple[Status, int]:
        assert self.context
        return self._gpu.allocate(nbytes, self.context - 1000)

    def cuMemFree(self, address: int) -> tuple[Status]:
        del self._gpu.memory[address]
        return (Status.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: str) -> tuple[Status]:
        assert (value, self._gpu.memory[address][1]) == (0, nbytes)
        return (Status.CUDA_SUCCESS,)

    def cuStreamCreate(self, flags: int) -> tuple[Status, str]:
        return Status.CUDA_SUCCESS, "a stream"

    def cuStreamSynchronize(self, stream: str) -> tuple[Status]:
        return (Status.CUDA_SUCCESS,)

    def cuStreamDestroy(self, stream: str) -> tuple[Status]:
        return (Status.CUDA_SUCCESS,)
