// Where a lane finds its weights: the geometry of the packed tiles, as in tersor/layouts/blocks.py and tiles.py.
//
// A block is 16 output rows by 128 input channels and belongs to one warp. Lane l holds, for each of the block's
// eight k16 steps, the four registers of the A fragment of mma.m16n8k16, 64 weights in 2 * BITS words. Words are
// stored in planes of four (16 bytes a lane), an odd width ends with a plane of two. Four blocks, 64 rows, make a unit;
// units follow each other along the input channels, then along the rows.
#ifndef TERSOR_COMMON_TILE  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_COMMON_TILE

#include "common/decode.cuh"
#include "common/ptx.cuh"

namespace tile {

constexpr int kBits = BITS;
constexpr int kRows = 16;
constexpr int kColumns = 128;
constexpr int kSteps = kColumns / 16;
constexpr int kLaneWords = 2 * kBits;
constexpr int kQuads = kLaneWords / 4;
constexpr bool kHasTail = kLaneWords % 4 != 0;
constexpr int kBytes = 256 * kBits;
constexpr int kTailOffset = kQuads * 512;
constexpr int kUnitBlocks = 4;
constexpr int kUnitRows = kUnitBlocks * kRows;
constexpr int kUnitBytes = kUnitBlocks * kBytes;

static_assert(kBits >= 1 && kBits <= 8, "a code has 1 to 8 bits");
static_assert(kLaneWords % decode::kWords == 0, "a lane's words must be whole decode groups");

// Where the block of a row block (16 rows) and a channel block (128) stands, in blocks.
__device__ __forceinline__ long long block_index(int row_block, int channel_block, int channel_blocks) {
    const long long unit = static_cast<long long>(row_block / kUnitBlocks) * channel_blocks + channel_block;
    return unit * kUnitBlocks + row_block % kUnitBlocks;
}

// Starts the copy of this lane's share of a block; the lane reads back only what it copied itself.
__device__ __forceinline__ void copy_lane(u32 shared, const char* global, int lane, u64 policy) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
        const int offset = quad * 512 + lane * 16;
        ptx::copy_async_16_once(shared + offset, global + offset, policy);
    }
    if constexpr (kHasTail) {
        const int offset = kTailOffset + lane * 8;
        ptx::copy_async_8_once(shared + offset, global + offset, policy);
    }
}

// A lane's words of a block in shared memory; `own` is the first that copy_lane would fill, 16 * lane from the start.
__device__ __forceinline__ void load_lane(u32 (&words)[kLaneWords], const char* own, int lane) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
        const uint4 four = *reinterpret_cast<const uint4*>(own + quad * 512);
        words[4 * quad] = four.x;
        words[4 * quad + 1] = four.y;
        words[4 * quad + 2] = four.z;
        words[4 * quad + 3] = four.w;
    }
    if constexpr (kHasTail) {
        const uint2 two = *reinterpret_cast<const uint2*>(own + kTailOffset - lane * 8);
        words[4 * kQuads] = two.x;
        words[4 * kQuads + 1] = two.y;
    }
}

}  // namespace tile

#endif  // TERSOR_COMMON_TILE
