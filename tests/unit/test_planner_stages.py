"""Stages of a pipeline are the optimum: held to every way to cut a chain, and to every stage that parts can have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from tersor.errors import InputError, UnsupportedError
from tersor.planner.stage_graph import Part, sent, stage_graph, windows
from tersor.planner.stages import Group, Split, split


def chain(
    seed: int, *, layers: int, kinds: int = 2, room: float = math.inf
) -> tuple[list[Group], list[int], np.ndarray]:
    """Return groups of one to three devices of two pools, pools, and what it takes to hand results on."""
    random = np.random.default_rng(seed)
    groups = []
    for kind in range(kinds):
        devices = (1, 0) if kind == 0 else (int(random.integers(0, 3)), int(random.integers(1, 3)))
        seconds = random.uniform(1, 3, layers) / sum(devices)
        seconds[[0, -1]] *= 2  # embedding and head
        nbytes = np.floor(random.uniform(5, 15, (2, layers)) / sum(devices))
        nbytes = nbytes if seed % 2 else nbytes[0]
        groups.append(Group(f"kind {kind}", devices, seconds, nbytes, room, fixed=2.0))
    handed = random.uniform(0, 0.5, (kinds, kinds, layers))
    if kinds > 1:
        handed[1, 0] = np.inf if seed % 3 == 0 else handed[1, 0]
    if seed % 4 == 1:
        handed[:] = handed[-1]  # which group was before makes no difference
    return groups, [2, 2], handed


def every_split(
    groups: list[Group], pools: list[int], handed: np.ndarray, idle: bool = True
) -> Iterator[tuple[float, float]]:
    """Yield slowest stage and sum of every way to cut and to place."""
    layers = len(groups[0].seconds)
    for count in range(1, min(layers, sum(pools)) + 1):
        for kinds in itertools.product(range(len(groups)), repeat=count):
            used = np.sum([groups[kind].devices for kind in kinds], axis=0)
            if (used > pools).any() or not (idle or (used == pools).all()):
                continue
            for cuts in itertools.combinations(range(1, layers), count - 1):
                ends = [0, *cuts, layers]
                times, fits = [], True
                for place, kind in enumerate(kinds):
                    own = slice(ends[place], ends[place + 1])
                    received = handed[kinds[place - 1], kind, ends[place] - 1] if place else 0.0
                    times.append(groups[kind].seconds[own].sum() + received)
                    held = groups[kind].bytes[..., own].sum(axis=-1).max()
                    fits &= held + groups[kind].fixed <= groups[kind].room
                if fits and math.isfinite(sum(times)):
                    yield max(times), sum(times)


def check(found: Split, groups: list[Group], pools: list[int], handed: np.ndarray) -> None:
    """Check that stages are in order, within limits, and take what they say."""
    assert found.stages[0].first == 0 and found.stages[-1].end == len(groups[0].seconds)
    assert all(one.end == other.first for one, other in itertools.pairwise(found.stages))
    used = np.sum([groups[stage.group].devices for stage in found.stages], axis=0)
    assert (used <= pools).all()
    before = None
    for stage in found.stages:
        group = groups[stage.group]
        own = group.seconds[stage.first : stage.end].sum()
        own += 0.0 if before is None else handed[before, stage.group, stage.first - 1]
        assert stage.seconds == pytest.approx(own)
        held = group.bytes[..., stage.first : stage.end].sum(axis=-1).max()
        assert stage.bytes == held + group.fixed <= group.room
        before = stage.group
    assert found.slowest == max(stage.seconds for stage in found.stages)
    assert found.total == pytest.approx(sum(stage.seconds for stage in found.stages))


@pytest.mark.parametrize("requests", [1.0, 3.0, 20.0, math.inf])
@pytest.mark.parametrize("room", [math.inf, 40.0])
@pytest.mark.parametrize("idle", [True, False])
def test_a_chain_is_cut_as_well_as_any_way_there_is(requests: float, room: float, idle: bool) -> None:
    for seed in range(12):
        case = chain(seed, layers=4 + seed % 4, kinds=1 + seed % 3, room=room)
        ways = list(every_split(*case, idle))
        if not ways:
            with pytest.raises(InputError, match=r"no stages from pools of 2 and 2 devices hold all|alone needs"):
                split(*case, requests=requests, idle=idle)
            continue
        found = split(*case, requests=requests, idle=idle)
        check(found, *case)
        used = np.sum([case[0][stage.group].devices for stage in found.stages], axis=0)
        assert idle or used.tolist() == case[1]
        if math.isinf(requests):
            slowest = min(one for one, _ in ways)
            assert found.slowest == pytest.approx(slowest)
            assert found.total == pytest.approx(min(total for one, total in ways if one <= slowest * (1 + 1e-9)))
        else:
            least = min(total + (requests - 1) * one for one, total in ways)
            assert found.seconds(requests) == pytest.approx(least)


def test_a_heavy_head_gets_fewer_layers_beside_it() -> None:
    seconds = np.array([2.0, *[1.0] * 12, 4.0])
    group = Group("a node", (1,), seconds, np.zeros(14))
    found = split([group], [3], np.zeros((1, 1, 14)))
    assert found.slowest == 6.0 and [(stage.first, stage.end) for stage in found.stages] == [(0, 5), (5, 11), (11, 14)]
    alone = split([group], [3], np.full((1, 1, 14), 0.5), requests=1)
    assert [(stage.first, stage.end) for stage in alone.stages] == [(0, 14)]


def test_unequal_groups_take_layers_by_what_they_do_and_hold() -> None:
    large = Group("4 devices", (4,), np.full(9, 1.0), np.full(9, 1.0), room=9)
    small = Group("2 devices", (2,), np.full(9, 2.0), np.full(9, 2.0), room=9)
    free = np.zeros((2, 2, 9))
    found = split([large, small], [6], free)
    assert sorted(stage.end - stage.first for stage in found.stages) == [3, 6] and found.slowest == 6.0
    tight = split([large, Group("2 devices", (2,), small.seconds, small.bytes, room=4)], [6], free)
    assert sorted(stage.end - stage.first for stage in tight.stages) == [2, 7] and tight.slowest == 7.0


def test_a_chain_that_fits_nowhere_says_what_is_missing() -> None:
    handed = np.zeros((1, 1, 3))
    nbytes = np.array([1e9, 9e9, 1e9])
    with pytest.raises(InputError) as caught:
        split([Group("one H200", (1,), np.ones(3), nbytes, room=8e9, fixed=1e9)], [4], handed)
    assert str(caught.value) == "layer 1 alone needs 10.00 GB on one H200, which has 8.00 GB: 2.00 GB are missing"
    with pytest.raises(InputError, match=r"no stages from pools of 2 devices hold all 3 layers, which take 11.00 GB"):
        split([Group("one H200", (1,), np.ones(3), nbytes, room=9e9)], [2], handed)
    with pytest.raises(InputError, match="layer 0: no group of devices can run it"):
        split([Group("one H200", (1,), np.full(3, np.inf), nbytes)], [2], handed)
    with pytest.raises(InputError, match=r"are the most to compare: put equal devices into one pool"):
        split([Group("one H200", (1,) * 40, np.ones(3), nbytes)], [1] * 40, handed)


def test_eighty_layers_on_sixty_four_devices_take_few_cuts() -> None:
    random = np.random.default_rng(0)
    base = random.uniform(1, 2, 82)
    groups = [Group(f"{size}", (size,), base / size**0.8, base / size, room=40.0) for size in (1, 2, 4, 8)]
    found = split(groups, [64], np.full((4, 4, 82), 0.01))
    assert sum(groups[stage.group].devices[0] for stage in found.stages) <= 64
    assert found.slowest >= float((base / 64**1.0).sum())
    assert found.cuts < 65 * 4 * 83 * 83 * 2  # of devices, kinds, cuts; once for the slowest, once for the sum
    more = split(groups, [10**6], np.full((4, 4, 82), 0.01))
    assert len(more.stages) == 82 and more.cuts < 11 * found.cuts  # a stage has a layer at least


def graph(seed: int, count: int) -> list[Part]:
    """Return parts of a random graph, some of which read several."""
    random = np.random.default_rng(seed)
    parts: list[Part] = []
    for place in range(count):
        reads = tuple(part.name for part in parts if random.random() < 0.4)
        numbers = [float(random.integers(1, 9)) for _ in range(3)]
        parts.append(Part(f"p{place}", *numbers, reads))
    return parts


def every_stage(parts: list[Part], stages: int, room: float) -> Iterator[tuple[float, float, tuple[int, ...]]]:
    """Yield slowest stage, bytes sent and stages of all parts, wherever that is legal."""
    number = {part.name: place for place, part in enumerate(parts)}
    for placed in itertools.product(range(stages), repeat=len(parts)):
        if any(placed[number[source]] > own for part, own in zip(parts, placed, strict=True) for source in part.reads):
            continue
        loads, held = np.zeros(stages), np.zeros(stages)
        for part, own in zip(parts, placed, strict=True):
            loads[own] += part.seconds
            held[own] += part.bytes
        if held.max() <= room:
            yield float(loads.max()), sent(parts, placed), placed


@pytest.mark.parametrize("seed", range(8))
def test_a_graph_is_staged_as_well_as_any_way_there_is(seed: int) -> None:
    stages, room = 2 + seed % 2, 22.0 if seed % 4 == 3 else math.inf
    parts = graph(seed, 7)
    ways = list(every_stage(parts, stages, room))
    mean = sum(part.seconds for part in parts) / stages
    least = min(one for one, _, _ in ways)
    for unbalance in (None, 0.08, 0.5):
        allowed = least if unbalance is None else mean * (1 + unbalance)
        fitting = [(nbytes, placed) for one, nbytes, placed in ways if one <= allowed * (1 + 1e-9)]
        for place, (first, last) in enumerate(windows(parts, stages, allowed)):
            assert all(first <= placed[place] <= last for _, placed in fitting)
        if not fitting:
            with pytest.raises(InputError, match=rf"the slowest takes at least {least:.4g} s"):
                stage_graph(parts, stages, unbalance=unbalance, room=room)
            continue
        found = stage_graph(parts, stages, unbalance=unbalance, room=room)
        placed = tuple(found.stage[part.name] for part in parts)
        assert (found.slowest, found.sent, placed) in ways
        assert found.slowest <= allowed * (1 + 1e-9)
        assert found.sent == pytest.approx(min(nbytes for nbytes, _ in fitting)) and found.bound <= found.sent + 1e-6


def test_a_chain_staged_as_a_graph_is_as_balanced_as_a_chain() -> None:
    seconds = np.random.default_rng(1).uniform(1, 3, 12)
    parts = [Part(f"{place}", one, reads=(f"{place - 1}",) * (place > 0)) for place, one in enumerate(seconds)]
    of_chain = split([Group("a node", (1,), seconds, np.zeros(12))], [3], np.zeros((1, 1, 12)))
    assert stage_graph(parts, 3, unbalance=None).slowest == pytest.approx(of_chain.slowest)


def test_towers_are_not_cut_where_they_send_much() -> None:
    """An image tower of large results and a text tower of small ones, joined at the end."""
    image = [Part(f"image {n}", 1.0, 0.0, 50.0, (f"image {n - 1}",) if n else ()) for n in range(4)]
    image[-1] = Part("image 3", 1.0, 0.0, 1.0, ("image 2",))
    text = [Part(f"text {n}", 1.0, 0.0, 2.0, (f"text {n - 1}",) if n else ()) for n in range(3)]
    parts = [*image, *text, Part("joined", 1.0, 0.0, 0.0, ("image 3", "text 2"))]
    found = stage_graph(parts, 2)
    assert {found.stage[f"image {n}"] for n in range(4)} == {0} and found.sent == 1.0 and found.slowest == 4.0
    few = stage_graph(parts, 2, unbalance=0.0).variables
    assert few < stage_graph(parts, 2, unbalance=1.0).variables  # windows close what balance rules out


def test_parts_that_no_stage_holds_are_named() -> None:
    parts = [Part("a", 1.0, 3e9), Part("b", 1.0, 9e9, reads=("a",))]
    with pytest.raises(InputError) as caught:
        stage_graph(parts, 2, room=8e9)
    assert str(caught.value) == "no 2 stages of 8.00 GB hold all parts, which take 12.00 GB, b alone 9.00 GB"


def test_staging_a_graph_says_which_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'tersor\[plan\]'"):
        stage_graph([Part("a", 1.0)], 1)
