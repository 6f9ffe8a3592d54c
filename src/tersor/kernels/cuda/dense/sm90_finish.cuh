// Towards the end of an item of sm90_linear.cuh: sums of warpgroups and of splits are added, scaled and rounded.
#ifndef TERSOR_DENSE_SM90_FINISH  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_FINISH

#include "common/gate.cuh"
#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "dense/sm90_norm.cuh"
#include "dense/sm90_pipeline.cuh"
#include "dense/sm90_places.cuh"

namespace linear {

// After blocks in turn: each warpgroup hands its sums of other row groups over and adds up those of its own, in the same
// order always. Returns true where there are some, in the first kRowGroups warpgroups.
__device__ __forceinline__ bool exchange_turns(
    float (&sums)[kSums], const float (&turns)[kRowGroups][kSums], float* exchange, bool is_first) {
    const int own = threadIdx.x / 128;
    const auto part = [&](int rows, int turn) {
        return exchange + (rows * (kTurns - 1) + turn) * kSums * 128 + threadIdx.x % 128;
    };
    if (!is_first) ptx::sync_threads<kPartsRead, kConsumers>();
#pragma unroll
    for (int rows = 0; rows < kRowGroups; ++rows) {
        if (rows == own) {
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] = turns[rows][i];
        } else {
            float* target = part(rows, own - (own > rows));
#pragma unroll
            for (int i = 0; i < kSums; ++i) target[i * 128] = turns[rows][i];
        }
    }
    ptx::sync_threads<kPartsReady, kConsumers>();
    if (own >= kRowGroups) return false;
#pragma unroll
    for (int turn = 0; turn < kTurns - 1; ++turn) {
        const float* source = part(own, turn);
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += source[i * 128];
    }
    return true;
}

// Hands this CTA's sums to the first of its cluster; returns true there, where then the sum of all splits is. `arrived`
// is the barrier that counts the bytes of the parts. Where they have no room of their own they go to where the rings of
// that CTA were: `room` is the barrier at which its threads tell the others that they have read what was there.
__device__ __forceinline__ bool gather_splits(
    Sum (&sums)[kSums], const Item& item, u32 base, const char* slots, u32 room, u32 arrived) {
    static_assert((GATHERS - 1) * kPartBytes <= kExchangeAt, "as many parts as the rings have room for");
    constexpr int kFours = kSums / 4;
    const bool to_rings = item.parts - 1 > GATHER_ROOM;
    const int place = to_rings ? 0 : kExchangeAt + kExchangeBytes;
    if (item.part > 0) {
        const u32 first = base + place + (item.part - 1) * kPartBytes + threadIdx.x * 16;
        const u32 there = ptx::address_in(first, 0), barrier = ptx::address_in(arrived, 0);
        if (to_rings) ptx::barrier_wait(room, 0);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float four[] = {
                bytes_of(sums[4 * i]), bytes_of(sums[4 * i + 1]), bytes_of(sums[4 * i + 2]), bytes_of(sums[4 * i + 3])};
            ptx::store_in(there + i * kFinishers * 16, four, barrier);
        }
        return false;
    }
    if (to_rings) {
        ptx::end_reads();
        for (int part = 1; part < item.parts; ++part) ptx::barrier_arrive_at(room, part);
    }
    ptx::barrier_wait(arrived, 0);
    const char* parts = slots + place;
    for (int part = 1; part < item.parts; ++part, parts += kPartBytes) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
            const float4 four = reinterpret_cast<const float4*>(parts)[i * kFinishers + threadIdx.x];
            add_bytes(sums[4 * i], four.x);
            add_bytes(sums[4 * i + 1], four.y);
            add_bytes(sums[4 * i + 2], four.z);
            add_bytes(sums[4 * i + 3], four.w);
        }
    }
    return true;
}

// Hands this CTA's sums over through memory; returns true in the one CTA that then holds the sum of all splits.
template <typename Work>
__device__ __forceinline__ bool add_splits(
    Sum (&sums)[kSums], const Work& work, const Item& item, int rank, float* partial, u32* arrived) {
    __shared__ bool is_last;
    const int splits = item.parts, output = work.output(item, rank);
    float* parts = partial + work.parts_before(item, rank) * kSums * kFinishers + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(parts + (item.part * kSums + i) * kFinishers, bytes_of(sums[i]));
    __threadfence();
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
    if (threadIdx.x == 0) {
        is_last = ptx::arrive(arrived + output) == splits - 1;
        if (is_last) arrived[output] = 0;
    }
    ptx::sync_threads<kFinishersBarrier, kFinishers>();
    if (!is_last) return false;
    __threadfence();
    // A load from L2 takes about a microsecond: as many as registers hold are under way at a time.
    constexpr int kChunk = kSums < 64 ? kSums : 64;
    constexpr int kTogether = kChunk < 16 ? 16 / kChunk : 1;
#pragma unroll
    for (int chunk = 0; chunk < kSums; chunk += kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) sums[chunk + i] = 0;
        for (int split = 0; split < splits; split += kTogether) {
            float loaded[kTogether][kChunk];
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) {
                    loaded[s][i] =
                        split + s < splits ? __ldcg(parts + ((split + s) * kSums + chunk + i) * kFinishers) : 0.0f;
                }
            }
#pragma unroll
            for (int s = 0; s < kTogether; ++s) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) add_bytes(sums[chunk + i], loaded[s][i]);
            }
        }
    }
    return true;
}

constexpr bool kOfTokens = kBytewise && !kXGroups;
constexpr bool kTokenScales = kOfTokens || kNormIn;

// The scales of a tile's tokens: of 8-bit activations, or what a norm divides by, which a warp that copies brings
// (`scale_tokens`). A CTA reads each once: they lie in a few sectors of one slice of L2, which all CTAs would queue for.
// They, like residuals, are read past L1, which may hold what lay there before the kernel ahead wrote them: an earlier
// kernel that still ran beside this one may have read it.
struct TileScales {
    float own = 0.0f;  // of token threadIdx.x of the tile
    float* shared;     // [kTokens], of all, once they are shared

    __device__ __forceinline__ TileScales(float* shared, const float* x_scale, const Item& item) : shared(shared) {
        static_assert(!kOfTokens || kTokens <= kFinishers, "a thread has one token");
        const int token = item.first_token + threadIdx.x;
        if (kOfTokens && threadIdx.x < kTokens && token < item.end_token) own = __ldcg(x_scale + token);
    }
    // `brought`: the barrier at which that warp tells.
    __device__ __forceinline__ void share(u32 brought) const {
        if constexpr (kNormIn) ptx::barrier_wait(brought, 0);  // for the first item, and so for all
        if constexpr (kOfTokens) {
            ptx::sync_threads<kFinishersBarrier, kFinishers>();  // those of the item before have been read
            if (threadIdx.x < kTokens) shared[threadIdx.x] = own;
            ptx::sync_threads<kFinishersBarrier, kFinishers>();
        }
    }
};

// The scales of the two tokens that a lane has of the `tokens`-th group of eight.
struct TokenScales {
    float of[2] = {};

    __device__ __forceinline__ TokenScales(const TileScales& all, int tokens) {
        if constexpr (kTokenScales) {
            const float2 pair = *reinterpret_cast<const float2*>(all.shared + tokens * 8 + threadIdx.x % 4 * 2);
            of[0] = pair.x;
            of[1] = pair.y;
        }
    }
};

// The scales and biases of this lane's two rows of a tile, of those of one matrix.
struct RowTerms {
    float scale[2], bias[2];
    int first_row, rows;

    __device__ __forceinline__ RowTerms(int rows, const Item& item, const float* scales, float factor)
        : first_row(item.first_row + threadIdx.x % kFinishers / 32 * tile::kRows), rows(rows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            scale[half] = kSumGroups > 0 ? factor : (row < rows ? scales::of_row(scales, row) * factor : 0.0f);
            if constexpr (OUTLIERS > 0) scale[half] = 1.0f;  // sums have it already
        }
    }
    __device__ __forceinline__ void add_bias(const u16* biases, const Places& places) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
            bias[half] = biases != nullptr && row < rows ? ptx::widen<kBf16>(biases[places.row(row, rows)]) : 0.0f;
        }
    }
    // Of this lane's row `half`, token 2 (lane % 4) + `odd` of the `tokens`-th group of eight.
    __device__ __forceinline__ float value(
        const Sum (&sums)[kSums], int tokens, int half, int odd, const TokenScales& token_scales) const {
        const float sum = static_cast<float>(sums[4 * tokens + 2 * half + odd]);
        return __fmaf_rn(kTokenScales ? sum * token_scales.of[odd] : sum, scale[half], bias[half]);
    }
    // The same of an output channel: of a gated linear's there is one, of two rows.
    __device__ __forceinline__ float output(
        const Sum (&sums)[kSums], int tokens, int half, int odd, const TokenScales& token_scales) const {
        const float only = value(sums, tokens, half, odd, token_scales);
        if constexpr (gate::kGated) return gate::combine(only, value(sums, tokens, 1, odd, token_scales));
        return only;
    }
    // Both tokens, with a pair of residuals added.
    __device__ __forceinline__ u32 round(
        const Sum (&sums)[kSums], int tokens, int half, const TokenScales& token_scales, u32 added) const {
        const float low = ptx::widen<kBf16>(static_cast<u16>(added));
        const float high = ptx::widen<kBf16>(static_cast<u16>(added >> 16));
        const u32 even = ptx::narrow<kBf16>(__fadd_rn(output(sums, tokens, half, 0, token_scales), low));
        const u32 odd = ptx::narrow<kBf16>(__fadd_rn(output(sums, tokens, half, 1, token_scales), high));
        return even | odd << 16;
    }
};

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_FINISH
