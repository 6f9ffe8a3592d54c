// Pairs of tokens and experts sorted by expert: a stable counting sort, by one warp or by one CTA. An expert that is not
// among the kExperts stands for none: its pairs come last and are in no block. ops/tables.py says what order, position
// and blocks hold.
#pragma once

#include "common/ptx.cuh"

namespace tables {

constexpr int kWarpPairs = 32;  // pairs that one warp sorts alone
constexpr int kAhead = 8;       // loads that a warp of a CTA has under way

// Up to 32 pairs, which one warp sorts without a barrier: lane p has the expert of pair p.
template <int kExperts>
__device__ __forceinline__ void of_warp(
    int expert, int pairs, int block_tokens, int* order, int* position, int4* blocks) {
    const int lane = threadIdx.x % 32;
    const bool chosen = lane < pairs && expert < kExperts;
    int less = 0, same = 0, before = 0;
    for (int other = 0; other < pairs; ++other) {
        const int there = __shfl_sync(~0u, expert, other);
        less += there < expert;
        same += there == expert;
        before += there == expert && other < lane;
    }
    const bool leads = chosen && before == 0;
    const int own = !leads ? 0 : same > block_tokens ? (same + block_tokens - 1) / block_tokens : 1;
    int first = 0, all = 0;
    for (int other = 0; other < pairs; ++other) {
        const int there = __shfl_sync(~0u, expert, other);
        const int blocks_there = __shfl_sync(~0u, own, other);
        first += there < expert ? blocks_there : 0;
        all += blocks_there;
    }
    const int with_expert = __popc(__ballot_sync(~0u, chosen));
    if (lane == 0) blocks[0] = {all, with_expert, 0, 0};
    if (lane < pairs) {
        position[lane] = less + before;
        order[less + before] = lane;
    }
    for (int block = 0; block < own; ++block) blocks[1 + first + block] = {expert, first, less, less + same};
}

// Any number of pairs, sorted by a CTA of more than kExperts threads. Each warp has a range of pairs to itself.
// counts: [warps][kExperts + 1] in shared memory. expert_of: pair -> expert, kExperts for none.
template <int kExperts, class ExpertOf>
__device__ __forceinline__ void of_block(
    u32* counts, ExpertOf expert_of, int pairs, int block_tokens, int* order, int* position, int4* blocks) {
    constexpr int kBuckets = kExperts + 1;
    __shared__ int2 of_warps[32];
    __shared__ int starts[kBuckets + 1];
    __shared__ int firsts[kBuckets];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int range = (pairs + warps * 32 - 1) / (warps * 32) * 32;
    const int begin = warp * range, end = min(begin + range, pairs);
    const int used = (pairs + range - 1) / range;  // warps that have pairs
    u32* own_counts = counts + warp * kBuckets;
    for (int i = threadIdx.x; i < used * kBuckets; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    const auto load = [&](int base, int (&experts)[kAhead]) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int pair = base + 32 * i + lane;
            experts[i] = pair < end ? expert_of(pair) : kBuckets;
        }
    };
    for (int base = begin; base < end; base += 32 * kAhead) {
        int experts[kAhead];
        load(base, experts);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (experts[i] < kBuckets) atomicAdd(own_counts + experts[i], 1u);
        }
    }
    __syncthreads();

    // A thread a bucket: from counts to where each warp's pairs start in the bucket, and how many there are.
    const int bucket = threadIdx.x;
    int total = 0;
    if (bucket < kBuckets) {
#pragma unroll 8
        for (int other = 0; other < used; ++other) {
            const int there = counts[other * kBuckets + bucket];
            counts[other * kBuckets + bucket] = total;
            total += there;
        }
    }
    const int own = bucket < kExperts ? (total + block_tokens - 1) / block_tokens : 0;
    int start = total, first = own;  // sums up to this lane
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int start_below = __shfl_up_sync(~0u, start, lanes), first_below = __shfl_up_sync(~0u, first, lanes);
        if (lane >= lanes) {
            start += start_below;
            first += first_below;
        }
    }
    if (lane == 31) of_warps[warp] = {start, first};
    __syncthreads();
    start -= total;
    first -= own;
    for (int below = 0; below < warp; ++below) {
        start += of_warps[below].x;
        first += of_warps[below].y;
    }
    if (bucket < kBuckets) {
        starts[bucket] = start;
        firsts[bucket] = first;
    }
    if (bucket == kExperts) blocks[0] = {first, start, 0, 0};
    __syncthreads();

    for (int expert = warp; expert < kExperts; expert += warps) {
        const int4 block = {expert, firsts[expert], starts[expert], starts[expert + 1]};
        for (int i = block.y + lane; i < firsts[expert + 1]; i += 32) blocks[1 + i] = block;
    }
    for (int base = begin; base < end; base += 32 * kAhead) {
        int experts[kAhead];
        load(base, experts);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (base + 32 * i >= end) break;
            const int pair = base + 32 * i + lane;
            const u32 peers = __match_any_sync(~0u, experts[i]);
            const u32 below = peers & ((1u << lane) - 1);
            if (pair < end) {
                const int sorted = starts[experts[i]] + own_counts[experts[i]] + __popc(below);
                position[pair] = sorted;
                order[sorted] = pair;
            }
            __syncwarp();
            if (pair < end && below == 0) own_counts[experts[i]] += __popc(peers);
            __syncwarp();
        }
    }
}

}  // namespace tables
