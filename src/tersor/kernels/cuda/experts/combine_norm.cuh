// What the experts of a token gave becomes one row, and that row is normed for the layer behind: a CTA has a token. Each
// number has the bits that a launch of combine.cuh and one of norm.cuh give.
// Parameters: BF16 (1: bf16 rows, 0: fp16), PIECES (16 bytes that a thread has, at most).
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "small/over_block.cuh"
#include "small/pieces.cuh"

namespace combine {

constexpr int kAhead = 8 / PIECES;  // rows that a thread has under way

}  // namespace combine

extern "C" __global__ void __launch_bounds__(norms::kMostThreads) TERSOR_ENTRY(
    const u16* __restrict__ y,         // [tokens * top_k, channels], sorted by expert
    const float* __restrict__ weights,  // [tokens, top_k]
    const int* __restrict__ position,  // [tokens * top_k]
    const int4* __restrict__ blocks,   // its first entry says how many pairs have an expert
    const u16* __restrict__ addend,    // [tokens, channels], or nothing
    const u16* __restrict__ gain,      // [channels], the weights of the norm
    u16* out,                          // [tokens, channels]
    u16* normed,                       // [tokens, channels]
    int top_k,
    int channels,  // a multiple of 8
    float eps,
    float offset,
    int ready) {  // whether gain, weights, position and blocks were there before the kernel ahead started
    using namespace combine;
    using pieces::kChannels;
    __shared__ float warp_sums[norms::kWarps];
    launch::start_next();
    const int count = channels / kChannels;
    const long long token = blockIdx.x, start = token * channels;
    weights += token * top_k;
    position += token * top_k;
    const auto load = [&](const u16* row, pieces::Piece(&into)[PIECES]) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int piece = threadIdx.x + i * blockDim.x;
            into[i] = {};
            if (piece < count && row != nullptr) into[i] = pieces::load(row, piece);
        }
    };
    float factors[kAhead];
    int rows[kAhead];
    if (!ready) launch::wait_for_earlier();
    const int with_expert = __ldcg(&blocks->y);
    const auto find = [&](int base) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            rows[k] = base + k < top_k ? __ldcg(position + base + k) : with_expert;
            factors[k] = base + k < top_k ? __ldcg(weights + base + k) : 0.0f;
        }
    };
    pieces::Piece gains[PIECES], added[PIECES];
    find(0);
    load(gain, gains);
    if (ready) launch::wait_for_earlier();
    load(addend == nullptr ? nullptr : addend + start, added);
    float sums[PIECES][kChannels] = {};
    for (int base = 0; base < top_k; base += kAhead) {
        if (base > 0) find(base);
        pieces::Piece given[kAhead][PIECES];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            load(rows[k] < with_expert ? y + static_cast<long long>(rows[k]) * channels : nullptr, given[k]);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (rows[k] >= with_expert) continue;
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
#pragma unroll
                for (int c = 0; c < kChannels; ++c) sums[i][c] += factors[k] * ptx::widen<BF16>(given[k][i].values[c]);
            }
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = threadIdx.x + i * blockDim.x;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            added[i].values[c] = ptx::narrow<BF16>(sums[i][c] + ptx::widen<BF16>(added[i].values[c]));
        }
        if (piece >= count) continue;
        pieces::store(out + start, piece, added[i]);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            const float value = ptx::widen<BF16>(added[i].values[c]);
            squares += value * value;
        }
    }
    const float total = norms::over_block<false>(squares, warp_sums);
    const float factor = 1.0f / sqrtf(total / static_cast<float>(channels) + eps);
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int piece = threadIdx.x + i * blockDim.x;
        if (piece >= count) continue;
        pieces::Piece rounded;
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
            const float value = ptx::widen<BF16>(added[i].values[c]) * factor;
            float result = value * (ptx::widen<BF16>(gains[i].values[c]) + offset);
            result += 0.0f;  // as no residual: -0 becomes 0
            rounded.values[c] = ptx::narrow<BF16>(result);
        }
        pieces::store(normed + start, piece, rounded);
    }
}
