"""Embeddings and output heads of vLLM with packed weights, a head's own or the one it shares with the embedding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from tersor.checkpoint.pack import pack
from tersor.errors import UnsupportedError
from tersor.formats import Activations, Scheme
from tersor.integrations.vllm import compat, memory
from tersor.integrations.vllm.arriving import Gathering, Piece, Place, packed_of
from tersor.integrations.vllm.linear import loader
from tersor.integrations.vllm.parts import DensePart, embedding_rows, parts_of, stored_of
from tersor.integrations.vllm.plan import Stored
from tersor.layouts import PackedWeight
from tersor.layouts.shard import Part
from tersor.models.weights import Matrix


class _OfVocabulary(compat.QuantizeMethodBase):
    """What embeddings and heads share: outputs of a head reach to the end of vLLM's padded vocabulary."""

    def __init__(self, activations: Activations) -> None:
        self._activations = activations

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [..., padded vocabulary of the rank] of x [..., H]."""
        parts = layer._modules.get("tersor_head", layer.tersor)  # an embedding's own is for looking rows up
        own = parts[0].rows
        y: torch.Tensor = parts(x, None if bias is None else bias[:own])
        padding = layer.num_embeddings_per_partition - own
        return functional.pad(y, (0, padding)) if padding else y


class TersorEmbeddingMethod(_OfVocabulary):
    """The weight of an embedding, whose rows are decoded as they are looked up, or of a head."""

    def __init__(self, stored: Stored, activations: Activations) -> None:
        """Take what is known of the weight."""
        super().__init__(activations)
        self._stored = stored

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Let a layer wait for the tensors of its weight.

        Raises:
            UnsupportedError: an embedding whose rows have several schemes, or are pruned.
        """
        head = isinstance(layer, compat.ParallelLMHead)
        if not head and not isinstance(self._stored.represented, Scheme):
            raise UnsupportedError(f"{self._stored.stem}: the rows of an embedding have one scheme")
        part = Part((compat.vocabulary_rows(layer),))
        place = Place(layer.org_vocab_size, input_size, part, params_dtype, torch.empty(0).device)
        memory.reuse_segments(place.device)
        piece = Piece(self._stored, place)
        finish = functools.partial(self._finish, layer, head, params_dtype)
        gathering = Gathering([piece], finish, compat.draws_weights())
        layer.tersor_gathering, layer.tersor_dtype = gathering, params_dtype
        compat.expect(layer, self._stored.dtypes(params_dtype), functools.partial(loader, gathering, 1))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the weight has arrived.

        Raises:
            CheckpointError: it has not.
        """
        gathering = layer.__dict__.pop("tersor_gathering", None)
        if gathering is not None:
            gathering.close()
            compat.expect_no_more(layer, self._stored.names)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits, of an embedding too: models without a head of their own ask it for them."""
        if not isinstance(layer, compat.ParallelLMHead) and "tersor_head" not in layer._modules:
            weight = _padded(stored_of(layer.tersor[0]), layer)
            layer.tersor_head = parts_of([weight], layer.tersor_dtype, self._activations)
        return super().apply(layer, x, bias)

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return rows [..., H] of tokens."""
        return embedding_rows(input_, layer.tersor[0], layer.tersor_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Refuse: a head with a packed weight of its own is not tied."""
        raise UnsupportedError(f"{self._stored.stem} has a weight of its own, and config.json ties it")

    def _finish(self, layer: Any, head: bool, dtype: torch.dtype, weights: list[Matrix]) -> None:
        if head:
            layer.tersor = parts_of([_padded(weights[0], layer)], dtype, self._activations)
        else:
            assert isinstance(weights[0], PackedWeight)
            layer.tersor = torch.nn.ModuleList([DensePart(weights[0])])


class TersorTiedHeadMethod(_OfVocabulary):
    """A head that multiplies with the packed weight of the embedding, in the layout of its own kernel."""

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **attributes: Any) -> None:
        """Note the dtype; nothing is loaded."""
        layer.tersor_dtype = params_dtype

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Note which embedding it is."""
        layer.__dict__["tersor_embedding"] = embed_tokens  # no module of this one
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the head's own form of the embedding's weight.

        Raises:
            UnsupportedError: the head is not tied to it.
        """
        tied = layer.__dict__.pop("tersor_embedding", None)
        if tied is None:
            if not hasattr(layer, "tersor"):
                raise UnsupportedError("an output head with a plain weight beside a packed embedding is not supported")
            return
        if "tersor_gathering" in tied.__dict__:
            tied.quant_method.process_weights_after_loading(tied)
        stored = stored_of(tied.tersor[0])
        layer.tersor = parts_of([_padded(stored, layer)], layer.tersor_dtype, self._activations)


def _padded(weight: Matrix, layer: Any) -> Matrix:
    """Return a dense weight with rows of zeros up to vLLM's padded vocabulary; others as they are."""
    padding = layer.num_embeddings_per_partition - weight.shape[0]
    if not padding or not isinstance(weight, PackedWeight):
        return weight
    zeros = pack(torch.zeros(padding, weight.shape[1], device=weight.data.device), weight.scheme).tensors
    return PackedWeight.stack([weight, packed_of(weight.scheme, weight.shape[1], zeros)])
