"""Memory that kernels borrow: whose it is, that it stays, and that it is zero, against a driver that only remembers."""

from __future__ import annotations

import gc
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fakes import FakeGpu

from tersor.engine.runner import Runner
from tersor.errors import KernelError
from tersor.kernels.jit import memory, module
from tersor.models.config import DecoderConfig
from tersor.models.random import random_decoder
from tersor.ops import workspace


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Two devices whose memory lies at ever higher addresses."""
    fake = FakeGpu("NVIDIA H200", "NVIDIA H200")
    fake.install(monkeypatch)
    fake.take_cpu_tensors(monkeypatch)
    return fake


def reserved(gpu: FakeGpu) -> list[tuple[int, int]]:
    """What was taken, in order: (bytes, device)."""
    return [(nbytes, device) for device, nbytes in gpu.memory.values()]


@pytest.fixture
def own() -> workspace.Workspace:
    """A workspace that holds nothing yet."""
    return workspace.Workspace()


def test_each_stream_of_each_device_keeps_its_own(gpu: FakeGpu, own: workspace.Workspace) -> None:
    first = own.split_sums(0, 5, 1000, 10)
    assert first == own.split_sums(0, 5, 10, 1000) and first[2] is None
    assert reserved(gpu) == [(4 * 1024 + (8 << 20), 0)]
    parts, counters, _ = first
    assert parts % 256 == 0 and counters == parts + (8 << 20)
    others = [own.split_sums(index, stream, 1000, 10) for index, stream in ((0, 6), (1, 5))]
    assert len({first[0], others[0][0], others[1][0]}) == 3
    assert [index for _, index in reserved(gpu)] == [0, 0, 1]


def test_it_grows_by_doubling_so_that_what_is_left_behind_stays_small(gpu: FakeGpu, own: workspace.Workspace) -> None:
    floats = (8 << 20) // 4
    for more in (0, 1, 2, 3, floats, 2 * floats):
        own.split_sums(0, 5, floats + more, 1)
    assert [size for size, _ in reserved(gpu)] == [4 * 1024 + (8 << 20), 4 * 2048 + (16 << 20), 4 * 4096 + (32 << 20)]
    own.split_sums(0, 5, 1, 5000)
    assert own._streams[0, 5][1] >= 5000


def test_each_graph_has_counters_of_its_own(
    gpu: FakeGpu, own: workspace.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for capture in (1, 2, 3):
        for counters in (10, 1024, 1025):
            with gpu.capturing(capture):
                parts, address, keep = own.split_sums(0, 5, 64, counters)
            assert keep is not None and keep.numel() == 64 and keep.data_ptr() == parts
            seen.append((address, counters))
    assert reserved(gpu) == [(4 << 16, 0)]
    for graph in (seen[:3], seen[3:6], seen[6:]):
        assert graph[0][0] == graph[1][0] != graph[2][0]
    starts = sorted({address: max(n for a, n in seen if a == address) for address, _ in seen}.items())
    assert all(address + 4 * n <= after for (address, n), (after, _) in itertools.pairwise(starts))
    with gpu.capturing(3):
        own.split_sums(0, 6, 64, 1 << 17)
    assert reserved(gpu)[1:] == [(4 << 17, 0)]


def test_threads_that_need_more_at_once_take_it_once(gpu: FakeGpu, own: workspace.Workspace) -> None:
    together = threading.Barrier(4)
    results: list[Any] = []

    def work() -> None:
        together.wait()
        results.append(own.split_sums(0, 5, 100, 100))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reserved(gpu)) == 1 and len(set(results)) == 1


def test_an_owner_gives_everything_back(
    gpu: FakeGpu, own: workspace.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int, int]] = []
    monkeypatch.setattr(memory, "release", lambda address, index: events.append(("release", index, address)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: events.append(("wait", index, 0)))
    with own:
        for index, stream in ((0, 5), (0, 6), (1, 5)):
            own.split_sums(index, stream, 1000, 10)
        assert own.nbytes == sum(nbytes for nbytes, _ in reserved(gpu)) > 3 * (8 << 20)
    assert sorted(events[:2]) == [("wait", 0, 0), ("wait", 1, 0)]
    assert events[2:] == [("release", 0, 1 << 40), ("release", 0, 2 << 40), ("release", 1, 3 << 40)]
    assert own.nbytes == 0
    own.close()
    assert len(events) == 5
    with pytest.raises(KernelError, match="workspace that is closed"):
        own.split_sums(0, 5, 1000, 10)


def test_the_workspace_that_a_process_shares_is_never_closed() -> None:
    with pytest.raises(ValueError, match="never closed"):
        workspace.SHARED.close()


class Driver:
    """What `reserve` and `release` ask of the driver."""

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")

    def __init__(self, status: int) -> None:
        self.status = status
        self.status_of_free = 0
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        answers = {
            "cuDeviceGet": (0, "device"),
            "cuDevicePrimaryCtxRetain": (0, "context"),
            "cuMemAlloc": (self.status, 4096),
            "cuMemFree": (self.status_of_free,),
            "cuStreamCreate": (0, "stream"),
            "cuThreadExchangeStreamCaptureMode": (0, "before"),
            "cuGetErrorName": (0, b"CUDA_ERROR_OUT_OF_MEMORY"),
            "cuGetErrorString": (0, b"out of memory"),
        }

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return answers.get(name, (0,))

        return call


@pytest.mark.parametrize("status", [0, 2])
def test_memory_is_zeroed_on_a_stream_of_its_own(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(status)
    monkeypatch.setattr(module, "load_driver", lambda: driver)
    if status:
        with pytest.raises(KernelError, match=r"cuda:3 gives no 64 bytes .*: CUDA_ERROR_OUT_OF_MEMORY, out of memory"):
            memory.reserve(64, 3)
    else:
        assert memory.reserve(64, 3) == 4096
        assert ("cuMemsetD8Async", 4096, 0, 64, "stream") in driver.calls
        names = [name for name, *_ in driver.calls]
        assert names.index("cuMemsetD8Async") < names.index("cuStreamSynchronize") < names.index("cuStreamDestroy")
    assert driver.calls[0] == ("cuThreadExchangeStreamCaptureMode", "relaxed")
    assert driver.calls[-2:] == [("cuCtxPopCurrent",), ("cuThreadExchangeStreamCaptureMode", "before")]


@pytest.mark.parametrize("status", [0, 2])
def test_memory_is_given_back_in_its_own_context(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(0)
    driver.status_of_free = status
    monkeypatch.setattr(module, "load_driver", lambda: driver)
    if status:
        with pytest.raises(KernelError, match="cuda:3 does not take back the memory of split sums: CUDA_ERROR"):
            memory.release(4096, 3)
    else:
        memory.release(4096, 3)
    names = [name for name, *_ in driver.calls]
    assert names.index("cuCtxPushCurrent") < names.index("cuMemFree") < names.index("cuCtxPopCurrent")


def test_an_engine_that_goes_gives_its_memory_back(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = DecoderConfig.from_dict({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **sizes})
    runner = Runner(random_decoder(config, None, "cpu", torch.float32), None, max_rows=2, max_length=64)
    said: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: said.append(f"waits for {index}"))
    monkeypatch.setattr(memory, "release", lambda address, index: said.append(address))
    address, *_ = runner.workspace.split_sums(0, 5, 1000, 10)
    assert not said
    del runner
    gc.collect()
    assert said == ["waits for 0", address]
