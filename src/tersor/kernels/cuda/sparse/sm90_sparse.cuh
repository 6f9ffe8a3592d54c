// y[N, OC] = x[N, IC] @ W[OC, IC]^T + bias + residual on sm_90a for a pruned W: a bitmap and packed values are expanded in
// registers (expand.cuh) and feed wgmma as its A operand; sums are float32; scales, one a row, are applied to the sums.
//
// A CTA takes items in turn as in dense/sm90_linear.cuh: a tile of ROW_GROUPS x 64 rows and N_TILE tokens over all blocks
// of 128 channels, or over those that its place has of them (work.cuh). ROW_GROUPS warpgroups multiply, each
// 64 rows; one warp of another keeps masks and values coming (feed.cuh), one activations. The end of an item is that of
// a dense one (dense/sm90_finish.cuh).
//
// With 8-bit activations values are e4m3, as activations are, and sums of a few blocks go to sums of their own
// (dense/sm90_multiply_bytes.cuh); what a token's activations were divided by is multiplied at the end.
//
// Parameters: those of expand.cuh, and of dense/sm90_linear.cuh BF16, BYTES, N_TILE, ROW_GROUPS, RESIDENT,
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
using Multiply = wgmma::Multiply<kBytewise ? wgmma::kE4m3 : kBf16 ? wgmma::kBfloat16 : wgmma::kFloat16>;

constexpr int kUnrolled = UNROLLED;  // blocks behind each other in code, for fewer instructions around them
constexpr int kSettled = 4;  // blocks of bytes whose products meet in the tensor cores' sums
constexpr bool kTogether = kWeightSlots == kXSlots && kSlotsOfBlock == 1;  // a block's slots have one number in both rings
constexpr int kHalfSteps = expand::kRegisters / 4;

static_assert(!kFew && !kWhole && kGroups == 0 && kCluster == 1 && GATHERS == 1, "what a sparse tile is");

// A multiplying warpgroup: 64 rows of `count` blocks from `first_block` on. `use` counts those that this CTA had before.
__device__ __forceinline__ void multiply_blocks(
    float (&sums)[kSums], const WeightRing& masks, const XRing& xs, const char* slots, const char* values,
    const char* table, const u32* slot_marks, u32 use, int first_block, int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row_group = threadIdx.x / 128;
    const u32 own_mask = row_group * kMaskBytes + warp * 256 + lane * 8;
    const u32 first_column = row_group * expand::kRingBytes + warp * 128, step = ptx::kept(16 + (count >> 31));
    const u64 first_x = wgmma::describe(xs.base);
    const u32 first_low = static_cast<u32>(first_x), first_high = static_cast<u32>(first_x >> 32);
    u32 place = 0, queue = queue_of(first_block);
    u32 pairs[2][expand::kRegisters];
    WeightRing::Place at(use);
    XRing::Place x_next(use * kSlotsOfBlock), x_before = x_next;  // the oldest slot that is not given back
    // The products of the next block: they are added to those before it where it `adds`; `starts`: the first of an item.
    const auto multiply = [&](Sum (&to)[kSums], bool adds, bool starts) {
        masks.wait_filled(at);
        enter_block(slot_marks[at.slot * kRowGroups + row_group], place);
        const u32 column = first_column + queue * 4;
        const uint2 mask = *reinterpret_cast<const uint2*>(slots + (masks.address(at) - xs.base) + own_mask);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32* a = pairs[half];
            const XRing::Place x_at = kTogether ? XRing::Place(at.slot, at.parity) : x_next;
            wgmma::wait<1>();  // the products that read these pairs have ended
            if (!starts && (half == 1 || kSlotsOfBlock > 1)) release_x(xs, x_before);
            if (half == 1 || kSlotsOfBlock > 1) {
                if (kTogether) {
                    x_before = x_at;
                } else if (!starts) {
                    x_before.advance();
                }
            }
            expand::expand(a, half == 0 ? mask.x : mask.y, place, values, column, step, table);
#pragma unroll
            for (int i = 0; i < expand::kRegisters; ++i) a[i] = expand::finish<kBf16>(a[i]);
            if (half == 0 || kSlotsOfBlock > 1) xs.wait_filled(x_at);
            const int piece = kSlotsOfBlock > 1 ? 0 : half * (kBytewise ? 64 : kXPiece);
            const u32 low = first_low + x_at.slot * (kXSlotBytes / 16) + piece / 16;
            const u64 x = static_cast<u64>(first_high) << 32 | low;
            wgmma::fence();
#pragma unroll
            for (int step = 0; step < kHalfSteps; ++step) {
                Multiply::run(to, a + 4 * step, x + wgmma::offset(step * 32), half > 0 || step > 0 || adds);
            }
            wgmma::commit();
            if (!kTogether && (half == 1 || kSlotsOfBlock > 1)) x_next.advance();
        }
        // With a wait for a slot ahead of each half, ptxas else waits after every product (C7513).
        if constexpr (kSlotsOfBlock > 1) wgmma::wait<1>();
        masks.release(at);
        at.advance();
        queue = (queue + kStep) % 32;
        place = __shfl_sync(~0u, place, (lane + kStep) % 32);
    };
    if constexpr (kBytewise) {
        Sum part[kSums];
        const auto settle = [&] {
            wgmma::wait<0>();
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] += part[i];
        };
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
        int block = 0;
        for (; block + kSettled <= count; block += kSettled) {
#pragma unroll
            for (int turn = 0; turn < kSettled; ++turn) multiply(part, turn > 0, block + turn == 0);
            settle();
        }
        for (; block < count; ++block) {
            multiply(part, false, block == 0);
            settle();
        }
    } else {
        int block = 0;
        for (; block + kUnrolled <= count; block += kUnrolled) {
#pragma unroll
            for (int turn = 0; turn < kUnrolled; ++turn) multiply(sums, turn > 0 || block > 0, block + turn == 0);
        }
        for (; block < count; ++block) multiply(sums, block > 0, block == 0);
        wgmma::wait<0>();
    }
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
    const float* x_scale,                             // [N], of 8-bit activations
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
    __shared__ __align__(8) float token_scales[kBytewise ? kTokens : 2];
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
        if (threadIdx.x == kConsumers - 1 && ctas > 0) range.take(of_places[blockIdx.x / ctas], 0, oc, work.blocks());
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
            const TileScales of_tokens(token_scales, x_scale, item);
            if (item.parts > 1 && !add_parts(sums, work, item, partial, arrived)) return;
            of_tokens.share(0);
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
