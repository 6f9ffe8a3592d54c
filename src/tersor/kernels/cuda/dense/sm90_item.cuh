// What the multiplying warpgroups do with one item, for any kernel on the rings of sm90_pipeline.cuh: products, sums of
// warpgroups and of splits, scales and the rounded result. The parameters are those of sm90_linear.cuh.
#ifndef TERSOR_DENSE_SM90_ITEM  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_ITEM

#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "dense/sm90_finish.cuh"
#include "dense/sm90_pipeline.cuh"
#include "dense/sm90_places.cuh"
#include "dense/sm90_store.cuh"

#if BYTES
#include "dense/sm90_multiply_bytes.cuh"
#include "dense/sm90_multiply_pieces.cuh"
#else
#include "dense/sm90_multiply.cuh"
#include "dense/sm90_outliers.cuh"
#endif

namespace linear {

// What an item reads beside weights and activations, of the matrix that it is of, and where its results go.
struct Operands {
    const float* row_scales;  // by rows, where there is one scale a row
    const u16* bias;          // [oc], or of all row sets, or null
    const float* x_scale;     // for 8-bit activations [n] or, in groups, as copy_activations says; else null
    const u16* residual;      // as y, added to it, or null
    u16* y;                   // [n, oc], or half as many channels where gated
    float* partial;           // sums of split items
    u32* arrived;             // a counter for each split tile
    float factor;             // the power of two that the decoded weights still lack
    Norms norms;
    Places places;
    const char* kept;         // of a weight that has outliers (sm90_outliers.cuh), else null
};

// Where the CTA's shared memory is.
struct Shared {
    char* slots;
    float* token_scales;  // [kTokens] for 8-bit activations and where a norm is ahead
    u32 base;             // address of the slots
    u32 room_barrier, gather_barrier, norm_barrier;
};

// Whether a row's scale is read behind the products: 32 tokens and what a row set's CTA knows leave no registers for it.
constexpr bool kScalesLate = kPlaced && kFew && kTokens == 32;

// `use` counts the blocks that this CTA had before; `gathered`: a cluster adds the splits.
template <typename Work>
__device__ __forceinline__ void run_item(
    const Work& work, const Item& item, int rank, const WeightRing& weights, const XRing& xs, const Shared& shared,
    const Operands& of, u32 use, bool gathered) {
    Sum sums[kSums];
    char* slots = shared.slots;
    const int count = item.last_block - item.first_block;
    RowTerms terms(work.oc, item, of.row_scales, of.factor);
    bool holds_all = true;
    // What results meet is fetched before sums are exchanged, which takes as long, where this CTA will have them. What
    // the kernels ahead wrote is there once this warpgroup has had activations.
    Met met;
    const bool ahead = !kMany && !kBytewise && (item.parts == 1 || (gathered && item.part == 0));
    const auto fetch = [&] {
        if (!ahead || threadIdx.x >= kFinishers) return;
        if (kFew && count <= threadIdx.x / 128) ptx::wait_for_earlier_kernels();
        met.load(item, terms, of.places, of.residual, of.norms);
    };
#if !BYTES
    const Beside<Work> beside(work, slots, of.kept, of.row_scales, of.factor);
    if constexpr (kFew) {
        float turns[kRowGroups][kSums];
        multiply_few(turns, weights, xs, slots, use, count, of.row_scales, item.first_row, work.oc, beside);
        if constexpr (kScalesLate) terms = RowTerms(work.oc, item, of.row_scales, of.factor);
        fetch();
        holds_all = exchange_turns(sums, turns, reinterpret_cast<float*>(slots + kExchangeAt), use == 0);
    }
#endif
    if constexpr (!kFew) {
        const int row = terms.first_row + threadIdx.x % 32 / 4;
        const scales::RowOffsets offsets = scales::row_offsets(of.row_scales, row, work.oc);
#if BYTES
        multiply_blocks(sums, weights, xs, slots, use, count, offsets);
#else
        multiply_blocks(sums, weights, xs, slots, use, count, offsets, row, beside);
#endif
        fetch();
    }
    const TileScales of_tokens(shared.token_scales, of.x_scale, item);
    if (holds_all && gathered) {
        holds_all = gather_splits(sums, item, shared.base, slots, shared.room_barrier, shared.gather_barrier);
    } else if (holds_all && item.parts > 1) {
        holds_all = add_splits(sums, work, item, rank, of.partial, of.arrived);
    }
    if (!holds_all) return;
    terms.add_bias(of.bias, of.places);
    of_tokens.share(shared.norm_barrier);
    if constexpr (kMany) {
        if (kPlaced && !of.places.wide) {
            store_many<true>(sums, item, terms, of.places, of_tokens, of.residual, of.y, slots + kExchangeAt);
        } else {
            store_many<false>(sums, item, terms, of.places, of_tokens, of.residual, of.y, slots + kExchangeAt);
        }
    } else {
        if (!ahead) met.load(item, terms, of.places, of.residual, of.norms);
        store_few(sums, item, terms, of.places, of_tokens, met, of.residual != nullptr, of.y, of.norms);
    }
}

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_ITEM
