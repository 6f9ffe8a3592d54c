"""How does a source become a binary once and for all? Memory first, then the disk, then the compiler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from tersor import settings
from tersor.kernels.jit import cache, nvrtc
from tersor.kernels.jit.source import KernelSource

_memory: dict[tuple[KernelSource, str], nvrtc.Binary] = {}
_locks: dict[tuple[KernelSource, str], threading.Lock] = {}
_guard = threading.Lock()


def obtain(source: KernelSource, arch: str) -> nvrtc.Binary:
    """Return the binary of `source` for `arch`, compiled once by all threads and processes.

    Raises:
        nvrtc.CompileError: it does not compile.
        UnsupportedError: NVRTC is not installed.
    """
    identity = (source, arch)
    binary = _memory.get(identity)
    if binary is not None:
        return binary
    with _guard:
        own = _locks.setdefault(identity, threading.Lock())
    with own:
        binary = _memory.get(identity)
        if binary is None:
            binary = _memory[identity] = _from_disk(source, arch)
    return binary


def _from_disk(source: KernelSource, arch: str) -> nvrtc.Binary:
    key = cache.key(source, arch)
    binary = cache.load(key)
    if binary is not None:
        return binary
    with cache.lock(key):
        binary = cache.load(key)  # another process may have been faster
        if binary is None:
            binary = nvrtc.compile_source(source, arch)
            cache.store(key, binary)
    return binary


def missing(sources: Iterable[KernelSource], arch: str) -> list[KernelSource]:
    """Return the kernels, each once, that would have to be compiled: they are neither in memory nor on the disk.

    What is on the disk is in memory then.
    """
    found = []
    for source in dict.fromkeys(sources):
        if (source, arch) in _memory:
            continue
        binary = cache.load(cache.key(source, arch))
        if binary is None:
            found.append(source)
        else:
            _memory.setdefault((source, arch), binary)
    return found


def compile_many(
    sources: Iterable[KernelSource],
    arch: str,
    jobs: int | None = None,
    on_done: Callable[[KernelSource, nvrtc.Binary], None] | None = None,
) -> list[nvrtc.Binary]:
    """Build many kernels with several compiler threads.

    Args:
        sources: the kernels; repeated ones are built once.
        arch: "sm_XX" or "compute_XX".
        jobs: threads at most; `None` takes TERSOR_JIT_JOBS.
        on_done: called in the caller's thread as each kernel is ready.

    Returns:
        One binary a source, in order.

    Raises:
        KernelError: the first failure, once the kernels under way are done; the others are not started.
    """
    wanted = list(sources)
    with ThreadPoolExecutor(max_workers=jobs or settings.get("TERSOR_JIT_JOBS")) as pool:
        futures = {pool.submit(obtain, source, arch): source for source in dict.fromkeys(wanted)}
        done: dict[KernelSource, nvrtc.Binary] = {}
        try:
            for future in as_completed(futures):
                source = futures[future]
                done[source] = future.result()
                if on_done is not None:
                    on_done(source, done[source])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[source] for source in wanted]
