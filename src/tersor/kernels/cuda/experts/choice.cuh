// How a warp chooses the experts of a token by its logits, which it has in registers, and what sorts the pairs then.
// Parameters: EXPERTS (up to 512), TOP_K (up to 16), INPUT (Input below, of logits), SIGMOID (0: softmax), NORMALIZE
// (weights are divided by their sum), BIASED (experts are chosen by score + bias), GROUPS of experts (up to 32), of which
// the TOP_GROUPS best are chosen from.
#pragma once

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

// The TOP_K best experts of a token, the lower one of equals: lane k has the k-th, and its weight. logit_of: expert ->
// its logit, `plain`.
template <class LogitOf>
__device__ __forceinline__ void choose(
    const LogitOf& logit_of, const float* bias, float scale, int& chosen, float& weight) {
    const int lane = threadIdx.x % 32;
    float values[kOfLane];
    u32 keys[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
        values[i] = lane + 32 * i < EXPERTS ? logit_of(lane + 32 * i) : lowest();
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
        weight = lane < TOP_K ? score_of(logit_of(chosen), largest, total) : 0.0f;  // its key is of the biased score
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

// Sorts the pairs of all tokens by a CTA that knows their experts: `expert_of` any pair's, a lane of the first warp those
// of a lone token. `counts` as for tables::of_block.
template <class ExpertOf>
__device__ __forceinline__ void sort(
    u32* counts, const ExpertOf& expert_of, int expert, int tokens, int block_tokens, int* order, int* position,
    int4* blocks) {
    const int pairs = tokens * TOP_K, lane = threadIdx.x;
    if (pairs > tables::kWarpPairs) {
        tables::of_block<EXPERTS>(counts, expert_of, pairs, block_tokens, order, position, blocks);
    } else if (lane >= 32) {
        return;
    } else if (tokens == 1) {
        tables::of_warp<EXPERTS>(expert, TOP_K, block_tokens, order, position, blocks);
    } else {
        expert = lane < pairs ? expert_of(lane) : EXPERTS;
        tables::of_warp<EXPERTS>(expert, pairs, block_tokens, order, position, blocks);
    }
}

}  // namespace route
