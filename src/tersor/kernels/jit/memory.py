"""How does a kernel get memory that outlives every call? From the driver: torch's pools never see it.

A block of torch's would lie in whatever pool is in use at the first call, such as a CUDA graph's, which owns it.
"""

from __future__ import annotations

from typing import Any

from tersor.errors import KernelError
from tersor.kernels.jit import module


def reserve(nbytes: int, index: int) -> int:
    """Return the address of zeroed device memory that is never freed; may be called while a graph is captured.

    Args:
        nbytes: at least 1.
        index: the CUDA device.

    Raises:
        KernelError: the device has no such memory left.
        UnsupportedError: cuda-bindings is missing.
    """
    driver = module.load_driver()

    def call(function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if int(status):
            what = module.describe(driver, status)
            raise KernelError(f"cuda:{index} gives no {nbytes} bytes for the sums of split products: {what}")
        return values[0] if values else None

    with module.capture_relaxed(driver):
        call(driver.cuCtxPushCurrent, call(driver.cuDevicePrimaryCtxRetain, call(driver.cuDeviceGet, index)))
        try:
            address = call(driver.cuMemAlloc, nbytes)
            stream = call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            call(driver.cuMemsetD8Async, address, 0, nbytes, stream)
            call(driver.cuStreamSynchronize, stream)
            call(driver.cuStreamDestroy, stream)
        finally:
            call(driver.cuCtxPopCurrent)
    return int(address)
