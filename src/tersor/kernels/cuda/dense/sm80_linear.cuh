// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual for few tokens (N <= N_TILE): weights are decoded in registers
// and feed mma.sync directly; sums are float32; scales are applied to the sums. Runs on sm_80 and newer.
//
//               input channels, in blocks of 128 ->
//     16 rows   warp 0   [block][block]... | [block][block]...
//     16 rows   warp 1   [block][block]... | [block][block]...
//     ..                     split 0       |     split 1            one CTA = 8 warps = 128 rows of one split
//
// What a CTA does, and the parameters, are in sm80_tile.cuh.
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm80_tile.cuh"

namespace linear {

struct Activations {
    const u16* x;
    long long x_stride;  // elements between rows of x
    int ic, n;
    bool x_aligned;      // rows of x start on 16 bytes
};

// Starts the copy of the activations of one stage; what lies beyond N or IC becomes zero.
__device__ __forceinline__ void copy_activations(const Activations& from, u16* slot, int stage) {
    for (int index = threadIdx.x; index < kTokens * kXChunks; index += kThreads) {
        const int token = index / kXChunks;
        const int column = index % kXChunks * 8;
        const int channel = stage * tile::kColumns + column;
        const int valid = token < from.n ? max(0, min(8, from.ic - channel)) : 0;
        const u16* source = from.x + (valid > 0 ? token * from.x_stride + channel : 0);
        u16* target = slot + token * kXStride + column;
        if (from.x_aligned) {
            ptx::copy_async_16_zero_fill(ptx::shared_address(target), source, 2 * valid);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) target[i] = i < valid ? source[i] : u16(0);
        }
    }
}

}  // namespace linear

extern "C" __global__ void __launch_bounds__(linear::kThreads, 1) TERSOR_ENTRY(
    const char* __restrict__ weight,
    const char* __restrict__ scale,
    const u16* __restrict__ x,
    const u16* __restrict__ bias,  // [OC] or null
    const u16* residual,           // as y, added to it, or null
    u16* __restrict__ y,           // [N, OC], or half as many channels where gated; contiguous
    float* partial,                // [row tiles][splits][N][128]; unused with one split
    u32* arrived,                  // [row tiles], zero before and after; unused with one split
    long long x_stride,
    int oc,
    int ic,
    int n,
    int x_aligned,                 // whether rows of x start on 16 bytes
    float factor) {                // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(128) char ring[];
    const int row_tile = blockIdx.x, split = blockIdx.y, splits = gridDim.y;
    const Matrix matrix{weight, scale, oc, ic, 0};
    const Activations from{x, x_stride, ic, n, x_aligned != 0};
    const Range range(matrix.blocks(), split, splits);
    float* sums = multiply_range(
        ring, matrix, row_tile, range, [&](u16* slot, int stage) { copy_activations(from, slot, stage); });
    if (splits > 1 && !add_splits(sums, partial, arrived, row_tile, n, n, split, splits)) return;
    store(sums, matrix, row_tile, n, factor, bias, residual, y);
}
