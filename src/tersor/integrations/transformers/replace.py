"""Putting packed layers into a model, and taking them out again."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

from tersor import ops
from tersor.checkpoint.names import DENSE, MIXED, SPARSE, Form, Storage
from tersor.errors import UnsupportedError
from tersor.formats import Activations, Scheme
from tersor.integrations.transformers.architecture import is_conv1d, linear_shape, packable_embedding
from tersor.integrations.transformers.experts import PackedExperts
from tersor.integrations.transformers.fuse import unfuse
from tersor.integrations.transformers.fused_experts import FusedExperts
from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.experts import PackedStack
from tersor.nn.linear import PackedLinear
from tersor.nn.mixed import MixedLinear, RowSet
from tersor.nn.mixed_stack import MixedStack
from tersor.nn.packed import PackedModule
from tersor.nn.sparse import SparseLinear

AnyLinear: TypeAlias = PackedLinear | MixedLinear | SparseLinear
"""A linear layer of a compressed weight."""
AnyPacked: TypeAlias = PackedModule | MixedLinear | MixedStack | SparseLinear
"""A module of a compressed weight."""

LINEARS: dict[str, type[Any]] = {DENSE.name: PackedLinear, MIXED.name: MixedLinear, SPARSE.name: SparseLinear}
"""Name of a way to store a weight (`checkpoint.names`) -> the layer that holds a weight stored so."""


def packable(module: nn.Module) -> bool:
    """Whether a packed module can stand for this one: a linear layer, or an embedding that only looks rows up."""
    return packable_embedding(module) if isinstance(module, nn.Embedding) else linear_shape(module) is not None


def swap_packed(
    model: nn.Module, name: str, form: Form, dtype: torch.dtype | None = None, storage: Storage = DENSE
) -> AnyPacked:
    """Replace a linear layer or an embedding of a model by a packed one on the same device.

    Args:
        model: holds the module.
        name: the module's name in the model.
        form: scheme of the packed module, or the levels of its output features.
        dtype: of activations; that of the old weight when `None`.
        storage: how the weight of a linear layer is stored, which decides the class of the packed one.

    Raises:
        UnsupportedError: the module is neither, or computes more than a packed one can.
        FormatError: the group size does not divide IC.
    """
    old = model.get_submodule(name)
    if not isinstance(old, nn.Embedding):
        return swap_linear(model, name, form, dtype, storage)
    if not isinstance(form, Scheme):
        raise UnsupportedError(f"{name} is a {type(old).__name__}, which has one scheme: store it dense")
    if not packable_embedding(old):
        raise UnsupportedError(f"{name} is a {type(old).__name__}, which cannot run packed: ignore it")
    scale = getattr(old, "scalar_embed_scale", None)
    new = PackedEmbedding(
        old.num_embeddings,
        old.embedding_dim,
        form,
        old.padding_idx,
        None if scale is None else float(scale),
        type(old),
        device=old.weight.device,
        dtype=dtype or old.weight.dtype,
    )
    model.set_submodule(name, new.train(old.training))
    return new


def swap_tied(model: nn.Module, name: str, embedding: str, scheme: Scheme) -> TiedLinear:
    """Replace an output head by one that will take the weight of a packed embedding: `TiedLinear.tie` does that.

    Args:
        model: holds both.
        name: the head's name.
        embedding: name of the embedding, packed already or still plain.
        scheme: of the embedding.

    Raises:
        UnsupportedError: the head is no linear layer of the embedding's shape.
    """
    old, source = model.get_submodule(name), model.get_submodule(embedding)
    assert isinstance(source, PackedEmbedding | nn.Embedding)
    shape = (source.num_embeddings, source.embedding_dim)
    if is_conv1d(old) or linear_shape(old) != shape:
        raise UnsupportedError(
            f"{name} shares the weight of {embedding} and is a {type(old).__name__}, not a linear layer "
            f"{list(shape)}: leave {embedding} out of the overrides"
        )
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    new = TiedLinear(shape[1], shape[0], scheme, device=weight.device, dtype=weight.dtype)
    new.bias = getattr(old, "bias", None)
    model.set_submodule(name, new.train(old.training))
    return new


def swap_linear(
    model: nn.Module, name: str, form: Form, dtype: torch.dtype | None = None, storage: Storage = DENSE
) -> AnyLinear:
    """Replace a linear layer of a model by a packed one on the same device, which keeps the bias.

    Args:
        model: holds the layer.
        name: the layer's name in the model.
        form: scheme of the packed layer, or the levels of its output features.
        dtype: of activations; that of the old weight when `None`.
        storage: how the weight is stored.

    Raises:
        UnsupportedError: the module is not a linear layer.
        FormatError: the group size does not divide IC.
    """
    old = model.get_submodule(name)
    shape = linear_shape(old)
    if shape is None:
        raise UnsupportedError(f"{name} is a {type(old).__name__}, which cannot run packed: ignore it")
    weight: torch.Tensor = old.weight  # type: ignore[assignment]
    oc, ic = shape
    new: AnyLinear
    new = LINEARS[storage.name](ic, oc, form, device=weight.device, dtype=dtype or weight.dtype)
    new.bias = getattr(old, "bias", None)
    new.transposed = is_conv1d(old)
    new.train(old.training)
    model.set_submodule(name, new)
    return new


def fused_experts(model: nn.Module, name: str) -> FusedExperts:
    """Return the `FusedExperts` of a model called so, put in the place of transformers' module if it is not there yet.

    Raises:
        UnsupportedError: the module there is none of fused experts that is known.
    """
    old = model.get_submodule(name)
    if isinstance(old, FusedExperts):
        return old
    new = FusedExperts(old)
    new.template._is_hf_initialized = True
    model.set_submodule(name, new)
    return new


def swap_stack(model: nn.Module, name: str, form: Form, dtype: torch.dtype | None = None) -> PackedStack | MixedStack:
    """Replace a parameter that holds the weights of all experts of a layer by packed ones on the same device.

    Args:
        model: holds the experts.
        name: the parameter's name in the model.
        form: scheme of the packed weights, or the levels of their output features.
        dtype: of activations; that of the parameter when `None`.

    Raises:
        UnsupportedError: the module that holds it is none of fused experts that is known.
        FormatError: the group size does not divide IC.
    """
    owner, _, own = name.rpartition(".")
    return fused_experts(model, owner).pack(own, form, dtype)


def multiply_with(model: nn.Module, activations: Activations | str) -> None:
    """Choose what every packed linear is multiplied with, such as `int8` (`PackedLinear.multiply_with`).

    `8bit` is one kind for all of them, as their formats are (`ops.activations_for`).

    Raises:
        InputError: no such activations.
        UnsupportedError: a linear's weights cannot be multiplied with 8-bit activations; the message names it, and
            no linear has changed.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | RowSet) or (isinstance(module, PackedStack) and module.in_state_dict)
    }
    device = next((module.weight_packed.device for module in linears.values()), torch.device("cpu"))
    chosen = ops.activations_for(activations, [module.scheme for module in linears.values()], ops.kernel_chip(device))
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.multiply_with(chosen)  # refuses whatever would change
    for name, module in linears.items():
        try:
            ops.preferred_layout(module.scheme, module.dtype, module.weight_packed.device, chosen)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}: {error}") from None
    for module in linears.values():
        module.multiply_with(chosen)


def unpack_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module by what it stands for, decoded to `dtype`; what shared a weight shares it again."""
    unfuse(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts | FusedExperts):
            model.set_submodule(name, module.plain(dtype))
    shared: dict[PackedModule, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding):
            plain = _plain_embedding(module, dtype)
            shared[module] = plain.weight
            model.set_submodule(name, plain)
    for name, module in list(model.named_modules()):
        if isinstance(module, AnyLinear):
            source = module.source if isinstance(module, TiedLinear) else None
            model.set_submodule(name, _plain(module, dtype, None if source is None else shared[source]))


def turned(layer: nn.Module) -> nn.Module:
    """Return a Conv1D as a linear layer, or a linear layer as a Conv1D; the bias is shared."""
    from transformers.pytorch_utils import Conv1D

    weight: Any = layer.weight
    with torch.device("meta"):
        new: nn.Module = (nn.Linear if is_conv1d(layer) else Conv1D)(*weight.shape)
    new.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    bias: Any = layer.bias
    new.bias = bias
    return new.train(layer.training)


def plain_module(module: AnyPacked, dtype: torch.dtype) -> nn.Module:
    """Return what a packed linear or embedding stands for, decoded to `dtype`; an output head gets its own weight."""
    if isinstance(module, PackedEmbedding):
        return _plain_embedding(module, dtype)
    assert isinstance(module, AnyLinear)
    return _plain(module, dtype, None)


def _plain_embedding(module: PackedEmbedding, dtype: torch.dtype) -> nn.Embedding:
    scale: dict[str, Any] = {} if module.embed_scale is None else {"embed_scale": module.embed_scale}
    with torch.device("meta"):
        plain = module.plain_class(module.num_embeddings, module.embedding_dim, module.padding_idx, **scale)
    weight = module.packed_weight().dequantize(dtype)
    if scale:
        plain.embed_scale = torch.tensor(module.embed_scale, device=weight.device)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain.train(module.training)


def _plain(module: AnyLinear, dtype: torch.dtype, shared: torch.Tensor | None) -> nn.Module:
    weight = module.packed_weight().dequantize(dtype) if shared is None else shared
    with torch.device("meta"):
        plain: nn.Module
        if module.transposed:
            from transformers.pytorch_utils import Conv1D

            plain = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)
