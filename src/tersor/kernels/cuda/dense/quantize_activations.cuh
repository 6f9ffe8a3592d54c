// Activations as bytes with a scale for each token, or each 128 channels of one (common/quantized.cuh). One CTA a row of
// codes, with threads for all pieces of a row: all of it is under way at once. Parameters: BF16 (1: bf16 activations, 0:
// fp16), INT8 (1: int8, 0: e4m3), X_GROUPS (1: scales in groups, 0: one a token), EPILOGUE (common/gate.cuh; not 0: a row
// holds gate, then up, which become one first) and RELU (without a gate, 1: what is negative becomes 0 first). What those
// make is rounded to 16 bits as small/pointwise.cuh rounds it.
#pragma once

#include "common/gate.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/quantized.cuh"

namespace quantize {

constexpr int kMostThreads = 1024;
constexpr int kResident = gate::kGated ? 1 : 2;  // CTAs of as many threads on a multiprocessor: a gate takes registers
constexpr int kKept = 4;  // pieces of 8 channels that a thread keeps in registers; longer rows are read twice
constexpr int kAhead = 2;  // pieces that are under way for a thread, of scales in groups, which need no row as a whole

struct alignas(16) Piece {
    u16 values[8];
};

// Channels first .. first + 7 of a row; zeros beyond its end. Read past L1, as residuals are (sm90_finish.cuh).
__device__ __forceinline__ Piece load_given(const u16* row, int first, int ic, bool whole) {
    Piece piece;
    if (whole) {
        *reinterpret_cast<uint4*>(piece.values) = __ldcg(reinterpret_cast<const uint4*>(row + first));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) piece.values[i] = first + i < ic ? __ldcg(row + first + i) : u16(0);
    }
    return piece;
}

// The same of what is quantised.
__device__ __forceinline__ Piece load(const u16* row, int first, int ic, bool whole) {
    Piece piece = load_given(row, first, ic, whole);
    if constexpr (gate::kGated) {
        const Piece ups = load_given(row + ic, first, ic, whole);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float one = gate::combine(ptx::widen<BF16>(piece.values[i]), ptx::widen<BF16>(ups.values[i]));
            piece.values[i] = ptx::narrow<BF16>(one);  // 0 beyond the end, too
        }
    } else if constexpr (RELU) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (ptx::widen<BF16>(piece.values[i]) < 0.0f) piece.values[i] = 0;  // NaN stays NaN
        }
    }
    return piece;
}

}  // namespace quantize

extern "C" __global__ void __launch_bounds__(quantize::kMostThreads, quantize::kResident) TERSOR_ENTRY(
    const u16* __restrict__ x,    // [tokens, IC], with a gate [tokens, 2 * IC]
    const int* order,             // [N] or null: row i is that of token order[i] / top_k, or of token i
    unsigned char* codes,         // [N, codes_stride], the last bytes of a row are padding
    float* scales,                // [N] or, in groups, as quantized::scale_at says
    long long stride,
    long long codes_stride,       // a multiple of 16, at least IC
    int ic,                       // channels of a row of codes
    int whole,                    // whether rows of x are whole pieces that start on 16 bytes
    int top_k) {
    using namespace quantize;
    __shared__ float of_warp[kMostThreads / 32];
    launch::start_next();
    launch::wait_for_earlier();
    const long long token = blockIdx.x;
    const u16* row = x + (order == nullptr ? token : __ldcg(order + token) / top_k) * stride;
    const int start = threadIdx.x * 8, step = blockDim.x * 8, lane = threadIdx.x % 32;
    const bool keeps = whole && ic <= kKept * step;
    Piece kept[kKept];
    unsigned char* target = codes + token * codes_stride;
    if constexpr (quantized::kGroups) {
#pragma unroll 1
        for (int before = 0; before < ic; before += kAhead * step) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int first = before + start + i * step;
                kept[i] = {};
                if (first < ic) kept[i] = load(row, first, ic, whole);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int first = before + start + i * step;
                const float most = quantized::largest_of_group(quantized::largest(kept[i].values, 0.0f));
                quantized::keep_packed(kept[i].values);
                if (first >= ic) continue;
                const int piece = first / 8;
                if (piece % 16 == 0) scales[quantized::scale_at(piece, blockIdx.x, gridDim.x)] = quantized::scale(most);
                *reinterpret_cast<uint2*>(target + first) = quantized::encode(kept[i].values, quantized::factor(most));
            }
        }
        return;
    }
    float magnitude = 0.0f;
    if (keeps) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            kept[i] = {};
            if (start + i * step < ic) kept[i] = load(row, start + i * step, ic, true);
        }
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            magnitude = quantized::largest(kept[i].values, magnitude);
            quantized::keep_packed(kept[i].values);
        }
    } else {
#pragma unroll 1
        for (int first = start; first < ic; first += step) {
            magnitude = quantized::largest(load(row, first, ic, whole).values, magnitude);
        }
    }
    magnitude = quantized::largest_of_warp(magnitude);
    if (lane == 0) of_warp[threadIdx.x / 32] = magnitude;
    __syncthreads();
    magnitude = quantized::largest_of_warp(lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : 0.0f);
    if (threadIdx.x == 0) scales[token] = quantized::scale(magnitude);
    const float factor = quantized::factor(magnitude);
    if (keeps) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
            const int first = start + i * step;
            if (first < ic) *reinterpret_cast<uint2*>(target + first) = quantized::encode(kept[i].values, factor);
        }
    } else {
#pragma unroll 1
        for (int first = start; first < ic; first += step) {
            const Piece again = load(row, first, ic, whole);
            *reinterpret_cast<uint2*>(target + first) = quantized::encode(again.values, factor);
        }
    }
}
