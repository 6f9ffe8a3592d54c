// Rows of 16-bit floats, eight channels (16 bytes) at a time.
#pragma once

#include "common/ptx.cuh"

namespace pieces {

constexpr int kChannels = 8;

struct Piece {
    u16 values[kChannels];
};

// What the kernel ahead may have written is read past L1.
__device__ __forceinline__ Piece load(const u16* row, int piece) {
    Piece found;
    *reinterpret_cast<uint4*>(found.values) = __ldcg(reinterpret_cast<const uint4*>(row) + piece);
    return found;
}

__device__ __forceinline__ void store(u16* row, int piece, const Piece& values) {
    reinterpret_cast<uint4*>(row)[piece] = *reinterpret_cast<const uint4*>(values.values);
}

}  // namespace pieces
