"""What calibration sums up for a layer: second moments of its inputs and of its output gradients, batch by batch.

A sum holds no model: it is given activations, and gives matrices. Sums of parts of the tokens merge to those of all.
The three statistics of a layer are named here, as recipes ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tersor.compress.hessian import exact_products
from tersor.errors import InputError

HESSIAN = "hessian"
"""Statistic: float32 [IC, IC], the mean over tokens of w x x^T, x the compressed model's inputs, w a token's weight."""

SHIFT = "shift"
"""Statistic: float32 [IC, IC], the mean over tokens of w (x' - x) x^T, x' the original model's inputs."""

OUTPUT_HESSIAN = "output_hessian"
"""Statistic: the mean over tokens of g g^T, g the gradients of the layer's outputs; float32 [OC, OC], or its P blocks
along the diagonal, [P, OC / P, OC / P]."""


class Moments:
    """The sum over tokens of w y x^T, with y = x where none is given, in P blocks of channels along the diagonal.

    The products of a batch are float32, on a GPU without TF32, where channels in bfloat16 are multiplied as what they
    are: products of two such numbers are exact in float32, and a left factor in float32 is the sum of two of them to
    2^-17. On a CPU batches add up in float64; on a GPU in float32, where a thousand batches err by less than 10^-4 of a
    sum, a hundredth of the damping that every recipe adds.

    Attributes:
        total: [P, n / P, n / P], the sum.
        tokens: how many tokens were added.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", pieces: int = 1) -> None:
        """Begin with no tokens.

        Args:
            channels: n.
            device: where the sum is, and all that is added.
            pieces: P.

        Raises:
            InputError: `pieces` does not divide `channels`.
        """
        if pieces < 1 or channels % pieces:
            raise InputError(f"{channels} channels are not {pieces} pieces of one size")
        size, place = channels // pieces, torch.device(device)
        dtype = torch.float64 if place.type == "cpu" else torch.float32
        self.total = torch.zeros(pieces, size, size, dtype=dtype, device=place)
        self.tokens = 0

    def add(self, x: torch.Tensor, weight: torch.Tensor | None = None, y: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x: [..., n], any float dtype.
            weight: [...], not negative, one for each token; 1 by default.
            y: [..., n], the left factor, where it is not x.
        """
        pieces, size, _ = self.total.shape
        right = x.detach().reshape(-1, pieces * size)
        left = right if y is None else y.detach().reshape(right.shape)
        if weight is not None:
            left = left.float() * weight.detach().reshape(-1, 1).to(left.device, torch.float32)
        self.tokens += len(right)
        if right.is_cuda and right.dtype == torch.bfloat16:
            for part in bfloat16_parts(left):
                turned = part.view(-1, pieces, size).permute(1, 2, 0)
                self.total += torch.bmm(turned, right.view(-1, pieces, size).transpose(0, 1), out_dtype=torch.float32)
            return
        left, right = left.float(), right.float()
        with exact_products():
            product = left.view(-1, pieces, size).permute(1, 2, 0) @ right.view(-1, pieces, size).transpose(0, 1)
        self.total += product

    def merge(self, other: Moments) -> None:
        """Add the tokens of another sum of the same channels."""
        self.total += other.total.to(self.total)
        self.tokens += other.tokens

    def mean(self) -> torch.Tensor:
        """Return the mean over all tokens, float32 [n, n], or [P, n / P, n / P] of several pieces; 0 of no tokens."""
        mean = (self.total / max(self.tokens, 1)).float()
        return mean[0] if len(mean) == 1 else mean


def bfloat16_parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Return bfloat16 tensors whose sum is x, float32 or bfloat16: one, or two that err by 2^-17 of a number."""
    if x.dtype == torch.bfloat16:
        return [x]
    high = x.to(torch.bfloat16)
    return [high, (x - high.float()).to(torch.bfloat16)]


class LayerSums:
    """The sums of one layer, or of one expert: those of its inputs, and what else calibration collects.

    Attributes:
        sums: by the name of the statistic.
    """

    def __init__(self, sums: Mapping[str, Moments]) -> None:
        self.sums = dict(sums)

    @staticmethod
    def of(
        inputs: int,
        *,
        shift: bool = False,
        outputs: int | None = None,
        pieces: int = 1,
        device: torch.device | str = "cpu",
    ) -> LayerSums:
        """Begin the sums of a layer.

        Args:
            inputs: its input channels.
            shift: whether the original model's inputs are added, too.
            outputs: its output features, where the gradients of its outputs are added.
            pieces: blocks along the diagonal that are kept of the gradients' matrix.
            device: of the sums.
        """
        sums = {HESSIAN: Moments(inputs, device)}
        if shift:
            sums[SHIFT] = Moments(inputs, device)
        if outputs is not None:
            sums[OUTPUT_HESSIAN] = Moments(outputs, device, pieces)
        return LayerSums(sums)

    @property
    def tokens(self) -> int:
        """How many tokens the layer has seen."""
        return self.sums[HESSIAN].tokens

    def add(self, x: torch.Tensor, weight: torch.Tensor | None = None, original: torch.Tensor | None = None) -> None:
        """Add inputs.

        Args:
            x: [..., IC], the compressed model's inputs, any float dtype.
            weight: [...], one for each token, under both products; 1 by default.
            original: [..., IC], the original model's inputs of the same tokens, where there is a `SHIFT`.

        Raises:
            InputError: there is a `SHIFT` and no `original`, or the other way round.
        """
        if (original is None) == (SHIFT in self.sums):
            raise InputError(
                "a shift is the sum of inputs of two models: give the original's where it is kept, only there"
            )
        self.sums[HESSIAN].add(x, weight)
        if original is not None:
            self.sums[SHIFT].add(x, weight, original.float() - x.float())

    def add_gradients(self, gradients: torch.Tensor) -> None:
        """Add gradients of outputs, [..., OC], any float dtype."""
        self.sums[OUTPUT_HESSIAN].add(gradients)

    def merge(self, other: LayerSums) -> None:
        """Add the tokens of other sums of the same layer."""
        for name, moments in self.sums.items():
            moments.merge(other.sums[name])

    def statistics(self) -> dict[str, torch.Tensor]:
        """Return the means by name, as recipes take them."""
        return {name: moments.mean() for name, moments in self.sums.items()}
