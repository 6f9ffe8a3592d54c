// y[P, OC] = x @ W_e^T + bias_e on sm_80 and newer for P pairs of a token and an expert e that it was routed to, sorted
// by expert: the product of all experts of a layer in one launch, whose grid has room for however the tokens are routed.
// A CTA takes a tile of 128 rows by up to N_TILE pairs of one expert, or one split of it; CTAs for which the table on
// the device has no block of pairs end at once. An expert to which no token came is not read.
//
// CTAs are launched along gridDim.x first: blocks of pairs, so that those of one expert read its weights at about the
// same time, and all but one of them from L2. There are gridDim.x blocks in a run; a run meets all row tiles (y) before
// the next one begins (z, with the splits), so that its activations stay in L2, too.
//
// Parameters: those of sm80_tile.cuh, and GATHERS_TOKENS (1: x holds tokens, 0: x holds pairs, in their order).
#pragma once

#include "common/gate.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "dense/sm80_tile.cuh"

namespace linear {

// A block of pairs of one expert, as ops/tables.py describes the table: in sorted order from `first` on, n of them.
struct Block {
    int expert, first, n;

    __device__ __forceinline__ Block(const int4& entry, int block)
        : expert(entry.x), first(entry.z + (block - entry.y) * kTokens), n(min(entry.w - first, kTokens)) {}
};

// The rows of x that a block of pairs is multiplied with. Their numbers stand in the padding of the ring's first slot,
// which no copy writes.
struct Rows {
    const u16* x;
    long long x_stride;
    int ic;
    u16* first_slot;  // of activations
    int own;          // of the first kTokens threads, each: the number of its token; -1 beyond the block

    __device__ __forceinline__ Rows(
        const u16* x, long long x_stride, int ic, u16* first_slot, const int* order, int top_k, const Block& block)
        : x(x), x_stride(x_stride), ic(ic), first_slot(first_slot), own(-1) {
        const int token = threadIdx.x;
        if (token >= block.n) return;
        own = block.first + token;
        if constexpr (GATHERS_TOKENS) own = __ldcg(order + own) / top_k;
    }

    // Lets all threads know the numbers.
    __device__ __forceinline__ void share() const {
        if (threadIdx.x < kTokens) *number(threadIdx.x) = own;
        __syncthreads();
    }

    // Starts the copy of one stage; rows are whole 16 bytes, what lies beyond them or the block becomes zero.
    __device__ __forceinline__ void copy(u16* slot, int stage) const {
#pragma unroll 1  // registers are few
        for (int index = threadIdx.x; index < kTokens * kXChunks; index += kThreads) {
            const int token = index / kXChunks, column = index % kXChunks * 8;
            const int row = *number(token), channel = stage * tile::kColumns + column;
            const bool there = row >= 0 && channel < ic;
            const u16* source = x + (there ? row * x_stride + channel : 0);
            ptx::copy_async_16_zero_fill(
                ptx::shared_address(slot + token * kXStride + column), source, there ? 16 : 0);
        }
    }

private:
    __device__ __forceinline__ int* number(int token) const {
        return reinterpret_cast<int*>(first_slot + token * kXStride + tile::kColumns);
    }
};

}  // namespace linear

extern "C" __global__ void __launch_bounds__(linear::kThreads, 1) TERSOR_ENTRY(
    const char* __restrict__ weight,  // tiles of packed codes, expert by expert
    const char* __restrict__ scale,   // by rows or, in groups, by blocks (scales.cuh), likewise
    const u16* x,                     // [tokens or pairs, IC], rows start on 16 bytes
    const u16* __restrict__ bias,     // [E, OC] or null
    const int* order,                 // [P], the pair at each place: token * top_k + rank
    const int4* table,                // of blocks of pairs (ops/tables.py)
    u16* __restrict__ y,              // [P, OC], or half as many channels where gated; contiguous
    float* partial,                   // [most blocks][row tiles][splits][N_TILE][128]; unused with one split
    u32* arrived,                     // [most blocks][row tiles], zero before and after; unused with one split
    long long x_stride,               // elements between rows of x
    int oc,
    int ic,
    int top_k,
    int most_blocks,                  // that the table has room for
    int splits,
    float factor) {                   // the power of two that the decoded weights still lack
    using namespace linear;
    extern __shared__ __align__(128) char ring[];
    const int at = blockIdx.z / splits * gridDim.x + blockIdx.x, split = blockIdx.z % splits;
    const int row_tile = blockIdx.y;
    launch::wait_for_earlier();
    launch::start_next();
    const int count = __ldcg(reinterpret_cast<const int*>(table));
    const int4 entry = __ldcg(table + 1 + min(at, most_blocks - 1));  // not after the count, but beside it
    if (at >= count) return;

    const Block block(entry, at);
    const int units = (oc + tile::kUnitRows - 1) / tile::kUnitRows;  // an expert's tiles start with a unit of rows
    const Matrix matrix{weight, scale, oc, ic, block.expert * units * tile::kUnitBlocks};
    u16* first_slot = reinterpret_cast<u16*>(ring + kWarps * kWarpBytes);
    const Rows rows(x, x_stride, ic, first_slot, order, top_k, block);
    const Range range(matrix.blocks(), split, splits);
    float* sums = multiply_range(ring, matrix, row_tile, range, [&](u16* slot, int stage) {
        if (stage == range.first) rows.share();  // the first weights are on their way
        rows.copy(slot, stage);
    });
    const int number = at * gridDim.y + row_tile;
    if (splits > 1 && !add_splits(sums, partial, arrived, number, block.n, kTokens, split, splits)) return;
    const u16* biases = bias != nullptr ? bias + static_cast<long long>(block.expert) * oc : nullptr;
    u16* target = y + static_cast<long long>(block.first) * gate::outputs(oc);
    store(sums, matrix, row_tile, block.n, factor, biases, nullptr, target);
}
