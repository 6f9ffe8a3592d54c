// The last pass over rows with top-k, top-p or min-p. Candidates go to a list: with top-k what reaches the cut of
// peaks.cuh, and with top-p the tokens of the bin of weigh.cuh, in which the least logit lies that is kept. What is kept
// in any case, as are all tokens of earlier bins, is drawn from at once. The CTA of a row that ends last finds the least
// logit that is kept, and draws among the candidates, too. Where these are more than there is room for, or fewer than
// top-k asks for, it searches the whole row instead; but of a bin whose logits are all equal all tokens are kept.
// Kept is what reaches the k-th greatest logit; of that, the greatest logits, all equal ones of them, whose weights
// reach top_p of the sum; and of that what weighs at least min_p of the greatest. Weights are integers, so sums have no
// order. Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/bins.cuh"
#include "sampling/reduce.cuh"
#include "sampling/row.cuh"

namespace choose {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = kThreads * row::kChunk;
constexpr int kCandidates = 16 * kThreads;  // of a row
constexpr float kUnit = 1099511627776.0f;   // the weight of the greatest logit
constexpr int kUnitBits = 40;
constexpr int kCtas = INPUT == 2 ? 1 : 2;  // of a multiprocessor: chunks of float32 have more registers

// The greatest key that amounts of need_of(their sum) reach, or of all, where that is more; `each(f)` calls
// f(key, amount) for a thread's. Keys are alike in their last `constant` bits.
template <class Each, class Need>
__device__ __forceinline__ u32 search(
    const Each& each, const Need& need_of, int constant, bins::Sums& sums, u64 (&memory)[kWarps + 2]) {
    u32 cut = 0;
    u64 need = 0;
    for (int top = 32; top > constant;) {
        const int bottom = max(top - bins::kBits, 0);
        __syncthreads();
        bins::clear<kThreads>(sums);
        each([&](u32 key, u64 amount) {
            if (static_cast<u64>(key ^ cut) >> top != 0) return;
            bins::add(sums, bins::kBins - 1 - (key >> bottom & ((1u << (top - bottom)) - 1)), amount);
        });
        __syncthreads();
        const auto found = bins::reaching<kThreads>(
            [&](int bin) { return bins::of(sums, bin); },
            [&](u64 total) {
                if (top == 32) need = need_of(total);
                return need = need < total ? need : total;
            },
            memory);
        need -= found.before;
        cut |= static_cast<u32>(bins::kBins - 1 - found.bin) << bottom;
        top = bottom;
    }
    return cut;
}

// What a token weighs at least; 0: all are heavy enough.
__device__ __forceinline__ u64 least_weight(float min_p) {
    return __double2ull_ru(__dmul_rn(static_cast<double>(fmaxf(min_p, 0.0f)), static_cast<double>(kUnit)));
}

// With an x beyond it no token of 2^-x weighs as much.
__device__ __forceinline__ float far_of(u64 weight) {
    const int zeros = __clz(static_cast<int>(weight >> 16));  // 2^40 has 7
    return zeros == 32 ? numbers::infinity() : static_cast<float>(kUnitBits - 16 - 31 + zeros) + 0.5f;
}

}  // namespace choose

extern "C" __global__ void __launch_bounds__(choose::kThreads, choose::kCtas) TERSOR_ENTRY(
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
    void* states_,       // row::State [rows], of peaks.cuh and weigh.cuh
    uint2* candidates,   // [rows, kCandidates]: key and token
    long long* out,
    long long* newest,
    long long stride,
    int vocabulary,
    int words,
    int aligned) {
    using namespace choose;
    __shared__ bins::Sums sums;
    __shared__ u64 memory[kWarps + 2];
    __shared__ u32 reached;            // the key of a score of a token that is kept
    __shared__ u32 greatest, inverse;  // of candidates, as in row::State
    launch::start_next();
    launch::wait_for_earlier();
    row::State* const state = static_cast<row::State*>(states_) + blockIdx.y;
    const u32 kind = __ldcg(&state->filtered);
    if (kind == row::kDrawn) return;
    const int row = blockIdx.y, lane = threadIdx.x % 32, slot = row::slot_of(slots, row);
    const float least = __ldcg(min_p + slot), far = far_of(least_weight(least));
    const float scale = __fdiv_rn(numbers::kLog2E, __ldcg(temperature + slot));
    const float peak = numbers::value_of(__ldcg(&state->peak)), a_unit = __ldcg(&state->a_unit);
    const u32 cut = __ldcg(&state->cut), bin = kind == row::kBySum ? __ldcg(&state->bin) : bins::kBins;
    const u64 stream = numbers::stream_of(__ldcg(seeds + slot), __ldcg(positions + row));
    const auto of = row::row_of(
        row, slot, logits, stride, vocabulary, aligned, starts, ends, placed, listed, allowed, allowed_rows, words);
    const auto below = [&](float value) { return __fmul_rn(__fsub_rn(peak, value), scale); };
    const auto weight = [&](float value) { return numbers::weight_of(below(value)); };
    candidates += static_cast<long long>(row) * kCandidates;

    if (threadIdx.x == 0) {
        reached = numbers::key_of(__fmul_rn(peak, scale) + numbers::kLeastNoise);
        greatest = inverse = 0;
    }
    __syncthreads();
    const auto now = [](u32& shared) { return *static_cast<volatile u32*>(&shared); };
    const auto floor_now = [&] { return numbers::floor_below(numbers::value_of(now(reached))); };
    float floor = floor_now();
    const auto heavy = [&](float value) {
        return !(least > 0.0f) || weight(value) >= least_weight(least);
    };
    // Whether a token, were it kept, could win.
    const auto able = [&](float value, int token) {
        const u64 word = numbers::word_of(stream, token);
        return !(__fmul_rn(value, scale) + numbers::most_noise(word) < floor);
    };
    const auto score = [&](float value, int token) {
        const float noise = numbers::noise_of(numbers::word_of(stream, token));
        return numbers::pair_of(__fadd_rn(__fmul_rn(value, scale), noise), token);
    };
    u64 best = 0, of_bin = 0;
    // Takes logits of a thread, minus infinity for none, of tokens first, first + 1 ...; all lanes of a warp call it.
    const auto offer = [&](const auto& values, int first) {
        constexpr int kCount = sizeof(values) / sizeof(values[0]);
        u32 taken = 0, run = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float x = below(values[i]);
            bool takes = values[i] != numbers::lowest() && numbers::key_of(values[i]) >= cut, runs = false;
            if (kind != row::kByCount) {
                const u32 own = kind == row::kBySum ? bins::bin_of(x, a_unit) : 0;
                takes = own == bin && x < 41.0f;
                runs = values[i] != numbers::lowest() && x <= far && (own < bin || takes);
            }
            taken |= static_cast<u32>(takes) << i;
            if (runs) run |= static_cast<u32>(able(values[i], first + i)) << i;
        }
        bool more = false;
        row::each_set(run, values, [&](float value, int i) {
            if (!heavy(value)) return;
            const u64 pair = score(value, first + i);
            if (taken >> i & 1) {
                of_bin = max(of_bin, pair);
            } else {
                more |= pair > best;
                best = max(best, pair);
            }
        });
        if (__any_sync(~0u, more)) {
            const u32 most = __reduce_max_sync(~0u, static_cast<u32>(best >> 32));
            if (lane == 0) atomicMax(&reached, most);
            __syncwarp();
        }
        if (__any_sync(~0u, taken != 0)) {
            u32 lanes[kCount], all = 0, place = 0;
#pragma unroll
            for (int i = 0; i < kCount; ++i) all += __popc(lanes[i] = __ballot_sync(~0u, taken >> i & 1));
            if (lane == 0) place = atomicAdd(&state->count, all);
            place = __shfl_sync(~0u, place, 0);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const u32 own = place + __popc(lanes[i] & ((1u << lane) - 1)), key = numbers::key_of(values[i]);
                if (taken >> i & 1) {
                    if (own < kCandidates) candidates[own] = {key, static_cast<u32>(first + i)};
                    if (key > now(greatest)) atomicMax(&greatest, key);
                    if (~key > now(inverse)) atomicMax(&inverse, ~key);
                }
                place += __popc(lanes[i]);
            }
        }
        floor = floor_now();
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
    if (kind != row::kByCount) {
        best = reduce::most_of_warp(best);
        of_bin = reduce::most_of_warp(of_bin);
        if (lane == 0 && best != 0) atomicMax(&state->best, best);
        if (lane == 0 && of_bin != 0) atomicMax(&state->of_bin, of_bin);
    }
    __syncthreads();
    if (threadIdx.x == 0 && greatest != 0) {
        atomicMax(&state->greatest, greatest);
        atomicMax(&state->inverse, inverse);
    }
    const bool last = threadIdx.x == 0 && ptx::arrive(&state->arrived) == gridDim.x - 1;
    if (!__syncthreads_or(last)) return;

    best = threadIdx.x == 0 ? __ldcg(&state->best) : 0;
    const u32 count = __ldcg(&state->count);
    const int k = kind == row::kByCount ? __ldcg(top_k + slot) : 0;
    const float p = __ldcg(top_p + slot);
    const int constant = of.listed ? 0 : row::kConstantBits;
    bool whole = count > kCandidates || (static_cast<int>(count) < k && cut > numbers::kHidden);
    bool drawn = kind == row::kByWeight;
    if (whole && kind == row::kBySum && __ldcg(&state->greatest) == ~__ldcg(&state->inverse)) {
        if (threadIdx.x == 0) best = max(best, __ldcg(&state->of_bin));
        drawn = true;
    }
    u32 kept = numbers::kNone;  // the least key that is kept
    const auto every = [&](const auto& f) {
        if (whole) {
            row::each(of, threadIdx.x, kThreads, f);
            return;
        }
        for (u32 place = threadIdx.x; place < count; place += kThreads) {
            f(numbers::value_of(__ldcg(&candidates[place].x)), static_cast<int>(__ldcg(&candidates[place].y)));
        }
    };
    if (!drawn && k && (whole || static_cast<int>(count) > k)) {
        const u64 most = k;
        const auto ones = [&](const auto& f) {
            every([&](float value, int) { f(numbers::key_of(value), static_cast<u64>(1)); });
        };
        kept = search(ones, [&](u64) { return most; }, constant, sums, memory);
    }
    if (!drawn && p < 1.0f) {
        const bool by_sum = kind == row::kBySum;
        const u64 of_bin_alone = __ldcg(&state->need);
        const auto those = [&](const auto& f) {
            every([&](float value, int) {
                const u32 key = numbers::key_of(value);
                if (by_sum ? bins::bin_of(below(value), a_unit) == bin : key >= kept) f(key, weight(value));
            });
        };
        const auto need_of = [&](u64 total) { return by_sum ? of_bin_alone : row::share(p, total); };
        kept = max(kept, search(those, need_of, constant, sums, memory));
    }
    if (!drawn) {
        every([&](float value, int token) {
            if (numbers::key_of(value) < kept || !able(value, token) || !heavy(value)) return;
            best = max(best, score(value, token));
        });
    }
    __syncthreads();
    best = reduce::most_of_block<kWarps>(best, memory);
    if (threadIdx.x == 0) {
        const int token = best == 0 ? -1 : numbers::token_of(best);
        out[row] = token;
        if (newest != nullptr) newest[slot] = token;
    }
}
