"""Serve one call around a product of experts: checked, then by a kernel where a GPU has it, else by the reference."""

from __future__ import annotations

import functools

import torch

from tersor.errors import ShapeError
from tersor.kernels import jit, routing
from tersor.kernels.routing import Choice
from tersor.ops import current, dispatch, mode, routing_reference
from tersor.ops.tables import Tables, elements

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_INDEX_DTYPES = {torch.int32: "int32", torch.int64: "int64"}
_PREPARED = 1024
"""Prepared launches that are kept, of each kind."""

_route_launch = functools.lru_cache(_PREPARED)(routing.prepare_route)
_tables_launch = functools.lru_cache(_PREPARED)(routing.prepare_tables)
_combine_launch = functools.lru_cache(_PREPARED)(routing.prepare_combine)


@functools.lru_cache
def choice_of(
    experts: int, top_k: int, scoring: str, normalize: bool, biased: bool, groups: int, top_groups: int
) -> Choice:
    """Return how experts are chosen, checked; arguments are those of `ops.route`.

    Raises:
        ShapeError: numbers that do not fit each other, or no such scoring.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ShapeError(f"route: scoring is {scoring!r}, expected 'softmax' or 'sigmoid'")
    if groups < 1 or experts % groups:
        raise ShapeError(f"route: {experts} experts do not make {groups} equal groups")
    if not 1 <= top_groups <= groups:
        raise ShapeError(f"route: top_groups is {top_groups}, expected 1 to {groups}, the number of groups")
    size = experts // groups
    if not 1 <= top_k <= top_groups * size:
        raise ShapeError(f"route: top_k is {top_k}, expected 1 to {top_groups * size} in {top_groups} groups of {size}")
    if scoring == "sigmoid" and top_groups < groups and size < 2:
        raise ShapeError("route: groups are ranked by their two best experts, these have one each")
    return Choice(
        experts=experts,
        top_k=top_k,
        sigmoid=scoring == "sigmoid",
        normalize=bool(normalize),
        biased=biased,
        groups=groups if top_groups < groups else 1,
        top_groups=top_groups if top_groups < groups else 1,
    )


def check_logits(logits: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ShapeError where logits are not [T, E] floats, or a bias is not [E] floats beside them."""
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not logits.shape[1]:
        raise ShapeError(
            f"route: logits are {list(logits.shape)} {logits.dtype}, expected [tokens, experts] in float16, "
            "bfloat16 or float32"
        )
    if bias is not None and (
        bias.shape != logits.shape[1:] or bias.dtype not in _DTYPES or bias.device != logits.device
    ):
        raise ShapeError(
            f"route: bias is {list(bias.shape)} {bias.dtype} on {bias.device}, expected [{logits.shape[1]}] floats on "
            f"{logits.device}"
        )


def check_index(index: torch.Tensor) -> None:
    """Raise ShapeError where an index is not [T, K] integers."""
    if index.dim() != 2 or index.dtype not in _INDEX_DTYPES:
        raise ShapeError(
            f"tables: index is {list(index.shape)} {index.dtype}, expected [tokens, experts of a token] in "
            "int32 or int64"
        )


def check_blocks(experts: int, block_tokens: int) -> None:
    """Raise ShapeError where there is no expert, or a block has no token."""
    if experts < 1 or block_tokens < 1:
        raise ShapeError(f"tables: {experts} experts and blocks of {block_tokens} tokens, expected at least one")


def check_combine(y: torch.Tensor, weights: torch.Tensor, memory: torch.Tensor, addend: torch.Tensor | None) -> None:
    """Raise ShapeError where the tensors of `routing.combine` do not fit each other."""
    if y.dim() != 2 or y.dtype not in _DTYPES:
        raise ShapeError(
            f"combine: y is {list(y.shape)} {y.dtype}, expected [pairs, channels] in float16, bfloat16 or float32"
        )
    if weights.dim() != 2 or weights.numel() != y.shape[0] or weights.dtype not in _DTYPES:
        raise ShapeError(
            f"combine: weights are {list(weights.shape)} {weights.dtype}, expected floats [tokens, experts of a token] "
            f"for {y.shape[0]} pairs"
        )
    if weights.device != y.device or memory.device != y.device:
        raise ShapeError(f"combine: y is on {y.device}, weights on {weights.device}, tables on {memory.device}")
    expected = (weights.shape[0], y.shape[1])
    if addend is not None and (addend.shape != expected or addend.dtype != y.dtype or addend.device != y.device):
        raise ShapeError(
            f"combine: addend is {list(addend.shape)} {addend.dtype} on {addend.device}, expected {list(expected)} "
            f"{y.dtype} on {y.device}"
        )


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: Choice, scale: float, block_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Choose experts and, where `block_tokens` is not 0, sort the pairs: both in one launch where a kernel serves.

    Args:
        logits: [T, E], checked.
        bias: [E] or `None`, checked.
        choice: of `choice_of`.
        scale: what weights are multiplied by at last.
        block_tokens: as in `Tables`, or 0.

    Returns:
        Index, weights, and the memory of the tables or `None`.
    """
    chip, tokens, top_k = dispatch.kernel_chip(logits.device), logits.shape[0], choice.top_k
    if chip is None or not tokens or not choice.fits():
        chosen, weights = routing_reference.route(logits, bias, choice, scale)
        return chosen, weights, routing_reference.tables(chosen, choice.experts, block_tokens) if block_tokens else None
    index = logits.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return route(logits, bias, choice, scale, block_tokens)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    now = mode.current()
    function = jit.get(routing.route_source(choice, _DTYPES[logits.dtype]), index)
    launch = _route_launch(function, choice, tokens=tokens, block_tokens=block_tokens, scale=float(scale))
    chosen = current.empty((tokens, top_k), (top_k, 1), torch.int32)
    weights = current.empty((tokens, top_k), (top_k, 1), torch.float32)
    memory, addresses, arrived = None, (0, 0, 0), 0
    stream = current.stream(index)
    if block_tokens:
        size = elements(tokens * top_k, choice.experts, block_tokens)
        memory = current.empty((size,), (1,), torch.int32)
        addresses = Tables(memory, tokens * top_k, choice.experts, block_tokens).addresses
        if tokens > routing.FEW_TOKENS:
            arrived = now.workspace.split_sums(index, stream, 0, 1)[1]
    order, position, blocks = addresses
    launch(
        stream=stream,
        logits=logits.data_ptr(),
        stride=logits.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        index=chosen.data_ptr(),
        weights=weights.data_ptr(),
        order=order,
        position=position,
        blocks=blocks,
        arrived=arrived,
        early=now.early and chip.capability >= (9, 0),
    )
    return chosen, weights, memory


def tables(index: torch.Tensor, experts: int, block_tokens: int) -> torch.Tensor:
    """Return the memory of the `Tables` of an index [T, K], checked."""
    chip, pairs = dispatch.kernel_chip(index.device), index.numel()
    if chip is None or not pairs or experts > routing.MOST_EXPERTS:
        return routing_reference.tables(index, experts, block_tokens)
    device = index.get_device()
    if device >= 0 and current.device() != device:
        with torch.cuda.device(device):
            return tables(index, experts, block_tokens)
    index = index.contiguous()
    function = jit.get(routing.tables_source(experts, _INDEX_DTYPES[index.dtype]), device)
    launch = _tables_launch(function, experts=experts, pairs=pairs, block_tokens=block_tokens)
    memory = current.empty((elements(pairs, experts, block_tokens),), (1,), torch.int32)
    order, position, blocks = Tables(memory, pairs, experts, block_tokens).addresses
    launch(
        stream=current.stream(device),
        index=index.data_ptr(),
        order=order,
        position=position,
        blocks=blocks,
        early=mode.current().early and chip.capability >= (9, 0),
    )
    return memory


def combine(
    y: torch.Tensor, weights: torch.Tensor, sorted_by: Tables, addend: torch.Tensor | None, ready: bool = False
) -> torch.Tensor:
    """Return [T, H], what `routing.combine` says, of tensors that are checked.

    Args:
        y, weights, sorted_by, addend: as there.
        ready: whether weights and tables were there before the kernel that makes y started.
    """
    chip, (tokens, top_k), channels = dispatch.kernel_chip(y.device), weights.shape, y.shape[1]
    if chip is None or y.dtype == torch.float32 or not tokens or not top_k or not channels:
        return routing_reference.combine(y, weights, sorted_by, addend)
    device = y.get_device()
    if device >= 0 and current.device() != device:
        with torch.cuda.device(device):
            return combine(y, weights, sorted_by, addend, ready)
    y, weights = y.contiguous(), weights.to(torch.float32).contiguous()
    out = current.empty((tokens, channels), (channels, 1), y.dtype)
    places = [y.data_ptr(), out.data_ptr()]
    if addend is not None:
        addend = addend.contiguous()
        places.append(addend.data_ptr())
    aligned = not (channels % 8 or any(place % 16 for place in places))
    function = jit.get(routing.combine_source(_DTYPES[y.dtype]), device)
    launch = _combine_launch(function, tokens=tokens, top_k=top_k, channels=channels, aligned=aligned)
    _, position, blocks = sorted_by.addresses
    launch(
        stream=current.stream(device),
        y=places[0],
        weights=weights.data_ptr(),
        position=position,
        blocks=blocks,
        addend=0 if addend is None else places[2],
        out=places[1],
        ready=ready,
        early=mode.current().early and chip.capability >= (9, 0),
    )
    return out
