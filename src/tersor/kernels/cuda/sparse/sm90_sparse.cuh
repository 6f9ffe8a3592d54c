// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual on sm_90a for a pruned W: a bitmap and packed values are expanded in
// registers (expand.cuh) and feed wgmma as its A operand; sums are float32; scales, one a row, are applied to the sums.
//
// A CTA takes items in turn as in dense/sm90_linear.cuh: a tile of ROW_GROUPS x 64 rows and N_TILE tokens over all blocks
// of 128 channels, or over those that its place has of them (work.cuh). ROW_GROUPS warpgroups multiply, each
// 64 rows; one warp of another keeps masks and values coming (feed.cuh), one activations. The end of an item is that of
// a dense one (dense/sm90_finish.cuh).
//
// Parameters: those of expand.cuh, and of dense/sm90_linear.cuh BF16, N_TILE, ROW_GROUPS, RESIDENT,
// WEIGHT_SLOTS (of masks), X_SLOTS, SHARED_BYTES (all but the rings of values), EPILOGUE; the others are those of codes of
// one bit with one scale a row, few tokens through wgmma, no clusters and no norm.
#pragma once

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.cuh"
#include "common/tile.cuh"
#include "common/wgmma.cuh"
#include "dense/sm90_finish.cuh"
#include "dense/sm90_pipeline.cuh"
#include "dense/sm90_places.cuh"
#include "dense/sm90_store.cuh"
#include "sparse/expand.cuh"
#include "sparse/feed.cuh"
#include "sparse/work.cuh"

namespace sparse {

using namespace linear;
using Multiply = wgmma::Multiply<kBf16 ? wgmma::kBfloat16 : wgmma::kFloat16>;

static_assert(!kFew && !kBytewise && kGroups == 0 && kCluster == 1 && GATHERS == 1, "what a sparse tile is");

// A multiplying warpgroup: 64 rows of `count` blocks from `first_block` on. `use` counts those that this CTA had before.
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[kSums], const WeightRing& masks, const XRing& xs, const char* slots, const char* values,
    const char* table, const u32* slot_marks, u32 use, int first_block, int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128;
    const u32 own_mask = row_group * kMaskBytes + warp * 256 + lane * 8;
    const u32 first_column = row_group * expand::kRingBytes + warp * 128, step = ptx::kept(16 + (count >> 31));
    const u64 first_x = wgmma::describe(xs.base);
    u32 place = 0, queue = queue_of(first_block);
    u32 pairs[2][16];
    WeightRing::Place at(use);
    XRing::Place x_at(use * kSlotsOfBlock), x_before = x_at;  // the oldest slot that is not given back
    for (int block = 0; block < count; ++block) {
        masks.wait_filled(at);
        enter_block(slot_marks[at.slot * kRowGroups + row_group], place);
        const u32 column = first_column + queue * 4;
        const uint2 mask = *reinterpret_cast<const uint2*>(slots + (masks.address(at) - xs.base) + own_mask);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32* a = pairs[half];
            wgmma::wait<1>();  // the products that read these pairs have ended
            if (block > 0 && (half == 1 || kSlotsOfBlock > 1)) {
                release_x(xs, x_before);
                x_before.advance();
            }
            expand::expand(a, half == 0 ? mask.x : mask.y, place, values, column, step, table);
#pragma unroll
            for (int i = 0; i < 16; ++i) a[i] = expand::finish<kBf16>(a[i]);
            if (half == 0 || kSlotsOfBlock > 1) xs.wait_filled(x_at);
            const u64 x = first_x + wgmma::offset(x_at.slot * kXSlotBytes + (kSlotsOfBlock > 1 ? 0 : half * kXPiece));
            wgmma::fence();
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                Multiply::run(sums, a + 4 * step, x + wgmma::offset(step * 32), half > 0 || step > 0 || block > 0);
            }
            wgmma::commit();
            if (half == 1 || kSlotsOfBlock > 1) x_at.advance();
        }
        // With a wait for a slot ahead of each half, ptxas else waits after every product (C7513).
        if constexpr (kSlotsOfBlock > 1) wgmma::wait<1>();
        masks.release(at);
        at.advance();
        queue = (queue + kStep) % 32;
        place = __shfl_sync(~0u, place, (lane + kStep) % 32);
    }
    wgmma::wait<0>();
#pragma unroll
    for (int i = 0; i < kSlotsOfBlock; ++i, x_before.advance()) release_x(xs, x_before);
}

}  // namespace sparse

extern "C" __global__ void __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,          // x [N, IC], boxes of x_rows x 128 bytes
    const char* __restrict__ mask,                    // units of masks, and the rest of sparse::Stored
    const char* __restrict__ layers,
    const u32* __restrict__ starts,
    const u32* __restrict__ marks,
    const float* __restrict__ scale,                  // [OC]
    const u16* __restrict__ bias,                     // [OC] or null
    const u16* residual,                              // as y, added to it, or null
    u16* __restrict__ y,                              // [N, OC], or half as many channels where gated; contiguous
    float* partial,                                   // sums of parts of cut tiles
    u32* arrived,                                     // a counter for each cut tile, zero before and after
    const sparse::Place* __restrict__ of_places,      // what each place has
    int oc,
    int ic,
    int n,
    int ctas,                                         // of a place, or 0: tiles are whole
    int x_rows,                                       // rows of a box: a tile's share of the tokens
    float factor) {                                   // the power of two that the expanded weights still lack
    using namespace sparse;
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[2 * (kXSlots + kWeightSlots)];
    __shared__ __align__(8) u32 table[2 * expand::kEntries];
    __shared__ u32 slot_marks[kWeightSlots * kRowGroups];
    __shared__ Range range;
    const Work work{oc, ic, n, x_rows, ctas, &range};
    const u32 base = ptx::shared_address(slots), first_barrier = ptx::shared_address(barriers);
    const XRing xs{base, kXSlotBytes, first_barrier};
    const WeightRing masks{base + kWeightsAt, kWeightSlotBytes, first_barrier + ring::kBarrierBytes * kXSlots};
    const Stored stored{mask, layers, starts, marks};

    ptx::launch_dependents();
    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kFeedRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0) {
            if (ptx::elect()) {
                masks.start(kReaders);
                xs.start(kReaders);
                ptx::barrier_init_fence();
            }
            __syncwarp();
        }
        ptx::sync_threads<kAllBarrier, kThreads>();
        if (warp == 0) copy_weights(masks, work, stored, base + kSharedBytes, slot_marks);
        if (warp == 1 && ptx::elect()) copy_activations(xs, work, 0, x_map, x_rows, nullptr, 0);
    } else {
        if (threadIdx.x < 2 * expand::kEntries) table[threadIdx.x] = expand::entry(threadIdx.x / 2, threadIdx.x % 2);
        if (threadIdx.x == 0 && ctas > 0) range.take(of_places[blockIdx.x / ctas], 0, oc, work.blocks());
        ptx::sync_threads<kAllBarrier, kThreads>();
        ptx::take_registers<kExpandRegisters>();
        const Norms norms{};
        const Places places{};
        const char* values = slots + kSharedBytes;
        u32 use = 0;
        for_items_of_warp(work, [&](const Item& item) {
            Sum sums[kSums];
            RowTerms terms(oc, item, scale, factor);
            Met met;
            const int count = item.last_block - item.first_block;
            multiply_blocks(
                sums, masks, xs, slots, values, reinterpret_cast<const char*>(table), slot_marks, use, item.first_block,
                count);
            use += count;
            const bool ahead = !kMany && item.part == 0;
            if (ahead) met.load(item, terms, places, residual, norms);
            const TileScales of_tokens(nullptr, nullptr, item);
            if (item.parts > 1 && !add_parts(sums, work, item, partial, arrived)) return;
            terms.add_bias(bias, places);
            if constexpr (kMany) {
                store_many<false>(sums, item, terms, places, of_tokens, residual, y, slots + kExchangeAt);
            } else {
                if (!ahead) met.load(item, terms, places, residual, norms);
                store_few(sums, item, terms, places, of_tokens, met, residual != nullptr, y, norms);
            }
        });
    }
}
