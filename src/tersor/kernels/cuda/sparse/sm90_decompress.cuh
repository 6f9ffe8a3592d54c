// Kernel tiles of a pruned weight to a dense 16-bit matrix [rows, IC], with zeros for what is pruned, for a product by
// cuBLAS on sm_90a: scales, one a row, are applied and the weight is rounded once.
//
// A CTA takes items as in sm90_sparse.cuh, tiles of ROW_GROUPS x 64 rows or its place's blocks of them, and its first warp
// keeps masks and values coming in the same way (feed.cuh). What the other warps expand, 16 rows by 64 channels at a time, they turn in
// shared memory, so that every store writes 16 bytes and a warp's fill whole lines.
//
// Parameters: those of sm90_sparse.cuh, with one slot of activations, that nobody fills.
#pragma once

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/scaled.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "dense/sm90_pipeline.cuh"
#include "sparse/expand.cuh"
#include "sparse/feed.cuh"
#include "sparse/work.cuh"

namespace sparse {

using namespace linear;

constexpr int kHalfColumns = tile::kColumns / 2;
constexpr int kTurnedWords = kHalfColumns / 2 + 4;  // of a row, 16 bytes of padding against bank conflicts

// Writes 16 rows by 64 channels of a warp, where rows and channels are some of the matrix's.
__device__ __forceinline__ void store_half(
    const u32 (&turned)[tile::kRows][kTurnedWords], u16* dense, int first_row, int first_channel, int rows, int ic) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8, piece = lane % 8, channel = first_channel + 8 * piece;
        if (first_row + row >= rows || channel >= ic) continue;
        const u32* source = turned[row] + 4 * piece;
        u16* target = dense + static_cast<long long>(first_row + row) * ic + channel;
        if (ic % 8 == 0) {
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
        } else {
            const u16* values = reinterpret_cast<const u16*>(source);
            for (int j = 0; j < min(8, ic - channel); ++j) target[j] = values[j];
        }
    }
}

// A warpgroup: 64 rows of the item's blocks; `use` counts the blocks that this CTA had before.
__device__ __forceinline__ void write_blocks(
    const WeightRing& masks, const char* slots, const char* values, const char* table, const u32* slot_marks,
    u32 (&turned)[tile::kRows][kTurnedWords], const float (&scale)[2], u16* dense, const Item& item, int rows, int ic,
    u32 use) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128;
    const u32 own_mask = kWeightsAt + row_group * kMaskBytes + warp * 256 + lane * 8;
    const u32 first_column = row_group * expand::kRingBytes + warp * 128, step = ptx::kept(16 + (item.last_block >> 31));
    const int first_row = item.first_row + row_group * tile::kUnitRows + warp * tile::kRows;
    u32 place = 0, queue = queue_of(item.first_block);
    WeightRing::Place at(use);
    for (int block = item.first_block; block < item.last_block; ++block) {
        masks.wait_filled(at);
        enter_block(slot_marks[at.slot * kRowGroups + row_group], place);
        const u32 column = first_column + queue * 4;
        const uint2 mask = *reinterpret_cast<const uint2*>(slots + at.slot * kWeightSlotBytes + own_mask);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 pairs[16];
            expand::expand(pairs, half == 0 ? mask.x : mask.y, place, values, column, step, table);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const u32 pair = scales::scaled<kBf16>(expand::finish<kBf16>(pairs[i]), scale[i % 2]);
                turned[lane / 4 + i % 2 * 8][i / 2 * 4 + lane % 4] = pair;
            }
            if (half == 1) masks.release(at);
            __syncwarp();
            store_half(turned, dense, first_row, block * tile::kColumns + half * kHalfColumns, rows, ic);
            __syncwarp();
        }
        at.advance();
        queue = (queue + kStep) % 32;
        place = __shfl_sync(~0u, place, (lane + kStep) % 32);
    }
}

}  // namespace sparse

extern "C" __global__ void __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const char* __restrict__ mask,   // of the first of these rows, and the rest of sparse::Stored
    const char* __restrict__ layers,
    const u32* __restrict__ starts,
    const u32* __restrict__ marks,
    const float* __restrict__ scale,  // [rows]
    u16* __restrict__ dense,          // [rows, IC]
    int rows,                         // a multiple of 64, or up to the last one of the matrix
    int ic,
    const sparse::Place* __restrict__ of_places,  // what each place has of all rows
    int ctas,                         // of a place, or 0: tiles are whole
    int skipped,                      // tiles of cut rows ahead of these
    float factor) {                   // the power of two that the expanded weights still lack
    using namespace sparse;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[2 * kWeightSlots];
    __shared__ __align__(8) u32 table[2 * expand::kEntries];
    __shared__ u32 slot_marks[kWeightSlots * kRowGroups];
    __shared__ __align__(16) u32 turned[4 * kRowGroups][tile::kRows][kTurnedWords];
    __shared__ Range range;
    const Work work{rows, ic, 1, 1, ctas, &range};
    const WeightRing masks{ptx::shared_address(slots) + kWeightsAt, kWeightSlotBytes, ptx::shared_address(barriers)};
    const Stored stored{mask, layers, starts, marks};

    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kFeedRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0) {
            if (ptx::elect()) {
                masks.start(kReaders);
                ptx::barrier_init_fence();
            }
            __syncwarp();
        }
        ptx::sync_threads<kAllBarrier, kThreads>();
        if (warp == 0) {
            copy_weights(masks, work, stored, ptx::shared_address(slots) + kSharedBytes, slot_marks);
        }
    } else {
        if (threadIdx.x < 2 * expand::kEntries) table[threadIdx.x] = expand::entry(threadIdx.x / 2, threadIdx.x % 2);
        if (threadIdx.x == kConsumers - 1 && ctas > 0) range.take(of_places[blockIdx.x / ctas], skipped, rows, work.blocks());
        ptx::sync_threads<kAllBarrier, kThreads>();
        ptx::take_registers<kExpandRegisters>();
        u32 use = 0;
        for_items_of_warp(work, [&](const Item& item) {
            const int warp = threadIdx.x / 32, row = item.first_row + warp * tile::kRows + threadIdx.x % 32 / 4;
            float own[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                own[half] = row + 8 * half < rows ? scale[row + 8 * half] * factor : 0.0f;
            }
            write_blocks(
                masks, slots, slots + kSharedBytes, reinterpret_cast<const char*>(table), slot_marks, turned[warp], own,
                dense, item, rows, ic, use);
            use += item.last_block - item.first_block;
        });
    }
}
