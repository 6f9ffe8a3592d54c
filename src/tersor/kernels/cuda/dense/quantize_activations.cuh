// Activations as e4m3 with a scale for each token: scale = largest magnitude / 448, code = round(x * 448 / largest).
// One CTA a row of codes. A token with an infinity or a NaN gets NaNs. Parameters: BF16 (1: bf16 activations, 0: fp16).
#pragma once

#include "common/ptx.cuh"

namespace quantize {

constexpr int kThreads = 256;
constexpr int kKept = 4;  // pieces of 8 channels that a thread keeps in registers; of longer rows the rest is read twice
constexpr float kMax = 448.0f;

struct Piece {
    u16 values[8];
};

// Channels first .. first + 7 of a row; zeros beyond its end. Read past L1, as residuals are (sm90_finish.cuh).
__device__ __forceinline__ Piece load(const u16* row, int first, int ic, bool aligned) {
    Piece piece;
    if (aligned && first + 8 <= ic) {
        *reinterpret_cast<uint4*>(piece.values) = __ldcg(reinterpret_cast<const uint4*>(row + first));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) piece.values[i] = first + i < ic ? __ldcg(row + first + i) : u16(0);
    }
    return piece;
}

__device__ __forceinline__ float largest(const Piece& piece, float before) {
#pragma unroll
    for (int i = 0; i < 8; ++i) before = fmaxf(before, fabsf(ptx::widen<BF16>(piece.values[i])));
    return before;
}

__device__ __forceinline__ uint2 encode(const Piece& piece, float factor) {
    u32 words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        u32 pairs[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u16* values = piece.values + 4 * word + 2 * i;
            pairs[i] = ptx::to_e4m3(ptx::widen<BF16>(values[0]) * factor, ptx::widen<BF16>(values[1]) * factor);
        }
        words[word] = pairs[0] | pairs[1] << 16;
    }
    return {words[0], words[1]};
}

}  // namespace quantize

extern "C" __global__ void __launch_bounds__(quantize::kThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,    // [tokens, IC]
    const int* order,             // [N] or null: row i is that of token order[i] / top_k, or of token i
    unsigned char* codes,         // [N, codes_stride], the last bytes of a row are padding
    float* scales,                // [N]
    long long stride,
    long long codes_stride,       // a multiple of 16, at least IC
    int ic,
    int aligned,                  // whether rows of x start on 16 bytes
    int top_k) {
    using namespace quantize;
    __shared__ float of_warp[kThreads / 32];
    ptx::launch_dependents();
    ptx::wait_for_earlier_kernels();
    const long long token = blockIdx.x;
    const u16* row = x + (order == nullptr ? token : __ldcg(order + token) / top_k) * stride;
    Piece kept[kKept];
    float magnitude = 0.0f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        kept[i] = load(row, (i * kThreads + threadIdx.x) * 8, ic, aligned);
        magnitude = largest(kept[i], magnitude);
    }
    for (int first = (kKept * kThreads + threadIdx.x) * 8; first < ic; first += kThreads * 8) {
        magnitude = largest(load(row, first, ic, aligned), magnitude);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        magnitude = fmaxf(magnitude, __shfl_xor_sync(~0u, magnitude, lanes));
    }
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = magnitude;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) magnitude = fmaxf(magnitude, of_warp[warp]);
    if (threadIdx.x == 0) scales[token] = magnitude / kMax;
    const float factor = magnitude > 0.0f ? kMax / magnitude : 0.0f;
    unsigned char* target = codes + token * codes_stride;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
        const int first = (i * kThreads + threadIdx.x) * 8;
        if (first < ic) *reinterpret_cast<uint2*>(target + first) = encode(kept[i], factor);
    }
    for (int first = (kKept * kThreads + threadIdx.x) * 8; first < ic; first += kThreads * 8) {
        *reinterpret_cast<uint2*>(target + first) = encode(load(row, first, ic, aligned), factor);
    }
}
