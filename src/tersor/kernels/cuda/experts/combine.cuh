// What the experts of a token gave becomes one row: out[t] = sum over k of weights[t, k] * y[position[t * K + k]], in
// float32 and in the order of k, and what is added to it last. Pairs without an expert, whose positions follow those of
// all others, have no row in y and add nothing. Parameters: BF16 (1: bf16 rows, 0: fp16).
#pragma once

#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace combine {

constexpr int kThreads = 64;
constexpr int kChannels = 8;  // of a thread
constexpr int kAhead = 8;     // rows that a thread has under way

struct Piece {
    u16 values[kChannels];
};

// Channels first .. first + 7 of a row; zeros beyond its end. Rows are read past L1, as all that was just written.
template <bool kAligned>
__device__ __forceinline__ Piece load(const u16* row, int first, int channels) {
    Piece piece;
    if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(piece.values) = __ldcg(reinterpret_cast<const uint4*>(row + first));
    } else {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) piece.values[i] = first + i < channels ? __ldcg(row + first + i) : u16(0);
    }
    return piece;
}

// `ready`: places and weights were there before the kernel ahead started, and are read while that one still runs.
template <bool kAligned>
__device__ __forceinline__ void row_of(
    const u16* y, const float* weights, const int* position, const int4* blocks, const u16* addend, u16* out, int first,
    int top_k, int channels, bool ready) {
    Piece pieces[kAhead];
    float factors[kAhead];
    int rows[kAhead], with_expert;
    const auto find = [&](int base) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            rows[k] = base + k < top_k ? __ldcg(position + base + k) : with_expert;
            factors[k] = base + k < top_k ? __ldcg(weights + base + k) : 0.0f;
        }
    };
    if (!ready) launch::wait_for_earlier();
    with_expert = __ldcg(&blocks->y);
    find(0);
    if (ready) launch::wait_for_earlier();
    Piece added = {};
    if (addend != nullptr) added = load<kAligned>(addend, first, channels);
    float sums[kChannels] = {};
    for (int base = 0; base < top_k; base += kAhead) {
        if (base > 0) find(base);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (rows[k] < with_expert) {
                pieces[k] = load<kAligned>(y + static_cast<long long>(rows[k]) * channels, first, channels);
            }
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            if (rows[k] < with_expert) {
#pragma unroll
                for (int i = 0; i < kChannels; ++i) sums[i] += factors[k] * ptx::widen<BF16>(pieces[k].values[i]);
            }
        }
    }
    Piece rounded;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
        rounded.values[i] = ptx::narrow<BF16>(sums[i] + ptx::widen<BF16>(added.values[i]));
    }
    if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(out + first) = *reinterpret_cast<uint4*>(rounded.values);
    } else {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
            if (first + i < channels) out[first + i] = rounded.values[i];
        }
    }
}

}  // namespace combine

extern "C" __global__ void __launch_bounds__(combine::kThreads) TERSOR_ENTRY(
    const u16* __restrict__ y,           // [tokens * top_k, channels], sorted by expert
    const float* __restrict__ weights,   // [tokens, top_k]
    const int* __restrict__ position,    // [tokens * top_k]
    const int4* __restrict__ blocks,     // its first entry says how many pairs have an expert
    const u16* __restrict__ addend,      // [tokens, channels], or nothing
    u16* out,                            // [tokens, channels]
    int top_k,
    int channels,
    int aligned,                         // whether rows of y, addend and out start on 16 bytes
    int ready) {                         // as in row_of
    using namespace combine;
    launch::start_next();
    const int first = (blockIdx.y * kThreads + threadIdx.x) * kChannels;
    if (first >= channels) return;
    const long long token = blockIdx.x;
    const u16* added = addend == nullptr ? nullptr : addend + token * channels;
    weights += token * top_k;
    position += token * top_k;
    out += token * channels;
    if (aligned) {
        row_of<true>(y, weights, position, blocks, added, out, first, top_k, channels, ready);
    } else {
        row_of<false>(y, weights, position, blocks, added, out, first, top_k, channels, ready);
    }
}
