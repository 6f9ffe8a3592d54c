"""How does the copy engine see a matrix? Tensor maps, encoded by the driver and kept for matrices seen again.

CUDA Driver API 13.0, "Tensor Map Object Management".
"""

from __future__ import annotations

import ctypes
import functools

from tersor.errors import KernelError

BYTES = 128


@functools.lru_cache(maxsize=4096)
def rows_of_16_bit(address: int, rows: int, columns: int, stride: int, bf16: bool, box_rows: int) -> bytes:
    """Return the map of a 16-bit float matrix, read in boxes of `box_rows` x 64 under a 128-byte swizzle.

    Args:
        address: device address of the first element, a multiple of 16.
        rows, columns: sizes; what a box covers beyond them is zero.
        stride: elements from one row to the next, a multiple of 8.
        bf16: bfloat16 elements, else float16.
        box_rows: rows of a box, at most 256.

    Raises:
        KernelError: the driver refuses the sizes.
    """
    from cuda.bindings import driver

    kind = driver.CUtensorMapDataType
    status, encoded = driver.cuTensorMapEncodeTiled(
        kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if bf16 else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        address,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(stride * 2)],
        [driver.cuuint32_t(64), driver.cuuint32_t(box_rows)],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status):
        raise KernelError(
            f"no tensor map for [{rows}, {columns}] with {stride} elements a row at {address:#x}: {status.name}"
        )
    return ctypes.string_at(encoded.getPtr(), BYTES)
