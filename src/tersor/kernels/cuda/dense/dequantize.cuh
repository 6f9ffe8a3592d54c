// Packed tiles to a dense 16-bit matrix: scratch[rows, IC] for a range of row blocks, for a product by cuBLAS.
//
// With one scale a row the decoded values are written without it (they are exact in 16 bits; the epilogue multiplies
// the float32 product); scales in groups are applied here and the value is rounded once. One warp takes one block.
//
// Where the weight keeps outliers, which have no scale, scales of rows are applied here, too, and a block's outliers are
// added before it is written: to zero exactly, to the number of a table rounded once more.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16, SCALE_GROUPS, SCALE_TYPE, ZERO_POINTS, RATIOS (scales.cuh), OUTLIERS (rounds
// that a block has of its own, outlier_rounds.cuh; 0: the weight keeps none).
#pragma once

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "common/scaled.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "dense/outlier_rounds.cuh"

namespace dequantize {

constexpr bool kBf16 = BF16;
constexpr int kWarps = 4;
constexpr int kRowWords = tile::kColumns / 2 + 4;  // 16 bytes of padding against bank conflicts
constexpr bool kOutliers = OUTLIERS > 0;
constexpr bool kScalesRows = kOutliers && scales::kGroups == 0 && !scales::kTables;

// A warp: adds the outliers of a block to its decoded values, [rows][2 * kRowWords]. A lane of the first 16 has one of every
// round; `round` is what it has of the first, which begins at `own`, and `next` are the further rounds of all blocks.
__device__ __forceinline__ void add_outliers(u16* values, uint4 round, const char* own, const char* next, int lane) {
    const int which = lane / 4;
    for (int turn = 1;; ++turn) {
        const u32 numbers = which / 2 ? round.z : round.x, places = which / 2 ? round.w : round.y;
        const u16 number = static_cast<u16>(numbers >> which % 2 * 16);
        const u32 place = places >> which % 2 * 16;
        if (lane < 16 && (number & 0x7FFF)) {
            u16& value = values[rounds::row_of(place) * 2 * kRowWords + rounds::channel_of(place)];
            value = ptx::narrow<kBf16>(ptx::widen<kBf16>(value) + ptx::widen<kBf16>(number));
        }
        if (!rounds::follows(round)) return;
        if (turn != OUTLIERS) {
            own += rounds::kBytes;
        } else {
            own = next + static_cast<long long>(rounds::first_further(round)) * rounds::kBytes;
        }
        round = __ldg(reinterpret_cast<const uint4*>(own + lane % 4 * 16));
    }
}

}  // namespace dequantize

extern "C" __global__ void __launch_bounds__(32 * dequantize::kWarps) TERSOR_ENTRY(
    const char* __restrict__ weight,
    const char* __restrict__ scale,
    u16* __restrict__ scratch,  // [row blocks of this call * 16, IC]
    int first_row_block,
    int rows,                   // rows of scratch to write
    int ic,
    float factor,
    const char* __restrict__ kept,  // outliers in rounds
    int weight_rows) {              // of the whole weight
    using namespace dequantize;
    __shared__ __align__(16) u32 exchange[kWarps][tile::kRows][kRowWords];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int blocks = (ic + tile::kColumns - 1) / tile::kColumns;
    const int column_block = blockIdx.x * kWarps + warp;
    if (column_block >= blocks) return;
    const long long block = tile::block_index(first_row_block + blockIdx.y, column_block, blocks);

    const char* block_scales = scale + block * scales::kBlockBytes;
    const int first_row = (first_row_block + blockIdx.y) * tile::kRows + lane / 4;
    // Rows are padded to whole blocks, with their scales.
    const scales::RowOffsets offsets =
        scales::row_offsets(reinterpret_cast<const float*>(scale), first_row, first_row + 9);

    const char* own = kept + block * OUTLIERS * rounds::kBytes;
    uint4 round;
    if constexpr (kOutliers) round = __ldg(reinterpret_cast<const uint4*>(own + lane % 4 * 16));
    float row_scales[2];
    if constexpr (kScalesRows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_scales[half] = scales::of_row(reinterpret_cast<const float*>(scale), first_row + 8 * half) * factor;
        }
    }
    u32 words[tile::kLaneWords];
    tile::load_lane(words, weight + block * tile::kBytes + lane * 16, lane);
    u32 pairs[decode::kRegisters];
#pragma unroll
    for (int step = 0; step < tile::kSteps; ++step) {
        const int first_pair = step * 4 % decode::kRegisters;
        if (first_pair == 0) {
            decode::extract(pairs, words + step * 4 / decode::kRegisters * decode::kWords);
            scales::finish<kBf16>(pairs, step, block_scales, lane / 4, offsets);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 pair = pairs[first_pair + i];
            const int row = lane / 4 + i % 2 * 8;
            if constexpr (scales::kGroups > 0) {
                pair = scales::scaled<kBf16>(pair, scales::in_block(block_scales, step / scales::kSteps, row) * factor);
            } else if constexpr (kScalesRows) {
                pair = scales::scaled<kBf16>(pair, row_scales[i % 2]);
            }
            exchange[warp][row][step * 8 + i / 2 * 4 + lane % 4] = pair;
        }
    }
    __syncwarp();
    u16* tile_values = reinterpret_cast<u16*>(exchange[warp]);
    if constexpr (kOutliers) {
        constexpr int kUnitBytes = tile::kUnitBlocks * OUTLIERS * rounds::kBytes;
        add_outliers(tile_values, round, own, rounds::further(kept, weight_rows, blocks, kUnitBytes), lane);
        __syncwarp();
    }
    for (int index = lane; index < tile::kRows * tile::kColumns / 8; index += 32) {
        const int row = index / (tile::kColumns / 8), column = index % (tile::kColumns / 8) * 8;
        const int target_row = blockIdx.y * tile::kRows + row;
        const int channel = column_block * tile::kColumns + column;
        if (target_row >= rows || channel >= ic) continue;
        const u16* source = tile_values + row * 2 * kRowWords + column;
        u16* target = scratch + static_cast<long long>(target_row) * ic + channel;
        if (ic % 8 == 0) {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
        } else {
            for (int i = 0; i < min(8, ic - channel); ++i) target[i] = source[i];
        }
    }
}
