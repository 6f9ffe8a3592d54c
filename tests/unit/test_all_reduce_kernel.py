"""small/all_reduce.cuh on a CPU: GPUs are threads, and their memory is one."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, Emulated

from tersor.kernels import small

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
SIZES = (8, 8 * 513, 8 * 1500, 24, 8 * 700)


class Gpus:
    """Ranks with a buffer each, all of which are zero at first."""

    def __init__(self, count: int, target: str, folder: Path) -> None:
        self.count = count
        self.buffers = [torch.zeros(small.ALL_REDUCE_BYTES, dtype=torch.uint8) for _ in range(count)]
        self.calls = [torch.zeros(small.ALL_REDUCE_CTAS + 1, dtype=torch.int32) for _ in range(count)]
        self.addresses = torch.tensor([buffer.data_ptr() for buffer in self.buffers])
        self.ended = torch.zeros(count, dtype=torch.int32)
        self.launches = []
        for rank in range(count):
            own = folder / str(rank)
            own.mkdir()
            # What a library keeps is a GPU's own.
            function = Emulated(small.all_reduce_source(target, count), own, 900)
            self.launches.append(
                small.prepare_all_reduce(
                    function,  # type: ignore[arg-type]
                    rank=rank,
                    buffers=self.addresses.data_ptr(),
                    calls=self.calls[rank].data_ptr(),
                    ended=self.ended[rank:].data_ptr(),
                )
            )

    def add_up(self, rank: int, xs: list[torch.Tensor]) -> None:
        """Add up one tensor after the other, as a rank does that waits for nobody between them."""
        for x in xs:
            self.launches[rank](stream=0, x=x.data_ptr(), nbytes=x.nbytes, early=True)


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.float16), (3, torch.bfloat16)])
def test_sums_of_all_ranks_are_right_to_the_bit_one_call_after_the_other(
    count: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    gpus = Gpus(count, str(dtype).removeprefix("torch."), tmp_path)
    generator = torch.Generator().manual_seed(1)
    given = [[torch.randn(size, generator=generator).to(dtype) for size in SIZES] for _ in range(count)]
    wanted = []
    for each in zip(*given, strict=True):
        total = torch.zeros(len(each[0]))
        for x in each:
            total += x.float()
        wanted.append(total.to(dtype))
    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(gpus.add_up, rank, xs) for rank, xs in enumerate(given)]
        for one in done:
            one.result(timeout=60)
    for xs in given:
        assert all(torch.equal(x, total) for x, total in zip(xs, wanted, strict=True))
    assert all(calls.tolist() == [len(SIZES)] * small.ALL_REDUCE_CTAS + [0] for calls in gpus.calls)


def test_nobody_waits_once_waiting_was_ended(tmp_path: Path) -> None:
    """By the host while a kernel waits for a rank that never comes, and then in those to come at once."""
    gpus = Gpus(2, "float16", tmp_path)
    x = torch.ones(8 * 600, dtype=torch.float16)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(gpus.add_up, 0, [x, x])
        time.sleep(0.2)
        assert not waiting.done() and gpus.calls[0][-1] == 0
        gpus.ended[0] = 1
        waiting.result(timeout=60)
    assert gpus.calls[0][-1] == 1
    assert gpus.calls[0][0] == 2
