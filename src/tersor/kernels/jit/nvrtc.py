"""How does source become a binary? NVIDIA's run-time compiler (NVRTC), through cuda-bindings."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tersor.errors import KernelError, UnsupportedError
from tersor.hardware import KERNEL_CAPABILITY
from tersor.kernels.jit import report
from tersor.kernels.jit.source import KernelSource

OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
"""Options of every compilation. Line information is left out: it triples a binary and slows the compiler."""

ARCH_SPECIFIC = {(9, 0): "sm_90a"}
"""Chips whose kernels use instructions that exist on no other (wgmma)."""

_INTEGRATED = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1), (11, 0)}
"""Systems on a chip: their binaries run on no other GPU."""

INSTALL = "install it with: pip install 'tersor[cuda]'"
_ARCH = re.compile(r"(sm|compute)_(\d+)[a-z]?")
_ERROR_LINE = re.compile(r"\berror\b|\bfatal\b", re.IGNORECASE)


class CompileError(KernelError):
    """A kernel that does not compile; the message holds the first error, `log` all the compiler said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log
        if hasattr(self, "add_note"):  # Python 3.11: a traceback shows it, the one-line message stays
            self.add_note(log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """A compiled kernel.

    Attributes:
        name: symbol of the kernel.
        arch: what it was compiled for ("sm_90a": a cubin; "compute_120": PTX that the driver finishes).
        data: cubin or PTX.
        log: what the compiler said, with the resource report.
    """

    name: str
    arch: str
    data: bytes = field(repr=False)
    log: str = field(repr=False)

    @property
    def resources(self) -> report.Resources | None:
        """What the kernel uses; `None` for PTX, where the driver decides."""
        return report.parse(self.log, self.name) if self.arch.startswith("sm_") else None


@functools.cache
def _bindings() -> Any:
    """Return `cuda.bindings.nvrtc` with the library loaded, or raise UnsupportedError."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise UnsupportedError(f"no kernel can be compiled, cuda-bindings is missing ({error}): {INSTALL}") from None
    try:
        status, _, _ = nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedError(f"no kernel can be compiled, NVRTC is missing ({reason}): {INSTALL}") from None
    if int(status):
        raise UnsupportedError(f"NVRTC does not answer ({status.name}): {INSTALL}")
    return nvrtc


@functools.cache
def version() -> tuple[int, int]:
    """Return NVRTC's version, (major, minor). Raises UnsupportedError where it is not installed."""
    nvrtc = _bindings()
    _, major, minor = nvrtc.nvrtcVersion()
    return int(major), int(minor)


@functools.cache
def identity() -> str:
    """Return what tells this NVRTC from any other: its version and the sizes of its libraries.

    NVRTC reports no build number, and builds of one version differ in size.
    """
    major, minor = version()
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    folders = {Path(line.split(maxsplit=5)[5]).parent for line in lines if "/libnvrtc.so" in line}
    parts = sorted(part for folder in folders for part in folder.glob("libnvrtc*.so*"))
    return " ".join([f"{major}.{minor}", *(f"{part.name}:{part.stat().st_size}" for part in parts)])


@functools.cache
def supported() -> tuple[tuple[int, int], ...]:
    """Return the compute capabilities this NVRTC compiles for, ascending."""
    status, archs = _bindings().nvrtcGetSupportedArchs()
    if int(status):
        raise KernelError(f"NVRTC does not list its architectures ({status.name}): {INSTALL}")
    return tuple(sorted(divmod(int(arch), 10) for arch in archs))


def arch_for(capability: tuple[int, int], available: tuple[tuple[int, int], ...] | None = None) -> str:
    """Choose what to compile for a GPU.

    A binary runs on its own compute capability and on later ones of the same major version; a GPU of a later
    major version than NVRTC knows gets PTX, which its driver finishes.

    Args:
        capability: compute capability of the GPU.
        available: what NVRTC compiles for; `None` asks it.

    Raises:
        UnsupportedError: the GPU is older than the kernels need, or older than this NVRTC knows.
    """
    text = f"{capability[0]}.{capability[1]}"
    if capability < KERNEL_CAPABILITY:
        raise UnsupportedError(
            f"a GPU of compute capability {text} is too old, the kernels need "
            f"{KERNEL_CAPABILITY[0]}.{KERNEL_CAPABILITY[1]}: set TERSOR_KERNEL=reference"
        )
    known = supported() if available is None else available
    if capability in known and capability in ARCH_SPECIFIC:
        return ARCH_SPECIFIC[capability]
    older = [other for other in known if other == capability or (other < capability and other not in _INTEGRATED)]
    if not older:
        raise UnsupportedError(f"this NVRTC does not compile for compute capability {text}: {INSTALL}")
    best = max(older)
    return f"{'sm' if best[0] == capability[0] else 'compute'}_{best[0]}{best[1]}"


def compile_source(source: KernelSource, arch: str) -> Binary:
    """Compile one kernel; the compiler works without the interpreter lock, so threads run in parallel.

    Args:
        source: the kernel.
        arch: "sm_XX" for a cubin, "compute_XX" for PTX.

    Raises:
        CompileError: the source does not compile, or does not hold exactly the one kernel it names.
        UnsupportedError: NVRTC is not installed.
    """
    if not _ARCH.fullmatch(arch):
        raise KernelError(f"kernel {source.name}: unknown architecture {arch!r}, expected sm_XX")
    nvrtc = _bindings()
    files = source.files()
    names, texts = [name.encode() for name in files], [text.encode() for text in files.values()]
    unit, unit_name = source.text().encode(), f"{source.name}.cu".encode()
    program = _call(source, nvrtc.nvrtcCreateProgram, unit, unit_name, len(names), texts, names)
    try:
        # From 12.9 on NVRTC keeps a cache of its own; what comes from there has no log, so no resource report.
        uncached = ("--no-cache",) if version() >= (12, 9) else ()
        options = [option.encode() for option in (*OPTIONS, *uncached, f"-arch={arch}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(source, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        log_text = _without_times(log.rstrip(b"\0").decode(errors="replace"))
        if int(status):
            raise CompileError(_failure(source, arch, status.name, log_text), log_text)
        if arch.startswith("sm_"):
            data = _text(source, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            kernels = report.entries(log_text)
            if kernels != (source.name,):
                found = ", ".join(kernels) or "no kernel"
                raise CompileError(f"kernel {source.name}: its source defines {found}", log_text)
        else:
            data = _text(source, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Binary(name=source.name, arch=arch, data=data, log=log_text)


def _call(source: KernelSource, function: Any, *arguments: Any) -> Any:
    status, *values = function(*arguments)
    if int(status):
        raise KernelError(f"kernel {source.name}: NVRTC fails with {status.name}")
    return values[0] if values else None


def _text(source: KernelSource, program: Any, size_of: Any, read: Any) -> bytes:
    data = b"\0" * _call(source, size_of, program)
    _call(source, read, program, data)
    return data


def _without_times(log: str) -> str:
    """Drop the lines that differ from run to run, so that an entry of the cache depends on its key alone."""
    return "\n".join(line.rstrip() for line in log.splitlines() if line.strip() and "Compile time" not in line)


def _failure(source: KernelSource, arch: str, status: str, log: str) -> str:
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if _ERROR_LINE.search(line)), lines[0] if lines else status)
    return f"kernel {source.name} does not compile for {arch}: {first}"
