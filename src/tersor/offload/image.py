"""Where do the tensors of a layer's weights lie in one piece of bytes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALIGNED = 512
"""Bytes that a tensor starts on a multiple of, as torch's own do: kernels ask for 16, tensor maps for 128."""
BLOCK = 4096
"""Bytes that an image is a multiple of: what a disk is read in without the page cache."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in an image.

    Attributes:
        dtype, shape: of it; it is contiguous.
        offset: bytes ahead of it.
        nbytes: its own.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """Tensors one behind the other.

    Attributes:
        places: of the tensors.
        nbytes: of all, with what lies between and behind them.
    """

    places: tuple[Place, ...]
    nbytes: int

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> Image:
        """Return the image of tensors in their order."""
        places, end = [], 0
        for tensor in tensors:
            places.append(Place(tensor.dtype, tuple(tensor.shape), end, tensor.nbytes))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return Image(tuple(places), -(-end // BLOCK) * BLOCK)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors that lie in memory, uint8 [at least `nbytes`], without a copy."""
        found = []
        for place in self.places:
            part = memory[place.offset : place.offset + place.nbytes]
            found.append(part.view(place.dtype).view(place.shape))
        return found

    def write(self, memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy tensors into memory, uint8 [at least `nbytes`], on any device."""
        for view, tensor in zip(self.views(memory), tensors, strict=True):
            view.copy_(tensor)
