// What all threads of a CTA have that normalises rows, added up or the largest of it.
#pragma once

namespace norms {

constexpr int kMostThreads = 512;
constexpr int kWarps = kMostThreads / 32;

// What all threads of the CTA have, added up or the largest of it, which all of them get. Of two calls that follow each
// other each has its own `parts`: a thread that writes to them has seen everyone leave the call before the last.
template <bool kLargest>
__device__ __forceinline__ float over_block(float value, float* parts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(~0u, value, lanes);
        value = kLargest ? fmaxf(value, other) : value + other;
    }
    if (lane == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float total = lane < static_cast<int>(blockDim.x) / 32 ? parts[lane] : 0.0f;
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(~0u, total, lanes);
        total = kLargest ? fmaxf(total, other) : total + other;
    }
    return __shfl_sync(~0u, total, 0);
}

}  // namespace norms
