"""What of vLLM is touched, and where its releases differ. Read in the wheels of 0.26.0, 0.27.1, 0.29.0, 0.31.0, 0.33.0.

| what | releases |
|---|---|
| `maybe_update_config` is given a revision | 0.33; before it, a hub id is read at its main branch |
| a method of experts is asked for `maybe_make_prepare_finalize` | 0.26 and 0.27; later ones do not ask |
| layers may have a rank of their own (`tp_rank`, `disable_tp` of an embedding) | 0.33; 0.26 to 0.31 have one of all |
| experts may be cut in blocks with padding (`tp_shard_with_padding`) | from 0.31 on |
| the loader of Granite's mixtures, but for the hybrid, calls gate, up and down `w1`, `w3`, `w2` | 0.26 and 0.27 |
| a method may be handed weights that were processed before (`supports_pre_processed_weights`) | 0.33; not taken |
| gpt-oss' experts are a class of their own, whose loader knows single ones (`GptOssRoutedExperts`) | from 0.29 on |
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
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

from tersor.checkpoint.names import LEVEL
from tersor.errors import UnsupportedError
from tersor.integrations.vllm.checks import Started
from tersor.integrations.vllm.stacks import BIAS, DOWN, GATE, HANDED_WHOLE, PARTS, UP, WEIGHT, Stack
from tersor.layouts.shard import Span
from tersor.ops import Gate
from tersor.ops.gates import CLAMP, SLOPE

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

_OF_VOCABULARY = {"VocabParallelEmbedding": "embedding", "ParallelLMHead": "head"}
_GRANITE = ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
_GATES = {"silu": Gate.SILU, "gelu": Gate.GELU, "gelu_tanh": Gate.GELU_TANH, "swigluoai": Gate.CLAMPED}
_CLAMPED = {"swiglu_limit": CLAMP, "swiglu_alpha": SLOPE, "swiglu_beta": 1.0}
"""What a layer may say of a clamped gate -> the number that vLLM's and ours have where it says none."""


def draws_weights() -> bool:
    """Whether vLLM is told to make weights up (`--load-format dummy`); asked while it builds the model."""
    return str(get_current_vllm_config().load_config.load_format) == "dummy"


def when_verified(kind: type[Any]) -> None:
    """Have vLLM's main process call `verify` of a quantisation configuration of a kind when it knows how it is started.

    vLLM verifies what it is told where `VllmConfig` is made, in its main process, and asks a quantisation method only
    for what the checkpoint says. So this looks at what is made; it changes none of it.
    """
    verify = VllmConfig.__post_init__
    if hasattr(verify, "tersor"):  # a plug-in may be loaded more than once
        return

    @functools.wraps(verify)
    def verified(config: Any, *arguments: Any) -> None:
        verify(config, *arguments)
        if isinstance(config.quant_config, kind):
            config.quant_config.verify(_started(config))

    verified.tersor = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = verified


def _started(config: Any) -> Started:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    parallel, offload = config.parallel_config, config.offload_config
    across = parallel.data_parallel_size * parallel.prefill_context_parallel_size
    whole = bool(parallel.enable_expert_parallel)
    asked = {
        "--enable-lora": config.lora_config is not None,
        "--cpu-offload-gb": offload.uva.cpu_offload_gb > 0,
        "--offload-group-size": offload.prefetch.offload_group_size > 0,
    }
    return Started(
        ranks=parallel.tensor_parallel_size,
        expert_ranks=parallel.tensor_parallel_size * across,
        whole_experts=whole and parallel.tensor_parallel_size * across > 1,
        exchanges=whole and across > 1,
        balances=bool(parallel.enable_eplb),
        random=str(config.load_config.load_format) == "dummy",
        option=next((option for option, given in asked.items() if given), ""),
        capability=None if capability is None else (capability.major, capability.minor),
    )


def methodless(architectures: Sequence[str]) -> frozenset[str]:
    """Return of `embedding` and `head` those that vLLM builds for a model without asking for a quantisation method.

    Read in the file of its class, which is not imported: vLLM itself does not in its main process.

    Args:
        architectures: names of classes, of which vLLM knows some.
    """
    from vllm.model_executor.models import ModelRegistry

    known = (ModelRegistry.models.get(name) for name in architectures)
    module = next((found.module_name for found in known if hasattr(found, "module_name")), None)
    spec = None if module is None else importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return frozenset()
    asked: dict[str, bool] = {}
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _OF_VOCABULARY:
            what = _OF_VOCABULARY[node.func.id]
            given = any(keyword.arg in ("quant_config", None) for keyword in node.keywords)
            asked[what] = asked.get(what, False) or given
    return frozenset(what for what, given in asked.items() if not given)


def unstacking(mapper: Any, stacks: Mapping[str, Stack], architecture: str) -> Any:
    """Return a mapper of names that also hands loaders the weights of each expert where one tensor holds those of all.

    Loaders of `HANDED_WHOLE` are handed that tensor, and its biases, by the name of a parameter of the layer.

    Args:
        mapper: `WeightsMapper` of vLLM.
        stacks, architecture: as of a `Plan`.
    """
    if not stacks:
        return mapper
    known = {_inside(stem): stack for stem, stack in stacks.items()}
    kind: Any = type(mapper)
    called = _granite_names() if architecture in _GRANITE else {}
    take = _taken_apart
    if architecture in HANDED_WHOLE:
        take = _whole

    class Unstacking(kind):  # type: ignore[misc]
        """Merged with another it stays what it is."""

        def __or__(self, other: Any) -> Any:
            return _again(kind.__or__(self, other))

        def __ror__(self, other: Any) -> Any:
            return _again(kind.__or__(other, self))

        def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
            return super().apply(take(weights, known, called))

    def _again(one: Any) -> Any:
        return Unstacking(**{field.name: getattr(one, field.name) for field in fields(one)})

    return _again(mapper)


def _taken_apart(
    weights: Iterable[tuple[str, torch.Tensor]], stacks: Mapping[str, Stack], called: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        stem, own, stack = _found(name, stacks)
        if stack is None or (tensor.dim() != 3 and own != LEVEL):
            yield name, tensor
            continue
        for expert, projection, part in stack.taken_apart(own, tensor):
            yield f"{_layer(stem)}.{expert}.{called.get(projection, projection)}.{own}", part


def _whole(
    weights: Iterable[tuple[str, torch.Tensor]], stacks: Mapping[str, Stack], called: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        stem, own, stack = _found(name, stacks)
        for last in (BIAS, *PARTS):
            if stack is None and name.endswith(f"_{last}"):
                stem, own = name.removesuffix(f"_{last}"), last
                stack = stacks.get(_inside(stem))
        yield (name if stack is None else f"{_layer(stem)}.routed_experts.{stack.stem}_{own}"), tensor


def _found(name: str, stacks: Mapping[str, Stack]) -> tuple[str, str, Stack | None]:
    """Return the stem of a tensor of all experts, its own name, and what it holds; of others `None`."""
    stem = name
    while stem:
        if (stack := stacks.get(_inside(stem))) is not None:
            return stem, name.removeprefix(stem).removeprefix(".") or WEIGHT, stack
        stem = stem.rpartition(".")[0]
    return name, WEIGHT, None


def _layer(stem: str) -> str:
    """Return the name of the layer of experts that a tensor of all of them is of."""
    owner = stem.rpartition(".")[0]
    return owner if owner.endswith(".experts") else f"{owner}.experts"


def _inside(name: str) -> str:
    """Return a name from its layer on: models inside of others are handed what their own part of a name is."""
    return name[max(0, name.rfind("layers.")) :]


@functools.cache
def _granite_names() -> dict[str, str]:
    """Return what vLLM's loader of Granite's mixtures calls gate, up and down."""
    from vllm.model_executor.models import granitemoe

    own = not hasattr(granitemoe.GraniteMoeModel, "hf_to_vllm_mapper")
    return {GATE: "w1", UP: "w3", DOWN: "w2"} if own else {}


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


def biased(layer: Any) -> bool:
    """Whether a layer's experts have biases."""
    return bool(getattr(layer.moe_config, "has_bias", False))


def experts_gate(layer: Any, biases: bool) -> Gate:
    """Return how gate and up of a layer's experts become one.

    Args:
        layer: while its weights are created.
        biases: whether those of experts that have any are handed over.

    Raises:
        UnsupportedError: experts that compute something that kernels do not; the line says what.
    """
    config = layer.moe_config
    activation = str(getattr(layer.activation, "value", layer.activation))
    said = {name: getattr(layer, name, None) for name in _CLAMPED}
    if _GATES.get(activation) is Gate.CLAMPED:
        said = {name: number for name, number in said.items() if number != _CLAMPED[name]}
    why = ""
    if activation not in _GATES:
        why = f"gate and up become one by {activation}"
    elif biased(layer) and not biases:
        why = "they have biases"
    elif layer.apply_router_weight_on_input and config.experts_per_token > 1:
        why = "the router's weights come before the product, of several experts a token"
    elif any(number is not None for number in said.values()):
        why = "gate and up are clamped" + (" at other numbers" if activation == "swigluoai" else "")
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
        parameter.output_dim = 0  # type: ignore[attr-defined]  # loaders that bring rows in order ask where they are
        holder.register_parameter(last, parameter)
        if path:  # experts are asked for it by its whole name
            layer.__dict__[name] = parameter


def expect_no_more(layer: Any, names: Iterable[str]) -> None:
    """Take the parameters of `expect` away again."""
    for name in names:
        first, dot, _ = name.partition(".")
        layer.__dict__.pop(name, None)
        (layer._modules if dot else layer._parameters).pop(first, None)
