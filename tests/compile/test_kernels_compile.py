"""Every kernel that the operators can ask for compiles for every architecture, and keeps to its registers.

NVRTC needs no GPU; where it is not installed these tests fail, since nothing else holds the kernels on such a machine.
Binaries are kept under pytest's cache by a hash of all that can change them, so a second run compiles what changed.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from tersor.kernels import linear
from tersor.kernels.jit import arch_for, compile_many

CAPABILITIES = ((8, 0), (8, 9), (9, 0))


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = request.config.cache.mkdir("kernels")
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(folder))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
def test_every_kernel_compiles_without_spills(capability: tuple[int, int]) -> None:
    sources = list(linear.all_sources(capability))
    headers = Counter(source.header for source in sources)
    newest = {"sm90_linear.cuh"} if capability == (9, 0) else set()
    assert set(headers) == {"sm80_linear.cuh", "dequantize.cuh", "epilogue.cuh", *newest}
    start = time.monotonic()
    binaries = compile_many(sources, arch_for(capability))
    seconds = time.monotonic() - start
    offenders = []
    for source, binary in zip(sources, binaries, strict=True):
        used = binary.resources
        assert used is not None and used.registers > 0
        if not used.fits_registers or used.warnings:
            offenders.append(f"{source.name} {dict(source.parameters)}: {used}")
    assert not offenders, "\n".join(offenders)
    print(f"{binaries[0].arch}: {len(binaries)} kernels in {seconds:.1f} s")
