// y[n, first + j] = sums[n, j] * scale[first + j] * factor + bias[first + j], rounded once: what follows a float32
// product with unscaled weights. Parameters: BF16, ROW_SCALE (0: the sums are already scaled,
// else the distance of the scales, in floats).
#pragma once

#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const float* __restrict__ sums,   // [N, columns]
    const float* __restrict__ scale,  // [OC padded][ROW_SCALE]
    const u16* __restrict__ bias,     // [OC] or null
    u16* __restrict__ y,              // [N, OC]
    int first,
    int columns,
    int oc,
    float factor) {
    const int column = blockIdx.x * 256 + threadIdx.x;
    if (column >= columns) return;
    const long long token = blockIdx.y;
    float value = sums[token * columns + column];
    if (ROW_SCALE) value *= scale[(first + column) * ROW_SCALE] * factor;
    if (bias != nullptr) value += ptx::widen<BF16>(bias[first + column]);
    y[token * oc + first + column] = ptx::narrow<BF16>(value);
}
