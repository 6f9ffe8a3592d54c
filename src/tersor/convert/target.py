"""What is a mix to take, and how is that met? Output features are scored on a text, and a budget is spent by that."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.writer import write_file
from tersor.compress.allocate_time import check_time
from tersor.compress.allocation import check_budget
from tersor.convert.calibrate import Plan, score, unscored
from tersor.convert.checks import check_space
from tersor.convert.latency import Steps, top_k_of
from tersor.convert.mix import Mixable, Mixing, assign, fused, parse_levels, usual_mix
from tersor.convert.pipeline import Progress
from tersor.convert.resume import Workplace
from tersor.errors import InputError
from tersor.formats import Mix
from tersor.hardware import CHIPS, Chip, chip_named
from tersor.kernels.tune.cost import DEFAULT as DEFAULT_CHIP
from tersor.layouts.blocks import UNIT_OC

LOG_NAME = "tersor-mix.json"
"""Beside a checkpoint of a target: what each level got, what it takes, and what it loses."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a mix is to take.

    Attributes:
        levels: what output features may get, as the user wrote it; of none `mix.usual_mix` is meant.
        group_size, scale_dtype: of levels that name none.
        bits: true bits a weight, on average over all modules that get levels; or `None`.
        nbytes: bytes of all tensors of the checkpoint; or `None`.
        seconds: that a step's products with all modules that get levels are predicted to take; or `None`.
        rows: of such a step.
        chip: where it runs.
    """

    levels: tuple[str, ...]
    group_size: int | None = None
    scale_dtype: str | None = None
    bits: float | None = None
    nbytes: int | None = None
    seconds: float | None = None
    rows: int = 1
    chip: Chip = CHIPS[DEFAULT_CHIP]

    @property
    def words(self) -> str:
        """What is asked for, in words."""
        if self.seconds is not None:
            rows = f"{self.rows} row{'s' * (self.rows > 1)}"
            return f"{1e3 * self.seconds:g} ms for the linears of a step of {rows} on {self.chip.name}"
        return f"{self.bits:g} true bits a weight" if self.nbytes is None else f"{self.nbytes} bytes"

    def mix(self, found: Mixable) -> Mix:
        """Return the levels for the modules of a checkpoint.

        Raises:
            InputError: none are given, and the usual ones do not fit.
        """
        if self.levels:
            return parse_levels(self.levels, self.group_size, self.scale_dtype)
        return usual_mix(found.channels.values(), self.scale_dtype)

    def budget(self, found: Mixable) -> int:
        """Return the bytes of all modules that get levels, where the target is not one of time."""
        if self.nbytes is not None:
            return self.nbytes - found.other_bytes
        assert self.bits is not None
        return int(self.bits * sum(map(math.prod, found.shapes.values())) / 8)

    def clock(self, found: Mixable, given: Plan) -> Steps:
        """Return what predicts the time of a step.

        Raises:
            InputError: a level, or so many rows, have no kernel on the chip.
        """
        config = given.model.model.config.get_text_config()
        dtype = getattr(config, "dtype", None)
        chosen = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return Steps(self.mix(found), self.chip, self.rows, chosen, top_k_of(config))

    def identity(self, conversion: Conversion) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        mix = self.mix(Mixable.of(conversion))
        timed = {} if self.seconds is None else {"target latency": self.words}
        return {"levels": mix.key(), "target bits": self.bits, "target size": self.nbytes, **timed}

    def check(self, conversion: Conversion, given: Plan) -> None:
        """Hold that the target can be met, and that all that gets levels is scored, before the work starts.

        Raises:
            InputError: it is below or above what levels take (the line says the range), or a module that is in no
                decoder block.
            FormatError: a group size does not divide the input channels of a module.
        """
        found = Mixable.of(conversion)
        mix = self.mix(found)
        nothing = {name: np.broadcast_to(0.0, (len(mix.levels), oc)) for name, (oc, _) in found.scored.items()}
        layers = fused(nothing, found.channels, found.experts)
        if self.seconds is not None:
            check_time(layers, mix.levels, self.clock(found, given), self.seconds)
        else:
            check_budget(layers, mix.levels, self.budget(found), UNIT_OC, found.other_bytes)
        lost = unscored(found.shapes, given.tasks)
        if lost:
            raise InputError(f"{lost[0]} is in no decoder block, so it has no score: give it an override or ignore it")

    def assign(self, conversion: Conversion, given: Plan, work: Workplace, progress: Progress | None) -> Mixing:
        """Score output features and give them levels; what was chosen is written beside the checkpoint.

        Args:
            conversion: with `mix.STAND_IN` for what gets levels.
            given: the calibration.
            work: where the output is made.
            progress: called after every block.

        Raises:
            InputError: activations or gradients that are not finite.
            CheckpointError, OutputError: as `calibrate.score` says.
        """
        found = Mixable.of(conversion)
        check_space(conversion, work, given.disk_bytes(work.directory))
        scores = score(given, conversion, found.shapes, self.mix(found), work.directory, progress)
        mix, experts = self.mix(found), found.experts
        if self.seconds is not None:
            timed = self.seconds, self.clock(found, given)
            mixing = assign(scores, found.channels, mix, latency=timed, experts=experts)
        else:
            mixing = assign(scores, found.channels, mix, target_bytes=self.budget(found), experts=experts)
        write_file(work.directory / LOG_NAME, (json.dumps(mixing.to_dict(), indent=1) + "\n").encode())
        return mixing


def parse_target(
    levels: Sequence[str] = (),
    target_bits: float | None = None,
    target_size: float | None = None,
    target_latency: float | None = None,
    batch: int | None = None,
    chip: str | None = None,
    group_size: int | None = None,
    scale_dtype: str | None = None,
) -> Target | None:
    """Return the target that a user gives, `None` where none is given.

    Args:
        levels: `FORMAT[:gN|:row][:SCALE_DTYPE]`.
        target_bits: true bits a weight.
        target_size: bytes of the checkpoint.
        target_latency: seconds.
        batch: rows of the step that takes them, 1 for `None`.
        chip: where it runs, by its name; `None` is an H200.
        group_size, scale_dtype: of levels that name none.

    Raises:
        InputError: levels without a target, two targets, one that is no positive number, or an unknown chip.
        FormatError: an unknown format.
    """
    targets = {"target bits": target_bits, "target size": target_size, "target latency": target_latency}
    given = [what for what, number in targets.items() if number is not None]
    if target_latency is None and (batch, chip) != (None, None):
        raise InputError("batch and chip say for what a latency is predicted: add --target-latency 2ms")
    if not given:
        if levels:
            raise InputError("levels need a target: add --target-bits 4.5, or --target-size 5GB")
        return None
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are both given: keep one of them")
    if batch is not None and not (isinstance(batch, int) and batch > 0):
        raise InputError(f"batch {batch!r} is not a positive number")
    for what, number in targets.items():
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            raise InputError(f"{what} {number!r} is not a positive number")
    if levels:
        parse_levels(levels, group_size, scale_dtype)
    size = None if target_size is None else int(target_size)
    where = CHIPS[DEFAULT_CHIP] if chip is None else chip_named(chip)
    of_step = (target_latency, batch or 1, where)
    return Target(tuple(levels), group_size, scale_dtype, target_bits, size, *of_step)
