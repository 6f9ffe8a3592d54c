"""Problems for searches of the planner: random ones of any graph, and models of equal layers."""

from __future__ import annotations

import numpy as np

from tersor.planner.problem import Block, Edge, Problem

Random = np.random.Generator


def random_problem(
    seed: int, *, blocks: int = 6, options: int = 4, limits: int = 0, ties: bool = False, chain: bool = False
) -> Problem:
    """Return a problem with edges at random, some impossible pairs, and limits between least and most.

    Args:
        seed: of all numbers.
        blocks: at most so many, at least three.
        options: likewise of a block, at least one.
        limits: of memory.
        ties: whether some blocks are tied.
        chain: whether every block hands on to the next one alone.
    """
    random = np.random.default_rng(seed)
    count = int(random.integers(3, blocks + 1))
    tie = [f"t{random.integers(2)}" if ties and random.random() < 0.6 else "" for _ in range(count)]
    own = {name: int(random.integers(2, options + 1)) for name in ("t0", "t1")}
    sizes = [own[name] if name else int(random.integers(1, options + 1)) for name in tie]
    made = tuple(
        Block(f"b{place}", tuple(f"o{option}" for option in range(size)), _seconds(random, size), taken, tie[place])
        for place, size in enumerate(sizes)
        for taken in [random.integers(0, 100, (size, limits)).astype(np.float64)]
    )
    edges = []
    for one in range(count):
        for other in range(one + 1, count):
            near = other == one + 1
            if near if chain else random.random() < (0.9 if near else 0.4):
                for _ in range(2 if random.random() < 0.2 else 1):
                    edges.append(Edge(f"b{one}", f"b{other}", _pairs(random, sizes[one], sizes[other])))
    least = np.sum([block.bytes.min(axis=0) for block in made], axis=0)
    most = np.sum([block.bytes.max(axis=0) for block in made], axis=0)
    share = random.uniform(0.15, 0.9, limits)
    room = np.floor(least + share * (most - least))
    return Problem(made, tuple(edges), tuple((f"rank {place}", float(limit)) for place, limit in enumerate(room)))


def _seconds(random: Random, size: int) -> np.ndarray:
    """Return seconds; a tenth of the options are impossible, but not the first."""
    seconds = random.uniform(0, 1, size)
    seconds[1:][random.random(size - 1) < 0.1] = np.inf
    return seconds


def _pairs(random: Random, rows: int, columns: int) -> np.ndarray:
    """Return seconds of pairs: dense, with impossible ones, a sum of two vectors, or one partner for each option."""
    kind = random.integers(5)
    matrix = random.uniform(0, 1, (rows, columns))
    if kind == 1:
        matrix[random.random(matrix.shape) < 0.2] = np.inf
    if kind == 2:
        matrix = random.uniform(0, 1, (rows, 1)) + random.uniform(0, 1, columns)
    if kind == 3 and rows == columns:
        matrix[~np.eye(rows, dtype=bool)[random.permutation(rows)]] = np.inf
    return matrix


def model(layers: int, *, blocks: int = 10, options: int = 6, share: float | None = None, seed: int = 0) -> Problem:
    """Return a model of equal, tied layers, each a chain of blocks with two residual edges; ends of their own.

    Args:
        layers: how many.
        blocks: of a layer.
        options: of a block, from the one that takes most memory and least time to the other end, roughly.
        share: of what lies between least and most memory, what a rank has; None is no limit.
        seed: of all numbers.
    """
    random = np.random.default_rng(seed)
    limits = 0 if share is None else 1
    cuts = np.arange(1, options + 1)

    def block(name: str, tie: str, weight: float, scale: Random) -> Block:
        seconds = 1e-6 * weight * (0.3 + 0.1 * cuts + scale.uniform(0, 0.15, options))
        taken = np.floor(1e6 * weight * (1 / cuts + scale.uniform(0, 0.1, options)))[:, None]
        return Block(name, tuple(map(str, cuts)), seconds, taken[:, :limits], tie)

    def handed() -> np.ndarray:
        return 1e-6 * random.uniform(1, 8, (options, options)) * (1 - np.eye(options))

    weights = random.uniform(1, 30, blocks)
    seeds = random.integers(1 << 30, size=blocks)
    made = [block("embed", "", 20.0, random)]
    inner, between = [handed() for _ in range(blocks - 1)], handed()
    skips = [(0, blocks // 2), (blocks // 2, blocks - 1)]
    residual = [handed() for _ in skips]
    edges = [Edge("embed", "0.0", handed())]
    for layer in range(layers):
        names = [f"{layer}.{place}" for place in range(blocks)]
        for place, name in enumerate(names):
            made.append(block(name, f"layer.{place}", weights[place], np.random.default_rng(int(seeds[place]))))
        edges += [Edge(names[place], names[place + 1], inner[place]) for place in range(blocks - 1)]
        edges += [Edge(names[one], names[two], own) for (one, two), own in zip(skips, residual, strict=True)]
        if layer:
            edges.append(Edge(f"{layer - 1}.{blocks - 1}", names[0], between))
    made.append(block("head", "", 40.0, random))
    edges.append(Edge(f"{layers - 1}.{blocks - 1}", "head", handed()))
    if share is None:
        return Problem(tuple(made), tuple(edges))
    least = sum(float(one.bytes.min()) for one in made)
    most = sum(float(one.bytes.max()) for one in made)
    return Problem(tuple(made), tuple(edges), (("memory of a rank", np.floor(least + share * (most - least))),))
