"""Codes, values and stream bytes written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tersor import formats
from tersor.layouts import stream

VALUES = {
    "fp6_e3m2": [
        0,
        0.0625,
        0.125,
        0.1875,
        0.25,
        0.3125,
        0.375,
        0.4375,
        0.5,
        0.625,
        0.75,
        0.875,
        1,
        1.25,
        1.5,
        1.75,
        2,
        2.5,
        3,
        3.5,
        4,
        5,
        6,
        7,
        8,
        10,
        12,
        14,
        16,
        20,
        24,
        28,
    ],
    "fp6_e2m3": [
        0,
        0.125,
        0.25,
        0.375,
        0.5,
        0.625,
        0.75,
        0.875,
        1,
        1.125,
        1.25,
        1.375,
        1.5,
        1.625,
        1.75,
        1.875,
        2,
        2.25,
        2.5,
        2.75,
        3,
        3.25,
        3.5,
        3.75,
        4,
        4.5,
        5,
        5.5,
        6,
        6.5,
        7,
        7.5,
    ],
    "fp5_e2m2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7],
    "fp5_e3m1": [0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24],
    "fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "fp4_e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "fp4_e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "fp3_e2m0": [0, 1, 2, 4],
}


@pytest.mark.parametrize("name", list(VALUES))
def test_every_value_of_the_small_floats(name: str) -> None:
    """Codes count up through the magnitudes; the top bit is the sign, also of zero."""
    expected = VALUES[name]
    values = formats.get(name).values().tolist()
    assert values == [*expected, *(-value for value in expected)]
    assert math.copysign(1, values[len(expected)]) == -1


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("fp6_e3m2", 1.0, 0b001100),
        ("fp6_e3m2", -28.0, 0b111111),
        ("fp6_e3m2", 1000.0, 0b011111),
        ("fp6_e3m2", 0.03125, 0b000000),  # half the smallest: to even
        ("fp6_e3m2", 0.09375, 0b000010),  # a tie between two subnormals: to even
        ("fp6_e3m2", -0.01, 0b100000),  # keeps its sign
        ("fp6_e2m3", 1.0, 0b001000),
        ("fp6_e2m3", 7.2, 0b011110),
        ("fp5_e2m2", 1.0, 0b00100),
        ("fp4_e2m1", 2.5, 0b0100),  # a tie between 2 and 3: to even
        ("fp4_e2m1", 5.0, 0b0110),  # a tie between 4 and 6: to even
        ("fp8_e4m3", 1.0, 0b00111000),
        ("fp8_e4m3", 480.0, 0b01111111),
        ("int4", -8.0, 0b0000),
        ("int4", 0.0, 0b1000),
        ("int4", 7.4, 0b1111),
        ("int8", -1.0, 0x7F),
        ("int2", 5.0, 0b11),
    ],
)
def test_codes(name: str, value: float, code: int) -> None:
    assert formats.get(name).encode(torch.tensor([value])).tolist() == [code]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], "8d 00 00 00"),
        (2, [3, 0, 2, 1], "63 00 00 00 00 00 00 00"),
        (3, [7, 0, 5], "47 01" + " 00" * 10),
        (4, [1, 2, 15], "21 0f" + " 00" * 14),
        (5, [31, 0, 17], "1f 44" + " 00" * 18),
        (6, [1, 2, 3, 4], "81 30 10" + " 00" * 21),
        (7, [127, 1], "ff 00" + " 00" * 26),
        (8, [200, 1], "c8 01" + " 00" * 30),
    ],
)
def test_stream_bytes(bits: int, codes: list[int], expected: str) -> None:
    """A row is padded to 32 elements; element k begins at bit k * bits, lowest bit first."""
    packed = stream.pack(torch.tensor([codes], dtype=torch.uint8), bits)
    assert packed.numpy().tobytes() == bytes.fromhex(expected)
