"""Tensors of all experts of a layer, handed to it as they are stored: what of them is whose?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tersor.checkpoint.released.mxfp4 import decoded
from tersor.errors import CheckpointError
from tersor.integrations.vllm.stacks import BIAS, DOWN, PARTS, WEIGHT, Stack
from tersor.layouts.shard import Span
from tersor.nn.experts import Rows


class Handed:
    """Takes whole tensors, hands each weight to its expert, and keeps this rank's part of biases."""

    def __init__(
        self,
        stacks: Sequence[Stack],
        local: Callable[[int], int],
        span: Span | None,
        take: Callable[[int, str, str, torch.Tensor], None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Wait for tensors.

        Args:
            stacks: what they hold.
            local: returns this rank's number of an expert, -1 where another rank has it.
            span: this rank's inner channels; `None` is all.
            take: gets this rank's number of an expert, projection, own name and a tensor of one weight.
            dtype, device: of biases.
        """
        self._stacks, self._local, self._span, self._take = stacks, local, span, take
        self._dtype, self._device = dtype, device
        self._parts: dict[Stack, dict[str, torch.Tensor]] = {}
        self._biases: dict[Stack, torch.Tensor] = {}

    def load(self, stack: Stack, own: str, tensor: torch.Tensor) -> None:
        """Take a tensor [E, ...].

        Args:
            stack: that it is of.
            own: its name, but for what it is of.
            tensor: as it is stored.

        Raises:
            CheckpointError: the weight has not such a tensor, or it has another shape than it should have.
        """
        if own == BIAS:
            self._biases[stack] = self._bias(stack, tensor)
        elif own in PARTS:
            held = self._parts.setdefault(stack, {})
            held[own] = tensor
            if len(held) == len(PARTS):
                del self._parts[stack]
                self._decode(stack, *(held[name] for name in PARTS))
        else:
            for expert, projection, part in self._own(stack, own, tensor):
                self._take(expert, projection, own, part)

    def biases(self) -> tuple[torch.Tensor, ...]:
        """Return [E, rows] of the experts of this rank in the order of their stacks, where there are any.

        Rows of gate and up are interleaved as those of the weight; of ranks that share an expert the first has down's.
        """
        return tuple(self._biases[stack] for stack in self._stacks if stack.biased)

    def missing(self) -> list[str]:
        """Return what biases are called that have not arrived."""
        lacking = (stack for stack in self._stacks if stack.biased and stack not in self._biases)
        return [f"{stack.experts}.{DOWN if stack.rows() is Rows.PLAIN else 'gate_up_proj'}_{BIAS}" for stack in lacking]

    def _own(self, stack: Stack, own: str, tensor: torch.Tensor) -> Iterator[tuple[int, str, torch.Tensor]]:
        for expert, projection, part in stack.taken_apart(own, tensor):
            number = self._local(expert)
            if number >= 0:
                yield number, projection, part

    def _decode(self, stack: Stack, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        pairs = zip(self._own(stack, PARTS[0], blocks), self._own(stack, PARTS[1], scales), strict=True)
        for (expert, projection, codes), (_, _, exponents) in pairs:
            weight = decoded(codes.to(self._device), exponents.to(self._device))
            self._take(expert, projection, WEIGHT, weight)

    def _bias(self, stack: Stack, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() != 2:
            raise CheckpointError(f"{stack.experts}: biases of experts are {list(tensor.shape)}, not [E, rows]")
        numbers = {self._local(expert): expert for expert in range(len(tensor))}
        kept = tensor[[numbers[own] for own in sorted(numbers) if own >= 0]].to(self._device, self._dtype)
        rows = stack.rows()
        if rows is Rows.PLAIN:
            return kept if self._span is None or self._span[0] == 0 else torch.zeros_like(kept)
        if self._span is not None:
            kept = rows.whole(*(half[:, slice(*self._span)] for half in rows.halves(kept)))
        return rows.arrange_bias(kept)
