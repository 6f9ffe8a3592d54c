// What a weight keeps beside its codes (tersor/formats/outliers.py): the finishing warps of few tokens add it to their
// scaled sums, each lane to those of its own rows and tokens.
//
// Activations are read past the rings, a channel's tokens at a time: as dense/turned.cuh leaves them, [IC, stride], or of
// at most kDirect tokens where they stand, [n, stride]. Of so few the four lanes that share a row take its outliers in
// turn, and add up; of more each takes all of them, for two tokens of every eight.
//
// Parameter: OUTLIERS (0: none, 1: kept as fp16, 2: as bf16).
#ifndef TERSOR_DENSE_SM90_OUTLIERS  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_OUTLIERS

#include "common/ptx.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

constexpr bool kOutliers = OUTLIERS > 0;
static_assert(!kOutliers || !(kMany || kPlaced || kNormIn || kNormOut), "of few tokens, with nothing else about them");

// What a launch has of them.
struct Kept {
    const u32* words;  // [oc, count]: a column in the lower 16 bits, the weight in the upper
    const u16* x;      // activations, as above
    int count, stride;
};

// One warp: the words of an item's rows go to L2 while products are made.
__device__ __forceinline__ void fetch_words(const Kept& kept, const Item& item, int rows) {
    constexpr int kOfLine = 32;
    const long long first = static_cast<long long>(item.first_row) * kept.count;
    const int count = min(kRows, rows - item.first_row) * kept.count;
    for (int i = threadIdx.x % 32 * kOfLine; i < count; i += 32 * kOfLine) ptx::prefetch(kept.words + first + i);
}

struct Beside {
    static constexpr int kDirect = 4;   // tokens that are read where they stand
    static constexpr int kEights = kTokens / 8;
    static constexpr int kLoads = RESIDENT > 1 && kRowGroups > 1 ? 2 : 16;  // under way together, by what registers hold
    static constexpr int kAtOnce = kEights > 6 ? 2 : kEights > 2 ? 4 : kLoads / kEights;  // words of these
    float of[kOutliers ? kSums : 1];    // as sums are

    // Sums up what this lane's rows keep; `n` tokens are multiplied in all.
    __device__ __forceinline__ void sum(const Kept& kept, const Item& item, int first_row, int rows, int n) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kSums; ++i) of[i] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + 8 * half;
            const u32 words = static_cast<u32>(row < rows ? row : 0) * kept.count;  // the first of its row
            if (n <= kDirect) {
                sum_direct(kept, words, half, n);
            } else {
                sum_turned(kept, words, half, item);
            }
        }
    }

private:
    __device__ __forceinline__ void sum_direct(const Kept& kept, u32 words, int half, int n) {
        constexpr int kWords = kLoads < 16 ? 1 : 4;
        const int quad = threadIdx.x % 4;
        float own[kDirect] = {};
#pragma unroll 1
        for (int base = quad; base < kept.count; base += 4 * kWords) {
            u32 word[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                word[i] = base + 4 * i < kept.count ? __ldg(kept.words + (words + base + 4 * i)) : 0;
            }
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
#pragma unroll
                for (int token = 0; token < kDirect; ++token) {
                    if (base + 4 * i >= kept.count || token >= n) continue;
                    const u16 x = __ldcg(kept.x + (token * kept.stride + (word[i] & 0xffff)));
                    own[token] = __fmaf_rn(weight(word[i]), ptx::widen<kBf16>(x), own[token]);
                }
            }
        }
#pragma unroll
        for (int token = 0; token < kDirect; ++token) {
            own[token] += __shfl_xor_sync(~0u, own[token], 1);
            own[token] += __shfl_xor_sync(~0u, own[token], 2);
            if (token / 2 == quad) of[2 * half + token % 2] = own[token];
        }
    }

    __device__ __forceinline__ void sum_turned(const Kept& kept, u32 words, int half, const Item& item) {
        const u32 tokens = item.first_token + threadIdx.x % 4 * 2;
#pragma unroll 1
        for (int base = 0; base < kept.count; base += kAtOnce) {
            u32 word[kAtOnce], pairs[kAtOnce][kEights];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) word[i] = base + i < kept.count ? __ldg(kept.words + (words + base + i)) : 0;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const u32 column = tokens + (word[i] & 0xffff) * kept.stride;  // elements are fewer than 2^32
#pragma unroll
                for (int j = 0; j < kEights; ++j) {
                    const bool there = base + i < kept.count && item.first_token + 8 * j < item.end_token;
                    pairs[i][j] = there ? __ldcg(reinterpret_cast<const u32*>(kept.x + (column + 8 * j))) : 0;
                }
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int j = 0; j < kEights; ++j) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        const float x = ptx::widen<kBf16>(static_cast<u16>(pairs[i][j] >> 16 * odd));
                        float& sum = of[4 * j + 2 * half + odd];
                        sum = __fmaf_rn(weight(word[i]), x, sum);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ static float weight(u32 word) {
        return ptx::widen<OUTLIERS == 2>(static_cast<u16>(word >> 16));
    }
};

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_OUTLIERS
