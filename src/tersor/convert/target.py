"""What is a mix to take, and how is that met? Output features are scored on a text, and a budget is spent by that."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.checkpoint.conversion import Conversion
from tersor.checkpoint.writer import write_file
from tersor.compress.allocation import check_budget
from tersor.convert.calibrate import Plan, score, unscored
from tersor.convert.checks import check_space
from tersor.convert.mix import Mixable, assign, fused, parse_levels, usual_mix
from tersor.convert.pipeline import Progress
from tersor.convert.resume import Workplace
from tersor.errors import InputError
from tersor.formats import Assignment, Mix
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
    """

    levels: tuple[str, ...]
    group_size: int | None = None
    scale_dtype: str | None = None
    bits: float | None = None
    nbytes: int | None = None

    @property
    def words(self) -> str:
        """What is asked for, in words."""
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
        """Return the bytes of all modules that get levels."""
        if self.nbytes is not None:
            return self.nbytes - found.other_bytes
        assert self.bits is not None
        return int(self.bits * sum(map(math.prod, found.shapes.values())) / 8)

    def identity(self, conversion: Conversion) -> dict[str, Any]:
        """Return what the result depends on, as JSON values."""
        mix = self.mix(Mixable.of(conversion))
        return {"levels": mix.key(), "target bits": self.bits, "target size": self.nbytes}

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
        check_budget(layers, mix.levels, self.budget(found), UNIT_OC, found.other_bytes)
        lost = unscored(found.shapes, given.tasks)
        if lost:
            raise InputError(f"{lost[0]} is in no decoder block, so it has no score: give it an override or ignore it")

    def assign(
        self, conversion: Conversion, given: Plan, work: Workplace, progress: Progress | None
    ) -> dict[str, Assignment]:
        """Score output features and give them levels; what was chosen is written beside the checkpoint.

        Args:
            conversion: with `mix.STAND_IN` for what gets levels.
            given: the calibration.
            work: where the output is made.
            progress: called after every block.

        Raises:
            InputError: activations or gradients that are not finite; what was begun is discarded.
            CheckpointError, OutputError: as `calibrate.score` says.
        """
        found = Mixable.of(conversion)
        try:
            check_space(conversion, work, given.disk_bytes(work.directory))
            scores = score(given, conversion, found.shapes, self.mix(found), work.directory, progress)
            budget = self.budget(found)
            mixing = assign(scores, found.channels, self.mix(found), target_bytes=budget, experts=found.experts)
        except InputError:
            work.discard()
            raise
        write_file(work.directory / LOG_NAME, (json.dumps(mixing.to_dict(), indent=1) + "\n").encode())
        return mixing.assignments


def parse_target(
    levels: Sequence[str] = (),
    target_bits: float | None = None,
    target_size: float | None = None,
    group_size: int | None = None,
    scale_dtype: str | None = None,
) -> Target | None:
    """Return the target that a user gives, `None` where none is given.

    Args:
        levels: `FORMAT[:gN|:row][:SCALE_DTYPE]`.
        target_bits: true bits a weight.
        target_size: bytes of the checkpoint.
        group_size, scale_dtype: of levels that name none.

    Raises:
        InputError: levels without a target, two targets, or one that is no positive number.
        FormatError: an unknown format.
    """
    if target_bits is None and target_size is None:
        if levels:
            raise InputError("levels need a target: add --target-bits 4.5, or --target-size 5GB")
        return None
    if target_bits is not None and target_size is not None:
        raise InputError("target bits and target size are both given: keep one of them")
    for number, what in ((target_bits, "target bits"), (target_size, "target size")):
        if number is not None and not (isinstance(number, int | float) and 0 < number < math.inf):
            raise InputError(f"{what} {number!r} is not a positive number")
    if levels:
        parse_levels(levels, group_size, scale_dtype)
    size = None if target_size is None else int(target_size)
    return Target(tuple(levels), group_size, scale_dtype, target_bits, size)
