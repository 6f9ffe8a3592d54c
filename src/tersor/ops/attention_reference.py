"""What attention over pages means, in plain torch: the definition of the kernels, which serves where they do not.

Everything is float32 until the result is rounded; what a page holds is rounded to its dtype before it is used. Where
rows have several tokens the host reads their lengths; rows of one token each are served at once, without that.
"""

from __future__ import annotations

import torch

from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache, Rows

E4M3_MAX = 448.0


def attend(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return `ops.attend`: [T, H * D], zeros for padding."""
    if rows.most_queries == 1:
        return _attend_one_each(qkv, cache, rows, form, rotary, norms, sinks)
    out = qkv.new_zeros(qkv.shape[0], form.heads * form.head_dim)
    starts, lengths = rows.starts.tolist(), rows.lengths.tolist()
    for row, length in enumerate(lengths):
        first, end = starts[row], starts[row + 1]
        if length == 0 or first == end:
            continue
        positions = torch.arange(length - (end - first), length, device=qkv.device)
        q, k, v = heads(qkv[first:end].float(), positions, form, rotary, norms)
        pages = rows.pages[row, : -(-length // PAGE)].long()
        store(cache, k, v, pages[positions // PAGE], positions % PAGE)
        keys, values = (one[:, :length] for one in stored(cache, pages))
        out[first:end] = product(q, keys, values, positions, form, sinks).flatten(1).to(out.dtype)
    return out


def _attend_one_each(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return `attend` of rows of one token or none, all at once over pages as many as the longest text may have."""
    real = (rows.lengths > 0) & (rows.starts[1:] > rows.starts[:-1])
    positions = (rows.lengths.long() - 1).clamp_min(0)
    own = rows.starts[:-1].long().clamp_max(qkv.shape[0] - 1)
    q, k, v = heads(qkv[own].float(), positions, form, rotary, norms)
    table = rows.pages[:, : -(-rows.most_length // PAGE)].long()
    page = table.gather(1, (positions // PAGE)[:, None])[:, 0].where(real, 0)
    writer = torch.where(real, torch.arange(len(real), device=real.device), real.int().argmax())
    store(
        cache, k[writer], v[writer], page[writer], positions[writer] % PAGE, real.any()
    )  # padding writes as others do
    keys, values = (one.unflatten(1, (table.shape[0], -1)).transpose(0, 1) for one in stored(cache, table.flatten()))
    behind = torch.arange(keys.shape[2], device=qkv.device) > positions[:, None]  # pages there may hold anything
    keys, values = (one.masked_fill(behind[:, None, :, None], 0.0) for one in (keys, values))
    gave = product(q[:, None], keys, values, positions[:, None], form, sinks)[:, 0]
    out = qkv.new_zeros(qkv.shape[0], form.heads * form.head_dim)
    return out.index_put((own,), gave.flatten(1).to(out.dtype).where(real[:, None], 0), accumulate=True)


def heads(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    form: AttentionForm,
    rotary: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [q, H, D], keys and values [q, KV, D] of one row, normed and rotated."""
    sizes = (form.heads, form.kv_heads, form.kv_heads)
    q, k, v = (
        one.unflatten(1, (-1, form.head_dim)) for one in qkv.split([count * form.head_dim for count in sizes], 1)
    )
    if norms is not None and form.norm_eps is not None:
        q, k = (
            one * torch.rsqrt(one.square().mean(-1, keepdim=True) + form.norm_eps) * (weight.float() + form.norm_offset)
            for one, weight in zip((q, k), norms, strict=True)
        )
    if rotary is not None and form.rotary_dim:
        q, k = (rotated(one, rotary[positions], form.rotary_dim) for one in (q, k))
    return q, k, v


def rotated(x: torch.Tensor, turns: torch.Tensor, dim: int) -> torch.Tensor:
    """Rotate the first `dim` channels of x [q, heads, D]; `turns` [q, dim]: cosines, then sines."""
    cos, sin = (one[:, None] for one in turns.float().chunk(2, dim=1))
    low, high, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def store(
    cache: PagedCache,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    written: torch.Tensor | None = None,
) -> None:
    """Write keys and values [q, KV, D] of tokens to their places in pages, unless `written`, one bool, is false."""
    both = torch.stack([keys, values], dim=1)  # [q, 2, KV, D]
    if cache.scales is not None:
        most = both.abs().amax(-1)
        scales = (most / most.new_full((), E4M3_MAX)).clamp_min(2.0**-24)  # torch multiplies by 1 / a Python number
        both = both / scales[..., None]
        cache.scales[pages, :, :, slots] = _chosen(written, scales, cache.scales[pages, :, :, slots])
    codes = both.to(cache.pages.dtype)
    cache.pages[pages, :, :, slots] = _chosen(written, codes, cache.pages[pages, :, :, slots])


def _chosen(written: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return new if written is None else torch.where(written, new, old)


def stored(cache: PagedCache, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what pages hold, keys and values float32 [KV, len(pages) * PAGE, D]."""
    both = cache.pages[pages].float()  # [pages, 2, KV, PAGE, D]
    if cache.scales is not None:
        both = both * cache.scales[pages][..., None]
    keys, values = both.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return keys, values


def product(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: AttentionForm,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return weighted values [..., q, H, D]: queries at `positions` [..., q] over keys [..., KV, length, D]."""
    q = q.unflatten(-2, (form.kv_heads, -1))  # [..., q, KV, H / KV, D]
    scores = torch.einsum("...qkgd,...kld->...kgql", q, keys) * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    places, own = torch.arange(keys.shape[-2], device=q.device), positions[..., None, None, :, None]
    hidden = places > own
    if form.window is not None:
        hidden = hidden | (places <= own - form.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:  # a score of every head that belongs to no token (gpt-oss)
        sink = sinks.float().view(form.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return torch.einsum("...kgql,...kld->...qkgd", weights, values).flatten(-3, -2)
