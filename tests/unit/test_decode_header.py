"""The device decoder, compiled as plain C++ and run over all codes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import torch

from tersor import formats
from tersor.kernels.dense import _decode_parameters
from tersor.layouts import decode_groups, tiles

COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("target", list(decode_groups.TARGETS))
def test_extract_restores_every_code(target: str, tmp_path: Path) -> None:
    """All codes in all positions of a decode group: pack with the Python tables, extract with the header."""
    header = resources.files("tersor.kernels").joinpath("cuda", "common", "decode.cuh").read_text()
    names = [name for name in formats.names() if not decode_groups.supported(formats.get(name), target)]
    parts = []
    for name in names:
        parameters = _decode_parameters(formats.get(name), target)
        defines = "".join(
            f"#undef {key}\n#define {key} {int(value) if isinstance(value, bool) else value}\n"
            for key, value in parameters.items()
        )
        body = header.replace("#pragma once", "").replace("using u32 = unsigned int;", "")
        parts.append(
            f"{defines}namespace {name} {{\n{body}\n}}\n"
            f'extern "C" void {name}_extract(u32* registers, const u32* words) '
            f"{{ {name}::decode::extract(registers, words); }}\n"
        )
    source = tmp_path / "decode.cpp"
    source.write_text("using u32 = unsigned int;\n" + "".join(parts))
    library = tmp_path / "decode.so"
    assert COMPILER is not None
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    loaded = ctypes.CDLL(str(library))
    together = decode_groups.weights_in_register(target)
    for name in names:
        fmt = formats.get(name)
        group = decode_groups.decode_group(fmt, target)
        extract = getattr(loaded, f"{name}_extract")
        # 16 x 128 blocks hold every code at every place of a group: block b adds b to a running pattern.
        blocks = 1 << fmt.bits
        places = torch.arange(16 * 128).view(16, 128)
        for shift in range(0, blocks, max(1, blocks // 16)):
            codes = ((places + shift) % blocks).to(torch.uint8)
            words = tiles.pack(codes, fmt, target)
            quads = 2 * fmt.bits // 4 * 4
            for lane_index in (0, 7, 13, 31):
                mine = [words[q * 128 + lane_index * 4 : q * 128 + lane_index * 4 + 4] for q in range(quads // 4)]
                mine.append(words[quads * 32 + lane_index * (2 * fmt.bits - quads) :][: 2 * fmt.bits - quads])
                flat = [int(word) & 0xFFFFFFFF for word in torch.cat(mine)]
                registers: list[int] = []
                for first in range(0, len(flat), group.words):
                    decoded = (ctypes.c_uint32 * group.registers)()
                    extract(decoded, (ctypes.c_uint32 * group.words)(*flat[first : first + group.words]))
                    registers += list(decoded)
                assert len(registers) == 64 // together
                g, t = divmod(lane_index, 4)
                for register, value in enumerate(registers):
                    row = g + 8 * (register % 2)
                    column = (register // 4 * 8 + register % 4 // 2 * 4 + t) * together
                    fields = decode_groups.place(codes[row, column : column + together].int(), fmt, target).tolist()
                    expected = sum(field << (32 // together * place) for place, field in enumerate(fields))
                    assert value == expected << register % 2 * group.raised, (name, lane_index, register)
