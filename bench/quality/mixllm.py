"""MixLLM's choice of levels (arXiv 2412.14590v2), to compare with: its score of output features, and its count rule.

A feature's score is the mean over samples of |a + a^2 / 2|, a the first-order change of the loss on the text's own
labels when the feature is rounded to 4 bits; the features with the largest scores get 8 bits, so many of all as asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tersor.compress.hessian import exact_products
from tersor.compress.salience import Salience, rounding_error
from tersor.convert.mix import Mixing, assign, mixable, parse_levels
from tersor.formats import Mix
from tersor.integrations.transformers import load

_HALVINGS = 20
"""Of the range in which the share of 8-bit features is looked for."""


def levels(group: int) -> Mix:
    """Return its two levels: 4 bits with a zero point in groups, and 8 bits with one scale a row."""
    return parse_levels([f"uint4:g{group}", "int8:row"])


def choose(model: Path, windows: torch.Tensor, group: int, bits: float, device: torch.device) -> Mixing:
    """Return the level of every output feature.

    Args:
        model: the checkpoint, in float32 on the device as a whole.
        windows: int64 [W, T], the calibration text; a window is a sample.
        group: input channels that share a scale of the 4-bit level.
        bits: true bits a weight; the share of 8-bit features is the largest that stays within them, where rows that
            fill a kernel's units up are not counted: MixLLM does not count them.
        device: where it is computed.
    """
    mix, found = levels(group), mixable(model)
    scores = _scores(model, found.shapes, windows, mix, device)
    least, most = 0.0, 1.0
    best = assign(scores, found.channels, mix, shares=[1.0, 0.0])
    for _ in range(_HALVINGS):
        share = (least + most) / 2
        tried = assign(scores, found.channels, mix, shares=[1 - share, share])
        taken = tried.allocation
        if 8 * (taken.nbytes - taken.padding) <= bits * taken.weights:
            least, best = share, tried
        else:
            most = share
    return best


def _scores(
    model: Path, shapes: Mapping[str, tuple[int, ...]], windows: torch.Tensor, mix: Mix, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return module -> score of each output feature at each level, float64 [levels, OC]."""
    whole: Any = load.load_model(model, device, "float32").requires_grad_(False)
    sums: dict[str, Salience] = {}
    handles = []
    for name, (features, _) in shapes.items():
        layer = whole.get_submodule(name)
        deltas = [rounding_error(layer.weight.float(), scheme) for scheme in mix.levels]
        sums[name] = Salience(len(deltas), features, "mixllm", device)
        handles.append(layer.register_forward_hook(_adding(sums[name], deltas)))
    with exact_products():
        for tokens in windows:
            ids = tokens[None].to(device)
            embedded = whole.get_input_embeddings()(ids).requires_grad_(True)
            logits = whole(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {name: own.mean() for name, own in sums.items()}


def _adding(own: Salience, deltas: list[torch.Tensor]) -> Any:
    def look(_: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        x = arguments[0].detach()[0]
        output.register_hook(lambda gradient: own.add(x, gradient[0], deltas))

    return look
