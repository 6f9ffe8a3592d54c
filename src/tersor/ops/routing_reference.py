"""What routing means, in plain torch: the definition of the kernels, which serves where they do not.

Autograd knows its gradients; nothing here waits for a device.
"""

from __future__ import annotations

import torch

from tersor.kernels.routing import Choice
from tersor.kernels.tune.experts_problem import most_blocks
from tersor.ops.tables import Tables, blocks_offset, elements


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: Choice, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `ops.route` of logits [T, E]: index int32 [T, K] and weights float32 [T, K], the best expert first."""
    values = _without_nan(logits.float())
    scores = torch.sigmoid(values) if choice.sigmoid else torch.softmax(values, dim=1)
    ranks = scores if choice.sigmoid else values  # softmax keeps the order of logits, which may round to equal scores
    if bias is not None:
        ranks = _without_nan(scores + bias.float())
    best = ranks.detach().argsort(dim=1, descending=True, stable=True)  # topk takes any of equals, this the first
    if choice.groups > choice.top_groups:
        kept = _in_best_groups(ranks.detach(), choice).gather(1, best)
        best = best.gather(1, kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True))
    index = best[:, : choice.top_k]
    if choice.normalize and not choice.sigmoid and bias is None:
        weights = torch.softmax(values.gather(1, index), dim=1)
    else:
        weights = scores.gather(1, index)
        if choice.normalize:
            weights = weights / (weights.sum(dim=1, keepdim=True) + (1e-20 if choice.sigmoid else 0.0))
    return index.to(torch.int32), weights * scale


def _without_nan(values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(values.isnan(), -torch.inf)


def _in_best_groups(ranks: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Return which experts, bool [T, E], are in the groups that are chosen from."""
    grouped = ranks.view(ranks.shape[0], choice.groups, -1)
    best = _without_nan(grouped.topk(2, dim=2).values.sum(dim=2)) if choice.sigmoid else grouped.amax(dim=2)
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, : choice.top_groups]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)
    return kept.repeat_interleave(grouped.shape[2], dim=1)


def tables(index: torch.Tensor, experts: int, block_tokens: int) -> torch.Tensor:
    """Return the memory of the `Tables` of an index [T, K]; what follows the last block is zero."""
    pairs, device = index.numel(), index.device
    flat = index.reshape(-1).long()
    expert = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = expert.argsort(stable=True)
    numbers = torch.arange(pairs, device=device)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(0, expert, torch.ones_like(expert))[:experts]
    ends, own = counts.cumsum(0), -(-counts // block_tokens)
    last = own.cumsum(0)
    block = torch.arange(most_blocks(pairs, experts, block_tokens), device=device)
    of = torch.searchsorted(last, block, right=True).clamp_(max=experts - 1)
    rows = torch.stack((of, (last - own)[of], (ends - counts)[of], ends[of]), dim=1)
    memory = torch.zeros(elements(pairs, experts, block_tokens), dtype=torch.int32, device=device)
    memory[:pairs] = order
    memory[pairs : 2 * pairs] = torch.empty_like(order).scatter_(0, order, numbers)
    described = memory[blocks_offset(pairs) :].view(-1, 4)
    described[0, 0], described[0, 1] = last[-1], ends[-1]
    described[1:] = torch.where((block < last[-1])[:, None], rows, 0)
    return memory


def combine(y: torch.Tensor, weights: torch.Tensor, sorted_by: Tables, addend: torch.Tensor | None) -> torch.Tensor:
    """Return `routing.combine` of y [P, H] and weights [T, K]: [T, H], added in float32 and rounded once."""
    tokens, top_k = weights.shape
    position = sorted_by.position.long()
    there = (position < sorted_by.blocks[0, 1])[:, None]
    rows = torch.where(there, y[position].float(), 0.0).view(tokens, top_k, -1)
    factors = torch.where(there.view(tokens, top_k), weights.float(), 0.0)
    sums = y.new_zeros(tokens, y.shape[1], dtype=torch.float32)
    for k in range(top_k):
        sums = sums + factors[:, k, None] * rows[:, k]
    return (sums if addend is None else sums + addend).to(y.dtype)
