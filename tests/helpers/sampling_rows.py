"""Rows of every kind for tests of sampling: options at random, lists of penalties, bits of grammars, hard logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tersor.ops import Allowed, Listed, SamplingRows


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype, spread: float, seed: int) -> torch.Tensor:
    """Random logits [S, V]; where there is room, rows 3 to 6 have NaN, infinity, -inf everywhere and -inf in half."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, vocabulary, generator=generator) * spread
    if rows > 6 and vocabulary > 20:
        found[3, 5], found[4, 17] = math.nan, math.inf
        found[5] = -math.inf
        found[6, : vocabulary // 2] = -math.inf
    return found.to(dtype)


def plain(rows: int, **options: Any) -> SamplingRows:
    """Rows with one value of every option: temperature 1 and no filter unless given; seeds count from 0."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    return SamplingRows(
        temperature=torch.full((rows,), float(values["temperature"])),
        top_k=torch.full((rows,), int(values["top_k"]), dtype=torch.int32),
        top_p=torch.full((rows,), float(values["top_p"])),
        min_p=torch.full((rows,), float(values["min_p"])),
        seeds=torch.arange(rows),
        positions=torch.full((rows,), 7, dtype=torch.int32),
    )


def random_rows(rows: int, vocabulary: int, seed: int, *, lists: bool = True, masks: bool = True) -> SamplingRows:
    """Rows of all kinds, padding too."""
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[float]) -> torch.Tensor:
        return torch.tensor(choices)[torch.randint(0, len(choices), (rows,), generator=generator)]

    return SamplingRows(
        temperature=pick([0.0, 1.0, 0.7, 1.5, 1e-6, -1.0, 0.1]),
        top_k=pick([0, 0, 1, 5, 50, vocabulary - 1, vocabulary + 3, -1, 700]).int(),
        top_p=pick([1.0, 1.0, 0.9, 0.5, 0.99, 0.05]),
        min_p=pick([0.0, 0.0, 0.1, 0.01, 1.0]),
        seeds=torch.randint(0, 2**62, (rows,), generator=generator),
        positions=torch.randint(0, 5000, (rows,), generator=generator).int(),
        listed=_listed(rows, vocabulary, generator, pick) if lists else None,
        allowed=_allowed(rows, vocabulary, generator) if masks else None,
    )


def _listed(rows: int, vocabulary: int, generator: torch.Generator, pick: Any) -> Listed:
    newest = torch.randint(-1, vocabulary, (rows,), generator=generator)
    starts, ends, tokens, counts, biases = [], [], [], [], []
    for row in range(rows):
        size = int(torch.randint(1, min(vocabulary, 40), (1,), generator=generator)) if row % 3 else 0
        own = torch.randperm(vocabulary, generator=generator)[:size].tolist()
        if row % 2 and size and newest[row] >= 0 and int(newest[row]) not in own:
            own[0] = int(newest[row])
        starts.append(len(tokens))
        if size:
            bias = torch.randn(size, generator=generator)
            bias[::7] = -math.inf
            tokens += [*own, -1]
            counts += [*torch.randint(-1, 4, (size,), generator=generator).tolist(), 0]
            biases += [*bias.tolist(), 0.0]
        ends.append(len(tokens))
        tokens, counts, biases = [*tokens, 0], [*counts, 3], [*biases, 5.0]  # of no row
    return Listed(
        starts=torch.tensor(starts, dtype=torch.int32),
        ends=torch.tensor(ends, dtype=torch.int32),
        tokens=torch.tensor(tokens, dtype=torch.int32),
        counts=torch.tensor(counts, dtype=torch.int32),
        biases=torch.tensor(biases),
        newest=newest,
        pending=(torch.arange(rows) % 4 > 0).int(),
        repetition=pick([1.0, 1.1, 1.7, 0.8]),
        presence=pick([0.0, 0.5, -1.0]),
        frequency=pick([0.0, 0.3, -0.7]),
    )


def _allowed(rows: int, vocabulary: int, generator: torch.Generator) -> Allowed:
    bits = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocabulary // 32)), generator=generator).int()
    return Allowed(bits=bits, rows=torch.randint(-1, 3, (rows,), generator=generator).int())


def moved(rows: SamplingRows, device: torch.device | str) -> SamplingRows:
    """The same rows on a device, none of whose tensors are those given."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone().to(device)
        if isinstance(value, Listed | Allowed | SamplingRows):
            return type(value)(**{name: copied(getattr(value, name)) for name in value.__slots__})
        return value

    found: SamplingRows = copied(rows)
    return found
