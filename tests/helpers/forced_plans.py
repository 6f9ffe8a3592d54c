"""Plans as tests want them: axes that are given, and every block cut the way that is named, whatever it costs."""

from __future__ import annotations

from collections.abc import Mapping

from tersor.hardware import chip_named
from tersor.planner import links
from tersor.planner.choose import Asked, assembled
from tersor.planner.cost import Kernels
from tersor.planner.mesh import Mesh
from tersor.planner.parts import Model, Workload
from tersor.planner.plan import Plan
from tersor.planner.rules import MEGATRON, Rule

SMALL = Workload(batch=4, context=128, prompt=32)


def forced(
    model: Model, shape: str, tensor: int, ways: Mapping[str, str] = MEGATRON, workload: Workload = SMALL
) -> Plan:
    """Return the plan of a tensor group of so many ranks and as many replicas as there are groups.

    Args:
        model: what is planned.
        shape: of the mesh, such as `1x2`.
        tensor: ranks of a stage.
        ways: block -> way; what is not named, or cannot be cut so, is replicated.
        workload: what a replica is to do.
    """
    chip = chip_named("h200")
    prices = links.of_chip(chip)
    asked = Asked(model, Mesh.of(None, shape, 8), workload, Kernels(chip), prices)
    rule = Rule("forced", lambda mesh: (tensor,), lambda setting: dict(ways))
    (ruled,) = rule.tried(asked.setting, asked.mesh, workload)
    assert ruled.made is not None
    return assembled(asked, ruled.made, 0.0, 0.0, (), ())
