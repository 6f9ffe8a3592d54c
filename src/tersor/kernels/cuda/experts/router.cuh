// The logits of a router for few tokens: out = x @ W^T + bias. A CTA has ROWS experts and TOKENS tokens, and each of its
// threads the same channels of all of them: weights lie in registers before the thread waits for the kernel ahead, and
// what is left is to read x, to add up products in float32, and to add up the sums of all threads. In which order, the
// number of channels alone says: a logit has the same bits beside whatever other tokens and experts.
// Parameters: BF16 (of x, and of a weight of 16 bits: 1 bf16, 0 fp16), FLOAT_WEIGHT (1: weight and bias are float32),
// FLOAT_OUT (1: logits are float32, else as x), PIECES (of eight channels that a thread has, at most), ROWS, TOKENS.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "small/pieces.cuh"

namespace router {

using pieces::kChannels;

constexpr int kMostThreads = 256;
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

}  // namespace router

extern "C" __global__ void __launch_bounds__(router::kMostThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,        // [tokens, channels]
    const void* __restrict__ weight,  // [experts, channels]
    const void* __restrict__ bias,    // [experts], or nothing
    void* out,                        // [tokens, experts]
    int tokens,
    int experts,
    int channels,  // a multiple of 8
    int ready) {   // whether weight and bias were there before the kernel ahead started
    using namespace router;
    __shared__ float of_warps[kWarps][kSums];
    launch::start_next();
    const int first_expert = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const int count = channels / kChannels, thread = threadIdx.x, threads = blockDim.x;
    const int expert = first_expert + thread / TOKENS, token = first_token + thread % TOKENS;  // of the thread at last
    const bool ends = thread < kSums && expert < experts && token < tokens;
    if (!ready) launch::wait_for_earlier();
    Weights weights[ROWS][PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = thread + i * threads;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            weights[row][i] = {};
            if (piece < count && first_expert + row < experts) {
                weights[row][i].load(weight, static_cast<long long>(first_expert + row) * count + piece);
            }
        }
    }
    float added = 0.0f;
    if (ends && bias != nullptr) added = bias_of(bias, expert);
    if (ready) launch::wait_for_earlier();

    float sums[kSums] = {};
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = thread + i * threads;
        pieces::Piece given[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            given[t] = {};
            if (piece < count && first_token + t < tokens) {
                given[t] = pieces::load(x + static_cast<long long>(first_token + t) * channels, piece);
            }
        }
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
    add_up<kSums>(sums);
    constexpr int kLanes = 32 / kSums;  // that have the same sum
    if (thread % kLanes == 0) of_warps[thread / 32][thread % 32 / kLanes] = sums[0];
    __syncthreads();
    if (!ends) return;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += warp * 32 < threads ? of_warps[warp][thread] : 0.0f;
    total += added;
    const long long at = static_cast<long long>(token) * experts + expert;
    if constexpr (FLOAT_OUT) {
        static_cast<float*>(out)[at] = total;
    } else {
        static_cast<u16*>(out)[at] = ptx::narrow<BF16>(total);
    }
}
