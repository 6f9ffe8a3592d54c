"""Kernels on a CPU: their own headers as plain C++, in which every thread is a fiber (`emulated.hpp`)."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tersor.kernels import jit
from tersor.kernels.jit import KernelSource

COMPILER = shutil.which("c++") or shutil.which("g++")
CUDA = Path(jit.__file__).parents[1] / "cuda"
HERE = Path(__file__).parent
REPLACED = {
    "common/ptx.cuh": "emulated.hpp",
    "common/launch.cuh": "emulated.hpp",
    "attention/instructions.cuh": "emulated.hpp",
    "small/flags.cuh": "emulated.hpp",
    "experts/fetch.cuh": "emulated_mixed.hpp",
    "experts/words.cuh": "emulated_block.hpp",
    "common/wgmma.cuh": "emulated_mixed.hpp",
    "attention/sm90_instructions.cuh": "emulated_sm90.hpp",
    "sparse/instructions.cuh": "emulated_mixed.hpp",
}
"""Headers, and what has all of them that is used."""
EXTERN = {
    *("dense/sm90_linear.cuh", "experts/sm90_experts.cuh", "experts/sm90_mixed.cuh", "mixed/sm90_mixed.cuh"),
    *("sparse/sm90_decompress.cuh", "sparse/sm90_sparse.cuh", "dense/sm80_linear.cuh", "experts/sm80_experts.cuh"),
}
"""Headers whose dynamic shared memory has a name of its own."""
_NAMED = re.compile(r"extern __shared__ __align__\(\d+\) char (\w+)\[\];")
_MEMORY = r"char* const \1 = reinterpret_cast<char*>(attention_memory);"
_TYPES = {"P": "const void*", "i": "int", "q": "long long", "f": "float", "T": "const void*"}
_CTYPES = {
    "P": ctypes.c_void_p,
    "i": ctypes.c_int,
    "q": ctypes.c_longlong,
    "f": ctypes.c_float,
    "T": ctypes.c_char_p,
}
_MAP = struct.Struct("Q3q2i80x")
"""`Map` in `emulated_sm90.hpp`, in as many bytes as a driver's."""


def tensor_map(address: int, rows: int, columns: int, stride: int, element: int, box_rows: int) -> bytes:
    """Stand for `jit.tensor_map.rows`."""
    return _MAP.pack(address, rows, columns, stride, element, box_rows)


class Emulated:
    """Stands for a loaded kernel whose addresses are those of CPU tensors, of compute capability `arch` / 100."""

    def __init__(self, source: KernelSource, folder: Path, arch: int) -> None:
        self.source = source
        text = _translation(source, arch)
        parts = (text, source.digest(), *(path.read_text() for path in sorted(HERE.glob("emulated*.hpp"))))
        name = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        for replaced, by in REPLACED.items():
            place = folder / replaced
            place.parent.mkdir(exist_ok=True)
            place.write_text(f'#pragma once\n#include "{by}"\n')
        for name in EXTERN & set(source.files()):
            place = folder / name
            place.parent.mkdir(exist_ok=True)
            place.write_text(_NAMED.sub(_MEMORY, (CUDA / name).read_text()))
        if not library.exists():
            unit = folder / f"{name}.cpp"
            unit.write_text(text)
            options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wno-psabi"]
            includes = [f"-I{place}" for place in (folder, HERE, CUDA)]
            assert COMPILER is not None
            subprocess.run([COMPILER, *options, *includes, str(unit), "-o", str(library)], check=True)
        self._run = ctypes.CDLL(str(library)).run
        self._run.argtypes = [ctypes.c_int] * 5 + [_CTYPES[letter] for letter in source.arguments]
        self.seed = 0

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        stream: int,
        args: Sequence[int | float | bytes],
        programmatic: bool = False,
        cluster: None = None,
    ) -> None:
        """Run every block, one after the other, in an order that the seed decides."""
        self.seed += 1
        self._run(*grid, block[0], self.seed, *args)


def _translation(source: KernelSource, arch: int) -> str:
    """The kernel behind a function that takes its grid, threads, a seed, and its arguments."""
    macros = {
        "TERSOR_ENTRY": "entry",
        "__CUDA_ARCH__": arch,
        **{key: value if isinstance(value, str) else int(value) for key, value in source.parameters.items()},
    }
    defines = "\n".join(f"#define {key} {value}" for key, value in macros.items())
    language = "emulated.hpp" if source.header.startswith("attention/") else "emulated_block.hpp"
    if source.header.startswith("attention/sm90"):
        language = "emulated_sm90.hpp"
    elif source.header.startswith(("dense/dequantize", "dense/sm", "experts/sm", "mixed/", "sparse/")):
        language = "emulated_mixed.hpp"
    names = [f"a{i}" for i in range(len(source.arguments))]
    given = [
        f"{'Mapped{' if letter == 'T' else 'pass('}{name}{'}' if letter == 'T' else ')'}"
        for letter, name in zip(source.arguments, names, strict=True)
    ]
    taken = ", ".join(f"{_TYPES[letter]} {name}" for letter, name in zip(source.arguments, names, strict=True))
    return f"""{defines}
#include "{language}"
#include "{source.header}"
struct Any {{
    const void* p;
    template <class T> operator T*() const {{ return static_cast<T*>(const_cast<void*>(p)); }}
}};
struct Mapped {{
    const void* p;
    template <class T> operator T() const {{ T map; memcpy(&map, p, sizeof map); return map; }}
}};
static Any pass(const void* p) {{ return {{p}}; }}
template <class T> static T pass(T x) {{ return x; }}
extern "C" void run(int x, int y, int z, int threads, int seed, {taken}) {{
    emulated::last_waits = {int(source.header == "experts/decide.cuh")};
    const Dim grid = {{unsigned(x), unsigned(y), unsigned(z)}};
    emulated::run(grid, threads, seed, [=] {{ entry({", ".join(given)}); }});
}}
"""
