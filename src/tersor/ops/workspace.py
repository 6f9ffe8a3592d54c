"""Device memory that kernels borrow: parts of split sums and the counters of who has arrived.

Launches on one stream follow each other, so they may share; each stream has its own. A launch under capture takes its
parts from the graph's own memory, and its counters from a stock of which each stream of each graph gets its own. Every
launch leaves its counters at zero.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch

from tersor.errors import KernelError
from tersor.ops import current
from tersor.ops.capture import outside

_LEAST_BYTES = 8 << 20
_STOCK_COUNTERS = 1 << 16
_LEAST_COUNTERS = 1 << 10


class Workspace:
    """Memory for split sums with an owner, who may give it back; safe in any number of threads.

    An engine makes one, runs its linears in `ops.using(workspace=...)` and closes it when it stops. Who makes none
    shares the process's (`SHARED`), which stays for good: at least 8 MB a stream that has run a split product.
    """

    def __init__(self) -> None:
        """Make a workspace that holds nothing yet."""
        self._streams: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        """(device, stream) -> floats and counters, then their addresses."""
        self._captures: dict[tuple[int, int, int], tuple[int, int]] = {}
        """(device, stream, capture) -> counters and their address."""
        self._stock: dict[int, tuple[int, int]] = {}
        """Device -> counters that no graph has yet, and their address."""
        self._reserved: list[tuple[int, int, int]] = []
        """(device, address, bytes) of all memory taken."""
        self._closed = False
        self._guard = threading.Lock()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return sum(nbytes for _, _, nbytes in self._reserved)

    def close(self) -> None:
        """Wait for the devices, then give all memory back; idempotent.

        CUDA graphs that were captured with this workspace must not be replayed afterwards: their counters are gone.

        Raises:
            ValueError: the process's workspace, whose users nobody knows, cannot be closed.
        """
        from tersor.kernels.jit import memory

        if self is SHARED:
            raise ValueError("the workspace that a process shares is never closed: give calls one of their own")
        with self._guard:
            reserved, self._reserved, self._closed = self._reserved, [], True
            self._streams.clear()
            self._captures.clear()
            self._stock.clear()

        def let_go() -> None:
            for index in {index for index, _, _ in reserved}:
                torch.cuda.synchronize(index)
            for index, address, _ in reserved:
                memory.release(address, index)

        outside(let_go)

    def split_sums(self, index: int, stream: int, floats: int, counters: int) -> tuple[int, int, torch.Tensor | None]:
        """Return addresses of at least `floats` float32 and `counters` zeroed uint32 for launches on `stream`.

        Args:
            index: the CUDA device, current.
            stream: handle of its current stream.
            floats: float32 elements for parts; their content is undefined.
            counters: uint32 elements that are zero between launches.

        Returns:
            Both addresses, and what has to live until the launch is under way.

        Raises:
            KernelError: the device has no memory left, or the workspace is closed.
        """
        if current.capturing():
            parts = torch.empty(floats, dtype=torch.float32, device=torch.device("cuda", index))
            return parts.data_ptr(), self._counters_of_capture(index, stream, counters), parts
        held = self._streams.get((index, stream))
        if held is None or held[0] < floats or held[1] < counters:
            held = self._enlarge(index, stream, floats, counters)
        return held[2], held[3], None

    def _enlarge(self, index: int, stream: int, floats: int, counters: int) -> tuple[int, int, int, int]:
        """Take more memory, twice as much as before at least: a launch may still be using what was taken before."""
        with self._guard:
            held = self._streams.get((index, stream), (0, 0, 0, 0))
            if held[0] < floats or held[1] < counters:
                counters = max(counters, 2 * held[1], _LEAST_COUNTERS)
                floats = max(floats, 2 * held[0], _LEAST_BYTES // 4)
                address = self._reserve(4 * (counters + floats), index)
                held = self._streams[index, stream] = (floats, counters, address, address + 4 * floats)
        return held

    def _counters_of_capture(self, index: int, stream: int, counters: int) -> int:
        key = (index, stream, _capture_id(stream))
        with self._guard:
            held = self._captures.get(key, (0, 0))
            if held[0] < counters:
                wanted = max(counters, _LEAST_COUNTERS)
                left, address = self._stock.get(index, (0, 0))
                if left < wanted:
                    left = max(wanted, _STOCK_COUNTERS)
                    address = self._reserve(4 * left, index)
                self._stock[index] = (left - wanted, address + 4 * wanted)
                held = self._captures[key] = (wanted, address)
        return held[1]

    def _reserve(self, nbytes: int, index: int) -> int:
        from tersor.kernels.jit import memory

        if self._closed:
            raise KernelError("a split product was asked for in a workspace that is closed: make another one")
        address = memory.reserve(nbytes, index)
        self._reserved.append((index, address, nbytes))
        return address


SHARED = Workspace()
"""The workspace of whoever has none of their own; never given back."""


def _capture_id(stream: int) -> int:
    from cuda.bindings import driver

    result = driver.cuStreamGetCaptureInfo(stream)
    return int(result[2])
