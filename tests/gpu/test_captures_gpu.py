"""Captures of graphs, while other threads and the collector do what one in the same thread forbids."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tersor.offload import pinned
from tersor.ops import Workspace
from tersor.ops.capture import capturing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def replayed(x: torch.Tensor, graph: torch.cuda.CUDAGraph, y: torch.Tensor) -> None:
    """Hold that a graph of three sums is one."""
    x.fill_(5)
    graph.replay()
    torch.cuda.synchronize(x.device)
    assert bool((y == 8).all())


@pytest.fixture
def x() -> Iterator[torch.Tensor]:
    yield torch.zeros(1 << 16, device="cuda")
    torch.cuda.empty_cache()


def test_other_threads_take_memory_and_wait_for_streams_and_events(x: torch.Tensor) -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for size in range(1, 20):
                held = torch.empty(size << 20, pin_memory=True)
                with torch.cuda.stream(torch.cuda.Stream(x.device)) as _:
                    stream, event = torch.cuda.current_stream(), torch.cuda.Event()
                    there = torch.empty(size << 20, device=x.device)
                    there.copy_(held, non_blocking=True)
                    event.record(stream)
                    event.synchronize()
                    stream.synchronize()
        except BaseException as error:
            failed.append(error)

    graph, thread = torch.cuda.CUDAGraph(), threading.Thread(target=work)
    with capturing(graph, torch.device("cuda")):
        y = x + 1
        thread.start()
        thread.join()
        y = y + 1
        y = y + 1
    assert not failed
    replayed(x, graph, y)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_collector_lets_go_of_pinned_memory_and_of_a_workspace(x: torch.Tensor, elsewhere: bool) -> None:
    memory = pinned.allocate(1 << 20, x.device)
    held: list[Any] = [memory]
    held.append(held)
    workspace = Workspace()
    workspace.split_sums(x.device.index, torch.cuda.current_stream().cuda_stream, 1 << 10, 16)
    assert workspace.nbytes > 0
    del memory, held
    graph = torch.cuda.CUDAGraph()

    def collect() -> None:
        gc.collect()
        workspace.close()

    with capturing(graph, torch.device("cuda")):
        y = x + 1
        if elsewhere:
            thread = threading.Thread(target=collect)
            thread.start()
            thread.join()
        else:
            collect()
        y = y + 1
        y = y + 1
    assert workspace.nbytes == 0
    replayed(x, graph, y)


def test_the_collector_lets_go_of_another_graph_once_there_is_this_one(x: torch.Tensor) -> None:
    """A graph is torch's, and in a cycle, as that of an error: let go of in this thread it would break the capture."""
    other = torch.cuda.CUDAGraph()
    with capturing(other, torch.device("cuda")):
        y = x + 1
    other.replay()
    held: list[Any] = [other]
    held.append(held)
    there, before = weakref.ref(other), gc.get_threshold()
    del other, held
    graph = torch.cuda.CUDAGraph()
    try:
        with capturing(graph, torch.device("cuda")):
            y = x + 1
            gc.set_threshold(1)
            made: list[list[list[int]]] = [[[]] for _ in range(1000)]
            y = y + 1
            assert there() is not None
            y = y + 1
        made += [[[]] for _ in range(1000)]
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert there() is None and len(made) == 2000
    replayed(x, graph, y)


def test_a_capture_that_fails_leaves_the_stream_that_was_current(x: torch.Tensor) -> None:
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph(), torch.device("cuda")):
                (x + 1).cpu()
            assert torch.cuda.current_stream() == stream


def test_a_graph_of_a_second_gpu_holds_what_runs_there(x: torch.Tensor) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for index in (0, 1, 0):
        own, graph = torch.zeros(1 << 16, device=f"cuda:{index}"), torch.cuda.CUDAGraph()
        with capturing(graph, own.device):
            y = own + 1
            y = y + 1
            y = y + 1
        assert torch.cuda.current_device() == 0
        replayed(own, graph, y)
