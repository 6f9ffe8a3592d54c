"""Which degrees of torchtitan spread a model like a plan? The section `parallelism` of its config.

Names are those of `ParallelismConfig` in torchtitan of 2026-11; `--parallelism.NAME` on its command line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tersor.integrations.plans import limits

if TYPE_CHECKING:
    from tersor.planner.plan import Plan


def settings(plan: Plan) -> str:
    """Return the section as TOML."""
    # Experts are on at least the ranks of a tensor group, and on more by ranks that shard weights.
    own = {
        "data_parallel_replicate_degree": plan.data // plan.expert,
        "data_parallel_shard_degree": plan.expert,
        "tensor_parallel_degree": plan.tensor,
        "enable_sequence_parallel": _sequence(plan),
        "pipeline_parallel_degree": plan.pipeline,
        "expert_parallel_degree": plan.tensor * plan.expert if limits.with_experts(plan) else 1,
    }
    if plan.pipeline > 1:
        layers = limits.layers_of(plan)
        own["pipeline_parallel_first_stage_less_layers"] = max(layers) - layers[0]
        own["pipeline_parallel_last_stage_less_layers"] = max(layers) - layers[-1]
    lines = [f"# {line}" for line in limits.above(plan, "Degrees of torchtitan.", _limits(plan))]
    pairs = [f"{name} = {str(value).lower()}" for name, value in own.items()]
    return "\n".join([*lines, "[parallelism]", *pairs]) + "\n"


def _sequence(plan: Plan) -> bool:
    """Whether a norm is computed of some tokens on every rank, in any phase."""
    return any(one.way == "sequence" for one in plan.chosen if one.block in ("norm", "ffn_norm"))


def _limits(plan: Plan) -> Iterator[str]:
    yield "torchtitan trains: times and bytes of the plan are those of serving"
    yield from limits.uneven(plan, "torchtitan")
    yield from limits.whole_blocks(plan, "torchtitan")
    yield from limits.phases(plan, "torchtitan")
    layers = limits.layers_of(plan)
    if len(set(layers)) > 1:
        yield f"stages of {', '.join(map(str, layers))} layers: torchtitan makes those in the middle as even as can be"
    yield from limits.batches(plan, "torchtitan")
    if plan.expert > 1:
        yield f"{plan.expert} replicas that have experts together shard all weights there, not experts alone"
    if plan.tensor > 1 and any(one.way == "tensor" for one in limits.chosen(plan, "experts")):
        yield "torchtitan gives every rank whole experts; the plan cuts each by all ranks of a stage"
