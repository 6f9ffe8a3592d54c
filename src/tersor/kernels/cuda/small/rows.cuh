// Copies rows that an index names, scaled, and adds the row of a token's position where there is a table of those.
// An index outside the table gives zeros. A CTA has one row.
// Parameters: BF16 (1: bf16, 0: fp16), INDEX64 (1: the index is int64, 0: int32), POSITIONS (1: there is such a table).
#pragma once

#include "common/launch.cuh"
#include "small/pieces.cuh"

namespace rows {

constexpr int kMostThreads = 256;

using Index = long long;

}  // namespace rows

extern "C" __global__ void __launch_bounds__(rows::kMostThreads) TERSOR_ENTRY(
    const void* __restrict__ index,      // [rows of out]
    const u16* __restrict__ table,       // [table_rows, channels]
    const u16* __restrict__ positions,   // [position_rows, channels]
    const int* __restrict__ starts,      // [texts + 1]: which rows of out belong to a text
    const int* __restrict__ lengths,     // [texts]: the last of them is at position lengths - 1
    u16* out,
    int table_rows,
    int position_rows,
    int first,                           // row of `positions` that has position 0
    int texts,
    int channels,                        // a multiple of 8
    float scale) {
    using namespace rows;
    using pieces::kChannels;
    launch::start_next();
    launch::wait_for_earlier();
    const int row = blockIdx.x;
    Index chosen;
    if constexpr (INDEX64) {
        chosen = __ldcg(static_cast<const long long*>(index) + row);
    } else {
        chosen = __ldcg(static_cast<const int*>(index) + row);
    }
    const bool there = chosen >= 0 && chosen < table_rows;
    const u16* const source = table + (there ? chosen : 0) * channels;
    const u16* place = nullptr;
    if constexpr (POSITIONS) {
        int before = 0;  // texts that end at or before this row: those ahead of its own
        for (int base = 0; base < texts; base += blockDim.x) {
            const int text = base + threadIdx.x;
            before += __syncthreads_count(text < texts && __ldcg(starts + text + 1) <= row);
        }
        if (before < texts) {
            const int end = __ldcg(starts + before + 1), length = __ldcg(lengths + before);
            const int position = length - (end - row) + first;
            if (length > 0 && position >= 0 && position < position_rows) {
                place = positions + static_cast<long long>(position) * channels;
            }
        }
    }
    for (int piece = threadIdx.x; piece < channels / kChannels; piece += blockDim.x) {
        pieces::Piece values = {};
        if (there) values = pieces::load(source, piece);
        if (POSITIONS || scale != 1.0f) {
            pieces::Piece added = {};
            if (place != nullptr) added = pieces::load(place, piece);
#pragma unroll
            for (int k = 0; k < kChannels; ++k) {
                const float value = ptx::widen<BF16>(values.values[k]) * scale;
                values.values[k] = ptx::narrow<BF16>(value + ptx::widen<BF16>(added.values[k]));
            }
        }
        pieces::store(out + static_cast<long long>(row) * channels, piece, values);
    }
}
