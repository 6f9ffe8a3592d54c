"""One decoder for all architectures: what a step makes of its tokens, layer after layer. The host reads nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tersor import ops
from tersor.layouts import PackedWeight
from tersor.models.config import DecoderConfig
from tersor.models.latent import LatentAttention
from tersor.models.mixture import Mixture
from tersor.models.norm import NormWeights, behind_sum, fold, normed
from tersor.models.weights import Between, Embedding, FeedForward, Given, Hidden, Product, Products, Shared, tensors_of
from tersor.ops.attention_form import AttentionForm, PagedCache, Rows
from tersor.ops.collective import ALONE, Ranks

if TYPE_CHECKING:
    from tersor.models.streamed import Streamed


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

    @property
    def reader(self) -> Product | Products:
        """What reads the rows that come in, and nothing else does."""
        return self.qkv

    def mixed(self, x: Given, cache: PagedCache, rows: Rows) -> torch.Tensor:
        """Return the weighted values of x [T, H], which `out` reads; its keys and values are written to their pages."""
        return ops.attend(self.qkv(x), cache, rows, self.form, self.rotary, self.norms, self.sinks)

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
        ranks, inner_ranks: whose sums are added up after attention, and after the other; the first one's hold the
            residual. One that every rank computes whole is nobody's sum.
    """

    norms: tuple[NormWeights, NormWeights]
    attention: Attention | LatentAttention
    ffn: FeedForward | Mixture
    out_norms: tuple[NormWeights, NormWeights] | None = None
    ranks: Ranks = ALONE
    inner_ranks: Ranks = ALONE

    def __call__(
        self,
        x: Between,
        cache: PagedCache,
        rows: Rows,
        following: DecoderLayer | None = None,
        places: torch.Tensor | None = None,
    ) -> Between:
        """Return [T, H] of x [T, H]; of both the norm behind may be done, or all but a division by it.

        Args:
            x: what the layer ahead returned.
            cache, rows: as for `ops.attend`.
            following: the next layer, or `None`.
            places: int64 or int32 [S], the tokens of which something is wanted: [S, H] is returned; `None` for all.
        """
        (before, between), attention, ffn = self.norms, self.attention, self.ffn
        ranks, inside = self.ranks, self.inner_ranks
        mixed = attention.mixed(normed(before, x, attention.reader), cache, rows)
        if places is not None:
            mixed, x = ops.gather_rows(mixed, places), ops.gather_rows(_plain(x), places)
            if not len(places):  # in the middle of prompts
                return x
        if self.out_norms is not None:
            after, last = self.out_norms
            y = after(ranks.sum(attention.out(mixed)), residual=_plain(x))
            made = ffn(normed(between, y, ffn.up)) if isinstance(ffn, FeedForward) else _plain(ffn(between(y)))
            return last(inside.sum(made), residual=y)
        if not isinstance(ffn, FeedForward):  # experts
            y = _plain(_added(attention.out, mixed, x, ranks))
            behind = None
            if following is not None and inside.count == 1:
                behind = behind_sum(following.norms[0], following.attention.reader)
            z = ffn(y, residual=inside.once(y), norm=between, behind=behind)
            return z if isinstance(z, ops.Normed) else inside.sum(z)
        x = _added(attention.out, mixed, x, ranks, between, ffn.up)
        inner = ffn.inner(normed(between, x, ffn.up))
        if following is None:
            return _added(ffn.down, inner, x, inside)
        return _added(ffn.down, inner, x, inside, following.norms[0], following.attention.reader)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor in memory but the table."""
        for part in (*self.norms, self.attention, self.ffn, *(self.out_norms or ())):
            yield from part.tensors()


def _added(
    product: Product,
    x: torch.Tensor | ops.Quantized,
    residual: Between,
    ranks: Ranks,
    norm: NormWeights | None = None,
    reader: object = None,
) -> Hidden:
    """Return the product of x with the residual added, and what `reader` needs of the norm between the two."""
    addend = _plain(residual)
    folded = fold(norm, x, product, reader) if norm is not None and isinstance(x, torch.Tensor) else None
    if folded is None or not isinstance(product.weight, PackedWeight) or not isinstance(x, torch.Tensor):
        return ranks.sum(product(x, ranks.once(addend)))
    return ops.linear_norm_out(x, product.weight, folded, product.bias, residual=addend)


def _plain(x: Between) -> torch.Tensor:
    """Return rows as they are before a norm."""
    return x if isinstance(x, torch.Tensor) else x.x


class Decoder:
    """A decoder with its weights, or a stage of one.

    Attributes:
        config: what the whole is.
        dtype, device: of activations; weights are there, and plain ones are of it.
        embedding, layers, norm, head: its parts, in order. The embedding is in the first stage alone, norm and head are
            in the last, and elsewhere `None`.
        streamed: brings the weights of layers that find theirs in buffers, or `None` where all have memory of their
            own.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embedding: Embedding | None,
        layers: Sequence[DecoderLayer],
        norm: NormWeights | None,
        head: Product | Shared | None,
        streamed: Streamed | None = None,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.norm = norm
        self.head = head
        self.streamed = streamed
        weight = self.layers[0].norms[0].weight
        self.dtype, self.device = weight.dtype, weight.device

    def __call__(
        self, tokens: torch.Tensor, rows: Rows, caches: Sequence[PagedCache], places: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the logits that follow some of a step's tokens, [S, V] in `dtype`; arguments are those of `states`."""
        return self.logits(self.states(tokens, rows, caches, places))

    def states(
        self, given: torch.Tensor, rows: Rows, caches: Sequence[PagedCache], places: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the last states of some of a step's tokens, behind the last norm: what the head reads.

        A stage that is not the last returns those of all tokens, before any norm: what the next one is given.

        Args:
            given: int64 [T], the tokens of all rows, and padding; but for the first stage what the one ahead returned.
            rows: whose tokens they are.
            caches: pages of every layer; keys and values of the tokens are written to them.
            places: int64 or int32 [S], the tokens whose states are wanted; `None` for all.

        Returns:
            [S, H] in `dtype`, or [T, H].
        """
        x: Between = given if self.embedding is None else self.embedding(given, rows)
        if self.norm is None:
            places = None
        few = places if places is not None and len(places) < len(given) else None
        streamed = self.streamed
        if streamed is not None:
            streamed.begin()
        for index, (layer, cache, following) in enumerate(
            zip(self.layers, caches, (*self.layers[1:], None), strict=True)
        ):
            with nullcontext() if streamed is None else streamed.there(index):
                # Of other tokens the last layer has but keys and values to leave in pages.
                x = layer(x, cache, rows, following, few if following is None else None)
        y = _plain(x)
        if self.norm is None:
            return y
        return self.norm(y if places is None or few is not None else ops.gather_rows(y, places))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [S, V] of last states [S, H], both in `dtype`."""
        assert self.head is not None, "the last stage has it"
        logits = self.head(states)
        softcap = self.config.softcap
        return logits if softcap is None else ops.softcap(logits, softcap)

    def caches(self, count: int, dtype: torch.dtype | None = None) -> list[PagedCache]:
        """Return `count` pages of zeros for every layer, in the decoder's dtype where none is given."""
        forms = (layer.attention.form for layer in self.layers)
        return [PagedCache.empty(count, form, dtype or self.dtype, self.device) for form in forms]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor of the weights; one that two parts share is yielded twice."""
        for part in (self.embedding, *self.layers, self.norm, self.head):
            if part is not None:
                yield from part.tensors()

    @property
    def waits(self) -> str:
        """Why the host waits inside of a step, so that no CUDA graph is captured; an empty string if it does not."""
        mixtures = (layer.ffn for layer in self.layers if isinstance(layer.ffn, Mixture))
        return next((why for mixture in mixtures if (why := mixture.waits(self.dtype))), "")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory of the device, each counted once, and buffers of those that stream."""
        streamed = self.streamed
        stay = {
            tensor.data_ptr(): tensor.nbytes
            for tensor in self.tensors()
            if streamed is None or not streamed.holds(tensor)
        }
        return sum(stay.values()) + (0 if streamed is None else streamed.slot_bytes)
