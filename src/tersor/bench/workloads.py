"""Which prompts is a batch measured with? Seeded workloads of random tokens, by the shapes that papers and users have.

A prefix is as random as what follows it, so that two prompts have in common what the workload says and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.errors import InputError, did_you_mean

ORDERS = SHUFFLED, GROUPED, SORTED = ("shuffled", "grouped", "sorted")
"""Orders of arrival: at random, those of a prefix after each other, and as sorted prompts."""

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and how many tokens each is answered with.

    Attributes:
        name: which workload.
        prompts: int32 [length] each.
        outputs: int64 [N]: tokens to be drawn, the model's end ignored.
        samples: answers a prompt.
        settings: what it was made with, as JSON values: seed, order, vocabulary and sizes.
    """

    name: str
    prompts: list[Tokens]
    outputs: NDArray[np.int64]
    samples: int
    settings: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(prompt.size for prompt in self.prompts)


class _Draw:
    """Random tokens and lengths of one seed."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self.random = np.random.Generator(np.random.PCG64(seed))
        self._vocabulary = vocabulary

    def tokens(self, length: float | np.integer) -> Tokens:
        return self.random.integers(1, self._vocabulary, max(0, int(length)), dtype=np.int32)

    def lognormal(self, mean: float, sigma: float, least: int = 1) -> int:
        """A length of this mean; sigma is that of its logarithm."""
        return max(least, round(self.random.lognormal(np.log(mean) - sigma**2 / 2, sigma)))

    def pareto(self, mean: float, most: int) -> int:
        """A number of members, at least 1, of a Pareto distribution with this mean before it is cut."""
        return min(most, int(self.random.pareto(mean / (mean - 1)) + 1.5))


_Made = tuple[list[Tokens], list[int], int]


def _shared(draw: _Draw, count: int, *, prefix: int, own: int, output: int, members: int) -> _Made:
    prompts: list[Tokens] = []
    while len(prompts) < count:
        begin = draw.tokens(prefix)
        prompts += [np.concatenate([begin, draw.tokens(own)]) for _ in range(min(members, count - len(prompts)))]
    return prompts, [output] * count, 1


def _snippet(draw: _Draw, count: int, *, prefix: int, own: int, output: int, members: float) -> _Made:
    prompts: list[Tokens] = []
    while len(prompts) < count:
        begin = draw.tokens(draw.lognormal(prefix, 0.5))
        for _ in range(min(draw.pareto(members, 256), count - len(prompts))):
            prompts.append(np.concatenate([begin, draw.tokens(draw.lognormal(own, 0.4))]))
    return prompts, [draw.lognormal(output, 0.4) for _ in prompts], 1


def _tree(
    draw: _Draw, count: int, *, system: int, document: int, section: int, own: int, output: int, members: float
) -> _Made:
    prompts: list[Tokens] = []
    while len(prompts) < count:
        top = draw.tokens(draw.random.integers(system // 10, system + 1))
        for _ in range(int(draw.random.integers(8, 33))):
            text = np.concatenate([top, draw.tokens(draw.random.integers(document // 3, document + 1))])
            for _ in range(draw.pareto(2, 16)):
                part = np.concatenate([text, draw.tokens(section)])
                prompts += [np.concatenate([part, draw.tokens(own)]) for _ in range(draw.pareto(members, 64))]
    outputs = draw.random.integers(output // 4, output + 1, count).tolist()
    return prompts[:count], outputs, 1


def _sampling(draw: _Draw, count: int, *, prompt: int, output: int, samples: int) -> _Made:
    prompts = [draw.tokens(draw.random.integers(prompt // 8, prompt + 1)) for _ in range(count)]
    return prompts, [min(4 * output, draw.lognormal(output, 0.5)) for _ in prompts], samples


def _few_shot(draw: _Draw, count: int, *, prefix: int, own: int, output: int, members: int) -> _Made:
    prompts: list[Tokens] = []
    while len(prompts) < count:
        begin = draw.tokens(draw.lognormal(prefix, 0.2))
        size = int(draw.random.integers(members // 15 + 1, members + 1))
        prompts += [
            np.concatenate([begin, draw.tokens(draw.lognormal(own, 0.4))])
            for _ in range(min(size, count - len(prompts)))
        ]
    return prompts, draw.random.integers(1, output + 1, count).tolist(), 1


def _mixed_density(draw: _Draw, count: int, *, long: int, short: int, members: int) -> _Made:
    """Half read `long` tokens and draw few, half read `short` ones and draw many."""
    prompts: list[Tokens] = []
    outputs: list[int] = []
    while len(prompts) < count:
        reads = (len(prompts) // members) % 2 == 0
        length, output = (long, 20) if reads else (short, 1000)
        begin = draw.tokens(length * 3 // 4)
        for _ in range(min(members, count - len(prompts))):
            prompts.append(np.concatenate([begin, draw.tokens(length - begin.size)]))
            outputs.append(output)
    return prompts, outputs, 1


@dataclass(frozen=True, slots=True)
class _Recipe:
    make: Callable[..., _Made]
    requests: int
    sizes: dict[str, float]
    about: str


WORKLOADS: dict[str, _Recipe] = {
    "micro": _Recipe(
        _shared, 6400, {"prefix": 2000, "own": 200, "output": 100, "members": 16}, "BatchLLM's own: prefixes of 2,000"
    ),
    "micro-small": _Recipe(
        _shared, 800, {"prefix": 2000, "own": 200, "output": 100, "members": 8}, "the same, of a minute"
    ),
    "extreme": _Recipe(
        _shared, 1600, {"prefix": 16000, "own": 200, "output": 100, "members": 16}, "prefixes that no LRU cache holds"
    ),
    "snippet": _Recipe(
        _snippet, 8000, {"prefix": 1570, "own": 30, "output": 30, "members": 3}, "snippets of a search, as BatchLLM has"
    ),
    "classify": _Recipe(
        _shared, 100_000, {"prefix": 117, "own": 13, "output": 1, "members": 100_000}, "one instruction, one token"
    ),
    "tree": _Recipe(
        _tree,
        6000,
        {"system": 2000, "document": 1500, "section": 400, "own": 30, "output": 200, "members": 3},
        "system prompt, document, section: prefixes of three levels",
    ),
    "sampling": _Recipe(
        _sampling, 200, {"prompt": 4000, "output": 1000, "samples": 16}, "many answers to one prompt"
    ),
    "few-shot": _Recipe(
        _few_shot, 14_000, {"prefix": 1500, "own": 80, "output": 5, "members": 1500}, "examples, then questions"
    ),
    "mixed-density": _Recipe(
        _mixed_density, 4000, {"long": 4000, "short": 200, "members": 4}, "half read much, half write much"
    ),
    "control": _Recipe(
        _shared, 6400, {"prefix": 0, "own": 2200, "output": 100, "members": 1}, "no shared prefix"
    ),
}  # fmt: skip
"""Workloads by name."""


def make(
    name: str,
    *,
    requests: int | None = None,
    seed: int = 0,
    order: str = SHUFFLED,
    vocabulary: int = 32_000,
    **sizes: float,
) -> Workload:
    """Make a workload: the same prompts for the same arguments on any machine.

    Args:
        name: one of `WORKLOADS`.
        requests: prompts, other than its own number.
        seed: of all that is random.
        order: one of `ORDERS`.
        vocabulary: tokens are from 1 to one below it.
        sizes: of the workload, other than its own; mean or largest lengths in tokens, members a prefix.

    Raises:
        InputError: there is no such workload, order or size, or a number is out of its range.
    """
    if name not in WORKLOADS:
        raise InputError(f"no workload {name!r}{did_you_mean(name, WORKLOADS)}: there are {', '.join(WORKLOADS)}")
    recipe = WORKLOADS[name]
    if order not in ORDERS:
        raise InputError(f"no order {order!r}{did_you_mean(order, ORDERS)}: there are {', '.join(ORDERS)}")
    for size in sizes:
        if size not in recipe.sizes:
            raise InputError(
                f"{name} has no size {size!r}{did_you_mean(size, recipe.sizes)}: {', '.join(recipe.sizes)}"
            )
    count = recipe.requests if requests is None else requests
    if count < 1 or vocabulary < 2:
        raise InputError(f"requests is {count} and vocabulary {vocabulary}: they must be at least 1 and 2")
    chosen = {**recipe.sizes, **sizes}
    least = {"members": 1, "samples": 1, "output": 1}
    for size, value in chosen.items():
        if value < least.get(size, 0):
            raise InputError(f"{size} is {value}: it must be at least {least.get(size, 0)}")
    draw = _Draw(seed, vocabulary)
    prompts, outputs, samples = recipe.make(draw, count, **chosen)
    places = _arrival(draw, prompts, order)
    settings = {"seed": seed, "order": order, "vocabulary": vocabulary, "requests": count, **chosen}
    return Workload(
        name, [prompts[place] for place in places], np.array(outputs, dtype=np.int64)[places], samples, settings
    )


def sort_key(prompt: Tokens) -> bytes:
    """Return what sorts prompts [length] by their tokens, so that those that begin alike are neighbours."""
    return prompt.astype(">i4").tobytes()


def _arrival(draw: _Draw, prompts: Sequence[Tokens], order: str) -> list[int]:
    if order == SHUFFLED:
        return draw.random.permutation(len(prompts)).tolist()
    if order == SORTED:
        return sorted(range(len(prompts)), key=lambda place: sort_key(prompts[place]))
    return list(range(len(prompts)))
