"""A layer of experts with random weights, and what it computes: the definition that contenders are checked against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tersor.bench.experts.geometry import Geometry

_BIAS = 0.5
"""Standard deviation of biases; what they are added to has about 1, so that one that is left out is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Weights of variance 1 / IC, so that sums keep the size of activations.

    Attributes:
        geometry: sizes.
        gate_up: [E, 2 F, H], the rows of the gate before those of up.
        down: [E, H, F].
        gate_up_bias, down_bias: [E, 2 F] and [E, H], or `None`.
        choice_bias: float32 [E], what a router adds to scores to choose by, or `None`.
    """

    geometry: Geometry
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    choice_bias: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Layer:
        """Return the layer with weights and biases of another dtype; itself where it has that dtype."""
        if dtype == self.gate_up.dtype:
            return self
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return replace(
            self,
            gate_up=self.gate_up.to(dtype),
            down=self.down.to(dtype),
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )

    def copy(self) -> Layer:
        """Return the layer with weights in memory of their own."""
        return replace(self, gate_up=self.gate_up.clone(), down=self.down.clone())


def random_layer(geometry: Geometry, dtype: torch.dtype, device: torch.device, seed: int) -> Layer:
    """Return a layer of normal numbers; the same seed gives the same on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, deviation: float) -> torch.Tensor:
        numbers = torch.empty(shape, dtype=dtype, device=device)
        for part in numbers:  # an expert at a time
            part.normal_(std=deviation, generator=generator)
        return numbers

    e, h, f = geometry.experts, geometry.hidden, geometry.ffn
    choice_bias = None
    if geometry.scoring == "sigmoid":
        choice_bias = 0.1 * torch.randn(e, device=device, generator=generator)
    return Layer(
        geometry=geometry,
        gate_up=normal(e, 2 * f, h, deviation=h**-0.5),
        down=normal(e, h, f, deviation=f**-0.5),
        gate_up_bias=normal(e, 2 * f, deviation=_BIAS) if geometry.biased else None,
        down_bias=normal(e, h, deviation=_BIAS) if geometry.biased else None,
        choice_bias=choice_bias,
    )


def route(
    geometry: Geometry, logits: torch.Tensor, choice_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of every token by torch's operators, in as few launches as they allow.

    Args:
        geometry: how its router chooses.
        logits: float32 [T, E].
        choice_bias: as in `Layer`.

    Returns:
        index int64 [T, K] and weights float32 [T, K].
    """
    if geometry.scoring == "softmax":
        if geometry.normalize:  # softmax over all, divided by its sum over the chosen, is softmax over the chosen
            chosen, index = logits.topk(geometry.top_k, dim=-1, sorted=False)
            weights = chosen.softmax(dim=-1)
        else:
            weights, index = logits.softmax(dim=-1).topk(geometry.top_k, dim=-1, sorted=False)
        return index, weights if geometry.scale == 1 else weights * geometry.scale
    scores = logits.sigmoid()
    worth = scores if choice_bias is None else scores + choice_bias
    if geometry.groups > geometry.top_groups:
        grouped = worth.unflatten(-1, (geometry.groups, -1))
        best = grouped.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
        kept = best.topk(geometry.top_groups, dim=-1, sorted=False).indices
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        worth = grouped.masked_fill(left_out[..., None], float("-inf")).flatten(-2)
    index = worth.topk(geometry.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, index)
    if geometry.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).add_(1e-20)
    return index, weights if geometry.scale == 1 else weights * geometry.scale


def expected(layer: Layer, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return what the layer computes, float32 [T, H], an expert at a time in float32.

    Args:
        layer: weights.
        x: [T, H].
        logits: float32 [T, E].
    """
    geometry = layer.geometry
    index, weights = route(geometry, logits, layer.choice_bias)
    total = torch.zeros(x.shape, device=x.device)
    for expert in index.unique().tolist():
        tokens, ranks = (index == expert).nonzero(as_tuple=True)
        both = x[tokens].float() @ layer.gate_up[expert].float().T
        if layer.gate_up_bias is not None:
            both += layer.gate_up_bias[expert]
        inner = geometry.gate.combine(*both.chunk(2, dim=-1))
        outer = inner @ layer.down[expert].float().T
        if layer.down_bias is not None:
            outer += layer.down_bias[expert]
        total.index_add_(0, tokens, outer * weights[tokens, ranks, None])
    return total
