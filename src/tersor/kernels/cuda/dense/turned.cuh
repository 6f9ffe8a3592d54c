// turned[c, t] = x[t, c]: what outlier_sums.cuh reads of many tokens, eight of a channel at a time. A thread has one
// channel of eight tokens; tokens behind the last are zeros.
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "small/pieces.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const u16* __restrict__ x,  // [n, channels]
    u16* turned,                // [channels, 8 * gridDim.y]
    long long stride,           // of x, in elements
    int channels,
    int n) {
    launch::start_next();
    launch::wait_for_earlier();
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    const int first = blockIdx.y * pieces::kChannels;
    pieces::Piece tokens = {};
#pragma unroll
    for (int k = 0; k < pieces::kChannels; ++k) {
        if (first + k < n) tokens.values[k] = __ldcg(x + (first + k) * stride + channel);
    }
    pieces::store(turned + static_cast<long long>(channel) * gridDim.y * pieces::kChannels, blockIdx.y, tokens);
}
