"""The cache of compiled kernels: nothing broken is trusted, nothing compiled twice, nobody waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers.jit_kernels import axpy, broken, spilling

from tersor.kernels.jit import CompileError, KernelSource, build, cache, compile_many, nvrtc, obtain

ARCH = "sm_80"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count what reaches the compiler."""
    names: list[str] = []
    compile_source = nvrtc.compile_source

    def counted(source: KernelSource, arch: str) -> nvrtc.Binary:
        names.append(source.name)
        return compile_source(source, arch)

    monkeypatch.setattr(nvrtc, "compile_source", counted)
    return names


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_memory", {})


def only_entry(cache_dir: Path) -> Path:
    (path,) = cache_dir.glob("jit/*/*.kernel")
    return path


def test_memory_first_then_disk_then_compiler(
    cache_dir: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = obtain(axpy(), ARCH)
    assert obtain(axpy(), ARCH) is first
    forget(monkeypatch)
    assert obtain(axpy(), ARCH) == first
    assert compilations == ["tersor_test_axpy"]
    assert only_entry(cache_dir).name == f"{cache.key(axpy(), ARCH)}.kernel"


def test_another_arch_parameter_or_compiler_is_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {cache.key(axpy(), ARCH), cache.key(axpy(), "sm_89"), cache.key(axpy(1), ARCH)}
    monkeypatch.setattr(nvrtc, "identity", lambda: "13.99")
    keys.add(cache.key(axpy(), ARCH))
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "-G"))
    keys.add(cache.key(axpy(), ARCH))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.add(cache.key(axpy(), ARCH))
    assert len(keys) == 6


def test_a_changed_header_byte_is_compiled_again(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = axpy()
    obtain(source, ARCH)
    texts = {**source.texts, "twice.cuh": source.texts["twice.cuh"].replace("2.0f", "3.0f")}
    changed = KernelSource(source.name, source.header, source.parameters, source.arguments, texts=texts)
    assert obtain(changed, ARCH).data != obtain(source, ARCH).data
    assert len(compilations) == 2


def damaged(blob: bytes) -> dict[str, bytes]:
    middle = len(blob) // 2
    return {
        "empty": b"",
        "cut": blob[:-1],
        "cut in the header": blob[:20],
        "longer": blob + b"\0",
        "first byte": bytes([blob[0] ^ 1]) + blob[1:],
        "checksum": blob[:20] + bytes([blob[20] ^ 1]) + blob[21:],
        "one bit in the middle": blob[:middle] + bytes([blob[middle] ^ 4]) + blob[middle + 1 :],
        "last bit": blob[:-1] + bytes([blob[-1] ^ 128]),
        "zeros": bytes(len(blob)),
    }


def test_a_damaged_entry_is_built_again(
    cache_dir: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = obtain(axpy(), ARCH)
    path = only_entry(cache_dir)
    blob = path.read_bytes()
    for number, (what, content) in enumerate(damaged(blob).items(), start=2):
        path.write_bytes(content)
        assert cache.load(cache.key(axpy(), ARCH)) is None, what
        forget(monkeypatch)
        assert obtain(axpy(), ARCH) == good, what
        assert len(compilations) == number, what
        assert path.read_bytes() == blob, what


def test_a_failed_compilation_leaves_no_entry_and_fails_again(compilations: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(CompileError):
            obtain(broken(), ARCH)
    assert cache.size() == (0, 0)
    assert len(compilations) == 2


def test_threads_compile_a_kernel_once(compilations: list[str]) -> None:
    results: list[nvrtc.Binary] = []
    threads = [threading.Thread(target=lambda: results.append(obtain(axpy(), ARCH))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compilations) == 1
    assert len(results) == 8 and all(result is results[0] for result in results)


WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from helpers.jit_kernels import axpy
from tersor.kernels.jit import nvrtc, obtain
compiled, plain = [], nvrtc.compile_source
def counted(source, arch):
    compiled.append(dict(source.parameters)["OFFSET"])
    return plain(source, arch)
nvrtc.compile_source = counted
nvrtc.version()
print("ready", flush=True)
sys.stdin.readline()
import hashlib
order = range(4) if sys.argv[2] == "0" else reversed(range(4))
digests = {i: hashlib.sha256(obtain(axpy(i), "sm_80").data).hexdigest() for i in order}
print(json.dumps([compiled, sorted(digests.items())]))
"""


def test_processes_share_the_cache_and_compile_each_kernel_once(cache_dir: Path) -> None:
    here = str(Path(__file__).resolve().parents[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, here, str(i % 2)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TERSOR_CACHE_DIR": str(cache_dir)},
        )
        for i in range(4)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    outputs = []
    for worker in workers:  # all begin together
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        outputs.append(json.loads(output))
    compiled = [offset for names, _ in outputs for offset in names]
    assert sorted(compiled) == [0, 1, 2, 3]
    assert all(digests == outputs[0][1] for _, digests in outputs)
    assert cache.size()[0] == 4 and not list(cache_dir.glob("jit/*/*.tmp"))


def test_a_lock_that_is_never_released_only_delays(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    with cache.lock(cache.key(axpy(), ARCH)):
        obtain(axpy(), ARCH)
    assert len(compilations) == 1 and cache.size()[0] == 1


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match="kernel cache .* cannot be written .Not a directory.*TERSOR_CACHE_DIR"):
        binary = obtain(axpy(), ARCH)
    assert obtain(axpy(), ARCH) is binary and len(compilations) == 1
    assert cache.size() == (0, 0) and cache.clear() == 0


def test_size_and_clear(cache_dir: Path) -> None:
    assert cache.size() == (0, 0) and cache.clear() == 0
    compile_many([axpy(), axpy(1)], ARCH)
    (cache_dir / "jit" / "00").mkdir(exist_ok=True)
    (cache_dir / "jit" / "00" / "left.tmp").write_bytes(b"x")
    assert cache.size() == (2, sum(path.stat().st_size for path in cache_dir.glob("jit/*/*.kernel")))
    assert cache.clear() == 2
    assert not list(cache_dir.glob("jit/*/*.kernel")) and not list(cache_dir.glob("jit/*/*.tmp"))


def test_many_kernels_in_order_with_repeats_and_a_report_of_each(compilations: list[str]) -> None:
    sources = [axpy(2), spilling(), axpy(1), axpy(2)]
    seen: list[KernelSource] = []
    binaries = compile_many(sources, ARCH, jobs=2, on_done=lambda source, binary: seen.append(source))
    assert [binary.name for binary in binaries] == [source.name for source in sources]
    assert binaries[0] is binaries[3] and binaries[0].data != binaries[2].data
    assert len(compilations) == 3 and set(seen) == set(sources) and len(seen) == 3
    assert compile_many([], ARCH) == []


def test_many_kernels_with_a_broken_one_raise_its_error() -> None:
    with pytest.raises(CompileError, match="missing_name"):
        compile_many([broken(), axpy()], ARCH, jobs=1)
