// Normalises rows; of many, an RMS norm makes bytes by norm_rows.cuh. In float32, rounded once:
//   y = residual + x / sqrt(mean(x^2) + eps) * (weight + offset)             (RMS norm)
//   y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias              (layer norm)
// With BYTES what was rounded becomes bytes with a scale for each row, or each 128 channels of one (common/quantized.cuh),
// and is not written itself.
// A CTA has a row in registers, with the weights of all its rows; while it works on one the next is under way.
// Parameters: BF16 (1: bf16, 0: fp16), LAYER (1: layer norm), PIECES (16 bytes that a thread has, at most), BYTES (0 or
// 1), INT8 and X_GROUPS (quantized.cuh), RESIDENT (CTAs of 512 threads whose registers a multiprocessor has room for).
#pragma once

#include "common/launch.cuh"
#include "common/quantized.cuh"
#include "small/norms.cuh"
#include "small/over_block.cuh"

namespace norms {

constexpr int kRoom = (__CUDA_ARCH__ % 100 == 0 && __CUDA_ARCH__ <= 1000 ? 2048 : 1536) / kMostThreads;
constexpr int kResident = RESIDENT < kRoom ? RESIDENT : kRoom;

}  // namespace norms

extern "C" __global__ void __launch_bounds__(norms::kMostThreads, norms::kResident) TERSOR_ENTRY(
    const u16* __restrict__ x,         // [rows, channels]
    const u16* __restrict__ weight,    // [channels]
    const u16* __restrict__ bias,      // [channels], or nothing
    const u16* __restrict__ residual,  // [rows, channels], or nothing
    void* out,                         // u16 or bytes [rows, out_stride]
    float* scales,                     // with BYTES [rows] or, in groups, as quantized::scale_at says; else nothing
    long long stride,                  // elements from one row of x to the next
    long long out_stride,              // elements from one row of out to the next
    int rows,
    int channels,  // a multiple of 8
    float eps,
    float offset,
    int ready) {  // whether weight and bias were there before the kernel ahead started
    using namespace norms;
    __shared__ float parts[2][kWarps];
    launch::start_next();
    const int count = channels / kChannels;
    Words given[PIECES], weights[PIECES], biases[PIECES];
    const auto load = [&](const u16* row, Words(&into)[PIECES]) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int piece = threadIdx.x + i * blockDim.x;
            into[i] = {};
            if (piece < count && row != nullptr) into[i] = norms::load(row, piece);
        }
    };
    if (!ready) launch::wait_for_earlier();
    load(weight, weights);
    if constexpr (LAYER) load(bias, biases);
    if (ready) launch::wait_for_earlier();
    load(x + blockIdx.x * stride, given);
    int turn = 0;  // of parts
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        Words next[PIECES], added[PIECES];
        const int following = row + static_cast<int>(gridDim.x);
        load(following < rows ? x + following * stride : nullptr, next);
        if constexpr (!LAYER) load(residual == nullptr ? nullptr : residual + 1LL * row * channels, added);

        float sum = 0.0f, mean = 0.0f;
        if constexpr (LAYER) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                add_values(given[i], sum);
                keep(given[i]);
            }
            mean = over_block<false>(sum, parts[turn]) / static_cast<float>(channels);
            turn ^= 1;
            sum = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            if (static_cast<int>(threadIdx.x + i * blockDim.x) < count) add_squares(given[i], mean, sum);
            keep(given[i]);
        }
        sum = over_block<false>(sum, parts[turn]);
        turn ^= 1;
        const float by = factor(sum, channels, eps);
        float magnitude = 0.0f, of_piece[PIECES] = {};  // what is beyond a row is zero
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int piece = threadIdx.x + i * blockDim.x;
            if (piece >= count) continue;
            float wide[kChannels];
            widen_weights(weights[i], offset, wide);
            float& largest = BYTES && quantized::kGroups ? of_piece[i] : magnitude;
            given[i] = finish<true>(given[i], wide, LAYER ? biases[i] : added[i], mean, by, largest);
            if constexpr (!BYTES) store(static_cast<u16*>(out) + row * out_stride, piece, given[i]);
        }
        if constexpr (BYTES && quantized::kGroups) {
            unsigned char* const codes = static_cast<unsigned char*>(out) + row * out_stride;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int piece = threadIdx.x + i * blockDim.x;
                const float most = quantized::largest_of_group(rounded(of_piece[i]));
                if (piece >= count) continue;
                if (piece % 16 == 0) scales[quantized::scale_at(piece, row, rows)] = quantized::scale(most);
                reinterpret_cast<uint2*>(codes)[piece] = encode(given[i], quantized::factor(most));
            }
        } else if constexpr (BYTES) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) keep(given[i]);
            magnitude = rounded(magnitude);
            magnitude = over_block<true>(magnitude, parts[turn]);
            turn ^= 1;
            if (threadIdx.x == 0) scales[row] = quantized::scale(magnitude);
            const float inverse = quantized::factor(magnitude);
            uint2* const codes = reinterpret_cast<uint2*>(static_cast<unsigned char*>(out) + row * out_stride);
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                const int piece = threadIdx.x + i * blockDim.x;
                if (piece < count) codes[piece] = encode(given[i], inverse);
            }
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            given[i] = next[i];
            keep(weights[i]);
            if constexpr (LAYER) keep(biases[i]);
        }
    }
}
