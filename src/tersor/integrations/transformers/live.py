"""A model in memory that is compressed in place: which layers it has, and what transformers has to know afterwards.

A module that is no model of transformers is taken as well; it has then no output head and no config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from tersor.checkpoint.config import QUANT_METHOD, QuantizationConfig
from tersor.checkpoint.modules import Architecture, Embedding, Linear, Target
from tersor.errors import InputError
from tersor.formats import Scheme
from tersor.integrations.transformers import replace as replacing
from tersor.integrations.transformers.architecture import (
    architecture_of,
    is_conv1d,
    linear_shape,
    packable_embedding,
    stacks_of,
)
from tersor.integrations.transformers.experts_form import is_experts
from tersor.nn.packed import PackedModule

Split: TypeAlias = dict[str, dict[str, nn.Parameter]]
"""Name of the experts of a layer -> the parameters that were split, by name, until one of their parts is replaced."""


def of_transformers(model: nn.Module) -> bool:
    """Whether this is a model of transformers itself."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def check_plain(model: Any) -> None:
    """Check that a model of transformers is not compressed yet.

    Raises:
        InputError: it is, by whatever method.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is not None and of_transformers(model):
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        method = getattr(method, "value", method)
        raise InputError(f"{type(model).__name__} is already compressed by {method}: start from the uncompressed model")


def label(model: Any) -> str:
    """Return what the model was loaded from, or the name of its class."""
    named = getattr(getattr(model, "config", None), "name_or_path", "")
    return str(named).rstrip("/").rpartition("/")[2] or type(model).__name__


def architecture(model: nn.Module) -> Architecture:
    """List the layers of a model, under the names of its own state dict."""
    if of_transformers(model):
        return dataclasses.replace(architecture_of(model), find=_as_it_is, missing=_nothing)
    linears: dict[str, Linear] = {}
    embeddings: dict[str, Embedding] = {}
    stacks: dict[str, Linear] = {}
    for name, module in model.named_modules():
        if is_conv1d(module) or isinstance(module, nn.Linear):
            shape = linear_shape(module) or (module.out_features, module.in_features)
            linears[name] = Linear(shape, is_conv1d(module))  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding):
            unpackable = "" if packable_embedding(module) else type(module).__name__
            embeddings[name] = Embedding((module.num_embeddings, module.embedding_dim), unpackable)
        elif is_experts(module):
            stacks.update(stacks_of(name, module))
    names = frozenset(name for name, _ in model.named_modules())
    name = type(model).__name__
    return Architecture(name, linears, embeddings, {}, stacks, names, "", False, "", _as_it_is, _nothing)


def _as_it_is(names: Iterable[str]) -> dict[str, Target]:
    return {name: Target(name, name) for name in names}


def _nothing(names: Iterable[str]) -> list[str]:
    return []


def unpatched(module: nn.Module) -> bool:
    """Whether a module computes what its class does: nobody patched its forward."""
    return "forward" not in module.__dict__ or hasattr(module, "_hf_hook")


def packable(module: nn.Module) -> bool:
    """Whether a packed layer computes what this one does: nobody patched its forward or reads its weight himself."""
    return unpatched(module) and replacing.packable(module)


def find_ties(model: Any, source: Any, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """Find the output heads that will share a packed embedding, and take them out of what transformers ties."""
    if not of_transformers(model):
        return {}
    from tersor.integrations.transformers import packing
    from tersor.integrations.transformers.placement import Placement

    return packing.find_ties(model, source, Placement(model), schemes)


def split_experts(model: nn.Module) -> Split:
    """Split fused experts that a checkpoint of the model stores one by one; `settle_experts` undoes it."""
    if not of_transformers(model):
        return {}
    from tersor.integrations.transformers.live_experts import split

    return split(model)


def settle_experts(model: nn.Module, done: Split) -> None:
    """Put experts together again of which none was replaced, after `split_experts`."""
    if of_transformers(model):
        from tersor.integrations.transformers.live_experts import settle

        settle(model, done)


def move_hooks(old: Any, new: nn.Module) -> None:
    """Let the hooks on one module be those of another, accelerate's too."""
    for hooks in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(new, hooks, getattr(old, hooks))
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


def replace(
    model: nn.Module, name: str, scheme: Scheme, tensors: Mapping[str, torch.Tensor], stacked: bool = False
) -> PackedModule:
    """Replace a layer by a packed one that holds these tensors; hooks on the old one move to it.

    Args:
        model: holds the layer.
        name: of the layer, or of a parameter that holds the weights of all experts of one, where `stacked`.
        scheme: of the packed layer.
        tensors: by their names.
        stacked: whether they are the weights of all experts.
    """
    new: nn.Module
    if stacked:
        owner = name.rpartition(".")[0]
        old, experts = model.get_submodule(owner), replacing.fused_experts(model, owner)
        new = replacing.swap_stack(model, name, scheme)
        if old is not experts:
            move_hooks(old, experts)
    else:
        old = model.get_submodule(name)
        new = replacing.swap_packed(model, name, scheme)
        move_hooks(old, new)
    assert isinstance(new, PackedModule)
    for key, tensor in tensors.items():
        setattr(new, key, tensor)
    if not stacked:
        new.prepare(new.dtype)
    return new


def finish(model: Any, config: QuantizationConfig, heads: Mapping[str, str]) -> None:
    """Join experts, tie output heads, and tell a model of transformers what it is now, as loading does."""
    from tersor.integrations.transformers.packing import join_experts, tie_heads

    together = join_experts(model)
    if not of_transformers(model):
        return
    from tersor.integrations.transformers import whole_model
    from tersor.integrations.transformers.live_experts import rename_saved
    from tersor.integrations.transformers.quantizer import TersorConfig, TersorHfQuantizer

    whole_model.register()
    tie_heads(model, heads)
    rename_saved(model)
    stated = TersorConfig.from_parsed(config)
    model.config.quantization_config = stated
    model.hf_quantizer = TersorHfQuantizer(stated, pre_quantized=True)
    model.hf_quantizer.restored(heads, one_by_one=not together)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
