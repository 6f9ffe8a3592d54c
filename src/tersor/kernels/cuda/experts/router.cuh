// The logits of a router for few tokens (logits.cuh). Weights lie in registers before a thread waits for the kernel ahead,
// and what is left is to read x, to add up products, and to add up the sums of all threads.
// Parameters: those of logits.cuh, and FLOAT_OUT (1: logits are float32, else as x).
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "experts/logits.cuh"

extern "C" __global__ void __launch_bounds__(router::kMostThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,        // [tokens, channels]
    const void* __restrict__ weight,  // [experts, channels]
    const void* __restrict__ bias,    // [experts], or nothing
    void* out,                        // [tokens, experts]
    int tokens,
    int experts,
    int channels,  // a multiple of 8
    int ready) {   // whether weight and bias were there before the kernel ahead started
    using namespace router;
    launch::start_next();
    const int first_expert = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    const int count = channels / kChannels, thread = threadIdx.x, threads = blockDim.x;
    const int expert = first_expert + thread / TOKENS, token = first_token + thread % TOKENS;  // of the thread at last
    const bool ends = thread < kSums && expert < experts && token < tokens;
    if (!ready) launch::wait_for_earlier();
    Held weights;
    load_weights(weights, weight, first_expert, experts, count, threads);
    float added = 0.0f;
    if (ends && bias != nullptr) added = bias_of(bias, expert);
    if (ready) launch::wait_for_earlier();

    float sums[kSums] = {};
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        Piece given;
        load_tokens(given, x, i, first_token, tokens, count, threads);
        multiply(sums, weights, i, given);
    }
    const float total = total_of(sums, threads) + added;
    if (!ends) return;
    const long long at = static_cast<long long>(token) * experts + expert;
    if constexpr (FLOAT_OUT) {
        static_cast<float*>(out)[at] = total;
    } else {
        static_cast<u16*>(out)[at] = ptx::narrow<BF16>(total);
    }
}
