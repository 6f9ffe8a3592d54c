"""Graphs of a GPU that is not there: on which device they are captured, in which mode, and what waits for their end."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tersor.engine.config import EngineConfig
from tersor.kernels.jit import memory
from tersor.offload import pinned
from tersor.ops import capture
from tersor.ops.capture import beside, capturing, outside
from tersor.ops.workspace import Workspace
from tersor.server import engines


class Gpus:
    """Two GPUs, of which one is current in this thread.

    Attributes:
        current: its index.
        stream: that is current.
        captured: (stream, device that is current, mode) of each capture.
        said: what was called that a capture forbids, and whether one was under way.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.open, self.stream = 0, False, "of the caller"
        self.captured: list[tuple[Any, int, str]] = []
        self.said: list[tuple[str, bool]] = []

        @contextlib.contextmanager
        def on(device: Any) -> Iterator[None]:
            before = self.current
            index = device if isinstance(device, int) else torch.device(device).index
            self.current = before if index is None else index
            yield
            self.current = before

        @contextlib.contextmanager
        def graph(
            made: Any, stream: Any = None, capture_error_mode: str = "global", pool: Any = None
        ) -> Iterator[None]:
            self.captured.append((stream, self.current, capture_error_mode))
            self.open, before, self.stream = True, self.stream, stream
            try:
                yield
            finally:
                self.open = False
            self.stream = before  # as torch does: not behind a capture that failed

        @contextlib.contextmanager
        def launching(stream: Any) -> Iterator[None]:
            before, self.stream = self.stream, stream
            try:
                yield
            finally:
                self.stream = before

        self.zeros: list[int] = []
        monkeypatch.setattr(torch.cuda, "device", on)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", lambda index: f"stream of {index}")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "stream", launching)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.said.append(("waits", self.open)))
        monkeypatch.setattr(torch, "zeros", lambda *sizes, device: self.zeros.append(self.current))
        capture._stream.cache_clear()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    yield Gpus(monkeypatch)
    capture._stream.cache_clear()


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0)])
def test_a_graph_is_captured_on_a_stream_of_its_device_whatever_the_current_one(
    gpus: Gpus, device: str, index: int
) -> None:
    for other in ("cuda:0", device):  # torch keeps the stream of the first capture for all
        with capturing(object(), torch.device(other), pool=None):  # type: ignore[arg-type]
            inside = gpus.current
    assert inside == index and gpus.current == 0
    assert gpus.captured[-1] == (f"stream of {index}", index, "thread_local")


def test_what_a_failed_capture_leaves_is_put_right_on_its_own_device(gpus: Gpus) -> None:
    with pytest.raises(RuntimeError, match="forbidden"), capturing(object(), torch.device("cuda:1")):  # type: ignore[arg-type]
        raise RuntimeError("forbidden")
    assert gpus.captured[1:] == [("stream of 1", 1, "relaxed")] and gpus.zeros == [1]
    assert gpus.stream == "of the caller"
    done: list[int] = []
    outside(lambda: done.append(1))
    assert done == [1]


def test_a_generator_that_drew_in_a_failed_capture_is_in_none_any_more(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        def __init__(self) -> None:
            self.generators: list[Any] = []

        def register_generator_state(self, one: Any) -> None:
            assert not gpus.open
            self.generators.append(one)

    graph = torch.cuda.graph

    @contextlib.contextmanager
    def drawing(made: Graph, **options: Any) -> Iterator[None]:
        with graph(made, **options):  # type: ignore[arg-type]
            captured.update(made.generators)
            yield
        captured.difference_update(made.generators)  # as torch does: where the capture ends well

    captured: set[Any] = set()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", drawing)
    one: Any = "a generator"
    with capturing(Graph(), torch.device("cuda:0"), generators=[one]):  # type: ignore[arg-type]
        assert captured == {one}
    assert not captured
    with pytest.raises(RuntimeError), capturing(Graph(), torch.device("cuda:0"), generators=[one]):  # type: ignore[arg-type]
        assert captured == {one}
        raise RuntimeError("forbidden")
    assert not captured


@pytest.mark.parametrize("fails", [False, True])
def test_what_runs_beside_is_waited_for_where_it_fails_too(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Stream:
        device = torch.device("cuda:1")

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def launching(stream: Stream) -> Iterator[None]:
        said.append(stream.name)
        try:
            yield
        finally:
            said.append("caller's")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"caller's of {device}"))
    monkeypatch.setattr(torch.cuda, "stream", launching)
    with contextlib.suppress(RuntimeError), beside(Stream("side")):  # type: ignore[arg-type]
        if fails:
            raise RuntimeError("memory ran out")
    waits = ["side waits for caller's of cuda:1", "caller's of cuda:1 waits for side"]
    assert said == [waits[0], "side", "caller's", waits[1]]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_memory_that_the_collector_lets_go_of_waits_for_the_end_of_a_capture(
    gpus: Gpus, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
            return 0

        @staticmethod
        def cudaHostUnregister(address: int) -> None:
            gpus.said.append(("unregistered", gpus.open))

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    ring: list[Any] = [pinned.allocate(4096, torch.device("cuda:0"))]
    ring.append(ring)
    del ring  # as an engine that nobody has any more
    with capturing(object(), torch.device("cuda:0")):  # type: ignore[arg-type]
        if elsewhere:
            thread = threading.Thread(target=gc.collect)
            thread.start()
            thread.join()
        else:
            gc.collect()
        assert not gpus.said
    assert gpus.said == [("waits", False), ("unregistered", False)]


def test_a_workspace_is_given_back_behind_a_capture(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "release", lambda address, index: gpus.said.append((f"release {address}", gpus.open)))
    workspace = Workspace()
    workspace._reserved.append((0, 77, 8))
    with capturing(object(), torch.device("cuda:0")):  # type: ignore[arg-type]
        workspace.close()
    assert gpus.said == [("waits", False), ("release 77", False)]


def test_captures_of_two_threads_come_one_after_the_other(gpus: Gpus) -> None:
    begun, order = threading.Event(), []

    def second() -> None:
        begun.set()
        with capturing(object(), torch.device("cuda:0")):  # type: ignore[arg-type]
            order.append("second")

    thread = threading.Thread(target=second)
    with capturing(object(), torch.device("cuda:0")):  # type: ignore[arg-type]
        thread.start()
        begun.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_engine_of_several_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(engines, "LLM", lambda model, **options: made.append(options["device"]))
    engines.LoadModel("model", None, EngineConfig(tensor_parallel=2), numbered=True)(3)
    assert made == [6, "cuda:6"]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("collects", [False, True])
def test_the_collector_rests_while_a_graph_is_captured(gpus: Gpus, collects: bool, fails: bool) -> None:
    (gc.enable if collects else gc.disable)()
    try:
        with contextlib.suppress(RuntimeError), capturing(torch.cuda.CUDAGraph(), torch.device("cuda:0")):
            assert not gc.isenabled()
            if fails:
                raise RuntimeError("memory ran out")
        assert gc.isenabled() is collects
    finally:
        gc.enable()
