// What a weight keeps beside its codes (outlier_rounds.cuh): the warps that multiply gather the activations that outliers
// meet from the slots that their blocks meet anyway, and the tensor cores add up the products.
//
// The outliers of a round are the columns of A[16, 16], each with one number that is not zero, and their activations the
// rows of B[16, tokens], so that mma.sync adds them to fragments of sums like any others. A block's own rounds come to
// shared memory with its codes; further ones a lane reads where they lie in memory.
//
// Parameter: OUTLIERS (rounds of a block in shared memory; 0: the weight keeps none).
#ifndef TERSOR_DENSE_SM90_OUTLIERS  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_OUTLIERS

#include "common/ptx.cuh"
#include "common/scales.cuh"
#include "common/tile.cuh"
#include "dense/outlier_rounds.cuh"
#include "dense/sm90_pipeline.cuh"

namespace linear {

constexpr bool kOutliers = OUTLIERS > 0;
static_assert(!kOutliers || !(kBytewise || kPlaced || kNormIn || kNormOut), "beside 16-bit activations and nothing else");

static_assert(rounds::kUnitRows == tile::kUnitRows, "rounds lie as codes do");
static_assert(!kOutliers || (kRowGroups <= rounds::kBeyond + 1 && kCluster == 1), "rows of a tile behind the last one");

// Where the numbers of the first further rounds begin, and those rounds themselves.
template <typename Work>
__device__ __forceinline__ const u32* firsts(const char* kept, const Work& work) {
    return rounds::firsts(kept, work.oc, work.blocks(), kKeptBytes);
}
template <typename Work>
__device__ __forceinline__ const char* further(const char* kept, const Work& work) {
    return rounds::further(kept, work.oc, work.blocks(), kKeptBytes);
}

// The warps that multiply: the further rounds of all items go to L2 while the rings fill, each item's by a warp.
template <typename Work>
__device__ __forceinline__ void fetch_further(const char* kept, const Work& work, int rank) {
    const char* first_round = further(kept, work);
    u32 turn = 0;
    for_items(work, rank, [&](const Item& item) {
        if (turn++ % (kConsumers / 32) != threadIdx.x / 32) return;
        const u32* first = firsts(kept, work) + item.first_row / tile::kUnitRows;
        const u32 last = __ldg(first + kRowGroups);
        for (u32 i = __ldg(first) + threadIdx.x % 32; i < last; i += 32) {
            ptx::prefetch(first_round + static_cast<long long>(i) * rounds::kBytes);
            ptx::prefetch(first_round + static_cast<long long>(i) * rounds::kBytes + rounds::kBytes / 2);
        }
    });
}

// Where the activations of an outlier begin that stands at the lower half of `place`; `x`, from the first slot on, is the
// place of this lane's row of the first half's piece, under its swizzle. Pieces lie in slots as halves in a block.
__device__ __forceinline__ u32 activations(u32 x, u32 place) {
    constexpr u32 kChannel = 0x7E, kHalf = 0x400;
    if constexpr (kSlotPieces == 2 && (kTokens & (kTokens - 1)) == 0) return x ^ (place & (kChannel | kXPiece));
    return x + (place & kHalf) * (kXPiece / kHalf) ^ (place & kChannel);
}

// Adds what a round makes with the tokens at `x`; `row` is that of this lane's sums as places have it, twice.
__device__ __forceinline__ void add_round(float (&sums)[kSums], const uint4& round, const char* slots, u32 x, u32 row) {
    constexpr u32 kRowBits = 0x43804380u;
    const u32 rows[] = {round.y & kRowBits, round.w & kRowBits}, lower = row + 0x40004000u;
    const u32 a[] = {
        round.x & ptx::equal_halves(rows[0], row), round.x & ptx::equal_halves(rows[0], lower),
        round.z & ptx::equal_halves(rows[1], row), round.z & ptx::equal_halves(rows[1], lower)};
    const char* from[] = {
        slots + activations(x, round.y), slots + activations(x, round.y >> 16),
        slots + activations(x, round.w), slots + activations(x, round.w >> 16)};
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
        u32 b[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) b[k] = *reinterpret_cast<const u16*>(from[k] + i * 1024);
        float eight[] = {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]};
        ptx::multiply_add<kBf16>(eight, a, b[0] | b[1] << 16, b[2] | b[3] << 16);
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[4 * i + k] = eight[k];
    }
}

// What a warp that multiplies needs for the outliers of an item. Sums that outliers are added to have their scales already,
// and what the decoded weights still lack: `scale` says it.
template <typename Work>
struct Beside {
    const Work& work;
    const char* slots;
    const char* kept;
    const float* row_scales;
    float factor;
    u32 row, x, quad;  // of this lane: its row as `add_round` takes it, its token's place in a slot, its pairs' in a round

    __device__ __forceinline__ Beside(
        const Work& work, const char* slots, const char* kept, const float* row_scales, float factor)
        : work(work), slots(slots), kept(kept), row_scales(row_scales), factor(factor) {
        if constexpr (kOutliers) {
            const u32 lane = threadIdx.x % 32;
            row = ptx::kept(lane / 4 * 0x00800080u);
            x = ptx::kept(lane / 4 * (128 + 16));
            quad = ptx::kept(lane % 4 * 16);
        }
    }

    // What parts of a row's sums are multiplied by beside their scales in groups.
    __device__ __forceinline__ float scale(int row) const {
        if constexpr (kGroups > 0) return factor;
        return row < work.oc ? scales::of_row(row_scales, row) * factor : 0.0f;
    }

    // The first round of a block of 16 rows whose rounds begin at `own`.
    __device__ __forceinline__ uint4 first(const char* own) const {
        return *reinterpret_cast<const uint4*>(own + quad);
    }
    // Adds what a round makes with the tokens of the slot that begins at `slot`.
    __device__ __forceinline__ void add(float (&sums)[kSums], const uint4& round, u32 slot) const {
        add_round(sums, round, slots, slot + x, row);
    }
    // The same of all rounds behind the first one.
    __device__ __forceinline__ void add_others(float (&sums)[kSums], uint4 round, const char* own, u32 slot) const {
#pragma unroll 1
        for (int i = 1; i < OUTLIERS && rounds::follows(round); ++i) {
            round = first(own + i * rounds::kBytes);
            add(sums, round, slot);
        }
        if (!rounds::follows(round)) return;
        const char* next = further(kept, work) + static_cast<long long>(rounds::first_further(round)) * rounds::kBytes;
#pragma unroll 1
        do {
            round = __ldg(reinterpret_cast<const uint4*>(next + quad));
            next += rounds::kBytes;
            add(sums, round, slot);
        } while (rounds::follows(round));
    }
};

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_OUTLIERS
