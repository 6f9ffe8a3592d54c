"""How does source become a loaded function?

source.py      a header of kernels/cuda with its constants chosen, and all the text that reaches the compiler
nvrtc.py       compile it to a binary for one architecture (no GPU needed)
report.py      registers, spills and local memory, from the words of the compiler
cache.py       binaries on disk, keyed by everything that can change them
build.py       memory, then disk, then compiler; many at once
module.py      load a binary on a GPU and launch it
native.py      the driver's functions that every call needs, through ctypes
tensor_map.py  matrices as the copy engine sees them, encoded by the driver and kept
memory.py      device memory that outlives every call
"""

from __future__ import annotations

from tersor.kernels.jit.build import compile_many, missing, obtain
from tersor.kernels.jit.module import Function, get
from tersor.kernels.jit.nvrtc import Binary, CompileError, arch_for
from tersor.kernels.jit.report import Resources
from tersor.kernels.jit.source import KernelSource

__all__ = [
    "Binary",
    "CompileError",
    "Function",
    "KernelSource",
    "Resources",
    "arch_for",
    "compile_many",
    "get",
    "missing",
    "obtain",
]
