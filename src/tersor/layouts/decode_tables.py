"""The tables of decode_groups.py: which rotated words make each register of a decode group.

bench/decode_tables.py finds such a table and prints its line.
"""

from __future__ import annotations


def words_of(mask: int, shift: int, text: str) -> int:
    """Return how many packed words a table's registers come from: they hold as many bits."""
    return len(text.split()) * (2 if shift else 1) * mask.bit_count() // 32


def rows_of(text: str, words: int) -> tuple[tuple[int, ...], ...]:
    """Read rows such as `A2 B0^C6 X8`: a word's letter (X: the XOR of all) and its left rotation."""
    rows = []
    for entry in text.split():
        flat = []
        for term in entry.split("^"):
            flat += [words if term[0] == "X" else ord(term[0]) - ord("A"), int(term[1:])]
        rows.append((*flat, *((-1, 0) * (3 - len(flat) // 2))))
    return tuple(rows)


TABLES: dict[int, tuple[int, int, tuple[tuple[int, ...], ...]]] = {
    mask: (words_of(mask, shift, rows), shift, rows_of(rows, words_of(mask, shift, rows)))
    for mask, (shift, rows) in {
        0x87F087F0: (0, "A0 A12^A24 B0 B12^B24 C0 C12^C24 D0 D12^D24"),
        0x8FE08FE0: (0, "A13 A0^A5 B13 B0^B5 C13 C0^C5 D13 D0^D5"),
        0xBF80BF80: (0, "A20 A0^A27 B20 B0^B27 C20 C0^C27 D20 D0^D27"),
        0xFF00FF00: (0, "A0 A8 B0 B8 C0 C8 D0 D8"),
        0x81F881F8: (
            0,
            "F0^G22 D10^F9 B0^D18 B0^B26 A0^E0 C0^C26 C0^D10 B3^F6 C19^F6 C0^G0 A23^C19 E26 D5^F0 A29 A0^G27 D0^E19",
        ),
        0x83F083F0: (
            0,
            "B10^D23 A25^E14 A0 A5^D0 E0^E6 G20^G27 A5^F10 F0^F19 "
            "C24^D23 E0^G20 X0^X12 C0^X0 D28^E6 X0^X23 B22^F10 B0^D23",
        ),
        0x8FC08FC0: (
            0,
            "C7^E26 D0^E7 A10^G23 E0^G0 C10^D13 C0^D0 D13^G0 A23 B0^G0 G26 D0^F5 D0^D6 F0^F26 B21 B27^F24 A0^F26",
        ),
        0x9F809F80: (
            0,
            "E9 C0^D21 E0^G27 B0^B5 D0^F30 B0^F0 C20^E0 F7 G0^G6 X15 A3^G0 A10^X6 D21^D30 B10^D21 A10^G6 B10^C27",
        ),
        0x81F081F0: (0, "C0^X22 A28 C0^C20 A8^C0 B0^B26 C0^C27 X0 A28^B3"),
        0x83E083E0: (5, "A4 B8 C12 X0"),
        0x8F808F80: (0, "X6 A26^C0 A3^C21 A0^B12 A0^A26 B0^X11 B0^B25 A26^C21"),
        0x9F009F00: (8, "A2 B4 C6 X0"),
        0x81E081E0: (0, "X12 C8^E2 X17 C19^E2 E2^X22 C30^D25 A27 A22^E2 B0 D0^D25 E2^E23 B24^D25 D4 E12^E22 A0 B28"),
        0x83C083C0: (
            0,
            "A4^C24 B24^X21 D4 A8^B0 B24^C29 C2^E20 B0^C0 E0^X10 A29^E28 B28 C24^X10 A29^B0 C0^E23 X21 A0^D0 D0^D25",
        ),
        0x8F008F00: (8, "D1^E4 B0^C0 A3 B0^D1 A0^E4 E0^D3 D0^B3 C5^D3"),
        0x9E009E00: (8, "B0^C4 B0^B3 E0^D4 C0 D0^C4 A0^B2 E6^E7 A4^E6"),
        0x80E080E0: (4, "A25 B17 A0^A18 B0^B9"),
        0x81C081C0: (6, "B0 A0 A28^B24 B12^A24"),
        0x83808380: (4, "A25 B1 B24^A14 A0^B0"),
        0x87008700: (8, "B20 A0 A12 B0"),
        0x8E008E00: (8, "A0 B21 A13^A18 B0^B1"),
        0x9C009C00: (8, "B29 A6 B0^A31 A0^B27"),
        0x81808180: (4, "B5 A19 X0 C18^C29 A0^C29 B0^A21 C0^X10 C19^B27"),
        0x8C008C00: (8, "B1 A0 X21 X19 A2 C3 X0^C9 B12^B22"),
        0x00FF00FF: (0, "A0 A24 B0 B24 C0 C24 D0 D24"),
        0x007F007F: (
            0,
            "E12^F25 A25^E0 C14^E21 B0^C7 C0^F0 D0^D12 B0^G0 G7 C0^D0 B23 A23^G28 D5^F25 D5^G0 A0 B29^C0 E0^F20",
        ),
        0x003F003F: (0, "A14^B28 B22^C26 A21^B28 B22 A14^A25 C4 B0^C0 A0^B0"),
        0x001F001F: (
            0,
            "A3^A27 B5 C29 E0^E17 A0^D21 B0^D0 D26 A27^C0 C25^E17 A27^B26 E27 A22^D30 E22 C4^D0 B0^B12 A0^B0",
        ),
        0x000F000F: (0, "A0 A28 A24 A20 B0 B28 B24 B20"),
        0x00070007: (0, "A28^B3 B0^B3 A6^A19 B0^C0 A0^B12 A19 A0^B25 A9 B29^C29 C10 C7 A28^C29 A29^C21 A0^A28 B6 C2"),
        0x00030003: (0, "A0^A22 A26^A8 A22^A28 A0 A14^A22 A0^A18 A22^A26 A20^A22"),
        0x00010001: (0, "A0 A8 A17 A15 A9 A5 A26 A6 A14 A23 A3 A11 A13 A18 A28 A20"),
        0x77777777: (0, "A0 B0 C0 A29^B30^C31"),
        0xBFBFBFBF: (0, "A27^G29 B0^E15 E0^D15 G0^B5 D0^F0 G0^C21 C21^F17 A7^B5^C0"),
        0x9F9F9F9F: (0, "A0^C0 B0^C6 C6 A4^B2"),
        0x9E9E9E9E: (0, "B0^C4 B0^B3 E0^D4 C0 D0^C4 A0^B2 E6^E7 A4^E6"),
        0x87878787: (0, "B0 A4 B20 A0"),
        0x9C9C9C9C: (0, "B5 A0 A2^B3 B0^A1"),
        0x8C8C8C8C: (0, "C0^B6 A0^B6 X0^X7 A0 X0^A2 B0^C5 B4^X1 C3^X1"),
        0xFFFFFFFF: (0, "A0 B0 C0 D0"),
        0x7F7F7F7F: (0, "A0^G0 B0^E0 E17^D0 G3^B5 D17^F0 G3^C0 C0^F17 A12^B5^C11"),
        0xFEFEFEFE: (0, "A0^G0 B0^E0 E17^D0 G3^B5 D17^F0 G3^C0 C0^F17 A12^B5^C11"),
        0x3F3F3F3F: (0, "A0 B0 C0 A26^B28^C30"),
        0xFCFCFCFC: (0, "A0 B0 C0 A26^B28^C30"),
        0x1F1F1F1F: (0, "D0^E0 A0^A29 C0^E10 A29^E0 C27^D4 B0 B12^C0 D4^E11"),
        0xF8F8F8F8: (0, "D0^E0 A0^A29 C0^E10 A29^E0 C27^D4 B0 B12^C0 D4^E11"),
        0x0F0F0F0F: (0, "A0 A28 B0 B28"),
        0xF0F0F0F0: (0, "A0 A28 B0 B28"),
        0x07070707: (0, "B0^C0 C27^A0 A25^C0 C5^C27 C0 A29^A0 B3^A20 A20^B13"),
        0xE0E0E0E0: (0, "B0^C0 C27^A0 A25^C0 C5^C27 C0 A29^A0 B3^A20 A20^B13"),
        0x03030303: (0, "A0 A30 A28 A26"),
        0xC0C0C0C0: (0, "A0 A30 A28 A26"),
        0x01010101: (0, "A0 A31 A30 A29 A28 A27 A26 A25"),
    }.items()
}
"""Mask of a register's code bits -> words in a group, shift, rows."""
