// What the CTAs of one row set do in a launch of sm90_mixed.cuh: one matrix, all tokens.
#ifndef TERSOR_MIXED_SM90_WORK  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_MIXED_SM90_WORK

#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

// Where a launch gathers, a cluster has one tile (TileAt) and each of its CTAs a range of the blocks of channels. Elsewhere
// `whole_tiles` tiles are one item each, over all blocks, and CTAs take them in turn. Of the other tiles, fewer than CTAs,
// all blocks stand in a row, which is cut into even shares, one a CTA: so it has one or two parts of tiles, and these first,
// since sums are exchanged while weights of whole tiles come in. With 2 tiles of 8 blocks for 3 CTAs:
//
//     blocks    0  1  2  3  4  5  6  7 | 0  1  2  3  4  5  6  7
//     CTA       0  0  0  0  0  1  1  1   1  1  2  2  2  2  2  2
//     part      0              1       | 0     1
//
// The sums of a tile's parts are added by the CTA that is done last. Where there are such tiles, every CTA takes as many
// whole ones.
struct Work {
    int oc, ic, n;
    u32 whole_tiles, tile_tokens;
    u32 cta, ctas;         // which of those of the row set this is; of clusters
    u32 splits;            // of a tile that a cluster gathers
    int before, most;      // tiles dealt out at the levels before; parts of a tile at the most
    u32 left, parts;       // blocks dealt out in all; parts of tiles that this CTA has
    u32 tile, block, end;  // its share of them: first tile and block, and the block behind it, counted from that tile's first

    __device__ __forceinline__ int blocks() const { return (ic + tile::kColumns - 1) / tile::kColumns; }
    __device__ __forceinline__ u32 token_tiles() const { return (n + kTokens - 1) / kTokens; }
    __device__ __forceinline__ u32 row_tiles() const { return (oc + kCluster * kRows - 1) / (kCluster * kRows); }

    __device__ __forceinline__ Work(
        int oc, int ic, int n, u32 whole_tiles, u32 tile_tokens, u32 cta, u32 ctas, u32 splits, int before, int most)
        : oc(oc), ic(ic), n(n), whole_tiles(whole_tiles), tile_tokens(tile_tokens), cta(cta), ctas(ctas), splits(splits),
          before(before), most(most), parts(0), tile(0), block(0), end(0) {
        const u32 all = blocks();
        left = (token_tiles() * row_tiles() - whole_tiles) * all;
        if (left == 0) return;
        const u32 start = cta * left / ctas, stop = (cta + 1) * left / ctas;
        tile = start / all;
        block = start - tile * all;
        end = stop - tile * all;
        parts = end > all ? 2 : 1;
    }

    __device__ __forceinline__ int first() const { return cta; }
    __device__ __forceinline__ int step() const { return ctas; }
    __device__ __forceinline__ int items() const { return whole_tiles + parts * ctas; }
    __device__ __forceinline__ int output(const Item& item, int rank) const {
        return (before + item.tile - static_cast<int>(whole_tiles)) * kCluster + rank;
    }
    __device__ __forceinline__ long long parts_before(const Item& item, int rank) const {
        return static_cast<long long>(output(item, rank)) * most;
    }

    __device__ __forceinline__ Item item(u32 index, int rank) const {
        Item item;
        const u32 all = blocks();
        if (index < parts * ctas) {
            const u32 second = index >= ctas, own = tile + second;
            item.tile = whole_tiles + own;
            item.first_block = second ? 0 : block;
            item.last_block = second ? end - all : min(end, all);
            const u32 first_cta = owner(own * all);
            item.part = cta - first_cta;
            item.parts = owner((own + 1) * all - 1) - first_cta + 1;
        } else if (splits > 1) {
            item.take(index * splits + blockIdx.x % splits, 0, splits, all);
        } else {
            item.take(index - parts * ctas, 1, 1, all);
        }
        const TileAt at(item.tile, row_tiles(), token_tiles());
        item.first_row = (at.row_tile * kCluster + rank) * kRows;
        item.first_token = at.token_tile * tile_tokens;
        item.end_token = min(n, item.first_token + static_cast<int>(tile_tokens));
        item.matrix = 0;
        return item;
    }

private:
    // The CTA whose share has one of the blocks that are dealt out.
    __device__ __forceinline__ u32 owner(u32 one) const { return ((one + 1) * ctas - 1) / left; }
};

}  // namespace linear

#endif  // TERSOR_MIXED_SM90_WORK
