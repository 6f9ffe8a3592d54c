"""Where does a plan stand on its mesh? Nodes with their GPUs, the groups of them, and the links between, as SVG."""

from __future__ import annotations

import html
from itertools import groupby, islice
from typing import NamedTuple

from tersor.planner.links import SEND, Links, Table
from tersor.planner.mesh import Axes, Mesh
from tersor.planner.plan import Plan
from tersor.report.svg import COLOURS, Markup, element

MOST_NODES = 8
"""Nodes that are drawn; those beyond are like them."""

_ROW = 8
"""GPUs side by side."""
_GPU, _HIGH, _GAP = 58, 38, 16
_LEFT, _PAD, _TOP, _ROWS, _BELOW, _BETWEEN = 150, 14, 46, 32, -8, 26
"""Of a GPU, of a node beside and in it, and from a row or a node to the next one."""


class Seat(NamedTuple):
    """Whose part of the model a GPU has: replica, stage, and rank of the stage."""

    replica: int
    stage: int
    rank: int


def axes_of(plan: Plan) -> Axes:
    """Return the axes of a plan."""
    mesh = Mesh.of(None, plan.mesh, plan.devices)
    return Axes(mesh, plan.data, plan.pipeline, plan.tensor, plan.expert)


def seats(axes: Axes, most: int) -> dict[int, Seat]:
    """Return what the first so many GPUs have; one that is idle is not there."""
    found: dict[int, Seat] = {}
    for replica in range(axes.data):
        for stage in range(axes.pipeline):
            own = axes.devices(replica, stage)
            if own[0] >= most:
                return found
            found |= {device: Seat(replica, stage, rank) for rank, device in enumerate(own) if device < most}
    return found


def speed(table: Table) -> str:
    """Return a link's bandwidth and the least time of a call, as text."""
    least = min(points[0][1] for points in table.rows.values())
    return f"{table.bandwidth / 1e9:,.0f} GB/s, from {least:g} us"


def mesh_picture(plan: Plan, links: Links | None) -> Markup:
    """Return the picture.

    Args:
        plan: what is drawn.
        links: whose tables the plan was priced with; `None` writes no bandwidths.
    """
    axes = axes_of(plan)
    nodes = axes.mesh.nodes[:MOST_NODES]
    seated = seats(axes, sum(nodes))
    parts: list[Markup] = []
    y, first, middles = 4.0, 0, []
    wide = 2 * _PAD + min(_ROW, max(nodes)) * (_GPU + _GAP) - _GAP
    for node, size in enumerate(nodes):
        rows = -(-size // _ROW)
        high = _TOP + rows * (_HIGH + _ROWS) + _BELOW
        parts.append(element("rect", x=_LEFT, y=y, width=wide, height=high, rx=6, class_="node"))
        parts.append(element("text", f"node {node}", x=_LEFT + _PAD, y=y + 16, class_="strong"))
        if links is not None and size > 1:
            words = f"inside: {speed(links.inside[SEND])}"
            parts.append(element("text", words, x=_LEFT + wide - _PAD, y=y + 16, class_="small end"))
        for row in range(rows):
            own = range(first + row * _ROW, first + min(size, (row + 1) * _ROW))
            parts += _row(own, seated, plan, y + _TOP + row * (_HIGH + _ROWS))
        middles.append(y + high / 2)
        y, first = y + high + _BETWEEN, first + size
    if len(nodes) > 1:
        parts = [*_network(middles, seated, nodes, links), *parts]
    words = f"{plan.axes()} on {plan.mesh}: {len(nodes)} of {len(axes.mesh.nodes)} nodes"
    return element(
        "svg",
        element("title", html.escape(words)) + "".join(parts),
        viewBox=f"0 0 {_LEFT + wide + 4} {y - _BETWEEN + 4:g}",
        role="img",
        aria_label=words,
        class_="mesh",
    )


def colour(seat: Seat, plan: Plan) -> str:
    """Return the class of a GPU's colour: of its stage, or of its replica where there is one stage."""
    return f"c{(seat.stage if plan.pipeline > 1 else seat.replica) % COLOURS}"


def _row(own: range, seated: dict[int, Seat], plan: Plan, y: float) -> list[Markup]:
    """Draw GPUs side by side: the groups of them, what hands on to what, and the wire of the node under them."""
    parts: list[Markup] = []
    start = own[0]

    def left(device: int) -> float:
        return _LEFT + _PAD + (device - start) * (_GPU + _GAP)

    wire = y + _HIGH + 10
    parts.append(
        element("line", x1=left(own[0]) + _GPU / 2, x2=left(own[-1]) + _GPU / 2, y1=wire, y2=wire, class_="wire")
    )
    for device in own:
        middle = left(device) + _GPU / 2
        parts.append(element("line", x1=middle, x2=middle, y1=y + _HIGH, y2=wire, class_="wire"))
    for key, members in groupby(own, key=lambda device: seated[device][:2] if device in seated else None):
        devices = list(members)
        x, width = left(devices[0]), len(devices) * (_GPU + _GAP) - _GAP
        if key is None:
            for device in devices:
                parts.append(element("rect", x=left(device), y=y, width=_GPU, height=_HIGH, rx=4, class_="node"))
                parts.append(_words(left(device), y, f"GPU {device}", "idle"))
            continue
        kind = colour(seated[devices[0]], plan)
        label = f"r{key[0]} s{key[1]}"
        parts.append(element("rect", x=x - 3, y=y - 3, width=width + 6, height=_HIGH + 6, rx=6, class_=f"group {kind}"))
        parts.append(element("text", label, x=x, y=y - 7, class_="small"))
        for device in devices:
            seat = seated[device]
            title = f"GPU {device}: replica {seat.replica}, stage {seat.stage}, rank {seat.rank} of {plan.tensor}"
            box = element("rect", x=left(device), y=y, width=_GPU, height=_HIGH, rx=4, class_=f"gpu {kind}")
            inside = element("title", title) + box + _words(left(device), y, f"GPU {device}", f"t{seat.rank}")
            parts.append(element("g", inside, data_device=device))
        after = seated.get(devices[-1] + 1)
        if after is not None and devices[-1] + 1 in own and after[:2] == (key[0], key[1] + 1):
            at, level = left(devices[-1]) + _GPU + _GAP / 2, y + _HIGH / 2
            points = f"{at - 3:g},{level - 5:g} {at + 4:g},{level:g} {at - 3:g},{level + 5:g}"
            parts.append(element("polygon", points=points, class_="arrow"))
    return parts


def _words(x: float, y: float, first: str, second: str) -> Markup:
    middle = x + _GPU / 2
    above = element("text", first, x=middle, y=y + 16, class_="middle strong")
    return Markup(above + element("text", second, x=middle, y=y + 31, class_="middle small"))


def _network(
    middles: list[float], seated: dict[int, Seat], nodes: tuple[int, ...], links: Links | None
) -> list[Markup]:
    """Draw the network that joins nodes, and which stages hand on over it."""
    x = _LEFT - 22
    parts = [element("line", x1=x, x2=x, y1=middles[0], y2=middles[-1], class_="wire")]
    for middle in middles:
        parts.append(element("line", x1=x, x2=_LEFT, y1=middle, y2=middle, class_="wire"))
    parts.append(element("text", "between nodes", x=x - 8, y=middles[0] + 4, class_="small end"))
    if links is not None:
        bandwidth, _, least = speed(links.between[SEND]).partition(", ")
        parts.append(element("text", bandwidth, x=x - 8, y=middles[0] + 19, class_="small end"))
        parts.append(element("text", least, x=x - 8, y=middles[0] + 34, class_="small end"))
    last = -1
    for node, size in enumerate(islice(nodes, len(nodes) - 1)):
        last += size
        own, after = seated.get(last), seated.get(last + 1)
        if own is None or after is None:
            continue
        if own.replica != after.replica:
            continue
        words = f"s{own.stage} to s{after.stage}" if own.stage != after.stage else f"s{own.stage} in both nodes"
        middle = (middles[node] + middles[node + 1]) / 2
        if own.stage != after.stage:
            points = f"{x - 5:g},{middle - 4:g} {x + 5:g},{middle - 4:g} {x:g},{middle + 4:g}"
            parts.append(element("polygon", points=points, class_="arrow"))
        parts.append(element("text", words, x=x - 10, y=middle + 4, class_="small end"))
    return parts
