"""A mix to be timed: which share of a weight's rows has which format, written `uint4:g128=90+int8=10`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tersor.bench import timing
from tersor.compress import quantize_rtn
from tersor.errors import InputError
from tersor.formats import Activations, Assignment, Mix, Scheme
from tersor.layouts import MixedWeight, PackedWeight
from tersor.ops import dispatch

SHARE, LEVEL = "=", "+"
"""Between a format and its percents, and between levels."""


@dataclass(frozen=True, slots=True)
class Blend:
    """Formats of rows, and how many have which.

    Attributes:
        levels: the formats.
        percents: of the rows that have each; 100 in all.
        in_order: whether the rows of a level stand side by side; else each feature's level is drawn.
    """

    levels: tuple[Scheme, ...]
    percents: tuple[int, ...]
    in_order: bool = False

    def groups(self, ic: int) -> None:
        """Hold that groups of every level divide so many input channels.

        Raises:
            FormatError: those of one do not.
        """
        for level in self.levels:
            level.groups(ic)

    def assignment(self, oc: int) -> Assignment:
        """Return the level of each of `oc` output features, which are as good as drawn."""
        bounds = [round(oc * sum(self.percents[:count]) / 100) for count in range(len(self.percents) + 1)]
        level = torch.arange(len(self.levels), dtype=torch.uint8).repeat_interleave(torch.tensor(bounds).diff())
        if not self.in_order:
            level = level[torch.randperm(oc, generator=torch.Generator().manual_seed(oc))]
        return Assignment(Mix(self.levels), level.numpy().tobytes())

    def packed_bytes(self, oc: int, ic: int) -> int:
        """Return the bytes of a packed weight with its scales."""
        rows = self.assignment(oc).rows
        bits = sum(level.bits_per_weight(ic) * count for level, count in zip(self.levels, rows, strict=True))
        return round(bits * ic / 8)

    def packed(self, oc: int, ic: int, dtype: torch.dtype, activations: Activations) -> list[MixedWeight]:
        """Return copies of a random weight [oc, ic] on the current GPU, in the layouts its kernels read.

        Raises:
            UnsupportedError: a level is not multiplied with such activations.
        """
        form = self.assignment(oc)
        layouts = {level: dispatch.kernel_layout(level, dtype, activations) for level in self.levels}
        sets = []
        for level, rows in zip(self.levels, form.rows, strict=True):
            if rows:
                plain = torch.randn(rows, ic, dtype=dtype, device="cuda") * ic**-0.5
                sets.append(PackedWeight.from_encoded(quantize_rtn(plain, level)).to_layout(layouts[level]))
        first = MixedWeight.of(form, sets)
        return [
            first,
            *(MixedWeight.of(form, [_copied(one) for one in sets]) for _ in range(timing.copies(first.nbytes) - 1)),
        ]


def _copied(weight: PackedWeight) -> PackedWeight:
    return replace(weight, data=weight.data.clone(), scale=weight.scale.clone())


def parse(text: str, schemes: Sequence[Scheme], in_order: bool) -> Blend:
    """Make a mix of its text and the formats of its levels, in order.

    Raises:
        FormatError: two levels are of one format, or there are too many.
        InputError: a level without its share, or shares that do not come to 100.
    """
    words = [word.partition(SHARE)[2] for word in text.split(LEVEL)]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or sum(map(int, words)) != 100:
        raise InputError(
            f"--format {text!r}: each level of a mix has its share of the rows in percent, 100 in all, such as "
            "uint4:g128=90+int8=10"
        )
    Mix(tuple(schemes))
    return Blend(tuple(schemes), tuple(map(int, words)), in_order)
