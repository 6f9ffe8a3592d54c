// Log probabilities of rows that ask: of a token, with its rank, and of the most probable tokens. A CTA has a row. The
// k-th greatest of the threads' own greatest logits is reached by k logits at least and by those of k threads at most:
// few, among which the k greatest are found. Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/reduce.cuh"
#include "sampling/row.cuh"

namespace logprobs {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kMost = 20;           // tokens asked for
constexpr int kCandidates = 5120;   // logits of kMost threads, of 262,144

// A float sum over the CTA in one order.
__device__ __forceinline__ float sum_of_block(float value, float* memory) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
    if (lane == 0) memory[threadIdx.x / 32] = value;
    __syncthreads();
    float total = memory[lane];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
    return total;
}

}  // namespace logprobs

extern "C" __global__ void __launch_bounds__(logprobs::kThreads, 1) TERSOR_ENTRY(
    const void* __restrict__ logits,
    const int* __restrict__ slots,
    const int* __restrict__ starts,
    const int* __restrict__ ends,
    const int* __restrict__ placed,
    const float* __restrict__ listed,
    const int* __restrict__ allowed,
    const int* __restrict__ allowed_rows,
    const long long* __restrict__ targets,  // [rows]: tokens whose log probability is asked for
    const int* __restrict__ asks,           // [rows]: how many most probable tokens, or -1 for nothing at all
    float* chosen,                          // [rows]
    int* ranks,                             // [rows]
    int* tokens,                            // [rows, most]
    float* values,                          // [rows, most]
    long long stride,
    int vocabulary,
    int words,
    int aligned,
    int most) {
    using namespace logprobs;
    __shared__ u64 memory[2][kWarps], found[kCandidates];
    __shared__ float sums[kWarps];
    __shared__ u32 count, greater;
    __shared__ float of_target;
    launch::start_next();
    launch::wait_for_earlier();
    const int row = blockIdx.x, slot = row::slot_of(slots, row), wanted = min(__ldcg(asks + slot), most);
    tokens += static_cast<long long>(row) * most;
    values += static_cast<long long>(row) * most;
    for (int i = max(wanted, 0) + threadIdx.x; i < most; i += kThreads) {
        tokens[i] = -1;
        values[i] = numbers::lowest();
    }
    const long long target = __ldcg(targets + row);
    if (threadIdx.x == 0) {
        count = greater = 0;
        of_target = numbers::lowest();
        if (wanted < 0) {
            chosen[row] = numbers::lowest();
            ranks[row] = 0;
        }
    }
    if (wanted < 0) return;
    __syncthreads();
    const auto of = row::row_of(
        row, slot, logits, stride, vocabulary, aligned, starts, ends, placed, listed, allowed, allowed_rows, words);
    u64 best = 0;
    const bool wrong = row::each(of, threadIdx.x, kThreads, [&](float value, int token) {
        best = max(best, numbers::pair_of(value, token));
        if (token == target) of_target = value;
    });
    const u64 peak = reduce::most_of_block<kWarps>(wrong ? numbers::kWrong : best, memory[0]);
    if (peak == 0 || peak == numbers::kWrong) {  // no probabilities
        for (int i = threadIdx.x; i < wanted; i += kThreads) {
            tokens[i] = -1;
            values[i] = numbers::lowest();
        }
        if (threadIdx.x == 0) {
            chosen[row] = numbers::lowest();
            ranks[row] = 0;
        }
        return;
    }
    const float largest = numbers::value_of(static_cast<u32>(peak >> 32)), at = of_target;
    u64 cut = ~0ull, left = best;
    for (int i = 0; i < wanted; ++i) {
        const u64 next = reduce::most_of_block<kWarps>(left, memory[(i + 1) % 2]);
        cut = max(next, static_cast<u64>(1));  // fewer threads have logits: all of these are candidates
        if (next == 0) break;
        if (left == next) left = 0;
    }
    float sum = 0.0f;
    u32 above = 0;
    row::each(of, threadIdx.x, kThreads, [&](float value, int token) {
        sum += expf(value - largest);
        above += value > at;
        const u64 pair = numbers::pair_of(value, token);
        if (pair >= cut) {
            const u32 place = atomicAdd(&count, 1u);
            if (place < kCandidates) found[place] = pair;
        }
    });
    above = __reduce_add_sync(~0u, above);
    if (threadIdx.x % 32 == 0) atomicAdd(&greater, above);
    const float logarithm = logf(sum_of_block(sum, sums));
    if (threadIdx.x == 0) {
        const bool there = at != numbers::lowest();
        chosen[row] = there ? (at - largest) - logarithm : numbers::lowest();
        ranks[row] = there ? static_cast<int>(greater) + 1 : 0;
    }
    u64 before = ~0ull;
    const int candidates = min(static_cast<int>(count), kCandidates);
    for (int i = 0; i < wanted; ++i) {
        best = 0;
        for (int place = threadIdx.x; place < candidates; place += kThreads) {
            if (found[place] < before) best = max(best, found[place]);
        }
        before = reduce::most_of_block<kWarps>(best, memory[(i + wanted + 1) % 2]);
        if (threadIdx.x == 0) {
            tokens[i] = before ? numbers::token_of(before) : -1;
            values[i] = before ? (numbers::value_of(static_cast<u32>(before >> 32)) - largest) - logarithm
                               : numbers::lowest();
        }
    }
}
