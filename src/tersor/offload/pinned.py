"""Memory of the host that a GPU copies from: whole pages, registered with the driver, as many as are asked for."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from functools import partial
from pathlib import Path

import torch

from tersor.errors import TersorError
from tersor.ops.capture import outside

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_LEFT = 1 << 30
"""Bytes that stay free for everything else on the machine."""


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return memory, uint8 [nbytes], that starts with a page; for a GPU it is pinned as long as the tensor lives.

    torch's own pinned memory is a power of two of bytes, up to twice what is asked for.

    Raises:
        TersorError: there is not so much.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError):
        raise too_little(nbytes, available()) from None
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            pages.madvise(getattr(mmap, advice))
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        if nbytes > available():
            raise too_little(nbytes, available())
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        code = int(runtime.cudaHostRegister(address, nbytes, 0))
        if code:
            with contextlib.suppress(RuntimeError):  # the runtime keeps the error for whoever launches next
                torch.zeros(1, device=device)
            raise too_little(nbytes, available(), f"cudaHostRegister: error {code}")
        let_go = partial(_unregister, address, pages, device)
        weakref.finalize(memory, outside, let_go).atexit = False  # the collector may choose a moment of a capture
    return memory


def _unregister(address: int, pages: mmap.mmap, device: torch.device) -> None:
    """Let go of memory once no copy reads it; `pages` is kept until then."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


def too_little(needed: int, free: int, why: str = "") -> TersorError:
    """Return the error that memory of the host is short."""
    detail = f" ({why})" if why else ""
    return TersorError(
        f"offload: {needed / 1e9:.1f} GB of pinned host memory are needed, and {free / 1e9:.1f} GB are free{detail}: "
        "keep more layers on the GPU (resident_layers), or offload to disk"
    )


def available(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """Return the bytes of the host's memory that can be had: what the machine has free, and this process may take.

    Args:
        meminfo: where the kernel tells of the machine.
        group: the control group of this process.
    """
    free = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        cached = 0
        for line in (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").exists() else ():
            name, _, value = line.partition(" ")
            cached = int(value) if name == "inactive_file" else cached
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
    return max(free - _LEFT, 0)
