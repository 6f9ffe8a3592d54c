"""Which experts does a token get, in what order are they multiplied, and what becomes of their results?

The torch operators `tersor::route`, `tersor::route_tables`, `tersor::expert_tables` and `tersor::combine_experts`, with
meta twins. Where autograd looks, the reference serves, whose gradients it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tersor.ops import autocast, dense, routing_reference, serve_routing
from tersor.ops.tables import Tables, elements

_library = torch.library.Library("tersor", "FRAGMENT")
_CHOICE = "int top_k, str scoring, bool normalize, Tensor? bias, int groups, int top_groups, float scale"
_library.define(f"route(Tensor logits, {_CHOICE}) -> (Tensor, Tensor)")
_library.define(f"route_tables(Tensor logits, {_CHOICE}, int block_tokens) -> (Tensor, Tensor, Tensor)")
_library.define("expert_tables(Tensor index, int experts, int block_tokens) -> Tensor")
_library.define(
    "combine_experts(Tensor y, Tensor weights, Tensor tables, int experts, int block_tokens, Tensor? addend) -> Tensor"
)

_operators = torch.ops.tersor


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of every token and their weights, in float32 whatever the logits are; the best expert first.

    A score is a logit's softmax over all experts or, as in DeepSeek-V3 (arXiv:2412.19437), its sigmoid. The `top_k`
    best experts are chosen, by score plus bias where there is one; of equals the lower index wins. NaN counts as -inf.

    Args:
        logits: [T, E] float16, bfloat16 or float32, any strides.
        top_k: experts of a token, K.
        scoring: `softmax` or `sigmoid`.
        normalize: whether weights are divided by their sum (of sigmoids, plus 1e-20).
        bias: [E], floats: it counts in the choice and not in the weights.
        groups: as many equal groups of consecutive experts, ranked by the sum of their two best (`sigmoid`) or by their
            best (`softmax`: DeepSeek-V2, arXiv:2405.04434).
        top_groups: experts are chosen from so many best groups.
        scale: weights, which are scores without bias, are multiplied by it at last.

    Returns:
        Index int32 [T, K] and weights float32 [T, K].

    Raises:
        ShapeError: shapes, dtypes or numbers that do not fit.
    """
    options = _Options(top_k, scoring, normalize, bias, groups, top_groups, scale)
    if _differentiable(logits):
        return routing_reference.route(logits, bias, options.choice(logits), scale)
    serve = _operators.route if dense.looked_at(logits, bias) else _route
    return serve(logits, *options)


def route_tables(
    logits: torch.Tensor,
    top_k: int,
    block_tokens: int,
    *,
    scoring: str = "softmax",
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, Tables]:
    """Return what `route` returns and the tables of its index, of one launch where a kernel serves.

    Args:
        logits, top_k, scoring, normalize, bias, groups, top_groups, scale: as in `route`.
        block_tokens: most tokens of a block of one expert.

    Raises:
        ShapeError: as `route`, or blocks without tokens.
    """
    options = _Options(top_k, scoring, normalize, bias, groups, top_groups, scale)
    if _differentiable(logits):
        index, weights = routing_reference.route(logits, bias, options.choice(logits), scale)
        return index, weights, tables(index, logits.shape[1], block_tokens)
    serve = _operators.route_tables if dense.looked_at(logits, bias) else _route_tables
    index, weights, memory = serve(logits, *options, block_tokens)
    return index, weights, Tables(memory, index.numel(), logits.shape[1], block_tokens)


def tables(index: torch.Tensor, experts: int, block_tokens: int) -> Tables:
    """Return the pairs of an index in the order of experts.

    Args:
        index: int32 or int64 [T, K]; an expert outside 0 to `experts` - 1 is none.
        experts: how many there are.
        block_tokens: most tokens of a block of one expert.

    Raises:
        ShapeError: shapes, dtypes or numbers that do not fit.
    """
    serve = _operators.expert_tables if dense.looked_at(index) else _expert_tables
    memory = serve(index, experts, block_tokens)
    return Tables(memory, index.numel(), experts, block_tokens)


def combine(
    y: torch.Tensor, weights: torch.Tensor, sorted_by: Tables, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum over a token's experts of weight times result, in float32 and in the order of k, rounded once.

    Args:
        y: [P, H] float16, bfloat16 or float32, one row a pair, in the order of `sorted_by`. Rows of pairs without an
            expert are not read.
        weights: floats [T, K].
        sorted_by: the tables of the index [T, K].
        addend: [T, H] in y's dtype, added at last, or `None`.

    Returns:
        [T, H] in y's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    if any(one is not None and _differentiable(one) for one in (y, weights, addend)):
        serve_routing.check_combine(y, weights, sorted_by.memory, addend)
        return routing_reference.combine(y, weights, sorted_by, addend)
    serve = _operators.combine_experts if dense.looked_at(y, weights, sorted_by.memory, addend) else _combine_experts
    return serve(y, weights, sorted_by.memory, sorted_by.experts, sorted_by.block_tokens, addend)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


class _Options(NamedTuple):
    """What the schemas of the operators say of the choice, in their order (`_CHOICE`)."""

    top_k: int
    scoring: str
    normalize: bool
    bias: torch.Tensor | None
    groups: int
    top_groups: int
    scale: float

    def choice(self, logits: torch.Tensor) -> serve_routing.Choice:
        """Return how experts are chosen by logits [T, E], checked."""
        serve_routing.check_logits(logits, self.bias)
        biased = self.bias is not None
        numbers = (self.top_k, self.scoring, self.normalize, biased, self.groups, self.top_groups)
        return serve_routing.choice_of(int(logits.shape[1]), *numbers)


def _route(logits: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    of = _Options(*options)
    return serve_routing.route(logits, of.bias, of.choice(logits), of.scale, 0)[:2]


def _route_tables(logits: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of, block_tokens = _Options(*options[:-1]), options[-1]
    choice = of.choice(logits)
    serve_routing.check_blocks(choice.experts, block_tokens)
    index, weights, memory = serve_routing.route(logits, of.bias, choice, of.scale, block_tokens)
    assert memory is not None
    return index, weights, memory


def _expert_tables(index: torch.Tensor, experts: int, block_tokens: int) -> torch.Tensor:
    serve_routing.check_index(index)
    serve_routing.check_blocks(experts, block_tokens)
    return serve_routing.tables(index, experts, block_tokens)


def _combine_experts(
    y: torch.Tensor,
    weights: torch.Tensor,
    memory: torch.Tensor,
    experts: int,
    block_tokens: int,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    serve_routing.check_combine(y, weights, memory, addend)
    return serve_routing.combine(y, weights, Tables(memory, y.shape[0], experts, block_tokens), addend)


def _route_shapes(logits: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], _Options(*options).choice(logits).top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


def _route_tables_shapes(logits: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index, weights = _route_shapes(logits, *options[:-1])
    return index, weights, _expert_tables_shape(index, logits.shape[1], options[-1])


def _expert_tables_shape(index: torch.Tensor, experts: int, block_tokens: int) -> torch.Tensor:
    serve_routing.check_index(index)
    serve_routing.check_blocks(experts, block_tokens)
    return index.new_empty(elements(index.numel(), experts, block_tokens), dtype=torch.int32)


def _combine_experts_shape(
    y: torch.Tensor,
    weights: torch.Tensor,
    memory: torch.Tensor,
    experts: int,
    block_tokens: int,
    addend: torch.Tensor | None,
) -> torch.Tensor:
    serve_routing.check_combine(y, weights, memory, addend)
    return y.new_empty(weights.shape[0], y.shape[1])


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "route": (_route, _route_shapes),
    "route_tables": (_route_tables, _route_tables_shapes),
    "expert_tables": (_expert_tables, _expert_tables_shape),
    "combine_experts": (_combine_experts, _combine_experts_shape),
}
for _name, (_serve, _shapes) in _OPERATORS.items():
    for _device in autocast.DEVICES:
        _library.impl(_name, _serve, _device)
        _library.impl(_name, autocast.ignoring(getattr(torch.ops.tersor, _name).default), f"Autocast{_device}")
    torch.library.register_fake(f"tersor::{_name}", _shapes, lib=_library)
