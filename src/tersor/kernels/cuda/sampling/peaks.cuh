// The first pass over rows of logits: each CTA has a slice of a row, and the one that ends last draws the row's token
// where none is filtered: the most probable one, or the one with the greatest logit / temperature + noise. For rows with
// top-k, top-p or min-p it leaves what later passes (weigh.cuh, choose.cuh) begin with: the greatest logit, and a cut
// that leaves few candidates. The k-th greatest of the maxima of groups of logits is exceeded by k logits at least.
// Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/bins.cuh"
#include "sampling/reduce.cuh"
#include "sampling/row.cuh"

namespace peaks {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSlice = kThreads * row::kChunk;
constexpr int kGroupLanes = 8;     // whose logits are a group
constexpr int kOfWarp = 32 / kGroupLanes, kOfSlice = kOfWarp * kWarps;  // groups
constexpr int kMostGroups = 4096;
constexpr int kOfThread = kMostGroups / kThreads;
// Where logits have no order, fifteen of sixteen groups have maxima above what 2.8 times as many logits are above as
// there are groups: nearly as many as there is room for where the vocabulary is large.
constexpr int kMostWanted = 2400;
constexpr int kLeastBit = 15;      // cuts are that coarse

// Scores, logit / temperature + noise, of which the greatest wins. Noise costs much, and a word of random bits little
// beside it, which bounds the noise: what cannot win has none computed, and 0 for a score.
struct Race {
    float scale;
    u64 stream;
    float floor;  // what a score must be at least

    __device__ __forceinline__ u64 score(float value, int token) const {
        const u64 word = numbers::word_of(stream, token);
        const float scaled = __fmul_rn(value, scale);
        if (scaled + numbers::most_noise(word) < floor) return 0;
        return numbers::pair_of(__fadd_rn(scaled, numbers::noise_of(word)), token);
    }
};

// A key that at least `wanted` of the groups' keys reach, and hardly more.
__device__ __forceinline__ u32 cut_of(const u32* groups, int count, int wanted, u32 (*memory)[kWarps]) {
    u32 keys[kOfThread];
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
        const int group = threadIdx.x + i * kThreads;
        keys[i] = group < count ? __ldcg(groups + group) : numbers::kNone;
    }
    u32 cut = 0;
    for (int bit = 31; bit >= kLeastBit; --bit) {
        const u32 tried = cut | 1u << bit;
        u32 reached = 0;
#pragma unroll
        for (int i = 0; i < kOfThread; ++i) reached += keys[i] >= tried;
        reached = __reduce_add_sync(~0u, reached);
        if (threadIdx.x % 32 == 0) memory[bit % 2][threadIdx.x / 32] = reached;
        __syncthreads();
        u32 total = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += memory[bit % 2][warp];
        if (static_cast<int>(total) >= wanted) cut = tried;
    }
    return cut;
}

}  // namespace peaks

extern "C" __global__ void __launch_bounds__(peaks::kThreads) TERSOR_ENTRY(
    const void* __restrict__ logits,
    const int* __restrict__ slots,          // as in adjust.cuh
    const int* __restrict__ starts,         // nothing where no row has a list
    const int* __restrict__ ends,
    const int* __restrict__ placed,
    const float* __restrict__ listed,
    const int* __restrict__ allowed,
    const int* __restrict__ allowed_rows,
    const float* __restrict__ temperature,  // [slots]: below 0 the row is padding
    const int* __restrict__ top_k,
    const float* __restrict__ top_p,
    const float* __restrict__ min_p,
    const long long* __restrict__ seeds,
    const int* __restrict__ positions,      // [rows]
    u64* partial,                           // [rows, slices]
    u32* groups,                            // [rows, slices, groups of a slice]
    u32* arrived,                           // [rows], zeros
    void* states_,                          // row::State [rows]
    uint4* weights,                         // [rows, kBins] numbers of 64 bits, for weigh.cuh; or nothing
    long long* out,                         // [rows]
    long long* newest,                      // [slots]: as out, or nothing
    long long stride,
    int vocabulary,
    int words,
    int aligned) {
    using namespace peaks;
    __shared__ u64 memory[kWarps];
    __shared__ u32 counts[2][kWarps];
    launch::start_next();
    launch::wait_for_earlier();
    row::State* const states = static_cast<row::State*>(states_);
    const int slices = gridDim.x, slice = blockIdx.x, row = blockIdx.y, lane = threadIdx.x % 32;
    const int slot = row::slot_of(slots, row);
    // All loads are under way before the first is waited for.
    const auto of = row::row_of(
        row, slot, logits, stride, vocabulary, aligned, starts, ends, placed, listed, allowed, allowed_rows, words);

    const int first = slice * kSlice + threadIdx.x * row::kChunk;
    const row::Chunk chunk = row::fetch(of, first);
    const float heat = __ldcg(temperature + slot), p = __ldcg(top_p + slot), least = __ldcg(min_p + slot);
    const int k = __ldcg(top_k + slot);
    if (heat < 0.0f) {
        if (slice == 0 && threadIdx.x == 0) {
            out[row] = -1;
            if (newest != nullptr) newest[slot] = -1;
            states[row].filtered = row::kDrawn;
        }
        return;
    }
    const bool filtered = row::filtered(heat, k, p, least, vocabulary);
    const bool noisy = heat >= numbers::kLeastTemperature && !filtered;
    float values[row::kChunk];
    bool wrong = row::values_of(chunk, values);
    float most_logit = values[0];
#pragma unroll
    for (int i = 1; i < row::kChunk; ++i) most_logit = fmaxf(most_logit, values[i]);
    if (filtered) {
        u32 group = numbers::key_of(most_logit);
#pragma unroll
        for (int lanes = 1; lanes < kGroupLanes; lanes *= 2) group = max(group, __shfl_xor_sync(~0u, group, lanes));
        if (lane % kGroupLanes == 0) {
            const long long place = static_cast<long long>(row) * slices + slice;
            groups[place * kOfSlice + threadIdx.x / 32 * kOfWarp + lane / kGroupLanes] = group;
        }
    }

    u64 best = 0;
    Race race = {};
    if (noisy) {
        race.scale = __fdiv_rn(numbers::kLog2E, heat);
        race.stream = numbers::stream_of(__ldcg(seeds + slot), __ldcg(positions + row));
        float reached = numbers::lowest(), most[row::kChunk];
        u64 place = race.stream + (static_cast<u64>(first) + 1) * numbers::kGolden;
#pragma unroll
        for (int i = 0; i < row::kChunk; ++i) {
            const float scaled = __fmul_rn(values[i], race.scale);
            const u64 word = numbers::mixed(place);  // word_of(stream, first + i)
            most[i] = scaled + numbers::most_noise(word);
            reached = fmaxf(reached, scaled + numbers::least_noise(word));
            place += numbers::kGolden;
        }
        const u32 of_slice = reduce::most_of_block<kWarps>(numbers::key_of(reached), counts[0]);
        race.floor = numbers::floor_below(numbers::value_of(of_slice));
        u32 able = 0;
#pragma unroll
        for (int i = 0; i < row::kChunk; ++i) {
            able |= static_cast<u32>(values[i] != numbers::lowest() && !(most[i] < race.floor)) << i;
        }
        row::each_set(able, values, [&](float value, int i) { best = max(best, race.score(value, first + i)); });
    } else if (most_logit != numbers::lowest()) {
        int place = row::kChunk - 1;  // the first of equals
#pragma unroll
        for (int i = row::kChunk - 2; i >= 0; --i) place = values[i] == most_logit ? i : place;
        best = numbers::pair_of(most_logit, first + place);
    }
    for (int i = slice * kThreads + threadIdx.x; i < of.listed; i += slices * kThreads) {
        const int token = __ldcg(of.tokens + i);
        if (token < 0) continue;
        const float value = __ldcg(of.values + i);
        wrong |= !(value < numbers::infinity());
        if (value == numbers::lowest()) continue;
        best = max(best, noisy ? race.score(value, token) : numbers::pair_of(value, token));
    }
    best = reduce::most_of_block<kWarps>(wrong ? numbers::kWrong : best, memory);
    if (threadIdx.x == 0) partial[static_cast<long long>(row) * slices + slice] = best;
    __syncthreads();
    const bool last = threadIdx.x == 0 && ptx::arrive(arrived + row) == static_cast<u32>(slices) - 1;
    if (!__syncthreads_or(last)) return;

    best = 0;
    for (int i = threadIdx.x; i < slices; i += kThreads) {
        best = max(best, __ldcg(partial + static_cast<long long>(row) * slices + i));
    }
    best = reduce::most_of_block<kWarps>(best, memory);
    const bool waits = filtered && best != 0 && best != numbers::kWrong;
    const u32 kind = waits ? row::kind_of(k, p, vocabulary) : row::kDrawn;
    u32 cut = 0;
    if (kind == row::kByCount || kind == row::kBySum) {
        const int count = slices * kOfSlice;
        int wanted = min(max(count - count / 16, 1), kMostWanted);
        if (k > 0) wanted = min(wanted, k);
        cut = cut_of(groups + static_cast<long long>(row) * count, count, wanted, counts);
    }
    if (kind == row::kBySum && weights != nullptr) {
        weights += static_cast<long long>(row) * (bins::kBins / 2);
#pragma unroll
        for (int i = threadIdx.x; i < bins::kBins / 2; i += kThreads) weights[i] = {};
    }
    if (threadIdx.x == 0) {
        arrived[row] = 0;
        if (!waits) {
            const int token = best == 0 || best == numbers::kWrong ? -1 : numbers::token_of(best);
            out[row] = token;
            if (newest != nullptr) newest[slot] = token;
        }
        row::State state = {};
        state.peak = static_cast<u32>(best >> 32);
        state.cut = cut;
        state.filtered = kind;
        if (kind == row::kBySum) {
            const float below = cut > numbers::kHidden ? numbers::value_of(state.peak) - numbers::value_of(cut) : 0.0f;
            state.a_unit = bins::a_unit_of(p, vocabulary, below * __fdiv_rn(numbers::kLog2E, heat));
        }
        states[row] = state;
    }
}
