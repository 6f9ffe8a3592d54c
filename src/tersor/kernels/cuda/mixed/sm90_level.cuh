// The code of one level of sm90_mixed.cuh or, with GATHERS_TOKENS, of experts/sm90_mixed.cuh: the rings, products and
// results of the dense kernel, in a namespace of the level's own. It is read once a level, each time with another LEVEL, and
// so are all headers below it that depend on the scheme of a weight.
//
// Parameters: LEVEL, and those of sm90_linear.cuh that differ from level to level, named with it: BITS_0 of level 0.

#ifndef TERSOR_OF_LEVEL
#define TERSOR_JOINED(name, level) name##_##level
#define TERSOR_NUMBERED(name, level) TERSOR_JOINED(name, level)
#define TERSOR_OF_LEVEL(name) TERSOR_NUMBERED(name, LEVEL)

#define BITS TERSOR_OF_LEVEL(BITS)
#define DECODE_WORDS TERSOR_OF_LEVEL(DECODE_WORDS)
#define DECODE_REGISTERS TERSOR_OF_LEVEL(DECODE_REGISTERS)
#define DECODE_MASK TERSOR_OF_LEVEL(DECODE_MASK)
#define DECODE_SHIFT TERSOR_OF_LEVEL(DECODE_SHIFT)
#define DECODE_RAISED TERSOR_OF_LEVEL(DECODE_RAISED)
#define DECODE_SPREAD TERSOR_OF_LEVEL(DECODE_SPREAD)
#define DECODE_TERMS TERSOR_OF_LEVEL(DECODE_TERMS)
#define DECODE_FINISH TERSOR_OF_LEVEL(DECODE_FINISH)
#define DECODE_CONSTANT TERSOR_OF_LEVEL(DECODE_CONSTANT)
#define BYTE_WEIGHT TERSOR_OF_LEVEL(BYTE_WEIGHT)
#define PIECES TERSOR_OF_LEVEL(PIECES)
#define SCALE_GROUPS TERSOR_OF_LEVEL(SCALE_GROUPS)
#define SCALE_TYPE TERSOR_OF_LEVEL(SCALE_TYPE)
#define ZERO_POINTS TERSOR_OF_LEVEL(ZERO_POINTS)
#define RATIOS TERSOR_OF_LEVEL(RATIOS)
#define WEIGHT_SLOTS TERSOR_OF_LEVEL(WEIGHT_SLOTS)
#define X_SLOTS TERSOR_OF_LEVEL(X_SLOTS)
#define GATHER_ROOM TERSOR_OF_LEVEL(GATHER_ROOM)
#define SHARED_BYTES TERSOR_OF_LEVEL(SHARED_BYTES)
#define FACTOR TERSOR_OF_LEVEL(FACTOR)
#endif

#undef TERSOR_COMMON_DECODE
#undef TERSOR_COMMON_SCALES
#undef TERSOR_COMMON_TILE
#undef TERSOR_DENSE_SM90_CTA
#undef TERSOR_DENSE_SM90_FINISH
#undef TERSOR_DENSE_SM90_ITEM
#undef TERSOR_DENSE_SM90_MULTIPLY
#undef TERSOR_DENSE_SM90_MULTIPLY_BYTES
#undef TERSOR_DENSE_SM90_MULTIPLY_PIECES
#undef TERSOR_DENSE_SM90_NORM
#undef TERSOR_DENSE_SM90_OUTLIERS
#undef TERSOR_DENSE_SM90_PIPELINE
#undef TERSOR_DENSE_SM90_PLACES
#undef TERSOR_DENSE_SM90_STORE
#undef TERSOR_EXPERTS_SM90_CTA
#undef TERSOR_EXPERTS_SM90_WORK
#undef TERSOR_MIXED_SM90_WORK

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "dense/outlier_rounds.cuh"
#include "mixed/sm90_call.cuh"

namespace TERSOR_OF_LEVEL(level) {

#ifdef GATHERS_TOKENS
#include "experts/sm90_cta.cuh"
#else
#include "dense/sm90_cta.cuh"
#include "mixed/sm90_work.cuh"
#endif

namespace linear {

// Where the results of a row set go whose channels begin with `first_channel` of all.
__device__ __forceinline__ Places places_of(const int* features, int outputs, int first_channel) {
    const bool wide = features == nullptr && (first_channel | outputs) % 8 == 0;
    return {features == nullptr ? nullptr : features + first_channel, first_channel, outputs, wide};
}

#ifdef GATHERS_TOKENS
constexpr int kSetBarriers = kExpertsBarriers;

// A CTA of this level, of all experts: one of those from `first_cta` on.
__device__ __forceinline__ void run_set(
    const Routed& of, const int* features, int outputs, int ic, const int4* table, int most_blocks, int most_splits,
    const char* weight, const char* scale, const mixed::Share& share, int first_cta, int first_channel) {
    Work work(
        share.rows, ic, table, most_blocks, blockIdx.x - first_cta, share.end - first_cta, first_cta, most_splits);
    run_experts(work, of, weight, scale, FACTOR, places_of(features, outputs, first_channel), [] {});
}
#else
constexpr int kSetBarriers = kBarriers;

// A CTA of this level: one of those from `first_cta` on, in clusters, whose rows begin with channel `first_channel` of all.
__device__ __forceinline__ void run_set(
    const mixed::Call& call, const char* weight, const char* scale, const mixed::Share& share, int first_cta,
    int first_channel) {
    static_assert(sizeof(Work) <= sizeof(mixed::KeptWork), "the same fields at all levels");
    const auto make = [&] {
        return Work(
            share.rows, call.ic, call.n, share.whole_tiles, kSlotBoxes * call.x_rows, call.cluster - first_cta,
            share.end - first_cta, call.splits, share.output, call.most_parts);
    };
    const Places places = places_of(call.features, call.outputs, first_channel);
    const float* row_scales = reinterpret_cast<const float*>(scale);
    const Operands of{row_scales, call.bias, call.x_scale, call.residual, call.y, call.partial, call.arrived, FACTOR,
                      {}, places, {}};
    Work* kept = reinterpret_cast<Work*>(call.kept);
    run_cta<Work>(
        make, kept, call.x_map, weight, scale, of, call.x_rows, call.splits, call.slots, call.barriers, call.token_scales);
}
#endif

}  // namespace linear

}  // namespace TERSOR_OF_LEVEL(level)
