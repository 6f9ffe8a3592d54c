// Keeps the tokens that rows drew where the next step looks for them, a slot a text.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const long long* __restrict__ drawn,  // [draws]; -1: none could be drawn
    const int* __restrict__ slots,        // [draws]
    long long* newest,                    // [slots]
    int draws) {
    launch::start_next();
    launch::wait_for_earlier();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < draws) {
        const long long token = __ldcg(drawn + i);
        newest[__ldcg(slots + i)] = token < 0 ? 0 : token;
    }
}
