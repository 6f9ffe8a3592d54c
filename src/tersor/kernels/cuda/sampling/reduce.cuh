// Maxima and sums over the threads of a CTA of WARPS whole warps, which all of them get. `memory` may be used again by
// the next call but one.
#pragma once

#include "common/ptx.cuh"

namespace reduce {

__device__ __forceinline__ u64 most_of_warp(u64 value) {
    const u32 high = __reduce_max_sync(~0u, static_cast<u32>(value >> 32));
    const u32 low = __reduce_max_sync(~0u, static_cast<u32>(value >> 32) == high ? static_cast<u32>(value) : 0u);
    return static_cast<u64>(high) << 32 | low;
}

// Of values whose sum is below 2^56.
__device__ __forceinline__ u64 sum_of_warp(u64 value) {
    const u32 low = __reduce_add_sync(~0u, static_cast<u32>(value) & 0xffffffu);
    const u32 high = __reduce_add_sync(~0u, static_cast<u32>(value >> 24));
    return (static_cast<u64>(high) << 24) + low;
}

template <int kWarps>
__device__ __forceinline__ u64 most_of_block(u64 value, u64* memory) {
    const int lane = threadIdx.x % 32;
    value = most_of_warp(value);
    if (lane == 0) memory[threadIdx.x / 32] = value;
    __syncthreads();
    return most_of_warp(lane < kWarps ? memory[lane] : 0ull);
}

template <int kWarps>
__device__ __forceinline__ u32 most_of_block(u32 value, u32* memory) {
    const int lane = threadIdx.x % 32;
    value = __reduce_max_sync(~0u, value);
    if (lane == 0) memory[threadIdx.x / 32] = value;
    __syncthreads();
    return __reduce_max_sync(~0u, lane < kWarps ? memory[lane] : 0u);
}

// Of values whose sum over a warp is below 2^56.
template <int kWarps>
__device__ __forceinline__ u64 sum_of_block(u64 value, u64* memory) {
    const int lane = threadIdx.x % 32;
    value = sum_of_warp(value);
    if (lane == 0) memory[threadIdx.x / 32] = value;
    __syncthreads();
    u64 total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += memory[warp];
    return total;
}

}  // namespace reduce
