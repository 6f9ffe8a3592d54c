// What a launch of sm90_linear.cuh asks for: one matrix, all tokens.
#pragma once

#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

// The first `whole_tiles` tiles (TileAt) are one item each, over all blocks of channels. Of each tile after them the
// blocks are dealt out to `splits` items, its parts, whose sums are added at the end. With 18 whole tiles and three
// splits:
//
//     item        0   1  ...  17 | 18   19   20 | 21   22   23
//     tile        0   1  ...  17 |      18      |      19
//     part        0   0  ...   0 |  0    1    2 |  0    1    2
//     of blocks   all     ...    |  |----|----|----|  first_block to last_block - 1 of a part
//
// Each token tile has an even share of the tokens, `tile_tokens` of them: copies of rows behind the last one are some
// four times as slow as those of rows that are there, and a last tile of few tokens would wait for many.
struct Work {
    int oc, ic, n;
    int whole_tiles, splits;
    int tile_tokens;

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }
    __device__ __forceinline__ int token_tiles() const { return (n + kTokens - 1) / kTokens; }
    __device__ __forceinline__ int row_tiles() const { return (oc + kCluster * kRows - 1) / (kCluster * kRows); }
    __device__ __forceinline__ int tiles() const { return token_tiles() * row_tiles(); }  // of a cluster
    __device__ __forceinline__ int items() const { return whole_tiles + (tiles() - whole_tiles) * splits; }
    __device__ __forceinline__ int first() const { return blockIdx.x / kCluster; }
    __device__ __forceinline__ int step() const { return gridDim.x / kCluster; }
    __device__ __forceinline__ int output(const Item& item, int rank) const {
        return (item.tile - whole_tiles) * kCluster + rank;
    }
    __device__ __forceinline__ long long parts_before(const Item& item, int rank) const {
        return static_cast<long long>(output(item, rank)) * splits;
    }

    __device__ __forceinline__ Item item(u32 index, int rank) const {
        Item item;
        item.take(index, whole_tiles, splits, blocks());
        const TileAt at(item.tile, row_tiles(), token_tiles());
        item.first_row = (at.row_tile * kCluster + rank) * kRows;
        item.first_token = at.token_tile * tile_tokens;
        item.end_token = min(n, item.first_token + tile_tokens);
        item.matrix = 0;
        return item;
    }
};

}  // namespace linear
