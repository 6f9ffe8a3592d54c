// What is ahead of the experts of a layer, for few tokens, in one launch: an RMS norm, the router's logits (logits.cuh),
// the choice of experts by them and the tables of pairs (choice.cuh). Each number has the bits that a launch of norm.cuh,
// one of router.cuh and one of route.cuh give.
//
// The last CTA chooses; every other one has ROWS experts and TOKENS tokens, whose rows it normalises for itself. A logit
// goes to the last CTA as a word (words.cuh), its key, which is never 0; that CTA, which starts when all others have
// started, waits for the words and makes them 0 again. The CTAs with the first experts store the normed rows.
//
// Parameters: those of logits.cuh and choice.cuh (INPUT: what a logit is rounded to), NORM (1: x is normed first; 0: it
// has been).
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "experts/choice.cuh"
#include "experts/logits.cuh"
#include "experts/words.cuh"

namespace decide {

constexpr int kMostThreads = 288;
constexpr int kWarps = kMostThreads / 32;
constexpr int kFewTokens = 16;
constexpr int kNormWarps = 16;  // of norm.cuh, which has a piece of a row in each thread
static_assert(EXPERTS < kMostThreads && router::kMostThreads <= kMostThreads);
static_assert(!NORM || PIECES * router::kWarps <= kNormWarps);

// Every piece that a thread has of TOKENS rows is normed, as norm.cuh does it; every thread of the CTA must call it.
__device__ __forceinline__ void norm(
    router::Piece (&rows)[PIECES], const pieces::Piece (&weights)[PIECES], int channels, int threads, float eps,
    float offset) {
    __shared__ float squares[TOKENS][kNormWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < pieces::kChannels; ++k) {
                const float value = ptx::widen<BF16>(rows[i][t].values[k]);
                sum += value * value;
            }
            sum = route::sum_of_warp(sum);
            if (lane == 0 && warp * 32 < threads) squares[t][warp + i * threads / 32] = sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        float total = lane < PIECES * threads / 32 ? squares[t][lane] : 0.0f;
#pragma unroll
        for (int lanes = kNormWarps / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
        total = __shfl_sync(~0u, total, 0);
        const float factor = 1.0f / sqrtf(total / static_cast<float>(channels) + eps);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
#pragma unroll
            for (int k = 0; k < pieces::kChannels; ++k) {
                const float value = ptx::widen<BF16>(rows[i][t].values[k]) * factor;
                float result = value * (ptx::widen<BF16>(weights[i].values[k]) + offset);
                result += 0.0f;  // as no residual: -0 becomes 0
                rows[i][t].values[k] = ptx::narrow<BF16>(result);
            }
        }
    }
}

// A logit, rounded as it would be in memory.
__device__ __forceinline__ float rounded(float logit) {
    if constexpr (INPUT == route::kFloat32) {
        return logit;
    } else {
        return ptx::widen<BF16>(ptx::narrow<BF16>(logit));
    }
}

// One warp: waits for all logits of a token, clears their words and leaves them in shared memory.
__device__ __forceinline__ void receive(u32* from, float* logits) {
    const int lane = threadIdx.x % 32;
    u32 keys[route::kOfLane];
    bool all;
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < route::kOfLane; ++i) {
            keys[i] = lane + 32 * i < EXPERTS ? words::look(from + lane + 32 * i) : ~0u;
        }
#pragma unroll
        for (int i = 0; i < route::kOfLane; ++i) all &= keys[i] != route::kNone;
    } while (!all);
#pragma unroll
    for (int i = 0; i < route::kOfLane; ++i) {
        const int expert = lane + 32 * i;
        if (expert >= EXPERTS) continue;
        words::put(from + expert, route::kNone);
        logits[expert] = route::value_of(keys[i]);
    }
    __syncwarp();
}

}  // namespace decide

extern "C" __global__ void __launch_bounds__(decide::kMostThreads, 1) TERSOR_ENTRY(
    const u16* __restrict__ x,            // [tokens, channels]
    const void* __restrict__ weight,      // [EXPERTS, channels]
    const void* __restrict__ bias,        // [EXPERTS], or nothing
    const float* __restrict__ preferred,  // [EXPERTS], is added to scores in the choice, or nothing
    const u16* __restrict__ gain,         // [channels], the weights of the norm, or nothing
    u16* normed,                          // [tokens, channels], or nothing
    int* index,                           // [tokens, TOP_K]
    float* weights,                       // [tokens, TOP_K]
    int* order,                           // [tokens * TOP_K]
    int* position,                        // [tokens * TOP_K]
    int4* blocks,                         // [1 + most blocks]
    u32* logits,                          // [tokens, EXPERTS], zero before and after
    int tokens,
    int channels,  // a multiple of 8
    int block_tokens,
    int ready,     // whether weight, bias and gain were there before the kernel ahead started
    float scale,
    float eps,
    float offset) {
    __shared__ u32 memory[decide::kWarps * (EXPERTS + 1)];
    __shared__ int experts_of[decide::kFewTokens * TOP_K];
    launch::start_next();
    constexpr int kGroups = (EXPERTS + ROWS - 1) / ROWS;
    const bool chooses = blockIdx.x == gridDim.x - 1;
    const int first_expert = static_cast<int>(blockIdx.x) % kGroups * ROWS;
    const int first_token = static_cast<int>(blockIdx.x) / kGroups * TOKENS;
    const int count = channels / pieces::kChannels, thread = threadIdx.x;
    const int threads = (count + 32 * PIECES - 1) / (32 * PIECES) * 32;  // that have channels
    const int expert = first_expert + thread / TOKENS, token = first_token + thread % TOKENS;  // of the thread at last
    const bool ends = !chooses && thread < router::kSums && expert < EXPERTS && token < tokens;
    if (!ready) launch::wait_for_earlier();
    router::Held held;
    pieces::Piece gains[PIECES];
    if (!chooses) {
        router::load_weights(held, weight, first_expert, EXPERTS, count, threads);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            gains[i] = {};
            if (NORM && thread < threads && thread + i * threads < count) {
                gains[i] = pieces::load(gain, thread + i * threads);
            }
        }
    }
    float added = 0.0f;
    if (ends && bias != nullptr) added = router::bias_of(bias, expert);
    if (ready) launch::wait_for_earlier();

    if (!chooses) {
        float sums[router::kSums] = {};
        if constexpr (NORM) {
            router::Piece rows[PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                router::load_tokens(rows[i], x, i, first_token, tokens, count, threads);
            }
            decide::norm(rows, gains, channels, threads, eps, offset);
#pragma unroll
            for (int i = 0; i < PIECES; ++i) router::multiply(sums, held, i, rows[i]);
            if (first_expert == 0 && thread < threads) {
#pragma unroll
                for (int i = 0; i < PIECES; ++i) {
#pragma unroll
                    for (int t = 0; t < TOKENS; ++t) {
                        if (thread + i * threads >= count || first_token + t >= tokens) continue;
                        u16* row = normed + static_cast<long long>(first_token + t) * channels;
                        pieces::store(row, thread + i * threads, rows[i][t]);
                    }
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                router::Piece given;
                router::load_tokens(given, x, i, first_token, tokens, count, threads);
                router::multiply(sums, held, i, given);
            }
        }
        const float total = router::total_of(sums, threads) + added;
        if (ends) words::put(logits + token * EXPERTS + expert, route::key_of(decide::rounded(total)));
        return;
    }

    const int lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
    int chosen = EXPERTS;
    float factor = 0.0f;
    for (int of = warp; of < tokens; of += warps) {
        float* received = reinterpret_cast<float*>(memory) + warp * EXPERTS;
        decide::receive(logits + of * EXPERTS, received);
        route::choose([&](int expert) { return received[expert]; }, preferred, scale, chosen, factor);
        const int pair = of * TOP_K + lane;
        if (lane < TOP_K) {
            index[pair] = chosen;
            weights[pair] = factor;
            experts_of[pair] = chosen;
        }
        __syncwarp();
    }
    if (tokens > 1) __syncthreads();
    const auto expert_of = [&](int pair) { return experts_of[pair]; };
    route::sort(memory, expert_of, chosen, tokens, block_tokens, order, position, blocks);
}
