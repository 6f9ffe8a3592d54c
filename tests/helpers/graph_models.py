"""Small modules of the kinds that planners are shown on, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """A decoder block of GPT: fused queries, keys and values, and a feed-forward part four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.view(batch, rows, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, rows, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """A decoder; with labels it returns the loss."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, rows: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(rows, width)
        self.layers = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Towers(nn.Module):
    """An encoder of its own input beside a decoder that reads it late, and a weight that both ends share."""

    def __init__(self, vocabulary: int, width: int, heads: int, rows: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.encoder = nn.Sequential(Block(width, heads), Block(width, heads))
        self.decoder = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        source, x = self.encoder(self.tokens(ids)), self.decoder(self.tokens(labels.roll(1, 1)))
        x = self.norm(x + functional.scaled_dot_product_attention(x, source, source))
        logits = functional.linear(x, self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Skips(nn.Module):
    """Linears in a row, the first of which is read again by the last; returns a mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.linears
        early = functional.relu(first(x))
        late = functional.relu(third(functional.relu(second(early))))
        return fourth(late + early).square().mean()


class Mlp(nn.Module):
    """Linears with activations between; returns a mean square, so it can be trained."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.linears = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in pairs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.linears[:-1]:
            x = functional.relu(linear(x))
        return self.linears[-1](x).square().mean()


class Mixture(nn.Module):
    """Experts with capacity (GShard): products with a mask put tokens into each expert's places and take them back."""

    def __init__(self, width: int, hidden: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.router(x).softmax(dim=-1)
        gate, index = scores.max(dim=-1)
        chosen = functional.one_hot(index, self.experts).to(x.dtype)
        place = (chosen.cumsum(dim=0) - 1) * chosen
        kept = (place < self.capacity).to(x.dtype) * chosen
        slots = torch.arange(self.capacity, device=x.device)
        mask = kept.unsqueeze(-1) * (place.unsqueeze(-1) == slots).to(x.dtype)
        inner = torch.einsum("tec,td->ecd", mask, x)
        inner = torch.einsum("ecf,efd->ecd", functional.relu(torch.einsum("ecd,edf->ecf", inner, self.up)), self.down)
        return torch.einsum("tec,ecd->td", mask * gate[:, None, None], inner)


class WideBlock(nn.Module):
    """A block of a Wide-ResNet, normalised before its convolutions."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(wider)
        self.conv1 = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.short = nn.Conv2d(channels, wider, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(x))
        return self.conv2(functional.relu(self.norm2(self.conv1(y)))) + self.short(y)


class WideResNet(nn.Module):
    """Two stages, a pooling and a classifier."""

    def __init__(self, wide: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stages = nn.Sequential(WideBlock(8, 8 * wide, 1), WideBlock(8 * wide, 16 * wide, 2))
        self.norm, self.head = nn.BatchNorm2d(16 * wide), nn.Linear(16 * wide, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stages(self.stem(x))))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Unet(nn.Module):
    """Two levels down, two up, with the way across."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.begin = self._pair(3, channels)
        self.lower = self._pair(channels, 2 * channels)
        self.bottom = self._pair(2 * channels, 4 * channels)
        self.rise1 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.join1 = self._pair(4 * channels, 2 * channels)
        self.join2 = self._pair(3 * channels, channels)
        self.end = nn.Conv2d(channels, 4, 1)

    @staticmethod
    def _pair(channels: int, wider: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, wider, 3, padding=1),
            nn.GroupNorm(4, wider),
            nn.SiLU(),
            nn.Conv2d(wider, wider, 3, padding=1),
            nn.GroupNorm(4, wider),
            nn.SiLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.begin(x)
        second = self.lower(functional.max_pool2d(first, 2))
        bottom = self.bottom(functional.max_pool2d(second, 2))
        up = self.join1(torch.cat([self.rise1(bottom), second], dim=1))
        up = functional.interpolate(up, scale_factor=2, mode="nearest")
        return self.end(self.join2(torch.cat([up, first], dim=1)))
