// Packed tiles to a dense 16-bit matrix: scratch[rows, IC] for a range of row blocks, for a product by cuBLAS.
//
// With one scale a row the decoded values are written without it (they are exact in 16 bits; the epilogue multiplies
// the float32 product); scales in groups are applied here and the value is rounded once. One warp takes one block.
//
// Parameters: BITS and DECODE_* (decode.cuh), BF16, SCALE_GROUPS, SCALE_TYPE, ZERO_POINTS and RATIOS (scales.cuh).
#pragma once

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "common/scaled.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"

namespace dequantize {

constexpr bool kBf16 = BF16;
constexpr int kWarps = 4;
constexpr int kRowWords = tile::kColumns / 2 + 4;  // 16 bytes of padding against bank conflicts

}  // namespace dequantize

extern "C" __global__ void __launch_bounds__(32 * dequantize::kWarps) TERSOR_ENTRY(
    const char* __restrict__ weight,
    const char* __restrict__ scale,
    u16* __restrict__ scratch,  // [row blocks of this call * 16, IC]
    int first_row_block,
    int rows,                   // rows of scratch to write
    int ic,
    float factor) {
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
            }
            exchange[warp][row][step * 8 + i / 2 * 4 + lane % 4] = pair;
        }
    }
    __syncwarp();
    const u16* tile_values = reinterpret_cast<const u16*>(exchange[warp]);
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
