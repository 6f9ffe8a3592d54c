"""How is a kernel loaded and launched? Through the CUDA driver, in the context torch uses.

A launch packs Python numbers into a buffer that the thread keeps for the kernel, and calls the driver once.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tersor.errors import KernelError, UnsupportedError
from tersor.kernels.jit import build, nvrtc
from tersor.kernels.jit.report import Resources
from tersor.kernels.jit.source import KernelSource

if TYPE_CHECKING:
    import torch

_Dim: TypeAlias = tuple[int, int, int]

_functions: dict[tuple[KernelSource, int], Function] = {}
_loading = threading.Lock()


class _Buffers(threading.local):
    """Parameter memory of one kernel for one thread: the values, their addresses, a launch configuration."""

    def __init__(self, source: KernelSource) -> None:
        self.values = ctypes.create_string_buffer(source.layout.size)
        start = ctypes.addressof(self.values)
        offsets = source.offsets
        self._array = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self.parameters = ctypes.addressof(self._array)
        self.config: Any = None


class Function:
    """A kernel loaded on one GPU. Safe to launch from several threads.

    Attributes:
        source: what it was compiled from.
        index: the CUDA device.
        resources: registers, local and shared memory as the driver reports them, spills as the compiler did.
        max_shared_bytes: dynamic shared memory a launch may ask for.
    """

    def __init__(self, source: KernelSource, index: int, binary: nvrtc.Binary) -> None:
        self.source = source
        self.index = index
        self._driver = driver = _driver()
        device = _device(source, index)
        self._pack = source.layout.pack_into
        self._buffers = _Buffers(source)
        self._success = driver.CUresult.CUDA_SUCCESS
        self._context = _call(source, "context", driver.cuDevicePrimaryCtxRetain, device)
        attribute = driver.CUfunction_attribute
        with _current(driver, source, self._context), _capture_relaxed(driver):
            self._module = _call(source, "load", driver.cuModuleLoadData, binary.data)
            symbol = source.name.encode()
            self._handle = _call(source, "find", driver.cuModuleGetFunction, self._module, symbol)

            def get(name: str) -> int:
                wanted = getattr(attribute, name)
                return _call(source, "attribute", driver.cuFuncGetAttribute, wanted, self._handle)

            static_bytes = get("CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES")
            self.resources = Resources(
                registers=get("CU_FUNC_ATTRIBUTE_NUM_REGS"),
                local_bytes=get("CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES"),
                static_shared_bytes=static_bytes,
                **_compiler_report(binary),
            )
            limit = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            self.max_shared_bytes = _call(source, "device", driver.cuDeviceGetAttribute, limit, device) - static_bytes
            dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(source, "attribute", driver.cuFuncSetAttribute, self._handle, dynamic, self.max_shared_bytes)

    def __repr__(self) -> str:
        return f"Function({self.source.name}, cuda:{self.index}, {self.resources.registers} registers)"

    def launch(
        self,
        grid: _Dim,
        block: _Dim,
        shared_bytes: int,
        stream: int,
        args: Sequence[int | float | bytes],
        programmatic: bool = False,
    ) -> None:
        """Launch on a stream; returns as soon as the driver has taken the launch.

        Args:
            grid, block: blocks and threads, (x, y, z).
            shared_bytes: dynamic shared memory of a block.
            stream: handle of the stream (`torch.cuda.Stream.cuda_stream`); 0 is the default stream.
            args: one value an argument of `source.arguments`; pointers as integers, 0 for null, tensor maps as
                bytes.
            programmatic: the kernel may start before the one ahead of it in the stream has ended
                (programmatic dependent launch): it must itself wait before it reads what that one writes.

        Raises:
            KernelError: the arguments do not fit, or the driver refuses the launch.
        """
        buffers = self._buffers
        try:
            self._pack(buffers.values, 0, *args)
        except struct.error as error:
            raise KernelError(
                f"kernel {self.source.name}: {len(args)} arguments {tuple(args)} do not fit "
                f"{self.source.arguments!r}: {error}"
            ) from None
        if programmatic:
            status = self._launch_programmatic(grid, block, shared_bytes, stream)
        else:
            (status,) = self._driver.cuLaunchKernel(
                self._handle, *grid, *block, shared_bytes, stream, buffers.parameters, 0
            )
        if status != self._success:
            self._recover(status, grid, block, shared_bytes, stream, programmatic)

    def _launch_programmatic(self, grid: _Dim, block: _Dim, shared_bytes: int, stream: int) -> Any:
        driver, buffers = self._driver, self._buffers
        if buffers.config is None:
            buffers.config = _programmatic_config(driver)
        config = buffers.config
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_bytes
        config.hStream = stream
        (status,) = driver.cuLaunchKernelEx(config, self._handle, buffers.parameters, 0)
        return status

    def _recover(
        self, status: Any, grid: _Dim, block: _Dim, shared_bytes: int, stream: int, programmatic: bool
    ) -> None:
        """Launch again in the kernel's own context where this thread had another or none, or raise."""
        driver = self._driver
        wrong = (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, driver.CUresult.CUDA_ERROR_INVALID_HANDLE)
        current = _call(self.source, "context", driver.cuCtxGetCurrent)
        if status in wrong and int(current) != int(self._context):
            with _current(driver, self.source, self._context):
                if programmatic:
                    status = self._launch_programmatic(grid, block, shared_bytes, stream)
                else:
                    (status,) = driver.cuLaunchKernel(
                        self._handle, *grid, *block, shared_bytes, stream, self._buffers.parameters, 0
                    )
        if status != self._success:
            raise KernelError(
                f"kernel {self.source.name} does not launch: {_describe(driver, status)} "
                f"(grid {tuple(grid)}, block {tuple(block)}, {shared_bytes} bytes of shared memory of at "
                f"most {self.max_shared_bytes}, {self.resources.registers} registers, cuda:{self.index})"
            )


def get(source: KernelSource, device: torch.device | int) -> Function:
    """Return the kernel loaded on a GPU: compiled at most once, loaded once a process and GPU.

    Args:
        source: the kernel.
        device: a CUDA device or its index; a device without index is the current one.

    Raises:
        CompileError, KernelError: it does not compile or load.
        UnsupportedError: no GPU, a GPU that is too old, or cuda-bindings or NVRTC missing.
    """
    index = device if isinstance(device, int) else device.index
    function = _functions.get((source, index)) if index is not None else None
    return function if function is not None else _load(source, device)


def _load(source: KernelSource, device: torch.device | int) -> Function:
    import torch

    if not isinstance(device, int) and device.type != "cuda":
        raise UnsupportedError(f"kernel {source.name} runs on a CUDA device, not on {device}")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"kernel {source.name}: torch sees no CUDA device")
    index = device if isinstance(device, int) else device.index
    if index is None:
        index = torch.cuda.current_device()
    if not 0 <= index < torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UnsupportedError(f"kernel {source.name}: there is no cuda:{index}, torch sees {count} devices")
    arch = nvrtc.arch_for(torch.cuda.get_device_capability(index))
    binary = build.obtain(source, arch)
    with _loading:
        function = _functions.get((source, index))
        if function is None:
            function = _functions[source, index] = Function(source, index, binary)
    return function


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(
            f"cuda-bindings is missing, so no kernel can be launched ({error}): {nvrtc.INSTALL}"
        ) from None
    return driver


def _device(source: KernelSource, index: int) -> Any:
    driver = _driver()
    _call(source, "initialise CUDA", driver.cuInit, 0)
    return _call(source, "find device", driver.cuDeviceGet, index)


def _call(source: KernelSource, step: str, function: Any, *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if int(status):
        raise KernelError(f"kernel {source.name} does not load ({step}): {_describe(_driver(), status)}")
    return values[0] if values else None


def _describe(driver: Any, status: Any) -> str:
    _, name = driver.cuGetErrorName(status)
    _, text = driver.cuGetErrorString(status)
    return f"{(name or b'unknown error').decode()}, {(text or b'no description').decode()}"


def _compiler_report(binary: nvrtc.Binary) -> dict[str, Any]:
    compiled = binary.resources
    if compiled is None:
        return {}
    return {
        "spill_store_bytes": compiled.spill_store_bytes,
        "spill_load_bytes": compiled.spill_load_bytes,
        "barriers": compiled.barriers,
        "warnings": compiled.warnings,
    }


def _programmatic_config(driver: Any) -> Any:
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    config = driver.CUlaunchConfig()
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


@contextlib.contextmanager
def _current(driver: Any, source: KernelSource, context: Any) -> Iterator[None]:
    _call(source, "context", driver.cuCtxPushCurrent, context)
    try:
        yield
    finally:
        _call(source, "context", driver.cuCtxPopCurrent)


@contextlib.contextmanager
def _capture_relaxed(driver: Any) -> Iterator[None]:
    """Let this thread load modules while it, or another, captures a CUDA graph."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
