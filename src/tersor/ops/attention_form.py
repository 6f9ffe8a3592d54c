"""What attention reads and writes: its form in a model, pages of keys and values, and the rows of a step.

A step computes T tokens of R rows. A row is a request and q >= 1 new tokens of it, the last ones of a text of `lengths`
tokens; those before are in its pages. Tokens of a row stand side by side, rows in order. All counts live on the device,
so that one CUDA graph serves any texts: rows of length 0, and tokens after the last row, are padding, for which nothing
is written to a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE = 64
"""Tokens of a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionForm:
    """The attention of one layer.

    Attributes:
        heads: query heads H.
        kv_heads: heads of keys and values KV, which divide H.
        head_dim: channels of a head D.
        scale: multiplies the products of queries and keys.
        rotary_dim: leading channels of a head that are rotated by position; 0 for none. Channel i turns with channel
            i + rotary_dim / 2 (the form of Llama, arXiv 2104.09864).
        window: a token sees itself and so many tokens before it, less one: the last `window` of them; `None` is all.
        softcap: s -> softcap * tanh(s / softcap) of every scaled product, or `None` (Gemma 2, arXiv 2408.00118).
        norm_eps: of the RMS norm that queries and keys have, a head at a time, before they are rotated; `None` is none.
        norm_offset: is added to the weights of that norm (1 for Gemma).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary_dim: int = 0
    window: int | None = None
    softcap: float | None = None
    norm_eps: float | None = None
    norm_offset: float = 0.0

    @property
    def qkv_channels(self) -> int:
        """Channels of queries, keys and values of a token, in this order."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(slots=True)
class PagedCache:
    """Keys and values of one layer.

    Attributes:
        pages: [P, 2, KV, PAGE, D]: of a page its keys, then its values; float16, bfloat16, float32 or float8_e4m3fn.
        scales: float32 [P, 2, KV, PAGE] that e4m3 numbers are multiplied with, one a token and head; else `None`.
    """

    pages: torch.Tensor
    scales: torch.Tensor | None = None

    @staticmethod
    def empty(
        count: int, form: AttentionForm, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> PagedCache:
        """Return `count` pages of zeros."""
        shape = (count, 2, form.kv_heads, PAGE, form.head_dim)
        pages = torch.zeros(shape, dtype=dtype, device=device)
        scaled = dtype == torch.float8_e4m3fn
        return PagedCache(pages, torch.ones(shape[:-1], dtype=torch.float32, device=device) if scaled else None)


@dataclass(slots=True)
class Rows:
    """The rows of a step.

    Attributes:
        starts: int32 [R + 1]: row r has the tokens from starts[r] to starts[r + 1] of the step.
        lengths: int32 [R]: tokens of the row's text, those of this step included; 0 for a padded row.
        pages: int32 [R, M]: token i of the text is in page pages[r, i / PAGE], at i % PAGE.
        most_queries: the host knows that no row has more new tokens.
        most_length: the host knows that no text is longer; at most M * PAGE.
        settled: the host knows that no kernel which may still run when attention starts (those of the same chain of
            programmatic launches) writes the tensors above, or earlier tokens of a page: both are then read ahead of
            its end. So it is where another graph, or a copy, filled them.
        shared: int32 [1 + 3 R + 5 C], which full pages of their beginnings rows of one new token read together, or
            `None`. What attention gives does not depend on it, but for rounding. Side by side there are: how many items
            there are; the rows in an order [R]; for every row the first page that nobody reads for it, and the number
            of its parts [R, 2], 0 and 0 where it shares nothing; items [C, 5]. An item is some rows, the first of them
            and their number in that order, some pages, the first and the end, and which part of the rows this is. All
            its rows have these pages in their tables, and their new tokens are not in them; with the heads that share
            keys, they are no more than `kernels.attention.SHARED_QUERIES` queries. Of every row the parts 0, 1, ...
            are all there, up to `kernels.attention.most_parts`, and their pages are those before its own first one.
        most_few: the host knows that no row of up to `kernels.attention.FEW_QUERIES` new tokens has more; `None` is
            what `most_queries` says of them. Where long prompts stand beside rows of one token, it makes those faster.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    most_queries: int
    most_length: int
    settled: bool = False
    shared: torch.Tensor | None = None
    most_few: int | None = None

    @staticmethod
    def of_text(count: int, device: torch.device) -> Rows:
        """Return the rows of a step that computes a whole text of `count` tokens, in pages from the first one on."""
        return Rows(
            starts=torch.tensor([0, count], dtype=torch.int32, device=device),
            lengths=torch.tensor([count], dtype=torch.int32, device=device),
            pages=torch.arange(-(-count // PAGE), dtype=torch.int32, device=device)[None],
            most_queries=count,
            most_length=count,
        )
