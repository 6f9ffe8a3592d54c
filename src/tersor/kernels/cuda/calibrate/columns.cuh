// Goes over the columns of one block of a weight in turn, for all rows side by side: chooses the value of a column, and
// moves what that changed to the columns behind it in the block. A warp has a row, a lane every 32nd column of it.
// Where a mask says so a value is zero whatever is wanted, and all of that moves on: its step is zero.
// The definition is `Sweep.block` of compress/sweeps.py, of torch; sums are in its order.
// Parameters: DESCEND (0: weights are rounded, and errors move on; 1: values go to where the loss is least with all
// others as they are, and gradients move on), MIDDLES (of a float format, numbers halfway between its values; 0:
// integers).
#pragma once

#include "common/ptx.cuh"

namespace columns {

constexpr int kColumns = 128;            // of a block, at most
constexpr int kPieces = kColumns / 32;   // columns of a lane
constexpr int kWarps = 8;                // rows of a CTA
constexpr int kWords = (MIDDLES + 31) / 32;
constexpr u32 kAll = ~0u;

// Where the factors of a column begin among those of all columns, less the number of the first column behind it.
__device__ __forceinline__ int place_of(int column) { return column * (2 * kColumns - 1 - column) / 2 - column - 1; }

}  // namespace columns

extern "C" __global__ void __launch_bounds__(32 * columns::kWarps) TERSOR_ENTRY(
    const float* __restrict__ given,          // [columns, rows]: weights, or gradients
    const float* __restrict__ before,         // [columns, rows]: values to start from, where they descend
    const float* __restrict__ scale,          // [G, rows]
    const float* __restrict__ zero_point,     // [G, rows]
    const long long* __restrict__ groups,     // [columns]: the group of each
    const float* __restrict__ kept,           // [columns, rows]: 0 where a value is zero, before, too; null: nowhere
    const float* __restrict__ matrix,         // [columns, stride]: how what changed in a column moves to those behind it
    const float* __restrict__ table,          // [2 MIDDLES + 1]: values by size, then middles
    float* __restrict__ values,               // [columns, rows]
    float* __restrict__ changes,              // [columns, rows]: errors of the weights, or changes of them
    long long stride,
    int columns_here,
    int rows,
    float low,                                // the least integer, and the largest, beside a zero point of 0
    float high) {
    using namespace columns;
    __shared__ float behind[kColumns * (kColumns - 1) / 2];
    __shared__ float values_of[MIDDLES + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int column = warp; column < columns_here; column += kWarps) {
        for (int other = column + 1 + lane; other < kColumns; other += 32) {
            behind[place_of(column) + other] = other < columns_here ? matrix[column * stride + other] : 0.0f;
        }
    }
    if constexpr (MIDDLES > 0) {
        for (int i = threadIdx.x; i <= MIDDLES; i += blockDim.x) values_of[i] = table[i];
    }
    __syncthreads();
    const int row = blockIdx.x * kWarps + warp;
    if (row >= rows) return;

    float middles[kWords + 1];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
        const int i = 32 * word + lane;
        middles[word] = i < MIDDLES ? table[MIDDLES + 1 + i] : 0.0f;
    }
    float state[kPieces], start[kPieces], size[kPieces], step[kPieces], zero[kPieces], value[kPieces], change[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
        const int column = 32 * piece + lane;
        const bool there = column < columns_here;
        const long long at = static_cast<long long>(there ? column : 0) * rows + row;
        const long long of_group = (there ? groups[column] : 0) * rows + row;
        state[piece] = there ? given[at] : 0.0f;
        size[piece] = there ? scale[of_group] : 0.0f;
        zero[piece] = MIDDLES == 0 && there ? zero_point[of_group] : 0.0f;
        step[piece] = size[piece] > 0.0f ? __fdiv_rn(1.0f, size[piece]) : 0.0f;
        start[piece] = 0.0f;
        if constexpr (DESCEND) {
            if (there) {
                start[piece] = before[at];
                step[piece] = __fdiv_rn(step[piece], matrix[column * stride + column]);
            }
        }
        value[piece] = change[piece] = 0.0f;
    }
    if (kept != nullptr) {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const int column = 32 * piece + lane;
            if (column < columns_here && kept[static_cast<long long>(column) * rows + row] == 0.0f) step[piece] = 0.0f;
        }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll 4
        for (int owner = 0; owner < 32; ++owner) {
            const int column = 32 * piece + owner;
            if (column >= columns_here) break;
            const float own = __shfl_sync(kAll, state[piece], owner);
            const float own_size = __shfl_sync(kAll, size[piece], owner);
            const float own_step = __shfl_sync(kAll, step[piece], owner);
            const float own_start = DESCEND ? __shfl_sync(kAll, start[piece], owner) : 0.0f;
            const float wanted = DESCEND ? __fmaf_rn(own, own_step, own_start) : __fmul_rn(own, own_step);
            float nearest;
            if constexpr (MIDDLES > 0) {
                int below = 0;  // a NaN is above all
#pragma unroll
                for (int word = 0; word < kWords; ++word) {
                    below += __popc(__ballot_sync(kAll, 32 * word + lane < MIDDLES && !(middles[word] >= wanted)));
                }
                nearest = values_of[below];
            } else {
                const float own_zero = __shfl_sync(kAll, zero[piece], owner);
                const float least = __fsub_rn(low, own_zero), most = __fsub_rn(high, own_zero);
                nearest = rintf(wanted);
                nearest = nearest < least ? least : nearest > most ? most : nearest;
            }
            const float changed = DESCEND ? __fmul_rn(__fsub_rn(nearest, own_start), own_size)
                                          : __fmaf_rn(-nearest, own_size, own);
            if (lane == owner) {
                value[piece] = nearest;
                change[piece] = changed;
            }
            const int place = place_of(column) + lane;
#pragma unroll
            for (int other = piece; other < kPieces; ++other) {
                if (other > piece || lane > owner) {
                    state[other] = __fmaf_rn(-behind[place + 32 * other], changed, state[other]);
                }
            }
        }
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
        const int column = 32 * piece + lane;
        if (column >= columns_here) continue;
        const long long at = static_cast<long long>(column) * rows + row;
        values[at] = value[piece];
        changes[at] = change[piece];
    }
}
