// Gated linears: rows of the weight lie in blocks of 16, eight gate rows and then the eight up rows of the same output
// channels, so that a lane's two rows are the gate and the up of one channel (tersor/layouts/gated.py). The last block
// may have fewer up rows; its gate rows are then filled up to eight.
//
// Parameter: EPILOGUE (0: y = x @ W^T + bias, 1: y = silu(gate) * up of that).
#pragma once

namespace gate {

constexpr bool kGated = EPILOGUE == 1;
constexpr int kHalves = kGated ? 1 : 2;  // output channels that a lane's two rows make

static_assert(EPILOGUE == 0 || EPILOGUE == 1, "EPILOGUE is 0 or 1");

// Output channels of so many rows; also the first channel of the block that begins with row `rows`.
__device__ __forceinline__ int outputs(int rows) {
    if constexpr (!kGated) return rows;
    return rows / 16 * 8 + max(0, rows % 16 - 8);
}

// The row of an output channel: that of its gate, or the only one. The up row is 8 further on.
__device__ __forceinline__ int row_of(int output) { return kGated ? output / 8 * 16 + output % 8 : output; }

__device__ __forceinline__ float silu_times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

}  // namespace gate
