// Which row does a CTA serve? Found by each warp for itself, from where the tokens of rows start, so that a grid is as large
// as the work is and not as rows times the most that one of them has.
#pragma once

#include "attention/pages.cuh"

namespace rows {

// The sum of the numbers of the lanes up to this one.
__device__ __forceinline__ int summed(int value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_sync(~0u, value, (lane - distance) & 31);
        if (lane >= distance) value += other;
    }
    return value;
}

// The row that has a token of the step, which is before starts[rows]: 32 places are looked up at a time.
__device__ __forceinline__ int row_of(const int* starts, int rows, int token) {
    const int lane = threadIdx.x % 32;
    int first = 0, end = rows;  // it is one of these
    while (end - first > 1) {
        const int each = (end - first + 31) / 32, place = first + lane * each;
        const bool begins = place < end && __ldcg(starts + place) <= token;  // the first does
        first += (__popc(__ballot_sync(~0u, begins)) - 1) * each;
        end = min(first + each, end);
    }
    return first;
}

// Tokens of a row of many new tokens: a tile has the same number of them, the last one of a row fewer.
struct Tile {
    int row;   // -1: there is no such tile
    int base;  // the tile's first token among the new ones of its row
};

// Tile `number` of the step, of so many tokens; of a row those that see most come first.
__device__ __forceinline__ Tile tile_of(const int* starts, const int* lengths, int rows, int tokens, int number) {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < rows; base += 32) {
        const int row = base + lane;
        int tiles = 0;
        if (row < rows) {
            const int fresh = __ldcg(starts + row + 1) - __ldcg(starts + row);
            if (fresh > pages::kMostFew && __ldcg(lengths + row) > 0) tiles = (fresh + tokens - 1) / tokens;
        }
        const int end = summed(tiles);  // of this row and those ahead of it
        const int all = __shfl_sync(~0u, end, 31);
        if (number < all) {
            const int owner = __popc(__ballot_sync(~0u, end <= number));
            return {base + owner, (__shfl_sync(~0u, end, owner) - 1 - number) * tokens};
        }
        number -= all;
    }
    return {-1, 0};
}

}  // namespace rows
