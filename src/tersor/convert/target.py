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
from tersor.compress.allocate import check_shares
from tersor.compress.allocate_time import check_time
from tersor.compress.allocation import check_budget, feasible
from tersor.compress.salience import KL, check_score
from tersor.convert.calibrate import Plan, score, unscored
from tersor.convert.checks import check_space
from tersor.convert.latency import Steps, top_k_of
from tersor.convert.mix import LEVELS, Mixable, Mixing, assign, fused, parse_levels, usual_mix
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
        shares: in place of all that, which part of all output features gets each level, by MixLLM's count rule.
        score: by what output features are compared, a key of `salience.SCORES`.
    """

    levels: tuple[str, ...]
    group_size: int | None = None
    scale_dtype: str | None = None
    bits: float | None = None
    nbytes: int | None = None
    seconds: float | None = None
    rows: int = 1
    chip: Chip = CHIPS[DEFAULT_CHIP]
    shares: tuple[float, ...] | None = None
    score: str = KL

    @property
    def words(self) -> str:
        """What is asked for, in words."""
        return self._amount if self.score == KL else f"{self._amount}, by the score {self.score}"

    @property
    def _amount(self) -> str:
        if self.shares is not None:
            each = ", ".join(f"{100 * share:g}" for share in self.shares)
            return f"levels for {each} % of all output features by count"
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
        return usual_mix(found.channels.values(), self.scale_dtype, self.group_size)

    def budget(self, found: Mixable) -> int:
        """Return the bytes of all modules that get levels, where the target is one of bits or of size."""
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
        other = {"target latency": None if self.seconds is None else self._amount, "target shares": self.shares}
        other["score"] = None if self.score == KL else self.score
        given = {what: value for what, value in other.items() if value is not None}
        return {"levels": mix.key(), "target bits": self.bits, "target size": self.nbytes, **given}

    def check(self, conversion: Conversion, given: Plan) -> None:
        """Hold that the target can be met, and that all that gets levels is scored, before the work starts.

        Raises:
            InputError: it is below or above what levels take (the line says the range), experts by a score that does
                not know them, or a module that is in no decoder block.
            FormatError: a group size does not divide the input channels of a module.
        """
        found = Mixable.of(conversion)
        mix = self.mix(found)
        nothing = {name: np.broadcast_to(0.0, (len(mix.levels), oc)) for name, (oc, _) in found.scored.items()}
        layers = fused(nothing, found.channels, found.experts)
        if self.score != KL and found.experts:
            raise InputError(f"score {self.score!r} knows no experts: leave it out, or ignore them (--ignore experts)")
        if self.shares is not None:
            feasible(layers, mix.levels, UNIT_OC)  # holds that groups divide channels
        elif self.seconds is not None:
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
        mix, experts = self.mix(found), found.experts
        scores = score(given, conversion, found.shapes, mix, work.directory, progress, self.score)
        if self.shares is not None:
            mixing = assign(scores, found.channels, mix, shares=self.shares, experts=experts, score=self.score)
        elif self.seconds is not None:
            timed = self.seconds, self.clock(found, given)
            mixing = assign(scores, found.channels, mix, latency=timed, experts=experts, score=self.score)
        else:
            budget = self.budget(found)
            mixing = assign(scores, found.channels, mix, target_bytes=budget, experts=experts, score=self.score)
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
    shares: Sequence[float] | None = None,
    score: str = KL,
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
        shares: in place of a budget, which part of all output features gets each level.
        score: by what they are compared.

    Raises:
        InputError: levels or a score without a target, two targets, one that is no positive number, shares that are
            none, an unknown chip or score.
        FormatError: an unknown format.
    """
    targets = {"target bits": target_bits, "target size": target_size, "target latency": target_latency}
    given = [what for what, value in {**targets, "target shares": shares}.items() if value is not None]
    check_score(score)
    if target_latency is None and (batch, chip) != (None, None):
        raise InputError("batch and chip say for what a latency is predicted: add --target-latency 2ms")
    if not given:
        if levels:
            raise InputError("levels need a target: add --target-bits 4.5, or --target-size 5GB")
        if score != KL:
            raise InputError(f"score {score!r} compares output features for a target: add --target-bits 4.5")
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
    if shares is not None:
        check_shares(shares, len(levels or LEVELS))
        shares = tuple(shares)
    size = None if target_size is None else int(target_size)
    where = CHIPS[DEFAULT_CHIP] if chip is None else chip_named(chip)
    of_step = (target_latency, batch or 1, where)
    return Target(tuple(levels), group_size, scale_dtype, target_bits, size, *of_step, shares, score)
