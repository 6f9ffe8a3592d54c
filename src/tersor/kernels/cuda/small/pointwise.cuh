// What becomes of single numbers between products: gate and up of a row become one, or a number becomes another. In
// float32, rounded once. A thread has eight channels.
// Parameters: BF16 (1: bf16, 0: fp16), EPILOGUE (common/gate.cuh; 0: no gate), SOFTCAP (without a gate, 1: a number
// becomes cap * tanh(number / cap), 0: what is negative becomes 0).
#pragma once

#include "common/gate.cuh"
#include "common/launch.cuh"
#include "small/pieces.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const u16* __restrict__ x,  // [rows, channels], with a gate [rows, 2 * channels]: gate, then up
    u16* out,                   // [rows, channels]
    int pieces_of_row,          // channels / 8
    int count,                  // pieces of all rows
    float cap) {
    using pieces::kChannels;
    launch::start_next();
    launch::wait_for_earlier();
    const int piece = blockIdx.x * blockDim.x + threadIdx.x;
    if (piece >= count) return;
    pieces::Piece made;
    if constexpr (gate::kGated) {
        const int row = piece / pieces_of_row;
        const u16* const of_row = x + 2LL * row * pieces_of_row * kChannels;
        const pieces::Piece gates = pieces::load(of_row, piece - row * pieces_of_row);
        const pieces::Piece ups = pieces::load(of_row, piece - row * pieces_of_row + pieces_of_row);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            const float one = gate::combine(ptx::widen<BF16>(gates.values[k]), ptx::widen<BF16>(ups.values[k]));
            made.values[k] = ptx::narrow<BF16>(one);
        }
    } else {
        const pieces::Piece given = pieces::load(x, piece);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            const float value = ptx::widen<BF16>(given.values[k]);
            const float one = SOFTCAP ? cap * tanhf(value / cap) : value < 0.0f ? 0.0f : value;  // NaN stays NaN
            made.values[k] = ptx::narrow<BF16>(one);
        }
    }
    pieces::store(out, piece, made);
}
