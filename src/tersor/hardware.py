"""Chip facts, with their source, for whoever chooses tiles or predicts time.

Multiprocessor counts, shared memory and L2 sizes: NVIDIA CUDA C++ Programming Guide 13.0, table "Technical
Specifications per Compute Capability", and the architecture whitepapers. Read bandwidth: the datasheet.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What tile choice and cost models need to know of one GPU.

    Attributes:
        name: marketing name.
        capability: compute capability, (major, minor).
        sms: number of multiprocessors.
        shared_bytes: shared memory one block may use, after opting in.
        bandwidth: device memory bandwidth in bytes per second, by the datasheet.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_bytes: int
    bandwidth: float


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(name="NVIDIA A100", capability=(8, 0), sms=108, shared_bytes=163 * 1024, bandwidth=2.039e12),
        Chip(name="NVIDIA RTX 3090", capability=(8, 6), sms=82, shared_bytes=99 * 1024, bandwidth=0.936e12),
        Chip(name="NVIDIA RTX 4090", capability=(8, 9), sms=128, shared_bytes=99 * 1024, bandwidth=1.008e12),
        Chip(name="NVIDIA H100", capability=(9, 0), sms=132, shared_bytes=227 * 1024, bandwidth=3.35e12),
        Chip(name="NVIDIA H200", capability=(9, 0), sms=132, shared_bytes=227 * 1024, bandwidth=4.8e12),
    )
}

KERNEL_CAPABILITY = (8, 0)
"""The oldest compute capability the kernels run on: bf16 mma.sync and cp.async appeared with it."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def chip_named(name: str) -> Chip:
    """Return the facts of a chip by its name, which may leave out the maker, capitals and blanks (`h200`, `rtx4090`).

    Raises:
        InputError: no chip of that name is known.
    """
    short = {_short(known): chip for known, chip in CHIPS.items()}
    wanted = _short(name)
    if wanted not in short:
        near = difflib.get_close_matches(wanted, short, n=1, cutoff=0.5)
        hint = f", did you mean {short[near[0]].name!r}?" if near else ""
        raise InputError(f"unknown chip {name!r}{hint} (known: {', '.join(CHIPS)})")
    return short[wanted]


def _short(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower()).removeprefix("nvidia")


def driver_version() -> str | None:
    """Return the version of the NVIDIA kernel driver, or `None` where there is none to be seen."""
    try:
        text = _DRIVER_FILE.read_text()
    except OSError:
        return None
    match = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def cuda_available() -> bool:
    """Tell whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def resolve_device(name: str = "auto") -> torch.device:
    """Return the torch device that a user means: `cpu`, `cuda`, `cuda:N`, or `auto`, a GPU where there is one.

    Raises:
        InputError: not a device, or CUDA asked for where there is none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if cuda_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not cuda_available():
            raise InputError(f"device {name!r}: torch {torch.__version__} sees no CUDA GPU here: use cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA GPUs here")
    return device
