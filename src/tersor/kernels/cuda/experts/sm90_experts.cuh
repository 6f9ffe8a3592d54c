// y[P, OC] = x @ W_e^T + bias_e on sm_90a for P pairs of a token and an expert e that it was routed to, sorted by expert:
// the product of all experts of a layer in one launch, of as many CTAs however the tokens are routed. An expert to which
// no token came is not read; the others are read once for every N_TILE tokens of theirs.
//
// Rings, products, sums and results are those of sm90_linear.cuh, and so are the parameters (CLUSTER and GATHERS are 1).
// Beside them: GATHERS_TOKENS (1: x holds tokens, and each pair's is fetched by itself; 0: x holds pairs, in their order,
// and behind the last one as many rows as a tile has tokens, which are not used), TABLES_READY (1: what routed the tokens
// had ended before the kernel ahead started, so weights are fetched while that one still runs).
#pragma once

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.cuh"
#include "dense/sm90_item.cuh"
#include "dense/sm90_pipeline.cuh"
#include "experts/fetch.cuh"
#include "experts/sm90_work.cuh"

namespace linear {

static_assert(kCluster == 1 && GATHERS == 1, "clusters do not know which tiles there are");
static_assert(!GATHERS_TOKENS || (kSlotPieces == kPieces && !TABLES_READY), "a thread fetches each row of a slot");

// The thread that copies the activations of each pair's token: a box of the tensor map is one row. `tokens` is shared
// memory for the tokens of a block, which this thread alone uses: registers are few.
__device__ __forceinline__ void copy_tokens(
    const XRing& ring, const Work& work, const TensorMap& x_map, const int* order, int top_k, int* tokens) {
    ptx::prefetch_map(&x_map);
    const float inverse = 1.0f / top_k;
    XRing::Place at(0);
    for_items(work, 0, [&](const Item& item) {
        const int count = item.end_token - item.first_token;
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
            const float pair = __ldcg(order + item.first_token + i);
            tokens[i] = static_cast<int>((pair + 0.5f) * inverse);  // exact for up to two million pairs
        }
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block, at.advance()) {
            ring.wait_emptied(at);
            ptx::barrier_expect(ring.filled(at), kPieces * count * 128);
            u32 target = ring.address(at);
#pragma unroll 1
            for (int i = 0; i < count; ++i, target += 128) {
                const int token = tokens[i];
#pragma unroll
                for (int piece = 0; piece < kPieces; ++piece) {
                    const int channel = block * tile::kColumns + piece * kPieceChannels;
                    ptx::tensor_copy(target + piece * kXPiece, &x_map, channel, token, ring.filled(at));
                }
            }
        }
    });
}

}  // namespace linear

extern "C" __global__ void __launch_bounds__(linear::kThreads, RESIDENT) TERSOR_ENTRY(
    const __grid_constant__ TensorMap x_map,  // x [tokens or pairs, IC], boxes of x_rows x 128 bytes
    const char* __restrict__ weight,                  // units of packed codes, expert by expert
    const char* __restrict__ scale,                   // by rows or, in groups, by units (scales.cuh), likewise
    const u16* __restrict__ bias,                     // [E, OC] or null
    const float* __restrict__ x_scale,                // [P] for 8-bit activations, else null
    const int* __restrict__ order,                    // [P], the pair at each place: token * top_k + rank
    const int4* table,                                // of blocks of pairs (sm90_work.cuh)
    u16* __restrict__ y,                              // [P, OC], or half as many channels where gated; contiguous
    float* partial,                                   // sums of split items
    u32* arrived,                                     // a counter for each split tile, zero before and after
    const char* following,                            // packed codes of the product behind, to be fetched, or null
    long long following_bytes,                        // of one expert
    int oc,
    int ic,
    int top_k,
    int x_rows,                                       // rows of a box, at most as many as x has
    int most_blocks,                                  // that the table has room for
    int most_splits,
    float factor) {                                   // the power of two that the decoded weights still lack
    using namespace linear;
    static_assert(!kXGroups, "items begin with any token, and copies of scales with every fourth");
    extern __shared__ __align__(1024) char slots[];
    __shared__ __align__(8) u64 barriers[2 * (kXSlots + kWeightSlots)];
    __shared__ __align__(8) float token_scales[kBytewise ? kTokens : 1];
    __shared__ int block_tokens[GATHERS_TOKENS ? kTokens : 1];
    const u32 base = ptx::shared_address(slots), first_barrier = ptx::shared_address(barriers);
    const XRing xs{base, kXSlotBytes, first_barrier};
    const WeightRing weights{base + kWeightsAt, kWeightSlotBytes, first_barrier + ring::kBarrierBytes * kXSlots};
    const Shared shared{slots, token_scales, base, 0, 0, 0};
    Work work(oc, ic, table, most_blocks);

    // The next kernel may rely on the tables before this one has ended, so it is let go only once they are known here.
    const auto meet = [&] {
        ptx::sync_threads<kAllBarrier, kThreads>();
        if constexpr (!TABLES_READY) ptx::wait_for_earlier_kernels();
        ptx::launch_dependents();
        work.read(most_splits);
    };
    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kCopyRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0 && ptx::elect()) {
            weights.start(kReaders);
            xs.start(kReaders);
            ptx::barrier_init_fence();
        }
        __syncwarp();
        meet();
        if (ptx::elect()) {
            if (warp == 0) {
                copy_weights<Part::kCodes>(weights, work, 0, weight);
                if (following != nullptr) fetch_experts(work, following, following_bytes);
            }
            if (warp == 1) {
                if constexpr (GATHERS_TOKENS) {
                    copy_tokens(xs, work, x_map, order, top_k, block_tokens);
                } else {
                    copy_activations(xs, work, 0, x_map, x_rows, x_scale, 0);
                }
            }
            if (kGroups > 0 && warp == 2) copy_weights<Part::kScales>(weights, work, 0, scale);
        }
    } else {
        meet();
        ptx::take_registers<kComputeRegisters>();
        const int padded = (oc + tile::kUnitRows - 1) / tile::kUnitRows * tile::kUnitRows;
        u32 use = 0;
        for_items(work, 0, [&](const Item& item) {
            const long long rows_before = static_cast<long long>(item.matrix) * padded;
            const float* row_scales = reinterpret_cast<const float*>(scale) + rows_before * scales::kRowWords;
            const u16* biases = bias == nullptr ? nullptr : bias + static_cast<long long>(item.matrix) * oc;
            const Operands of{row_scales, biases, x_scale, nullptr, y, partial, arrived, factor, {}, {}, {}};
            run_item(work, item, 0, weights, xs, shared, of, use, false);
            use += item.last_block - item.first_block;
        });
    }
}
