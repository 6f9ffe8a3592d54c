"""How many layers stay on the device, and which ones stream?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.errors import InputError, TersorError
from tersor.offload.streamer import SLOTS

PAGES_SHARE = 0.2
"""Of the memory that weights which always stay leave, what pages of keys and values get where nobody says how much:
layers that stay make a step shorter, and pages make it one of more rows."""
_PADDING = 0.03
"""What kernel layouts may take beyond the bytes of a checkpoint, where units of rows are not whole."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a device has for weights and pages.

    Attributes:
        nbytes: that the engine may take.
        step: that a step takes: activations, logits, graphs.
        pages: that pages of keys and values are to have; `None` is `PAGES_SHARE`.
    """

    nbytes: int
    step: int = 0
    pages: int | None = None

    def resident(self, layers: Sequence[int], outside: int) -> int:
        """Return how many layers stay; all, where they fit.

        Args:
            layers: bytes of each.
            outside: bytes of the weights that are in no layer, which always stay.

        Raises:
            TersorError: not even two layers at a time fit.
        """
        free = self.nbytes - self.step - int(outside * (1 + _PADDING))
        pages = int(PAGES_SHARE * max(free, 0)) if self.pages is None else self.pages
        for count in range(len(layers), -1, -1):
            if taken(layers, count) * (1 + _PADDING) <= free - pages:
                return count
        raise TersorError(
            f"offload: {taken(layers, 0) / 1e9:.1f} GB of buffers for {SLOTS} layers, {outside / 1e9:.1f} GB of other "
            f"weights and {pages / 1e9:.1f} GB of keys and values do not fit in {self.nbytes / 1e9:.1f} GB: use fewer "
            "tokens a step (max_step_tokens), fewer keys and values (kv_bytes), or more of the memory (memory)"
        )


def taken(layers: Sequence[int], resident: int) -> int:
    """Return the bytes that layers take where so many stay, the slots of the others included."""
    streamed = set(streaming(len(layers), resident))
    stay = sum(nbytes for index, nbytes in enumerate(layers) if index not in streamed)
    return stay + min(SLOTS, len(streamed)) * max((layers[index] for index in streamed), default=0)


def streaming(layers: int, resident: int) -> list[int]:
    """Return which of so many layers stream, spread evenly: those that stay are computed while the next is copied.

    Raises:
        InputError: more are to stay than there are.
    """
    if resident > layers:
        raise InputError(f"resident_layers is {resident}, and the model has {layers} layers")
    count = layers - resident
    return [index for index in range(layers) if (index + 1) * count // layers > index * count // layers]
