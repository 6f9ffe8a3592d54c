"""Where do numbers stop being finite? A decoder reads a text once more, and its parts are watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tersor.models.decoder import Attention, Decoder, DecoderLayer
from tersor.models.names import NAMES
from tersor.models.weights import FeedForward
from tersor.ops.attention_form import PAGE, Rows


@torch.inference_mode()
def first_not_finite(decoder: Decoder, tokens: Sequence[int]) -> str:
    """Run a decoder on a text and say which of its parts is the first whose output holds a NaN or an infinity.

    Args:
        decoder: of one rank.
        tokens: of the text, at least one.

    Returns:
        Words for the end of a sentence, such as `, first in model.layers.3.mlp.down_proj`; empty where every output is
        finite in this run, or where there is no memory for it.
    """
    found: list[str] = []
    try:
        count, device = len(tokens), decoder.device
        ids, last = (torch.tensor(numbers, device=device) for numbers in (tokens, [count - 1]))
        _watched(decoder, found)(ids, Rows.of_text(count, device), decoder.caches(-(-count // PAGE)), last)
    except torch.OutOfMemoryError:
        return ""
    return f", first in {found[0]}" if found else ""


class _Watched:
    """A part that keeps its name where what it returns is not finite; whatever else it has it still has."""

    def __init__(self, part: Callable[..., torch.Tensor], name: str, found: list[str]) -> None:
        self._part, self._name, self._found = part, name, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        output = self._part(*arguments, **options)
        if not self._found and not bool(output.isfinite().all()):
            self._found.append(self._name)
        return output


def _watched(decoder: Decoder, found: list[str]) -> Decoder:
    """Return a decoder of the same parts, watched."""
    names = NAMES[decoder.config.architecture]

    def watch(part: Any, name: str) -> Any:
        return _Watched(part, name, found)

    def layer(one: DecoderLayer, index: int) -> DecoderLayer:
        start = names.base + names.layer.format(layer=index)
        attention, ffn, out_norms = one.attention, one.ffn, one.out_norms
        if isinstance(attention, Attention):
            attention = replace(attention, qkv=watch(attention.qkv, start + _either(names.qkv)))
        attention = replace(attention, out=watch(attention.out, start + names.out))
        if isinstance(ffn, FeedForward):
            up = watch(ffn.up, start + _either(names.gate_up))
            ffn = FeedForward(up, watch(ffn.down, start + names.down))
        else:
            ffn = watch(ffn, start + names.router.rpartition(".")[0])
        if out_norms is not None:
            after = (names.attention_out_norm, names.ffn_out_norm)
            out_norms = (watch(out_norms[0], start + after[0]), watch(out_norms[1], start + after[1]))
        norms = (watch(one.norms[0], start + names.input_norm), watch(one.norms[1], start + names.ffn_norm))
        return replace(one, norms=norms, attention=attention, ffn=ffn, out_norms=out_norms)

    return Decoder(
        decoder.config,
        watch(decoder.embedding, names.base + names.embedding),
        [layer(one, index) for index, one in enumerate(decoder.layers)],
        watch(decoder.norm, names.base + names.norm),
        watch(decoder.head, names.head),
        decoder.streamed,
    )


def _either(names: Sequence[str]) -> str:
    """Return what several modules that are one product are called, such as `mlp.gate_proj or up_proj`."""
    return " or ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
