// Normalises many rows: what norm.cuh computes, bit for bit, but a warp has a row, and nobody waits for a CTA.
// A lane has what thread `lane` of every warp there would have, and its sums are added in the order of that CTA. While a
// row is written the next one comes to the same registers. Weights stand in shared memory.
// Parameters: BF16 (1: bf16, 0: fp16), LAYER (1: layer norm), PIECES and WARPS (of that CTA: 16 bytes that a thread has,
// and warps), E4M3 (0 or 1), RESIDENT (CTAs of a multiprocessor).
#pragma once

#include "common/e4m3.cuh"
#include "common/launch.cuh"
#include "small/norms.cuh"
#include "small/over_block.cuh"

namespace norms {

constexpr int kRows = 4;  // of a CTA at a time
constexpr int kOfLane = PIECES * WARPS;
constexpr int kSure = PIECES * (WARPS - 1);  // of those a lane has so many in any row
constexpr int kAtOnce = 4;                   // pieces of a residual that are under way together
static_assert(WARPS <= kWarps);

// Of 2 kHalf sums of every lane, lanes whose bit of 2 kHalf is set hand the first ones to their partners and keep the
// others, until a lane has one: of warp lane / 2.
template <int kHalf>
__device__ __forceinline__ float one_of_warps(const float* sums) {
    if constexpr (kHalf == 0) {
        return sums[0];
    } else {
        const bool upper = threadIdx.x & 2 * kHalf;
        float kept[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const float given = upper ? sums[i] : sums[i + kHalf];
            kept[i] = (upper ? sums[i + kHalf] : sums[i]) + __shfl_xor_sync(~0u, given, 2 * kHalf);
        }
        return one_of_warps<kHalf / 2>(kept);
    }
}

// What all threads of a CTA of norm.cuh have, added up as there: `sums` are those of thread `lane` of each warp.
__device__ __forceinline__ float over_warps(const float (&sums)[kWarps]) {
    float total = one_of_warps<kWarps / 2>(sums);
    total += __shfl_xor_sync(~0u, total, 1);
#pragma unroll
    for (int lanes = 16; lanes > 1; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
    return total;
}

// The compiler does not begin with piece i and those behind it before those ahead: it would run out of registers.
__device__ __forceinline__ void pause(int i) {
    if (i % kAtOnce == 0) __syncwarp();
}

__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
    return value;
}

}  // namespace norms

extern "C" __global__ void __launch_bounds__(norms::kRows * 32, RESIDENT) TERSOR_ENTRY(
    const u16* __restrict__ x,  // as in norm.cuh, like all the rest
    const u16* __restrict__ weight,
    const u16* __restrict__ bias,
    const u16* __restrict__ residual,
    void* out,
    float* scales,
    long long stride,
    long long out_stride,
    int rows,
    int channels,
    float eps,
    float offset,
    int ready) {
    using namespace norms;
    __shared__ float4 weights[2 * kOfLane * 32];  // with the offset: first halves of all pieces, then second ones
    __shared__ uint4 biases[LAYER ? kOfLane * 32 : 1];
    launch::start_next();
    const int lane = threadIdx.x % 32, count = channels / kChannels;
    const auto has = [&](int i) { return i < kSure || i * 32 + lane < count; };
    if (!ready) launch::wait_for_earlier();
    for (int piece = threadIdx.x; piece < count; piece += kRows * 32) {
        float wide[kChannels];
        widen_weights(load(weight, piece), offset, wide);
        weights[piece] = {wide[0], wide[1], wide[2], wide[3]};
        weights[kOfLane * 32 + piece] = {wide[4], wide[5], wide[6], wide[7]};
        if constexpr (LAYER) {
            biases[piece] = bias == nullptr ? uint4{} : __ldcg(reinterpret_cast<const uint4*>(bias) + piece);
        }
    }
    if (ready) launch::wait_for_earlier();
    int row = blockIdx.x * kRows + threadIdx.x / 32;
    Words given[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        given[i] = {};
        if (has(i) && row < rows) given[i] = load(x + row * stride, i * 32 + lane);
    }
    __syncthreads();
#pragma unroll 1
    for (; row < rows; row += gridDim.x * kRows) {
        float mean = 0.0f;
        if constexpr (LAYER) {
            float sums[kWarps] = {};
#pragma unroll
            for (int i = 0; i < kOfLane; ++i) {
                pause(i);
                add_values(given[i], sums[i % WARPS]);
                keep(given[i]);
            }
            mean = over_warps(sums) / static_cast<float>(channels);
        }
        float sums[kWarps] = {};
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            pause(i);
            if (has(i)) add_squares(given[i], mean, sums[i % WARPS]);
            keep(given[i]);
        }
        const float by = factor(over_warps(sums), channels, eps);
        const int following = row + gridDim.x * kRows;
        const u16* const next = x + following * stride;
        const auto refill = [&](int i) {
            if (has(i) && following < rows) given[i] = load(next, i * 32 + lane);
        };
        float magnitude = 0.0f;
#pragma unroll
        for (int first = 0; first < kOfLane; first += kAtOnce) {
            pause(first);
            Words added[kAtOnce];
            if (!LAYER && residual != nullptr) {
#pragma unroll
                for (int i = 0; i < kAtOnce && first + i < kOfLane; ++i) {
                    added[i] = {};
                    if (has(first + i)) added[i] = load(residual + 1LL * row * channels, (first + i) * 32 + lane);
                }
            }
#pragma unroll
            for (int i = first; i < first + kAtOnce && i < kOfLane; ++i) {
                if (!has(i)) continue;
                const int piece = i * 32 + lane;
                const float4 low = weights[piece], high = weights[kOfLane * 32 + piece];
                const float wide[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                Words result;
                if constexpr (LAYER) {
                    result = finish<true>(given[i], wide, words_of(biases[piece]), mean, by, magnitude);
                } else if (residual != nullptr) {
                    result = finish<true>(given[i], wide, added[i - first], mean, by, magnitude);
                } else {
                    result = finish<false>(given[i], wide, result, mean, by, magnitude);
                }
                if constexpr (E4M3) {
                    given[i] = result;
                    keep(given[i]);
                } else {
                    store(static_cast<u16*>(out) + row * out_stride, piece, result);
                    refill(i);
                }
            }
        }
        if constexpr (E4M3) {
            magnitude = largest_of_warp(rounded(magnitude));
            if (lane == 0) scales[row] = e4m3::scale(magnitude);
            const float inverse = e4m3::factor(magnitude);
            uint2* const codes = reinterpret_cast<uint2*>(static_cast<unsigned char*>(out) + row * out_stride);
#pragma unroll
            for (int i = 0; i < kOfLane; ++i) {
                pause(i);
                if (has(i)) codes[i * 32 + lane] = encode(given[i], inverse);
                refill(i);
            }
        }
    }
}
