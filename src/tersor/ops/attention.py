"""What do the tokens of a step see? Attention of new queries over pages of keys and values, which their own join first.

The torch operator `tersor::attend`, which writes pages and their scales, with its meta twin.
"""

from __future__ import annotations

from typing import Any

import torch

from tersor.ops import autocast, dense, serve_attention
from tersor.ops.attention_form import AttentionForm, PagedCache, Rows

_library = torch.library.Library("tersor", "FRAGMENT")
_library.define(
    "attend(Tensor qkv, Tensor(a!) pages, Tensor(b!)? scales, Tensor starts, Tensor lengths, Tensor table, "
    "int most_queries, int most_length, bool settled, Tensor? shared, int? most_few, Tensor? rotary, "
    "Tensor? query_norm, Tensor? key_norm, Tensor? sinks, int heads, int kv_heads, int head_dim, float scale, "
    "int rotary_dim, int? window, float? softcap, float? norm_eps, float norm_offset) -> Tensor"
)

_operator = torch.ops.tersor.attend


def attend(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted values that the queries of a step see; its keys and values are written to their pages.

    Queries and keys are normed, then rotated; what a page holds is rounded to its dtype before it is used. A token sees
    those of its row up to itself. Nothing is read from the device by the host where kernels serve
    (`ops.attention_obstacle` says why they would not), and rows that share no page with what another row writes may
    stand in any order.

    Args:
        qkv: [T, (H + 2 KV) * D] float16, bfloat16 or float32: queries, keys and values of the tokens of the step, as a
            linear gives them.
        cache: pages of the layer.
        rows: of the step.
        form: of the layer.
        rotary: floats [positions, rotary_dim], cosines, then sines, for every position that a text reaches; not read
            where `form.rotary_dim` is 0.
        norms: floats [D] each, the weights of the RMS norm of queries and of keys, where `form.norm_eps` is a number.
        sinks: floats [H], a score of every head that belongs to no token (gpt-oss).

    Returns:
        [T, H * D] in qkv's dtype; zeros for padding.

    Raises:
        ShapeError: shapes, dtypes, devices or numbers that do not fit.
    """
    if not dense.looked_at(qkv, cache.pages, rotary, sinks):
        return _attend(qkv, cache, rows, form, rotary, norms, sinks)
    query_norm, key_norm = (None, None) if norms is None else norms
    return _operator(
        qkv,
        cache.pages,
        cache.scales,
        rows.starts,
        rows.lengths,
        rows.pages,
        rows.most_queries,
        rows.most_length,
        rows.settled,
        rows.shared,
        rows.most_few,
        rotary,
        query_norm,
        key_norm,
        sinks,
        form.heads,
        form.kv_heads,
        form.head_dim,
        form.scale,
        form.rotary_dim,
        form.window,
        form.softcap,
        form.norm_eps,
        form.norm_offset,
    )


def _attend(*arguments: Any) -> torch.Tensor:
    serve_attention.check(*arguments)
    return serve_attention.attend(*arguments)


def _arguments(
    qkv: torch.Tensor,
    pages: torch.Tensor,
    scales: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    most_queries: int,
    most_length: int,
    settled: bool,
    shared: torch.Tensor | None,
    most_few: int | None,
    rotary: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    sinks: torch.Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    rotary_dim: int,
    window: int | None,
    softcap: float | None,
    norm_eps: float | None,
    norm_offset: float,
) -> tuple[Any, ...]:
    """Return the arguments of `attend` of those of the operator."""
    form = AttentionForm(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        rotary_dim=rotary_dim,
        window=window,
        softcap=softcap,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )
    rows = Rows(starts, lengths, table, most_queries, most_length, settled, shared, most_few)
    norms = None if query_norm is None or key_norm is None else (query_norm, key_norm)
    return qkv, PagedCache(pages, scales), rows, form, rotary, norms, sinks


def _serve(*given: Any) -> torch.Tensor:
    return _attend(*_arguments(*given))


def _shape(*given: Any) -> torch.Tensor:
    arguments = _arguments(*given)
    serve_attention.check(*arguments)
    qkv, form = arguments[0], arguments[3]
    return qkv.new_empty(qkv.shape[0], form.heads * form.head_dim)


for _device in autocast.DEVICES:
    _library.impl("attend", _serve, _device)
    _library.impl("attend", autocast.ignoring(_operator.default), f"Autocast{_device}")
torch.library.register_fake("tersor::attend", _shape, lib=_library)
