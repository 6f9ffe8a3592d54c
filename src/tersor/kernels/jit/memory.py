"""How does a kernel get memory that outlives every call? From the driver: torch's pools never see it.

A block of torch's would lie in whatever pool is in use at the first call, such as a CUDA graph's, which owns it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tersor.errors import KernelError
from tersor.kernels.jit import module


def reserve(nbytes: int, index: int) -> int:
    """Return the address of zeroed device memory that stays until `release`; may be called while a graph is captured.

    Args:
        nbytes: at least 1.
        index: the CUDA device.

    Raises:
        KernelError: the device has no such memory left.
        UnsupportedError: cuda-bindings is missing.
    """
    with _device(index, f"gives no {nbytes} bytes for the sums of split products") as (driver, call):
        address = call(driver.cuMemAlloc, nbytes)
        stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        call(driver.cuMemsetD8Async, address, 0, nbytes, stream)
        call(driver.cuStreamSynchronize, stream)
        call(driver.cuStreamDestroy, stream)
    return int(address)


def release(address: int, index: int) -> None:
    """Give memory from `reserve` back; nothing may use it any more.

    Raises:
        KernelError: the driver does not take it back.
    """
    with _device(index, "does not take back the memory of split sums") as (driver, call):
        call(driver.cuMemFree, address)


@contextlib.contextmanager
def _device(index: int, problem: str) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """Make a device's context current; yield the driver and what calls it. A failure's message holds `problem`."""
    driver = module.load_driver()

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status):
            raise KernelError(f"cuda:{index} {problem}: {module.describe(driver, status)}")
        return values[0] if values else None

    with module.capture_relaxed(driver):
        call(driver.cuCtxPushCurrent, call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, index)))
        try:
            yield driver, call
        finally:
            call(driver.cuCtxPopCurrent)
