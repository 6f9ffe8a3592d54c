// What feeds the tensor cores of sm90_linear.cuh: how its shared memory is laid out, and the threads that keep its rings
// full. The parameters are those of sm90_linear.cuh.
#ifndef TERSOR_DENSE_SM90_PIPELINE  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_DENSE_SM90_PIPELINE

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "common/scales.cuh"
#include "common/tensor_map.cuh"
#include "common/tile.cuh"
#include "dense/outlier_rounds.cuh"

namespace linear {

constexpr bool kBf16 = BF16;
constexpr bool kBytewise = BYTES;                          // 8-bit activations with a scale a token
constexpr bool kXGroups = X_GROUPS;                        // and block of channels, which comes with the block
constexpr bool kWhole = kBytewise && BYTE_WEIGHT == 8;     // int8, whose products add up exactly
constexpr bool kNormIn = NORM == 1, kNormOut = NORM == 2;
constexpr bool kPlaced = PLACED;                           // results stand among those of other row sets
constexpr int kTokens = N_TILE;
constexpr int kRowGroups = ROW_GROUPS;
constexpr int kChannelGroups = K_GROUPS;
constexpr int kCluster = CLUSTER;
constexpr int kWeightSlots = WEIGHT_SLOTS;
constexpr int kXSlots = X_SLOTS;
constexpr int kGroups = scales::kGroups;                   // scales of a row in a block
constexpr int kSumGroups = scales::kRatios ? 0 : kGroups;  // of those by which sums are scaled
constexpr bool kFew = !kBytewise && kTokens <= FEW_TOKENS;
constexpr bool kInPieces = PIECES;                         // as in sm90_multiply_pieces.cuh
constexpr int kBand = 1024 / kTokens;   // token tiles whose activations are in use at a time
constexpr int kFinishers = 128 * kRowGroups;  // threads that add and write the result
constexpr int kConsumers = kFinishers * kChannelGroups;
constexpr int kTurns = kFew ? kRowGroups * kChannelGroups : 1;  // warpgroups that take the blocks of an item in turn
constexpr int kReaders = kConsumers / kTurns;                   // threads that read a slot
constexpr int kThreads = kConsumers + 128;
constexpr int kRows = tile::kUnitRows * kRowGroups;
constexpr int kSums = kTokens / 2;  // sums of a thread

// What sums are until they are scaled: float32 or, of int8 of a whole row and one scale a token, int32. They are exchanged as
// they are, in the bytes of float32, so that whole numbers add up to the same ones however channels are split.
template <bool kOfInt8>
struct SumOf {
    using Type = float;
};
template <>
struct SumOf<true> {
    using Type = int;
};
using Sum = SumOf<kWhole && kSumGroups == 0 && !kXGroups>::Type;

__device__ __forceinline__ float bytes_of(float sum) { return sum; }
__device__ __forceinline__ float bytes_of(int sum) { return __int_as_float(sum); }
__device__ __forceinline__ void add_bytes(float& sum, float bytes) { sum += bytes; }
__device__ __forceinline__ void add_bytes(int& sum, float bytes) { sum += __float_as_int(bytes); }

constexpr int kScaleBytes = tile::kUnitBlocks * scales::kBlockBytes;  // of one unit: 64 rows of one block
constexpr int kRowTermBytes = tile::kUnitRows * scales::kRowWords * 4;  // of a unit's rows, where those have some
constexpr int kKeptBytes = OUTLIERS * tile::kUnitBlocks * rounds::kBytes;  // of its outliers (sm90_outliers.cuh)
constexpr int kWeightSlotBytes = kRowGroups * (tile::kUnitBytes + kScaleBytes + kKeptBytes);
constexpr int kPieces = kBytewise ? 1 : 2;                        // a block of a token is as many swizzled rows of 128 bytes
constexpr int kPieceChannels = tile::kColumns / kPieces;
constexpr int kXPiece = kTokens * 128;
constexpr int kSlotPieces = kTokens <= 64 ? kPieces : 1;     // a slot has a whole block while that is small
constexpr int kSlotsOfBlock = kPieces / kSlotPieces;
constexpr int kSlotBoxes = kCluster > kSlotPieces ? kCluster / kSlotPieces : 1;  // of each piece
constexpr int kXSlotBytes = kSlotPieces * kXPiece;
constexpr int kXScaleBytes = kXGroups ? kTokens * 4 : 0;  // of the scales that come with a slot of activations

constexpr bool kMany = kTokens > 64;                 // results are turned in shared memory
constexpr int kStoreTokens = 64;                     // as many at a time
constexpr int kStoreBytes = kStoreTokens * 128;      // of one warpgroup

// Shared memory: activations, which need 1024 bytes alignment, weights, scales of activations in groups, then sums that
// warpgroups exchange, or results.
// Parts of sums that a cluster gathers come behind those where there is room for them, else to where the rings were.
constexpr int kWeightsAt = kXSlots * kXSlotBytes;
constexpr int kXScalesAt = kWeightsAt + kWeightSlots * kWeightSlotBytes;
constexpr int kExchangeAt = kXScalesAt + kXSlots * kXScaleBytes;
constexpr int kExchangeBytes = kMany ? kRowGroups * kStoreBytes : kFinishers * (kTurns - 1) * kSums * 4;
constexpr int kPartBytes = kFinishers * kSums * 4;
constexpr int kSharedBytes = kExchangeAt + kExchangeBytes + GATHER_ROOM * kPartBytes;

// The register file is dealt out evenly at the start; the copying warpgroup then gives most of its share away, and more
// where two CTAs of 384 threads have 32 tokens: decode groups of 16 registers spill one in what is left otherwise; or where
// pieces are multiplied.
constexpr int kCopyRegisters = kInPieces ? 40 : RESIDENT == 1 ? 48 : (kRowGroups > 1 && kTokens > 16 ? 32 : 40);
constexpr int kEvenRegisters = 65536 / (RESIDENT * kThreads) / 8 * 8;
constexpr int kSpareRegisters = (kEvenRegisters * kThreads - 128 * kCopyRegisters) / kConsumers / 8 * 8;
constexpr int kComputeRegisters = kSpareRegisters > 240 ? 240 : kSpareRegisters;

enum Barrier { kAllBarrier, kPartsReady, kPartsRead, kFinishersBarrier, kGroupBarriers };  // the last: one a row group

static_assert((kTokens == 8 || kTokens % 16 == 0) && kTokens <= 256, "N_TILE is a width of wgmma.cuh");
static_assert(kWeightSlots % kTurns == 0 && kXSlots % (kTurns * kSlotsOfBlock) == 0,
              "a slot serves one warpgroup in an item: one that is ahead must not take an old round for its own");
static_assert(kFew || kChannelGroups == 1, "without turns, each warpgroup has rows of its own");
static_assert(!kXGroups || (kWhole && kSlotsOfBlock == 1), "int8 activations alone have scales in groups");
static_assert(kSharedBytes == SHARED_BYTES, "tersor/kernels/tune/tile.py deals out shared memory otherwise");

// One item: which rows, tokens and blocks of channels a CTA multiplies before it takes the next item. Of `step()` CTAs the
// i-th takes items i, i + step(), i + 2 step() and so on; with CLUSTER above 1 an item is of a cluster, whose CTAs have row
// tiles next to each other and the same tokens. Which items there are says the Work of a family: it has `oc` and `ic` of a
// matrix, blocks(), first(), step(), items() and item(index, rank) and, of a split item, parts_before(item, rank), parts of
// other tiles that lie ahead of its own in memory, and output(item, rank), the number of its counter.
struct Item {
    int tile, part, parts;          // of the cluster
    int first_row;                  // of this CTA, in its matrix
    int first_token, end_token;     // of this CTA; the last one is not of this item
    int first_block, last_block;    // blocks of 128 channels, likewise
    int matrix;                     // of several that lie behind each other, which one is multiplied

    // Tiles before `whole` are one item each, over all blocks; of the others the blocks are dealt out to `splits` items.
    // A division takes a tenth of a microsecond, which a launch waits for: there is none where nothing is split.
    __device__ __forceinline__ void take(u32 index, u32 whole, u32 splits, u32 blocks) {
        tile = index, part = 0, parts = 1;
        first_block = 0, last_block = blocks;
        if (index >= whole && splits > 1) {
            const u32 split = (index - whole) / splits, least = blocks / splits, more = blocks % splits;
            parts = splits;
            tile = whole + split;
            part = index - whole - split * splits;
            first_block = part * least + min(static_cast<u32>(part), more);
            last_block = first_block + least + (part < more);
        }
    }
};

// Where a tile stands among `row_tiles` times `token_tiles` tiles, which are numbered by bands of kBand token tiles, in a
// band first along the tokens of one row tile: what runs at a time shares activations as well as weights. With four row
// tiles, five token tiles and three of these to a band:
//
//                 tokens ->   band 0      |  band 1
//     row tile 0              0    1    2 |  12   13
//     row tile 1              3    4    5 |  14   15
//     row tile 2              6    7    8 |  16   17
//     row tile 3              9   10   11 |  18   19
struct TileAt {
    u32 row_tile, token_tile;

    __device__ __forceinline__ TileAt(u32 tile, u32 row_tiles, u32 token_tiles) : row_tile(tile), token_tile(0) {
        if (token_tiles > 1) {
            const u32 size = kBand * row_tiles, band = tile / size, in_band = tile - band * size;
            const u32 width = min(static_cast<u32>(kBand), token_tiles - band * kBand);
            row_tile = in_band / width;
            token_tile = band * kBand + in_band - row_tile * width;
        }
    }
};

using WeightRing = ring::Ring<kWeightSlots>;
using XRing = ring::Ring<kXSlots>;

// Tells all CTAs that share a slot of activations that this thread has read it.
__device__ __forceinline__ void release_x(const XRing& ring, const XRing::Place& at) {
    if constexpr (kCluster == 1) {
        ptx::barrier_arrive(ring.emptied(at));
    } else {
#pragma unroll
        for (int rank = 0; rank < kCluster; ++rank) ptx::barrier_arrive_at(ring.emptied(at), rank);
    }
}

// Calls run(item) for every item of this CTA.
template <typename Work, typename Run>
__device__ __forceinline__ void for_items(const Work& work, int rank, const Run& run) {
#pragma unroll 1
    for (int index = work.first(); index < work.items(); index += work.step()) {
        run(work.item(index, rank));
    }
}

// What a slot of weights has of each unit, one kind behind the other.
enum class Part { kCodes, kScales, kKept };

// A thread that copies codes, scales in groups or outliers: one alone is too slow for its many small copies. Bytes of the
// others may arrive before they are announced with the codes.
template <Part kPart, typename Work>
__device__ __forceinline__ void copy_weights(const WeightRing& ring, const Work& work, int rank, const char* source) {
    constexpr int kBytes = kPart == Part::kCodes ? tile::kUnitBytes : kPart == Part::kScales ? kScaleBytes : kKeptBytes;
    constexpr int kOffset = kPart == Part::kCodes ? 0 : kRowGroups * (tile::kUnitBytes + (kPart == Part::kKept ? kScaleBytes : 0));
    const u64 policy = ptx::evict_first_policy();
    const int row_units = (work.oc + tile::kUnitRows - 1) / tile::kUnitRows;
    const long long stride = static_cast<long long>(work.blocks()) * kBytes;  // from one row unit to the next
    const long long ahead = kPart == Part::kScales && scales::kRatios ? row_units * kRowTermBytes : 0;  // of a matrix
    WeightRing::Place at(0);
    for_items(work, rank, [&](const Item& item) {
        const int row_unit = item.first_row / tile::kUnitRows;
        const int units = kPart == Part::kKept ? kRowGroups : max(0, min(kRowGroups, row_units - row_unit));
        const char* from = source + (static_cast<long long>(item.matrix) * row_units + row_unit) * stride +
                           (item.matrix + 1) * ahead + static_cast<long long>(item.first_block) * kBytes;
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block, from += kBytes, at.advance()) {
            ring.wait_emptied(at);
            if constexpr (kPart == Part::kCodes) {
                const int bytes = units * (tile::kUnitBytes + kScaleBytes) + kRowGroups * kKeptBytes;
                ptx::barrier_expect(ring.filled(at), bytes);
            }
#pragma unroll
            for (int i = 0; i < kRowGroups; ++i) {
                if (i >= units) continue;
                ptx::bulk_copy_once(
                    ring.address(at) + kOffset + i * kBytes, from + i * stride, kBytes, ring.filled(at), policy);
            }
        }
    });
}

// Where the scales lie that came with a slot of activations, counted from the first slot.
__device__ __forceinline__ u32 x_scales_at(const XRing::Place& at) { return kXScalesAt + at.slot * kXScaleBytes; }

// Scales of a block's activations lie behind each other, from one block to the next so many of them: copies of four begin
// on 16 bytes.
__device__ __forceinline__ int x_scale_stride(int tokens) { return (tokens + 3) / 4 * 4; }

// The thread that copies activations: `x_rows` rows in a box of the tensor map. With scales in groups those of a block of
// channels are copied, too: `x_scale` [blocks][x_scale_stride of all `tokens`], and an item begins with a multiple of four.
template <typename Work>
__device__ __forceinline__ void copy_activations(
    const XRing& ring, const Work& work, int rank, const TensorMap& x_map, int x_rows, const float* x_scale, int tokens) {
    ptx::prefetch_map(&x_map);
    XRing::Place at(0);
    bool waits = true;
    for_items(work, rank, [&](const Item& item) {
        if (waits) ptx::wait_for_earlier_kernels();  // late: with the first item known
        waits = false;
#pragma unroll 1
        for (int block = item.first_block; block < item.last_block; ++block) {
#pragma unroll
            for (int i = 0; i < kSlotsOfBlock; ++i, at.advance()) {
                const int scale_bytes = kXGroups ? x_scale_stride(item.end_token - item.first_token) * 4 : 0;
                ring.wait_emptied(at);
                ptx::barrier_expect(ring.filled(at), kSlotPieces * kSlotBoxes * x_rows * 128 + scale_bytes);
                if constexpr (kXGroups) {
                    const float* from = x_scale + static_cast<long long>(block) * x_scale_stride(tokens) + item.first_token;
                    ptx::bulk_copy(ring.base + x_scales_at(at), from, scale_bytes, ring.filled(at));
                }
#pragma unroll
                for (int piece = 0; piece < kSlotPieces; ++piece) {
                    const int channel = block * tile::kColumns + (i + piece) * kPieceChannels;
                    const u32 target = ring.address(at) + piece * kXPiece;
                    if constexpr (kCluster == 1) {
                        ptx::tensor_copy(target, &x_map, channel, item.first_token, ring.filled(at));
                    } else if (kSlotPieces == 1 || piece == rank % kSlotPieces) {
                        const int first = rank / kSlotPieces * x_rows;
                        ptx::tensor_copy_to_all<kCluster>(
                            target + first * 128, &x_map, channel, item.first_token + first, ring.filled(at));
                    }
                }
            }
        }
    });
}

}  // namespace linear

#endif  // TERSOR_DENSE_SM90_PIPELINE
