"""How does an engine run a plan? As a placement whose every rank has what the plan says, byte for byte, or not at all.

A plan says the slices of every weight; where layers of a stage agree, the placement says them as cuts, and else leaves
them even. Then the part that each rank would load (`models.share`) is held against the plan, weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tersor.checkpoint.names import Form
from tersor.checkpoint.source import Source
from tersor.errors import InputError
from tersor.formats import Scheme
from tersor.layouts.shard import Part, Span
from tersor.models.config import DecoderConfig
from tersor.models.load import described
from tersor.models.names import NAMES, Names
from tersor.models.parts import digest_of, forms_of, of_config, parts_of
from tersor.models.share import Share
from tersor.planner import served
from tersor.planner.check import sound
from tersor.planner.placement import Placement, Stage
from tersor.planner.plan import Cut, Plan, Slice

_WHOLE = {"heads": "attention", "channels": "down", "experts": "experts"}
"""What a stage may have whole -> the block that says so."""


def placed(plan: Plan, source: Source) -> Placement:
    """Return the placement of a checkpoint that a plan asks for.

    Raises:
        InputError: the plan is for another model, is not sound, or the engine does not run it; the line says why.
        ShapeError: weights do not allow its cuts.
    """
    digest = digest_of(source)
    if plan.digest != digest:
        raise InputError(f"the plan is for model {plan.digest} ({plan.model}), and {source.label} is {digest}")
    config, names, expected, forms = described(source)
    served.check(plan)
    sound(plan, parts_of(config, names, expected, forms, source.label, digest))
    return placement_of(plan, config, names, forms)


def placed_config(plan: Plan, raw: Mapping[str, Any], name: str, scheme: Scheme | None) -> Placement:
    """Return the same for the model of a config.json with all linears in one scheme, as `models.parts.of_config` has.

    Raises:
        InputError, ShapeError: as for `placed`.
    """
    model = of_config(raw, name, scheme)
    if plan.digest != model.digest:
        raise InputError(f"the plan is for model {plan.digest} ({plan.model}), and {name} is {model.digest}")
    served.check(plan)
    sound(plan, model)
    config = DecoderConfig.from_dict(raw)
    names = NAMES[config.architecture]
    return placement_of(plan, config, names, forms_of(config, names, scheme))


def placement_of(plan: Plan, config: DecoderConfig, names: Names, forms: Mapping[str, Form]) -> Placement:
    """Return the placement that a plan asks for.

    Args:
        plan: of this model, sound, and of ways that the engine has.
        config, names: of it.
        forms: module -> scheme of its packed weight, or the levels of its output features.

    Raises:
        InputError: the engine does not run the plan; the line says why.
        ShapeError: weights do not allow its cuts.
    """
    weights = {(cut.module, layer): cut for cut in plan.cuts for layer in cut.layers or (-1,)}
    ways = {one.block: one.way for one in plan.chosen}
    stages = tuple(_stage(number, plan, weights, ways, config, names) for number in range(plan.pipeline))
    found = Placement(stages, plan.data)
    if found.layers != len(config.layers):
        raise InputError(f"the plan is of {found.layers} layers, and the model has {len(config.layers)}")
    for rank in range(found.ranks):
        _hold(plan, Share.of(config, names, forms, found.place(rank)), weights, config, names)
    return found


def _stage(
    number: int,
    plan: Plan,
    weights: Mapping[tuple[str, int], Cut],
    ways: Mapping[str, str],
    config: DecoderConfig,
    names: Names,
) -> Stage:
    own, ranks = plan.stages[number], plan.tensor
    layers, pattern = (own.first, own.last), names.base + names.layer
    if ranks == 1:
        return Stage(layers=layers)
    whole = {kind for kind, block in _WHOLE.items() if ways.get(block) == "replicate"}
    end = names.base + names.embedding if own.embedding else names.head if own.head else ""
    if not end or weights[end, -1].slices[0].rows is None:
        whole.add("vocabulary")
    cuts: dict[str, tuple[int, ...]] = {}

    def say(kind: str, which: Callable[[Slice], Span | None], modules: Mapping[int, str]) -> None:
        """Say the cuts of a kind where all layers that have them agree."""
        found = {
            tuple(which(one) for one in weights[module, layer].slices)
            for layer, module in modules.items()
            if (module, layer) in weights
        }
        if kind not in whole and len(found) == 1:
            spans = found.pop()
            if None not in spans:
                cuts[kind] = (0, *(span[1] for span in spans if span is not None))

    inside = range(*layers)
    heads = {one.heads for one in plan.chosen if one.block == "attention" and one.heads}
    if len(heads) == 1 and "heads" not in whole:
        cuts["heads"] = (0, *(last for _, last in next(iter(heads))))
    dense = {layer: pattern + names.down for layer in inside if config.layers[layer].experts is None}
    routed = {layer: layer for layer in inside if config.layers[layer].experts is not None}
    down = pattern + (names.fused[1] if names.fused else names.expert[2] if names.expert else "")
    say("channels", lambda one: one.columns, dense)
    if routed:
        dealt = ways["experts"] == "expert"
        if "experts" not in whole:
            if dealt:
                say("experts", lambda one: one.experts, dict.fromkeys(routed, down))
            else:
                say("expert_channels", lambda one: one.columns, dict.fromkeys(routed, down))
            if names.shared_down:
                say("shared_channels", lambda one: one.columns, dict.fromkeys(routed, pattern + names.shared_down))
    if "vocabulary" not in whole:
        say("vocabulary", lambda one: None if one.rows is None else one.rows[0], {-1: end})
    groups = ranks if routed and ways.get("experts") == "expert" else 1
    return Stage(layers=layers, ranks=ranks, expert_groups=groups, cuts=cuts, whole=tuple(sorted(whole)))


def _hold(
    plan: Plan, share: Share, weights: Mapping[tuple[str, int], Cut], config: DecoderConfig, names: Names
) -> None:
    """Hold that a rank would load what a plan says it has, of every weight of its stage.

    Raises:
        InputError: it would not; the line names the weight.
    """
    place = share.place
    ends = [names.base + names.embedding] * place.first + [names.head] * place.last
    for (module, layer), cut in weights.items():
        inside = share.layers[0] <= layer < share.layers[1]
        if not inside and not (layer < 0 and cut.module in ends):
            continue
        wanted = cut.slices[place.rank]
        count = config.layers[layer].experts.count if inside and "{expert}" in module else 1  # type: ignore[union-attr]
        for expert in range(*(wanted.experts or (0, count))) if "{expert}" in module else (0,):
            name = module.format(layer=layer, expert=expert)
            part = share.parts.get(name, Part())
            if (part.rows, part.columns) != (wanted.rows, wanted.columns):
                raise InputError(
                    f"the engine does not run this plan: rank {place.rank} of stage {place.index} has rows "
                    f"{wanted.rows} and columns {wanted.columns} of {name}, and would load {part.rows} and "
                    f"{part.columns}"
                )
        if wanted.experts not in (None, share.experts):
            raise InputError(
                f"the engine does not run this plan: rank {place.rank} of stage {place.index} has experts "
                f"{wanted.experts} of {module.format(layer=layer, expert='*')}, and would load {share.experts}"
            )
