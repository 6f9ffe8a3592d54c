"""Facts of chips: which one a driver's name means, and that the numbers of one chip agree with each other."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from tersor import hardware
from tersor.errors import UnsupportedError
from tersor.hardware import CHIPS, KERNEL_CAPABILITY, has_grouped_kernel, of_properties


def properties(name: str, capability: tuple[int, int], gib: float, **more: int) -> SimpleNamespace:
    """Return what torch says of a device, with numbers that no chip of the table has."""
    facts = {
        "multi_processor_count": 100,
        "shared_memory_per_block_optin": 100_000,
        "L2_cache_size": 7_000_000,
        "memory_clock_rate": 1_000_000,
        "memory_bus_width": 4096,
    }
    major, minor = capability
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=int(gib * 2**30), **{**facts, **more})


@pytest.mark.parametrize(
    ("reported", "capability", "gib", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), 79.2, "NVIDIA A100"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 39.4, "NVIDIA A100-SXM4-40GB"),
        ("NVIDIA A100-PCIE-40GB", (8, 0), 39.4, "NVIDIA A100-PCIE-40GB"),
        ("NVIDIA A100 80GB PCIe", (8, 0), 79.2, "NVIDIA A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", (9, 0), 79.1, "NVIDIA H100"),
        ("NVIDIA H100 PCIe", (9, 0), 79.1, "NVIDIA H100 PCIe"),
        ("NVIDIA H100 NVL", (9, 0), 93.1, "NVIDIA H100 NVL"),
        ("NVIDIA H200", (9, 0), 139.8, "NVIDIA H200"),
        ("NVIDIA H200 NVL", (9, 0), 139.8, "NVIDIA H200 NVL"),
        ("NVIDIA GeForce RTX 3090", (8, 6), 23.6, "NVIDIA GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", (8, 6), 23.5, "NVIDIA GeForce RTX 3090 Ti"),
        ("NVIDIA GeForce RTX 4090", (8, 9), 23.6, "NVIDIA GeForce RTX 4090"),
        ("NVIDIA A10", (8, 6), 22.5, "NVIDIA A10"),
        ("NVIDIA L4", (8, 9), 22.2, "NVIDIA L4"),
        ("NVIDIA L40", (8, 9), 44.4, "NVIDIA L40"),
        ("NVIDIA L40S", (8, 9), 44.4, "NVIDIA L40S"),
        ("NVIDIA B200", (10, 0), 178.4, "NVIDIA B200"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 31.4, "NVIDIA GeForce RTX 5090"),
    ],
)
def test_the_name_that_a_driver_reports_finds_its_own_variant(
    reported: str, capability: tuple[int, int], gib: float, known: str
) -> None:
    chip, listed = of_properties(properties(reported, capability, gib)), CHIPS[known]
    assert (chip.bandwidth, chip.nvlink, chip.pcie) == (listed.bandwidth, listed.nvlink, listed.pcie)
    assert chip.fp16_ops == pytest.approx(listed.fp16_ops * 100 / listed.sms)
    assert chip.fp8_ops == pytest.approx(listed.fp8_ops * 100 / listed.sms)
    assert chip.int8_ops == pytest.approx(listed.int8_ops * 100 / listed.sms)


@pytest.mark.parametrize(
    ("reported", "capability", "gib"),
    [
        ("NVIDIA A100-SXM-64GB", (8, 0), 63.4),
        ("NVIDIA A100X", (8, 0), 79.2),
        ("NVIDIA H20", (9, 0), 95.1),
        ("NVIDIA GH200 480GB", (9, 0), 94.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 9.8),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 15.7),
        ("NVIDIA A10G", (8, 6), 22.1),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), 47.5),
        ("NVIDIA B300", (10, 3), 268.6),
        ("NVIDIA GeForce RTX 5070", (12, 0), 11.9),
        ("NVIDIA GB10", (12, 1), 119.7),
    ],
)
def test_an_unknown_gpu_has_the_bandwidth_of_its_own_clock_and_no_nvlink(
    reported: str, capability: tuple[int, int], gib: float
) -> None:
    chip = of_properties(properties(reported, capability, gib))
    assert chip.bandwidth == 2 * 1e9 * 4096 / 8
    assert chip.nvlink == 0
    assert chip.fp16_ops > 0


@pytest.mark.parametrize(
    ("reported", "capability", "like"),
    [
        ("NVIDIA GeForce RTX 3060", (8, 6), "NVIDIA GeForce RTX 3090"),
        ("Orin", (8, 7), "NVIDIA GeForce RTX 3090"),
        ("NVIDIA GeForce RTX 4070", (8, 9), "NVIDIA GeForce RTX 4090"),
        ("NVIDIA B300", (10, 3), "NVIDIA B200"),
        ("NVIDIA GeForce RTX 5070", (12, 0), "NVIDIA GeForce RTX 5090"),
        ("NVIDIA GB10", (12, 1), "NVIDIA GeForce RTX 5090"),
    ],
)
def test_an_unknown_gpu_has_the_peaks_of_a_multiprocessor_of_its_own_architecture(
    reported: str, capability: tuple[int, int], like: str
) -> None:
    """Not those of Hopper on a GeForce of Blackwell, which are six times as much."""
    chip, known = of_properties(properties(reported, capability, 11.6)), CHIPS[like]
    assert (chip.fp16_ops / 100, chip.pcie) == (known.fp16_ops / known.sms, known.pcie)


def test_what_a_driver_says_goes_before_the_table() -> None:
    chip = of_properties(properties("NVIDIA H200", (9, 0), 139.8, multi_processor_count=66))
    assert (chip.name, chip.capability, chip.sms) == ("NVIDIA H200", (9, 0), 66)
    assert (chip.shared_bytes, chip.l2_bytes, chip.memory_bytes) == (100_000, 7_000_000, int(139.8 * 2**30))
    assert chip.fp16_ops == CHIPS["NVIDIA H200"].fp16_ops / 2


def test_a_gpu_that_reports_no_memory_clock_takes_the_bandwidth_of_its_nearest() -> None:
    chip = of_properties(properties("GRID something", (8, 9), 12, memory_clock_rate=0))
    assert chip.bandwidth == CHIPS["NVIDIA GeForce RTX 4090"].bandwidth


def test_a_gpu_older_than_the_kernels_is_refused_in_one_line() -> None:
    needed = re.escape("NVIDIA V100 has compute capability 7.0: kernels need 8.0 or newer")
    with pytest.raises(UnsupportedError, match=f"^{needed}$"):
        of_properties(properties("NVIDIA V100", (7, 0), 32))


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(index: int) -> SimpleNamespace:
        asked.append(index)
        return properties("NVIDIA H200", (9, 0), 139.8)

    monkeypatch.setattr(torch.cuda, "get_device_properties", answer)
    hardware.of_device.cache_clear()
    try:
        assert hardware.of_device(0) is hardware.of_device(0)
        assert hardware.of_device(1).name == "NVIDIA H200"
        assert asked == [0, 1]
    finally:
        hardware.of_device.cache_clear()


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_torch_has_a_kernel_of_grouped_products_on_hopper_and_datacentre_blackwell_alone(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the host waits in it, so that no graph may hold it: on a GeForce of Blackwell, too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert has_grouped_kernel(SimpleNamespace(device=device, dtype=torch.bfloat16)) is has
    assert not has_grouped_kernel(SimpleNamespace(device=device, dtype=torch.float16))
    assert not has_grouped_kernel(torch.empty(1, 1, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", CHIPS)
def test_the_facts_of_a_chip_agree_with_each_other(name: str) -> None:
    chip = CHIPS[name]
    assert chip.name == name
    assert chip.capability >= KERNEL_CAPABILITY
    # Reading all of the memory takes 10 to 90 ms on all of them; a slip of a digit or a unit falls out of that.
    assert 0.01 < chip.memory_bytes / chip.bandwidth < 0.09
    assert chip.l2_bytes < chip.memory_bytes / 100
    # Dense 16-bit operations that a multiprocessor does in a cycle, at 1.3 to 2.6 GHz: 512 (GeForce) to 8192 (B200).
    assert 512 * 1.3e9 <= chip.fp16_ops / chip.sms <= (8192 if chip.capability == (10, 0) else 4096) * 1.9e9
    assert chip.int8_ops in (pytest.approx(2 * chip.fp16_ops, rel=0.01), pytest.approx(4 * chip.fp16_ops, rel=0.01))
    assert bool(chip.fp8_ops) == (chip.capability >= (8, 9))
    assert chip.fp8_ops in (0, pytest.approx(2 * chip.fp16_ops, rel=0.01))
    assert chip.nvlink == 0 or chip.pcie < chip.nvlink < chip.bandwidth
