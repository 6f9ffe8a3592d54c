"""How does the copy engine see a matrix? Tensor maps, encoded by the driver and kept for matrices seen again.

CUDA Driver API 13.0, "Tensor Map Object Management".
"""

from __future__ import annotations

import functools

from tersor.errors import KernelError
from tersor.kernels.jit import native


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
    status, encoded = native.encode_rows(address, rows, columns, stride, bf16, box_rows)
    if status:
        raise KernelError(
            f"no tensor map for [{rows}, {columns}] with {stride} elements a row at {address:#x}: CUDA error {status}"
        )
    return encoded
