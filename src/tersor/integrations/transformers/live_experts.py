"""The experts of a model in memory, under the names that a checkpoint of it will have: one by one, or fused.

transformers holds them fused either way. Where `save_pretrained` takes them apart, they are split into linear layers,
views of the fused weights, before anything is decided; what stays uncompressed is put together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from tersor.errors import UnsupportedError
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.experts_form import is_experts
from tersor.integrations.transformers.live import Split, move_hooks
from tersor.integrations.transformers.names import merges_experts
from tersor.integrations.transformers.placement import Place, Placement, expert_layers, identity
from tersor.nn.experts import PackedStack


def split(model: Any) -> Split:
    """Split the fused experts of a model of transformers that `save_pretrained` takes apart; `settle` undoes it."""
    done: Split = {}
    converters = [entry for entry in _conversions(model) if isinstance(entry, WeightConverter)]
    merging = [converter for converter in converters if merges_experts(converter)]
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    for name, module in list(model.named_modules()) if merging else ():
        patched = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
        if not is_experts(module) or patched or name.startswith(adapted):
            continue
        held = dict(module._parameters)
        try:
            layers = expert_layers(merging, name, module)
            parts = None if layers is None else PackedExperts(module, *layers)
        except UnsupportedError:
            continue
        if parts is None or layers is None:
            continue
        done[name] = {own: weight for own, weight in held.items() if weight is not None}
        _share(parts, done[name], layers[0])
        move_hooks(module, parts)
        model.set_submodule(name, parts.train(module.training))
    return done


def settle(model: Any, done: Split) -> None:
    """Put experts together again of which none was replaced; give what is left uncompressed memory of its own."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedExperts):
            continue
        if name in done:
            if module.chooser is not None:
                module.chooser.release()
            experts = module.template
            for own, weight in done[name].items():
                experts._parameters[own] = weight
            move_hooks(module, experts)
            model.set_submodule(name, experts)
            continue
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)


def rename_saved(model: Any) -> None:
    """Let `save_pretrained` write packed fused experts under the names that their weights have in a checkpoint."""
    placement = Placement(model)
    for name, module in model.named_modules():
        if isinstance(module, PackedStack) and module.in_state_dict:
            stored = _saved_name(model, name)
            stem = stored.removesuffix(".weight")
            placement.rename_stacked(Place(stem, name, stored, stacked=True), module.own_tensors())
    if placement.renamings or placement.replaced:
        kept = (
            placement.replaced.get(identity(entry), entry) if isinstance(entry, WeightConverter) else entry
            for entry in _conversions(model)
        )
        model._weight_conversions = [*kept, *placement.renamings]


def _conversions(model: Any) -> list[Any]:
    """Return the conversions that `save_pretrained` undoes."""
    loaded = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return list(loaded)
    return [
        entry for entry in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(entry, PrefixChange)
    ]


def _saved_name(model: Any, name: str) -> str:
    """Return the name under which `save_pretrained` writes an uncompressed parameter."""
    undone = [entry.reverse_transform() for entry in reversed(_conversions(model))]
    for converter in (entry for entry in undone if isinstance(entry, WeightConverter)):
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            name = renamed
            break
    for entry in undone:
        if not isinstance(entry, WeightConverter):
            name, _ = entry.rename_source_key(name)
    return name


def _share(parts: PackedExperts, held: Mapping[str, nn.Parameter], inputs: tuple[str, ...]) -> None:
    """Let the layers of split experts be views of the fused weights."""
    fused, down = held[parts.form.fused], held["down_proj"]
    for expert in range(parts.num_experts):
        layers = parts._layers(expert)
        for name, rows in zip(inputs, fused.detach()[expert].chunk(len(inputs)), strict=True):
            layers[name].weight = nn.Parameter(rows, requires_grad=fused.requires_grad)
        layers[parts.output_name].weight = nn.Parameter(down.detach()[expert], requires_grad=down.requires_grad)
