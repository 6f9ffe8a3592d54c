"""Tables of links, and meshes with fast and slow ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tersor.errors import InputError
from tersor.hardware import CHIPS, chip_named
from tersor.planner import links
from tersor.planner.links import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, SEND
from tersor.planner.mesh import Axes, Mesh, factorisations

H200 = links.of_chip(chip_named("h200"))
MIB = 1 << 20


def test_what_was_measured_is_given_and_what_is_between_lies_between() -> None:
    measured = H200.exchange(ALL_REDUCE, 32 * MIB, (8,))
    assert measured.seconds == pytest.approx(197e-6)
    assert "NCCL 2.29 on H200 SXM" in measured.source
    assert 38e-6 < H200.exchange(ALL_REDUCE, 8 * MIB, (8,)).seconds < 197e-6
    ranks = [H200.exchange(ALL_REDUCE, 32 * MIB, (count,)).seconds for count in (2, 3, 4)]
    assert ranks == sorted(ranks) and len(set(ranks)) == 3
    beyond = H200.exchange(ALL_REDUCE, 1024 * MIB, (8,)).seconds
    assert beyond == pytest.approx(2040e-6 + (2040e-6 - 197e-6) * 512 / 480)


def test_small_sums_inside_a_node_are_one_shot_and_large_or_odd_ones_are_not() -> None:
    assert "one-shot" in H200.exchange(ALL_REDUCE, MIB, (8,)).words
    assert "one-shot" not in H200.exchange(ALL_REDUCE, MIB + 16, (8,)).words
    assert "one-shot" not in H200.exchange(ALL_REDUCE, 1000, (8,)).words
    assert "one-shot" not in H200.exchange(ALL_REDUCE, 1024, (8, 8)).words
    assert "one-shot" in H200.exchange(ALL_REDUCE, 1024, (8,)).words


def test_one_rank_and_no_bytes_exchange_nothing() -> None:
    assert H200.exchange(ALL_REDUCE, MIB, (1,)).seconds == 0
    assert H200.exchange(ALL_GATHER, 0, (8,)).seconds == 0


@pytest.mark.parametrize("operation", [ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, SEND])
def test_between_nodes_takes_longer(operation: str) -> None:
    inside, between = ((2,), (1, 1)) if operation == SEND else ((8,), (4, 4))
    near, far = (H200.exchange(operation, 16 * MIB, groups) for groups in (inside, between))
    assert far.seconds > near.seconds and "50 GB/s" in far.source


def test_other_chips_have_the_tables_in_proportion_and_say_so() -> None:
    card = links.of_chip(CHIPS["NVIDIA GeForce RTX 4090"])
    assert card.one_shot is None
    slow = card.exchange(ALL_REDUCE, 32 * MIB, (2,))
    assert slow.seconds > H200.exchange(ALL_REDUCE, 32 * MIB, (2,)).seconds
    assert slow.source.startswith("estimate for NVIDIA GeForce RTX 4090")


def shipped() -> dict[str, Any]:
    """The file of the H200."""
    path = Path(links.__file__).parent / "links" / "h200.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_table_names_its_source() -> None:
    assert all(source for source in H200.sources.values())
    assert len(H200.sources) == 2 * len(links.OPERATIONS) + 1


@pytest.mark.parametrize(
    "change, line",
    [
        ({"kind": "else"}, "holds no links"),
        ({"version": 2}, "is version 2 of the links, and this Tersor reads 1"),
        ({"inside": {}}, "has no table of all_reduce"),
        ({"between": None}, "is no whole file of links"),
        ({"reach": None}, "is no whole file of links"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(json.dumps(shipped() | change), encoding="utf-8")
    with pytest.raises(InputError, match=line):
        links.read(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is no JSON"):
        links.read(path)
    with pytest.raises(InputError, match="No such file"):
        links.read(tmp_path / "none.json")


def test_payloads_that_do_not_ascend_are_refused(tmp_path: Path) -> None:
    raw = shipped()
    raw["inside"]["all_reduce"]["us"]["2"].reverse()
    path = tmp_path / "links.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError, match="payloads of 2 ranks do not ascend"):
        links.read(path)


def test_more_bytes_that_take_less_time_are_refused(tmp_path: Path) -> None:
    raw = shipped()
    raw["inside"]["all_reduce"]["us"]["2"][-1][1] = 1.0
    path = tmp_path / "links.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError, match="times of 2 ranks descend"):
        links.read(path)


def test_meshes_are_read_from_a_number_or_a_shape() -> None:
    assert Mesh.of(8, None, 8).nodes == (8,)
    assert Mesh.of(12, None, 8).nodes == (8, 4)
    assert Mesh.of(None, "2x8", 8).nodes == (8, 8)
    assert Mesh.of(None, "8+4", 8).nodes == (8, 4)
    for text in ("2x8", "8+4", "1x1"):
        assert Mesh.of(None, text, 8).words() == text


@pytest.mark.parametrize(
    "devices, shape, line",
    [
        (None, None, "say how many devices there are"),
        (4, "2x8", "holds 16 devices, and --devices says 4"),
        (None, "2by8", "write NODESxDEVICES"),
        (None, "1x16", "reach 8 devices, not 16"),
        (None, "0x8", "holds no devices"),
        (None, "8+0", "holds no devices"),
        (0, None, "0 devices: at least 1"),
    ],
)
def test_meshes_that_are_none_are_refused(devices: int | None, shape: str | None, line: str) -> None:
    with pytest.raises(InputError, match=line):
        Mesh.of(devices, shape, 8)


def test_groups_are_inside_nodes_or_take_whole_ones() -> None:
    mesh = Mesh((8, 8))
    assert len(mesh.groups(3)) == 4  # two in a node, and two devices idle in each
    assert Axes(mesh, 1, 1, 16).tensor_group == (8, 8)
    assert Axes(mesh, 4, 1, 4).tensor_group == (4,)
    assert mesh.sizes(64) == (1, 2, 3, 4, 5, 6, 7, 8, 16)
    assert len(Mesh((8, 4)).groups(12)) == 1


def test_stages_that_stand_in_two_nodes_are_counted() -> None:
    mesh = Mesh((8, 8))
    assert Axes(mesh, 1, 4, 4).crossings == 1
    assert Axes(mesh, 2, 2, 4).crossings == 0
    assert Axes(mesh, 1, 16, 1).crossings == 1
    assert Axes(Mesh((4, 4, 4)), 1, 3, 4).crossings == 2


def test_experts_of_several_replicas_stand_where_those_do() -> None:
    assert Axes(Mesh((8, 8)), 4, 1, 4, 2).expert_group == (8,)
    assert Axes(Mesh((8, 8)), 4, 1, 4, 4).expert_group == (8, 8)


def test_no_device_has_two_places() -> None:
    axes = Axes(Mesh((8, 4)), 1, 3, 3)
    assert [axes.devices(0, stage) for stage in range(3)] == [(0, 1, 2), (3, 4, 5), (8, 9, 10)]


def test_every_way_to_deal_out_a_mesh_comes_once_and_takes_no_more_than_there_is() -> None:
    found = list(factorisations(Mesh((6,)), 4, 6, 8))
    assert len(set(found)) == len(found)
    assert all(axes.used <= 6 and axes.data % axes.expert == 0 for axes in found)
    assert {(axes.pipeline, axes.tensor) for axes in found} >= {(1, 6), (2, 3), (3, 2), (4, 1), (1, 5)}
    assert any(axes.expert == 3 for axes in found)
