"""What methods of a whole model have to know of packed layers: how many weights there are, and what can be resized."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tersor.integrations.transformers.replace import plain_module
from tersor.nn.embedding import PackedEmbedding, TiedLinear
from tersor.nn.packed import Counted, PackedModule
from tersor.nn.sparse import SparseLinear


def register() -> None:
    """Let `num_parameters` count packed weights and `resize_token_embeddings` decode what it resizes. Idempotent."""
    if not getattr(PreTrainedModel, "_counts_packed", False):
        PreTrainedModel._counts_packed = True
        PreTrainedModel.num_parameters = _counting(PreTrainedModel.num_parameters)
        PreTrainedModel.resize_token_embeddings = _decoding(PreTrainedModel.resize_token_embeddings)


def packed_parameters(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Return how many weights a model's packed layers stand for; what several layers share counts once."""
    layers = (
        module for module in model.modules() if isinstance(module, PackedModule | Counted) and module.in_state_dict
    )
    return sum(
        math.prod(layer.shape) for layer in layers if not (exclude_embeddings and isinstance(layer, PackedEmbedding))
    )


def decode_embeddings(model: Any) -> None:
    """Put plain layers in place of a packed input embedding and a packed output head, tied as they were."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(head, TiedLinear) and head.source is embedding
    if isinstance(embedding, PackedEmbedding):
        model.set_input_embeddings(plain_module(embedding, embedding.dtype))
    if isinstance(head, PackedModule | SparseLinear):
        plain = plain_module(head, head.dtype)
        if tied:
            plain.weight = model.get_input_embeddings().weight
        model.set_output_embeddings(plain)
    if tied:
        model.__dict__.pop("_tied_weights_keys", None)  # the class's own again
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _counting(count: Any) -> Any:
    @functools.wraps(count)
    def wrapped(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        plain: int = count(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return plain if only_trainable else plain + packed_parameters(self, exclude_embeddings)

    return wrapped


def _decoding(resize: Any) -> Any:
    @functools.wraps(resize)
    def wrapped(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **rest: Any
    ) -> Any:
        embedding = self.get_input_embeddings()
        held = getattr(embedding, "num_embeddings", None)
        wanted = held if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of and wanted is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != held:
            decode_embeddings(self)
        elif isinstance(embedding, PackedEmbedding):
            return embedding
        return resize(self, new_num_tokens, pad_to_multiple_of, **rest)

    return wrapped
