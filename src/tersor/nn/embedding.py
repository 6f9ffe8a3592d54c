"""An embedding whose weight stays packed, and the output head that multiplies with the same weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tersor import ops
from tersor.formats import Scheme
from tersor.layouts import STREAM, PackedWeight
from tersor.nn.linear import PackedLinear
from tersor.nn.packed import PackedModule


class PackedEmbedding(PackedModule):
    """y[..., IC] = W[ids, IC], with W packed: the rows asked for are decoded, and no others.

    The weight stays in the stored stream on every device.

    Attributes:
        num_embeddings, embedding_dim: OC and IC.
        padding_idx: kept for code that asks; its row is looked up like any other.
        embed_scale: what rows are multiplied by, rounded to `dtype` (Gemma), or `None`.
        plain_class: the class of the embedding it stands for.
        max_norm, norm_type, scale_grad_by_freq, sparse: an `nn.Embedding`'s, at their defaults, for code that asks.
    """

    max_norm: float | None = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        plain_class: type[nn.Embedding] = nn.Embedding,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an embedding with uninitialised codes and scales, to be filled from a state dict.

        Args:
            num_embeddings, embedding_dim: OC and IC.
            scheme: element format and scales.
            padding_idx, embed_scale, plain_class: see the attributes.
            device: of everything.
            dtype: of the rows; torch's default when `None`.

        Raises:
            FormatError: the group size does not divide IC.
        """
        super().__init__((num_embeddings, embedding_dim), scheme, device=device, dtype=dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.embed_scale = embed_scale
        self.plain_class = plain_class

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up: decoded in float32, rounded once to `dtype`, then multiplied by `embed_scale`.

        Args:
            ids: int64 or int32, any shape.

        Returns:
            [..., IC] in `dtype`.
        """
        rows = ops.embedding(ids, self.packed_weight(), self.dtype)
        return rows if self.embed_scale is None else rows * rows.new_full((), self.embed_scale)

    def extra_repr(self) -> str:
        """Say shape and scheme."""
        words = [str(self.num_embeddings), str(self.embedding_dim)]
        if self.padding_idx is not None:
            words.append(f"padding_idx={self.padding_idx}")
        if self.embed_scale is not None:
            words.append(f"embed_scale={self.embed_scale}")
        words.append(f"scheme={self.scheme.key()}")
        words.append(f"bits_per_weight={self.scheme.bits_per_weight(self.embedding_dim):.3f}")
        return ", ".join(words)


class TiedLinear(PackedLinear):
    """An output head that multiplies with the weight of a packed embedding, which alone stores it.

    While both lie in the stored stream on one device they share memory; a kernel layout is the head's own.
    """

    in_state_dict = False
    _source: tuple[PackedEmbedding] | None = None

    @property
    def source(self) -> PackedEmbedding | None:
        """The embedding, or `None` before `tie`."""
        return self._source[0] if self._source else None

    def tie(self, embedding: PackedEmbedding) -> None:
        """Take the weight of an embedding of the same shape and scheme, now and whenever it is loaded anew."""
        # In a tuple: as a submodule of its own the embedding would be in the state dict twice.
        self._source = (embedding,)
        self._take()
        self.prepare(self.dtype)

    def _take(self) -> None:
        if self.source is None:
            return
        weight, device = self.source.packed_weight(), self.weight_packed.device
        zero_point = None if weight.zero_point is None else weight.zero_point.to(device)
        self._set_weight(
            PackedWeight(weight.scheme, weight.shape, weight.data.to(device), weight.scale.to(device), zero_point)
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TiedLinear:
        super()._apply(fn, recurse)
        source = self.source
        if source is not None and self.layout == STREAM and source.weight_packed.device == self.weight_packed.device:
            self._take()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # The embedding stands before the head in a model, so it has its new weight by now.
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._take()
