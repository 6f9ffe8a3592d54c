// Rounds of outliers, in the order of tersor/layouts/outliers.py, and how a lane reads them.
//
// A round is up to 16 outliers of one block of 16 rows by 128 channels. Every block has OUTLIERS rounds of its own, which
// lie as its codes do; further ones, of the few blocks that have most, follow each other behind all of these, and the last
// of a block's own rounds says where they begin.
//
//     round        [4] of two pairs each, of lane % 4: numbers, places, numbers, places: 64 bytes
//     numbers      two 16-bit floats
//     places       of each: bits 1 to 6: channel of the half, 7 to 9 and 14: row, 10 to 13, all the same: which half;
//                  bits 0 and 15: of the first places of a round whether another one follows, in bit 0 of the first; the
//                  other seven a part of the number of a block's first further round
//     all          [units][blocks][4 blocks of 16 rows][OUTLIERS] rounds, [units + 1] numbers of the first further round of
//                  a unit, up to whole 16 bytes, further rounds
#pragma once

#include "common/ptx.cuh"

namespace rounds {

constexpr int kBytes = 64;
constexpr int kUnitRows = 64;
constexpr int kBeyond = 2;  // units without outliers behind the last one of the weight, for tiles that end behind it

__device__ __forceinline__ int units(int oc) { return (oc + kUnitRows - 1) / kUnitRows + kBeyond; }

// Where the numbers of the first further rounds begin, and those rounds themselves; `unit_bytes` are those of the own
// rounds of a unit's block of channels.
__device__ __forceinline__ const u32* firsts(const char* kept, int oc, int blocks, int unit_bytes) {
    return reinterpret_cast<const u32*>(kept + static_cast<long long>(units(oc)) * blocks * unit_bytes);
}
__device__ __forceinline__ const char* further(const char* kept, int oc, int blocks, int unit_bytes) {
    return reinterpret_cast<const char*>(firsts(kept, oc, blocks, unit_bytes) + (units(oc) + 4) / 4 * 4);
}

// Of what four lanes have of a round, whether another one follows, and of a block's last own one where that lies.
__device__ __forceinline__ bool follows(const uint4& round) { return round.y & 1; }
__device__ __forceinline__ u32 first_further(const uint4& round) {
    const u32 part = (round.y >> 15 & 3) | (round.y >> 31) << 2 | (round.w & 1) << 3 | (round.w >> 15 & 3) << 4 |
                     (round.w >> 31) << 6;
    u32 number = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) number |= __shfl_sync(~0u, part, i) << 7 * i;
    return number;
}

// Where in its block an outlier stands.
__device__ __forceinline__ int row_of(u32 place) { return (place >> 7 & 7) | (place >> 11 & 8); }
__device__ __forceinline__ int channel_of(u32 place) { return (place >> 1 & 63) | (place >> 10 & 1) << 6; }

}  // namespace rounds
