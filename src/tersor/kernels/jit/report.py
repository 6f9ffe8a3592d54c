"""What does a compiled kernel use? Read from the words of ptxas, so no GPU is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tersor.errors import KernelError

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_BARRIERS = re.compile(r"used (\d+) barriers")
_WARNING = re.compile(r"warning|performance loss", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one kernel uses.

    Attributes:
        registers: registers of a thread.
        local_bytes: local memory of a thread (stack frame: spills and arrays indexed at run time).
        static_shared_bytes: shared memory of a block, without what the launch adds.
        spill_store_bytes, spill_load_bytes: per thread; `None` where only the driver was asked.
        barriers: named barriers; `None` where only the driver was asked.
        warnings: what the compiler warned of, one line each.
    """

    registers: int
    local_bytes: int
    static_shared_bytes: int
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    barriers: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fits_registers(self) -> bool:
        """True when nothing of a thread lives in memory: no spill and no local array."""
        return not (self.local_bytes or self.spill_store_bytes or self.spill_load_bytes)


def entries(log: str) -> tuple[str, ...]:
    """Return the names of the kernels that ptxas reports in `log`."""
    return tuple(match[1] for match in _ENTRY.finditer(log))


def parse(log: str, name: str) -> Resources:
    """Read what kernel `name` uses from the log of a compilation with `ptxas -v`.

    Raises:
        KernelError: the log does not speak of that kernel.
    """
    start = next((match for match in _ENTRY.finditer(log) if match[1] == name), None)
    if start is None:
        raise KernelError(f"kernel {name}: no resource report in the compiler's log: update NVRTC")
    following = _ENTRY.search(log, start.end())
    part = log[start.end() : following.start() if following else len(log)]
    stack, used = _STACK.search(part), _USED.search(part)
    if stack is None or used is None:
        raise KernelError(f"kernel {name}: cannot read the compiler's report: {' '.join(part.split())!r}")
    shared, barriers = _SHARED.search(part), _BARRIERS.search(part)
    return Resources(
        registers=int(used[1]),
        local_bytes=int(stack[1]),
        static_shared_bytes=int(shared[1]) if shared else 0,
        spill_store_bytes=int(stack[2]),
        spill_load_bytes=int(stack[3]),
        barriers=int(barriers[1]) if barriers else 0,
        warnings=tuple(line.strip() for line in log.splitlines() if _WARNING.search(line)),
    )
