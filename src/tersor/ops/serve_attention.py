"""Serve one call of attention over pages: checked by the host, then by kernels where a GPU has them, else by the
reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tersor import hardware
from tersor.errors import ShapeError
from tersor.kernels import attention, attention_sm90, decode_attention, jit, shared_attention
from tersor.kernels.attention import AppendLaunch, Kind, PrefillLaunch, Problem
from tersor.kernels.decode_attention import DecodeLaunch
from tersor.kernels.shared_attention import SharedLaunch
from tersor.kernels.tune.shared_pages import SharedCosts, shared_costs
from tersor.ops import attention_reference, current, dispatch, mode
from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache, Rows

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_PAGE_DTYPES = (*_DTYPES, torch.float8_e4m3fn)
_PREPARED = 1024
"""Prepared launches that are kept."""
_OF_APPEND = ("qkv", "stride", "rotary", "norms")
"""Arguments of append.cuh, behind which prefill reads pages and queries alone."""

Norms = tuple[torch.Tensor, torch.Tensor]


def check(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None,
    norms: Norms | None,
    sinks: torch.Tensor | None,
) -> None:
    """Raise ShapeError where the arguments of `ops.attend` do not fit each other; nothing on a device is read."""
    _check_form(form)
    if qkv.dim() != 2 or qkv.shape[1] != form.qkv_channels or qkv.dtype not in _DTYPES:
        raise ShapeError(
            f"attend: qkv is {list(qkv.shape)} {qkv.dtype}, expected [tokens, {form.qkv_channels}] in float16, "
            f"bfloat16 or float32 for {form.heads} and 2 x {form.kv_heads} heads of {form.head_dim}"
        )
    pages, scales = cache.pages, cache.scales
    if (
        pages.dim() != 5
        or pages.shape != (pages.shape[0], 2, form.kv_heads, PAGE, form.head_dim)
        or pages.dtype not in _PAGE_DTYPES
    ):
        raise ShapeError(
            f"attend: pages are {list(pages.shape)} {pages.dtype}, expected [pages, 2, {form.kv_heads}, {PAGE}, "
            f"{form.head_dim}] in float16, bfloat16, float32 or float8_e4m3fn"
        )
    if (scales is None) == (pages.dtype == torch.float8_e4m3fn):
        raise ShapeError(f"attend: pages of {pages.dtype} come {'without' if scales is None else 'with'} scales")
    if scales is not None and (scales.shape != pages.shape[:-1] or scales.dtype != torch.float32):
        raise ShapeError(
            f"attend: scales are {list(scales.shape)} {scales.dtype}, expected float32 {list(pages.shape[:-1])}"
        )
    _check_rows(rows)
    if form.rotary_dim and rotary is None:
        raise ShapeError(f"attend: {form.rotary_dim} channels are rotated, and there is no table of rotations")
    if rotary is not None and form.rotary_dim:
        if rotary.dim() != 2 or rotary.shape[1] != form.rotary_dim or rotary.dtype not in _DTYPES:
            raise ShapeError(
                f"attend: rotary is {list(rotary.shape)} {rotary.dtype}, expected floats [positions, {form.rotary_dim}]"
            )
        if rotary.shape[0] < rows.most_length:
            raise ShapeError(
                f"attend: rotary has {rotary.shape[0]} positions, texts have up to {rows.most_length} tokens"
            )
    if (norms is None) != (form.norm_eps is None):
        raise ShapeError(
            f"attend: norm_eps is {form.norm_eps}, and there are {'no' if norms is None else '2'} weights of norms"
        )
    for name, one, size in (
        ("weights of the query norm", None if norms is None else norms[0], form.head_dim),
        ("weights of the key norm", None if norms is None else norms[1], form.head_dim),
        ("sinks", sinks, form.heads),
    ):
        if one is not None and (one.shape != (size,) or one.dtype not in _DTYPES):
            raise ShapeError(f"attend: {name} are {list(one.shape)} {one.dtype}, expected [{size}] floats")
    others = (pages, scales, rows.starts, rows.lengths, rows.pages, rows.shared, rotary, sinks, *(norms or ()))
    for one in others:
        if one is not None and one.device != qkv.device:
            raise ShapeError(f"attend: qkv is on {qkv.device}, another tensor of the call on {one.device}")


def _check_form(form: AttentionForm) -> None:
    if min(form.heads, form.kv_heads, form.head_dim) < 1 or form.heads % form.kv_heads:
        raise ShapeError(
            f"attend: {form.heads} heads of {form.head_dim} channels cannot share {form.kv_heads} heads of keys"
        )
    if not 0 <= form.rotary_dim <= form.head_dim or form.rotary_dim % 2:
        raise ShapeError(f"attend: rotary_dim is {form.rotary_dim}, expected an even number up to {form.head_dim}")
    if form.scale <= 0 or (form.softcap is not None and form.softcap <= 0):
        raise ShapeError(f"attend: scale is {form.scale} and softcap {form.softcap}, expected positive numbers")
    if form.window is not None and form.window < 1:
        raise ShapeError(f"attend: window is {form.window}, expected at least 1 token")


def _check_rows(rows: Rows) -> None:
    count = rows.lengths.numel()
    for name, one, shape in (
        ("starts", rows.starts, (count + 1,)),
        ("lengths", rows.lengths, (count,)),
        ("pages", rows.pages, (count, rows.pages.shape[-1] if rows.pages.dim() else 0)),
    ):
        if one.shape != shape or one.dtype != torch.int32:
            raise ShapeError(f"attend: {name} of rows are {list(one.shape)} {one.dtype}, expected int32 {list(shape)}")
    shared = rows.shared
    if shared is not None:
        items = shared.numel() - 1 - 3 * count
        if shared.dim() != 1 or shared.dtype != torch.int32 or items < 0 or items % 5 or not shared.is_contiguous():
            raise ShapeError(
                f"attend: shared pages of rows are {list(shared.shape)} {shared.dtype}, expected contiguous int32 "
                f"[1 + 3 x {count} + 5 C]"
            )
    if min(rows.most_queries, rows.most_few or 0) < 0 or not 0 <= rows.most_length <= rows.pages.shape[1] * PAGE:
        raise ShapeError(
            f"attend: rows have up to {rows.most_queries} new tokens (few: {rows.most_few}) of {rows.most_length}, "
            f"their tables hold {rows.pages.shape[1]} pages of {PAGE}"
        )


def obstacle(
    qkv: torch.Tensor,
    cache: PagedCache,
    form: AttentionForm,
    rotary: torch.Tensor | None = None,
    norms: Norms | None = None,
    sinks: torch.Tensor | None = None,
) -> str:
    """Return why no kernel serves a call of `ops.attend` that is legal, or an empty string."""
    why = dispatch.environment_reason(qkv.dtype, qkv.device)
    if why:
        return why
    pages, dtype = cache.pages, qkv.dtype
    why = misfit(form, dtype, pages.dtype)
    if why:
        return why
    if not pages.is_contiguous() or pages.data_ptr() % 16:
        return "pages are not contiguous from 16 bytes on"
    if cache.scales is not None and (not cache.scales.is_contiguous() or cache.scales.data_ptr() % 16):
        return "scales of pages are not contiguous from 16 bytes on"
    if rotary is not None and form.rotary_dim and (rotary.dtype != torch.float32 or not _pairs(rotary)):
        return f"kernels take contiguous rotations in float32, these are in {rotary.dtype}"
    for one in norms or ():
        if one.dtype != dtype or not _pairs(one):
            return f"kernels take contiguous weights of norms in {dtype}, these are in {one.dtype}"
    if sinks is not None and (sinks.dtype not in (dtype, torch.float32) or not sinks.is_contiguous()):
        return f"kernels take contiguous sinks in {dtype} or float32, these are in {sinks.dtype}"
    return ""


def misfit(form: AttentionForm, dtype: torch.dtype, pages: torch.dtype) -> str:
    """Return why no kernel serves a form with activations of a dtype and pages of another, or an empty string."""
    if form.head_dim % 16 or form.head_dim > attention.MOST_DIM:
        return f"kernels take heads of 16, 32 to {attention.MOST_DIM} channels, not of {form.head_dim}"
    if form.rotary_dim % 4:
        return f"kernels rotate a multiple of 4 channels, not {form.rotary_dim}"
    if pages not in (dtype, torch.float8_e4m3fn):
        return f"kernels take pages in {dtype}, as activations, or in float8_e4m3fn, not in {pages}"
    return ""


def _pairs(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is contiguous, and its numbers can be read by twos."""
    return tensor.is_contiguous() and tensor.data_ptr() % (2 * tensor.element_size()) == 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """How calls of one form and size are served.

    Attributes:
        shared: serves what rows read together; `None` where they do not.
        decode: serves rows of few new tokens, and padding.
        append, prefill: serve the others, one after the other; `None` where there are none.
        behind: floats and counters ahead of those that the kernel of `kernels.attention_sm90` has; `None` where another
            prefills.
        floats, counters: as in `kernels.decode_attention.Grid`, and those of prefill.
    """

    shared: SharedLaunch | None
    decode: DecodeLaunch
    append: AppendLaunch | None
    prefill: PrefillLaunch | None
    behind: tuple[int, int] | None
    floats: int
    counters: int


@functools.lru_cache(_PREPARED)
def _prepared(
    form: AttentionForm,
    kind: Kind,
    index: int,
    rows: int,
    tokens: int,
    most_queries: int,
    most_few: int,
    most_pages: int,
    table_stride: int,
    invariant: bool,
    shares: bool,
) -> Prepared:
    chip = hardware.of_device(index)
    problem = Problem(
        rows=rows,
        tokens=tokens,
        heads=form.heads,
        kv_heads=form.kv_heads,
        rotary_dim=form.rotary_dim,
        window=form.window,
        softcap=form.softcap,
        scale=form.scale,
        eps=form.norm_eps or 0.0,
        offset=form.norm_offset,
        most_queries=most_queries,
        most_few=most_few,
        most_pages=most_pages,
        table_stride=table_stride,
        invariant=invariant,
        shares=shares,
    )
    grid = decode_attention.grid_of(kind, problem, chip.sms)
    tiles = problem.query_tiles(kind)
    crowded = decode_attention.is_crowded(kind, rows, form.kv_heads, invariant, chip.sms)
    decode = jit.get(decode_attention.decode_source(kind, tiles, chip, shares, crowded), index)
    shared = None
    if shares:
        function = jit.get(shared_attention.shared_source(kind, chip), index)
        shared = shared_attention.prepare_shared(function, kind, problem, grid, attention.QUERIES * tiles, chip.sms)
    once = decode_attention.prepare_decode(decode, problem, grid)
    if most_queries <= attention.FEW_QUERIES:
        return Prepared(shared, once, None, None, None, grid.floats, grid.counters)
    append = attention.prepare_append(jit.get(attention.append_source(kind), index), problem, chip.sms)
    if not attention_sm90.takes(kind, chip):
        product = jit.get(attention.prefill_source(kind, chip), index)
        prefill = attention.prepare_prefill(product, problem)
        return Prepared(shared, once, append, prefill, None, grid.floats, grid.counters)
    product = jit.get(attention_sm90.prefill_source(kind, chip), index)
    wide, behind = attention_sm90.grid_of(kind, problem, chip.sms), (-(-grid.floats // 4) * 4, grid.counters)
    prefill = attention_sm90.prepare_prefill(product, kind, problem, wide)
    return Prepared(shared, once, append, prefill, behind, behind[0] + wide.floats, behind[1] + wide.counters)


def attend(
    qkv: torch.Tensor,
    cache: PagedCache,
    rows: Rows,
    form: AttentionForm,
    rotary: torch.Tensor | None,
    norms: Norms | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return what `ops.attend` says, of arguments that are checked."""
    count, tokens = rows.lengths.numel(), qkv.shape[0]
    if not count or not tokens or obstacle(qkv, cache, form, rotary, norms, sinks):
        return attention_reference.attend(qkv, cache, rows, form, rotary, norms, sinks)
    index = qkv.get_device()
    if index >= 0 and current.device() != index:
        with torch.cuda.device(index):
            return attend(qkv, cache, rows, form, rotary, norms, sinks)
    if qkv.stride(1) != 1 or qkv.stride(0) % 2 or qkv.data_ptr() % 4:
        qkv = qkv.contiguous()
    starts, lengths, table = rows.starts.contiguous(), rows.lengths.contiguous(), rows.pages
    if table.stride(1) != 1:
        table = table.contiguous()
    kind = Kind(head_dim=form.head_dim, dtype=_DTYPES[qkv.dtype], e4m3=cache.scales is not None)
    most = max(rows.most_queries, 1)
    now, chip, stream = mode.current(), hardware.of_device(index), current.stream(index)
    plan = rows.shared
    if now.batch_invariant or not shares(form, rows.most_length):
        plan = None
    prepared = _prepared(
        form,
        kind,
        index,
        count,
        tokens,
        most,
        most if rows.most_few is None else max(min(rows.most_few, most), 1),
        -(-rows.most_length // PAGE),
        table.stride(0),
        now.batch_invariant,
        plan is not None,
    )
    partial = arrived = 0
    kept = None
    if prepared.counters:
        partial, arrived, kept = now.workspace.split_sums(index, stream, prepared.floats, prepared.counters)
    channels = form.heads * form.head_dim
    out = current.empty((tokens, channels), (channels, 1), qkv.dtype)
    read = {
        "stream": stream,
        "qkv": qkv.data_ptr(),
        "stride": qkv.stride(0),
        "pages_of_layer": cache.pages.data_ptr(),
        "scales": _address(cache.scales),
        "starts": starts.data_ptr(),
        "lengths": lengths.data_ptr(),
        "table": table.data_ptr(),
        "rotary": _address(rotary) if form.rotary_dim else 0,
        "norms": (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr()),
        "early": now.early and chip.capability >= (9, 0),
    }
    common = {
        **read,
        "sinks": _address(sinks),
        "wide_sinks": sinks is not None and sinks.dtype == torch.float32,
        "out": out.data_ptr(),
    }
    parts = {"partial": partial, "shared": _address(plan), "settled": rows.settled}
    if prepared.shared is not None:
        prepared.shared(**read, **parts, page_count=cache.pages.shape[0])
    prepared.decode(**common, **parts, arrived=arrived)
    if prepared.append is not None and prepared.prefill is not None:
        prepared.append(**read, out=out.data_ptr())
        seen = {name: given for name, given in common.items() if name not in _OF_APPEND}
        if prepared.behind is None:
            prepared.prefill(**seen)
        else:
            floats, counters = prepared.behind
            places = {"partial": partial + 4 * floats, "taken": arrived + 4 * counters}
            prepared.prefill(**seen, **places, page_count=cache.pages.shape[0])
    del kept  # the launch is under way
    return out


def shares(form: AttentionForm, most_length: int) -> bool:
    """Tell whether rows of texts of up to so many tokens can read pages together: not where a window hides some, nor
    where the heads of one row are as many queries as a CTA takes.
    """
    return (form.window is None or form.window >= most_length) and _rows_of_item(form) > 1


def _rows_of_item(form: AttentionForm) -> int:
    """Return how many rows can read pages together in one CTA."""
    return attention.SHARED_QUERIES // (form.heads // form.kv_heads)


def sharing_costs(
    forms: Sequence[AttentionForm], most_length: int, dtype: torch.dtype, pages: torch.dtype, device: torch.device
) -> SharedCosts | None:
    """Return what it costs that rows of decode steps read pages together, or `None` where no layer can.

    Args:
        forms: of all layers.
        most_length: tokens of a text at most.
        dtype, pages: of activations and of pages.
        device: where the steps run.
    """
    form = next((one for one in forms if shares(one, most_length) and not misfit(one, dtype, pages)), None)
    chip = dispatch.kernel_chip(device)
    if form is None or chip is None or dtype == torch.float32:
        return None
    kind = Kind(head_dim=form.head_dim, dtype=_DTYPES[dtype], e4m3=pages == torch.float8_e4m3fn)
    every = [_rows_of_item(one) for one in forms]
    return replace(shared_costs(kind, form.heads, form.kv_heads, chip), rows=min(one for one in every if one > 1))


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
