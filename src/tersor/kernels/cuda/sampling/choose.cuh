// The second pass over rows with top-k, top-p or min-p: candidates, which are logits above the cut of peaks.cuh, go to a
// list, and the CTA of a row that ends last finds the least logit that is kept and draws among those kept. Where the
// candidates turn out not to hold all that is kept, it searches the whole row instead.
// Kept is what reaches the k-th greatest logit; of that, the greatest logits, all equal ones of them, whose weights
// reach top_p of the sum; and of that what weighs at least min_p of the greatest. Weights are integers, so sums have no
// order. Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/reduce.cuh"
#include "sampling/row.cuh"

namespace choose {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = kThreads * row::kChunk;
constexpr int kOfThread = 16;
constexpr int kCandidates = kThreads * kOfThread;  // of a row
constexpr float kUnit = 1099511627776.0f;          // the weight of the greatest logit

// The greatest key that amounts of at least `need` reach; `each(f)` calls f(key, amount) for a thread's. Keys are alike
// in their last `constant` bits.
template <int kBits, class Each>
__device__ __forceinline__ u32 search(const Each& each, u64 need, int constant, u64 (*memory)[kWarps]) {
    constexpr int kTried = (1 << kBits) - 1;
    u32 cut = 0;
    int turn = 0;
    for (int bit = 32 - kBits; bit > constant - kBits; bit -= kBits) {
        u64 reached[kTried] = {};
        each([&](u32 key, u64 amount) {
#pragma unroll
            for (int i = 0; i < kTried; ++i) reached[i] += key >= (cut | static_cast<u32>(i + 1) << bit) ? amount : 0;
        });
        u32 step = 0;
#pragma unroll
        for (int i = 0; i < kTried; ++i) {
            step += reduce::sum_of_block<kWarps>(reached[i], memory[turn]) >= need;
            turn ^= 1;
        }
        cut |= step << bit;
    }
    return cut;
}

__device__ __forceinline__ u64 share(float part, u64 total) {
    return __double2ull_ru(__dmul_rn(static_cast<double>(part), __ull2double_rn(total)));
}

struct Wanted {
    int top_k;    // 0: all
    float top_p;  // 1: all
    u64 weight;   // of a token at least; 0: all
};

}  // namespace choose

extern "C" __global__ void __launch_bounds__(choose::kThreads) TERSOR_ENTRY(
    const void* __restrict__ logits,
    const int* __restrict__ slots,
    const int* __restrict__ starts,
    const int* __restrict__ ends,
    const int* __restrict__ placed,
    const float* __restrict__ listed,
    const int* __restrict__ allowed,
    const int* __restrict__ allowed_rows,
    const float* __restrict__ temperature,
    const int* __restrict__ top_k,
    const float* __restrict__ top_p,
    const float* __restrict__ min_p,
    const long long* __restrict__ seeds,
    const int* __restrict__ positions,
    void* states_,       // row::State [rows], of peaks.cuh
    uint2* candidates,   // [rows, kCandidates]: key and token
    long long* out,
    long long* newest,
    long long stride,
    int vocabulary,
    int words,
    int aligned) {
    using namespace choose;
    __shared__ u64 memory[2][kWarps];
    launch::start_next();
    launch::wait_for_earlier();
    row::State* const state = static_cast<row::State*>(states_) + blockIdx.y;
    if (!__ldcg(&state->filtered)) return;
    const int row = blockIdx.y, lane = threadIdx.x % 32, slot = row::slot_of(slots, row), k = __ldcg(top_k + slot);
    Wanted wanted = {k > 0 && k < vocabulary ? k : 0, __ldcg(top_p + slot), 0};
    const float least = __ldcg(min_p + slot), scale = __fdiv_rn(numbers::kLog2E, __ldcg(temperature + slot));
    if (least > 0.0f) wanted.weight = __double2ull_ru(__dmul_rn(static_cast<double>(least), static_cast<double>(kUnit)));
    const float peak = numbers::value_of(__ldcg(&state->peak));
    const u32 cut = __ldcg(&state->cut);
    const bool by_weight = !wanted.top_k && !(wanted.top_p < 1.0f);  // the cut leaves all
    const bool sums = !wanted.top_k && wanted.top_p < 1.0f;
    const auto of = row::row_of(
        row, slot, logits, stride, vocabulary, aligned, starts, ends, placed, listed, allowed, allowed_rows, words);
    const auto weight = [&](float value) { return numbers::weight_of(__fmul_rn(__fsub_rn(peak, value), scale)); };
    candidates += static_cast<long long>(row) * kCandidates;

    u64 total = 0;
    // Takes logits of a thread, minus infinity for none, of tokens first, first + 1 ...; all lanes of a warp call it.
    const auto offer = [&](const auto& values, int first) {
        constexpr int kCount = sizeof(values) / sizeof(values[0]);
        u32 taken = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const bool some = values[i] != numbers::lowest();
            u64 weighs = 0;
            if (some && (sums || by_weight)) weighs = weight(values[i]);
            if (sums) total += weighs;
            const bool takes = some && numbers::key_of(values[i]) >= cut && (!by_weight || weighs >= wanted.weight);
            taken |= static_cast<u32>(takes) << i;
        }
        if (!__any_sync(~0u, taken != 0)) return;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const bool takes = taken >> i & 1;
            const u32 lanes = __ballot_sync(~0u, takes);
            if (lanes == 0) continue;
            u32 place = 0;
            if (lane == 0) place = atomicAdd(&state->count, static_cast<u32>(__popc(lanes)));
            place = __shfl_sync(~0u, place, 0) + __popc(lanes & ((1u << lane) - 1));
            if (takes && place < kCandidates) {
                candidates[place] = {numbers::key_of(values[i]), static_cast<u32>(first + i)};
            }
        }
    };
    const int step = gridDim.x * kSlice;
    int first = blockIdx.x * kSlice + threadIdx.x * row::kChunk;
    row::Chunk chunk = row::fetch(of, first);
    for (int base = blockIdx.x * kSlice; base < vocabulary; base += step) {
        const row::Chunk next = row::fetch(of, first + step);  // while this one is looked at
        float values[row::kChunk];
        row::values_of(chunk, values);
        offer(values, first);
        first += step;
        chunk = next;
    }
    for (int base = blockIdx.x * kThreads; base < of.listed; base += gridDim.x * kThreads) {
        const int i = base + threadIdx.x, token = i < of.listed ? __ldcg(of.tokens + i) : -1;
        const float one[1] = {token < 0 ? numbers::lowest() : __ldcg(of.values + i)};
        offer(one, token);
    }
    if (sums) {
        total = reduce::sum_of_block<kWarps>(total, memory[0]);
        if (threadIdx.x == 0) atomicAdd(&state->total, total);
    }
    __syncthreads();
    const bool last = threadIdx.x == 0 && ptx::arrive(&state->arrived) == gridDim.x - 1;
    if (!__syncthreads_or(last)) return;

    const u32 count = __ldcg(&state->count);
    total = __ldcg(&state->total);
    const int constant = of.listed ? 0 : row::kConstantBits;
    bool whole = count > kCandidates || (static_cast<int>(count) < wanted.top_k && cut > numbers::kHidden);
    u32 kept = numbers::kNone;  // the least key that is kept
    if (!whole && !by_weight) {
        u32 keys[kOfThread];
        u64 weights[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) {
            const u32 place = threadIdx.x + i * kThreads;
            keys[i] = place < count ? __ldcg(&candidates[place].x) : numbers::kNone;
        }
        if (wanted.top_k && static_cast<int>(count) > wanted.top_k) {
            const auto ones = [&](const auto& f) {
#pragma unroll
                for (int i = 0; i < kOfThread; ++i) f(keys[i], 1ull);
            };
            kept = search<1>(ones, wanted.top_k, constant, memory);
        }
        if (wanted.top_p < 1.0f) {
            u64 held = 0;
#pragma unroll
            for (int i = 0; i < kOfThread; ++i) {
                const bool takes = keys[i] != numbers::kNone && keys[i] >= kept;
                weights[i] = takes ? weight(numbers::value_of(keys[i])) : 0;
                held += weights[i];
            }
            __syncthreads();
            held = reduce::sum_of_block<kWarps>(held, memory[0]);
            __syncthreads();
            const u64 need = share(wanted.top_p, wanted.top_k ? held : total);
            whole = held < need;
            if (!whole) {
                const auto those = [&](const auto& f) {
#pragma unroll
                    for (int i = 0; i < kOfThread; ++i) f(keys[i], weights[i]);
                };
                kept = max(kept, search<1>(those, need, constant, memory));
            }
        }
    }
    if (whole && !by_weight) {
        __syncthreads();
        kept = numbers::kNone;
        if (wanted.top_k) {
            const auto ones = [&](const auto& f) {
                row::each(of, threadIdx.x, kThreads, [&](float value, int) { f(numbers::key_of(value), 1ull); });
            };
            kept = search<2>(ones, wanted.top_k, constant, memory);
        }
        if (wanted.top_p < 1.0f) {
            const auto those = [&](const auto& f) {
                row::each(of, threadIdx.x, kThreads, [&](float value, int) {
                    const u32 key = numbers::key_of(value);
                    f(key, key >= kept ? weight(value) : 0);
                });
            };
            if (wanted.top_k) {
                total = 0;
                those([&](u32, u64 amount) { total += amount; });
                __syncthreads();
                total = reduce::sum_of_block<kWarps>(total, memory[0]);
                __syncthreads();
            }
            kept = max(kept, search<2>(those, share(wanted.top_p, total), constant, memory));
        }
    }

    const u64 stream = numbers::stream_of(__ldcg(seeds + slot), __ldcg(positions + row));
    u64 best = 0;
    const auto draw = [&](float value, int token) {
        if (numbers::key_of(value) < kept || (wanted.weight && weight(value) < wanted.weight)) return;
        const float noise = numbers::noise_of(numbers::word_of(stream, token));
        best = max(best, numbers::pair_of(__fadd_rn(__fmul_rn(value, scale), noise), token));
    };
    if (whole) {
        row::each(of, threadIdx.x, kThreads, draw);
    } else {
        for (u32 place = threadIdx.x; place < count; place += kThreads) {
            const uint2 candidate = {__ldcg(&candidates[place].x), __ldcg(&candidates[place].y)};
            draw(numbers::value_of(candidate.x), static_cast<int>(candidate.y));
        }
    }
    __syncthreads();
    best = reduce::most_of_block<kWarps>(best, memory[0]);
    if (threadIdx.x == 0) {
        const int token = best == 0 ? -1 : numbers::token_of(best);
        out[row] = token;
        if (newest != nullptr) newest[slot] = token;
    }
}
