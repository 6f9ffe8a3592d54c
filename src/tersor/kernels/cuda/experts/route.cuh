// Chooses the experts of every token by its logits and sorts the pairs of tokens and experts, in one launch; or sorts
// the pairs of an index that is there. A warp has one token at a time, its logits in registers. Of few tokens one CTA
// does all; of more, the CTA that ends last sorts.
// Parameters: EXPERTS (up to 512), TOP_K (up to 16), INPUT (Input below), SIGMOID (0: softmax), NORMALIZE (weights are
// divided by their sum), BIASED (experts are chosen by score + bias), GROUPS of experts (up to 32), of which the
// TOP_GROUPS best are chosen from. With an index TOP_K is 1, and the others mean nothing.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "experts/tables.cuh"

namespace route {

enum Input { kFloat16, kBfloat16, kFloat32, kInt32, kInt64 };

template <int kInput>
struct Element {
    using Type = u16;
};
template <>
struct Element<kFloat32> {
    using Type = float;
};
template <>
struct Element<kInt32> {
    using Type = int;
};
template <>
struct Element<kInt64> {
    using Type = long long;
};
using Given = Element<INPUT>::Type;

constexpr bool kRouted = INPUT < kInt32;
constexpr int kMostThreads = kRouted && EXPERTS > 256 ? 640 : 1024;  // fewer have registers for more logits
constexpr int kFewTokens = 64;  // tokens that one CTA takes alone, with room for their experts in shared memory
constexpr int kOfLane = (EXPERTS + 31) / 32;
constexpr int kInGroup = EXPERTS / GROUPS;
constexpr u32 kNone = 0;  // the key of what cannot be chosen: less than that of any number
// Keys of 16-bit logits end with 13 bits that say nothing: with the expert in 9 of them one maximum finds key and expert.
constexpr u32 kExpertBits = 511;
constexpr bool kPacked = kRouted && INPUT != kFloat32 && !SIGMOID && !BIASED && GROUPS == 1;
static_assert(EXPERTS <= 512 && TOP_K <= 16 && TOP_K <= EXPERTS && GROUPS <= 32 && EXPERTS % GROUPS == 0);

__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }

// NaN is taken as the lowest, and -0 as 0.
__device__ __forceinline__ float plain(float value) { return value == value ? value + 0.0f : lowest(); }

// Keys above kNone, in the order of their values.
__device__ __forceinline__ u32 key_of(float value) {
    const u32 bits = __float_as_uint(plain(value));
    return bits ^ (static_cast<int>(bits) < 0 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(static_cast<int>(key) < 0 ? key ^ 0x80000000u : ~key);
}

__device__ __forceinline__ float load(const Given* logit) {
    const Given given = __ldcg(logit);
    if constexpr (INPUT == kFloat32) {
        return plain(given);
    } else {
        return plain(ptx::widen<INPUT == kBfloat16>(given));
    }
}

// What a logit's expert would weigh, were weights not divided by their sum.
__device__ __forceinline__ float score_of(float logit, float largest, float total) {
    if constexpr (SIGMOID) {
        return 1.0f / (1.0f + expf(-logit));
    } else {
        return expf(logit - largest) / total;
    }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    return value;
}

// Leaves the experts of the best groups their keys: best by their best expert, or by the sum of their two best.
__device__ __forceinline__ void keep_best_groups(u32 (&keys)[kOfLane]) {
    const int lane = threadIdx.x % 32;
    u32 group_key = kNone;  // lane g has group g
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        u32 best = kNone, second = kNone;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            const u32 key = (lane + 32 * i) / kInGroup == group ? keys[i] : kNone;
            second = max(second, min(best, key));
            best = max(best, key);
        }
        u32 score = __reduce_max_sync(~0u, best);
        if constexpr (SIGMOID) {
            const bool holds = lane == __ffs(__ballot_sync(~0u, best == score)) - 1;
            score = key_of(value_of(score) + value_of(__reduce_max_sync(~0u, holds ? second : best)));
        }
        if (lane == group) group_key = score;
    }
    u32 kept = 0;
#pragma unroll
    for (int turn = 0; turn < TOP_GROUPS; ++turn) {
        const u32 best = __reduce_max_sync(~0u, group_key);
        const int group = __ffs(__ballot_sync(~0u, group_key == best)) - 1;
        kept |= 1u << group;
        if (lane == group) group_key = kNone;
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        if (!(kept >> ((lane + 32 * i) / kInGroup % 32) & 1)) keys[i] = kNone;
    }
}

// The TOP_K best experts of a token, the lower one of equals: lane k has the k-th, and its weight.
__device__ __forceinline__ void choose(const Given* logits, const float* bias, float scale, int& chosen, float& weight) {
    const int lane = threadIdx.x % 32;
    float values[kOfLane];
    u32 keys[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        values[i] = lane + 32 * i < EXPERTS ? load(logits + lane + 32 * i) : lowest();
    }
    float largest = 0.0f, total = 0.0f;
    if constexpr (!SIGMOID && (BIASED || !NORMALIZE)) {
        float of_lane = values[0];
#pragma unroll
        for (int i = 1; i < kOfLane; ++i) of_lane = fmaxf(of_lane, values[i]);
        largest = value_of(__reduce_max_sync(~0u, key_of(of_lane)));
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            if (lane + 32 * i < EXPERTS) total += expf(values[i] - largest);
        }
        total = sum_of_warp(total);
    }
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        const int expert = lane + 32 * i;
        float rank = SIGMOID || BIASED ? score_of(values[i], largest, total) : values[i];
        if constexpr (BIASED) rank += expert < EXPERTS ? __ldcg(bias + expert) : 0.0f;
        keys[i] = expert < EXPERTS ? key_of(rank) : kNone;
        if constexpr (kPacked) keys[i] = expert < EXPERTS ? (keys[i] & ~kExpertBits) | (kExpertBits - expert) : kNone;
    }
    if constexpr (GROUPS > TOP_GROUPS) keep_best_groups(keys);
    chosen = EXPERTS;
    u32 chosen_key = kNone;
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
        u32 best = keys[0];
        int at = lane;
#pragma unroll
        for (int i = 1; i < kOfLane; ++i) {
            if (keys[i] > best) {
                best = keys[i];
                at = lane + 32 * i;
            }
        }
        const u32 key = __reduce_max_sync(~0u, best);
        int expert;
        if constexpr (kPacked) {
            expert = kExpertBits - (key & kExpertBits);
        } else {
            expert = __reduce_min_sync(~0u, static_cast<u32>(best == key ? at : EXPERTS));
        }
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) {
            if (expert == lane + 32 * i) keys[i] = kNone;
        }
        if (lane == k) {
            chosen = expert;
            chosen_key = key;
        }
    }
    if constexpr (BIASED) {
        weight = lane < TOP_K ? score_of(load(logits + chosen), largest, total) : 0.0f;  // its key is of the biased score
    } else {
        const u32 filled = static_cast<int>(chosen_key) < 0 ? chosen_key & ~kExpertBits : chosen_key | kExpertBits;
        weight = value_of(kPacked ? filled : chosen_key);
        if constexpr (!SIGMOID) {
            if constexpr (NORMALIZE) largest = __shfl_sync(~0u, weight, 0);
            weight = expf(weight - largest) / (NORMALIZE ? 1.0f : total);
        }
    }
    if constexpr (NORMALIZE) {
        const float sum = sum_of_warp(lane < TOP_K ? weight : 0.0f);
        weight /= SIGMOID ? sum + 1e-20f : sum;
    }
    weight *= scale;
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
            choose(given + token * stride, bias, scale, expert, weight);
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
            if (pairs > tables::kWarpPairs) {
                const auto expert_of = [&](int pair) { return alone ? few[pair] : __ldcg(index + pair); };
                tables::of_block<EXPERTS>(counts, expert_of, pairs, block_tokens, order, position, blocks);
                return;
            }
            if (warp > 0) return;
            expert = lane < pairs ? few[lane] : EXPERTS;
        }
        if (tokens == 1) {
            tables::of_warp<EXPERTS>(expert, TOP_K, block_tokens, order, position, blocks);
        } else {
            tables::of_warp<EXPERTS>(expert, pairs, block_tokens, order, position, blocks);
        }
    } else if (pairs > tables::kWarpPairs) {
        const auto expert_of = [&](int pair) { return given_expert(given + pair); };
        tables::of_block<EXPERTS>(counts, expert_of, pairs, block_tokens, order, position, blocks);
    } else {
        const int expert = lane < pairs ? given_expert(given + lane) : EXPERTS;
        tables::of_warp<EXPERTS>(expert, pairs, block_tokens, order, position, blocks);
    }
}
