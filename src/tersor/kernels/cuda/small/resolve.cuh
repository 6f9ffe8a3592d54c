// The tokens of a step, those named by the slot that drew them looked up, and the lengths of the texts that draw.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const int* __restrict__ tokens,         // [count]; -1 - slot: what was drawn there
    const long long* __restrict__ newest,   // [slots]: what was drawn last
    const int* __restrict__ starts,         // [texts + 1]: which tokens belong to a text
    const int* __restrict__ lengths,        // [texts]
    const int* __restrict__ places,         // [draws]: tokens that are drawn after
    long long* found,                       // [count]
    int* drawn_lengths,                     // [draws]
    int count,
    int texts,
    int draws) {
    launch::start_next();
    launch::wait_for_earlier();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        const int token = __ldcg(tokens + i);
        found[i] = token < 0 ? __ldcg(newest + (-1 - token)) : token;
    }
    if (i < draws) {
        const int place = __ldcg(places + i);
        int first = 0, last = texts - 1;  // the text of the token is one of these
        while (first < last) {
            const int middle = (first + last) / 2;
            if (__ldcg(starts + middle + 1) > place) last = middle; else first = middle + 1;
        }
        drawn_lengths[i] = __ldcg(lengths + first);
    }
}
