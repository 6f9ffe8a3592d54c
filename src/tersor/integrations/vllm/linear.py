"""Linear layers of vLLM with packed weights: queries, keys and values in one, gate and up in one, or one alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from tersor.errors import UnsupportedError
from tersor.formats import Activations
from tersor.integrations.vllm import compat, memory
from tersor.integrations.vllm.arriving import Gathering, Piece, Place
from tersor.integrations.vllm.parts import parts_of
from tersor.integrations.vllm.plan import Stored
from tersor.layouts.shard import Part, Span
from tersor.models.weights import Matrix

_SHARDS = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the weights of an attention's first layer -> their order."""


class TersorLinearMethod(compat.LinearMethodBase):
    """Waits for the stored weights of a linear layer, and multiplies with them."""

    def __init__(self, stored: Sequence[Stored], activations: Activations) -> None:
        """Take what is known of the layer's weights, in order."""
        self._stored, self._activations = list(stored), activations

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
        """Let a layer wait for the tensors of its weights; it holds none of its own.

        Raises:
            UnsupportedError: ranks cut a weight elsewhere than at a quantum of its format, or vLLM joins other weights.
        """
        spans = compat.row_spans(layer, output_partition_sizes)
        channels = compat.columns(layer, input_size_per_partition, input_size)
        device = torch.empty(0).device
        memory.reuse_segments(device)

        def piece(stored: Stored, outputs: int, rows: tuple[Span, ...]) -> Piece:
            return Piece(stored, Place(outputs, input_size, Part(rows, channels), params_dtype, device))

        if len(self._stored) == len(spans):
            pieces = [piece(stored, whole, (span,)) for stored, (whole, span) in zip(self._stored, spans, strict=True)]
        elif len(self._stored) == 1:  # one stored weight holds all
            *starts, outputs = accumulate((whole for whole, _ in spans), initial=0)
            places = zip(starts, (span for _, span in spans), strict=True)
            rows = tuple((start + first, start + last) for start, (first, last) in places)
            pieces = [piece(self._stored[0], outputs, rows)]
        else:
            raise UnsupportedError(
                f"{self._stored[0].stem}: vLLM joins {len(spans)} weights in one, and {len(self._stored)} are stored"
            )
        finish = functools.partial(self._finish, layer, params_dtype)
        gathering = Gathering(pieces, finish, compat.draws_weights())
        layer.tersor_gathering = gathering
        compat.expect(layer, self._tensors(params_dtype), functools.partial(loader, gathering, len(pieces)))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that every weight has arrived.

        Raises:
            CheckpointError: one has not; the line names a tensor.
        """
        gathering = layer.__dict__.pop("tersor_gathering", None)
        if gathering is None:
            return
        gathering.close()
        compat.expect_no_more(layer, self._tensors(layer.params_dtype))
        layer.register_parameter("weight_packed", torch.nn.Parameter(layer.tersor[0].held[0], requires_grad=False))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return [..., OC] of x [..., IC], with the bias added."""
        y: torch.Tensor = layer.tersor(x, bias)
        return y

    def _tensors(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {name: own for stored in self._stored for name, own in stored.dtypes(dtype).items()}

    def _finish(self, layer: Any, dtype: torch.dtype, weights: list[Matrix]) -> None:
        layer.tersor = parts_of(weights, dtype, self._activations)


def loader(gathering: Gathering, count: int, name: str) -> Any:
    """Return what vLLM hands the tensors of a name to: with the shard that it is, where there are several."""

    def load(parameter: Any, loaded_weight: torch.Tensor, shard_id: str | int | tuple[int, ...] | None = None) -> None:
        index = 0 if count == 1 else _SHARDS.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
        if not isinstance(index, int) or not 0 <= index < count:
            raise UnsupportedError(f"{name}: vLLM loads shard {shard_id!r} of a layer that has {count} packed weights")
        gathering.take(index, name, loaded_weight)

    return load
