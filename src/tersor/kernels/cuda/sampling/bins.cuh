// Sums of whole numbers by bin in the shared memory of a CTA, and the bin with which the sum of all before it reaches
// what is needed: a radix select in which what is counted may have a weight. Sums are exact, so their order is nothing.
#pragma once

#include "common/ptx.cuh"

namespace bins {

constexpr int kBits = 11, kBins = 1 << kBits;

// 64 bits in two words: shared memory adds only 32 at once.
struct Sums {
    u32 low[kBins], high[kBins];
};

template <int kThreads>
__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) sums.low[bin] = sums.high[bin] = 0;
    __syncthreads();
}

__device__ __forceinline__ void add(Sums& sums, int bin, u64 amount) {
    const u32 low = static_cast<u32>(amount), before = atomicAdd(&sums.low[bin], low);
    const u32 high = static_cast<u32>(amount >> 32) + (before + low < low);
    if (high != 0) atomicAdd(&sums.high[bin], high);
}

__device__ __forceinline__ u64 of(const Sums& sums, int bin) {
    return static_cast<u64>(sums.high[bin]) << 32 | sums.low[bin];
}

struct Found {
    int bin;
    u64 before;  // the sum of the bins ahead of it
};

// The first bin with which the sum from bin 0 on reaches `need`: of `of(bin)`, and need_of(total), which is 1 to total.
template <int kThreads, class Of, class Need>
__device__ __forceinline__ Found reaching(const Of& of, const Need& need_of, u64 (&memory)[kThreads / 32 + 2]) {
    constexpr int kWarps = kThreads / 32, kOfThread = kBins / kThreads;
    const int lane = threadIdx.x % 32, first = threadIdx.x * kOfThread;
    u64 own[kOfThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) sum += own[i] = of(first + i);
    u64 until = sum;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const u64 lower = __shfl_sync(~0u, until, max(lane - lanes, 0));
        if (lane >= lanes) until += lower;
    }
    __syncthreads();
    if (lane == 31) memory[threadIdx.x / 32] = until;
    __syncthreads();
    u64 before = until - sum, total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp < static_cast<int>(threadIdx.x / 32)) before += memory[warp];
        total += memory[warp];
    }
    const u64 need = need_of(total);
    if (before < need && need <= before + sum) {
        int i = 0;
        for (; i < kOfThread - 1 && before + own[i] < need; ++i) before += own[i];
        memory[kWarps] = first + i;
        memory[kWarps + 1] = before;
    }
    __syncthreads();
    return {static_cast<int>(memory[kWarps]), memory[kWarps + 1]};
}

// Bins of x >= 0: 0 has the least ones, and the last has all from (kBins - 1) / a_unit on. However x is rounded, none
// of a lower bin is greater.
__device__ __forceinline__ int bin_of(float x, float a_unit) {
    return __float2int_rz(fminf(__fmul_rn(x, a_unit), static_cast<float>(kBins - 1)));
}

// Bins a unit of x for tokens that weigh 2^-x, of which `near` is the x of one of the greatest few thousand; 0: unknown.
// Beyond an x at which vocabulary * 2^-x is 1 - top_p of the greatest weight there is no token that top_p needs. Any
// number is right; this one leaves few tokens in a bin.
__device__ __forceinline__ float a_unit_of(float top_p, int vocabulary, float near) {
    const float tokens = static_cast<float>(vocabulary) / (1.0f - top_p);
    const float far = static_cast<float>(static_cast<int>(__float_as_uint(tokens) >> 23) - 125);  // over log2(tokens)
    const float most = near > 0.0f ? fminf(fmaxf(4.0f * near, 1e-6f), far) : far;
    return static_cast<float>(kBins) / fminf(most, 41.0f);
}

}  // namespace bins
