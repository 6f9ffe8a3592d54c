"""What does a prepared kernel want to know at each call? Everything goes by name: no two addresses change places."""

from __future__ import annotations

from typing import Protocol


class FusedLaunch(Protocol):
    """Launches a fused kernel on one prepared problem; what is not there has the address 0."""

    def __call__(
        self,
        *,
        stream: int,
        weight: int,
        scale: int,
        x: int,
        x_stride: int,
        x_scale: int,
        bias: int,
        residual: int,
        y: int,
        partial: int,
        arrived: int,
        early: bool,
    ) -> None:
        """Launch.

        Args:
            stream: handle of the stream.
            weight, scale: addresses of packed codes and scales.
            x, x_stride: address of the activations, and elements from one token to the next.
            x_scale: address of float32 scales of quantised activations, one a token.
            bias, residual, y: addresses, in the dtype of the result.
            partial, arrived: addresses of split sums (float32) and their counters (uint32, zero).
            early: whether the sm90 schedule may fetch weights before the kernel ahead has ended: not where that one
                wrote them.
        """


class QuantizeLaunch(Protocol):
    """Launches the quantising of activations on one prepared problem."""

    def __call__(self, *, stream: int, x: int, x_stride: int, codes: int) -> int:
        """Launch, and return the address of the scales.

        Args:
            stream: handle of the stream.
            x, x_stride: address of 16-bit activations, and elements from one token to the next.
            codes: address of n * (codes_stride + 4) bytes: codes [n, codes_stride], then float32 scales [n].
        """
        ...
