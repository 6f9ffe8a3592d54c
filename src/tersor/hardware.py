"""Chip facts, with their source, for whoever chooses tiles, predicts time or plans over several GPUs.

Sources of `CHIPS`, for each fact or chip:

- Compute capability, shared memory of a block, threads of a multiprocessor: NVIDIA CUDA C++ Programming Guide 13.0,
  table "Technical Specifications per Compute Capability".
- A100: datasheet "NVIDIA A100 Tensor Core GPU" (2021), whitepaper "NVIDIA A100 Tensor Core GPU Architecture".
- H100: datasheets "NVIDIA H100 Tensor Core GPU" (SXM and PCIe) and "NVIDIA H100 NVL", product brief PB-11773-001 (the
  NVL's 3,938 GB/s), whitepaper "NVIDIA H100 Tensor Core GPU Architecture".
- H200: datasheet "NVIDIA H200 Tensor Core GPU" (SXM and NVL). L2: what the driver of an H200 reports; H200 NVL and
  H100 NVL, which have six stacks of memory like it, are given the same.
- GeForce: appendices of the whitepapers "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture" and
  "NVIDIA RTX Blackwell GPU Architecture". The RTX 3090 Ti is in none: its peaks are the RTX 3090's a multiprocessor and
  cycle, with 84 of them at 1.86 GHz.
- A10, L4, L40, L40S: datasheets "NVIDIA A10 Tensor Core GPU", "NVIDIA L4", "NVIDIA L40" and "NVIDIA L40S"; L2 by the
  whitepapers of their architectures.
- B200: datasheets "NVIDIA DGX B200" and "NVIDIA HGX B200", an eighth of what they say of eight. Multiprocessors and L2:
  what its driver reports.

Datasheets print tensor core peaks of Hopper, Ada and Blackwell with sparsity; here stands half of that, the dense peak,
with sums in float32. What they call GB of memory are GiB. They add up both directions of a link; here stands one.
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What tile choice, cost models and planners need to know of one GPU.

    Attributes:
        name: the name that the driver reports, or the words that it starts with.
        capability: compute capability, (major, minor).
        sms: number of multiprocessors.
        shared_bytes: shared memory one block may use, after opting in.
        bandwidth: device memory bandwidth in bytes per second, by the datasheet.
        memory_bytes: device memory; a driver leaves 1 to 2 % less to use.
        l2_bytes: L2 cache.
        fp16_ops: dense tensor core peak for float16 and bfloat16 with sums in float32, in operations per second; a
            multiplication and an addition are two.
        fp8_ops: the same for 8-bit floats; 0 where the tensor cores have none.
        int8_ops: the same for 8-bit integers with sums in int32.
        nvlink: bytes per second that this GPU can send over all its NVLinks together; 0 where there are none. Cards
            reach it only through a bridge.
        pcie: bytes per second that it can send over PCIe.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_bytes: int
    bandwidth: float
    memory_bytes: int
    l2_bytes: int
    fp16_ops: float
    fp8_ops: float
    int8_ops: float
    nvlink: float
    pcie: float

    @property
    def sm_threads(self) -> int:
        """Threads that a multiprocessor has room for, at least."""
        major, minor = self.capability
        return 2048 if minor == 0 and major <= 10 else 1536


def _ampere(name: str, gib: int, bandwidth: float) -> Chip:
    """One of the A100s, which differ in memory alone."""
    return Chip(
        name=name,
        capability=(8, 0),
        sms=108,
        shared_bytes=163 << 10,
        bandwidth=bandwidth,
        memory_bytes=gib << 30,
        l2_bytes=40 << 20,
        fp16_ops=312e12,
        fp8_ops=0.0,
        int8_ops=624e12,
        nvlink=300e9,
        pcie=32e9,
    )


def _card(
    name: str,
    capability: tuple[int, int],
    sms: int,
    bandwidth: float,
    l2_bytes: int,
    peaks: tuple[float, float, float],
    *,
    gib: int = 24,
    nvlink: float = 0.0,
    pcie: float = 32e9,
) -> Chip:
    """A card with GDDR memory, of 24 GiB where nothing else is said; peaks are of fp16, fp8 and int8."""
    return Chip(
        name=name,
        capability=capability,
        sms=sms,
        shared_bytes=99 << 10,
        bandwidth=bandwidth,
        memory_bytes=gib << 30,
        l2_bytes=l2_bytes,
        fp16_ops=peaks[0],
        fp8_ops=peaks[1],
        int8_ops=peaks[2],
        nvlink=nvlink,
        pcie=pcie,
    )


def _hopper(
    name: str, gib: int, bandwidth: float, fp16_ops: float, nvlink: float, *, sms: int = 132, l2_bytes: int = 60 << 20
) -> Chip:
    """One of the H100s or H200s; 8-bit peaks are twice the 16-bit peak."""
    return Chip(
        name=name,
        capability=(9, 0),
        sms=sms,
        shared_bytes=227 << 10,
        bandwidth=bandwidth,
        memory_bytes=gib << 30,
        l2_bytes=l2_bytes,
        fp16_ops=fp16_ops,
        fp8_ops=2 * fp16_ops,
        int8_ops=2 * fp16_ops,
        nvlink=nvlink,
        pcie=64e9,
    )


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _ampere("NVIDIA A100", 80, 2.039e12),
        _ampere("NVIDIA A100 80GB PCIe", 80, 1.935e12),
        _ampere("NVIDIA A100-SXM4-40GB", 40, 1.555e12),
        _ampere("NVIDIA A100-PCIE-40GB", 40, 1.555e12),
        _card("NVIDIA GeForce RTX 3090", (8, 6), 82, 0.936e12, 6 << 20, (71e12, 0.0, 284e12), nvlink=56.25e9),
        _card("NVIDIA GeForce RTX 3090 Ti", (8, 6), 84, 1.008e12, 6 << 20, (80e12, 0.0, 320e12), nvlink=56.25e9),
        _card("NVIDIA A10", (8, 6), 72, 0.6e12, 6 << 20, (125e12, 0.0, 250e12)),
        _card("NVIDIA GeForce RTX 4090", (8, 9), 128, 1.008e12, 72 << 20, (165.2e12, 330.3e12, 660.6e12)),
        _card("NVIDIA L4", (8, 9), 58, 0.3e12, 48 << 20, (121e12, 242.5e12, 242.5e12)),
        _card("NVIDIA L40", (8, 9), 142, 0.864e12, 96 << 20, (181.05e12, 362e12, 362e12), gib=48),
        _card("NVIDIA L40S", (8, 9), 142, 0.864e12, 96 << 20, (366.5e12, 733e12, 733e12), gib=48),
        _hopper("NVIDIA H100", 80, 3.35e12, 989.4e12, 450e9, l2_bytes=50 << 20),
        _hopper("NVIDIA H100 PCIe", 80, 2.0e12, 756.5e12, 300e9, sms=114, l2_bytes=50 << 20),
        _hopper("NVIDIA H100 NVL", 94, 3.938e12, 835.5e12, 300e9),
        _hopper("NVIDIA H200", 141, 4.8e12, 989.4e12, 450e9),
        _hopper("NVIDIA H200 NVL", 141, 4.8e12, 835.5e12, 450e9),
        replace(_hopper("NVIDIA B200", 180, 8.0e12, 2250e12, 900e9, sms=148, l2_bytes=126 << 20), capability=(10, 0)),
        _card(
            "NVIDIA GeForce RTX 5090",
            (12, 0),
            170,
            1.792e12,
            96 << 20,
            (209.5e12, 419e12, 838e12),
            gib=32,
            pcie=64e9,
        ),
    )
}
"""Name -> chip. A name without a variant is the one for SXM sockets; of the A100, the one with 80 GB. The first of a
compute capability is what others of it that are not here are likened to."""

KERNEL_CAPABILITY = (8, 0)
"""The oldest compute capability the kernels run on: bf16 mma.sync and cp.async appeared with it."""

_GROUPED_MAJORS = (9, 10)
"""Major compute capabilities for which torch has a kernel of grouped products in bfloat16."""

_MEMORY_TOLERANCE = 0.1
"""A device has the memory of a known chip if it differs by no more than this share, so that 64 GB are not 80."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def chip_named(name: str) -> Chip:
    """Return the facts of a chip by its name, without maker, brand, capitals and blanks too (`h200`, `rtx4090`).

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
    return re.sub(r"[\s_-]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")


@functools.cache
def of_device(index: int) -> Chip:
    """Return the facts of the CUDA device of this index.

    Raises:
        UnsupportedError: it is older than the kernels need.
    """
    import torch

    return of_properties(torch.cuda.get_device_properties(index))


def of_properties(properties: Any) -> Chip:
    """Return the facts of a device from what torch says of it.

    The known chip with the longest name that the device's name starts with, and with as much memory, gives bandwidth,
    peaks and links. Where there is none (a laptop's GPU, a MIG slice, a newer architecture), the newest known chip that
    is no newer than the device gives the peaks and PCIe; bandwidth is then by the memory's clock and bus width, and no
    NVLink is assumed. Peaks are in proportion to the multiprocessors there are. All else is as the driver reports it.

    Args:
        properties: what `torch.cuda.get_device_properties` returns.

    Raises:
        UnsupportedError: the device is older than the kernels need.
    """
    capability = (properties.major, properties.minor)
    known = listed(properties.name, properties.total_memory)
    if known is None:
        near = [chip for chip in CHIPS.values() if chip.capability <= capability]
        if not near:
            has, needed = (".".join(map(str, pair)) for pair in (capability, KERNEL_CAPABILITY))
            raise UnsupportedError(f"{properties.name} has compute capability {has}: kernels need {needed} or newer")
        known = max(near, key=lambda chip: chip.capability)
        # Both edges of the clock carry data; a virtual GPU may report no clock.
        measured = 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8
        known = replace(known, bandwidth=measured or known.bandwidth, nvlink=0.0)
    share = properties.multi_processor_count / known.sms
    return replace(
        known,
        name=properties.name,
        capability=capability,
        sms=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        fp16_ops=known.fp16_ops * share,
        fp8_ops=known.fp8_ops * share,
        int8_ops=known.int8_ops * share,
    )


def listed(reported: str, memory_bytes: int) -> Chip | None:
    """Return the chip of `CHIPS` that a driver reports by this name and memory, or `None` where it is none of them."""
    names = [name for name in CHIPS if re.match(re.escape(name) + r"(?![0-9A-Za-z])", reported)]
    chip = CHIPS[max(names, key=len)] if names else None
    if chip is None or abs(memory_bytes / chip.memory_bytes - 1) > _MEMORY_TOLERANCE:
        return None
    return chip


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


def has_grouped_kernel(weight: torch.Tensor) -> bool:
    """Tell whether torch multiplies by weights [E, OC, IC] in one kernel (`grouped_mm`).

    Everywhere else that is a loop on the host, which waits for the device.
    """
    import torch

    if weight.device.type != "cuda" or weight.dtype is not torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(weight.device)[0] in _GROUPED_MAJORS


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
