// Tokens as e4m3 with a scale each: scale = largest magnitude / 448, code = round(x * 448 / largest). A token with an
// infinity or a NaN gets NaNs: those stay in its codes, or its scale is infinite and its codes are zeros and NaNs.
// Parameters: BF16 (1: bf16, 0: fp16).
#pragma once

#include "common/ptx.cuh"

namespace e4m3 {

constexpr float kMax = 448.0f;

// From here on the compiler takes numbers out of packed words again: across a barrier it would keep all of them wide.
__device__ __forceinline__ void keep_packed(u16 (&values)[8]) {
    u32* const words = reinterpret_cast<u32*>(values);
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(words[i]));
}

// The largest magnitude of eight numbers and of those before; NaN counts for nothing.
__device__ __forceinline__ float largest(const u16 (&values)[8], float before) {
#pragma unroll
    for (int i = 0; i < 8; ++i) before = fmaxf(before, fabsf(ptx::widen<BF16>(values[i])));
    return before;
}

// The largest of what the lanes of a warp have, which all of them get.
__device__ __forceinline__ float largest_of_warp(float magnitude) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        magnitude = fmaxf(magnitude, __shfl_xor_sync(~0u, magnitude, lanes));
    }
    return magnitude;
}

__device__ __forceinline__ float scale(float magnitude) {
    return magnitude / kMax;
}

// What numbers are multiplied by before they are rounded.
__device__ __forceinline__ float factor(float magnitude) {
    return magnitude > 0.0f ? kMax / magnitude : 0.0f;
}

// Eight numbers as bytes, the first in the lowest.
__device__ __forceinline__ uint2 encode(const u16 (&values)[8], float factor) {
    u32 words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        u32 pairs[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = 4 * word + 2 * i;
            pairs[i] = ptx::to_e4m3(ptx::widen<BF16>(values[at]) * factor, ptx::widen<BF16>(values[at + 1]) * factor);
        }
        words[word] = pairs[0] | pairs[1] << 16;
    }
    return {words[0], words[1]};
}

}  // namespace e4m3
