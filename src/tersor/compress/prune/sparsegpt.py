"""SparseGPT (arXiv 2301.00774): masks chosen by blocks of columns, the error of every column moved to later ones."""

from __future__ import annotations

import torch

from tersor.compress.hessian import BLOCK, Hessian
from tersor.compress.prune.pattern import Pattern


def sparsegpt_mask(rows: torch.Tensor, hessian: Hessian, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a mask and update the weights that stay, columns in natural order (algorithm 1).

    A weight costs w^2 / U_jj^2, U the upper Cholesky factor of the inverse Hessian; the mask of a block of 128 columns
    is chosen when all columns ahead of it are done, that of n of m for every m columns.

    Args:
        rows: float32 [OC, IC], the weights wanted.
        hessian: of the inputs, its `order` that of the channels.
        pattern: which masks are allowed.

    Returns:
        The mask, bool [OC, IC], and the weights, float32 [OC, IC], zero where the mask is false.
    """
    oc, ic = rows.shape
    rest = rows.T.clone(memory_format=torch.contiguous_format)
    kept = torch.empty(ic, oc, dtype=torch.bool, device=rows.device)
    costs = hessian.factor.diagonal().square().reciprocal()
    span = pattern.of if pattern.exact else BLOCK
    if pattern.of and not pattern.exact:
        span = max(pattern.of, BLOCK // pattern.of * pattern.of)
    block = span * max(1, BLOCK // span)
    errors = torch.empty(block, oc, device=rows.device)
    for start in range(0, ic, block):
        end = min(start + block, ic)
        within = hessian.moves[start:end, start:end]
        given = rest[start:end]
        for column in range(end - start):
            at = start + column
            if at % span == 0:
                stop = min(at + span, ic)
                scores = rest[at:stop].square() * costs[at:stop].unsqueeze(1)
                kept[at:stop] = pattern.choose_columns(scores.T, at, ic).T
            torch.mul(given[column], ~kept[at], out=errors[column])
            given[column] -= errors[column]
            given[column + 1 :].addr_(within[column, column + 1 :], errors[column], alpha=-1)
        rest[end:].addmm_(hessian.moves[start:end, end:].T, errors[: end - start], alpha=-1)
    return kept.T.contiguous(), rest.T.contiguous()
