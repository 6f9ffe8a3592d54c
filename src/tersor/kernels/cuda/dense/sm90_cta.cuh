// A CTA of the sm90 schedule from its start to its end: rings, the threads that fill them, the threads that multiply. What
// it multiplies says its Work; the parameters are those of sm90_linear.cuh.
#ifndef TERSOR_DENSE_SM90_CTA  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_CTA

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/scales.cuh"
#include "common/tensor_map.cuh"
#include "dense/sm90_item.cuh"
#include "dense/sm90_outliers.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

// When all threads of the CTA, or of its cluster, have been here all barriers are initialised. A warp need not wait for
// that where it uses only barriers that it initialised itself.
template <bool kWaits>
__device__ __forceinline__ void meet(bool gathered) {
    if (kCluster > 1 || gathered) {
        ptx::arrive_cluster();
        if (kWaits || kCluster > 1) ptx::wait_cluster();
    } else if (kWaits) {
        ptx::sync_threads<kAllBarrier, kThreads>();
    } else {
        ptx::arrive_threads<kAllBarrier, kThreads>();
    }
}

// Shared memory of a CTA whose size the host does not choose.
constexpr int kBarriers = 2 * (kXSlots + kWeightSlots + 1) + kNormIn;
constexpr int kScaledTokens = kTokenScales ? kTokens : 1;

// `make()` returns the CTA's Work. Where that is not to be had from constants alone (kPlaced) it is made by warps that copy,
// and those that multiply read it in shared memory, `kept`: they have no registers to spare.
//
// `weight`: units of packed codes; `scale`: by rows or, in groups, by units (scales.cuh); `x_rows`: rows of a box of the
// tensor map; `barriers` [kBarriers] and `token_scales` [kScaledTokens] are shared memory, as are the slots.
template <typename Work, typename Make>
__device__ __forceinline__ void run_cta(
    const Make& make, Work* kept, const TensorMap& x_map, const char* weight, const char* scale, const Operands& of, int x_rows,
    int splits, char* slots, u64* barriers, float* token_scales) {
    const bool gathered = GATHERS > 1 && ptx::cluster_ctas() > 1;
    const int rank = kCluster > 1 ? blockIdx.x % kCluster : 0;
    const u32 base = ptx::shared_address(slots), first_barrier = ptx::shared_address(barriers);
    const XRing xs{base, kXSlotBytes, first_barrier};
    const WeightRing weights{base + kWeightsAt, kWeightSlotBytes, first_barrier + ring::kBarrierBytes * kXSlots};
    const u32 room_barrier = first_barrier + ring::kBarrierBytes * (kXSlots + kWeightSlots);
    const Shared shared{slots, token_scales, base, room_barrier, room_barrier + 8, room_barrier + 16};

    // The next kernel had better start after this one's copies have: where few tokens leave it registers, ptxas can put that
    // later without spills.
    if constexpr (!kFew) ptx::launch_dependents();
    if (threadIdx.x >= kConsumers) {
        ptx::give_registers<kCopyRegisters>();
        const Work work = make();
        const int warp = __shfl_sync(~0u, (threadIdx.x - kConsumers) / 32, 0);
        if (warp == 0) {
            if (ptx::elect()) {
                weights.start(kReaders);
                ptx::barrier_init_fence();
            }
            __syncwarp();
            meet<false>(gathered);
        } else {
            if (warp == 1 && ptx::elect()) {
                xs.start(kReaders * kCluster);
                ptx::barrier_init(shared.room_barrier, kFinishers);
                ptx::barrier_init(shared.gather_barrier, 1);
                if constexpr (kNormIn) ptx::barrier_init(shared.norm_barrier, 32);
                if constexpr (kPlaced) {
                    *kept = work;
                    __threadfence_block();  // a cluster meets without one
                }
                ptx::barrier_init_fence();
                if (gathered) ptx::barrier_expect(shared.gather_barrier, (splits - 1) * kPartBytes);
            }
            __syncwarp();
            meet<true>(gathered);
        }
        if constexpr (kNormIn) {
            if (warp == 3) {
                ptx::wait_for_earlier_kernels();
                scale_tokens(token_scales, of.norms, work.ic, work.n);
                ptx::barrier_arrive(shared.norm_barrier);
            }
        }
        if constexpr (kNormOut) {
            if (warp == 3) for_items(work, rank, [&](const Item& item) { fetch_weights(of.norms, item, work.oc); });
        }
        if (ptx::elect()) {
            if (warp == 0) copy_weights<Part::kCodes>(weights, work, rank, weight);
            if (warp == 1) copy_activations(xs, work, rank, x_map, x_rows, of.x_scale, work.n);
            if (kGroups > 0 && warp == 2) copy_weights<Part::kScales>(weights, work, rank, scale);
            if (kOutliers && warp == 3) copy_weights<Part::kKept>(weights, work, rank, of.kept);
        }
        if (warp == 0 && gathered) ptx::wait_cluster();  // a warp that has arrived may not end before
    } else {
        meet<true>(gathered);
        if constexpr (kFew) ptx::launch_dependents();
        ptx::take_registers<kComputeRegisters>();
        u32 use = 0;
        const auto run = [&](const Work& work) {
            for_items(work, rank, [&](const Item& item) {
                const u32 before = use;
                use += item.last_block - item.first_block;
                run_item(work, item, rank, weights, xs, shared, of, before, gathered);
            });
        };
        if constexpr (kOutliers) fetch_further(of.kept, make(), rank);
        if constexpr (kPlaced) {
            run(*kept);
        } else {
            run(make());
        }
    }
    if constexpr (kCluster > 1) ptx::sync_cluster();  // no CTA ends while another may write to it
}

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_CTA
