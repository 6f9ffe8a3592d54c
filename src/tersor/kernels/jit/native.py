"""How is the driver called where microseconds count? Through ctypes, with memory that a thread keeps.

Structures and numbers are those of cuda.h, CUDA Driver API 13.0, on a 64-bit host.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

from tersor.errors import UnsupportedError
from tersor.kernels.jit.source import KernelSource

LIBRARY = "libcuda.so.1"

_CONFIG = "@7IPPI4x"
"""CUlaunchConfig: grid, block, shared bytes; stream; address of the attributes; how many."""
_ATTRIBUTE = "@i4x3I52x"
"""CUlaunchAttribute: which one, then a union of 64 bytes, of which at most three numbers are used."""
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_SERIALIZATION = 6

_MAP_BYTES = 128
_MAP_ALIGNMENT = 64
_MAP_SIZES = struct.Struct("@3Q4I")
"""What a map is encoded from: columns and rows, bytes from row to row, box columns and rows, steps."""
_NO_INTERLEAVE = 0
_SWIZZLE_128B = 3
_PROMOTE_TO_256B = 3
_ZERO_BEYOND = 0

_ARGUMENTS = {
    "cuLaunchKernelEx": (ctypes.c_void_p,) * 4,
    "cuTensorMapEncodeTiled": (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        *(ctypes.c_void_p,) * 5,
        *(ctypes.c_int,) * 4,
    ),
}


class LaunchMemory:
    """What one thread hands to the driver to launch one kernel.

    One buffer holds the configuration and the arguments, which `pack` writes at one go, the addresses of the
    arguments, and two attributes: cluster dimension, then programmatic serialization. A launch names either or both.

    Attributes:
        pack: writes grid, block, shared bytes, stream, address and number of attributes, then the arguments.
        buffer: what it writes into, from 0 on.
        config, arguments: addresses of the configuration, and of the addresses of the arguments.
        clustered, serialized: addresses of the two attributes.
    """

    __slots__ = ("_cluster", "arguments", "buffer", "clustered", "config", "pack", "serialized")

    def __init__(self, source: KernelSource) -> None:
        packed = struct.Struct(_CONFIG + source.layout.format.lstrip("@"))
        offsets = source.offsets
        pointers = -(-packed.size // 8) * 8
        clustered = pointers + 8 * len(offsets)
        serialized = clustered + struct.calcsize(_ATTRIBUTE)
        self.pack = packed.pack_into
        self.buffer = bytearray(serialized + struct.calcsize(_ATTRIBUTE))
        start = ctypes.addressof((ctypes.c_char * len(self.buffer)).from_buffer(self.buffer))
        values = start + struct.calcsize(_CONFIG)
        struct.pack_into(f"@{len(offsets)}P", self.buffer, pointers, *(values + offset for offset in offsets))
        struct.pack_into(_ATTRIBUTE, self.buffer, serialized, _PROGRAMMATIC_SERIALIZATION, 1, 0, 0)
        self.config = start
        self.arguments = start + pointers
        self.clustered = start + clustered
        self.serialized = start + serialized
        self._cluster: tuple[int, int, int] | None = None

    def set_cluster(self, cluster: tuple[int, int, int]) -> None:
        """Write how many blocks make a cluster, (x, y, z), into the first attribute."""
        if cluster != self._cluster:
            struct.pack_into(_ATTRIBUTE, self.buffer, self.clustered - self.config, _CLUSTER_DIMENSION, *cluster)
            self._cluster = cluster


class PerThread(threading.local):
    """The memory of the current thread for one kernel, as `memory`: made when a thread first asks."""

    def __init__(self, source: KernelSource) -> None:
        self.memory = LaunchMemory(source)


@functools.cache
def function(name: str) -> Any:
    """Return a function of the driver: takes addresses and integers, returns a status.

    Raises:
        UnsupportedError: the driver's library is missing or too old.
    """
    try:
        found = getattr(ctypes.CDLL(LIBRARY), name)
    except (OSError, AttributeError) as error:
        raise UnsupportedError(
            f"no kernel can be launched ({error}): install NVIDIA's driver, version 525 or newer"
        ) from None
    found.argtypes = _ARGUMENTS[name]
    found.restype = ctypes.c_int
    return found


class _MapMemory(threading.local):
    """Room for one map and what it is encoded from."""

    def __init__(self) -> None:
        self.buffer = bytearray(_MAP_ALIGNMENT + _MAP_BYTES + _MAP_SIZES.size)
        start = ctypes.addressof((ctypes.c_char * len(self.buffer)).from_buffer(self.buffer))
        self.map = -start % _MAP_ALIGNMENT
        self.sizes = self.map + _MAP_BYTES
        self.start = start


_maps = _MapMemory()


def encode_rows(address: int, rows: int, columns: int, stride: int, element: int, box_rows: int) -> tuple[int, bytes]:
    """Return the driver's status and the map for `tensor_map.rows`.

    Raises:
        UnsupportedError: the driver's library is missing or too old.
    """
    buffer, place = _maps.buffer, _maps.map
    width = 1 if element == 0 else 2
    _MAP_SIZES.pack_into(buffer, _maps.sizes, columns, rows, stride * width, 128 // width, box_rows, 1, 1)
    sizes = _maps.start + _maps.sizes
    status = function("cuTensorMapEncodeTiled")(
        _maps.start + place,
        element,
        2,
        address,
        sizes,
        sizes + 16,
        sizes + 24,
        sizes + 32,
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_TO_256B,
        _ZERO_BEYOND,
    )
    return status, bytes(buffer[place : place + _MAP_BYTES])
