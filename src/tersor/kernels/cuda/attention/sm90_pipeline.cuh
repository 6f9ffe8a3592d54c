// What feeds the tensor cores of sm90_prefill.cuh: how its shared memory is laid out, which tiles of queries a CTA takes,
// and the warps that keep its rings full. The parameters are those of sm90_prefill.cuh.
//
// Queries that share keys, `group` of each new token, are numbered token by token; a tile has kQueries that follow each
// other. So a few tokens fill a tile, and keys that were copied once meet all heads that read them. Where tiles are fewer
// than multiprocessors, the tokens that a tile sees are dealt out to several parts.
//
// Pages in e4m3 come to a ring of their own as they are, and the warps that copy queries make fp16 numbers of them, scales
// included: those of the channels of a key stand where queries have theirs (pages.cuh).
#pragma once

#include "attention/instructions.cuh"
#include "attention/pages.cuh"
#include "attention/rows.cuh"
#include "attention/sm90_instructions.cuh"
#include "common/ring.cuh"

namespace prefill {

// 128 opaque bytes that the driver encodes (CUtensorMap).
struct alignas(64) TensorMap {
    char opaque[128];
};

using pages::kDim;

constexpr int kGroups = GROUPS;         // warpgroups that multiply
constexpr int kQueries = 64 * kGroups;  // of a tile
constexpr int kBlockPages = BLOCK_PAGES;
constexpr int kBlock = kBlockPages * pages::kTokens;  // tokens whose keys, or values, are in a slot
constexpr int kPieces = (kDim + 63) / 64;             // a token, or a query, is as many swizzled rows of 128 bytes
constexpr int kPageBytes = pages::kTokens * 128;      // of a piece
constexpr int kPieceBytes = kBlock * 128;
constexpr int kSlotBytes = kPieces * kPieceBytes;
constexpr int kQueryPieceBytes = kQueries * 128;
constexpr int kQuerySlotBytes = kPieces * kQueryPieceBytes;
constexpr int kConsumers = 128 * kGroups;
constexpr int kThreads = kConsumers + 128;
constexpr int kQueryCopiers = 96;  // threads

constexpr int kItemSlots = 2;
constexpr int kItemBytes = 32;
constexpr int kQueriesAt = SLOTS * kSlotBytes;
constexpr int kItemsAt = kQueriesAt + QUERY_SLOTS * kQuerySlotBytes;
constexpr int kLastAt = kItemsAt + kItemSlots * kItemBytes;  // a word a warpgroup: whether its part came last
constexpr int kRawAt = kLastAt + 16;
constexpr int kRawCodes = pages::kTokens * kDim, kRawScales = pages::kTokens * 4;  // bytes of a page in e4m3
constexpr int kRawSlotBytes = kBlockPages * (kRawCodes + kRawScales);              // all codes, then all scales
constexpr int kBarriersAt = kRawAt + RAW_SLOTS * kRawSlotBytes;
constexpr int kSharedBytes = kBarriersAt + (SLOTS + QUERY_SLOTS + kItemSlots + RAW_SLOTS) * ring::kBarrierBytes;
static_assert(kSharedBytes == SHARED_BYTES);
static_assert(kDim >= 64 && pages::kE4m3 == (RAW_SLOTS > 0));

enum Barrier { kAllBarrier, kTurns, kGroupBarriers = kTurns + kGroups, kCopiersBarrier = kGroupBarriers + kGroups };

using PageRing = ring::Ring<SLOTS>;
using QueryRing = ring::Ring<QUERY_SLOTS>;
using ItemRing = ring::Ring<kItemSlots>;
using RawRing = ring::Ring<pages::kE4m3 ? RAW_SLOTS : 1>;

// Where pages are, by the kind of their numbers: of 16 bits the tensor map's, in e4m3 codes and their scales.
struct Source {
    const TensorMap& map;
    const unsigned char* codes;
    const float* scales;
};

// What a CTA works at: one tile of a row and a head of keys, or a part of what it sees. `row` is -1 after the last.
struct Item {
    int row, kv_head;
    int base;                  // number of the tile's first query among those of the row that share keys
    int first, fresh, length;  // the row's first token of the step, its new tokens, those of its text
    int tile, part;            // number of the tile in the step, and of the part

    __device__ __forceinline__ static Item load(u32 from) {
        const uint4 a = ptx::load_shared_four(from), b = ptx::load_shared_four(from + 16);
        const auto number = [](u32 word) { return static_cast<int>(word); };
        return {number(a.x), number(a.y), number(a.z), number(a.w), number(b.x), number(b.y), number(b.z), number(b.w)};
    }
    __device__ __forceinline__ void store(u32 to) const {
        ptx::store_shared_four(to, make_uint4(row, kv_head, base, first));
        ptx::store_shared_four(to + 16, make_uint4(fresh, length, tile, part));
    }
};

// What the queries of an item see.
struct Seen {
    int queries;      // of the tile
    int first, last;  // the last token that the first query sees, and the last query
    int parts;        // of the tile, at most `splits`: each has a block
    int first_page;   // of the text, that the item has
    int blocks;       // from there on

    __device__ __forceinline__ Seen(const Item& item, int group, int window, int splits) {
        const int known = item.length - item.fresh;
        queries = min(item.fresh * group - item.base, kQueries);
        first = known + item.base / group;
        last = known + (item.base + queries - 1) / group;
        first_page = max(first + 1 - window, 0) / pages::kTokens;
        blocks = (last / pages::kTokens - first_page) / kBlockPages + 1;
        parts = min(splits, blocks);
        const int from = blocks * item.part / parts;
        blocks = blocks * (item.part + 1) / parts - from;
        first_page += from * kBlockPages;
    }
};

// Hands out items, to a warp of every CTA: rows in order, of a row the tiles first whose queries see most, `splits` of a
// tile, whose part may be none (Seen::parts). A counter says
// how many were taken; who takes the last number, after every CTA has been told that there are no more, sets it to zero.
class Finder {
public:
    __device__ __forceinline__ Finder(
        const int* starts, const int* lengths, u32* taken, int rows, int kv_heads, int group, int splits)
        : starts_(starts), lengths_(lengths), taken_(taken), rows_(rows), kv_heads_(kv_heads), group_(group),
          splits_(splits) {
        load();
    }

    __device__ __forceinline__ Item next() {
        const int lane = threadIdx.x % 32;
        u32 ticket = 0;
        if (lane == 0) ticket = ptx::arrive(taken_);
        ticket = __shfl_sync(~0u, ticket, 0);
        const u32 number = ticket / splits_;
        while (number >= before_ + __shfl_sync(~0u, end_, 31)) {
            before_ += __shfl_sync(~0u, end_, 31);
            base_ += 32;
            if (base_ >= rows_) {
                if (lane == 0 && ticket == before_ * splits_ + gridDim.x - 1) *taken_ = 0;
                return {-1, 0, 0, 0, 0, 0, 0, 0};
            }
            load();
        }
        const u32 within = number - before_;
        const int owner = __popc(__ballot_sync(~0u, end_ <= within));
        const int fresh = __shfl_sync(~0u, fresh_, owner);
        const u32 left = __shfl_sync(~0u, end_, owner) - 1 - within;  // items of the row that come after
        return {base_ + owner,
                static_cast<int>(left % kv_heads_),
                static_cast<int>(left / kv_heads_) * kQueries,
                __shfl_sync(~0u, first_, owner),
                fresh,
                __shfl_sync(~0u, length_, owner),
                static_cast<int>(number),
                static_cast<int>(ticket % splits_)};
    }

private:
    // A lane has a row of 32; `end_` counts its items and those of the rows before it.
    __device__ __forceinline__ void load() {
        const int lane = threadIdx.x % 32, row = base_ + lane;
        first_ = fresh_ = length_ = 0;
        if (row < rows_) {
            first_ = __ldcg(starts_ + row);
            fresh_ = __ldcg(starts_ + row + 1) - first_;
            length_ = __ldcg(lengths_ + row);
        }
        const bool many = length_ != 0 && fresh_ > pages::kMostFew;
        end_ = rows::summed(many ? (fresh_ * group_ + kQueries - 1) / kQueries * kv_heads_ : 0);
    }

    const int *starts_, *lengths_;
    u32* taken_;
    int rows_, kv_heads_, group_;
    u32 splits_;
    int base_ = 0, first_, fresh_, length_;
    u32 before_ = 0, end_;
};

// The warp that finds items, tells the others, and copies pages to the ring of their kind: of block after block the keys,
// each ahead of the values of the block before.
template <class Ring>
__device__ __forceinline__ void copy_pages(
    const Ring& ring, const ItemRing& items, Finder finder, const Source& source, const int* table, int table_stride,
    int kv_heads, int group, int window, int splits) {
    const int lane = threadIdx.x % 32;
    typename Ring::Place at(0);
    ItemRing::Place item_at(0);
    while (true) {
        const Item item = finder.next();
        const Seen seen(item, group, window, splits);
        if (item.part >= seen.parts) continue;
        items.wait_emptied(item_at);
        __syncwarp();  // or a lane that comes late waits for the emptying after
        if (lane == 0) {
            item.store(items.address(item_at));
            ptx::barrier_arrive(items.filled(item_at));
        }
        __syncwarp();
        item_at.advance();
        if (item.row < 0) return;
        const int pages_there = (item.length + pages::kTokens - 1) / pages::kTokens - seen.first_page;
        const int* row_table = table + static_cast<long long>(item.row) * table_stride + seen.first_page;
        const auto fill = [&](const int (&numbers)[kBlockPages], int block, int half) {
            const int count = min(pages_there - block * kBlockPages, kBlockPages);
            ring.wait_emptied(at);
            if (ptx::elect()) {
                const u32 filled = ring.filled(at), to = ring.address(at);
                ptx::barrier_expect(filled, count * (pages::kE4m3 ? kRawCodes + kRawScales : kPieces * kPageBytes));
#pragma unroll
                for (int i = 0; i < kBlockPages; ++i) {
                    if (i >= count) continue;
                    const long long row = pages::row_of(numbers[i], half, kv_heads, item.kv_head, 0);
                    if constexpr (pages::kE4m3) {
                        const u32 scales_to = to + kBlockPages * kRawCodes + i * kRawScales;
                        ptx::bulk_copy(to + i * kRawCodes, source.codes + row * kDim, kRawCodes, filled);
                        ptx::bulk_copy(scales_to, source.scales + row, kRawScales, filled);
                    } else {
#pragma unroll
                        for (int piece = 0; piece < kPieces; ++piece) {
                            const u32 piece_to = to + piece * kPieceBytes + i * kPageBytes;
                            ptx::tensor_copy(piece_to, &source.map, piece * 64, static_cast<int>(row), filled);
                        }
                    }
                }
            }
            __syncwarp();
            at.advance();
        };
        int ahead = 0, now[kBlockPages] = {}, before[kBlockPages];
#pragma unroll 1
        for (int block = 0; block <= seen.blocks; ++block) {
#pragma unroll
            for (int i = 0; i < kBlockPages; ++i) before[i] = now[i];
            if (block < seen.blocks) {
                const int page = block * kBlockPages;
                if (page % 32 == 0) ahead = page + lane < pages_there ? __ldcg(row_table + page + lane) : 0;
#pragma unroll
                for (int i = 0; i < kBlockPages; ++i) now[i] = __shfl_sync(~0u, ahead, (page + i) % 32);
                fill(now, block, 0);
            }
            if (block > 0) fill(before, block - 1, 1);
        }
    }
}

}  // namespace prefill
