"""Chip facts, with their source, for whoever chooses tiles or predicts time.

Multiprocessor counts, shared memory and L2 sizes: NVIDIA CUDA C++ Programming Guide 13.0, table "Technical
Specifications per Compute Capability", and the architecture whitepapers. Read bandwidth: the datasheet.
"""

from __future__ import annotations

from dataclasses import dataclass


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


def cuda_available() -> bool:
    """Tell whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()
