"""Common headers beside their Python: the decoder, run as plain C++ over all codes, and names that both have."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor import formats
from tersor.layouts import decode_groups, gated, scales, tiles
from tersor.layouts.packing import SCALE_TYPES, Packing

COMPILER = shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def common(name: str) -> str:
    """The text of a header."""
    return resources.files("tersor.kernels").joinpath("cuda", "common", name).read_text()


def enumeration(header: str, name: str) -> dict[str, int]:
    """The names and values of an `enum` of a header; every one has its value written out."""
    (body,) = re.findall(rf"enum {name} \{{(.*?)\}};", common(header), re.DOTALL)
    entries = [entry.strip() for entry in re.sub(r"//.*", "", body).split(",") if entry.strip()]
    return {left: int(right) for left, _, right in (entry.partition(" = ") for entry in entries)}


def built(source: str, folder: Path) -> ctypes.CDLL:
    """Compile C++ to a library and load it."""
    (folder / "header.cpp").write_text(source)
    library = folder / "header.so"
    assert COMPILER is not None
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *options, str(folder / "header.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def test_ways_to_finish_have_one_name_and_value_in_both_languages() -> None:
    finishes = {
        "k" + "".join(word.capitalize() for word in finish.name.split("_")): finish.value
        for finish in decode_groups.Finish
    }
    assert enumeration("decode.cuh", "Finish") == finishes


def test_scale_types_have_one_name_and_value_in_both_languages() -> None:
    types = {f"k{dtype.capitalize()}": value for dtype, value in SCALE_TYPES.items()}
    assert enumeration("scales.cuh", "Type") == types
    assert set(SCALE_TYPES) == set(formats.SCALE_DTYPES)


@needs_compiler
def test_rows_and_channels_of_gated_weights_are_the_same_in_both_languages(tmp_path: Path) -> None:
    source = (
        "#include <cmath>\n#include <algorithm>\n#define __device__\n#define __forceinline__ inline\n"
        f"#define EPILOGUE 1\nusing std::max;\n{common('gate.cuh')}\n"
        'extern "C" int outputs(int rows) { return gate::outputs(rows); }\n'
        'extern "C" int row_of(int output) { return gate::row_of(output); }\n'
    ).replace("#pragma once", "")
    header = built(source, tmp_path)
    for channels in (1, 7, 8, 9, 16, 100, 11008):
        assert header.outputs(gated.gated_rows(channels)) == gated.gated_channels(gated.gated_rows(channels))
        numbers = torch.arange(channels)
        rows = gated.interleave(numbers + 1, -numbers - 1).tolist()
        for channel in (0, channels // 2, channels - 1):
            row = header.row_of(channel)
            assert (rows[row], rows[row + gated.HALF]) == (channel + 1, -channel - 1)


def subtracts(subtract: Any, fmt: formats.ElementFormat, group: decode_groups.DecodeGroup) -> None:
    """Assert that every code less every zero point, or the offset of its format, is that number where bytes are
    multiplied, whatever the bytes beside it are."""
    subtract.restype = ctypes.c_uint32
    codes = torch.arange(1 << fmt.bits).repeat(2)
    target = decode_groups.FP8 if group.operand == "e4m3" else decode_groups.INT8
    dtype, most = decode_groups.TARGETS[target], 16 if group.operand == "e4m3" else 128
    for zero in range(most + 1) if fmt.kind == "uint" else (fmt.bias,):
        (constant,) = decode_groups.zero_constants(torch.tensor([zero], dtype=torch.uint8), fmt, target)
        for first in range(0, 1 << fmt.bits, 3):
            fields = codes[first : first + 2].repeat(2).int()
            register = int(decode_groups.join(fields)) & group.mask
            found = subtract(register, (int(constant) & 0xFFFF) * 0x00010001)
            values = torch.tensor([found], dtype=torch.int64).view(dtype)[:4].float() * 2.0**group.exponent
            assert torch.equal(values, (fields - zero).float()), (fmt.name, zero, first)


@needs_compiler
@pytest.mark.parametrize("target", decode_groups.PAIR_TARGETS)
def test_codes_of_tables_choose_the_bits_of_their_rows(target: str, tmp_path: Path) -> None:
    """Every code at every place of a lane, of tables in which no byte stands twice."""
    scheme = formats.get_scheme("lut3", None, target)
    packing = Packing.of(scheme, target)
    group, parameters = packing.group, packing.macros()
    defines = "".join(f"#define {key} {int(v) if isinstance(v, bool) else v}\n" for key, v in parameters.items())
    made = parameters["DECODE_REGISTERS"]
    source = (
        f"{defines}{common('decode.cuh')}\n"
        'extern "C" void run(u32* registers, const u32* words, const u32* tables) {\n'
        "    decode::extract(registers, words);\n"
        f"    for (int i = 0; i < {made}; i += decode::kSpread) decode::choose(registers + i, tables);\n}}\n"
    )
    library = built(source, tmp_path)
    table = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(3))[: 16 * 8].view(16, 8).to(torch.int16)
    records = scales.pack(table.view(torch.float16 if target == "float16" else torch.bfloat16), None, packing, 128)
    places = torch.arange(16 * 128).view(16, 128)
    for shift in range(8):
        codes = ((places * 5 + places // 128 + shift) % 8).to(torch.uint8)
        words = tiles.pack(codes, packing)
        for lane in (0, 6, 13, 31):
            g, t = divmod(lane, 4)
            mine = [int(word) & 0xFFFFFFFF for word in (*words[4 * lane :][:4], *words[128 + 2 * lane :][:2])]
            rows = torch.cat([records[16 * row :][:16].view(torch.int32) for row in (g, g + 8)])
            tables = (ctypes.c_uint32 * 8)(*[int(word) & 0xFFFFFFFF for word in rows])
            registers: list[int] = []
            for first in range(0, 6, group.words):
                decoded = (ctypes.c_uint32 * made)()
                library.run(decoded, (ctypes.c_uint32 * group.words)(*mine[first : first + group.words]), tables)
                registers += list(decoded)
            assert len(registers) == 32
            for register, value in enumerate(registers):
                row = g + 8 * (register % 2)
                column = (register // 4 * 8 + register % 4 // 2 * 4 + t) * 2
                low, high = (int(table[row, int(code)]) & 0xFFFF for code in codes[row, column : column + 2])
                assert value == low | high << 16, (shift, lane, register)


@needs_compiler
@pytest.mark.parametrize("target", list(decode_groups.TARGETS))
def test_extract_restores_every_code(target: str, tmp_path: Path) -> None:
    """All codes in all positions of a decode group: pack with the Python tables, extract with the header."""
    header = common("decode.cuh")
    names = [name for name in formats.names() if not decode_groups.unsupported_reason(formats.get(name), target)]
    parts, subtract = [], "subtract_to_e4m3" if target == decode_groups.FP8 else "subtract_bytes"
    for name in names:
        parameters = Packing.of(formats.Scheme(formats.get(name)), target).macros()
        defines = "".join(
            f"#undef {key}\n#define {key} {int(value) if isinstance(value, bool) else value}\n"
            for key, value in parameters.items()
        )
        body = "#undef TERSOR_COMMON_DECODE\n" + header.replace("using u32 = unsigned int;", "")
        parts.append(
            f"{defines}namespace {name} {{\n{body}\n}}\n"
            f'extern "C" void {name}_extract(u32* registers, const u32* words) '
            f"{{ {name}::decode::extract(registers, words); }}\n"
            f'extern "C" u32 {name}_subtract(u32 codes, u32 zeros) '
            f"{{ return {name}::decode::{subtract}(codes, zeros); }}\n"
        )
    loaded = built("using u32 = unsigned int;\n" + "".join(parts), tmp_path)
    together = decode_groups.weights_in_register(target)
    for name in names:
        fmt = formats.get(name)
        group = decode_groups.decode_group(fmt, target)
        extract = getattr(loaded, f"{name}_extract")
        if group.finish in (decode_groups.Finish.SUBTRACT_BYTES, decode_groups.Finish.SUBTRACT_TO_E4M3):
            subtracts(getattr(loaded, f"{name}_subtract"), fmt, group)
        # 16 x 128 blocks hold every code at every place of a group: block b adds b to a running pattern.
        blocks = 1 << fmt.bits
        places = torch.arange(16 * 128).view(16, 128)
        for shift in range(0, blocks, max(1, blocks // 16)):
            codes = ((places + shift) % blocks).to(torch.uint8)
            words = tiles.pack(codes, Packing.of(formats.Scheme(fmt), target))
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
