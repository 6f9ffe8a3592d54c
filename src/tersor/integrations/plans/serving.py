"""Which flags of a server spread a model like a plan? Those of vLLM 0.26 and SGLang 0.5.23, by their parsers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tersor.integrations.plans import limits

if TYPE_CHECKING:
    from tersor.planner.plan import Plan


def vllm(plan: Plan) -> str:
    """Return the command of vLLM.

    Its data parallel engines share the experts of a mixture, whole or not: replicas that do not are commands
    of their own.
    """
    engines = plan.expert if limits.with_experts(plan) else plan.data
    flags = ["--tensor-parallel-size", str(plan.tensor), "--pipeline-parallel-size", str(plan.pipeline)]
    flags += ["--data-parallel-size", str(engines)] if engines > 1 else []
    flags += ["--enable-expert-parallel"] if limits.whole_experts(plan) else []
    flags += ["--max-num-seqs", str(plan.workload["batch"]), "--max-model-len", str(plan.workload["context"])]
    flags += ["--kv-cache-dtype", "fp8"] if plan.workload["kv_bytes"] == 1 else []
    said = _limits(plan, "vLLM", "--nnodes, --node-rank and --master-addr")
    command = ["vllm", "serve", shlex.quote(plan.model)]
    return _written(plan, "vLLM 0.26", plan.data // engines, said, "VLLM_PP_LAYER_PARTITION", [*command, *flags])


def sglang(plan: Plan) -> str:
    """Return the command of SGLang: replicas that have experts together are one tensor group, apart in attention."""
    ranks, replicas = plan.tensor * plan.expert, plan.data // plan.expert
    flags = ["--tp-size", str(ranks), "--pp-size", str(plan.pipeline)]
    flags += ["--dp-size", str(replicas)] if replicas > 1 else []
    flags += ["--attn-dp-size", str(plan.expert)] if plan.expert > 1 else []
    flags += ["--ep-size", str(ranks)] if limits.whole_experts(plan) and ranks > 1 else []
    rows = plan.workload["batch"] * plan.expert
    flags += ["--max-running-requests", str(rows), "--context-length", str(plan.workload["context"])]
    flags += ["--kv-cache-dtype", "fp8_e4m3"] if plan.workload["kv_bytes"] == 1 else []
    said = _limits(plan, "SGLang", "--nnodes, --node-rank and --dist-init-addr")
    command = ["python", "-m", "sglang.launch_server", "--model-path", shlex.quote(plan.model)]
    return _written(plan, "SGLang 0.5.23", 1, said, "SGLANG_PP_LAYER_PARTITION", [*command, *flags])


def _written(plan: Plan, system: str, runs: int, said: Iterator[str], variable: str, words: Sequence[str]) -> str:
    """Return comments and a command, an option a line.

    Args:
        plan: what is written.
        system: whose flags these are, with its version.
        runs: commands that the plan is, each on GPUs of its own.
        said: what of the plan the flags do not say.
        variable: of the environment, that has the layers of every stage.
        words: of the command.
    """
    what = f"Flags of {system}."
    if runs > 1:
        own = plan.data // runs * plan.pipeline * plan.tensor
        what = f"Flags of {system}: {runs} such commands run side by side, each on {own} GPUs of its own."
    lines = [f"# {line}" for line in limits.above(plan, what, said)]
    shown = [f"{variable}={','.join(map(str, limits.layers_of(plan)))}"] if plan.pipeline > 1 else []
    command = " ".join([*shown, *words]).replace(" --", " \\\n    --")
    return "\n".join([*lines, command]) + "\n"


def _limits(plan: Plan, system: str, options: str) -> Iterator[str]:
    heads = limits.heads_of(plan)
    if any(sum(own) % plan.tensor for own in heads):
        yield f"{system} does not start: it wants as many query heads on every rank, and {sum(heads[0])} heads are not"
    yield from limits.uneven(plan, system)
    yield from limits.whole_blocks(plan, system)
    yield from limits.phases(plan, system)
    yield from limits.batches(plan, system)
    wide = max(map(int, plan.mesh.partition("x")[2:] if "x" in plan.mesh else plan.mesh.split("+")))
    if plan.tensor * plan.pipeline > wide:
        yield f"a replica is on several nodes: {system} is started on each of them, with {options}"
