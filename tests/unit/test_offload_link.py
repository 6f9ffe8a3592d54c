"""Copies to a GPU that is not there: which stream waits for which event, in which order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import _get_device_index

from tersor.errors import TersorError
from tersor.offload import pinned
from tersor.offload.disk import DiskStore
from tersor.offload.host import HostStore
from tersor.offload.image import Image
from tersor.offload.link import Link

CURRENT, COPIES = "current", "copies"


class Gpu:
    """Streams and events that write down what is asked of them; memory is the host's.

    Attributes:
        said: (stream, what, number of the event) in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.inside: list[str] = [CURRENT]
        gpu, empty = self, torch.zeros

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                gpu.said.append((self.name, "waits for", event.number))

            def synchronize(self) -> None:
                gpu.said.append((self.name, "is waited for"))

        class Event:
            made = 0

            def synchronize(self) -> None:
                pass

            def record(self, stream: Stream) -> None:
                Event.made += 1
                self.number = Event.made
                gpu.said.append((stream.name, "comes to", self.number))

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            gpu.inside.append(stream.name)
            yield
            gpu.inside.pop()

        def taken(stream: Stream) -> None:
            gpu.said.append((threading.current_thread().name.partition("_")[0], "launches on", stream.name))

        def recorded(memory: torch.Tensor, stream: Stream) -> None:
            gpu.said.append((stream.name, "uses", memory.numel()))

        copy, add = torch.Tensor.copy_, torch.Tensor.add_

        def copied(into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if non_blocking:
                gpu.said.append((gpu.inside[-1], "copies", source.numel()))
            return copy(into, source)

        def added(one: torch.Tensor, number: int) -> torch.Tensor:
            gpu.said.append((gpu.inside[-1], "runs a barrier"))
            return add(one, number)

        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: _get_device_index(device))  # as torch does
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(COPIES))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(CURRENT))
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "set_stream", taken)
        monkeypatch.setattr(torch.Tensor, "record_stream", recorded)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)
        monkeypatch.setattr(torch.Tensor, "add_", added)
        monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None, **options: empty(*sizes, **options))


def test_a_copy_waits_for_what_was_launched_and_readers_wait_for_it_behind_a_barrier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch)
    store = HostStore(torch.device("cuda", 0))
    monkeypatch.setattr(store._link, "device", torch.device("cpu"))  # where memory is
    tensor = torch.arange(100)
    image = Image.of([tensor])
    store.add(image, [tensor])
    slot = torch.zeros(image.nbytes, dtype=torch.uint8)
    store.serve([slot])
    store.wait(store.load(0, 0))
    assert gpu.said == [
        (COPIES, "uses", image.nbytes),
        (CURRENT, "comes to", 1),
        (COPIES, "waits for", 1),
        (COPIES, "copies", image.nbytes),
        (COPIES, "comes to", 2),
        (CURRENT, "waits for", 2),
        (CURRENT, "runs a barrier"),
    ]
    assert torch.equal(image.views(slot)[0], tensor)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_disk_fills_the_slots_of_a_gpu_that_is_named_with_a_number_or_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, allocate = Gpu(monkeypatch), pinned.allocate
    monkeypatch.setattr(pinned, "allocate", lambda nbytes, device: allocate(nbytes, torch.device("cpu")))
    store = DiskStore(tmp_path, torch.device(name), chunk=4096, buffers=3)
    tensor = torch.arange(5000)
    image = Image.of([tensor])
    store.add(image, [tensor])
    assert gpu.said and set(gpu.said) == {("offload-write", "launches on", CURRENT)}
    gpu.said.clear()
    slot = torch.zeros(image.nbytes, dtype=torch.uint8)
    store.serve([slot])
    assert gpu.said == [(COPIES, "uses", image.nbytes)]
    gpu.said.clear()
    for _ in range(2):
        store.wait(store.load(0, 0))
        assert torch.equal(image.views(slot)[0], tensor)
        first, *copies = [said for said in gpu.said if said[1] in ("waits for", "copies")]
        assert first[:2] == (COPIES, "waits for") and copies[-1][:2] == (CURRENT, "waits for")
        assert copies[:-1] == [(COPIES, "copies", 4096)] * (image.nbytes // 4096)
        gpu.said.clear()
        slot.zero_()


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    assert Link(torch.device("cuda")).device == torch.device("cuda", 3)
    assert Link(torch.device("cuda", 1)).device == torch.device("cuda", 1)


def test_the_host_waits_for_copies_where_it_asks_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    Link(torch.device("cuda", 0)).finish()
    assert gpu.said == [(COPIES, "is waited for")]


def test_a_cpu_has_no_events_and_copies_at_once() -> None:
    link, into = Link(torch.device("cpu")), torch.zeros(3, dtype=torch.uint8)
    link.copy(into, torch.ones(3, dtype=torch.uint8))
    assert link.now() is None and link.mark() is None and into.tolist() == [1, 1, 1]
    link.after(None)
    link.wait(None)
    link.finish()


@pytest.mark.parametrize("code", [0, 2])
def test_memory_that_the_driver_refuses_leaves_no_error_to_whoever_launches_next(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, launched, empty = [0], [0], torch.zeros

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
            last[0] = code
            return code

        @staticmethod
        def cudaHostUnregister(address: int) -> None:
            pass

    def launch(*sizes: Any, device: Any = None, **options: Any) -> torch.Tensor:
        launched[0] += 1
        if last[0]:  # as torch does behind a launch, which takes the error away
            last[0] = 0
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "zeros", launch)
    with pytest.raises(TersorError, match="cudaHostRegister: error 2") if code else contextlib.nullcontext():
        pinned.allocate(4096, torch.device("cuda", 0))
    assert not last[0] and launched == [1 if code else 0]
