// Puts queries, keys and values of attention with latent vectors side by side as other attention reads them: of every
// head the channels that turn first, then those that do not, values filled up with zeros. The channels of keys that turn
// are the same for all heads. A thread has eight channels of the result.
// Parameter: INTERLEAVED (1: partners of a rotation stand side by side, and come apart: first all first ones).
#pragma once

#include "common/launch.cuh"
#include "small/pieces.cuh"

extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(
    const u16* __restrict__ queries,  // [tokens, heads, fixed + turned]
    const u16* __restrict__ both,     // [tokens, heads, fixed + value]
    const u16* __restrict__ turning,  // [tokens, turned]
    u16* out,                         // [tokens, 3, heads, turned + fixed]
    long long query_stride,           // elements from one token to the next
    long long both_stride,
    long long turning_stride,
    int count,  // pieces of all tokens
    int heads,
    int fixed,    // multiples of 8, in elements; value <= turned + fixed
    int turned,   // a multiple of 16
    int value) {
    using pieces::kChannels;
    launch::start_next();
    launch::wait_for_earlier();
    const int piece = blockIdx.x * blockDim.x + threadIdx.x;
    if (piece >= count) return;
    const int width = (turned + fixed) / kChannels, turns = turned / kChannels;
    const int at = piece % width, head = piece / width % heads, part = piece / width / heads % 3;
    const long long token = piece / width / heads / 3;
    const u16* const of_queries = queries + token * query_stride + head * (fixed + turned);
    const u16* const of_both = both + token * both_stride + head * (fixed + value);
    pieces::Piece made = {};
    if (part == 2) {
        if (at < value / kChannels) made = pieces::load(of_both + fixed, at);
    } else if (at >= turns) {
        made = pieces::load(part == 0 ? of_queries : of_both, at - turns);
    } else {
        const u16* const source = part == 0 ? of_queries + fixed : turning + token * turning_stride;
        if constexpr (INTERLEAVED) {
            const int second = at >= turns / 2, from = 2 * (at - second * (turns / 2));
            const pieces::Piece low = pieces::load(source, from), high = pieces::load(source, from + 1);
#pragma unroll
            for (int k = 0; k < kChannels / 2; ++k) {
                made.values[k] = second ? low.values[2 * k + 1] : low.values[2 * k];
                made.values[k + kChannels / 2] = second ? high.values[2 * k + 1] : high.values[2 * k];
            }
        } else {
            made = pieces::load(source, at);
        }
    }
    pieces::store(out, piece, made);
}
