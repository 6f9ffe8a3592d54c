// How a lane reads its scales and zero points: the same layout as in tersor/layouts/scales.py.
//
// A lane's registers belong to two rows, by turns: `row` and `row` + 8. With one scale a row the scales are float32,
// each followed by a pair of 16-bit floats where there are zero points; a table has four words in place of that. In groups, a block of 16 rows by 128 channels
// has [SCALE_GROUPS][16] scales of SCALE_TYPE, then as many 16-bit floats where there are zero points. What stands for
// a zero point is the number that decode::finish adds to a code or, of codes that become int8, the zero point twice. With
// RATIOS those of groups make int8 of the whole row: ahead of all blocks a row has its scale and what makes ratios of others.
//
// Parameters: SCALE_GROUPS (scales of one row in a block; 0: one scale a row), SCALE_TYPE, ZERO_POINTS, RATIOS.
#ifndef TERSOR_COMMON_SCALES  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_COMMON_SCALES

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"

namespace scales {

enum Type { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kE8m0 = 3 };  // as in tersor/layouts/packing.py

constexpr int kGroups = SCALE_GROUPS;
constexpr bool kZeroPoints = ZERO_POINTS;
constexpr bool kRatios = RATIOS;
constexpr int kSteps = tile::kSteps / (kGroups > 0 ? kGroups : 1);  // k16 steps under one scale
constexpr int kBytes = SCALE_TYPE == kFloat32 ? 4 : SCALE_TYPE == kE8m0 ? 1 : 2;
constexpr int kZeroOffset = kGroups * tile::kRows * kBytes;
constexpr int kBlockBytes = kZeroOffset + (kZeroPoints ? kGroups * tile::kRows * 2 : 0);
constexpr bool kTables = decode::kSpread > 1;
constexpr int kRowWords = kTables ? 4 : kZeroPoints || kRatios ? 2 : 1;  // of one scale, or table, a row

static_assert(SCALE_TYPE >= kFloat32 && SCALE_TYPE <= kE8m0, "SCALE_TYPE is a Type");
static_assert(!kRatios || kGroups > 0, "ratios are of scales in groups");
static_assert(kGroups == 0 || tile::kSteps % kGroups == 0, "a scale covers whole k16 steps");
static_assert(kBlockBytes % 16 == 0, "blocks are copied in pieces of 16 bytes");

// The scale of a row of a block; `block` points at the block's scales.
__device__ __forceinline__ float in_block(const char* block, int group, int row) {
    const int index = group * tile::kRows + row;
    if constexpr (SCALE_TYPE == kFloat32) {
        return reinterpret_cast<const float*>(block)[index];
    } else if constexpr (SCALE_TYPE == kE8m0) {
        // 2^(byte - 127): the byte is float32's exponent field; 2^-127 is a subnormal.
        return __uint_as_float(max(static_cast<u32>(static_cast<unsigned char>(block[index])) << 23, 0x00400000u));
    } else {
        return ptx::widen<SCALE_TYPE == kBfloat16>(reinterpret_cast<const u16*>(block)[index]);
    }
}

// One scale a row: that of a row of the matrix. What comes of a table needs none.
__device__ __forceinline__ float of_row(const float* scales, int row) { return kTables ? 1.0f : scales[row * kRowWords]; }

// What decode::finish adds to the codes of a lane's two rows, with one scale a row, or the tables of those, or what makes
// ratios of the scales of their groups. The registers of the second row are those that may be raised.
struct RowOffsets {
    u32 pairs[kTables ? 8 : 2] = {DECODE_CONSTANT, decode::raise(DECODE_CONSTANT)};
};

__device__ __forceinline__ RowOffsets row_offsets(const float* scales, int row, int rows) {
    RowOffsets offsets;
    if constexpr (kTables) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 table = reinterpret_cast<const uint4*>(scales)[min(row + 8 * half, rows - 1)];
            offsets.pairs[4 * half] = table.x;
            offsets.pairs[4 * half + 1] = table.y;
            offsets.pairs[4 * half + 2] = table.z;
            offsets.pairs[4 * half + 3] = table.w;
        }
    }
    if constexpr (kRatios) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            offsets.pairs[half] = __float_as_uint(scales[min(row + 8 * half, rows - 1) * kRowWords + 1]);
        }
    }
    if constexpr (kZeroPoints && kGroups == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int index = min(row + 8 * half, rows - 1);
            const u32 offset = __float_as_uint(scales[index * kRowWords + 1]);
            offsets.pairs[half] = half == 1 ? decode::raise(offset) : offset;
        }
    }
    return offsets;
}

// The zero point of a row of a block in each of four bytes, as decode::finish takes it from four codes at once.
__device__ __forceinline__ u32 zero_bytes(const char* block, int group, int row) {
    return reinterpret_cast<const u16*>(block + kZeroOffset)[group * tile::kRows + row] * 0x00010001u;
}

// What decode::apply_ratio takes of a row of a block: the ratio of its scale, and the offset. `inverse` are the bits of 256 by
// the row's scale.
struct Ratio {
    u32 ratio, offset;

    __device__ __forceinline__ static Ratio of(const char* block, int group, int row, u32 inverse) {
        const float rounded = __fmaf_rn(in_block(block, group, row), __uint_as_float(inverse), 12582912.0f);  // 1.5 * 2^23
        const u32 ratio = __float_as_uint(rounded) - 0x4B400000u;
        u32 zero = 1u << (tile::kBits - 1);
        if constexpr (kZeroPoints) zero = reinterpret_cast<const u16*>(block + kZeroOffset)[group * tile::kRows + row] & 0xFFu;
        return {ratio, (0x8080u - ratio * zero) * 0x00010001u};
    }
};

// decode::finish for the registers of a decode group that begins with k16 step `step` of a block.
template <bool kBf16>
__device__ __forceinline__ void finish(
    u32* registers, int step, const char* block, int row, const RowOffsets& offsets) {
    if constexpr (kTables) {
#pragma unroll
        for (int i = 0; i < decode::kRegisters; i += decode::kSpread) decode::choose(registers + i, offsets.pairs);
    } else {
#pragma unroll
        for (int i = 0; i < decode::kRegisters; ++i) {
            u32 offset = offsets.pairs[i % 2];
            if constexpr (kZeroPoints && kGroups > 0) {
                const u16* zeros = reinterpret_cast<const u16*>(block + kZeroOffset);
                offset = zeros[(step + i / 4) / kSteps * tile::kRows + row + i % 2 * 8] * 0x00010001u;
                if (i % 2 == 1) offset = decode::raise(offset);
            }
            registers[i] = decode::finish<kBf16>(registers[i], offset, i % 2 == 1);
        }
    }
}

}  // namespace scales

#endif  // TERSOR_COMMON_SCALES
