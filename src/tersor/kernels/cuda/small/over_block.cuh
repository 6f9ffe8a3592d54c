// What all threads of a CTA have that normalises rows, added up or the largest of it.
#pragma once

#include "common/ptx.cuh"

namespace norms {

constexpr int kMostThreads = 512;
constexpr int kWarps = kMostThreads / 32;

// Two numbers added up, or the larger one of two that are not negative; NaN is larger than infinity.
template <bool kLargest>
__device__ __forceinline__ float combined(float one, float other) {
    return kLargest ? __int_as_float(max(__float_as_int(one), __float_as_int(other))) : one + other;
}

// What all threads of the CTA have, added up or the largest of it, which all of them get. Of two calls that follow each
// other each has its own `parts`: a thread that writes to them has seen everyone leave the call before the last.
template <bool kLargest>
__device__ __forceinline__ float over_block(float value, float* parts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        value = combined<kLargest>(value, __shfl_xor_sync(~0u, value, lanes));
    }
    if (lane == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float total = lane < static_cast<int>(blockDim.x) / 32 ? parts[lane] : 0.0f;
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) {
        total = combined<kLargest>(total, __shfl_xor_sync(~0u, total, lanes));
    }
    return __shfl_sync(~0u, total, 0);
}

}  // namespace norms
