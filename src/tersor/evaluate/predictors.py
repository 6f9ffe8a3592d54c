"""What predicts a text? A model of transformers' code, or the engine's decoder over pages of keys and values."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from tersor.checkpoint.source import Source, open_source
from tersor.errors import UnsupportedError
from tersor.formats import Activations, float_dtype_or_auto
from tersor.integrations.transformers import finite as by_module
from tersor.models import Decoder
from tersor.models import finite as by_part
from tersor.models.load import described
from tersor.models.load import load as load_decoder
from tersor.one_prompt import Asked, obstacle
from tersor.ops.attention_form import PAGE, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class Predictor(Protocol):
    """What gives logits of a window of tokens."""

    @property
    def vocabulary(self) -> int:
        """Return how many tokens it has rows for."""
        ...

    @property
    def positions(self) -> int | None:
        """Return how many tokens a window may have; `None` is any number."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return what it computes in."""
        ...

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, V] of a window int64 [T], which is a text of its own; row t predicts token t + 1."""
        ...

    def not_finite(self, tokens: torch.Tensor) -> str:
        """Return which part is the first not to be finite on a window, as words for the end of a sentence."""
        ...


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """A model of transformers' code."""

    model: PreTrainedModel

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the model has rows for."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """Return how many tokens a window may have; `None` where the model does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations."""
        return self.model.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, V] of a window int64 [T], in the model's dtype."""
        output: torch.Tensor = self.model(input_ids=self._ids(tokens), use_cache=False).logits
        return output[0]

    def not_finite(self, tokens: torch.Tensor) -> str:
        """Return which layer is the first not to be finite, as words for the end of a sentence."""
        watched = isinstance(self.model, torch.nn.Module)
        return by_module.first_not_finite(self.model, self._ids(tokens)) if watched else ""

    def _ids(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unsqueeze(0).to(self.model.device)


@dataclass(frozen=True, slots=True)
class EngineModel:
    """A decoder of the engine, to which every window is a new text: all its tokens are one step.

    What a token sees of those before it is what their pages hold, in `kv_dtype`, as when the engine answers.

    Attributes:
        decoder: with its weights.
        bits_per_weight: mean stored bits of a compressed weight, scales counted; `None` where none is compressed.
        kv_dtype: of keys and values in pages; `None` is that of the activations.
    """

    decoder: Decoder
    bits_per_weight: float | None = None
    kv_dtype: torch.dtype | None = None

    @property
    def vocabulary(self) -> int:
        """Return how many tokens the model has rows for."""
        return self.decoder.config.vocabulary

    @property
    def positions(self) -> int | None:
        """Return how many tokens a window may have."""
        return self.decoder.config.context

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations."""
        return self.decoder.dtype

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [T, V] of a window int64 [T], in the dtype of activations; its pages are new ones."""
        decoder = self.decoder
        caches = decoder.caches(-(-len(tokens) // PAGE), self.kv_dtype)
        return decoder(tokens.to(decoder.device), Rows.of_text(len(tokens), decoder.device), caches, None)

    def not_finite(self, tokens: torch.Tensor) -> str:
        """Return which part is the first not to be finite with pages as `auto`, likewise."""
        return by_part.first_not_finite(self.decoder, tokens.tolist())

    def keeping(self, kv_dtype: torch.dtype | None) -> EngineModel:
        """Return the model with keys and values in such a dtype: the same weights; itself where it has that one."""
        return self if kv_dtype == self.kv_dtype else replace(self, kv_dtype=kv_dtype)


def engine_model(
    path: str | os.PathLike[str],
    device: torch.device,
    dtype: str = "auto",
    *,
    activations: Activations | str = Activations.NATIVE,
) -> EngineModel:
    """Load a checkpoint into the engine's decoder.

    Args:
        path: a checkpoint directory or a hub id.
        device: where it runs.
        dtype: of activations: auto, float16, bfloat16 or float32.
        activations: what packed linears multiply with.

    Returns:
        It keeps keys and values in the dtype of activations; `EngineModel.keeping` gives others.

    Raises:
        InputError: no such activations or dtype.
        UnsupportedError: the engine does not run the model.
        CheckpointError: no whole checkpoint.
        TersorError: it does not fit in the device's memory.
    """
    with open_source(path) as source:
        why = obstacle(source, Asked(prompt=[], device=device, dtype=dtype))
        if why:
            raise UnsupportedError(f"{source.label}: kv_dtype asks for the engine, and {why}")
        decoder = load_decoder(source, device, float_dtype_or_auto(dtype), activations=activations)
        return EngineModel(decoder, _bits(source))


def _bits(source: Source) -> float | None:
    """Return the mean stored bits of the compressed weights of a checkpoint, `None` where there are none."""
    _, _, expected, schemes = described(source)
    shapes = {module: expected.matrices[module] for module in schemes}
    count = sum(math.prod(shape) for shape in shapes.values())
    bits = sum(schemes[module].bits_per_weight(shape[-1]) * math.prod(shape) for module, shape in shapes.items())
    return bits / count if count else None
