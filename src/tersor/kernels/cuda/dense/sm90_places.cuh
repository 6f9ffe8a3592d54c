// Where results lie: in a matrix of their own, or among those of other row sets of a mixed weight.
//
// Parameter: PLACED (1: the rows multiplied are those of one row set of a mixed weight, tersor/layouts/mixed.py).
#ifndef TERSOR_DENSE_SM90_PLACES  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_PLACES

#include "common/gate.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

using gate::kHalves;

// Columns of the results of one row set in y and in a residual; what there is only where kPlaced.
struct Places {
    const int* features;  // of every channel of the row set, rising, or null: they stand side by side
    int first;            // the column of the first channel, where they do
    int outputs;          // columns of y
    bool wide;            // whether channels stand side by side and every eighth starts on 16 bytes

    __device__ __forceinline__ int column(int channel) const {
        return features == nullptr ? first + channel : __ldg(features + channel);
    }
    // The row of all row sets' biases that belongs to one of this set's `rows`.
    __device__ __forceinline__ int row(int row, int rows) const {
        if constexpr (!kPlaced) return row;
        if constexpr (!gate::kGated) return column(row);
        const int channel = min(row / 16 * 8 + row % 8, gate::outputs(rows) - 1);  // behind the last one rows are empty
        return gate::row_of(column(channel)) + row % 16 / 8 * 8;
    }
};

// Where a lane stores few tokens: fragments are turned so that stores run along the rows.
struct FewPlaces {
    int outputs, first_channel, first_token;
    long long first;
    int columns[kPlaced ? kHalves : 1][2];
    bool even[kPlaced ? kHalves : 1];

    // Channels 2 (lane % 4) and the next, token lane / 4 of the first group of eight.
    __device__ __forceinline__ FewPlaces(const Item& item, int first_row, int rows, const Places& places)
        : outputs(gate::outputs(rows)),
          first_channel(gate::outputs(first_row) + threadIdx.x % 4 * 2),
          first_token(item.first_token + threadIdx.x % 32 / 4) {
        if constexpr (kPlaced) {
            first = static_cast<long long>(first_token) * places.outputs;
            stride = 8 * places.outputs;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                const int last = outputs - 1;
                columns[half][0] = places.column(min(channel(half), last));
                columns[half][1] = places.column(min(channel(half) + 1, last));
                even[half] = (columns[half][0] | places.outputs) % 2 == 0 && columns[half][1] == columns[half][0] + 1;
            }
        } else {
            first = static_cast<long long>(first_token) * outputs + first_channel;
            stride = 8 * outputs;
        }
    }
    __device__ __forceinline__ int channel(int half) const { return first_channel + 8 * half; }
    __device__ __forceinline__ bool there(const Item& item, int tokens, int half) const {
        return first_token + tokens * 8 < item.end_token && channel(half) < outputs;
    }
    // Whether both channels are one word.
    __device__ __forceinline__ bool together(int half) const {
        if constexpr (kPlaced) return even[half];
        return outputs % 2 == 0;
    }
    __device__ __forceinline__ long long at(int tokens, int half, int odd) const {
        const long long of_token = first + static_cast<long long>(tokens) * stride;
        if constexpr (kPlaced) return of_token + columns[half][odd];
        return of_token + 8 * half + odd;
    }

private:
    int stride;  // from eight tokens to the next
};

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_PLACES
