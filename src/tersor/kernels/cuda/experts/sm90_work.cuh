// What a launch of sm90_experts.cuh asks for: every expert's matrix with the tokens that were routed to it. How many
// those are only the device knows; the tables that say it are made by route.cuh.
#ifndef TERSOR_EXPERTS_SM90_WORK  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_EXPERTS_SM90_WORK

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

// Pairs of a token and an expert stand sorted by the expert. Those of one expert are a segment, which is cut into blocks
// of kTokens; blocks are numbered through all segments. Entry 0 of the table holds the number of blocks, entry 1 + b of
// each block: its expert, the first block of the segment, and where the segment starts and ends. With N_TILE 8:
//
//     pairs of expert 2:   0 ... 10      block 0: 2, 0,  0, 11      block 1: 2, 0, 0, 11
//     pairs of expert 5:  11 ... 13      block 2: 5, 2, 11, 14
struct Work {
    int oc, ic;        // of one expert
    const int4* table;
    u32 cta, ctas;     // which of those is this that have these rows
    int before, most;  // CTAs that have others, ahead of those; parts of a tile at the most
    int whole_tiles, splits;
    u32 row_tiles, tiles;
    u32 first_entry;   // of the table, and what it says: that of this CTA's first item, unless that is of a split tile
    int4 entry;

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }
    __device__ __forceinline__ int items() const { return whole_tiles + (tiles - whole_tiles) * splits; }
    __device__ __forceinline__ int first() const { return cta; }
    __device__ __forceinline__ int step() const { return ctas; }
    __device__ __forceinline__ int output(const Item& item, int) const { return before + item.tile - whole_tiles; }
    __device__ __forceinline__ long long parts_before(const Item& item, int) const {
        return static_cast<long long>(before) * most + static_cast<long long>(item.tile - whole_tiles) * splits;
    }

    // Before the tables are there.
    __device__ __forceinline__ Work(
        int oc, int ic, const int4* table, int most_blocks, u32 cta, u32 ctas, int before, int most)
        : oc(oc), ic(ic), table(table), cta(cta), ctas(ctas), before(before), most(most), splits(1),
          row_tiles((oc + kRows - 1) / kRows) {
        first_entry = min(cta / row_tiles, static_cast<u32>(most_blocks - 1));
    }

    // Reads how many tiles there are, and settles how those beyond whole waves of CTAs are split: so that the last wave
    // is short, where an exchange of sums costs less than that gains.
    __device__ __forceinline__ void read() {
        const int count = __ldcg(reinterpret_cast<const int*>(table));
        entry = __ldcg(table + 1 + first_entry);  // not after the count, but beside it
        tiles = row_tiles * static_cast<u32>(count);
        whole_tiles = tiles;
        const u32 slots = ctas, rest = tiles % slots, most_splits = most;
        if (rest == 0 || most_splits < 2) return;
        const float across = static_cast<float>(rest) / slots, length = blocks();
        float least = length;
#pragma unroll 1
        for (u32 parts = 2; parts <= most_splits; ++parts) {
            const float waves = ceilf(parts * across - 1e-3f);
            const float time = waves * ceilf(length / parts) + kExchangeBlocks + parts * kPartBlocks;
            if (time < least) {
                least = time;
                splits = parts;
            }
        }
        if (splits > 1) whole_tiles = tiles - rest;
    }

    __device__ __forceinline__ Item item(u32 index, int) const {
        Item item;
        item.take(index, whole_tiles, splits, blocks());
        const u32 tile = item.tile;
        const u32 at_entry = tile / row_tiles;
        const int4 found = at_entry == first_entry ? entry : __ldcg(table + 1 + at_entry);
        const int start = found.z, end = found.w;
        const TileAt at(tile - found.y * row_tiles, row_tiles, (end - start + kTokens - 1) / kTokens);
        item.first_row = at.row_tile * kRows;
        item.first_token = start + at.token_tile * kTokens;
        item.end_token = min(end, item.first_token + kTokens);
        item.matrix = found.x;
        return item;
    }

private:
    // What an exchange of split sums takes, and each part of it, in the time of a block.
    static constexpr float kExchangeBlocks = 3.0f, kPartBlocks = 0.5f;
};

}  // namespace linear

#endif  // TERSOR_EXPERTS_SM90_WORK
