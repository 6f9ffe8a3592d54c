"""What is summed up over the tokens of a calibration text for one layer: second moments in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Sums:
    """The statistics of one layer's inputs while they are summed up.

    Attributes:
        tokens: how many tokens were added.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        """Start with no token.

        Args:
            channels: IC.
            device: where sums lie and are made.
        """
        self.tokens = 0
        self.hessian = torch.zeros(channels, channels, device=device)
        self.shift = torch.zeros(channels, channels, device=device)

    def add(self, inputs: torch.Tensor, originals: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: [N, IC], what the layer reads in the compressed model.
            originals: [N, IC], what it reads in the original one, of the same tokens.
            weights: float32 [N], what each token counts; `None` is one each.
        """
        x = inputs.float()
        difference = originals.float() - x
        left = x if weights is None else x * weights[:, None]
        with _tensor_cores(x.device):
            self.hessian.addmm_(left.T, x)
            self.shift.addmm_(difference.T, left)
        self.tokens += len(x)

    def statistics(self, prior: torch.Tensor | None = None, count: int = 0) -> dict[str, torch.Tensor]:
        """Return what recipes call `hessian` and `shift`, means over tokens, float32 [IC, IC].

        Args:
            prior: a Hessian, a mean over tokens, that is mixed in as if `count` tokens had it.
            count: how many tokens the prior stands for.
        """
        total = max(self.tokens + (count if prior is not None else 0), 1)
        hessian = self.hessian if prior is None or not count else self.hessian + prior * count
        return {"hessian": hessian / total, "shift": self.shift / total}


@contextlib.contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply in TF32, which has all bits of a 16-bit activation, and add in float32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
