"""Kernels that a compiler has been seen to build cleanly, by the hash of everything that can change the binary.

A compiler gives one binary for one source, so a kernel of `proven.txt` need not be built again by everyone who runs the
tests: what is new or changed is built, and so are all kernels with a history of faults, and every so many-th of the
others, which keeps the file honest. With any other NVRTC every kernel is built.

    PYTHONPATH=src:tests python tests/compile/proven.py      build all kernels, and write the file
"""

from __future__ import annotations

import itertools
from pathlib import Path

from compile import catalogue, mixtures

from tersor.kernels.jit import KernelSource, arch_for, cache, compile_many, nvrtc
from tersor.kernels.jit.report import Resources

FILE = Path(__file__).with_name("proven.txt")
_SHARE = 8
_SPILLED = {(10, 0): 64, (12, 0): 64}
"""Bytes that a thread may keep in memory on architectures for whose registers nobody has tuned a kernel."""


def is_clean(used: Resources, capability: tuple[int, int]) -> bool:
    """Tell whether a kernel keeps to its registers on an architecture, and the compiler warned of nothing."""
    spilled = max(used.local_bytes, used.spill_store_bytes or 0, used.spill_load_bytes or 0)
    return spilled <= _SPILLED.get(capability, 0) and not used.warnings


def known() -> dict[str, int]:
    """Return key -> static shared bytes of the kernels in the file; none where another compiler built them."""
    identity, *lines = FILE.read_text().splitlines()
    if identity != nvrtc.identity():
        return {}
    return {key: int(size) for key, size in (line.split() for line in lines)}


def to_build(sources: list[KernelSource], capability: tuple[int, int], proven: dict[str, int]) -> list[KernelSource]:
    """Return which of a capability's kernels are built: all that is not proven, and a part of what is."""
    chip, arch = catalogue.CHIP_OF[capability], arch_for(capability)
    faults = (*catalogue.FAULTS.values(), *mixtures.FAULTS.values())
    faulty = {kernel.source(chip) for kernel in itertools.chain.from_iterable(faults)}
    keys = {source: cache.key(source, arch) for source in sources}
    return [
        source
        for source in sources
        if keys[source] not in proven or source in faulty or int(keys[source], 16) % _SHARE == 0
    ]


def main() -> None:
    """Build every kernel of the catalogue and write the file."""
    lines = []
    for capability in sorted(catalogue.CHIP_OF):
        sources, arch = catalogue.all_sources(capability), arch_for(capability)
        for source, binary in zip(sources, compile_many(sources, arch), strict=True):
            used = binary.resources
            assert used is not None and is_clean(used, capability), f"{source.name} for {arch}: {used}"
            lines.append(f"{cache.key(source, arch)} {used.static_shared_bytes}")
    FILE.write_text("\n".join([nvrtc.identity(), *sorted(lines)]) + "\n")
    print(f"{len(lines)} kernels in {FILE}")


if __name__ == "__main__":
    main()
