"""Between a checkpoint on disk and a model that transformers has built on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint.config import QuantizationConfig
from tersor.checkpoint.conversion import make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.mixed import read_form
from tersor.checkpoint.names import DENSE, LEVEL, TORCH_DTYPES, Form, Storage, stored_weights
from tersor.checkpoint.source import Source
from tersor.compress import DEFAULT_RECIPE
from tersor.errors import CheckpointError, UnsupportedError
from tersor.formats import Scheme
from tersor.integrations.transformers.architecture import read_architecture
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.foreign import is_foreign
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.integrations.transformers.placement import Place, Placement
from tersor.integrations.transformers.replace import (
    AnyPacked,
    fused_experts,
    packable,
    swap_packed,
    swap_stack,
    swap_tied,
)
from tersor.integrations.transformers.routers import choose_by_logits
from tersor.nn.experts import PackedStack
from tersor.nn.mixed import MixedLinear
from tersor.nn.mixed_stack import MixedStack
from tersor.nn.packed import PackedModule
from tersor.nn.sparse import SparseLinear
from tersor.version import __version__

_WEIGHT = ".weight"


def open_checkpoint(checkpoint_files: Sequence[str], name_or_path: str) -> Source:
    """Open the checkpoint whose files transformers is about to read.

    Args:
        checkpoint_files: paths of the weights.
        name_or_path: what the user asked for, a directory or a Hub id.

    Raises:
        CheckpointError: broken, or in another format than safetensors.
    """
    files = [Path(file) for file in checkpoint_files]
    directory = files[0].parent
    named = Path(name_or_path)
    source = Source(directory, named.resolve().name if named.is_dir() else name_or_path)
    if {file.path.name for file in source.files} != {file.name for file in files}:
        source.close()
        names = ", ".join(file.name for file in files[:2])
        raise CheckpointError(f"{directory}: tersor reads model.safetensors and its shards, and was given {names}")
    return source


def pack_checkpoint(model: Any, source: Source, config: QuantizationConfig) -> tuple[Placement, dict[str, str]]:
    """Put packed layers wherever a tersor checkpoint holds a packed weight, and check that it fits the model.

    Returns:
        The placement, and output head -> packed embedding whose weight it shares, for `tie_heads`.

    Raises:
        CheckpointError: tensors missing, of another shape or dtype, belonging to nothing, or contradicting `config`.
        UnsupportedError: a layer that cannot run packed.
    """
    architecture = read_architecture(source.directory, trust_remote_code=is_foreign(model))
    stems = stored_weights(source.tensors)
    if not stems:
        raise CheckpointError(f"{source.directory}: config.json says tersor, and no tensor is called *.{DENSE.marker}")
    forms: dict[str, Form] = {}
    for stem, module in architecture.modules_of(stems).items():
        represented = config.resolve(*architecture.names_of(module))
        if represented is None:
            raise CheckpointError(f"{source.directory}: {stem} is packed, and quantization_config says to ignore it")
        forms[stem] = read_form(source.tensors, stem, stems[stem], represented)
    placement = Placement(model)
    places = placement.place(stems)
    heads = find_ties(model, source, placement, {place.module: forms[place.stem] for place in places})
    expected = {}
    for place in places:
        layer: AnyPacked
        form = forms[place.stem]
        if place.stacked:
            layer = swap_stack(model, place.module, form)
            placement.rename_stacked(place, layer.own_tensors())
        else:
            layer = swap_packed(model, place.module, form, storage=stems[place.stem])
        mark_initialized(layer)
        _check_stored(source, place, stems[place.stem], layer)
        expected.update({f"{place.stem}.{name}": f"{place.module}.{name}" for name in layer.own_tensors()})
    placement.refresh(expected)
    _check_complete(placement, source)
    return placement, heads


def decide_compression(
    model: Any, source: Source, config: QuantizationConfig
) -> tuple[QuantizationConfig, Placement, dict[str, Scheme], dict[str, str]]:
    """Decide what is compressed while a plain checkpoint is loaded, exactly as the `quantize` verb would.

    The layers stay plain; each is replaced when its weight arrives. Their weights take the dtype they have on disk, so
    that transformers does not round them to the model's dtype first.

    Returns:
        The configuration with what was left alone written out, the placement, module name -> scheme, and output head ->
        embedding whose packed weight it will share, for `tie_heads`.

    Raises:
        InputError: patterns that find nothing, group sizes that do not divide, a broken checkpoint.
        UnsupportedError: a layer that cannot run packed.
    """
    conversion = make_conversion(
        source,
        read_architecture(source.directory, trust_remote_code=is_foreign(model)),
        scheme=config.scheme,
        ignore=config.ignore,
        overrides=config.overrides,
        export=get_export("tersor"),
        shard_bytes=1,
        provenance={"tersor": __version__, "algorithm": DEFAULT_RECIPE, "source": source.label},
    )
    chosen = {step.layer.stem: step for step in conversion.steps if step.layer is not None and step.scheme is not None}
    placement = Placement(model)
    places = placement.place(chosen)
    schemes = {}
    for place in places:
        step = chosen[place.stem]
        owner, _, name = place.parameter.rpartition(".")
        module = fused_experts(model, owner) if place.stacked else model.get_submodule(owner)
        scheme = step.one_scheme
        if place.stacked and scheme is not None:
            placement.rename_stacked(place, DENSE.names_of(scheme))
        if not place.stacked and not packable(module):
            raise UnsupportedError(f"{place.module} is a {type(module).__name__}, which cannot run packed: ignore it")
        shape, dtype = getattr(module, name).shape, TORCH_DTYPES[step.source.spec.dtype]
        setattr(module, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        if scheme is not None:
            schemes[place.module] = scheme
    heads = find_ties(model, source, placement, schemes)
    placement.refresh({place.weight: place.parameter for place in places})
    _check_complete(placement, source)
    return conversion.config, placement, schemes, heads


def tie_heads(model: Any, heads: Mapping[str, str]) -> None:
    """Give output heads the weight of the packed embedding they share it with, once it is loaded."""
    for head, embedding in heads.items():
        model.get_submodule(head).tie(model.get_submodule(embedding))


def mark_initialized(module: Any) -> None:
    """Keep transformers from filling a module with random numbers."""
    module._is_hf_initialized = True


def check_loaded(model: nn.Module) -> None:
    """Check that every packed tensor of a model has arrived, with its own shape and dtype.

    A dtype that transformers changed (modules it keeps in float32) is changed back, which is exact.

    Raises:
        CheckpointError: one has not.
    """
    for name, module in model.named_modules():
        if isinstance(module, MixedLinear | MixedStack) and module.weight_level.device.type == "meta":
            raise CheckpointError(f"{name}.{LEVEL} was not loaded: the checkpoint lacks it")
        if not isinstance(module, PackedModule | SparseLinear) or not module.in_state_dict:
            continue
        for key, form in module.own_tensors().items():
            tensor = getattr(module, key)
            if tensor.device.type == "meta" or tuple(tensor.shape) != form.shape:
                raise CheckpointError(f"{name}.{key} was not loaded: the checkpoint lacks it")
            if tensor.dtype != form.dtype:
                setattr(module, key, tensor.to(form.dtype))


def join_experts(model: nn.Module) -> bool:
    """Let the experts of every layer run as one operator, once they are loaded; tell whether all of them do."""
    found = [module for module in model.modules() if isinstance(module, FusedExperts | PackedExperts)]
    for module in found:
        module.join()
        for stack in module.children():
            if isinstance(stack, PackedStack | MixedStack) and stack.in_state_dict:
                stack.prepare(stack.dtype)
    choose_by_logits(model)
    return all(module.joins for module in found)


def restore_dtypes(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give plain parameters the dtype the model was built with.

    transformers before 5.18 keeps the checkpoint's dtype for a tensor of a quantised model whose name it had to change.

    Args:
        model: loaded.
        dtypes: parameter name -> dtype, from before loading.
    """
    kept = tuple(model._get_dtype_plan(model.dtype))
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(wanted)


def find_ties(model: Any, source: Source, placement: Placement, forms: Mapping[str, Form]) -> dict[str, str]:
    """Take packed modules out of what transformers ties, and put packed heads where a packed embedding is shared.

    A head with a weight of its own in the checkpoint keeps it, whatever config.json says.

    Args:
        model: on the meta device.
        source: its checkpoint.
        placement: names in the checkpoint -> names in the model.
        forms: of the modules that are packed, or will be, by name.

    Returns:
        Output head -> embedding whose packed weight it will share.

    Raises:
        UnsupportedError: something else than an output head shares a packed embedding.
    """
    ties = model.all_tied_weights_keys
    stored = {placement.rename(name)[0] for name in source.tensors}
    heads = {}
    for target, origin in list(ties.items()):
        head, embedding = target.removesuffix(_WEIGHT), origin.removesuffix(_WEIGHT)
        if head not in forms and embedding not in forms:
            continue
        if embedding not in forms and origin not in stored:
            raise UnsupportedError(f"{embedding} has only the weight of {head}, which is packed: ignore {head}")
        del ties[target]
        if head in forms or target in stored:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
            continue
        form = forms[embedding]
        assert isinstance(form, Scheme), "the rows of an embedding have one scheme"
        mark_initialized(swap_tied(model, head, embedding, form))
        heads[head] = embedding
    if heads:
        # Kept from what transformers ties in later calls as well; the config still says that they are tied.
        declared = model._tied_weights_keys
        model._tied_weights_keys = {
            target: origin
            for target, origin in declared.items()
            if not any(re.match(target, head + _WEIGHT) for head in heads)
        }
    return heads


def _check_stored(source: Source, place: Place, storage: Storage, layer: AnyPacked) -> None:
    forms = layer.own_tensors()
    for name, form in forms.items():
        tensor = source.tensors.get(f"{place.stem}.{name}")
        if tensor is None:
            raise CheckpointError(
                f"{source.directory}: {place.stem}.{name} is missing, and {place.stem}.{storage.marker} is there"
            )
        spec = tensor.spec
        if spec.shape != form.shape or TORCH_DTYPES.get(spec.dtype) != form.dtype:
            raise CheckpointError(
                f"{tensor.file.path}: {spec.name} is {spec.dtype} {list(spec.shape)}; {layer.scheme.key()} of a layer "
                f"{list(layer.shape)} is {form.dtype} {list(form.shape)}"
            )
    extra = [name for name in storage.names if name not in forms and f"{place.stem}.{name}" in source.tensors]
    if extra:
        raise CheckpointError(f"{source.directory}: {place.stem} has a {extra[0]}, which {layer.scheme.key()} has not")


def _check_complete(placement: Placement, source: Source) -> None:
    missing = placement.missing_linears(source.tensors)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{source.directory}: holds neither {missing[0]} nor its packed form{more}")
