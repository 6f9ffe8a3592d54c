// What the logits of a router for few tokens are made of: out = x @ W^T + bias, where a CTA has ROWS experts and TOKENS
// tokens, and each of its threads the same channels of all of them. Products are added up in float32; in which order, the
// number of channels alone says: a logit has the same bits beside whatever other tokens and experts.
// Parameters: BF16 (of x, and of a weight of 16 bits: 1 bf16, 0 fp16), FLOAT_WEIGHT (1: weight and bias are float32),
// PIECES (of eight channels that a thread has, at most), ROWS, TOKENS.
#pragma once

#include "common/ptx.cuh"
#include "small/pieces.cuh"

namespace router {

using pieces::kChannels;

constexpr int kMostThreads = 256;  // that have channels
constexpr int kWarps = kMostThreads / 32;
constexpr int kSums = ROWS * TOKENS;  // of a thread: those of TOKENS tokens with the first expert, then the next one's
static_assert(kSums <= 32 && (kSums & (kSums - 1)) == 0);

// Eight channels of a weight, as they are stored.
struct Weights {
    u32 words[FLOAT_WEIGHT ? 8 : 4];

    __device__ __forceinline__ void load(const void* weight, long long piece) {
        const uint4* from = static_cast<const uint4*>(weight) + piece * (FLOAT_WEIGHT ? 2 : 1);
#pragma unroll
        for (int i = 0; i < (FLOAT_WEIGHT ? 2 : 1); ++i) {
            const uint4 found = __ldcg(from + i);
            words[4 * i] = found.x;
            words[4 * i + 1] = found.y;
            words[4 * i + 2] = found.z;
            words[4 * i + 3] = found.w;
        }
    }

    __device__ __forceinline__ float channel(int k) const {
        if constexpr (FLOAT_WEIGHT) {
            return __uint_as_float(words[k]);
        } else {
            return ptx::widen<BF16>(static_cast<u16>(words[k / 2] >> 16 * (k % 2)));
        }
    }
};

__device__ __forceinline__ float bias_of(const void* bias, int expert) {
    if constexpr (FLOAT_WEIGHT) {
        return __ldcg(static_cast<const float*>(bias) + expert);
    } else {
        return ptx::widen<BF16>(__ldcg(static_cast<const u16*>(bias) + expert));
    }
}

// Adds up what all lanes have of kCount sums: lane i gets sum i / (32 / kCount), in sums[0]. A lane gives half of the sums
// away in each step while it has several, and all take part in one then; lanes meet in the same order whatever kCount is.
template <int kCount, int kLanes = 16>
__device__ __forceinline__ void add_up(float (&sums)[kSums]) {
    if constexpr (kCount > 1) {
        const bool upper = threadIdx.x & kLanes;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float given = upper ? sums[i] : sums[i + kCount / 2];
            sums[i] = (upper ? sums[i + kCount / 2] : sums[i]) + __shfl_xor_sync(~0u, given, kLanes);
        }
    } else {
        sums[0] += __shfl_xor_sync(~0u, sums[0], kLanes);
    }
    if constexpr (kLanes > 1) add_up<(kCount > 1 ? kCount / 2 : 1), kLanes / 2>(sums);
}

// The weights of ROWS experts from `first` on that a thread has, nothing beyond the last expert. `count`: pieces of a row.
using Held = Weights[ROWS][PIECES];
__device__ __forceinline__ void load_weights(
    Held& weights, const void* weight, int first, int experts, int count, int threads) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = static_cast<int>(threadIdx.x) + i * threads;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            weights[row][i] = {};
            if (static_cast<int>(threadIdx.x) < threads && piece < count && first + row < experts) {
                weights[row][i].load(weight, static_cast<long long>(first + row) * count + piece);
            }
        }
    }
}

// The i-th piece that a thread has of TOKENS tokens from `first` on, zeros beyond the last one.
using Piece = pieces::Piece[TOKENS];
__device__ __forceinline__ void load_tokens(
    Piece& given, const u16* x, int i, int first, int tokens, int count, int threads) {
    const int piece = static_cast<int>(threadIdx.x) + i * threads;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        given[t] = {};
        if (static_cast<int>(threadIdx.x) < threads && piece < count && first + t < tokens) {
            given[t] = pieces::load(x + static_cast<long long>(first + t) * count * kChannels, piece);
        }
    }
}

__device__ __forceinline__ void multiply(float (&sums)[kSums], const Held& weights, int i, const Piece& given) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const float factor = weights[row][i].channel(k);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                float& sum = sums[row * TOKENS + t];
                sum = fmaf(ptx::widen<BF16>(given[t].values[k]), factor, sum);
            }
        }
    }
}

// Adds up what all threads have: thread i of the first kSums gets sum i. Every thread of the CTA must call it.
__device__ __forceinline__ float total_of(float (&sums)[kSums], int threads) {
    __shared__ float of_warps[kWarps][kSums];
    constexpr int kLanes = 32 / kSums;  // that have the same sum
    const int thread = threadIdx.x;
    add_up<kSums>(sums);
    if (thread < threads && thread % kLanes == 0) of_warps[thread / 32][thread % 32 / kLanes] = sums[0];
    __syncthreads();
    float total = 0.0f;
    if (thread < kSums) {
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += warp * 32 < threads ? of_warps[warp][thread] : 0.0f;
    }
    return total;
}

}  // namespace router
