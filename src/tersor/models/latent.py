"""Attention whose keys and values come from one small vector a token (MLA: DeepSeek-V2, arXiv 2405.04434, section 2.1).

Pages hold keys and values of every head, as those of other decoders; the turned channels, which all heads share, stand
first in a head, and values are padded with zeros to the channels of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tersor import ops
from tersor.models.config import Latent
from tersor.models.norm import NormWeights, normed
from tersor.models.weights import Given, Product, Products, tensors_of
from tersor.ops import heads
from tersor.ops.attention_form import AttentionForm, PagedCache, Rows


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The attention of a layer.

    Attributes:
        form: of `ops.attend`.
        latent: sizes of what keys and values come from.
        down: makes of a token what queries come from (or queries), what keys and values come from, and the channels of
            keys that turn, one behind the other.
        query_norm, query_up: make queries, where they come from a vector of their own.
        key_value_norm, key_value_up: make keys and values: for every head its channels that do not turn, then values.
        out: of the weighted values.
        rotary: the table, which layers share.
    """

    form: AttentionForm
    latent: Latent
    down: Product | Products
    query_norm: NormWeights | None
    query_up: Product | None
    key_value_norm: NormWeights
    key_value_up: Product
    out: Product
    rotary: torch.Tensor | None

    @property
    def reader(self) -> Product | Products:
        """What reads the rows that come in, and nothing else does."""
        return self.down

    def mixed(self, x: Given, cache: PagedCache, rows: Rows) -> torch.Tensor:
        """Return the weighted values of x [T, H], which `out` reads; its keys and values are written to their pages."""
        latent, of = self.latent, self.heads
        first = latent.query or of.heads * of.width
        queries, inner, turning = self.down(x).split([first, latent.key_value, latent.turned], dim=-1)
        if self.query_norm is not None and self.query_up is not None:
            queries = self.query_up(normed(self.query_norm, queries, self.query_up))
        both = self.key_value_up(normed(self.key_value_norm, inner, self.key_value_up))
        qkv = heads.side_by_side(queries, both, turning, of)
        return heads.values_of(ops.attend(qkv, cache, rows, self.form, self.rotary), of)

    @property
    def heads(self) -> heads.LatentHeads:
        """Sizes of the heads."""
        latent = self.latent
        return heads.LatentHeads(
            heads=self.form.heads,
            fixed=latent.fixed,
            turned=latent.turned,
            value=latent.value,
            interleaved=latent.interleaved,
        )

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory but the table."""
        yield from self.down.tensors()
        if self.query_norm is not None and self.query_up is not None:
            yield from self.query_norm.tensors()
            yield from tensors_of(self.query_up.weight, self.query_up.bias)
        yield from self.key_value_norm.tensors()
        yield from self.key_value_up.tensors()
        yield from self.out.tensors()
