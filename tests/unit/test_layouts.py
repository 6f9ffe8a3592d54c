"""The stored stream and the kernel tiles: exact, and undone exactly."""

from __future__ import annotations

import pytest
import torch

from tersor import formats
from tersor.compress import quantize_rtn
from tersor.errors import FormatError
from tersor.layouts import PackedWeight, StackedWeight, decode_groups, scales, stacked, stream, tiles
from tersor.layouts.blocks import ic_blocks, oc_blocks
from tersor.layouts.packing import Packing, scales_in_block

OPERANDS = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "e5m2": (torch.float8_e5m2, torch.uint8),
    "int8": (torch.int8, torch.int8),
}
SERVED = [
    (name, target)
    for name in formats.names()
    for target in decode_groups.TARGETS
    if not decode_groups.unsupported_reason(formats.get(name), target)
]
GROUPS = [decode_groups.decode_group(formats.get(name), target) for name, target in SERVED]


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("ic", [1, 8, 31, 32, 33, 100, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_stream_is_a_little_endian_bit_stream(bits: int, ic: int) -> None:
    codes = random_codes(bits, 5, ic)
    packed = stream.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, stream.row_words(ic, bits))
    for row in range(5):
        expected = sum(int(code) << (k * bits) for k, code in enumerate(codes[row]))
        assert int.from_bytes(packed[row].numpy().tobytes(), "little") == expected
    assert torch.equal(stream.unpack(packed, bits, ic), codes)


def test_stream_takes_more_dimensions_and_strides() -> None:
    codes = random_codes(6, 3, 4, 64)
    assert torch.equal(stream.pack(codes, 6)[1], stream.pack(codes[1], 6))
    assert torch.equal(stream.pack(codes.transpose(0, 1), 6)[2], stream.pack(codes[:, 2], 6))
    assert torch.equal(stream.unpack(stream.pack(codes, 6)[:, ::2], 6, 64), codes[:, ::2])
    for bits in (4, 8):  # a row alone may have any stride to the next one
        alone = random_codes(bits, 64, 1).T
        assert alone.stride() == (1, 1) and torch.equal(stream.unpack(stream.pack(alone, bits), bits, 64), alone)


def test_which_formats_have_tables() -> None:
    served = {name for name, _ in SERVED}
    assert served == set(formats.names())
    for target in decode_groups.PAIR_TARGETS:
        assert [name for name in formats.names() if decode_groups.unsupported_reason(formats.get(name), target)] == []
    assert "exponents" in decode_groups.unsupported_reason(formats.get("fp8_e6m1"), "float16")
    assert "no decode table" in decode_groups.unsupported_reason(formats.get("fp8_e6m1"), "bfloat16")
    assert all(bits % 32 == 0 for bits in (group.mask.bit_count() * group.registers for group in GROUPS))
    wide = ("float16", "bfloat16")
    assert all(group.registers % (8 if group.operand in wide else 4) == 0 for group in GROUPS), "whole pairs of steps"
    bytes_ = {name for name, target in SERVED if target == "float8_e4m3fn"}
    assert {"fp7_e3m3", "fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "fp5_e3m1", "fp4_e2m1", "fp4_e3m0", "fp3_e2m0"} <= bytes_
    assert "NaN" in decode_groups.unsupported_reason(formats.get("fp8_e4m3"), "float8_e4m3fn")
    few = {"int5", "int4", "int3", "int2", "uint4", "uint3", "uint2", "uint1"}
    assert {name for name in bytes_ if "int" in name} == few
    assert "e4m3 has not" in decode_groups.unsupported_reason(formats.get("uint5"), "float8_e4m3fn")
    assert "no decode table" in decode_groups.unsupported_reason(formats.get("fp7_e2m4"), "float8_e4m3fn")
    whole = [name for name, target in SERVED if target == "int8"]
    assert whole == [name for name in formats.names() if "int" in name and name != "uint8"]
    assert "no integer type" in decode_groups.unsupported_reason(formats.get("fp6_e2m3"), "int8")
    assert "does not fit" in decode_groups.unsupported_reason(formats.get("uint8"), "int8")


@pytest.mark.parametrize(("name", "target"), [pair for pair in SERVED if pair[0].startswith("fp")])
def test_a_placed_float_is_the_value_but_for_a_power_of_two(name: str, target: str) -> None:
    """What a register holds, read as the operand type, times 2^exponent is the format's value, for every code."""
    fmt = formats.get(name)
    group = decode_groups.decode_group(fmt, target)
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32)
    fields = decode_groups.place(codes, fmt, target)
    dtype, width = OPERANDS[group.operand]
    exponent = group.exponent
    if target == "bfloat16":  # the pairs are multiplied before they are used
        exponent = 127 - fmt.bias
    if group.finish == decode_groups.Finish.HALVE:
        fields = halved(fields, group.mask & 0xFFFF)
    read = fields.to(width).view(dtype).double()
    assert torch.equal(read * 2.0**exponent, fmt.values().double())
    assert torch.equal(torch.signbit(read), torch.signbit(fmt.values()))


@pytest.mark.parametrize("name", [name for name, target in SERVED if target == "int8" and name[0] == "i"])
def test_a_placed_integer_is_the_value_but_for_a_power_of_two(name: str) -> None:
    fmt = formats.get(name)
    fields = decode_groups.place(torch.arange(1 << fmt.bits, dtype=torch.int32), fmt, "int8")
    read = fields.to(torch.uint8).view(torch.int8).double()
    assert torch.equal(read * 2.0 ** decode_groups.decode_group(fmt, "int8").exponent, fmt.values().double())


@pytest.mark.parametrize(("name", "target"), SERVED)
def test_tiles_are_undone_exactly(name: str, target: str) -> None:
    fmt = formats.get(name)
    for shape in ((16, 128), (1, 1), (40, 300), (33, 129)):
        codes = random_codes(fmt.bits, *shape)
        packed = tiles.pack(codes, Packing.of(formats.Scheme(fmt), target))
        assert packed.numel() == oc_blocks(shape[0]) * ic_blocks(shape[1]) * 64 * fmt.bits
        assert torch.equal(tiles.unpack(packed, Packing.of(formats.Scheme(fmt), target), shape), codes)


def test_tiles_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = formats.get("fp6_e3m2")
    codes = random_codes(6, 200, 300)
    whole = tiles.pack(codes, Packing.of(formats.Scheme(fmt), "float16"))
    monkeypatch.setattr(tiles, "_CHUNK_BLOCKS", 4)
    assert torch.equal(tiles.pack(codes, Packing.of(formats.Scheme(fmt), "float16")), whole)
    assert torch.equal(tiles.unpack(whole, Packing.of(formats.Scheme(fmt), "float16"), (200, 300)), codes)


@pytest.mark.parametrize(("name", "target"), SERVED)
def test_where_a_tile_keeps_a_weight(name: str, target: str) -> None:
    """One nonzero weight in a block decodes to the lane and register that mma.m16n8k16 or wgmma k32 reads it from."""
    fmt = formats.get(name)
    group = decode_groups.decode_group(fmt, target)
    generator = torch.Generator().manual_seed(5)
    for _ in range(6):
        row, column = (int(torch.randint(0, size, (), generator=generator)) for size in (16, 128))
        codes = torch.full((16, 128), fmt.zero_code, dtype=torch.uint8)
        wanted = (fmt.zero_code + 1 + int(torch.randint(0, (1 << fmt.bits) - 1, (), generator=generator))) % (
            1 << fmt.bits
        )
        codes[row, column] = wanted
        words = tiles.pack(codes, Packing.of(formats.Scheme(fmt), target))[: 64 * fmt.bits]
        quads = 2 * fmt.bits // 4 * 4
        together = decode_groups.weights_in_register(target)
        lane_index = row % 8 * 4 + column % (4 * together) // together
        mine = [int(words[q * 128 + lane_index * 4 + i]) for q in range(quads // 4) for i in range(4)]
        mine += [int(words[quads * 32 + lane_index * 2 + i]) for i in range(2 * fmt.bits - quads)]
        register = column // (8 * together) * 4 + column // (4 * together) % 2 * 2 + row // 8
        first = register // group.registers * group.words
        value = 0
        for word, turn in group.outputs()[register % group.registers]:
            bits = mine[first + word] & 0xFFFFFFFF
            value ^= (bits << turn | bits >> (32 - turn)) & 0xFFFFFFFF if turn else bits
        found = torch.tensor(decode_groups.signed(value & group.mask), dtype=torch.int32)
        fields = decode_groups.split(found, together)
        assert int(decode_groups.unplace(fields, fmt, target)[column % together]) == wanted


def halved(fields: torch.Tensor, mask: int) -> torch.Tensor:
    """What `kHalve` in decode.cuh does to one half of a pair."""
    normal = ((fields | 0x8000) - 0x0400).to(torch.int16).view(torch.float16)
    subnormal = (((fields >> 1) & ((mask & 0x7FFF) >> 1)) | 0x8000).to(torch.int16).view(torch.float16)
    return torch.fmin(normal, subnormal).view(torch.int16).int() ^ (~fields & 0x8000)


@pytest.mark.parametrize("group", [None, 16, 32, 48, 128, 320])
@pytest.mark.parametrize("name", ["uint1", "uint4", "uint7", "uint8"])
def test_zero_points_change_layout_and_back(name: str, group: int | None) -> None:
    scheme = formats.get_scheme(name, group, "bfloat16")
    weight = torch.randn(37, 3 * (group or 100), generator=torch.Generator().manual_seed(2))
    weight += torch.linspace(-2, 2, 37)[:, None]
    packed = PackedWeight.from_encoded(quantize_rtn(weight, scheme))
    assert packed.zero_point is not None
    assert len(packed.zero_point.unique()) > 1
    bytewise = name != "uint8" and (group or 32) % 32 == 0
    for target in (*decode_groups.PAIR_TARGETS, *(["int8"] if bytewise else [])):
        tiled = packed.to_layout(f"tiles_{target}")
        assert tiled.zero_point is None
        assert torch.equal(tiled.dequantize(), packed.dequantize())
        back = tiled.to_layout("stream")
        assert back.zero_point is not None
        assert torch.equal(back.zero_point, packed.zero_point)
        assert torch.equal(back.scale, packed.scale)
        assert torch.equal(back.data, packed.data)


@pytest.mark.parametrize("name", [name for name in formats.names() if formats.get(name).kind == "uint"])
def test_zero_constants_are_exact(name: str) -> None:
    """Adding the constant to what stands for a code gives code - zero point, for every code and zero point."""
    fmt = formats.get(name)
    codes = torch.arange(1 << fmt.bits).view(-1, 1)
    for target, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        narrow = target == "bfloat16" and fmt.bits < 8
        zeros = torch.arange(129 if narrow else 256, dtype=torch.uint8)
        constants = decode_groups.zero_constants(zeros, fmt, target)
        base = {"float16": 1024, "bfloat16": -128 if fmt.bits == 8 else 128}[target]
        total = (codes + base).to(dtype).double() + constants.view(dtype).double()
        assert torch.equal(total.to(dtype).double(), (codes - zeros.int()).double())
        assert torch.equal(decode_groups.zero_points(constants, fmt, target), zeros)
        if narrow:
            with pytest.raises(FormatError, match="zero point of 131"):
                decode_groups.zero_constants(torch.tensor([[5, 131]], dtype=torch.uint8), fmt, target)


def test_zero_points_beside_int8_are_bytes_and_at_most_128() -> None:
    fmt, zeros = formats.get("uint7"), torch.arange(129, dtype=torch.uint8)
    constants = decode_groups.zero_constants(zeros, fmt, "int8")
    assert torch.equal(constants.view(torch.uint8).view(-1, 2), zeros[:, None].expand(-1, 2))
    assert torch.equal(decode_groups.zero_points(constants, fmt, "int8"), zeros)
    with pytest.raises(FormatError, match="zero point of 129 in uint7 is beyond what int8 takes"):
        decode_groups.zero_constants(torch.tensor([[5, 129]], dtype=torch.uint8), fmt, "int8")


def test_where_scales_and_zero_points_lie() -> None:
    """The bytes that scales.cuh reads: [units, blocks, 4, S, 16] scales, then as many constants; or by rows."""
    oc, ic = 70, 300
    scheme = formats.get_scheme("uint4", 100, "float16")
    with pytest.raises(ValueError, match="multiple of 16"):
        scales.pack(torch.zeros(oc, 3), None, Packing.of(scheme, "float16"), ic)
    scheme = formats.get_scheme("uint4", 80, "bfloat16")
    ic = 240
    scale = torch.rand(oc, 3).bfloat16()
    zero_point = torch.randint(0, 16, (oc, 3), dtype=torch.uint8)
    packed = scales.pack(scale, zero_point, Packing.of(scheme, "bfloat16"), ic)
    in_block, size = 8, 16 * 8 * 2
    assert packed.numel() == 8 * 2 * 2 * size == 128 * 2 * Packing.of(scheme, "bfloat16").scale_row_bytes
    for row, channel in ((0, 0), (15, 79), (16, 80), (69, 239), (33, 128)):
        block = (row // 64 * 2 + channel // 128) * 4 + row % 64 // 16
        at = 2 * size * block + 2 * (channel % 128 * in_block // 128 * 16 + row % 16)
        assert packed[at : at + 2].view(torch.bfloat16) == scale[row, channel // 80]
        assert packed[size + at : size + at + 2].view(torch.bfloat16) == -128 - int(zero_point[row, channel // 80])
    scheme = formats.get_scheme("uint4", None, "float16")
    rows = scales.pack(scale[:, :1].half(), zero_point[:, :1], Packing.of(scheme, "float16"), ic)
    assert rows.numel() == 128 * 8
    assert torch.equal(rows.view(torch.float32).view(128, 2)[:oc, 0], scale[:, 0].half().float())
    pairs = rows.view(torch.float16).view(128, 4)[:oc, 2:].float()
    assert torch.equal(pairs, (-1024 - zero_point[:, :1].float()).expand(-1, 2))


@pytest.mark.parametrize("scale_dtype", list(formats.SCALE_DTYPES))
@pytest.mark.parametrize("group", [None, 16, 32, 48, 64, 80, 128, 256, 320])
def test_packed_weight_changes_layout_and_back(group: int | None, scale_dtype: str) -> None:
    scheme = formats.get_scheme("fp6_e3m2", group, scale_dtype)
    weight = torch.randn(37, 3 * (group or 100), generator=torch.Generator().manual_seed(1))
    packed = PackedWeight.from_encoded(quantize_rtn(weight, scheme))
    tiled = packed.to_layout("tiles_float16")
    assert tiled.to_layout("tiles_bfloat16").layout == "tiles_bfloat16"
    back = tiled.to_layout("tiles_bfloat16").to_layout("stream")
    assert torch.equal(back.data, packed.data)
    assert torch.equal(back.scale, packed.scale)
    assert back.scale.dtype == packed.scale.dtype
    assert torch.equal(tiled.dequantize(), packed.dequantize())
    if group is None or group % 32 == 0:
        assert torch.equal(tiled.to_layout("tiles_float8_e4m3fn").to_layout("stream").data, packed.data)
    else:
        with pytest.raises(FormatError, match="not a multiple of 32"):
            tiled.to_layout("tiles_float8_e4m3fn")


def test_scales_of_a_block() -> None:
    assert scales_in_block(None) == 0
    assert [scales_in_block(size) for size in (16, 32, 64, 128, 256, 80, 320, 384)] == [
        8,
        4,
        2,
        1,
        1,
        8,
        2,
        1,
    ]
    with pytest.raises(ValueError, match="multiple of 16"):
        scales_in_block(24)


@pytest.mark.parametrize("rows", [64, 72])
@pytest.mark.parametrize(
    ("name", "group", "target"),
    [("fp6_e3m2", None, "bfloat16"), ("uint4", 32, "float16"), ("int4", 32, "int8"), ("uint4", 64, "int8")],
)
def test_experts_that_change_layout_together_become_what_each_does(
    name: str, group: int | None, target: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    scheme, layout = formats.get_scheme(name, group), f"tiles_{target}"
    weights = [PackedWeight.from_encoded(quantize_rtn(torch.randn(rows, 192), scheme)) for _ in range(5)]
    monkeypatch.setattr(stacked, "_TOGETHER", {"cpu": 2 * rows * 192})  # two, two and one
    stack = StackedWeight.stack(weights)
    tiled = stack.to_layout(layout)
    for index, weight in enumerate(weights):
        found, wanted = tiled.expert(index), weight.to_layout(layout)
        assert (found.shape, found.layout) == (wanted.shape, layout)
        assert torch.equal(found.data, wanted.data) and torch.equal(found.scale, wanted.scale)
    back = tiled.to_layout("stream")
    assert torch.equal(back.data, stack.data) and torch.equal(back.scale, stack.scale)
    assert stack.zero_point is None or (back.zero_point is not None and torch.equal(back.zero_point, stack.zero_point))


def test_experts_of_whole_units_change_layout_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [PackedWeight.from_encoded(quantize_rtn(torch.randn(64, 128), formats.get_scheme("int8"))) for _ in range(6)]
    monkeypatch.setattr(stacked, "_TOGETHER", {"cpu": 3 * 64 * 128})
    steps, pack = [], tiles.pack
    monkeypatch.setattr(tiles, "pack", lambda codes, packing: steps.append(len(codes)) or pack(codes, packing))
    StackedWeight.stack(made).to_layout("tiles_float16")
    assert steps == [192, 192]
