"""How is a mixed weight handed to an operator of torch? Its tensors, and a text for the rest, as those of experts are.

The text has a part for every row set (`scheme OC IC layout tensors`), and one for the whole (`levels OC IC gated
ordered`), joined by semicolons: made by a trace, which follows no encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tersor.formats import Mix, Scheme
from tersor.layouts import MixedWeight, PackedWeight
from tersor.layouts.gated import gated_channels


@dataclass(frozen=True, slots=True)
class _RowSet:
    """What a part of the text says of a row set; `tensors` counts its own."""

    scheme: Scheme
    shape: tuple[int, int]
    layout: str
    tensors: int


@dataclass(frozen=True, slots=True)
class _Whole:
    """What the text says."""

    sets: tuple[_RowSet, ...]
    mix: Mix
    shape: tuple[int, int]
    gated: bool
    ordered: bool


def tensors_of(weight: MixedWeight) -> tuple[list[torch.Tensor], str]:
    """Return the tensors of a weight, and what `weight_of` needs to know beside them."""
    tensors: list[torch.Tensor] = []
    parts = []
    for one in weight.sets:
        own = [one.data, one.scale, *([] if one.zero_point is None else [one.zero_point])]
        tensors += own
        oc, ic = one.shape
        parts.append(f"{one.scheme.key()} {oc} {ic} {one.layout} {len(own)}")
    ordered = weight.features is not None and weight.places is not None
    if weight.features is not None and weight.places is not None:
        tensors += [weight.features, weight.places]
    oc, ic = weight.shape
    parts.append(f"{weight.mix.key()} {oc} {ic} {int(weight.gated)} {int(ordered)}")
    return tensors, ";".join(parts)


def weight_of(tensors: Sequence[torch.Tensor], form: str) -> MixedWeight:
    """Return the weight whose tensors and text `tensors_of` gave."""
    said = _read(form)
    sets, left = [], list(tensors)
    for one in said.sets:
        data, scale, *rest = left[: one.tensors]
        left = left[one.tensors :]
        sets.append(PackedWeight(one.scheme, one.shape, data, scale, rest[0] if rest else None, one.layout))
    features, places = left if said.ordered else (None, None)
    return MixedWeight(said.mix, said.shape, tuple(sets), features, places, said.gated)


def outputs_of(form: str) -> tuple[tuple[int, int], bool, int]:
    """Return (OC, IC) of the weight that a text is of, whether it is gate and up, and the outputs of a product."""
    said = _read(form)
    return said.shape, said.gated, gated_channels(said.shape[0]) if said.gated else said.shape[0]


@functools.lru_cache(maxsize=4096)
def _read(form: str) -> _Whole:
    *parts, whole = form.split(";")
    sets = []
    for part in parts:
        scheme, oc, ic, layout, count = part.split()
        sets.append(_RowSet(Scheme.from_key(scheme), (int(oc), int(ic)), layout, int(count)))
    levels, oc, ic, gated, ordered = whole.split()
    mix = Mix(tuple(map(Scheme.from_key, levels.split("+"))))
    return _Whole(tuple(sets), mix, (int(oc), int(ic)), bool(int(gated)), bool(int(ordered)))
