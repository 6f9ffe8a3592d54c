// The second pass over rows with top-p and without top-k: the weights of a row's tokens, summed by bins of how far a
// logit is below the greatest, say in which bin the least logit lies that is kept, and what of that bin is needed. Each
// CTA has a part of a row, and the one that ends last finds the bin. Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/bins.cuh"
#include "sampling/reduce.cuh"
#include "sampling/row.cuh"

namespace weigh {

constexpr int kThreads = 512;

}  // namespace weigh

extern "C" __global__ void __launch_bounds__(weigh::kThreads, 2) TERSOR_ENTRY(
    const void* __restrict__ logits,
    const int* __restrict__ slots,
    const int* __restrict__ starts,
    const int* __restrict__ ends,
    const int* __restrict__ placed,
    const float* __restrict__ listed,
    const int* __restrict__ allowed,
    const int* __restrict__ allowed_rows,
    const float* __restrict__ temperature,
    const float* __restrict__ top_p,
    void* states_,  // row::State [rows], of peaks.cuh
    u64* weights,   // [rows, kBins], zeros of peaks.cuh
    long long stride,
    int vocabulary,
    int words,
    int aligned) {
    using namespace weigh;
    __shared__ bins::Sums sums;
    __shared__ u64 memory[kThreads / 32 + 2];
    launch::start_next();
    launch::wait_for_earlier();
    const int row = blockIdx.y;
    row::State* const state = static_cast<row::State*>(states_) + row;
    if (__ldcg(&state->filtered) != row::kBySum) return;
    const int slot = row::slot_of(slots, row);
    const float p = __ldcg(top_p + slot), scale = __fdiv_rn(numbers::kLog2E, __ldcg(temperature + slot));
    const float peak = numbers::value_of(__ldcg(&state->peak)), a_unit = __ldcg(&state->a_unit);
    const auto of = row::row_of(
        row, slot, logits, stride, vocabulary, aligned, starts, ends, placed, listed, allowed, allowed_rows, words);
    bins::clear<kThreads>(sums);

    u64 rest = 0;  // of the last bin, where most tokens are
    row::each_chunk(of, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads, [&](const auto& values, int) {
        constexpr int kCount = sizeof(values) / sizeof(float);
        u64 weights[kCount], sum = 0;
        int own[kCount];
        bool alike = true;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float x = __fmul_rn(__fsub_rn(peak, values[i]), scale);  // infinity of none: it weighs nothing
            weights[i] = numbers::weight_of(x);
            own[i] = bins::bin_of(x, a_unit);
            if (own[i] == bins::kBins - 1) rest += weights[i];
            alike &= own[i] == own[0];
            sum += weights[i];
        }
        if (alike && own[0] == bins::kBins - 1) return;
        if (alike) {  // where all tokens are, atomics wait for each other
            bins::add(sums, own[0], sum);
            return;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (own[i] != bins::kBins - 1) bins::add(sums, own[i], weights[i]);
        }
    });
    rest = reduce::sum_of_warp(rest);
    if (threadIdx.x % 32 == 0 && rest != 0) bins::add(sums, bins::kBins - 1, rest);
    __syncthreads();
    weights += static_cast<long long>(row) * bins::kBins;
    for (int i = threadIdx.x; i < bins::kBins; i += kThreads) {
        const u64 sum = bins::of(sums, i);
        if (sum != 0) atomicAdd(weights + i, sum);
    }
    __syncthreads();
    const bool last = threadIdx.x == 0 && ptx::arrive(&state->arrived) == gridDim.x - 1;
    if (!__syncthreads_or(last)) return;

    u64 need = 0;
    const auto found = bins::reaching<kThreads>(
        [&](int i) { return __ldcg(weights + i); },
        [&](u64 total) { return need = row::share(p, total); },
        memory);
    if (threadIdx.x == 0) {
        state->bin = found.bin;
        state->need = need - found.before;
        state->arrived = 0;
    }
}
