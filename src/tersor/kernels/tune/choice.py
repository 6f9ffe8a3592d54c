"""Which configuration runs a linear? A measured one where the table knows the problem, else the predicted one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from tersor.formats import Activations
from tersor.hardware import Chip
from tersor.kernels.tune import schedules, sm90, table
from tersor.kernels.tune.problem import SM90, LinearConfig, LinearProblem
from tersor.kernels.tune.table import Table

MOST_NORMED = 64
"""Tokens of the widest tile that can have a norm in it (cuda/dense/sm90_norm.cuh), and so of a call."""
_FEW_TOKENS = 64
_STEP = 16
"""Beyond `_FEW_TOKENS` tokens the predicted configuration is that of the next multiple of so many, or of
`sm90.WIDE_STEP` beyond `sm90.MANY_TOKENS`: as many fill the same tiles, whose tokens are such multiples."""


ROUND_ROW_BYTES = 4
"""Bytes that a round of outliers takes of each row of a block, beside codes and scales."""


def choose(problem: LinearProblem, chip: Chip) -> LinearConfig:
    """Choose the fused kernel's configuration: measured where a table knows, by predicted time elsewhere.

    `fused` must say yes. Tables are not asked where the choice may not depend on the number of tokens.

    Raises:
        InputError: a table of this chip cannot be used; the message names the file.
    """
    found = None if problem.batch_invariant else measured(problem, chip)
    if found is not None:
        return found
    return _predicted(replace(problem, n=filled(problem.n)), chip)


def takes_norms(config: LinearConfig) -> bool:
    """Tell whether the kernel of a configuration may have norms in it: all tokens are in one tile of few."""
    native = config.activations is Activations.NATIVE
    return config.schedule == SM90 and native and config.token_tiles == 1 and config.n_tile <= MOST_NORMED


def choose_normed(problem: LinearProblem, chip: Chip) -> LinearConfig | None:
    """Choose as `choose` of the configurations that may have norms in them; `None` where there are none.

    Raises:
        InputError: as `choose`.
    """
    if problem.n > MOST_NORMED:
        return None
    usual = choose(problem, chip)
    if takes_norms(usual):
        return usual
    options = [config for config in sm90.candidates(problem, chip) if takes_norms(config)]
    return min(options, key=lambda config: schedules.seconds(problem, config, chip), default=None)


def takes_outliers(config: LinearConfig, rounds: int, problem: LinearProblem) -> bool:
    """Tell whether the kernel of a configuration may add outliers.

    Args:
        config: how it runs.
        rounds: of outliers that a block has room for in a slot (`layouts.outliers`).
        problem: of the dense part.
    """
    if config.schedule != SM90:
        return False
    return tile_takes_outliers(sm90.tile_of(config), rounds, problem.scale_groups, problem.tables)


def tile_takes_outliers(tile: sm90.Tile, rounds: int, scale_groups: int, tables: bool) -> bool:
    """Tell the same of a tile: its threads have room for a second set of sums and, in turns, for what is loaded.

    A table takes eight registers: warps that take blocks of two row groups in turn with 16 tokens have not so many.
    """
    if tables and tile.few and tile.row_groups > 1 and tile.tokens > 8:
        return False
    if tile.activations is not Activations.NATIVE or tile.cluster > 1 or not tile.grouped:
        return False
    crowded = tile.few and tile.resident > 1 and tile.row_groups > 1
    return not crowded or (scale_groups < 2 and (rounds == 1 or tile.tokens < 16))


def choose_beside(problem: LinearProblem, rounds: int, chip: Chip) -> LinearConfig | None:
    """Choose as `choose` of the configurations that may add outliers; `None` where there are none.

    Args:
        problem: of the dense part.
        rounds: of outliers that a block has room for in a slot (`layouts.outliers`).
        chip: the GPU.

    Raises:
        InputError: as `choose`.
    """
    wider = replace(problem, n=filled(problem.n), scale_bytes=problem.scale_bytes + ROUND_ROW_BYTES * rounds)
    usual = choose(wider, chip)
    if takes_outliers(usual, rounds, problem):
        return usual
    candidates = sm90.candidates(wider, chip)
    options = [config for config in candidates if takes_outliers(config, rounds, problem)]
    return min(options, key=lambda config: schedules.seconds(wider, config, chip), default=None)


def choices(problem: LinearProblem, chip: Chip, beyond: int = 0) -> Iterator[LinearConfig]:
    """Yield every configuration, but for what follows from the number of tokens, that `choose` has for a problem of as
    many tokens or fewer, and more than `beyond`; `fused` must say yes to all of them.

    Raises:
        InputError: as `choose`.
    """
    known = None if problem.batch_invariant else users_table(chip)
    for n in () if known is None else (n for n in known.measured(problem) if n > beyond):
        found = _looked_up(replace(problem, n=n), chip)
        if found is not None:
            yield found
    n = beyond
    while n < problem.n:
        n = filled(n + 1)
        yield _predicted(replace(problem, n=n), chip)


def filled(n: int) -> int:
    """Return the number of tokens whose predicted configuration n tokens have."""
    if n <= _FEW_TOKENS:
        return n
    step = sm90.WIDE_STEP if n > sm90.MANY_TOKENS else _STEP
    return -(-n // step) * step


@functools.lru_cache(maxsize=16384)
def _predicted(problem: LinearProblem, chip: Chip) -> LinearConfig:
    return schedules.predict(problem, chip)


def measured(problem: LinearProblem, chip: Chip) -> LinearConfig | None:
    """Return the measured choice for a problem on a chip, or `None` where no table decides it.

    Raises:
        InputError: the table of this chip cannot be used; the message names the file.
    """
    return None if users_table(chip) is None else _looked_up(problem, chip)


@functools.lru_cache(maxsize=4096)
def _looked_up(problem: LinearProblem, chip: Chip) -> LinearConfig | None:
    known = users_table(chip)
    return None if known is None else known.lookup(problem, chip)


@functools.cache
def users_table(chip: Chip) -> Table | None:
    """Return the user's table for a chip, or `None` where there is none; its file is read once a process.

    Raises:
        InputError: a file is there that is no table for this chip.
    """
    path = table.user_path(chip)
    return table.read(path, chip, table.kernels_hash()) if path.is_file() else None


def forget() -> None:
    """Forget what was read and chosen, so that the next call sees the file as it is now."""
    users_table.cache_clear()
    _predicted.cache_clear()
    _looked_up.cache_clear()
