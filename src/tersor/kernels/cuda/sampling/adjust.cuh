// Logits of tokens that are listed, after penalties and bias, go to a list of their own; the row gets minus infinity in
// their place. A CTA has a row. Parameters: INPUT (row.cuh).
#pragma once

#include "common/launch.cuh"
#include "sampling/row.cuh"

namespace adjust {

constexpr int kThreads = 256;

__device__ __forceinline__ float penalised(float value, int count, float repetition, float presence, float frequency) {
    if (count >= 0) value = value > 0.0f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
    if (count > 0) {
        value = __fsub_rn(value, __fadd_rn(__fmul_rn(frequency, static_cast<float>(count)), presence));
    }
    return value;
}

}  // namespace adjust

extern "C" __global__ void __launch_bounds__(adjust::kThreads) TERSOR_ENTRY(
    void* logits,                          // [rows, vocabulary], `stride` from row to row
    const int* __restrict__ slots,         // [rows]: where a row's options are in what is [slots] here; or nothing
    const int* __restrict__ starts,        // [slots]: where a row's tokens stand in the list
    const int* __restrict__ ends,          // [slots]
    const int* __restrict__ tokens,        // [listed]: of a row no two are equal; -1 stands for the newest
    const int* __restrict__ counts,        // [listed]: times drawn; -1 of a token that was not seen
    const float* __restrict__ biases,      // [listed]
    const long long* __restrict__ newest,  // [slots]: drawn and, where `pending`, not counted yet; -1 is none
    const int* __restrict__ pending,       // [slots]
    const float* __restrict__ repetition,  // [slots], as the next two
    const float* __restrict__ presence,
    const float* __restrict__ frequency,
    const int* __restrict__ allowed,
    const int* __restrict__ allowed_rows,
    int* placed,                           // [listed]: the token, -1 of one that is not in the vocabulary
    float* values,                         // [listed]: its logit
    long long stride,
    int vocabulary,
    int words) {
    using namespace adjust;
    launch::start_next();
    launch::wait_for_earlier();
    const int row = blockIdx.x, slot = row::slot_of(slots, row);
    const int begin = __ldcg(starts + slot), end = __ldcg(ends + slot);
    if (begin >= end) return;
    const long long last = __ldcg(pending + slot) ? __ldcg(newest + slot) : -1;
    int found = 0;
    for (int i = begin + threadIdx.x; i < end; i += kThreads) found |= last >= 0 && __ldcg(tokens + i) == last;
    found = __syncthreads_or(found);
    row::Given* const given = static_cast<row::Given*>(logits) + row * stride;
    const float repeats = __ldcg(repetition + slot), present = __ldcg(presence + slot), often = __ldcg(frequency + slot);
    const int of = allowed == nullptr ? -1 : __ldcg(allowed_rows + slot);
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
        int token = __ldcg(tokens + i), count = __ldcg(counts + i);
        if (token < 0 && last >= 0 && last < vocabulary && !found) {
            token = static_cast<int>(last);
            count = 1;
        } else if (token >= 0 && token == last) {
            count = max(count, 0) + 1;
        }
        const bool there = token >= 0 && token < vocabulary;
        placed[i] = there ? token : -1;
        if (!there) continue;
        const float before = row::widen(__ldcg(given + token));
        float value = __fadd_rn(penalised(before, count, repeats, present, often), __ldcg(biases + i));
        if (!(before < numbers::infinity())) {
            value = numbers::infinity();
        } else if (of >= 0 && !(__ldcg(allowed + static_cast<long long>(of) * words + token / 32) >> token % 32 & 1)) {
            value = numbers::lowest();
        }
        values[i] = value;
        given[token] = row::narrow(numbers::lowest());
    }
}
