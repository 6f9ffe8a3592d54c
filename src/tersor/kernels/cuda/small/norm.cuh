// Normalises rows: a CTA has one, in registers. In float32, rounded once:
//   y = residual + x / sqrt(mean(x^2) + eps) * (weight + offset)             (RMS norm)
//   y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias              (layer norm)
// Parameters: BF16 (1: bf16, 0: fp16), LAYER (1: layer norm), PIECES (16 bytes that a thread has, at most).
#pragma once

#include "common/launch.cuh"
#include "small/block_sum.cuh"
#include "small/pieces.cuh"

extern "C" __global__ void __launch_bounds__(norms::kMostThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,         // [rows, channels]
    const u16* __restrict__ weight,    // [channels]
    const u16* __restrict__ bias,      // [channels], or nothing
    const u16* __restrict__ residual,  // [rows, channels], or nothing
    u16* out,                          // [rows, channels]
    long long stride,                  // elements from one row of x to the next
    int channels,                      // a multiple of 8
    float eps,
    float offset,
    int ready) {  // whether weight and bias were there before the kernel ahead started
    using namespace norms;
    using pieces::kChannels;
    __shared__ float first_sums[kWarps], second_sums[kWarps];
    launch::start_next();
    const int count = channels / kChannels;
    const long long start = static_cast<long long>(blockIdx.x) * channels;
    pieces::Piece given[PIECES], weights[PIECES], biases[PIECES], added[PIECES];
    const auto load = [&](const u16* row, pieces::Piece(&into)[PIECES]) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int piece = threadIdx.x + i * blockDim.x;
            into[i] = {};
            if (piece < count && row != nullptr) into[i] = pieces::load(row, piece);
        }
    };
    if (!ready) launch::wait_for_earlier();
    load(weight, weights);
    if constexpr (LAYER) load(bias, biases);
    if (ready) launch::wait_for_earlier();
    load(x + blockIdx.x * stride, given);
    if constexpr (!LAYER) load(residual == nullptr ? nullptr : residual + start, added);

    float sum = 0.0f, mean = 0.0f;
    if constexpr (LAYER) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
#pragma unroll
            for (int k = 0; k < kChannels; ++k) sum += ptx::widen<BF16>(given[i].values[k]);
        }
        mean = sum_of_block(sum, first_sums) / static_cast<float>(channels);
        sum = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        if (static_cast<int>(threadIdx.x + i * blockDim.x) < count) {
#pragma unroll
            for (int k = 0; k < kChannels; ++k) {
                const float value = ptx::widen<BF16>(given[i].values[k]) - mean;
                sum += value * value;
            }
        }
    }
    const float factor = 1.0f / sqrtf(sum_of_block(sum, second_sums) / static_cast<float>(channels) + eps);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = threadIdx.x + i * blockDim.x;
        if (piece >= count) continue;
        pieces::Piece rounded;
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            const float value = (ptx::widen<BF16>(given[i].values[k]) - mean) * factor;
            float result = value * (ptx::widen<BF16>(weights[i].values[k]) + offset);
            if constexpr (LAYER) {
                result += ptx::widen<BF16>(biases[i].values[k]);
            } else {
                result += ptx::widen<BF16>(added[i].values[k]);
            }
            rounded.values[k] = ptx::narrow<BF16>(result);
        }
        pieces::store(out + start, piece, rounded);
    }
}
