"""Images lie in memory or a file and come back byte for byte, and as many layers stay as there is room for."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.errors import InputError, TersorError
from tersor.offload import disk, pinned
from tersor.offload.choice import Room, streaming, taken
from tersor.offload.disk import DiskStore
from tersor.offload.host import HostStore
from tersor.offload.image import ALIGNED, BLOCK, Image
from tersor.offload.link import Link
from tersor.offload.streamer import Streamer

CPU = torch.device("cpu")


def tensors(seed: int) -> list[torch.Tensor]:
    """Return tensors of several dtypes and odd shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-(1 << 30), 1 << 30, (3, 1001 + 500 * seed), generator=generator, dtype=torch.int32),
        torch.randn(7, 5, generator=generator),
        torch.randint(0, 256, (13,), generator=generator, dtype=torch.uint8),
        torch.empty(0, dtype=torch.int64),
        torch.randn(2, 3, 8, generator=generator).to(torch.bfloat16)[:, :, ::2],
    ]


def test_tensors_of_an_image_start_where_kernels_may_read_and_come_back_as_they_were() -> None:
    given = tensors(1)
    image = Image.of(given)
    memory = torch.zeros(image.nbytes + 100, dtype=torch.uint8)
    image.write(memory, given)
    assert image.nbytes % BLOCK == 0 and all(place.offset % ALIGNED == 0 for place in image.places)
    views = image.views(memory)
    for view, tensor in zip(views, given, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype and view.is_contiguous()
    memory.zero_()
    assert not any(view.any() for view in views)


def filled(store: HostStore | DiskStore, count: int) -> tuple[list[Image], list[torch.Tensor]]:
    """Add images of several sizes to a store and have it serve two slots; return the images and the slots."""
    images = []
    for seed in range(count):
        images.append(Image.of(tensors(seed)))
        store.add(images[-1], tensors(seed))
    slots = [torch.zeros(max(one.nbytes for one in images), dtype=torch.uint8) for _ in range(2)]
    store.serve(slots)
    return images, slots


def holds(slot: torch.Tensor, image: Image, seed: int) -> bool:
    return all(torch.equal(view, tensor) for view, tensor in zip(image.views(slot), tensors(seed), strict=True))


@pytest.mark.parametrize("chunk", [BLOCK, 3 * BLOCK, 1 << 20])
@pytest.mark.parametrize("buffers", [3, 8])
def test_a_file_gives_its_images_in_any_order_through_a_ring_of_any_size(
    chunk: int, buffers: int, tmp_path: Path
) -> None:
    store = DiskStore(tmp_path, CPU, chunk=chunk, buffers=buffers, threads=3)
    images, slots = filled(store, 6)
    chance = random.Random(chunk + buffers)
    for _ in range(60):
        first, second = chance.randrange(6), chance.randrange(6)
        for slot, ticket in enumerate([store.load(first, 0), store.load(second, 1)]):
            store.wait(ticket)
            assert holds(slots[slot], images[(first, second)[slot]], (first, second)[slot])
    assert store.bandwidth() > 0


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_images_take_turns_in_the_slots_of_a_store(kind: str, tmp_path: Path) -> None:
    store: Any = HostStore(CPU) if kind == "host" else DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=4)
    images, slots = filled(store, 5)
    streamer: Streamer[Any] = Streamer(5, 2, store)
    for _ in range(4):
        streamer.begin()
        for number, image in enumerate(images):
            streamer.arrive(number)
            assert holds(slots[number % 2], image, number)
            streamer.leave(number)


def test_chunks_are_read_ahead_while_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=16, threads=2)
    images, _ = filled(store, 2)
    read, seen = disk._read, threading.Semaphore(0)

    def watched(*arguments: Any) -> None:
        read(*arguments)
        seen.release()

    monkeypatch.setattr(disk, "_read", watched)
    ticket = store.load(1, 1)
    for _ in range(images[1].nbytes // BLOCK):
        assert seen.acquire(timeout=10)
    store.wait(ticket)


def test_a_disk_that_fails_to_be_read_is_one_line_for_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=4)
    images, slots = filled(store, 2)
    broken = [True]
    preadv = os.preadv

    def fails(*arguments: Any) -> int:
        if broken[0]:
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(disk.os, "preadv", fails)
    with pytest.raises(TersorError, match=r"offload: .*: weights cannot be read: \[Errno 5\] Input/output error"):
        store.wait(store.load(0, 0))
    broken[0] = False
    store.wait(store.load(1, 1))
    assert holds(slots[1], images[1], 1)


def breaking(store: DiskStore, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a call of one of a store's threads fail, with a text of two lines, behind a few that do not."""
    place: Any = ThreadPoolExecutor if what == "submit" else store._link
    call, calls = getattr(place, what), itertools.count()

    def fails(*arguments: Any) -> Any:
        if next(calls) >= 2:
            raise RuntimeError("no such thing\nnor another")
        return call(*arguments)

    monkeypatch.setattr(place, what, fails)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["mark", "submit"])
def test_a_thread_that_fails_is_one_line_for_all_who_wait_and_the_other_one_ends(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LOOK", 0.01)
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=3, threads=2)  # fewer than an image has
    filled(store, 3)
    threads = [store._feeds[0]._ahead, store._feeds[0]._sending]
    breaking(store, what, monkeypatch)
    asked = [store.load(image, 0) for image in (2, 1, 0)]
    asked.append(store.load(2, 1))
    for ticket in reversed(asked):
        with pytest.raises(TersorError, match=r"offload: .*: weights cannot be read: no such thing$"):
            store.wait(ticket)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(TersorError, match=r"no such thing$"):
        store.wait(store.load(0, 0))
    del store
    gc.collect()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(4))
def test_many_stores_of_slow_disks_and_links_that_fail_at_times_answer_all_tickets_in_any_order(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads, chance = disk._read, itertools.count(1), random.Random(seed)

    def unsure(*arguments: Any) -> None:
        time.sleep(chance.choice((0, 0, 0.0005)))
        if not next(reads) % 50:
            raise OSError(5, "Input/output error")
        read(*arguments)

    class Came:
        def synchronize(self) -> None:
            time.sleep(chance.choice((0, 0.0005)))

    monkeypatch.setattr(disk, "_read", unsure)
    monkeypatch.setattr(Link, "mark", lambda self: Came())
    stores = [DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=chance.randrange(3, 9), threads=3) for _ in range(6)]
    images = [filled(store, 3) for store in stores]
    came = failed = 0
    for _ in range(8):
        asked = [(number, image, slot) for number in range(6) for slot, image in enumerate(chance.sample(range(3), 2))]
        chance.shuffle(asked)
        under_way = [(*one, stores[one[0]].load(one[1], one[2])) for one in asked]
        chance.shuffle(under_way)
        for number, image, slot, ticket in under_way:
            try:
                stores[number].wait(ticket)
            except TersorError as error:
                assert "Input/output error" in str(error)
                failed += 1
                continue
            assert holds(images[number][1][slot], images[number][0][image], image)
            came += 1
    assert came + failed == 8 * 12 and came and failed


def test_a_file_system_without_direct_reads_is_read_through_its_cache_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def without(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(disk.os, "open", without)
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=4)
    images, slots = filled(store, 3)
    store.wait(store.load(2, 0))
    assert holds(slots[0], images[2], 2) and not list(tmp_path.iterdir())
    assert store.where == f"a file in {tmp_path}, through the page cache" and not store.direct


def test_memory_that_can_be_had_is_what_the_machine_and_the_group_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    5000000 kB\n")
    left = pinned._LEFT
    assert pinned.available(meminfo, tmp_path) == 5_000_000 * 1024 - left
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1900000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000000\n")
    assert pinned.available(meminfo, tmp_path) == 1_600_000_000 - left
    (tmp_path / "memory.max").write_text("max\n")
    assert pinned.available(meminfo, tmp_path) == 5_000_000 * 1024 - left
    meminfo.write_text("MemAvailable: 5 kB\n")
    assert pinned.available(meminfo, tmp_path) == 0


def test_memory_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TersorError, match="GB of pinned host memory are needed") as caught:
        pinned.allocate(1 << 60, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
def test_layers_that_stream_are_spread_evenly_and_the_first_ones_stay(layers: int) -> None:
    for resident in range(layers + 1):
        chosen = streaming(layers, resident)
        assert len(chosen) == layers - resident
        gaps = [later - earlier for earlier, later in itertools.pairwise(chosen)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert not chosen or chosen[-1] == layers - 1
    with pytest.raises(InputError, match=f"resident_layers is {layers + 1}, and the model has {layers} layers"):
        streaming(layers, layers + 1)


def test_as_many_layers_stay_as_fit_beside_two_buffers_and_pages() -> None:
    layers, outside = [100] * 10, 200
    for room in range(0, 3000, 7):
        try:
            count = Room(room, step=50, pages=300).resident(layers, outside)
        except TersorError:
            assert room < 50 + 300 + 1.03 * (200 + 200)
            continue
        used = 1.03 * (taken(layers, count) + outside) + 50 + 300
        assert used <= room + 1
        assert count == 10 or 1.03 * (taken(layers, count + 1) + outside) + 350 > room - 1
    assert Room(3000, 50, 300).resident(layers, outside) == 10


def test_pages_get_a_fifth_where_nobody_says_how_much() -> None:
    layers = [10**9] * 100
    stays = Room(50 * 10**9).resident(layers, 0)
    assert taken(layers, stays) == pytest.approx(0.8 * 50e9 / 1.03, rel=0.03)


def test_what_does_not_fit_at_all_is_one_line() -> None:
    with pytest.raises(TersorError, match=r"2\.0 GB of buffers for 2 layers, 0\.5 GB of other weights") as caught:
        Room(10**9, pages=10**8).resident([10**9] * 4, 5 * 10**8)
    assert "\n" not in str(caught.value)


SLOW = """
import sys, time, torch
from pathlib import Path
from tersor.offload import disk
from tersor.offload.image import Image

store = disk.DiskStore(Path(sys.argv[1]), torch.device("cpu"), chunk=4096, buffers=3, threads=2)
tensor = torch.zeros(1 << 17, dtype=torch.uint8)
store.add(Image.of([tensor]), [tensor])
store.serve([torch.zeros(1 << 17, dtype=torch.uint8)])
read = disk._read
disk._read = lambda *arguments: (time.sleep(0.01), read(*arguments))
store.load(0, 0)
"""


def test_a_process_that_ends_while_a_file_is_read_ahead_just_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLOW, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "") and not list(tmp_path.iterdir())


def test_a_store_that_goes_while_a_file_is_read_ahead_ends_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = disk._read
    monkeypatch.setattr(disk, "_read", lambda *arguments: (time.sleep(0.002), read(*arguments)))
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=3, threads=2)
    filled(store, 3)
    before = {thread for thread in threading.enumerate() if thread.name.startswith("offload")}
    assert len(before) >= 2
    for image in range(3):
        store.load(image, 0)
    del store
    gc.collect()
    assert not any(thread.is_alive() for thread in before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["ahead", "read", "send"])
def test_a_store_that_goes_in_one_of_its_own_threads_ends_all_of_them(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=3, threads=2)]
    filled(held[0], 3)
    pinned_memory = weakref.ref(held[0]._memory)
    file, before = held[0]._file, {one for one in threading.enumerate() if one.name.startswith("offload")}
    place: Any = {"ahead": ThreadPoolExecutor, "read": disk, "send": Link}[where]
    name = {"ahead": "submit", "read": "_read", "send": "copy"}[where]
    call, calls, begun, seen = getattr(place, name), itertools.count(), threading.Event(), []

    def collected(*arguments: Any) -> Any:
        begun.wait()
        if next(calls) == 1:
            held.clear()  # as the collector would
            seen.append(threading.current_thread().name)
        return call(*arguments)

    monkeypatch.setattr(place, name, collected)
    for image in range(3):
        held[0].load(image, 0)
    begun.set()
    for thread in before:
        thread.join(5)
    assert seen and seen[0].startswith(f"offload-{where}")
    assert not any(thread.is_alive() for thread in threading.enumerate() if thread.name.startswith("offload-read"))
    assert not any(thread.is_alive() for thread in before)
    for thread in threading.enumerate():
        if thread.name == "offload-close":
            thread.join(5)
    with pytest.raises(OSError):
        os.fstat(file)
    assert pinned_memory() is None


@pytest.mark.timeout(20)
def test_a_disk_that_fails_while_it_is_timed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, CPU, chunk=BLOCK, buffers=3, threads=2)
    filled(store, 3)

    def fails(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk.os, "preadv", fails)
    with pytest.raises(TersorError, match=r"offload: .*: weights cannot be read: \[Errno 5\] Input/output error"):
        store.bandwidth()
