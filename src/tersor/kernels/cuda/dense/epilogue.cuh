// y[n, j] = sums[n, j] * scale[j] * factor + bias[j] + residual[n, j], rounded once, for a slice of rows j of the
// weight: what follows a float32 product with unscaled weights. Parameters: BF16, EPILOGUE (gate.cuh), ROW_SCALE (0: the
// sums are already scaled, else the distance of the scales, in floats).
#pragma once

#include "common/gate.cuh"
#include "common/ptx.cuh"

namespace epilogue {

constexpr int kThreads = 256;  // of a CTA, which makes as many output channels of one token

}  // namespace epilogue

extern "C" __global__ void __launch_bounds__(epilogue::kThreads) TERSOR_ENTRY(
    const float* __restrict__ sums,   // [N, columns]
    const float* __restrict__ scale,  // [OC padded][ROW_SCALE]
    const u16* __restrict__ bias,     // [OC] or null
    const u16* residual,              // as y, added to it, or null
    u16* __restrict__ y,              // [N, OC], or half as many channels where gated
    int first,                        // row of the slice, a multiple of 16
    int columns,
    int oc,
    float factor) {
    const int output = blockIdx.x * epilogue::kThreads + threadIdx.x;
    if (output >= gate::outputs(columns)) return;
    const long long token = blockIdx.y;
    const auto value = [&](int column) {
        const int row = first + column;
        const float row_scale = ROW_SCALE ? scale[row * ROW_SCALE] * factor : 1.0f;
        const float row_bias = bias != nullptr ? ptx::widen<BF16>(bias[row]) : 0.0f;
        return __fmaf_rn(sums[token * columns + column], row_scale, row_bias);
    };
    const int column = gate::row_of(output);
    float result = value(column);
    if constexpr (gate::kGated) result = gate::combine(result, value(column + 8));
    const long long at = token * gate::outputs(oc) + gate::outputs(first) + output;
    if (residual != nullptr) result = __fadd_rn(result, ptx::widen<BF16>(residual[at]));
    y[at] = ptx::narrow<BF16>(result);
}
