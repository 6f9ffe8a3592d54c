// A CTA of the experts of a layer on sm_90a from its start to its end, for any launch whose tiles a table says that the
// device made (sm90_work.cuh). The parameters are those of sm90_experts.cuh.
#ifndef TERSOR_EXPERTS_SM90_CTA  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_EXPERTS_SM90_CTA

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.cuh"
#include "dense/sm90_item.cuh"
#include "dense/sm90_pipeline.cuh"
#include "experts/sm90_work.cuh"

namespace linear {

static_assert(kCluster == 1 && GATHERS == 1, "clusters do not know which tiles there are");
static_assert(!kXGroups, "items begin with any token, and copies of scales with every fourth");
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

// Shared memory of a CTA whose size the host does not choose.
constexpr int kExpertsBarriers = 2 * (kXSlots + kWeightSlots);
constexpr int kExpertsTokenScales = kBytewise ? kTokens : 1;

// What a CTA reads and writes beside weights and sizes: those of all experts, as sm90_experts.cuh has them.
struct Routed {
    const TensorMap& x_map;
    const int* order;
    int top_k, x_rows;
    const float* x_scale;
    const u16* bias;
    int bias_rows;  // of one expert
    u16* y;
    float* partial;
    u32* arrived;
    char* slots;  // shared memory, as is what follows
    u64* barriers;
    float* token_scales;
    int* block_tokens;
};

// `weight`: units of packed codes, expert by expert; `scale`: by rows or, in groups, by units (scales.cuh), likewise;
// `factor`: the power of two that the decoded weights still lack; `asked()` is called once all weights are asked for.
template <typename Asked>
__device__ __forceinline__ void run_experts(
    Work& work, const Routed& of, const char* weight, const char* scale, float factor, const Places& places,
    const Asked& asked) {
    const u32 base = ptx::shared_address(of.slots), first_barrier = ptx::shared_address(of.barriers);
    const XRing xs{base, kXSlotBytes, first_barrier};
    const WeightRing weights{base + kWeightsAt, kWeightSlotBytes, first_barrier + ring::kBarrierBytes * kXSlots};
    const Shared shared{of.slots, of.token_scales, base, 0, 0, 0};

    // The next kernel may rely on the tables before this one has ended, so it is let go only once they are known here.
    const auto meet = [&] {
        ptx::sync_threads<kAllBarrier, kThreads>();
        if constexpr (!TABLES_READY) ptx::wait_for_earlier_kernels();
        ptx::launch_dependents();
        work.read();
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
                asked();
            }
            if (warp == 1) {
                if constexpr (GATHERS_TOKENS) {
                    copy_tokens(xs, work, of.x_map, of.order, of.top_k, of.block_tokens);
                } else {
                    copy_activations(xs, work, 0, of.x_map, of.x_rows, of.x_scale, 0);
                }
            }
            if (kGroups > 0 && warp == 2) copy_weights<Part::kScales>(weights, work, 0, scale);
        }
    } else {
        meet();
        ptx::take_registers<kComputeRegisters>();
        const long long row_units = (work.oc + tile::kUnitRows - 1) / tile::kUnitRows;
        const long long scale_bytes = row_units * (kRowTermBytes + (scales::kRatios ? work.blocks() * kScaleBytes : 0));
        u32 use = 0;
        for_items(work, 0, [&](const Item& item) {
            const float* row_scales = reinterpret_cast<const float*>(scale + item.matrix * scale_bytes);
            const u16* biases =
                of.bias == nullptr ? nullptr : of.bias + static_cast<long long>(item.matrix) * of.bias_rows;
            const Operands own{row_scales, biases, of.x_scale, nullptr, of.y, of.partial, of.arrived, factor, {}, places, {}};
            run_item(work, item, 0, weights, xs, shared, own, use, false);
            use += item.last_block - item.first_block;
        });
    }
}

}  // namespace linear

#endif  // TERSOR_EXPERTS_SM90_CTA
