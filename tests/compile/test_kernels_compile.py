"""Every kernel that the operators can ask for compiles for every architecture, and keeps to its registers.

NVRTC needs no GPU; where it is not installed these tests fail, since nothing else holds the kernels on such a machine.
Binaries are kept under pytest's cache by a hash of all that can change them, so a second run compiles what changed.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import catalogue
import pytest

from tersor.formats import get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense, tune
from tersor.kernels.jit import KernelSource, arch_for, compile_many
from tersor.layouts.packing import Packing

CAPABILITIES = ((8, 0), (8, 9), (9, 0))


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = request.config.cache.mkdir("kernels")
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(folder))
    return folder


def check(sources: list[KernelSource], arch: str) -> None:
    """Compile, and refuse spills, local memory and warnings."""
    offenders = []
    for source, binary in zip(sources, compile_many(sources, arch), strict=True):
        used = binary.resources
        assert used is not None and used.registers > 0
        if not used.fits_registers or used.warnings:
            offenders.append(f"{source.name} {dict(source.parameters)}: {used}")
    assert not offenders, "\n".join(offenders)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_every_kernel_compiles_without_spills(capability: tuple[int, int]) -> None:
    sources = list(catalogue.all_sources(capability))
    headers = Counter(source.header for source in sources)
    newest = {"dense/sm90_linear.cuh", "dense/quantize_activations.cuh"} if capability == (9, 0) else set()
    assert set(headers) == {"dense/sm80_linear.cuh", "dense/dequantize.cuh", "dense/epilogue.cuh", *newest}
    start = time.monotonic()
    check(sources, arch_for(capability))
    print(f"{arch_for(capability)}: {len(sources)} kernels in {time.monotonic() - start:.1f} s")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_gated_kernels_compile_without_spills(capability: tuple[int, int]) -> None:
    chip = next(chip for chip in CHIPS.values() if chip.capability == capability)
    sources = list(dense.sources(Packing.of(get_scheme("fp6_e3m2"), "bfloat16"), chip, gated=True))
    assert [source.name for source in sources if not source.name.endswith("_gated")] == [
        "tersor_dequantize_fp6_e3m2_bfloat16"
    ]
    check(sources, arch_for(capability))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("gated", [False, True])
def test_batch_invariant_kernels_compile_without_spills(gated: bool) -> None:
    """Few tokens through wgmma; what the mode takes for more tokens is compiled above."""
    chip = CHIPS["NVIDIA H200"]
    sources = {}
    for group_size in (None, 128):
        scheme = get_scheme("fp6_e3m2", group_size)
        for n in (8, 16):
            problem = dense.problem_of(scheme, (8192, 8192), n, batch_invariant=True)
            sources[dense.fused_source(Packing.of(scheme, "float16"), "float16", tune.choose(problem, chip), gated)] = (
                None
            )
    assert [source.parameters["N_TILE"] for source in sources] == [8, 16, 8, 16]
    assert {source.parameters["FEW_TOKENS"] for source in sources} == {0}
    check(list(sources), arch_for(chip.capability))
