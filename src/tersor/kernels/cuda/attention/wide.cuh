// What a CTA multiplies with many queries (FlashAttention-2: Dao, arXiv 2307.08691): they stand on the rows of products,
// 16 * ROW_TILES of them a warp, and pages of keys and values pass by in a ring.
// Parameters: those of pages.cuh, ROW_TILES (1 or 2), PAGE_PARTS (1 or 2: a page at once or, where registers are few, one
// half after the other), STAGES of a ring.
#pragma once

#include "attention/pages.cuh"

namespace wide {

using pages::kDim;
using pages::kRowStride;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = ROW_TILES;  // of 16 queries, of a warp
constexpr int kQueries = 16 * kTiles * kWarps;
constexpr int kSteps = kDim / 16;
constexpr int kParts = PAGE_PARTS;
constexpr int kPartTokens = pages::kTokens / kParts;
constexpr int kKeyTiles = kPartTokens / 8;
constexpr int kHalfBytes = pages::kTokens * kRowStride;
constexpr int kScaleBytes = pages::kE4m3 ? pages::kTokens * 4 : 0;
constexpr int kSlotBytes = kHalfBytes + kScaleBytes;  // keys or values of a page, then their scales
constexpr int kQueriesAt = 2 * STAGES * kSlotBytes;
constexpr int kWideBytes = kQueriesAt + kQueries * pages::kQueryStride;  // the ring, then queries

// Starts copies of a page's keys (half 0) or values (1), of its first `there` tokens; others become zeros.
__device__ __forceinline__ void fetch(
    u32 place, const unsigned char* all, const float* scales, int page, int half, int kv_heads, int kv_head, int there) {
    const long long row = pages::row_of(page, half, kv_heads, kv_head, 0);
    const unsigned char* from = all + row * pages::kRowBytes;
    constexpr int kPieces = pages::kTokens * pages::kRowPieces;
#pragma unroll
    for (int i = 0; i < (kPieces + kThreads - 1) / kThreads; ++i) {
        const int piece = threadIdx.x + kThreads * i, token = piece / pages::kRowPieces;
        if (kPieces % kThreads != 0 && piece >= kPieces) continue;
        const u32 to = place + token * kRowStride + piece % pages::kRowPieces * 16;
        ptx::copy_async_16_zero_fill(to, from + piece * 16, token < there ? 16 : 0);
    }
    if (pages::kE4m3 && threadIdx.x < pages::kTokens / 4) {
        const int token = threadIdx.x * 4;
        const u32 bytes = 4 * max(min(there - token, 4), 0);
        ptx::copy_async_16_zero_fill(place + kHalfBytes + token * 4, scales + row + token, bytes);
    }
}

// Keys of 16 tokens and 16 channels as the second operands of two products: [tokens 0-7, 8-15][channels].
__device__ __forceinline__ void keys(u32 (&fragment)[4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        const u32 from = place + lane / 4 * kRowStride + step * 16 + lane % 4 * 4;
        const u32 one = ptx::load_shared(from), other = ptx::load_shared(from + 8 * kRowStride);
        fragment[0] = pages::widen_e4m3<0, 1>(one);
        fragment[1] = pages::widen_e4m3<2, 3>(one);
        fragment[2] = pages::widen_e4m3<0, 1>(other);
        fragment[3] = pages::widen_e4m3<2, 3>(other);
    } else {
        const int token = lane % 8 + lane / 16 * 8;
        ptx::load_matrices(fragment, place + token * kRowStride + (2 * step + lane / 8 % 2) * 16);
    }
}

// Values of 16 tokens as the second operands of two products for every 16 channels: of channels 0-7 and 8-15 or, where
// a byte is a number, even and odd ones.
constexpr int kFragments = pages::kE4m3 ? 2 : 1;

__device__ __forceinline__ void values(u32 (&fragments)[kFragments][4], u32 place, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (pages::kE4m3) {
        u32 words[4];
        ptx::load_matrices_turned(words, place + lane % 16 * kRowStride + min(step + lane / 16, kSteps - 1) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            fragments[i][0] = pages::widen_e4m3<0, 2>(words[2 * i]);
            fragments[i][1] = pages::widen_e4m3<0, 2>(words[2 * i + 1]);
            fragments[i][2] = pages::widen_e4m3<1, 3>(words[2 * i]);
            fragments[i][3] = pages::widen_e4m3<1, 3>(words[2 * i + 1]);
        }
    } else {
        ptx::load_matrices_turned(fragments[0], place + lane % 16 * kRowStride + (2 * step + lane / 16) * 16);
    }
}

// Of a warp's queries: a lane has rows lane / 4 and lane / 4 + 8 of each tile.
struct Sums {
    float outputs[kTiles][2 * kSteps][4];
    float largest[kTiles][2];
    float weights[kTiles][2];
};

__device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][kKeyTiles][4], u32 place, u32 queries) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        u32 rows[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const u32 from = queries + (16 * t + lane % 16) * pages::kQueryStride;
            ptx::load_matrices(rows[t], from + (2 * step + lane / 16) * 16);
        }
#pragma unroll
        for (int k = 0; k < kKeyTiles; k += 2) {
            u32 fragment[4];
            keys(fragment, place + 8 * k * kRowStride, step);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                ptx::multiply_add<pages::kBf16Products>(scores[t][k], rows[t], fragment[0], fragment[1]);
                ptx::multiply_add<pages::kBf16Products>(scores[t][k + 1], rows[t], fragment[2], fragment[3]);
            }
        }
    }
}

__device__ __forceinline__ void multiply_values(
    Sums& sums, const float (&weights)[kTiles][kKeyTiles][4], u32 place) {
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
        u32 rows[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = weights[t][k + i / 2] + i % 2 * 2;
                rows[t][i] = ptx::narrow_pair<pages::kBf16Products>(pair[0], pair[1]);
            }
        }
#pragma unroll
        for (int step = 0; step < kSteps; step += kFragments) {
            u32 fragments[kFragments][4];
            values(fragments, place + 8 * k * kRowStride, step);
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                if (step + i >= kSteps) continue;
#pragma unroll
                for (int t = 0; t < kTiles; ++t) {
                    float(&low)[4] = sums.outputs[t][2 * (step + i)];
                    float(&high)[4] = sums.outputs[t][2 * (step + i) + 1];
                    ptx::multiply_add<pages::kBf16Products>(low, rows[t], fragments[i][0], fragments[i][1]);
                    ptx::multiply_add<pages::kBf16Products>(high, rows[t], fragments[i][2], fragments[i][3]);
                }
            }
        }
    }
}

// Scores, which `factor` brings to powers of two, become weights; sums so far are brought to the new largest score.
__device__ __forceinline__ void weigh(Sums& sums, float (&scores)[kTiles][kKeyTiles][4], float factor) {
    float of_old[kTiles][2];
    bool moved = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = sums.largest[t][half];
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
                largest = fmaxf(largest, fmaxf(scores[t][k][2 * half], scores[t][k][2 * half + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
            const float least = largest == pages::lowest() ? 0.0f : largest * factor;
            of_old[t][half] = ptx::power_of_two(sums.largest[t][half] * factor - least);
            moved |= largest != sums.largest[t][half];
            sums.largest[t][half] = largest;
            float total = 0.0f;
#pragma unroll
            for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[t][k][i] = ptx::power_of_two(scores[t][k][i] * factor - least);
                    total += scores[t][k][i];
                }
            }
            sums.weights[t][half] = sums.weights[t][half] * of_old[t][half] + total;
        }
    }
    if (!__any_sync(~0u, moved)) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int step = 0; step < 2 * kSteps; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.outputs[t][step][i] *= of_old[t][i / 2];
        }
    }
}

// Multiplies what belongs to a page's tokens with their scales.
__device__ __forceinline__ void scale_by_token(float (&scores)[kTiles][kKeyTiles][4], u32 scales) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float scale = ptx::load_shared_float(scales + (8 * k + 2 * (lane % 4) + i) * 4) * pages::kUnit;
#pragma unroll
            for (int t = 0; t < kTiles; ++t) {
                scores[t][k][i] *= scale;
                scores[t][k][i + 2] *= scale;
            }
        }
    }
}

}  // namespace wide
