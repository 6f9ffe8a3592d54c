"""How do GPUs of one machine add up little? Each reads what all others have, in one trip instead of a ring's many.

The buffers are symmetric memory of torch, mapped by all peers; no multicast is used. What such a sum costs is a trip
over NVLink and the bytes of all peers, so it is for decode steps: at most 1 MB a rank. NCCL has the rest.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from tersor.errors import KernelError
from tersor.kernels import jit, small
from tersor.ops import current, dispatch
from tersor.ops.norm import launched_early

_TARGETS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def reachable(rank: int, count: int, first: int = 0) -> bool:
    """Tell whether kernels serve a rank's GPU, and it can read the memory of all others on this machine.

    Args:
        rank, count: which of how many.
        first: GPU of the first; those of the others follow it.
    """
    peers = (first + peer for peer in range(count) if peer != rank)
    return (
        1 < count <= small.MOST_RANKS
        and 0 <= first <= torch.cuda.device_count() - count  # else some are on another machine
        and dispatch.kernel_chip(torch.device("cuda", first + rank)) is not None
        and all(torch.cuda.can_device_access_peer(first + rank, peer) for peer in peers)
    )


class OneShot:
    """Adds up small tensors of all ranks, in CUDA graphs too; all ranks call it in the same order."""

    def __init__(self, group: ProcessGroup, device: torch.device, rank: int, count: int) -> None:
        """Map the buffers of all ranks; all of them do so at once.

        Args:
            group: of the ranks' GPUs.
            device: of this one.
            rank, count: which of how many.

        Raises:
            KernelError: the buffers are not where they were said to be.
        """
        from torch.distributed import _symmetric_memory

        self._device, self._rank, self._count = device, rank, count
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._buffer = _symmetric_memory.empty(small.ALL_REDUCE_BYTES, dtype=torch.uint8, device=device)
        mapped = _symmetric_memory.rendezvous(self._buffer, group)
        addresses = [int(address) for address in mapped.buffer_ptrs]
        if addresses[rank] != self._buffer.data_ptr():
            raise KernelError("symmetric memory of this torch begins elsewhere than its buffer")
        self._mapped = mapped  # unmapped with it
        self._buffer.zero_()
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._calls = torch.zeros(small.ALL_REDUCE_CTAS + 1, dtype=torch.int32, device=device)
        self._ended = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._launches: dict[torch.dtype, small.AllReduceLaunch] = {}
        torch.cuda.synchronize(device)
        torch.distributed.barrier(group, device_ids=[self._index])  # nobody sets a flag before it is cleared

    def serves(self, x: torch.Tensor) -> bool:
        """Tell whether `x` is added up here."""
        return (
            x.dtype in _TARGETS
            and 0 < x.nbytes <= small.MOST_REDUCED
            and x.nbytes % 16 == 0
            and x.data_ptr() % 16 == 0
            and x.is_contiguous()
        )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' `x`, in its memory, on the current stream."""
        index = self._index
        if x.dtype not in self._launches:
            function = jit.get(small.all_reduce_source(_TARGETS[x.dtype], self._count), index)
            self._launches[x.dtype] = small.prepare_all_reduce(
                function,
                rank=self._rank,
                buffers=self._addresses.data_ptr(),
                calls=self._calls.data_ptr(),
                ended=self._ended.data_ptr(),
            )
        early = launched_early(self._device)
        self._launches[x.dtype](stream=current.stream(index), x=x.data_ptr(), nbytes=x.nbytes, early=early)
        return x

    def stop(self) -> None:
        """End all waiting, of kernels that run and of those to come; sums mean nothing any more. Any thread may ask.

        It makes no call of CUDA, since one may wait for the very kernel that it is to end.
        """
        self._ended[0] = 1
