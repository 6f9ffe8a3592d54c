// What a CTA of decode.cuh works on: rows, heads and parts of texts, one after the other, and the pages that a warp fetches.
// Parameters: those of decode.cuh.
#pragma once

#include "attention/pages.cuh"
#include "attention/plan.cuh"
#include "attention/sums.cuh"
#include "attention/tile.cuh"

namespace decode {

// Which row, head of keys, some of the queries that share it, and split; behind them what the row's numbers say. They are
// asked for all at once, and pages of the table with them: a lane has every 32nd of the first 64.
struct Item {
    int row, kv_head, queries, split;
    int first, fresh, length;
    plan::Own own;
    int pages[2];
};

// Pages of a split.
struct Split {
    int first, end;
    int count;  // splits of the row that have any
};

__device__ __forceinline__ Split split_of(
    int length, int known, int window, int own, int splits, int split, int split_pages) {
    const int first_token = max(known + 1 - window, 0);  // the first that the first new token sees
    const int first = max(first_token / pages::kTokens, own), end = (length + pages::kTokens - 1) / pages::kTokens;
    const int all = end - first;
    int each = split_pages;
    if (each == 0) each = max(max((all + splits - 1) / splits, min((all + 15) / 16, 4)), 1);
    const int begin = first + split * each;
    return {begin, min(begin + each, end), (all + each - 1) / each};
}

// The same for all CTAs of an item.
struct Text {
    int known, queries;  // tokens before the new ones; queries of this item
    Split split;
    bool works;  // there are queries and pages
};

// A warp's pages of an item: its 16 tokens of each.
struct Source {
    const int* table;  // of the row
    int kv_head, known, first, left;
    int pages[2];
    int later;  // pages beyond the first 64, of which a lane has one of 32

    // The number of the i-th page.
    __device__ __forceinline__ int page(int i, int table_stride) {
        const int lane = threadIdx.x % 32, number = first + i;
        if (number < 64) return __shfl_sync(~0u, number < 32 ? pages[0] : pages[1], number % 32);
        if (number % 32 == 0 || i == 0) {
            const int mine = number / 32 * 32 + lane;
            later = mine < table_stride ? __ldcg(table + mine) : 0;
        }
        return __shfl_sync(~0u, later, number % 32);
    }
};

// Puts the new tokens among 16 that are there but for them.
__device__ __forceinline__ void put_new(u32 place, u32 fresh, u32 fresh_scales, int start, int known, int length) {
    const int lane = threadIdx.x % 32;
    for (int token = max(known, start); token < min(length, start + tile::kTokens); ++token) {
        const int row = token - start, from = token - known;
        for (int piece = lane; piece < 2 * pages::kRowPieces; piece += 32) {
            const int half = piece / pages::kRowPieces, within = piece % pages::kRowPieces * 16;
            ptx::store_shared_four(
                place + half * tile::kHalfBytes + row * pages::kRowStride + within,
                ptx::load_shared_four(fresh + (2 * from + half) * pages::kRowStride + within));
        }
        if (pages::kE4m3 && lane < 2) {
            ptx::store_shared(
                place + 2 * tile::kHalfBytes + (lane * tile::kTokens + row) * 4,
                ptx::load_shared(fresh_scales + (2 * from + lane) * 4));
        }
    }
}

}  // namespace decode
