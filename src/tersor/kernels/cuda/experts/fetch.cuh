// Between the two products of few tokens memory would rest: when the first has asked for all its weights, those of the
// second are known, too, and come to L2 while the first multiplies what it has.
#pragma once

#include "common/ptx.cuh"
#include "experts/sm90_work.cuh"

namespace linear {

// Has L2 fetch bytes, a multiple of 16 of them.
__device__ __forceinline__ void fetch(const char* global, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// One thread: fetches this CTA's share of what the experts that have tokens hold in `codes`, `bytes` each.
__device__ __forceinline__ void fetch_experts(const Work& work, const char* codes, long long bytes) {
    constexpr long long kLeast = 2048;  // of a share
    const long long share = max(kLeast, (bytes / gridDim.x + 16) / 16 * 16), begin = blockIdx.x * share;
    if (begin >= bytes) return;
    const u32 own = static_cast<u32>(min(share, bytes - begin));
    const int blocks = work.tiles / work.row_tiles;
#pragma unroll 4
    for (int block = 0; block < blocks; ++block) {
        const int4 entry = __ldcg(work.table + 1 + block);
        if (entry.y == block) fetch(codes + entry.x * bytes + begin, own);  // once for each expert
    }
}

}  // namespace linear
