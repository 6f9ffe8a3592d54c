"""How are the weights of a layer's experts handed to an operator of torch? Their tensors, and a text for the rest.

The text has a part for every row set (`scheme E OC IC layout tensors`), and one for the mix where there is one (`levels
E OC IC gated ordered`), joined by semicolons: made by a trace, which follows no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tersor.formats import Mix, Scheme
from tersor.layouts import Stacked, StackedMixedWeight, StackedWeight, sets_of


def tensors_of(weight: Stacked) -> tuple[list[torch.Tensor], str]:
    """Return the tensors of a weight, and what `weight_of` needs to know beside them."""
    tensors: list[torch.Tensor] = []
    parts = []
    for one in sets_of(weight):
        own = [one.data, one.scale, *([] if one.zero_point is None else [one.zero_point])]
        tensors += own
        experts, oc, ic = one.shape
        parts.append(f"{one.scheme.key()} {experts} {oc} {ic} {one.layout} {len(own)}")
    if isinstance(weight, StackedMixedWeight):
        ordered = weight.features is not None and weight.places is not None
        if weight.features is not None and weight.places is not None:
            tensors += [weight.features, weight.places]
        experts, oc, ic = weight.shape
        parts.append(f"{weight.mix.key()} {experts} {oc} {ic} {int(weight.gated)} {int(ordered)}")
    return tensors, ";".join([str(int(isinstance(weight, StackedMixedWeight))), *parts])


def weight_of(tensors: Sequence[torch.Tensor], form: str) -> Stacked:
    """Return the weight whose tensors and text `tensors_of` gave."""
    is_mixed, *parts = form.split(";")
    sets, left = [], list(tensors)
    for part in parts[: len(parts) - int(is_mixed)]:
        scheme, *sizes, layout, count = part.split()
        experts, oc, ic = map(int, sizes)
        own, left = left[: int(count)], left[int(count) :]
        zero_point = own[2] if len(own) > 2 else None
        sets.append(StackedWeight(Scheme.from_key(scheme), (experts, oc, ic), own[0], own[1], zero_point, layout))
    if not int(is_mixed):
        return sets[0]
    levels, *sizes, gated, ordered = parts[-1].split()
    experts, oc, ic = map(int, sizes)
    features, places = left if int(ordered) else (None, None)
    mix = Mix(tuple(map(Scheme.from_key, levels.split("+"))))
    return StackedMixedWeight(mix, (experts, oc, ic), tuple(sets), features, places, bool(int(gated)))
