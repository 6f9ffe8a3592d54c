"""Kernel sources: the text that reaches the compiler, the includes that are followed, their identity."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from tersor.errors import KernelError
from tersor.formats import Activations, get_scheme
from tersor.hardware import CHIPS
from tersor.kernels import dense, jit
from tersor.kernels.jit import KernelSource, source
from tersor.kernels.tune import table

CUDA = Path(jit.__file__).parents[1] / "cuda"
TEXTS = {
    "main.cuh": '#pragma once\n#include "part/one.cuh"\n  #  include "two.cuh"  // why\nint main_text;\n',
    "part/one.cuh": '#pragma once\n#include "two.cuh"\n',
    "two.cuh": "#pragma once\n",
}


def make(**changes: object) -> KernelSource:
    fields = {"name": "probe", "header": "main.cuh", "parameters": {}, "arguments": "P", "texts": TEXTS}
    return KernelSource(**{**fields, **changes})


def test_text_defines_the_entry_and_the_parameters_ahead_of_the_header() -> None:
    text = make(parameters={"BITS": 6, "BF16": True, "SHIFT": -3, "TYPE": "unsigned long", "TERMS": "1, -1, 2"}).text()
    lines = text.splitlines()
    assert lines[: lines.index('#include "main.cuh"')] == [
        "#define TERSOR_ENTRY probe",
        "#define BF16 1",
        "#define BITS 6",
        "#define SHIFT (-3)",
        "#define TERMS 1, -1, 2",
        "#define TYPE unsigned long",
    ]


def test_includes_are_followed_through_folders_once_each() -> None:
    assert list(make().files()) == ["main.cuh", "part/one.cuh", "two.cuh"]


def test_every_header_of_the_package_can_be_followed() -> None:
    headers = [str(file.relative_to(CUDA)) for file in CUDA.rglob("*.cuh")]
    rooms = {"attention", "calibrate", "common", "dense", "experts", "mixed", "sampling", "small", "sparse"}
    assert {name.split("/")[0] for name in headers} == rooms
    for header in headers:
        assert header in make(header=header).files()


@pytest.fixture(name="copied")
def copied_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of kernels/cuda that sources are read from."""
    folder = shutil.copytree(CUDA, tmp_path / "cuda")
    monkeypatch.setattr(source, "_package_header", lambda name, includer: (folder / name).read_text(encoding="utf-8"))
    return folder


def hashed() -> str:
    """The hash of what is in the folder now."""
    table.kernels_hash.cache_clear()
    try:
        return table.kernels_hash()
    finally:
        table.kernels_hash.cache_clear()


def test_measured_tables_outlive_a_header_that_no_linear_reaches(copied: Path) -> None:
    before = hashed()
    (copied / "attention" / "decode.cuh").write_text('#pragma once\n#include "common/ptx.cuh"\n')
    (copied / "common" / "pages.cuh").write_text("#pragma once\n")
    assert hashed() == before


def test_any_header_that_a_linear_reaches_makes_another_hash_of_the_kernels(copied: Path) -> None:
    chip = CHIPS["NVIDIA H200"]
    sources = [
        one
        for activations in Activations
        for one in dense.kernels_for(get_scheme("fp6_e3m2"), torch.float16, chip, activations)
    ]
    reached = {name for one in sources for name in one.files()}
    assert {"common/decode.cuh", "common/ring.cuh", "dense/sm90_finish.cuh", "dense/dequantize.cuh"} <= reached
    before = hashed()
    for name in sorted(reached):
        text = (copied / name).read_text()
        (copied / name).write_text(text + "// changed\n")
        assert hashed() != before, name
        (copied / name).write_text(text)
    assert hashed() == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("#include <cuda_fp16.h>", "main.cuh: cannot follow #include <cuda_fp16.h>"),
        ("#include HEADER", "main.cuh: cannot follow #include HEADER"),
        ('#include "absent.cuh"', 'main.cuh: cannot follow #include "absent.cuh": no such file'),
        ('#include "../../errors.py"', "it leaves kernels/cuda"),
        ('#include "/etc/hostname"', "it leaves kernels/cuda"),
    ],
)
def test_an_include_that_cannot_be_followed_is_an_error(line: str, words: str) -> None:
    with pytest.raises(KernelError) as error:
        make(texts={"main.cuh": line + "\n"}).files()
    assert words in str(error.value)


def test_a_missing_header_names_the_kernel() -> None:
    with pytest.raises(KernelError, match="kernel probe: cannot follow"):
        make(header="absent.cuh").files()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "two words"}, "not a C identifier"),
        ({"arguments": "PiZ"}, "not letters of PiIqQf"),
        ({"arguments": ""}, "not letters of PiIqQf"),
        ({"parameters": {"bits": 6}}, "not an upper-case macro name"),
        ({"parameters": {"TERSOR_ENTRY": "x"}}, "not an upper-case macro name"),
        ({"parameters": {"BITS": 6.0}}, "expected int, bool or str"),
        ({"parameters": {"BITS": "6\n#define X"}}, "expected a C\\+\\+ expression"),
    ],
)
def test_a_malformed_source_is_an_error(changes: dict[str, object], words: str) -> None:
    with pytest.raises(KernelError, match=words):
        make(**changes)


def test_equal_sources_are_one_key_and_any_change_is_another() -> None:
    base = make(parameters={"A": 1, "B": 2})
    assert base == make(parameters={"B": 2, "A": 1})
    assert hash(base) == hash(make(parameters={"B": 2, "A": 1}))
    changed = [
        make(parameters={"A": 1, "B": 3}),
        make(parameters={"A": 1, "B": 2}, name="other"),
        make(parameters={"A": 1, "B": 2}, arguments="PP"),
        make(parameters={"A": 1, "B": 2}, header="two.cuh"),
        make(parameters={"A": 1, "B": 2}, texts={**TEXTS, "two.cuh": "#pragma once\n "}),
    ]
    digests = {source.digest() for source in [base, *changed]}
    assert len({base, *changed}) == len(digests) == 6


def test_a_byte_of_a_nested_header_changes_the_digest() -> None:
    before = make().digest()
    assert make(texts=dict(TEXTS)).digest() == before
    assert make(texts={**TEXTS, "two.cuh": "#pragma once\n\n"}).digest() != before
    moved = {**TEXTS, "part/one.cuh": TEXTS["part/one.cuh"] + "#", "two.cuh": "#pragma once\n"}
    assert make(texts=moved).digest() != before


def test_arguments_lie_in_memory_as_in_a_c_struct() -> None:
    letters = "PifPiqIQf"
    types = {
        "P": ctypes.c_void_p,
        "i": ctypes.c_int,
        "I": ctypes.c_uint,
        "q": ctypes.c_longlong,
        "Q": ctypes.c_ulonglong,
        "f": ctypes.c_float,
    }
    fields = [(f"m{i}", types[letter]) for i, letter in enumerate(letters)]
    layout = type("Layout", (ctypes.Structure,), {"_fields_": fields})
    source = make(arguments=letters)
    assert source.offsets == tuple(getattr(layout, name).offset for name, _ in fields)
    assert source.layout.size == layout.m8.offset + 4
