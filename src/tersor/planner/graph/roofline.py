"""How long does an operator take that no kernel of ours was timed for? By peaks of the chip, with shares of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tersor.hardware import Chip

FREE = ("view", "creation")
"""Kinds of operators that move nothing."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The slower of arithmetic and memory, and a start.

    Attributes:
        chip: whose peaks.
        arithmetic: share of the tensor cores' peak that products reach.
        memory: share of the memory's bandwidth that is reached: 0.8 is what H200s were measured at.
        start: seconds that an operator takes beside: 3 us there.
    """

    chip: Chip
    arithmetic: float = 0.7
    memory: float = 0.8
    start: float = 3e-6

    def seconds(self, kind: str, flops: float, size: float, dtype: torch.dtype) -> float:
        """Return the seconds of an operator.

        Args:
            kind: its kind.
            flops: floating point operations of a rank.
            size: bytes that a rank reads and writes.
            dtype: of what it multiplies.
        """
        if kind in FREE:
            return 0.0
        return (
            max(flops / (self.arithmetic * self.peak(dtype)), size / (self.memory * self.chip.bandwidth)) + self.start
        )

    def peak(self, dtype: torch.dtype) -> float:
        """Return operations per second of a dtype: float32 is TF32, half of 16 bits, and float64 a sixteenth."""
        if dtype.itemsize == 1:
            return self.chip.fp8_ops if dtype.is_floating_point and self.chip.fp8_ops else self.chip.int8_ops
        return self.chip.fp16_ops / {2: 1, 4: 2}.get(dtype.itemsize, 16)
