// The RMS norm of many rows as bytes: what norm.cuh makes of them without a residual, bit for bit, but a warp has a row, and
// nobody waits for a CTA. A lane has what thread `lane` of every warp there would have, and its sums are added in the order
// of that CTA. While a row is written the next one comes to the same registers. Weights stand in shared memory.
// Parameters: BF16 (1: bf16, 0: fp16), BYTES (1), INT8 and X_GROUPS (quantized.cuh), PIECES and WARPS (of that CTA:
// 16 bytes that a thread has, and warps), RESIDENT (CTAs of a multiprocessor).
#pragma once

#include "common/launch.cuh"
#include "common/quantized.cuh"
#include "small/norms.cuh"
#include "small/over_block.cuh"

namespace norms {

constexpr int kRows = 4;  // of a CTA at a time
constexpr int kOfLane = PIECES * WARPS;
constexpr int kSure = PIECES * (WARPS - 1);  // of those a lane has so many in any row
constexpr int kAtOnce = 8;                   // pieces whose numbers are made together
static_assert(BYTES && WARPS <= kWarps);

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

}  // namespace norms

extern "C" __global__ void __launch_bounds__(norms::kRows * 32, RESIDENT) TERSOR_ENTRY(
    const u16* __restrict__ x,  // as in norm.cuh, like all the rest
    const u16* __restrict__ weight,
    unsigned char* out,
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
    launch::start_next();
    const int lane = threadIdx.x % 32, count = channels / kChannels;
    const auto has = [&](int i) { return i < kSure || i * 32 + lane < count; };
    if (!ready) launch::wait_for_earlier();
    for (int piece = threadIdx.x; piece < count; piece += kRows * 32) {
        float wide[kChannels];
        widen_weights(load(weight, piece), offset, wide);
        weights[piece] = {wide[0], wide[1], wide[2], wide[3]};
        weights[kOfLane * 32 + piece] = {wide[4], wide[5], wide[6], wide[7]};
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
        float sums[kWarps] = {};
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            pause(i);
            if (has(i)) add_squares(given[i], 0.0f, sums[i % WARPS]);
            keep(given[i]);
        }
        const float by = factor(over_warps(sums), channels, eps);
        float magnitude = 0.0f;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            pause(i);
            if (!has(i)) continue;
            const float4 low = weights[i * 32 + lane], high = weights[(kOfLane + i) * 32 + lane];
            const float wide[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            const Words result = finish<false>(given[i], wide, {}, 0.0f, by, magnitude);
            given[i] = result;
            keep(given[i]);
        }
        float inverse = 0.0f;
        if constexpr (!quantized::kGroups) {
            magnitude = quantized::largest_of_warp(rounded(magnitude));
            if (lane == 0) scales[row] = quantized::scale(magnitude);
            inverse = quantized::factor(magnitude);
        }
        const int following = row + gridDim.x * kRows;
        const u16* const next = x + following * stride;
        uint2* const codes = reinterpret_cast<uint2*>(out + row * out_stride);
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            pause(i);
            if constexpr (quantized::kGroups) {
                float own = 0.0f;
#pragma unroll
                for (int k = 0; k < kChannels; ++k) own = quantized::largest(widen(given[i], k), own);
                own = quantized::largest_of_group(has(i) ? own : 0.0f);
                inverse = quantized::factor(own);
                const int piece = i * 32 + lane;
                if (has(i) && piece % 16 == 0) scales[quantized::scale_at(piece, row, rows)] = quantized::scale(own);
            }
            if (has(i)) codes[i * 32 + lane] = encode(given[i], inverse);
            if (has(i) && following < rows) given[i] = load(next, i * 32 + lane);
        }
    }
}
