"""Which level gets every output feature of a model? From scores, a budget, and what kernels multiply as one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from tersor.checkpoint.config import parse_ignore, parse_overrides, parse_scheme
from tersor.checkpoint.conversion import Conversion, make_conversion
from tersor.checkpoint.exports import get_export
from tersor.checkpoint.names import MERGED
from tersor.checkpoint.source import open_source
from tersor.compress.allocate import allocate, allocate_by_count
from tersor.compress.allocate_time import Clock, allocate_time
from tersor.compress.allocation import Allocation, Floats, Fused
from tersor.compress.salience import KL
from tersor.convert.shared import Shared, shared_weights
from tersor.errors import InputError
from tersor.formats import Assignment, Mix, get_scheme
from tersor.integrations.transformers.architecture import read_architecture
from tersor.layouts.blocks import UNIT_OC

LEVELS = ("uint3", "uint4", "fp5_e2m2:row", "fp6_e2m3:row", "int8:row")
"""Levels whose mixes lose least at 4 to 6 bits, by the losses measured of each format; the first two in groups."""
_GROUPS = (128, 96, 64, 32)
"""Group sizes for them, of which the first is taken that divides the input channels of every module."""

STAND_IN = get_scheme("int8")
"""In place of a mix, where a conversion is made before output features have levels."""

_PAIRED = "gate_up_proj"


@dataclass(frozen=True, slots=True)
class Mixing:
    """What every output feature of a model gets, and what that takes and loses.

    Attributes:
        assignments: module -> the level of each of its output features.
        allocation: bytes and losses, those of a free choice beside.
        timed: what was predicted where the budget was one of time, in words, else an empty string.
        score: by what output features were compared, a key of `salience.SCORES`.
    """

    assignments: dict[str, Assignment]
    allocation: Allocation
    timed: str = ""
    score: str = KL

    def to_dict(self) -> dict[str, Any]:
        """Return what was chosen and what it takes and loses, as JSON values; losses are nats a token, or scores."""
        found, mix = self.allocation, next(iter(self.assignments.values())).mix
        return {
            "levels": [scheme.key() for scheme in mix.levels],
            "score": self.score,
            "shares": self.shares,
            "bits_per_weight": found.bits,
            "bytes": found.nbytes,
            "padding_bytes": found.padding,
            "loss": found.loss,
            "loss_without_units": found.pairs_loss,
            "loss_without_pairs_and_units": found.free_loss,
            **({"predicted_seconds": found.seconds, "predicted_for": self.timed} if found.seconds is not None else {}),
            "layers": {name: list(own.rows) for name, own in self.assignments.items()},
        }

    @property
    def shares(self) -> list[float]:
        """Which part of all output features each level has."""
        rows = np.sum([found.rows for found in self.assignments.values()], axis=0)
        return [float(count / rows.sum()) for count in rows]


def parse_levels(levels: Iterable[str], group_size: int | None = None, scale_dtype: str | None = None) -> Mix:
    """Return the mix of levels given as `FORMAT[:gN|:row][:SCALE_DTYPE]`.

    Args:
        levels: what the user gave.
        group_size, scale_dtype: of levels that name none.

    Raises:
        InputError: no list, or fewer than two.
        FormatError: an unknown format, or a level that stands there twice.
    """
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise InputError(f"levels is {levels!r}: give a list such as ['uint4:g128', 'int8']")
    schemes = tuple(parse_scheme(text, group_size, scale_dtype, f"level {text!r}") for text in levels)
    if len(schemes) < 2:
        raise InputError("a mix has at least two levels: for one, give it as the format")
    return Mix(schemes)


def usual_mix(channels: Iterable[int], scale_dtype: str | None = None, group_size: int | None = None) -> Mix:
    """Return the mix of `LEVELS` for modules of so many input channels, in the largest groups that fit all of them.

    Args:
        channels: of all modules.
        scale_dtype: of all levels; `None` is float16.
        group_size: in place of the largest that fits.

    Raises:
        InputError: no group size fits.
    """
    if group_size is not None:
        return parse_levels(LEVELS, group_size, scale_dtype)
    known = sorted(set(channels))
    size = next((size for size in _GROUPS if all(count % size == 0 for count in known)), None)
    if size is None:
        raise InputError(
            f"no groups of {', '.join(map(str, _GROUPS))} divide all of {', '.join(map(str, known))} input channels: "
            "give levels, such as --level uint4:g16 --level int8"
        )
    return parse_levels(LEVELS, size, scale_dtype)


@dataclass(frozen=True, slots=True)
class Mixable:
    """What of a checkpoint gets levels.

    Attributes:
        shapes: module -> (OC, IC), or (E, OC, IC) of E experts.
        other_bytes: bytes of all other tensors of the checkpoint that is written.
        experts: those of them that share levels, by the model's parameter that holds them.
    """

    shapes: dict[str, tuple[int, ...]]
    other_bytes: int
    experts: dict[str, Shared] = field(default_factory=dict)

    @property
    def scored(self) -> dict[str, tuple[int, int]]:
        """What has scores -> (OC, IC): linears by name, experts by that of the parameter that holds them."""
        members = {module for shared in self.experts.values() for module in shared.modules}
        linears = {module: (shape[-2], shape[-1]) for module, shape in self.shapes.items() if module not in members}
        experts = {name: (shared.parts * shared.channels, shared.ic) for name, shared in self.experts.items()}
        return linears | experts

    @property
    def channels(self) -> dict[str, int]:
        """Module -> IC."""
        return {module: shape[-1] for module, shape in self.shapes.items()}

    @staticmethod
    def of(conversion: Conversion) -> Mixable:
        """Return what gets levels where a conversion has `STAND_IN`."""
        chosen = [
            (step, step.layer)
            for step in conversion.steps
            if step.layer is not None and conversion.config.resolve(*step.layer.names) is STAND_IN
        ]
        written = sum(step.output_bytes for step, _ in chosen)
        shapes = {layer.module: layer.shape for _, layer in chosen}
        experts = shared_weights(layer for _, layer in chosen)
        return Mixable(shapes, conversion.output_bytes - written, experts)


def mixable(
    model: str | os.PathLike[str],
    *,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, Any] | Sequence[str] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Mixable:
    """Return which modules of a checkpoint have to be scored: those that `quantize` would give levels.

    Args:
        model, ignore, overrides, revision, trust_remote_code: as `quantize` takes them.

    Raises:
        InputError: a bad checkpoint, or patterns that find nothing.
    """
    with open_source(model, revision) as source:
        return Mixable.of(
            make_conversion(
                source,
                read_architecture(source.directory, trust_remote_code=trust_remote_code),
                scheme=STAND_IN,
                ignore=parse_ignore(ignore),
                overrides=parse_overrides(overrides),
                export=get_export("tersor"),
                shard_bytes=1 << 62,
                provenance={},
            )
        )


def assign(
    scores: Mapping[str, torch.Tensor],
    channels: Mapping[str, int],
    mix: Mix,
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    shares: Sequence[float] | None = None,
    latency: tuple[float, Clock] | None = None,
    experts: Mapping[str, Shared] = MappingProxyType({}),
    score: str = KL,
) -> Mixing:
    """Give every output feature a level.

    Queries, keys and values of one attention fill units of rows together; rows of gate and up of one channel get one
    level, and so do those of all experts of a layer. This is how kernels multiply them.

    Args:
        scores: module -> loss of each of its output features at every level of the mix, [levels, OC] (`Salience.mean`);
            of experts as `Mixable.scored` names them, summed up over the experts of a layer.
        channels: module -> IC.
        mix: the levels.
        target_bits: true bits a weight, on average over all modules.
        target_bytes: bytes of all modules, where no bits are given: those of a checkpoint but for `other_bytes`.
        shares: in place of a budget, which part of all features gets each level, by MixLLM's count rule.
        latency: in place of bytes, seconds of all modules and what predicts them (`latency.Steps`).
        experts: those that share levels (`Mixable.experts`).
        score: what the scores are, a key of `salience.SCORES`.

    Raises:
        InputError: not one of the four is given, a budget that is not feasible (the line says what is), or modules
            without a score.
        FormatError: a group size does not divide the input channels of a module.
        ShapeError: scores of the wrong shape.
    """
    if [target_bits, target_bytes, shares, latency].count(None) != 3:
        raise InputError("give one of target bits, target bytes, and shares of output features, or a latency")
    layers = fused({name: score.double().cpu().numpy() for name, score in scores.items()}, channels, experts)
    timed = ""
    if shares is not None:
        found = allocate_by_count(layers, mix.levels, shares, UNIT_OC)
    elif latency is not None:
        seconds, clock = latency
        found, timed = allocate_time(layers, mix.levels, clock, seconds, UNIT_OC), clock.words
    else:
        weights = sum(layer.weights for layer in layers)
        budget = target_bytes if target_bits is None else int(target_bits * weights / 8)
        assert budget is not None
        found = allocate(layers, mix.levels, budget, UNIT_OC)
    chosen = {name: level for name, level in found.chosen.items() if name in scores}
    for name, shared in experts.items():
        chosen |= shared.spread(name, found.chosen)
    return Mixing({name: Assignment(mix, level.tobytes()) for name, level in chosen.items()}, found, timed, score)


def fused(
    losses: Mapping[str, Floats], channels: Mapping[str, int], experts: Mapping[str, Shared] = MappingProxyType({})
) -> list[Fused]:
    """Return modules by what kernels multiply as one: `checkpoint.names.MERGED`, where all parts are there.

    Args:
        losses: module -> [levels, OC], of experts as `Mixable.scored` names them.
        channels: module -> IC.
        experts: those that share levels.

    Raises:
        InputError: a module without input channels.
    """
    unknown = [name for name in losses if name not in channels and name not in experts]
    if unknown:
        raise InputError(f"{unknown[0]} has scores, and no layer of the model is called so")
    left, found = dict(losses), []
    for name in losses:
        if name in experts:
            found.append(experts[name].fused(name, left.pop(name)))
            continue
        parent, dot, leaf = name.rpartition(".")
        for merged, parts in MERGED.items():
            members = [parent + dot + part for part in parts]
            alike = len({channels.get(member) for member in members}) == 1
            if leaf in parts and alike and all(member in left for member in members):
                found.append(Fused({one: left.pop(one) for one in members}, channels[name], paired=merged == _PAIRED))
        if name in left:
            found.append(Fused({name: left.pop(name)}, channels[name]))
    return found


def mix_of(assignments: Mapping[str, Assignment] | None) -> Mix | None:
    """Return the mix that all assignments have, `None` where there are none.

    Raises:
        InputError: they have several.
    """
    mixes = {found.mix for found in (assignments or {}).values()}
    if len(mixes) > 1:
        raise InputError(f"output features have levels of {len(mixes)} mixes: a checkpoint has one")
    return mixes.pop() if mixes else None


def fingerprint(assignments: Mapping[str, Assignment]) -> str:
    """Return what tells the levels of all output features from others: a SHA-256 in hexadecimal."""
    made = hashlib.sha256()
    for name, found in sorted(assignments.items()):
        made.update(f"{name} {len(found.level)} ".encode() + found.level)
    return made.hexdigest()
