"""The hidden states of all windows on the host, and the batches in which they pass through a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tersor.errors import InputError
from tersor.integrations.transformers.blocks import BlockModel, Call, first_not_finite

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens that pass through a block at once, by type of device."""


class Streams:
    """The hidden states that go into a block: those of the original model, and those of the compressed one.

    Attributes:
        original, compressed: [W, T, H] on the host, in the model's dtype; pinned where the model is on a GPU.
        batches: slices of windows that pass through a block at once.
    """

    def __init__(self, model: BlockModel, ids: torch.Tensor) -> None:
        """Run what is ahead of the blocks.

        Args:
            model: with its ends loaded.
            ids: int64 [W, T], the windows.

        Raises:
            InputError: the model's blocks cannot run one by one, or activations are not finite.
        """
        count, window = ids.shape
        size = max(1, _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"]) // window)
        self.batches = [slice(first, min(first + size, count)) for first in range(0, count, size)]
        self._model = model
        self._calls: dict[int, list[Call]] = {}
        self.original = torch.empty(0)
        for batch in self.batches:
            hidden, calls = model.enter(ids[batch].to(model.device))
            if not self._calls:
                model.check_calls(calls, model.enter(ids[batch].flip(1).to(model.device))[1])
            self._calls.setdefault(len(hidden), calls)
            if not self.original.numel():
                pinned = model.device.type == "cuda"
                self.original = torch.empty(count, *hidden.shape[1:], dtype=hidden.dtype, pin_memory=pinned)
            self.original[batch] = hidden.cpu()
        self._sums = [0, 0]
        self.compressed = self.original.clone()
        if model.device.type == "cuda":
            self.compressed = self.compressed.pin_memory()

    def calls(self, batch: slice, block: int) -> Call:
        """Return with what else a block is called for a batch."""
        return self._calls[batch.stop - batch.start][block]

    def each(self, block: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Call]]:
        """Yield for every batch the hidden states of the original and of the compressed model, and the call."""
        yield from self.each_of(block, range(len(self.batches)))

    def each_of(self, block: int, order: Iterable[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, Call]]:
        """Yield the same for batches by their numbers, in this order."""
        device = self._model.device
        for batch in (self.batches[number] for number in order):
            yield (
                self.original[batch].to(device, non_blocking=True),
                self.compressed[batch].to(device, non_blocking=True),
                self.calls(batch, block),
            )

    def advance(self, block: int, original: torch.nn.Module, compressed: torch.nn.Module) -> None:
        """Replace what goes into a block by what comes out of it.

        Raises:
            InputError: an activation is not finite; the layer is named.
        """
        sums = torch.zeros(2, dtype=torch.int64, device=self._model.device)
        for batch, (own, other, call) in zip(self.batches, self.each(block), strict=True):
            for number, (layer, hidden, stream, words) in enumerate(
                (
                    (original, own, self.original, "the model"),
                    (compressed, other, self.compressed, "the compressed model"),
                )
            ):
                where = f"{words}, windows {batch.start} on"
                sums[number] += _words(self._advance(layer, hidden, call, stream[batch], where, block))
        self._sums = sums.tolist()

    def forward(self, block: int, layer: torch.nn.Module) -> None:
        """Replace the original's hidden states alone.

        Raises:
            InputError: an activation is not finite; the layer is named.
        """
        for batch in self.batches:
            hidden = self.original[batch].to(self._model.device, non_blocking=True)
            where = f"the model, windows {batch.start} on"
            self._advance(layer, hidden, self.calls(batch, block), self.original[batch], where, block)

    def _advance(
        self, layer: torch.nn.Module, hidden: torch.Tensor, call: Call, stream: torch.Tensor, where: str, block: int
    ) -> torch.Tensor:
        output = self._model.run(layer, hidden, call)
        if not bool(output.isfinite().all()):
            inside = first_not_finite(layer, lambda: self._model.run(layer, hidden, call))
            name = self._model.name_of(block, inside)
            raise InputError(f"activations of {where} hold a NaN or an infinity on this text, first in {name}")
        stream.copy_(output)
        return output

    def digest(self) -> list[int]:
        """Return a number for each stream as a block left it, which changes with its bits: the sum of its words."""
        return list(self._sums)


def _words(output: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's words of 16 or 32 bits, int64."""
    return output.contiguous().view(torch.int32 if output.element_size() == 4 else torch.int16).sum(dtype=torch.int64)
