"""Pruned weights and checkpoints, and what of them is left, worked out element by element."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers import packed_models
from tersor.compress import encode
from tersor.compress.prune import Pattern, prune
from tersor.formats import Plain, Scheme, get_scheme
from tersor.layouts import SparseWeight

DENSITIES = (0.0, 0.01, 0.1, 0.5, 0.94, 1.0)
CHOICES = (
    ("magnitude", Pattern(0.5)),
    ("wanda", Pattern(0.6, scope="row")),
    ("sparsegpt", Pattern(0.5, 2, 4)),
    ("admm", Pattern(0.7)),
)
"""Algorithms that choose zeros, and which are asked for."""
VALUES = (Plain("bfloat16"), Plain("float32"), get_scheme("fp6"), get_scheme("uint3", 32), get_scheme("fp8_e4m3"))


def random(rows: int, ic: int, seed: int = 0) -> torch.Tensor:
    """Return a random weight, float32 [rows, IC]."""
    return torch.randn(rows, ic, generator=torch.Generator().manual_seed(seed))


def kept(rows: int, ic: int, density: float, seed: int = 0) -> torch.Tensor:
    """Return a random mask, bool [rows, IC]."""
    return torch.rand(rows, ic, generator=torch.Generator().manual_seed(seed)) < density


def sparse(weight: torch.Tensor, mask: torch.Tensor, values: Scheme | Plain) -> tuple[SparseWeight, torch.Tensor]:
    """Return what a mask leaves of a weight, and what it decodes to, float32 [rows, IC]."""
    if isinstance(values, Plain):
        exact = weight.to(getattr(torch, values.dtype))
        return SparseWeight.from_plain(exact, mask), torch.where(mask, exact.float(), 0.0)
    encoded = encode(weight, values)
    return SparseWeight.from_encoded(encoded, mask), torch.where(mask, encoded.dequantize(), 0.0)


def chosen(oc: int, ic: int, algorithm: str, pattern: Pattern, scheme: Scheme) -> tuple[SparseWeight, torch.Tensor]:
    """Return what pruning leaves of a weight, and what it decodes to, float32 [oc, ic].

    Inputs depend on each other, and their sizes and those of the rows vary as in a trained model: some rows and columns
    keep nearly all of their weights, others next to nothing.
    """
    sizes = torch.exp(0.7 * random(1, ic, seed=1))
    x = random(2 * ic, ic, seed=2) @ (torch.eye(ic) + 0.3 * random(ic, ic, seed=3) / ic**0.5) * sizes
    weight = random(oc, ic) * ic**-0.5 * torch.exp(0.5 * random(oc, 1, seed=4))
    found = prune(weight, pattern, algorithm, {"hessian": x.T @ x / len(x)}, scheme=scheme)
    assert found.encoded is not None
    left, exact = SparseWeight.from_encoded(found.encoded, found.kept), found.encoded.dequantize()
    return left, torch.where(found.kept, exact, 0.0)


def bit_stream(numbers: list[int], bits: int) -> bytes:
    """Return numbers one behind the other, the lowest bit first, up to a whole 32-bit word."""
    total = sum(number << (index * bits) for index, number in enumerate(numbers))
    return total.to_bytes(-(-len(numbers) * bits // 32) * 4, "little")


def saved(
    kind: str,
    directory: Path,
    density: float | Callable[[str], float] = 0.5,
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,
) -> Path:
    """Write a small model whose linear weights are multiplied by random masks, which leaves -0.0, too.

    Args:
        kind: of model, as `checkpoints.save` has them.
        directory: to make.
        density: what is left of a weight, or what says it by name.
        dtype: of the weights.
        config: changes of its configuration.
    """
    packed_models.plain(kind, directory, dtype, **config)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for index, (name, tensor) in enumerate(sorted(tensors.items())):
            if tensor.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                share = density if isinstance(density, float) else density(name)
                tensors[name] = tensor * kept(*tensor.shape, share, index)
        save_file(tensors, file, {"format": "pt"})
    return directory
