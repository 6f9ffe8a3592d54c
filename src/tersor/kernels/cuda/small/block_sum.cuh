// The sum over all threads of a CTA that normalises a row.
#pragma once

namespace norms {

constexpr int kMostThreads = 512;
constexpr int kWarps = kMostThreads / 32;

// The sum over all threads of the CTA, which all of them get; `sums` is used by nothing else.
__device__ __forceinline__ float sum_of_block(float value, float* sums) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    if (lane == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = lane < static_cast<int>(blockDim.x) / 32 ? sums[lane] : 0.0f;
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
    return __shfl_sync(~0u, total, 0);
}

}  // namespace norms
