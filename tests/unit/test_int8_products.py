"""The warps of the sm90 schedule that multiply bytes, on a CPU: from kernel tiles and activations to sums, exactly."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.emulated import COMPILER, CUDA, HERE

from tersor.compress import quantize_rtn
from tersor.formats import Activations, get_scheme, scale_values
from tersor.hardware import CHIPS
from tersor.kernels import dense
from tersor.kernels.tune import sm90
from tersor.kernels.tune import tile as tiles
from tersor.layouts import PackedWeight, ratios
from tersor.layouts.packing import BYTEWISE

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

H200 = CHIPS["NVIDIA H200"]
RUN = """
static unsigned char slots[1 << 20], x_slots[256 << 10];
extern "C" void run(
    const unsigned char* weight, const unsigned char* scale, const signed char* x, const float* x_scale, int count,
    int use, float* out) {
    using namespace linear;
    emulated::open.assign(kConsumers, {});
    emulated::arrivals.assign(emulated::kWeightBarriers, 0);
    emulated::x_slot_bytes = kXSlotBytes;
    const unsigned char* block_scales = scale + (scales::kRatios ? kRowGroups * kRowTermBytes : 0);
    for (int block = 0; block < count; ++block) {
        unsigned char* own = slots + kWeightsAt + (use + block) % kWeightSlots * kWeightSlotBytes;
        for (int group = 0; group < kRowGroups; ++group) {
            const int unit = group * count + block;
            memcpy(own + group * tile::kUnitBytes, weight + unit * tile::kUnitBytes, tile::kUnitBytes);
            unsigned char* own_scales = own + kRowGroups * tile::kUnitBytes + group * kScaleBytes;
            memcpy(own_scales, block_scales + unit * kScaleBytes, kScaleBytes);
        }
        memcpy(slots + kXScalesAt + (use + block) % kXSlots * kXScaleBytes, x_scale + block * kTokens, kXScaleBytes);
        for (int i = 0; i < kTokens * 128; ++i) {
            const u32 at = (use + block) % kXSlots * kXSlotBytes + i;
            x_slots[at ^ (at >> 7 & 7) << 4] = x[i / 128 * count * 128 + block * 128 + i % 128];
        }
    }
    emulated::run({1, 1, 1}, kConsumers, use, [=] {
        memcpy(attention_memory, x_slots, kXSlots * kXSlotBytes);
        const XRing xs{0, kXSlotBytes, 0};
        const WeightRing weights{kWeightsAt, kWeightSlotBytes, emulated::kWeightBarriers};
        const int row = threadIdx.x / 128 * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        const auto offsets = scales::row_offsets(reinterpret_cast<const float*>(scale), row, kRows);
        Sum sums[kSums];
        multiply_blocks(sums, weights, xs, reinterpret_cast<const char*>(slots), use, count, offsets);
        for (int i = 0; i < kSums; ++i) {
            const int own_row = row + i % 4 / 2 * 8, token = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
            out[own_row * kTokens + token] = static_cast<float>(sums[i]);
        }
    });
    for (int block = 0; block < count; ++block) {
        const int x_slot = (use + block) % kXSlots, slot = (use + block) % kWeightSlots;
        const int given = emulated::arrivals[x_slot * 2 + 1];
        if (given != kConsumers) emulated::fail("activations are handed back another number of times");
        if (emulated::arrivals[emulated::kWeightBarriers / 8 + slot * 2 + 1] != kConsumers) {
            emulated::fail("weights are handed back another number of times");
        }
    }
}
"""


def sums_of(
    weight: PackedWeight, x: torch.Tensor, x_scale: torch.Tensor, tile: sm90.Tile, use: int, folder: Path
) -> torch.Tensor:
    """What the warps of a tile have as sums, [rows, tokens], with `use` blocks before; x_scale is [blocks, tokens]."""
    packing = weight.to_layout(f"tiles_{BYTEWISE[tile.activations]}").packing
    bits, row_bytes = packing.scheme.format.bits, packing.scale_row_bytes
    slots, shared = tile.slots(bits, row_bytes, H200), tile.shared_bytes(bits, row_bytes, H200)
    source = dense.sm90_source(packing, "float16", tile, slots, shared)
    defines = [f"#define {name} {int(v) if isinstance(v, bool) else v}" for name, v in source.parameters.items()]
    for name in ("ptx", "ring", "wgmma"):
        (folder / "common").mkdir(exist_ok=True)
        (folder / "common" / f"{name}.cuh").write_text('#pragma once\n#include "emulated_bytes.hpp"\n')
    includes = '#include "emulated_bytes.hpp"\n#include "dense/sm90_multiply_pieces.cuh"'
    (folder / "unit.cpp").write_text("\n".join([*defines, includes, RUN]))
    assert COMPILER is not None
    options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
    paths = [f"-I{place}" for place in (folder, HERE, CUDA)]
    subprocess.run([COMPILER, *options, *paths, str(folder / "unit.cpp"), "-o", str(folder / "unit.so")], check=True)
    tiled, out = (
        weight.to_layout(f"tiles_{BYTEWISE[tile.activations]}"),
        torch.full((tile.rows, tile.tokens), torch.nan),
    )
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (tiled.data, tiled.scale, x, x_scale, out)]
    ctypes.CDLL(str(folder / "unit.so")).run(*addresses[:4], x.shape[1] // 128, use, addresses[4])
    return out * packing.factor


@pytest.mark.parametrize(
    ("activations", "name", "group_size", "shape", "blocks", "use"),
    [
        (Activations.INT8, "int8", None, (16, 1, 2), 3, 10),  # two buffers in turn, an odd block more
        (Activations.INT8, "uint5", None, (144, 2, 1), 2, 1),  # one buffer, zero points by rows
        (Activations.INT8, "uint4", 128, (16, 2, 1), 2, 0),  # whole rows by ratios
        (Activations.INT8, "int4", 32, (32, 1, 2), 3, 5),
        (Activations.INT8, "uint5", 64, (144, 2, 1), 2, 1),
        (Activations.INT8, "uint4", 128, (256, 2, 1), 3, 4),
        (Activations.INT8, "uint6", 128, (16, 2, 1), 2, 0),  # sums of groups
        (Activations.INT8, "int7", 32, (32, 1, 2), 2, 5),
        (Activations.INT8_GROUPS, "int8", None, (16, 1, 2), 3, 10),
        (Activations.INT8_GROUPS, "uint5", None, (16, 2, 1), 2, 0),
        (Activations.INT8_GROUPS, "uint4", 64, (32, 1, 2), 2, 5),
        (Activations.E4M3, "int5", None, (16, 1, 2), 5, 3),  # sums settle after four blocks
        (Activations.E4M3, "uint3", None, (144, 2, 1), 2, 1),
        (Activations.E4M3, "uint4", 64, (16, 2, 1), 2, 0),
        (Activations.INT8, "uint6", 128, (256, 2, 1), 3, 4),  # pieces of the tokens
        (Activations.INT8, "int8", 128, (192, 2, 1), 1, 0),
        (Activations.INT8_GROUPS, "int8", None, (256, 2, 1), 2, 7),
        (Activations.INT8_GROUPS, "uint6", 128, (256, 2, 1), 2, 1),
        (Activations.E4M3, "uint4", 128, (256, 2, 1), 2, 9),
    ],
)
def test_sums_are_those_of_whole_numbers(
    activations: Activations,
    name: str,
    group_size: int | None,
    shape: tuple[int, int, int],
    blocks: int,
    use: int,
    tmp_path: Path,
) -> None:
    tile = sm90.Tile(shape[0], shape[1], 1, 1, shape[2], activations)
    generator, ic = torch.Generator().manual_seed(blocks), 128 * blocks
    plain = torch.randn(tile.rows, ic, generator=generator) + 0.3
    weight = PackedWeight.from_encoded(quantize_rtn(plain, get_scheme(name, group_size)))
    most = 16 if activations is Activations.E4M3 else 127  # whole numbers, whose sums are exact in e4m3, too
    x = torch.randint(-most, most + 1, (tile.tokens, ic), generator=generator).to(activations.dtype)
    x_scale = torch.rand(blocks, tile.tokens, generator=generator)
    found = sums_of(weight, x, x_scale, tile, use, tmp_path)
    (scale, zero_point), groups = weight.stored_scales(), weight.scheme.groups(ic)
    by_ratios = activations is Activations.INT8 and ratios.applies(weight.scheme)
    if by_ratios:
        numbers, _ = ratios.whole_numbers(weight.codes(), scale, zero_point, weight.scheme)
        numbers = numbers.view(tile.rows, groups, -1)
    else:
        numbers = weight.scheme.format.decode(weight.codes()).view(tile.rows, groups, -1)
        if zero_point is not None:
            numbers = numbers - zero_point.float()[:, :, None]
    if activations.group_size is None and (group_size is None or by_ratios):
        assert torch.equal(found, (numbers.view(tile.rows, ic).long() @ x.long().T).float())
        return
    scales = 1 if group_size is None or by_ratios else scale_values(scale, weight.scheme).double()[:, :, None]
    values = (numbers.double() * scales).view(tile.rows, ic)
    scaled = x.double() if activations.group_size is None else activations.dequantize(x, x_scale.T.double())
    expected = values @ scaled.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_sums_are_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of sums does not depend on the form of the kernel."""
    generator, ic = torch.Generator().manual_seed(1), 256
    tile = sm90.Tile(128, 2, 1, 1, 1, Activations.INT8)
    weight = PackedWeight.from_encoded(
        quantize_rtn(torch.randn(128, ic, generator=generator) + 0.3, get_scheme("uint6", 128))
    )
    x = torch.randint(-127, 128, (128, ic), generator=generator).to(torch.int8)
    found = []
    for least in (160, 128):
        monkeypatch.setattr(tiles, "PIECES_FROM", least)
        folder = tmp_path / str(least)
        folder.mkdir()
        found.append(sums_of(weight, x, torch.ones(2, 128), tile, 3, folder))
    assert torch.equal(*found)
