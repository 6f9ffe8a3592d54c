"""One decoder for all architectures: what a step makes of its tokens, layer after layer. The host reads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tersor import ops
from tersor.models.config import DecoderConfig
from tersor.models.latent import LatentAttention
from tersor.models.mixture import Mixture
from tersor.models.norm import NormWeights
from tersor.models.weights import Embedding, FeedForward, Product, Products, Shared, tensors_of
from tersor.ops.attention_form import AttentionForm, PagedCache, Rows
from tersor.ops.collective import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer.

    Attributes:
        form: of `ops.attend`.
        qkv: queries, keys and values in one.
        out: of the weighted values.
        rotary: the table of the layer, which others share, or `None`.
        norms: weights [D] of the norms of queries and keys, or `None`.
        sinks: float32 [H], or `None`.
    """

    form: AttentionForm
    qkv: Product | Products
    out: Product
    rotary: torch.Tensor | None = None
    norms: tuple[torch.Tensor, torch.Tensor] | None = None
    sinks: torch.Tensor | None = None

    def __call__(
        self, x: torch.Tensor, cache: PagedCache, rows: Rows, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [T, H] of x [T, H], with `residual` added; keys and values of x are written to their pages."""
        mixed = ops.attend(self.qkv(x), cache, rows, self.form, self.rotary, self.norms, self.sinks)
        return self.out(mixed, residual)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory but the table."""
        yield from self.qkv.tensors()
        yield from self.out.tensors()
        yield from tensors_of(*(self.norms or ()), self.sinks)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Attention, then a feed-forward network or experts.

    Attributes:
        norms: before attention and before the feed-forward network.
        attention, ffn: of the layer.
        out_norms: after each of the two (`Residual.BOTH`), else `None`.
        ranks: whose sums are added up after each of the two; the first one's hold the residual.
    """

    norms: tuple[NormWeights, NormWeights]
    attention: Attention | LatentAttention
    ffn: FeedForward | Mixture
    out_norms: tuple[NormWeights, NormWeights] | None = None
    ranks: Ranks = ALONE

    def __call__(self, x: torch.Tensor, cache: PagedCache, rows: Rows) -> torch.Tensor:
        """Return [T, H] of x [T, H]."""
        (before, between), ranks = self.norms, self.ranks
        if self.out_norms is None:
            x = ranks.sum(self.attention(before(x), cache, rows, residual=ranks.once(x)))
            return ranks.sum(self.ffn(between(x), residual=ranks.once(x)))
        after, last = self.out_norms
        x = after(ranks.sum(self.attention(before(x), cache, rows)), residual=x)
        return last(ranks.sum(self.ffn(between(x))), residual=x)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory but the table."""
        for part in (*self.norms, self.attention, self.ffn, *(self.out_norms or ())):
            yield from part.tensors()


class Decoder:
    """A decoder with its weights.

    Attributes:
        config: what it is.
        dtype, device: of activations; weights are there, and plain ones are of it.
        embedding, layers, norm, head: its parts, in order.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Embedding,
        layers: Sequence[DecoderLayer],
        norm: NormWeights,
        head: Product | Shared,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.norm = norm
        self.head = head
        self.dtype, self.device = norm.weight.dtype, norm.weight.device

    def __call__(
        self, tokens: torch.Tensor, rows: Rows, caches: Sequence[PagedCache], places: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the logits that follow some of a step's tokens.

        Args:
            tokens: int64 [T] of all rows, and padding.
            rows: whose tokens they are.
            caches: pages of every layer; keys and values of the tokens are written to them.
            places: int64 or int32 [S], the tokens whose logits are wanted; `None` for all.

        Returns:
            [S, V] in `dtype`.
        """
        x = self.embedding(tokens, rows)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, rows)
        logits = self.head(self.norm(x if places is None else ops.gather_rows(x, places)))
        softcap = self.config.softcap
        return logits if softcap is None else ops.softcap(logits, softcap)

    def caches(self, count: int, dtype: torch.dtype | None = None) -> list[PagedCache]:
        """Return `count` pages of zeros for every layer, in the decoder's dtype where none is given."""
        forms = (layer.attention.form for layer in self.layers)
        return [PagedCache.empty(count, form, dtype or self.dtype, self.device) for form in forms]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor of the weights; one that two parts share is yielded twice."""
        yield from self.embedding.tensors()
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.norm.tensors()
        yield from self.head.tensors()

    @property
    def waits(self) -> str:
        """Why the host waits inside of a step, so that no CUDA graph is captured; an empty string if it does not."""
        mixtures = (layer.ffn for layer in self.layers if isinstance(layer.ffn, Mixture))
        return next((why for mixture in mixtures if (why := mixture.waits(self.dtype))), "")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, each counted once."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self.tensors()}.values())
