"""How does transformers spread a model like a plan? A `tp_plan` and the arguments of `DistributedConfig`.

Its styles (5.18 on): `colwise` and `rowwise` leave activations cut between them, `colwise_gather_output` and
`rowwise_split_input` do not. Rules that are not given are those that it ships for the model, so that what stays whole
has one. A rule is for all layers alike.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tersor.integrations.plans import limits
from tersor.integrations.transformers.tp_plan import base_plan, expert_rules

if TYPE_CHECKING:
    from tersor.planner.plan import Chosen, Cut, Plan

CUT, GATHERED = "colwise", "colwise_gather_output"
SUMMED, SPLIT = "rowwise", "rowwise_split_input"
WHOLE, VOCABULARY = "replicate", "embedding_rowwise"
_BEFORE = {"out": "attention", "down": "gate_up"}
_BEHIND = {"qkv": "attention", "gate_up": "down"}
"""Block -> the one that gives what it reads, and the one that reads what it gives."""
_ALL = "R"
_WITHOUT_CUT = (_ALL, "S")
"""Layouts in which heads and channels are whole."""


def settings(plan: Plan) -> str:
    """Return Python that makes both, for one replica."""
    rules, said = tp_plan(plan)
    arguments = [f"tp_size={plan.tensor}", "tp_plan=tp_plan"] if plan.tensor > 1 else []
    arguments += [f"pp_size={plan.pipeline}"] if plan.pipeline > 1 else []
    experts = ep_plan(plan)
    if experts:
        arguments += [f"ep_size={plan.tensor}", "ep_plan=ep_plan", 'ep_implementation="all_reduce"']
    more = f"; {plan.data} such runs are the replicas" if plan.data > 1 else ""
    what = (
        f"Settings of transformers for one replica, which torchrun starts on {plan.tensor * plan.pipeline} GPUs{more}."
    )
    lines = [f"# {line}" for line in limits.above(plan, what, [*said, *_limits(plan)])]
    lines += ["from transformers.distributed import DistributedConfig", ""]
    if plan.tensor > 1:
        lines.append(f"tp_plan = {json.dumps(rules, indent=4)}")
    if experts:
        lines.append(f"ep_plan = {json.dumps(experts, indent=4)}")
    lines.append(f"distributed_config = DistributedConfig({', '.join(arguments)})")
    lines.append("# AutoModelForCausalLM.from_pretrained(model, distributed_config=distributed_config)")
    return "\n".join(lines) + "\n"


def tp_plan(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """Return pattern of a module -> style, and what of the plan that does not say."""
    gathered = {cut.block for cut in plan.cuts if cut.block.endswith(".qkv") and _parts_heads(cut)}
    gathered |= {f"{one.group}.qkv" for one in limits.chosen(plan, "out") if one.reads == _ALL and _by_heads(plan, one)}
    gathered |= {cut.block for cut in plan.cuts if cut.block.endswith(".gate_up") and _fused(cut)}
    dealt, known = bool(ep_plan(plan)), {name for name, _ in base_plan(plan.architecture)}
    styles: dict[str, Counter[str]] = {}
    for cut in plan.cuts:
        pattern = cut.module.replace("{layer}", "*")
        if "experts" in pattern.split("."):
            found = {} if dealt else _expert_styles(plan, cut)
        else:
            style = _style(plan, cut, gathered)
            named = style != WHOLE or not cut.layers or any(pattern.endswith(f".{name}") for name in known)
            found = {pattern: style} if named else {}
        for name, style in found.items():
            styles.setdefault(name, Counter())[style] += max(1, len(cut.layers))
    return {name: counts.most_common(1)[0][0] for name, counts in styles.items()}, [*_said(plan, styles, gathered)]


def ep_plan(plan: Plan) -> dict[str, str]:
    """Return the rules of whole experts on ranks of a tensor group; none where transformers has no such ranks."""
    experts = [cut for cut in plan.cuts if cut.slices[0].experts is not None]
    if not experts or plan.expert > 1 or plan.pipeline > 1 or plan.tensor == 1:
        return {}
    spans = [one.experts or (0, 0) for one in experts[0].slices]
    if len({last - first for first, last in spans}) > 1:
        return {}
    found: dict[str, str] = {}
    for cut in experts:
        found |= expert_rules(plan.architecture, cut.module, "base_model_ep_plan")
    return found


def _said(plan: Plan, styles: dict[str, Counter[str]], gathered: set[str]) -> Iterator[str]:
    for name, counts in styles.items():
        if len(counts) > 1:
            words = ", ".join(f"{style} in {count} layers" for style, count in counts.most_common())
            yield f"a rule is for all layers; the plan has for {name}: {words}"
    known = [f".{name}" for name, _ in base_plan(plan.architecture)]
    inside = {cut.module.replace("{layer}", "*") for cut in plan.cuts if cut.layers}
    own = [name for name in styles if name in inside and not any(name.endswith(end) for end in known)]
    if own:
        yield f"transformers ships no rule for {', '.join(own)} of {plan.architecture}: these are untried"
    dealt = any("experts" in cut.module.split(".") and cut.way != WHOLE for cut in plan.cuts)
    if dealt and not any(name.endswith(".experts") for name in (*styles, *ep_plan(plan))):
        yield f"transformers ships no rule for experts of {plan.architecture}: every rank has all of them"
    heads = sorted(block for block in gathered if block.endswith(".qkv"))
    if heads:
        names = ", ".join(heads)
        yield f"transformers cannot cut attention so: {names} is gathered, and attention is whole on every rank"
    inner = sorted(block for block in gathered if not block.endswith(".qkv"))
    if inner:
        yield f"gate and up are one weight, so that {', '.join(inner)} is gathered before it goes on"
    if limits.whole_experts(plan) and not ep_plan(plan):
        why = "of replicas together" if plan.expert > 1 else "of a stage" if plan.pipeline > 1 else "in unequal numbers"
        instead = (
            "cuts each expert by the ranks of the tensor group" if plan.tensor > 1 else "has all of them on every rank"
        )
        yield f"whole experts {why}: transformers {instead} instead"


def _limits(plan: Plan) -> Iterator[str]:
    yield from limits.uneven(plan, "transformers")
    yield from limits.phases(plan, "transformers")
    layers = limits.layers_of(plan)
    whole, rest = divmod(sum(layers), len(layers))
    even = [whole + (stage < rest) for stage in range(len(layers))]
    if layers != even:
        yield f"stages of {_listed(layers)} layers: transformers makes them {_listed(even)}"
    if plan.parts > 1:
        yield f"transformers sends a batch through its stages as one; the plan counts {plan.parts} micro-batches"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _style(plan: Plan, cut: Cut, gathered: set[str]) -> str:
    """Return the style of a weight that is no expert's."""
    one, (group, _, block) = cut.slices[0], cut.block.rpartition(".")
    if one.rows is None and one.columns is None:
        return WHOLE
    if block in ("embedding", "head"):
        return VOCABULARY if block == "embedding" else GATHERED
    before, behind = _chosen(plan, group, _BEFORE.get(block, "")), _chosen(plan, group, _BEHIND.get(block, ""))
    if one.columns is not None:
        first = f"{group}.{'qkv' if block == 'out' else 'gate_up'}"
        return SPLIT if first in gathered or (before is not None and before.gives in _WITHOUT_CUT) else SUMMED
    if block in ("out", "down") or cut.block in gathered:
        return GATHERED
    return GATHERED if behind is not None and behind.reads in _WITHOUT_CUT else CUT


def _chosen(plan: Plan, group: str, block: str) -> Chosen | None:
    phase = limits.first_phase(plan)
    return next((one for one in plan.chosen if (one.phase, one.group, one.block) == (phase, group, block)), None)


def _by_heads(plan: Plan, out: Chosen) -> bool:
    """Whether the attention that a block reads is cut by heads, in the phase whose layouts count."""
    attention = _chosen(plan, out.group, "attention")
    return out.phase == limits.first_phase(plan) and attention is not None and attention.way == "head"


def _fused(cut: Cut) -> bool:
    """Whether a rank has rows of several weights that are stored as one."""
    return any(one.rows is not None and len(one.rows) > 1 for one in cut.slices)


def _parts_heads(cut: Cut) -> bool:
    """Whether slices of as many rows each, one behind the other, are not those of the plan."""
    rows = [one.rows for one in cut.slices]
    if rows[0] is None:
        return False
    width = rows[0][0][1] - rows[0][0][0]
    return rows != [((rank * width, (rank + 1) * width),) for rank in range(len(rows))]


def _expert_styles(plan: Plan, cut: Cut) -> dict[str, str]:
    """Return the styles of experts that are one parameter each for all of a layer, as transformers has them."""
    rules = expert_rules(plan.architecture, cut.module, "base_model_tp_plan")
    one = cut.slices[0]
    whole = one.rows is None and one.columns is None and one.experts is None
    return dict.fromkeys(rules, WHOLE) if whole else rules
