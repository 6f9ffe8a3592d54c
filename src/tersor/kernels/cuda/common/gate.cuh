// Gated linears: rows of the weight lie in blocks of 16, eight gate rows and then the eight up rows of the same output
// channels, so that a lane's two rows are the gate and the up of one channel (tersor/layouts/gated.py). The last block
// may have fewer up rows; its gate rows are then filled up to eight.
//
// Parameter: EPILOGUE (0: y = x @ W^T + bias, else the gate and up of that become one, as in tersor/ops/gates.py).
#pragma once

namespace gate {

enum Kind { kNone = 0, kSilu = 1, kGeluTanh = 2, kGelu = 3, kClamped = 4 };

constexpr bool kGated = EPILOGUE != kNone;
constexpr int kHalves = kGated ? 1 : 2;  // output channels that a lane's two rows make

static_assert(EPILOGUE >= kNone && EPILOGUE <= kClamped, "EPILOGUE is a Kind");

// Output channels of so many rows; also the first channel of the block that begins with row `rows`.
__device__ __forceinline__ int outputs(int rows) {
    if constexpr (!kGated) return rows;
    return rows / 16 * 8 + max(0, rows % 16 - 8);
}

// The row of an output channel: that of its gate, or the only one. The up row is 8 further on.
__device__ __forceinline__ int row_of(int output) { return kGated ? output / 8 * 16 + output % 8 : output; }

__device__ __forceinline__ float sigmoid_times(float value, float slope) { return value / (1.0f + expf(-slope * value)); }

__device__ __forceinline__ float combine(float gate, float up) {
    if constexpr (EPILOGUE == kGeluTanh) {
        const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2 / pi)
        return 0.5f * gate * (1.0f + tanhf(inner)) * up;
    } else if constexpr (EPILOGUE == kGelu) {
        return 0.5f * gate * (1.0f + erff(gate * 0.7071067812f)) * up;
    } else if constexpr (EPILOGUE == kClamped) {
        // A NaN stays one: fminf would return the bound.
        const float low = gate > 7.0f ? 7.0f : gate;
        const float middle = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
        return sigmoid_times(low, 1.702f) * (middle + 1.0f);
    } else {
        return sigmoid_times(gate, 1.0f) * up;
    }
}

}  // namespace gate
