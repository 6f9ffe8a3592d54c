"""What of vLLM is touched, and where its releases differ. Read in the wheels of 0.26.0, 0.27.1, 0.29.0, 0.31.0, 0.33.0.

| what | releases |
|---|---|
| `maybe_update_config` is given a revision | 0.33; before it, a hub id is read at its main branch |
| a method of experts is asked for `maybe_make_prepare_finalize` | 0.26 and 0.27; later ones do not ask |
| layers may have a rank of their own (`tp_rank`, `disable_tp` of an embedding) | 0.33; 0.26 to 0.31 have one of all |
| experts may be cut in blocks with padding (`tp_shard_with_padding`) | from 0.31 on |
| a method may be handed weights that were processed before (`supports_pre_processed_weights`) | 0.33; not taken |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tersor.errors import UnsupportedError
from tersor.layouts.shard import Span
from tersor.ops import Gate

__all__ = [
    "FusedMoEMethodBase",
    "LinearBase",
    "LinearMethodBase",
    "ParallelLMHead",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "register_quantization_config",
]

_GATES = {"silu": Gate.SILU, "gelu": Gate.GELU, "gelu_tanh": Gate.GELU_TANH}


def draws_weights() -> bool:
    """Whether vLLM is told to make weights up (`--load-format dummy`); asked while it builds the model."""
    return str(get_current_vllm_config().load_config.load_format) == "dummy"


def row_spans(layer: Any, sizes: Sequence[int]) -> list[tuple[int, Span]]:
    """Return how many output channels each weight of a layer has, and which of them this rank has.

    Args:
        layer: a linear layer while its weights are created.
        sizes: output channels of each weight on this rank.

    Raises:
        UnsupportedError: vLLM deals the rows of such a layer out in a way that is not known here.
    """
    ranks, rank = int(layer.tp_size), int(layer.tp_rank)
    if ranks == 1 or isinstance(layer, ReplicatedLinear):
        return [(size, (0, size)) for size in sizes]
    if not isinstance(layer, QKVParallelLinear):
        if layer.output_size == sum(sizes):  # input channels are cut
            return [(size, (0, size)) for size in sizes]
        return [(size * ranks, (rank * size, (rank + 1) * size)) for size in sizes]
    if len(sizes) != 3:
        raise UnsupportedError(f"{layer.prefix}: a {type(layer).__name__} is not cut over ranks: use one GPU")
    copies = int(layer.num_kv_head_replicas)
    places = [(rank, ranks), *[(rank // copies, ranks // copies)] * 2]
    return [(size * count, (own * size, (own + 1) * size)) for size, (own, count) in zip(sizes, places, strict=True)]


def columns(layer: Any, own: int, whole: int) -> Span | None:
    """Return the input channels that this rank has of a linear layer; `None` is all."""
    return None if own == whole else (layer.tp_rank * own, (layer.tp_rank + 1) * own)


def vocabulary_rows(layer: Any) -> Span:
    """Return the tokens of a model's own vocabulary whose rows this rank has of an embedding or head."""
    indices = layer.shard_indices
    if indices.num_added_elements:
        raise UnsupportedError("vocabularies that LoRA adds tokens to are not packed: leave LoRA out")
    return indices.org_vocab_start_index, indices.org_vocab_end_index


def expert_columns(layer: Any, own: int) -> Span | None:
    """Return the inner channels that this rank has of every expert; `None` is all."""
    parallel = layer.moe_config.moe_parallel_config
    return None if parallel.tp_size == 1 else (parallel.tp_rank * own, (parallel.tp_rank + 1) * own)


def local_expert(layer: Any, expert: int) -> int:
    """Return the number of an expert on this rank, -1 where another rank has it."""
    found: int = layer._map_global_expert_id_to_local_expert_id(expert)
    return found


def experts_gate(layer: Any) -> Gate:
    """Return how gate and up of a layer's experts become one.

    Raises:
        UnsupportedError: experts that compute something that kernels do not; the line says what.
    """
    config = layer.moe_config
    activation = str(getattr(layer.activation, "value", layer.activation))
    why = ""
    if activation not in _GATES:
        why = f"gate and up become one by {activation}"
    elif getattr(config, "has_bias", False):
        why = "they have biases"
    elif layer.apply_router_weight_on_input:
        why = "the router's weights come before the product"
    elif getattr(layer, "swiglu_limit", None) is not None:
        why = "gate and up are clamped"
    elif config.moe_parallel_config.use_all2all_kernels:
        why = "ranks exchange tokens by an all-to-all backend (data parallelism with expert parallelism)"
    elif getattr(config, "tp_shard_with_padding", False):
        why = "their channels are cut with padding"
    if why:
        raise UnsupportedError(f"{layer.layer_name}: packed experts do not run here: {why}")
    return _GATES[activation]


def expect(layer: Any, tensors: Mapping[str, torch.dtype], loader: Callable[[str], Callable[..., Any]]) -> None:
    """Give a layer parameters without elements that vLLM hands the tensors of these names to.

    Args:
        layer: of vLLM.
        tensors: name below the layer, with dots where a tensor is below a module -> dtype.
        loader: returns the `weight_loader` of a name.
    """
    for name, dtype in sorted(tensors.items()):
        *path, last = name.split(".")
        holder = layer
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = loader(name)  # type: ignore[attr-defined]
        holder.register_parameter(last, parameter)
        if path:  # experts are asked for it by its whole name
            layer.__dict__[name] = parameter


def expect_no_more(layer: Any, names: Iterable[str]) -> None:
    """Take the parameters of `expect` away again."""
    for name in names:
        first, dot, _ = name.partition(".")
        layer.__dict__.pop(name, None)
        (layer._modules if dot else layer._parameters).pop(first, None)
