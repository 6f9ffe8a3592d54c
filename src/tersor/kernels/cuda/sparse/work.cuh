// What a CTA of the kernels of pruned weights multiplies, and how the sums of a cut tile become one.
//
// Either the tiles of a weight are dealt out whole, or the blocks of all of them are dealt out to places, so that each has
// as much to do (tersor/layouts/sparse_cuts.py). Blocks are numbered along the channels of a tile of kCutUnits units,
// and from one such tile to the next; a place has all from `begin` on and up to `end`. Queues of values begin anew where a
// place begins. With three places for four tiles of five blocks:
//
//     tile            0         |         1         |         2         |         3
//     block   0  1  2  3  4 | 5  6  7  8  9 | 10 11 12 13 14 | 15 16 17 18 19
//     place   0  0  0  0  0 | 0  0  1  1  1 |  1  1  1  2  2 |  2  2  2  2  2
//
// So each place has the last part of a tile first and the first part of another one last: by the time that a place comes to
// the end of its blocks, whoever had the other parts of its last tile has been through with them for long.
#pragma once

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"
#include "sparse/instructions.cuh"

namespace sparse {

using linear::Item;
using linear::kFinishers;
using linear::kFinishersBarrier;
using linear::kRowGroups;
using linear::kRows;
using linear::kSums;
using linear::kTokens;

constexpr int kCutUnits = 4;
constexpr int kSubtiles = kCutUnits / kRowGroups;  // row tiles of a CTA that have the same blocks

static_assert(kSubtiles * kRowGroups == kCutUnits, "a tile is cut as its neighbours are");

struct __align__(16) Place {
    int begin, end;  // of the blocks
    int before;      // places that have blocks of the same tile as the first one, ahead of it
    int after;       // places that have blocks of the same tile as the last one, behind it
};

// What a place has of some rows, ahead of which `skipped` tiles lie: in shared memory, for registers are short.
struct Range {
    Place own;
    int first_tile, tiles;

    __device__ __forceinline__ void take(const Place& place, int skipped, int rows, int blocks) {
        const int gone = skipped * blocks, all = (rows + kCutUnits * tile::kUnitRows - 1) / (kCutUnits * tile::kUnitRows);
        own = place;
        own.begin = max(0, place.begin - gone);
        own.end = min(all * blocks, place.end - gone);
        first_tile = own.begin / blocks;
        tiles = own.end <= own.begin ? 0 : (own.end - 1) / blocks + 1 - first_tile;
    }
};

// The item with number `first() + i step()` is a CTA's i-th.
struct Work {
    int oc, ic, n;
    int tile_tokens;
    int ctas;            // of a place, or 0: tiles are whole
    const Range* range;  // of this CTA's place

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }
    __device__ __forceinline__ int token_tiles() const { return (n + kTokens - 1) / kTokens; }
    __device__ __forceinline__ int row_tiles() const { return (oc + kRows - 1) / kRows; }
    __device__ __forceinline__ int first() const { return ctas == 0 ? blockIdx.x : blockIdx.x % ctas; }
    __device__ __forceinline__ int step() const { return ctas == 0 ? gridDim.x : ctas; }
    __device__ __forceinline__ int items() const {
        if (ctas == 0) return token_tiles() * row_tiles();
        return range->tiles * kSubtiles * token_tiles();
    }
    __device__ __forceinline__ Item item(u32 index, int) const {
        Item item;
        item.tile = index, item.part = 0, item.parts = 1, item.matrix = 0;
        item.first_block = 0, item.last_block = blocks();
        u32 row_tile, token_tile;
        if (ctas == 0) {
            const linear::TileAt at(index, row_tiles(), token_tiles());
            row_tile = at.row_tile, token_tile = at.token_tile;
        } else {
            const u32 rest = index / kSubtiles, tiles = token_tiles(), cut = tiles > 1 ? rest / tiles : rest;
            const int cut_tile = range->first_tile + cut, ahead = cut_tile * blocks();
            const Place own = range->own;
            token_tile = rest - cut * tiles;
            row_tile = cut_tile * kSubtiles + index % kSubtiles;
            item.tile = row_tile * tiles + token_tile;
            item.first_block = max(0, own.begin - ahead);
            item.last_block = min(item.last_block, own.end - ahead);
            item.part = item.first_block > 0 ? own.before : 0;
            item.parts = item.part + 1 + (item.last_block < blocks() ? own.after : 0);
        }
        item.first_row = row_tile * kRows;
        item.first_token = token_tile * tile_tokens;
        item.end_token = min(n, item.first_token + tile_tokens);
        return item;
    }
};

// Calls run(item) for every item of this CTA, in whole warps. What comes from memory comes from one lane: so ptxas knows
// that it is the same for a warp, and counts in registers that warps share.
template <typename Run>
__device__ __forceinline__ void for_items_of_warp(const Work& work, const Run& run) {
    const int items = __shfl_sync(~0u, work.items(), 0);
#pragma unroll 1
    for (int index = work.first(); index < items; index += work.step()) {
        Item item = work.item(index, 0);
        item.first_block = __shfl_sync(~0u, item.first_block, 0);
        item.last_block = __shfl_sync(~0u, item.last_block, 0);
        run(item);
    }
}

// Hands this CTA's sums of a cut tile over through memory; returns true in the one CTA that then holds those of all parts,
// added in their order whoever that is: the one with the first part where all others have come before.
__device__ __forceinline__ bool add_parts(
    float (&sums)[kSums], const Work& work, const Item& item, float* partial, u32* arrived) {
    __shared__ int others;  // that have come, or -1 where a CTA has nothing more to do here
    const int place = blockIdx.x / work.ctas, first_place = place - item.part, places = gridDim.x / work.ctas;
    u32* counter = arrived + item.tile;
    const int at = (item.first_row / kRows % kSubtiles * work.token_tiles() + item.first_token / work.tile_tokens) * kSums;
    const auto part_of = [&](int part) {
        const int slot = part == 0 ? places + first_place : first_place + part;
        return partial + (static_cast<long long>(slot) * kSubtiles * work.token_tiles() * kSums + at) * kFinishers +
               threadIdx.x;
    };
    bool here = false;  // whether the sums of the first part are in registers
    if (item.part == 0) {
        if (threadIdx.x == 0) others = ptx::arrived_at(counter);
        ptx::sync_threads<kFinishersBarrier, kFinishers>();
        here = others == item.parts - 1;
        ptx::sync_threads<kFinishersBarrier, kFinishers>();
    }
    if (!here) {
        float* own = part_of(item.part);
#pragma unroll
        for (int i = 0; i < kSums; ++i) __stcg(own + i * kFinishers, sums[i]);
        __threadfence();
        ptx::sync_threads<kFinishersBarrier, kFinishers>();
        if (threadIdx.x == 0) others = ptx::arrive(counter);
        ptx::sync_threads<kFinishersBarrier, kFinishers>();
        const bool is_last = others == item.parts - 1;
        ptx::sync_threads<kFinishersBarrier, kFinishers>();
        if (!is_last) return false;
        __threadfence();
    }
    if (threadIdx.x == 0) *counter = 0;
    constexpr int kChunk = kSums < 16 ? kSums : 16;  // loads under way at a time, for the registers there are
#pragma unroll
    for (int chunk = 0; chunk < kSums; chunk += kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sums[chunk + i] = here ? sums[chunk + i] : -0.0f;  // x - 0 is x, -0 too
        for (int part = here; part < item.parts; ++part) {
            const float* source = part_of(part) + chunk * kFinishers;
            float loaded[kChunk];
#pragma unroll
            for (int i = 0; i < kChunk; ++i) loaded[i] = __ldcg(source + i * kFinishers);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) sums[chunk + i] += loaded[i];
        }
    }
    return true;
}

}  // namespace sparse
