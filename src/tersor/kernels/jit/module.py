"""How is a kernel loaded and launched? Through the CUDA driver, in the context torch uses.

Loading goes through cuda-bindings; a launch packs Python numbers into memory that the thread keeps for the kernel
(`native`), and calls the driver once.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tersor.errors import KernelError, UnsupportedError
from tersor.kernels.jit import build, native, nvrtc
from tersor.kernels.jit.report import Resources
from tersor.kernels.jit.source import KernelSource

if TYPE_CHECKING:
    import torch

_Dim: TypeAlias = tuple[int, int, int]

_functions: dict[tuple[KernelSource, int], Function] = {}
_loading = threading.Lock()


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
        self._driver = driver = load_driver()
        device = _device(source, index)
        self._threads = native.PerThread(source)
        self._launch = native.function("cuLaunchKernelEx")
        self._context = _call(source, "context", driver.cuDevicePrimaryCtxRetain, device)
        attribute = driver.CUfunction_attribute
        with _current(driver, source, self._context), capture_relaxed(driver):
            self._module = _call(source, "load", driver.cuModuleLoadData, binary.data)
            symbol = source.name.encode()
            handle = _call(source, "find", driver.cuModuleGetFunction, self._module, symbol)
            self._handle = int(handle)

            def get(name: str) -> int:
                wanted = getattr(attribute, name)
                return _call(source, "attribute", driver.cuFuncGetAttribute, wanted, handle)

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
            _call(source, "attribute", driver.cuFuncSetAttribute, handle, dynamic, self.max_shared_bytes)

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
        cluster: _Dim | None = None,
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
            cluster: blocks of a cluster, (x, y, z), which divide the grid; `None` for a grid without clusters.

        Raises:
            KernelError: the arguments do not fit, or the driver refuses the launch.
        """
        memory = self._threads.memory
        count: int
        try:
            if cluster is None:
                attributes, count = memory.serialized, programmatic
            else:
                memory.set_cluster(cluster)
                attributes, count = memory.clustered, 1 + programmatic
            memory.pack(memory.buffer, 0, *grid, *block, shared_bytes, stream, attributes, count, *args)
        except struct.error as error:
            raise self._misfit(_shape(grid, block, cluster), shared_bytes, args, error) from None
        status = self._launch(memory.config, self._handle, memory.arguments, None)
        if status:
            self._recover(status, _shape(grid, block, cluster), shared_bytes)

    def _misfit(
        self, shape: str, shared_bytes: int, args: Sequence[int | float | bytes], error: struct.error
    ) -> KernelError:
        """Say which part of a launch is no number of its type."""
        name, letters = self.source.name, self.source.arguments
        try:
            self.source.layout.pack(*args)
        except struct.error as wrong:
            return KernelError(f"kernel {name}: {len(args)} arguments {tuple(args)} do not fit {letters!r}: {wrong}")
        return KernelError(f"kernel {name}: {shape}, {shared_bytes} bytes of shared memory cannot be: {error}")

    def _recover(self, status: int, shape: str, shared_bytes: int) -> None:
        """Launch again in the kernel's own context where this thread had another or none, or raise."""
        driver, memory = self._driver, self._threads.memory
        wrong = (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT, driver.CUresult.CUDA_ERROR_INVALID_HANDLE)
        current = _call(self.source, "context", driver.cuCtxGetCurrent)
        if status in wrong and int(current) != int(self._context):
            with _current(driver, self.source, self._context):
                status = self._launch(memory.config, self._handle, memory.arguments, None)
        if status:
            raise KernelError(
                f"kernel {self.source.name} does not launch: {describe(driver, driver.CUresult(status))} "
                f"({shape}, {shared_bytes} bytes of shared memory of at "
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


def load_driver() -> Any:
    """Return the driver as cuda-bindings shows it.

    Raises:
        UnsupportedError: cuda-bindings is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(
            f"cuda-bindings is missing, so no kernel can be launched ({error}): {nvrtc.INSTALL}"
        ) from None
    return driver


def _device(source: KernelSource, index: int) -> Any:
    driver = load_driver()
    _call(source, "initialise CUDA", driver.cuInit, 0)
    return _call(source, "find device", driver.cuDeviceGet, index)


def _call(source: KernelSource, step: str, function: Any, *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if int(status):
        raise KernelError(f"kernel {source.name} does not load ({step}): {describe(load_driver(), status)}")
    return values[0] if values else None


def describe(driver: Any, status: Any) -> str:
    """Return the name and the text of a status of the driver."""
    _, name = driver.cuGetErrorName(status)
    _, text = driver.cuGetErrorString(status)
    return f"{(name or b'unknown error').decode()}, {(text or b'no description').decode()}"


def _shape(grid: _Dim, block: _Dim, cluster: _Dim | None) -> str:
    clusters = "" if cluster is None else f", clusters of {tuple(cluster)}"
    return f"grid {tuple(grid)}, block {tuple(block)}{clusters}"


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


@contextlib.contextmanager
def _current(driver: Any, source: KernelSource, context: Any) -> Iterator[None]:
    _call(source, "context", driver.cuCtxPushCurrent, context)
    try:
        yield
    finally:
        _call(source, "context", driver.cuCtxPopCurrent)


@contextlib.contextmanager
def capture_relaxed(driver: Any) -> Iterator[None]:
    """Let this thread load modules and take memory while it, or another, captures a CUDA graph."""
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    _, before = driver.cuThreadExchangeStreamCaptureMode(relaxed)
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)
