"""Steps of attention over pages that hold NaN wherever nothing may be read, and what they give in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from tersor.ops import attention_reference
from tersor.ops.attention_form import PAGE, AttentionForm, PagedCache, Rows

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step of one layer.

    Attributes:
        head_dim, heads, kv_heads: of the form; `form` has what else it is given.
        lengths, counts: of each row, its text and its new tokens; a length of 0 is padding.
        dtype: of activations; `e4m3` of pages, otherwise they have the same.
        rotary_dim: `None` rotates all channels.
        norms, sinks: whether there are such.
        tail: tokens after the last row.
        seed: of all numbers.
        prefixes: rows that begin with the same pages: some of them, and how many pages; what rows share already, they
            share with those of a later prefix of more pages.
    """

    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    lengths: tuple[int, ...] = (70,)
    counts: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float16
    e4m3: bool = False
    rotary_dim: int | None = None
    norms: bool = False
    sinks: bool = False
    tail: int = 0
    seed: int = 0
    form: dict[str, Any] = field(default_factory=dict)
    prefixes: tuple[tuple[tuple[int, ...], int], ...] = ()

    def __str__(self) -> str:
        kind = f"{self.head_dim}-{self.heads}-{self.kv_heads}-{str(self.dtype)[6:]}{'-e4m3' if self.e4m3 else ''}"
        flags = [name for name in ("norms", "sinks") if getattr(self, name)]
        rows = "_".join(f"{count}of{length}" for count, length in zip(self.counts, self.lengths, strict=True))
        return "-".join([kind, *flags, *self.form, rows])


class Step:
    """A case with its tensors.

    Attributes:
        form, qkv, cache, rows, rotary, norms, sinks: arguments of `ops.attend`.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.case, self.device = case, device
        rotary_dim = case.head_dim if case.rotary_dim is None else case.rotary_dim
        self.form = AttentionForm(
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            scale=case.head_dim**-0.5,
            rotary_dim=rotary_dim,
            norm_eps=1e-6 if case.norms else None,
            norm_offset=1.0 if case.norms else 0.0,
            **case.form,
        )
        starts = [0, *itertools.accumulate(case.counts)]
        needed = [-(-length // PAGE) for length in case.lengths]
        numbers = (torch.randperm(sum(needed) + 2, generator=generator) + 1).tolist()
        table = torch.zeros(len(needed), max(needed) + 1, dtype=torch.int32)
        for row, count in enumerate(needed):
            table[row, :count] = torch.tensor([numbers.pop() for _ in range(count)], dtype=torch.int32)
        for among, pages in case.prefixes:
            table[list(among), :pages] = table[among[0], :pages]
        cache = PagedCache.empty(sum(needed) + 3, self.form, torch.float8_e4m3fn if case.e4m3 else case.dtype)
        values = normal(*cache.pages.shape)
        cache.pages.copy_((100 * values).clamp(-448, 448) if case.e4m3 else values)
        if cache.scales is not None:
            cache.scales.copy_(torch.rand(cache.scales.shape, generator=generator) * 0.02 + 0.001)
        holes = cache.pages if cache.scales is None else cache.scales
        known = torch.zeros(holes.shape[0], PAGE, dtype=torch.bool)
        for row, (length, count) in enumerate(zip(case.lengths, case.counts, strict=True)):
            for position in range(max(length - count, 0)):
                known[table[row, position // PAGE], position % PAGE] = True
        holes.movedim(3, 1)[~known] = NAN
        self.cache = PagedCache(cache.pages.to(device), None if cache.scales is None else cache.scales.to(device))
        tokens = starts[-1] + case.tail
        self.qkv = normal(tokens, self.form.qkv_channels).to(device, case.dtype)
        most = max(case.lengths)
        angles = normal(most + 3, max(rotary_dim // 2, 1))
        self.rotary = torch.cat([angles.cos(), angles.sin()], 1).to(device) if rotary_dim else None
        weights = [(normal(case.head_dim) / 4).to(device, case.dtype) for _ in range(2)]
        self.norms = (weights[0], weights[1]) if case.norms else None
        self.sinks = normal(case.heads).to(device) if case.sinks else None
        self.rows = Rows(
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(case.lengths, dtype=torch.int32, device=device),
            table.to(device),
            max(case.counts),
            most,
        )

    def arguments(self, cache: PagedCache | None = None) -> tuple[Any, ...]:
        """Return the arguments of `ops.attend`, with pages of one's own."""
        return self.qkv, cache or self.cache, self.rows, self.form, self.rotary, self.norms, self.sinks

    def copy_of_cache(self) -> PagedCache:
        """Return pages as they are before the step."""
        return PagedCache(self.cache.pages.clone(), None if self.cache.scales is None else self.cache.scales.clone())

    def expected(self) -> tuple[torch.Tensor, PagedCache]:
        """Return what the reference gives, unrounded, and its pages."""
        cache = self.copy_of_cache()
        qkv, _, rows, form, rotary, norms, sinks = self.arguments()
        return attention_reference.attend(qkv.float(), cache, rows, form, rotary, norms, sinks), cache


def tolerance(step: Step, expected: torch.Tensor) -> torch.Tensor:
    """Bound the error of a result.

    Queries, and the weights of values, are rounded to 16 bits before they are multiplied. With u half a unit in the
    last place, roundings of a query's D channels move a score by u |q| |k| scale / sqrt(3 D), one standard deviation,
    and that moves the result, as roundings of weights by u / sqrt(3) do, by so much of the values' root mean square at
    most. Six standard deviations of all of it are allowed, at the largest query and key, and the result's rounding.

    Returns:
        The largest allowed absolute error, like `expected`.
    """
    case, form = step.case, step.form
    unit = torch.finfo(torch.float16 if case.e4m3 else case.dtype).eps / 2
    both = (
        step.cache.pages.float()
        if step.cache.scales is None
        else step.cache.pages.float() * step.cache.scales[..., None]
    )
    keys, values = both.nan_to_num(0).unbind(1)
    q, k, v = step.qkv.float().split([count * case.head_dim for count in (case.heads, case.kv_heads, case.kv_heads)], 1)
    q, k = q.unflatten(1, (case.heads, -1)), k.unflatten(1, (case.kv_heads, -1))
    if step.norms is not None:
        q, k = (
            one * one.square().mean(-1, keepdim=True).rsqrt() * (1 + weight.float())
            for one, weight in zip((q, k), step.norms, strict=True)
        )
    query = q.norm(dim=-1).max().item()
    key = max(keys.norm(dim=-1).max().item(), k.norm(dim=-1).max().item())
    value = max(
        values.square().sum().div((values != 0).sum().clamp_min(1)).sqrt().item(), v.square().mean().sqrt().item()
    )
    score = query * key * form.scale / case.head_dim**0.5
    last = torch.finfo(case.dtype)
    return 6 / 3**0.5 * unit * value * (1 + score) + expected.abs() * last.eps + last.smallest_normal


def same_pages(left: PagedCache, right: PagedCache) -> float:
    """Return which part of the numbers of two caches is the same, bit by bit; NaN equals NaN."""
    if left.scales is not None and right.scales is not None:
        assert torch.allclose(left.scales, right.scales, rtol=1e-5, equal_nan=True)
    numbers = [
        one.pages.view(torch.uint8) if one.scales is not None else one.pages.nan_to_num(7) for one in (left, right)
    ]
    return (numbers[0] == numbers[1]).sum().item() / numbers[0].numel()
