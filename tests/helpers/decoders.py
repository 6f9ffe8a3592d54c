"""Texts through a decoder in steps of mixed rows, as an engine would run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tersor.models import Decoder
from tersor.ops import PAGE, Rows

PLAN = (
    {0: 37},
    {0: 1, 1: 70},
    {0: 40, 1: 1, 2: 3},
    {2: 1, 1: 1, 0: 1},
    {0: 1, 2: 66},
    {1: 8, 0: 30, 2: 1},
)
"""Steps: text -> how many tokens of it, in the order of rows: prompts in chunks beside single tokens."""


def texts(vocabulary: int, seed: int = 3) -> list[torch.Tensor]:
    """Return texts that the steps of `PLAN` compute."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(step.get(index, 0) for step in PLAN) for index in range(3)]
    return [torch.randint(2, vocabulary, (length,), generator=generator) for length in lengths]


def logits(decoder: Decoder, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits [length, V] of every token of texts that went through the steps of `PLAN`.

    Their pages are scattered; every step ends with a padded row and padded tokens.
    """
    pages = -(-max(len(text) for text in given) // PAGE)
    order = torch.randperm(pages * len(given), generator=torch.Generator().manual_seed(0)).view(len(given), pages) + 1
    caches = decoder.caches(int(order.max()) + 1)
    done = [0] * len(given)
    found: list[list[torch.Tensor]] = [[] for _ in given]
    for step in PLAN:
        new = [given[index][done[index] : done[index] + count] for index, count in step.items()]
        for index, count in step.items():
            done[index] += count
        counts = [*step.values(), 0]
        rows = Rows(
            starts=torch.tensor([sum(counts[:row]) for row in range(len(counts) + 1)], dtype=torch.int32),
            lengths=torch.tensor([*(done[index] for index in step), 0], dtype=torch.int32),
            pages=torch.cat((order[list(step)], order.new_zeros(1, pages))).int(),
            most_queries=max(counts),
            most_length=pages * PAGE,
        )
        tokens = torch.cat((*new, torch.zeros(2, dtype=torch.long)))
        with torch.inference_mode():
            made = decoder(tokens, rows, caches, torch.arange(sum(counts)))
        for index, part in zip(step, made.split(counts[:-1]), strict=True):
            found[index].append(part)
    return [torch.cat(parts) for parts in found]


def whole(decoder: Decoder, text: torch.Tensor, places: Sequence[int] | None = None) -> torch.Tensor:
    """Return the logits [length, V] of every token of one text that is one row, or [S, V] of those at some places."""
    length, pages, device = len(text), -(-len(text) // PAGE), decoder.device
    row = torch.tensor([0, length], dtype=torch.int32, device=device)
    rows = Rows(row, row[1:], torch.arange(pages, dtype=torch.int32, device=device)[None], length, pages * PAGE)
    with torch.inference_mode():
        wanted = torch.tensor(range(length) if places is None else places, dtype=torch.int64, device=device)
        return decoder(text.to(device), rows, decoder.caches(pages), wanted)


def difference(decoder: Decoder, reference: Any) -> float:
    """Return by how much logits differ at most from those of a model of transformers, relative to the largest."""
    given = texts(decoder.config.vocabulary)
    with torch.inference_mode():
        wanted = [reference(text[None]).logits[0] for text in given]
    largest = max(float(one.abs().max()) for one in wanted)
    pairs = zip(logits(decoder, given), wanted, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest


def greedy(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` tokens that continue a prompt, the most probable one each time, or fewer up to an end token."""
    pages = -(-(len(prompt) + count) // PAGE)
    table = torch.arange(1, pages + 1, dtype=torch.int32, device=decoder.device)[None]
    caches = decoder.caches(pages + 1)
    made: list[int] = []
    new = list(prompt)
    while len(made) < count and not set(made) & set(decoder.config.ends):
        rows = Rows(
            starts=torch.tensor([0, len(new)], dtype=torch.int32, device=decoder.device),
            lengths=torch.tensor([len(prompt) + len(made)], dtype=torch.int32, device=decoder.device),
            pages=table,
            most_queries=len(new),
            most_length=pages * PAGE,
        )
        tokens = torch.tensor(new, device=decoder.device)
        with torch.inference_mode():
            found = decoder(tokens, rows, caches, torch.tensor([len(new) - 1], device=decoder.device))
        new = [int(found.argmax())]
        made += new
    return made
