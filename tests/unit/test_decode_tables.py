"""bench/decode_tables.py: it counts what the tables in the tree cost, and finds one as cheap that packs exactly."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tersor import formats
from tersor.errors import FormatError
from tersor.layouts import decode_groups, decode_tables

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "decode_tables.py"
SMALL = 0x87878787
"""Four 4-bit floats as e4m3: two words, four registers."""


@pytest.fixture(name="script", scope="module")
def decode_tables_script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("decode_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "decode_tables", module)  # dataclasses look for it there
        spec.loader.exec_module(module)
        yield module


def packed_and_decoded(group: decode_groups.DecodeGroup, wanted: list[int]) -> list[int]:
    """Pack the registers of a group into words, and decode those."""
    registers = [torch.tensor(decode_groups.signed(value), dtype=torch.int32) for value in wanted]
    words = []
    for terms in decode_groups.packing(group):
        word = torch.tensor(0, dtype=torch.int32)
        for register, turn, mask in terms:
            word ^= decode_groups.rotate(registers[register], turn) & decode_groups.signed(mask)
        words.append(word)
    decoded = []
    for sources in group.outputs():
        value = torch.tensor(0, dtype=torch.int32)
        for word, turn in sources:
            value ^= decode_groups.rotate(words[word], turn)
        decoded.append(int(value) & group.mask)
    return decoded


def test_every_table_in_the_tree_is_regular_and_costs_what_was_measured(script: ModuleType) -> None:
    """By bits of a code and of a register's weight: the instructions of docs/log, for 16 or 32 weights."""
    costs: dict[tuple[int, int], set[int]] = {}
    for mask in decode_tables.TABLES:
        table = script.in_tree(mask)
        assert table.is_regular, hex(mask)
        assert table.words == script.group_words(mask), hex(mask)
        assert table.shift in script.shifts(mask), hex(mask)
        width = 8 if mask == (mask & 0xFF) * 0x01010101 else 16
        costs.setdefault((mask.bit_count() * width // 32, width), set()).add(table.cost)
    assert costs == {
        (8, 16): {12, 16},
        (7, 16): {30, 31, 34},
        (6, 16): {15, 16},
        (5, 16): {30, 31, 33, 34},
        (4, 16): {14, 16},
        (3, 16): {31, 33},
        (2, 16): {15},
        (1, 16): {31},
        (8, 8): {4},
        (7, 8): {16, 17},
        (6, 8): {7, 8},
        (5, 8): {14, 15},
        (4, 8): {6, 8},
        (3, 8): {15, 16},
        (2, 8): {7},
        (1, 8): {15},
    }


def test_a_search_finds_a_table_as_cheap_that_packs_and_unpacks_exactly(script: ModuleType) -> None:
    kept = script.in_tree(SMALL)
    found = script.search(SMALL, seconds=20.0, seed=1, enough=kept.cost)
    assert found.cost <= kept.cost
    assert found.is_regular
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        wanted = [int(n) & found.mask for n in torch.randint(0, 1 << 32, (found.group.registers,), generator=generator)]
        assert packed_and_decoded(found.group, wanted) == wanted


def test_a_table_is_printed_as_the_tree_has_it(script: ModuleType) -> None:
    for mask, (words, shift, terms) in decode_tables.TABLES.items():
        table = script.in_tree(mask)
        ((read_mask, (read_shift, rows)),) = eval(f"{{{table.text}}}").items()
        assert (read_mask, read_shift, decode_tables.words_of(mask, shift, rows)) == (mask, shift, words)
        assert decode_tables.rows_of(rows, words) == terms


def test_two_rows_alike_are_not_regular(script: ModuleType) -> None:
    table = script.in_tree(SMALL)
    doubled = script.Table(table.mask, table.shift, table.words, (*table.rows[:-1], table.rows[0]))
    assert not doubled.is_regular


def test_terms_are_counted_once_and_third_words_and_shifts_for_themselves(script: ModuleType) -> None:
    def cost(words: int, shift: int, *rows: tuple[tuple[int, int], ...]) -> int:
        return script.Table(0x00FF00FF, shift, words, rows).cost

    assert cost(4, 0, ((0, 0),), ((1, 0),)) == 2
    assert cost(4, 0, ((0, 5),), ((0, 5), (1, 0))) == 3  # one rotation, used twice
    assert cost(4, 0, ((0, 0), (1, 0), (2, 0))) == 2
    assert cost(4, 8, ((0, 0),)) == 3  # two registers and a shift
    assert cost(4, 0, ((4, 0),)) == 3  # the XOR of four words takes two


def test_a_format_has_the_masks_that_its_tables_are_kept_by(script: ModuleType) -> None:
    for name in formats.names():
        for target in decode_groups.TARGETS:
            if not decode_groups.unsupported_reason(formats.get(name), target):
                assert decode_groups.decode_group(formats.get(name), target).mask in script.masks(name, target)
    with pytest.raises(FormatError, match="unknown target 'float8'"):
        script.masks("fp6_e3m2", "float8")
    with pytest.raises(FormatError, match="do not fit"):
        script.masks("fp8_e2m5", decode_groups.FP8)
