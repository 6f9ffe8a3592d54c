// What a warp multiplies with few queries: 16 tokens of keys and values, which lie in its own part of a ring. Keys stand
// on the 16 rows of a product and queries on its 8 columns, so that the heads that share keys fill it, and scores that
// do not exist cost nothing: S^T = K * Q^T, O^T = V^T * P^T.
#pragma once

#include "attention/pages.cuh"

namespace tile {

using pages::kDim;
using pages::kRowPieces;
using pages::kRowStride;

constexpr int kTokens = 16;
constexpr int kSteps = kDim / 16;  // products of 16 channels
constexpr int kHalfBytes = kTokens * kRowStride;
constexpr int kScaleBytes = pages::kE4m3 ? 2 * kTokens * 4 : 0;
constexpr int kBytes = 2 * kHalfBytes + kScaleBytes;  // keys, values, then scales of keys and of values

// Starts copies of the 16 tokens from `slot` of a page on, in two groups: keys with all scales, values. Of tokens from
// `known` on there are zeros.
__device__ __forceinline__ void fetch(
    u32 place, const unsigned char* all, const float* scales, int page, int kv_heads, int kv_head, int slot, int known) {
    const int lane = threadIdx.x % 32;
    if (pages::kE4m3 && lane < 8) {  // four scales a lane, past L1 as all that other SMs write
        const int token = lane % 4 * 4;
        const float* from = scales + pages::row_of(page, lane / 4, kv_heads, kv_head, slot + token);
        ptx::copy_async_16_zero_fill(place + 2 * kHalfBytes + lane * 16, from, 4 * max(min(known - token, 4), 0));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned char* from = all + pages::row_of(page, half, kv_heads, kv_head, slot) * pages::kRowBytes;
#pragma unroll
        for (int i = 0; i < (kTokens * kRowPieces + 31) / 32; ++i) {
            const int piece = lane + 32 * i, token = piece / kRowPieces;
            if (kTokens * kRowPieces % 32 != 0 && piece >= kTokens * kRowPieces) continue;
            const u32 to = place + half * kHalfBytes + token * kRowStride + piece % kRowPieces * 16;
            ptx::copy_async_16_zero_fill(to, from + piece * 16, token < known ? 16 : 0);
        }
        ptx::copy_async_commit();
    }
}

// Keys of 16 tokens and 16 channels as the first operand of a product.
__device__ __forceinline__ void keys(u32 (&fragment)[4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        const u32 from = place + lane / 4 * kRowStride + step * 16 + lane % 4 * 4;
        const u32 upper = ptx::load_shared(from), lower = ptx::load_shared(from + 8 * kRowStride);
        fragment[0] = pages::widen_e4m3<0, 1>(upper);
        fragment[1] = pages::widen_e4m3<0, 1>(lower);
        fragment[2] = pages::widen_e4m3<2, 3>(upper);
        fragment[3] = pages::widen_e4m3<2, 3>(lower);
    } else {
        ptx::load_matrices(fragment, place + lane % 16 * kRowStride + (2 * step + lane / 16) * 16);
    }
}

// Values of 16 tokens as the first operand, turned: 16 channels a fragment, two fragments where a byte is a number.
// Where they are of 16 bits, row r of a fragment is channel r; else rows r and r + 8 are channels 2 r and 2 r + 1.
constexpr int kFragments = pages::kE4m3 ? 2 : 1;

__device__ __forceinline__ void values(u32 (&fragments)[kFragments][4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        u32 words[4];
        const int piece = min(step + lane / 16, kSteps - 1);
        ptx::load_matrices_turned(words, place + lane % 16 * kRowStride + piece * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            fragments[i][0] = pages::widen_e4m3<0, 2>(words[2 * i]);
            fragments[i][1] = pages::widen_e4m3<1, 3>(words[2 * i]);
            fragments[i][2] = pages::widen_e4m3<0, 2>(words[2 * i + 1]);
            fragments[i][3] = pages::widen_e4m3<1, 3>(words[2 * i + 1]);
        }
    } else {
        const int token = lane % 8 + lane / 16 * 8;
        ptx::load_matrices_turned(fragments[0], place + token * kRowStride + (2 * step + lane / 8 % 2) * 16);
    }
}

// The channel, of 16, that a lane's sums of row `lane / 4` (lower: 0) or `lane / 4 + 8` (1) belong to.
__device__ __forceinline__ int channel_of(int lower) {
    const int row = threadIdx.x % 32 / 4;
    return pages::kE4m3 ? 2 * row + lower : row + 8 * lower;
}

}  // namespace tile
