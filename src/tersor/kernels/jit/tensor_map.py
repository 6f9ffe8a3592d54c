"""How does the copy engine see a matrix? Tensor maps, encoded by the driver and kept for matrices seen again.

CUDA Driver API 13.0, "Tensor Map Object Management".
"""

from __future__ import annotations

import functools

from tersor.errors import KernelError
from tersor.kernels.jit import native

BYTE, FLOAT16, BFLOAT16 = 0, 6, 9
"""Element types: values of CUtensorMapDataType (UINT8, FLOAT16, BFLOAT16)."""


def element(bf16: bool, bytewise: bool = False) -> int:
    """Return the element type of activations: bytes, or 16-bit floats of one kind or the other."""
    return BYTE if bytewise else BFLOAT16 if bf16 else FLOAT16


@functools.lru_cache(maxsize=4096)
def rows(address: int, rows: int, columns: int, stride: int, element: int, box_rows: int) -> bytes:
    """Return the map of a matrix, read in boxes of `box_rows` x 128 bytes under a 128-byte swizzle.

    Args:
        address: device address of the first element, a multiple of 16.
        rows, columns: sizes; what a box covers beyond them is zero.
        stride: elements from one row to the next, whole multiples of 16 bytes.
        element: type of the elements.
        box_rows: rows of a box, at most 256.

    Raises:
        KernelError: the driver refuses the sizes.
    """
    status, encoded = native.encode_rows(address, rows, columns, stride, element, box_rows)
    if status:
        raise KernelError(
            f"no tensor map for [{rows}, {columns}] with {stride} elements a row at {address:#x}: CUDA error {status}"
        )
    return encoded
