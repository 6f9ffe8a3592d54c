"""Images take turns in slots: each is there when it is read, and none is written while it is."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers.fake_copies import ANY, Machine

from tersor.offload.choice import streaming
from tersor.offload.streamer import Streamer


def step(streamer: Streamer[Any], machine: Machine, last: int | None = None, rests: bool = False) -> None:
    """Launch a step, or what is ahead of one that fails behind image `last`."""
    streamer.begin()
    for image in range(streamer.images):
        streamer.arrive(image)
        machine.launch(image, rests)
        if image == last:
            return
        streamer.leave(image)


def captured(streamer: Streamer[Any], machine: Machine) -> list[Any]:
    """Return a step as a graph."""
    machine.graph = graph = []
    with streamer.captured():
        step(streamer, machine)
    machine.graph = None
    return graph


def replay(streamer: Streamer[Any], machine: Machine, graph: list[Any]) -> None:
    with streamer.replayed():
        machine.replay(graph)


def reads(machine: Machine) -> list[int]:
    """Return images in the order they were read, each of which was in its slot, or a whole one where any will do."""
    assert all(image == held or (image == ANY and held is not None) for image, held in machine.read)
    return [image for image, _ in machine.read]


@pytest.mark.parametrize("part", range(4))
def test_in_thousands_of_schedules_every_read_finds_its_image_and_no_slot_is_written_meanwhile(part: int) -> None:
    for seed in range(1000 * part, 1000 * part + 1000):
        chance = random.Random(seed)
        images, slots = chance.randint(1, 7), chance.randint(1, 4)
        machine = Machine(slots, chance)
        streamer = Streamer(images, slots, machine)
        graph = captured(streamer, machine) if chance.random() < 0.5 else None
        expected: list[int] = []
        for _ in range(chance.randint(1, 6)):
            how = chance.random()
            if how < 0.2:
                last = chance.randrange(images)
                step(streamer, machine, last)
                expected += range(last + 1)
            elif how < 0.3:
                with streamer.resting():
                    step(streamer, machine, rests=True)
                expected += [ANY] * images
            elif how < 0.6 and graph is not None:
                replay(streamer, machine, graph)
                expected += range(images)
            else:
                step(streamer, machine)
                expected += range(images)
            if chance.random() < 0.5:
                machine.run(chance.randrange(40))
            if graph is None and chance.random() < 0.2:
                graph = captured(streamer, machine)
        machine.run()
        assert reads(machine) == expected, seed


@pytest.mark.parametrize("images", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_copies_every_image_once(images: int, graph: bool) -> None:
    machine = Machine(2, random.Random(0))
    streamer = Streamer(images, 2, machine)
    held = captured(streamer, machine)
    for _ in range(10):
        replay(streamer, machine, held) if graph else step(streamer, machine)
    machine.run()
    often = [image for image in range(images) if image >= 2 or image + 2 < images]  # others have a slot to themselves
    ahead = [0] if 0 in often else []  # of the step that would follow
    assert sorted(machine.copied) == sorted([*range(images), *often * 9, *ahead])


def test_steps_and_graphs_of_steps_take_turns_without_a_copy_more() -> None:
    machine = Machine(2, random.Random(0))
    streamer = Streamer(5, 2, machine)
    held = captured(streamer, machine)
    for turn in range(10):
        replay(streamer, machine, held) if turn % 2 else step(streamer, machine)
    machine.run()
    assert sorted(machine.copied) == sorted([*range(5)] * 10 + [0])


def test_steps_that_nobody_reads_copy_the_first_images_at_most() -> None:
    machine = Machine(2, random.Random(0))
    streamer = Streamer(6, 2, machine)
    for _ in range(5):
        with streamer.resting():
            step(streamer, machine, rests=True)
    machine.run()
    assert machine.copied == [0, 1] and reads(machine) == [ANY] * 30


def test_as_many_images_as_slots_are_copied_once_for_good() -> None:
    machine = Machine(3, random.Random(0))
    streamer = Streamer(3, 3, machine)
    for _ in range(5):
        step(streamer, machine)
    machine.run()
    assert machine.copied == [0, 1, 2]


def test_a_copy_is_asked_for_while_the_image_ahead_is_still_to_be_read() -> None:
    machine = Machine(2, random.Random(0))
    streamer = Streamer(4, 2, machine)
    step(streamer, machine)
    waiting = [operation[2] for operation in machine.queues["copy"] if operation[0] == "end"]
    assert waiting == [0, 1, 2, 3, 0], "the one that the next step begins with is copied beside the end of this one"


class Timed:
    """Products and copies that take so long each, a queue of either; a mark is a time.

    Attributes:
        computed, copied: when all that was asked for so far is done.
        copies: seconds of all copies.
    """

    def __init__(self, copy: float) -> None:
        self._copy = copy
        self.computed = self.copied = self.copies = 0.0

    def load(self, image: int, slot: int) -> float:
        self.copied = max(self.copied, self.computed) + self._copy
        self.copies += self._copy
        return self.copied

    def wait(self, mark: float) -> None:
        self.computed = max(self.computed, mark)

    def now(self) -> float:
        return self.computed


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("layers", "resident", "copy", "product"),
    [(80, 0, 12.0, 0.17), (80, 52, 31.0, 0.45), (80, 75, 12.0, 0.17), (80, 60, 12.0, 2.0), (80, 60, 12.0, 25.0)],
)
def test_a_step_takes_as_long_as_its_copies_or_its_products(
    layers: int, resident: int, copy: float, product: float, graph: bool
) -> None:
    chosen = {layer: image for image, layer in enumerate(streaming(layers, resident))}
    timed = Timed(copy)
    streamer = Streamer(len(chosen), 2, timed)
    times = []
    for _ in range(10):
        streamer.begin()
        for layer in range(layers):
            if layer in chosen:
                streamer.arrive(chosen[layer])
            timed.computed += product
            if layer in chosen:
                streamer.leave(chosen[layer])
        timed.computed += 0.3
        if graph:
            timed.wait(timed.copied)
        times.append(timed.computed)
    least = max(len(chosen) * copy, layers * product + 0.3)
    assert least <= (times[-1] - times[3]) / 6 + 1e-9 <= 1.005 * least


def faults(careless: type[Machine]) -> int:
    """Return in how many of 50 random orders a machine reads what is not there."""
    found = 0
    for seed in range(50):
        machine = careless(2, random.Random(seed))
        streamer = Streamer(4, 2, machine)
        step(streamer, machine)
        try:
            machine.run()
            reads(machine)
        except AssertionError:
            found += 1
    return found


def test_a_streamer_that_waits_for_no_copy_is_seen() -> None:
    class Careless(Machine):
        def wait(self, mark: Any) -> None:
            return

    assert faults(Careless) > 10


def test_a_copy_that_waits_for_no_read_is_seen() -> None:
    class Careless(Machine):
        def now(self) -> Any:
            mark = super().now()
            mark.come = True
            return mark

    assert faults(Careless) > 10
