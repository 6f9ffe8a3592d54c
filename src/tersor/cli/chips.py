"""Which GPUs does a verb work for: one that is named, or those of this machine?"""

from __future__ import annotations

from tersor import hardware
from tersor.errors import InputError


def wanted(name: str | None, purpose: str) -> list[hardware.Chip]:
    """Return the chip of a name, or the GPUs here, in the order of their indices.

    Args:
        name: value of --chip, such as `h200`; `None` where it was not given.
        purpose: what a message says the chip is needed for, such as `to compile for`.

    Raises:
        InputError: an unknown chip, or no name and no GPU.
    """
    if name is not None:
        return [hardware.chip_named(name)]
    if not hardware.cuda_available():
        known = ", ".join(hardware.CHIPS)
        raise InputError(f"torch sees no GPU {purpose}: name one with --chip ({known})")
    import torch

    return [hardware.of_device(index) for index in range(torch.cuda.device_count())]
