"""Measure every configuration of a problem and keep the fastest in the table of the chip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersor import ops
from tersor.bench import contenders, report, timing
from tersor.bench.linear import problem_of
from tersor.bench.shapes import Shape
from tersor.errors import InputError
from tersor.formats import Activations, Scheme
from tersor.kernels import dense, tune
from tersor.kernels.tune import LinearConfig, LinearProblem, table
from tersor.kernels.tune.table import Choice, Table

if TYPE_CHECKING:
    from tersor.hardware import Chip

REPLAYS = 5
MARGIN = 0.01
"""The model's own choice stands where nothing is faster by more than this share, which two runs differ by anyway."""

LIKELY = 2.0
"""A configuration is not measured that is predicted to take longer than so many times the least."""

MOST_PARTS = 256 << 20
"""Bytes of split sums above which a configuration is not measured: to read them takes longer than splits could save."""


def tokens_with_edges() -> tuple[int, ...]:
    """Return numbers of tokens that leave few gaps: both ends of ranges in which the tile stays the same.

    Between measured numbers that disagree the model decides (`table.Table.lookup`).
    """
    edges = (8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    return (1, 4, 5, *sorted({n for edge in edges for n in (edge, edge + 1)}), 384, 512, 1024, 2048, 4096)


def pick(times: Mapping[LinearConfig, float], preferred: LinearConfig) -> LinearConfig:
    """Return the fastest configuration, or the preferred one where it is as fast within `MARGIN`.

    Args:
        times: configuration -> microseconds.
        preferred: one of them, the model's choice.
    """
    best = min(times, key=lambda config: times[config])
    return preferred if times[preferred] <= times[best] * (1 + MARGIN) else best


def problems(
    shapes: Sequence[Shape], tokens: Sequence[int], schemes: Sequence[Scheme], chip: Chip
) -> dict[tuple[Shape, Scheme], list[LinearProblem]]:
    """Return the problems that a fused kernel takes, with each weight they share.

    Schemes of the same width and scales make the same problem; the first of them stands for all.
    """
    found: dict[tuple[Shape, Scheme], list[LinearProblem]] = {}
    seen = set()
    for shape in shapes:
        for scheme in schemes:
            for n in tokens:
                problem = problem_of(shape, scheme, n)
                if problem not in seen and tune.fused(problem, chip):
                    seen.add(problem)
                    found.setdefault((shape, scheme), []).append(problem)
    return found


def worth_measuring(problem: LinearProblem, chip: Chip) -> list[LinearConfig]:
    """Return the `LIKELY` candidates of a problem and the model's choice, without those of too large split sums.

    Of another schedule than the model's choice all are likely: it does not compare schedules.
    """
    predicted = tune.predict(problem, chip)
    most = LIKELY * tune.seconds(problem, predicted, chip)
    return [
        config
        for config in tune.candidates(problem, chip)
        if config == predicted
        or (
            4 * dense.parts(config, problem.n)[0] <= MOST_PARTS
            and (config.schedule != predicted.schedule or tune.seconds(problem, config, chip) <= most)
        )
    ]


def measure(
    wanted: Mapping[tuple[Shape, Scheme], Sequence[LinearProblem]],
    chip: Chip,
    time: Callable[[Shape, Scheme], Callable[[LinearProblem, LinearConfig], float]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Choice]:
    """Time every candidate of every problem that is `worth_measuring`, and return the choices.

    Args:
        wanted: what `problems` returned.
        chip: the chip at hand.
        time: makes the copies of a weight and returns what times a problem with a configuration, in microseconds.
        progress: told (done, in all) after every problem.
    """
    choices = []
    total = sum(map(len, wanted.values()))
    for (shape, scheme), of_weight in wanted.items():
        timed = time(shape, scheme)
        for problem in of_weight:
            times = {config: timed(problem, config) for config in worth_measuring(problem, chip)}
            config = pick(times, tune.predict(problem, chip))
            choices.append(Choice(problem=problem, config=config, microseconds=round(times[config], 3)))
            progress(len(choices), total)
    return choices


def on_gpu(
    dtype: torch.dtype, chip: Chip, activations: Activations | str = Activations.NATIVE
) -> Callable[[Shape, Scheme], Callable[[LinearProblem, LinearConfig], float]]:
    """Return what times configurations on the current GPU, in chains with programmatic dependent launch.

    Args:
        dtype: of the activations.
        chip: that GPU.
        activations: what weights are multiplied with.
    """

    from tersor.kernels import jit

    def time(shape: Shape, scheme: Scheme) -> Callable[[LinearProblem, LinearConfig], float]:
        try:
            weights = contenders.packed(scheme, shape.oc, shape.ic, dtype, activations)
        except contenders.UnfitError as error:
            raise InputError(str(error)) from None
        jit.compile_many(ops.kernels_for(scheme, dtype, chip, activations), jit.arch_for(chip.capability))

        def timed(problem: LinearProblem, config: LinearConfig) -> float:
            x = contenders.random(problem.n, problem.ic, dtype)
            calls = contenders.chained(weights, x, early=True, config=config)
            return timing.graph_microseconds(calls, REPLAYS)

        return timed

    return time


def merged(path: Path, chip: Chip, choices: Sequence[Choice]) -> Table:
    """Return the table that a file should hold: its choices, where there is one, and the new ones.

    Raises:
        InputError: the file is there and is no table for this chip and these kernels.
    """
    environment = report.environment()
    hashed = table.kernels_hash()
    if path.exists():
        return table.read(path, chip, hashed).updated(choices, environment)
    return Table(path, chip.name, table.capability(chip), hashed, environment, choices)


def rows(choices: Sequence[Choice], chip: Chip) -> list[dict[str, Any]]:
    """Return the choices as JSON values, with what the model would have chosen."""
    return [
        {
            **asdict(choice.problem),
            "microseconds": choice.microseconds,
            "config": str(choice.config),
            "predicted_config": str(tune.predict(choice.problem, chip)),
        }
        for choice in choices
    ]


def columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table of `rows`."""
    cells = [
        [
            f"{row['oc']}x{row['ic']}",
            str(row["n"]),
            str(row["bits"]),
            f"{row['microseconds']:.1f}",
            row["config"],
            "the same" if row["config"] == row["predicted_config"] else row["predicted_config"],
        ]
        for row in rows
    ]
    return ["weight", "N", "bits", "us", "fastest configuration", "predicted"], cells
