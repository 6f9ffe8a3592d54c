// Where few pairs of tokens and experts go, every CTA of sm90_experts.cuh finds out for itself: that takes it less time
// than to wait for a kernel that does it for all. Parameter: ROUTES (1: by logits or an index, with the parameters of
// choose.cuh; 0: the tables of another kernel say it).
#pragma once

#include "common/ptx.cuh"
#include "dense/sm90_pipeline.cuh"
#if ROUTES
#include "experts/choose.cuh"
#include "experts/tables.cuh"
#endif

namespace linear {

// What is routed: the arguments of route.cuh's kernel.
struct Routing {
    const void* given;        // logits [tokens, EXPERTS], or an index [tokens]
    const float* bias;        // [EXPERTS], or nothing
    float* weights;           // [tokens, TOP_K], or nothing: no one needs what is found here
    int* position;            // [tokens * TOP_K]
    int4* blocks;             // of which the first is written
    long long stride;         // elements from one token's logits to the next
    int tokens;
    float scale;
};

#if ROUTES
constexpr int kPairs = tables::kWarpPairs;

// The tables of a CTA, in shared memory.
struct Routed {
    int expert[kPairs], order[kPairs], position[kPairs];
    int4 blocks[1 + kPairs];

    // All threads of the CTA, which has no fewer warps than there are tokens: each has one.
    __device__ __forceinline__ void find(const Routing& of) {
        using namespace route;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = of.tokens * TOP_K;
        const Given* given = static_cast<const Given*>(of.given);
        int chosen = EXPERTS;
        float weight = 0.0f;
        if constexpr (kRouted) {
            if (warp < of.tokens) {
                choose(given + warp * of.stride, of.bias, of.scale, chosen, weight);
                if (lane < TOP_K) {
                    expert[warp * TOP_K + lane] = chosen;
                    if (blockIdx.x == 0 && of.weights != nullptr) of.weights[warp * TOP_K + lane] = weight;
                }
            }
            if (of.tokens > 1) ptx::sync_threads<kAllBarrier, kThreads>();
            if (warp == 0 && of.tokens > 1 && lane < pairs) chosen = expert[lane];
        } else if (warp == 0 && lane < pairs) {
            chosen = given_expert(given + lane);
        }
        if (warp == 0) {
            tables::of_warp<EXPERTS>(chosen, pairs, kTokens, order, position, blocks);
            if (blockIdx.x == 0 && of.position != nullptr) {
                __syncwarp();
                if (lane < pairs) of.position[lane] = position[lane];
                if (lane == 0) of.blocks[0] = blocks[0];
            }
        }
        ptx::sync_threads<kAllBarrier, kThreads>();
    }
};
#endif

}  // namespace linear
