// The warps of sm90_prefill.cuh that copy queries to shared memory and, where pages are in e4m3, make fp16 numbers of them.
// The parameters are those of sm90_prefill.cuh.
#pragma once

#include "attention/sm90_pipeline.cuh"

namespace prefill {

// What a token's e4m3 numbers are multiplied with, in two factors of fp16, so that a small one keeps its bits: at most
// 1/448 of the largest fp16 number.
struct Scale {
    u32 fraction, power;

    __device__ __forceinline__ explicit Scale(float scale) {
        const u32 bits = __float_as_uint(scale > 146.0f ? 146.0f : scale);
        const auto both = [](u32 wide) { return ptx::narrow<false>(__uint_as_float(wide)) * 0x10001u; };
        fraction = both((bits & 0x7fffffu) | 0x3f800000u);
        power = both(bits & 0x7f800000u);
    }
    __device__ __forceinline__ u32 times(u32 pair) const {
        return ptx::multiply_pair(ptx::multiply_pair(pair, fraction), power);
    }
};

// A block of keys or values becomes fp16 numbers in swizzled rows, of tokens from `there` on zeros.
template <bool kValues>
__device__ __forceinline__ void widen_block(u32 raw, u32 wide, int there, int thread) {
    constexpr int kChunks = kDim / 16;  // of 16 channels
#pragma unroll 2
    for (int i = thread; i < kBlock * kChunks; i += kQueryCopiers) {
        const int token = i / kChunks, chunk = i % kChunks;
        const uint4 codes = ptx::load_shared_four(raw + i * 16);
        const Scale scale(ptx::load_shared_float(raw + kBlockPages * kRawCodes + token * 4));
        const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
        u32 pairs[8];  // in the order of memory: keys stand where `pages::place_of` has a query's channels
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const u32 low = scale.times(pages::widen_e4m3<0, 1>(words[k]));
            const u32 high = scale.times(pages::widen_e4m3<2, 3>(words[k]));
            pairs[kValues ? 2 * k : k] = token < there ? low : 0;
            pairs[kValues ? 2 * k + 1 : k + 4] = token < there ? high : 0;
        }
        const u32 row = wide + chunk / 4 * kPieceBytes + token * 128;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32* four = pairs + 4 * half;
            const u32 to = row + (2 * chunk + half ^ token) % 8 * 16;
            ptx::store_shared_four(to, make_uint4(four[0], four[1], four[2], four[3]));
        }
    }
}

// All blocks of an item, in the order of `copy_pages`.
__device__ __forceinline__ void widen_item(
    const RawRing& raw, const PageRing& wide, RawRing::Place& raw_at, PageRing::Place& wide_at, const Item& item,
    const Seen& seen) {
    const int thread = threadIdx.x - (kThreads - kQueryCopiers);
    const int there = item.length - seen.first_page * pages::kTokens;
    const auto widen = [&](int block, bool values) {
        raw.wait_filled(raw_at);
        wide.wait_emptied(wide_at);
        const u32 from = raw.address(raw_at), to = wide.address(wide_at);
        if (values) {
            widen_block<true>(from, to, there - block * kBlock, thread);
        } else {
            widen_block<false>(from, to, there - block * kBlock, thread);
        }
        __syncwarp();
        raw.release(raw_at);  // its fence also shows the tensor cores what this thread wrote
        ptx::sync_threads<kCopiersBarrier, kQueryCopiers>();
        if (thread == 0) ptx::barrier_arrive(wide.filled(wide_at));
        raw_at.advance();
        wide_at.advance();
    };
#pragma unroll 1
    for (int block = 0; block <= seen.blocks; ++block) {
        if (block < seen.blocks) widen(block, false);
        if (block > 0) widen(block - 1, true);
    }
}

// Three warps that copy the queries of every item to swizzled rows; those that are not there become zeros. Then they widen
// the blocks of the item, where pages are in e4m3.
__device__ __forceinline__ void copy_queries(
    const QueryRing& ring, const ItemRing& items, const RawRing& raw, const PageRing& wide, const u16* queries, int heads,
    int kv_heads, int group, int window, int splits) {
    constexpr int kRowPieces = kDim / 8, kAtOnce = 32 / kRowPieces;  // queries that a warp copies at a time
    const int thread = threadIdx.x - (kThreads - kQueryCopiers), lane = thread % 32;
    const int piece = lane % kRowPieces, own = lane / kRowPieces;
    QueryRing::Place at(0);
    ItemRing::Place item_at(0);
    RawRing::Place raw_at(0);
    PageRing::Place wide_at(0);
    while (true) {
        items.wait_filled(item_at);
        const Item item = Item::load(items.address(item_at));
        items.release(item_at);
        item_at.advance();
        if (item.row < 0) return;
        const int count = min(item.fresh * group - item.base, kQueries);
        ring.wait_emptied(at);
#pragma unroll 2
        for (int query = thread / 32 * kAtOnce + own; query < kQueries; query += kQueryCopiers / 32 * kAtOnce) {
            if (own >= kAtOnce) break;
            const int number = item.base + min(query, count - 1);
            const long long token = item.first + number / group;
            const u16* from = queries + (token * heads + item.kv_head * group + number % group) * kDim + piece * 8;
            const u32 to = ring.address(at) + piece / 8 * kQueryPieceBytes + query * 128 + (piece ^ query) % 8 * 16;
            ptx::copy_async_16_zero_fill(to, from, query < count ? 16 : 0);
        }
        ptx::copy_async_commit();
        ptx::copy_async_wait<0>();
        __syncwarp();
        ptx::end_reads();  // and writes, which the tensor cores are to see
        ptx::sync_threads<kCopiersBarrier, kQueryCopiers>();
        if (thread == 0) ptx::barrier_arrive(ring.filled(at));
        at.advance();
        if constexpr (pages::kE4m3) widen_item(raw, wide, raw_at, wide_at, item, Seen(item, group, window, splits));
    }
}

}  // namespace prefill
