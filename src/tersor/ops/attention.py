"""Attention over pages of keys and values: queries, keys and values of a step's tokens in, weighted values out."""

from __future__ import annotations

import torch

from tersor.errors import ShapeError
from tersor.ops import attention_reference
from tersor.ops.attention_form import AttentionForm, PagedCache, Rows


def attend(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm and rotate queries and keys, write keys and values to their pages, and attend to all that the rows have.

    Args:
        qkv: [T, (H + 2 KV) * D]: queries, keys and values of every token.
        cache: pages of the layer; written.
        rows: of the step.
        form: of the layer.
        rotary: float32 [positions, rotary_dim], cosines, then sines; `None` where nothing turns.
        norms: weights [D] of the norms of queries and keys, or `None`.
        sinks: [H], a score of every head that belongs to no token, or `None`.

    Returns:
        [T, H * D] in qkv's dtype; zeros for padding.

    Raises:
        ShapeError: qkv is not what the form has.
    """
    if qkv.dim() != 2 or qkv.shape[1] != form.qkv_channels:
        raise ShapeError(f"attend: qkv is {list(qkv.shape)}, expected [T, {form.qkv_channels}]")
    return attention_reference.attend(qkv, cache, rows, form, rotary, norms, sinks)
