// Chooses the experts of every token by its logits and sorts the pairs of tokens and experts, in one launch; or sorts
// the pairs of an index that is there. A warp has one token at a time. Of few tokens one CTA does all; of more, the CTA
// that ends last sorts.
// Parameters: those of choice.cuh. With an index INPUT says of what, TOP_K is 1, and the others mean nothing.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "experts/choice.cuh"

namespace route {

constexpr int kMostThreads = kRouted && EXPERTS > 256 ? 640 : 1024;  // fewer have registers for more logits
constexpr int kFewTokens = 64;  // tokens that one CTA takes alone, with room for their experts in shared memory

__device__ __forceinline__ float load(const Given* logit) {
    const Given given = __ldcg(logit);
    if constexpr (INPUT == kFloat32) {
        return plain(given);
    } else {
        return plain(ptx::widen<INPUT == kBfloat16>(given));
    }
}

// An expert of an index that is there.
__device__ __forceinline__ int given_expert(const Given* index) {
    const u64 given = static_cast<long long>(__ldcg(index));
    return given < EXPERTS ? static_cast<int>(given) : EXPERTS;
}

}  // namespace route

extern "C" __global__ void __launch_bounds__(route::kMostThreads, 1) TERSOR_ENTRY(
    const route::Given* __restrict__ given,  // logits [tokens, EXPERTS], or an index [tokens]
    const float* __restrict__ bias,          // [EXPERTS], or nothing
    int* index,                              // [tokens, TOP_K]
    float* weights,                          // [tokens, TOP_K]
    int* order,                              // [tokens * TOP_K], or nothing: no pairs are sorted
    int* position,                           // [tokens * TOP_K]
    int4* blocks,                            // [1 + most blocks]
    u32* arrived,                            // zero; counts CTAs, of several
    long long stride,                        // elements from one token's logits to the next
    int tokens,
    int block_tokens,
    float scale) {
    using namespace route;
    extern __shared__ u32 counts[];
    launch::start_next();
    launch::wait_for_earlier();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int pairs = tokens * TOP_K;
    if constexpr (kRouted) {
        __shared__ int few[kFewTokens * TOP_K];
        const bool alone = gridDim.x == 1;
        int expert = EXPERTS;
        float weight = 0.0f;
        for (int token = blockIdx.x * warps + warp; token < tokens; token += gridDim.x * warps) {
            const Given* logits = given + token * stride;
            choose([&](int of) { return load(logits + of); }, bias, scale, expert, weight);
            const int pair = token * TOP_K + lane;
            if (lane < TOP_K) {
                index[pair] = expert;
                weights[pair] = weight;
                if (alone && order != nullptr) few[pair] = expert;
            }
        }
        if (order == nullptr) return;
        if (tokens > 1) {
            __syncthreads();
            if (!alone) {
                const bool last = threadIdx.x == 0 && ptx::arrive(arrived) == gridDim.x - 1;
                if (!__syncthreads_or(last)) return;
                if (last) *arrived = 0;
            }
        }
        const auto expert_of = [&](int pair) { return alone ? few[pair] : __ldcg(index + pair); };
        sort(counts, expert_of, expert, tokens, block_tokens, order, position, blocks);
    } else if (pairs > tables::kWarpPairs) {
        const auto expert_of = [&](int pair) { return given_expert(given + pair); };
        tables::of_block<EXPERTS>(counts, expert_of, pairs, block_tokens, order, position, blocks);
    } else {
        const int expert = lane < pairs ? given_expert(given + lane) : EXPERTS;
        tables::of_warp<EXPERTS>(expert, pairs, block_tokens, order, position, blocks);
    }
}
