"""Compilation without a GPU: binaries, errors with the compiler's words, resources, architectures."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.jit_kernels import axpy, broken, spilling, two_entries

from tersor.errors import KernelError, UnsupportedError
from tersor.kernels.jit import CompileError, arch_for, nvrtc, report


def test_a_kernel_compiles_to_a_cubin_without_local_memory() -> None:
    binary = nvrtc.compile_source(axpy(), "sm_80")
    assert binary.data[:4] == b"\x7fELF"
    assert b"tersor_test_axpy" in binary.data
    resources = binary.resources
    assert resources is not None and resources.fits_registers and resources.warnings == ()
    assert 4 <= resources.registers <= 64
    assert resources.static_shared_bytes == 256
    assert resources.barriers == 1


def test_compilation_repeats_byte_for_byte() -> None:
    assert nvrtc.compile_source(axpy(), "sm_90a").data == nvrtc.compile_source(axpy(), "sm_90a").data


def test_ptx_for_gpus_that_this_compiler_does_not_know() -> None:
    binary = nvrtc.compile_source(axpy(), "compute_90")
    assert b".target sm_90" in binary.data and binary.data.endswith(b"\0")
    assert binary.resources is None


def test_a_spill_is_seen() -> None:
    resources = nvrtc.compile_source(spilling(), "sm_80").resources
    assert resources is not None and not resources.fits_registers
    assert resources.registers == 64
    assert resources.local_bytes > 0 and resources.spill_store_bytes > 0 and resources.spill_load_bytes > 0


def test_the_report_agrees_with_the_binary() -> None:
    """The register count that the driver will use stands in the ELF section .nv.info (attribute 0x2f)."""
    for source in (axpy(), spilling()):
        binary = nvrtc.compile_source(source, "sm_80")
        assert binary.resources is not None
        assert elf_registers(binary.data) == [binary.resources.registers]


def elf_registers(elf: bytes) -> list[int]:
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes) for i in range(count)]
    names = sections[names_index][4]
    found = []
    for name, _, _, _, start, size in sections:
        if elf[names + name :].split(b"\0", 1)[0] != b".nv.info":
            continue
        position = start
        while position < start + size:
            form, attribute, length = struct.unpack_from("<BBH", elf, position)
            if (form, attribute) == (4, 0x2F):
                found.append(struct.unpack_from("<II", elf, position + 4)[1])
            position += 4 + (length if form == 4 else 0)
    return found


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="cuobjdump is not on this machine")
def test_the_report_agrees_with_cuobjdump(tmp_path: Path) -> None:
    binary = nvrtc.compile_source(axpy(), "sm_80")
    path = tmp_path / "axpy.cubin"
    path.write_bytes(binary.data)
    command = ["cuobjdump", "--dump-resource-usage", str(path)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert binary.resources is not None
    assert f"REG:{binary.resources.registers} " in words and "STACK:0" in words and "SHARED:256" in words


def test_an_error_begins_with_the_first_error_line_and_carries_the_log() -> None:
    with pytest.raises(CompileError) as caught:
        nvrtc.compile_source(broken(), "sm_80")
    message = str(caught.value)
    assert message.startswith("kernel tersor_test_broken does not compile for sm_80: broken.cuh(2): error: ")
    assert "missing_name" in message and "\n" not in message
    assert "other_name" in caught.value.log and "2 errors detected" in caught.value.log
    if sys.version_info >= (3, 11):
        assert caught.value.log in caught.value.__notes__


@pytest.mark.parametrize("arguments", ["PPqi", "PPif", "PPq", "PPqff", "fPqf", "PPQf"])
def test_arguments_that_the_kernel_does_not_take_do_not_compile(arguments: str) -> None:
    with pytest.raises(CompileError, match=rf"the host passes {arguments}, the kernel takes something else"):
        nvrtc.compile_source(axpy(arguments=arguments), "sm_80")


def test_a_header_with_two_kernels_is_refused() -> None:
    with pytest.raises(CompileError, match=r"its source defines another, tersor_test_two|tersor_test_two, another"):
        nvrtc.compile_source(two_entries(), "sm_80")


@pytest.mark.parametrize("arch", ["sm_999", "sm_90z"])
def test_an_architecture_that_does_not_exist_is_an_error(arch: str) -> None:
    with pytest.raises(KernelError, match=arch):
        nvrtc.compile_source(axpy(), arch)


def test_an_architecture_that_is_no_name_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"unknown architecture '9.0'"):
        nvrtc.compile_source(axpy(), "9.0")


KNOWN = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 1), (12, 0))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_87"),
        ((8, 8), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((13, 0), "compute_120"),
    ],
)
def test_the_best_architecture_for_a_gpu(capability: tuple[int, int], arch: str) -> None:
    assert arch_for(capability, KNOWN) == arch


def test_an_old_gpu_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedError, match=r"7\.5 is too old, the kernels need 8\.0: set TERSOR_KERNEL=reference"):
        arch_for((7, 5), KNOWN)


def test_the_installed_compiler_knows_the_architectures_of_the_project() -> None:
    assert [arch_for(capability) for capability in ((8, 0), (8, 9), (9, 0))] == ["sm_80", "sm_89", "sm_90a"]
    assert nvrtc.version() >= (12, 8)
    assert nvrtc.identity().startswith("{}.{} libnvrtc".format(*nvrtc.version()))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Make NVRTC be looked for again, before and after the test."""
    nvrtc._bindings.cache_clear()
    nvrtc.version.cache_clear()
    yield
    nvrtc._bindings.cache_clear()
    nvrtc.version.cache_clear()


def test_without_cuda_bindings_the_error_says_what_to_install(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings

    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr(cuda.bindings, "nvrtc", raising=False)
    with pytest.raises(UnsupportedError, match=r"cuda-bindings is missing .* pip install 'tersor\[cuda\]'"):
        nvrtc.compile_source(axpy(), "sm_80")


def test_without_the_library_the_error_says_what_to_install(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc as bindings

    def absent() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13\nmore words")

    monkeypatch.setattr(bindings, "nvrtcVersion", absent)
    with pytest.raises(UnsupportedError) as caught:
        nvrtc.version()
    message = "no kernel can be compiled, NVRTC is missing (Failed to dlopen libnvrtc.so.13): install it with: "
    assert str(caught.value) == message + "pip install 'tersor[cuda]'"


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
"""


def test_a_log_is_read_kernel_by_kernel() -> None:
    assert report.entries(LOG) == ("first", "second")
    first, second = report.parse(LOG, "first"), report.parse(LOG, "second")
    assert (first.registers, first.local_bytes, first.spill_store_bytes, first.spill_load_bytes) == (
        168,
        16,
        8,
        12,
    )
    assert (first.static_shared_bytes, first.barriers, first.fits_registers) == (1024, 2, False)
    assert len(first.warnings) == 1 and "serialized" in first.warnings[0]
    assert (second.registers, second.static_shared_bytes, second.barriers, second.fits_registers) == (
        10,
        0,
        0,
        True,
    )


@pytest.mark.parametrize("log", ["", LOG.replace("Used 10", "Took 10"), LOG.replace("0 bytes stack", "stack")])
def test_a_log_without_a_report_is_an_error_not_a_clean_bill(log: str) -> None:
    with pytest.raises(KernelError, match="kernel second: "):
        report.parse(log, "second")
