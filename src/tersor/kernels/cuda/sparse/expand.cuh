// From a bitmap and packed values to registers of two 16-bit floats each, with zeros where a weight is pruned.
//
// A lane has 32 weights of a half-block at a time, bit i of its mask says whether weight i is left, and registers hold
// weights 2 i and 2 i + 1. Its values lie in a queue, word after word: `place` counts the bits in front of the next one.
// Words of equal number of all lanes' queues are neighbours, a layer, so that whatever words the lanes of a warp read
// at a time, no two lie in one bank. Four bits of the mask choose an entry of a table in shared memory: two selectors of
// the byte permutation that puts the next values where the bits are set, and how far they reach.
//
// Beside 8-bit activations a register holds four bytes, weights 4 i to 4 i + 3, which one selector puts there.
//
// Parameters: VALUE_BITS (8 or 16, what a value takes in a queue), VALUE_CONVERTS (1: bytes are e4m3, four of which are a
// register of an operand with BYTES, else a pair of instructions makes them fp16), else VALUE_HIGH (1: a byte is the upper half of a 16-bit float, 0: it is the lower one),
// VALUE_OTHERS (bytes that a pruned weight has instead: its own and the other half of the
// float), VALUE_TURN and VALUE_FINISH (`finish`), those of decode.cuh, RING_LAYERS, LAYERS_BEYOND.
// tersor/layouts/sparse_packing.py says what bytes stand for a code.
#pragma once

#include "common/decode.cuh"
#include "common/ptx.cuh"
#include "sparse/instructions.cuh"

namespace expand {

constexpr int kValueBits = VALUE_BITS;
constexpr bool kConverts = VALUE_CONVERTS;
constexpr bool kWhole = BYTES;                           // bytes are what the tensor cores take
constexpr int kRegisters = kWhole ? 8 : 16;              // of 32 weights
constexpr int kLayerBytes = 512;                         // a word of each of the 128 queues of a unit
constexpr int kRingLayers = RING_LAYERS;                 // of a unit in shared memory, a power of two
constexpr int kMirrored = 2;                             // layers that stand behind the ring's end once more
constexpr int kBeyond = LAYERS_BEYOND;                   // that are read behind that of a queue's last value
constexpr int kRingBytes = (kRingLayers + kMirrored) * kLayerBytes;
constexpr u32 kRingMask = (kRingLayers - 1) * 32;          // of a place: the layer in the ring
constexpr int kEntries = 16, kTableBytes = kEntries * 8;

static_assert(kValueBits == 8 || kValueBits == 16, "values are bytes or 16-bit floats");
static_assert(!kWhole || kConverts, "bytes that the tensor cores take are e4m3");
static_assert((kRingLayers & (kRingLayers - 1)) == 0, "a place in the ring is a mask away");
static_assert(kBeyond == kMirrored + 1, "words of a window: behind a queue's end none of them has a value");

// Selectors of two weights, the first of which takes value `rank` of a window. A pruned weight takes what VALUE_OTHERS
// says or, of 16 bits, value `none`.
__device__ __forceinline__ u32 selectors(int bits, int rank, int none) {
    u32 result = 0;
    for (int i = 0; i < 2; ++i) {
        const bool left = bits >> i & 1;
        u32 halves;
        if (kValueBits == 16) {
            const u32 own = left ? rank : none;
            halves = 2 * own | (2 * own + 1) << 4;
        } else {
            const u32 own = left ? rank : 4;
            halves = VALUE_HIGH ? 5 | own << 4 : own | 5 << 4;
        }
        result |= halves << 8 * i;
        rank += left;
    }
    return result;
}

// Half `second` of an entry of the table. In the lower half stand the selectors of two weights. In the upper half of the
// first one, the bits of all four weights' values. Where bytes are converted, the first one selects for all four weights,
// and the second one is their bits. In that of the second, of 16 bits, ones where no weight is pruned: else the window's
// fourth value is zero, which is then nobody's.
__device__ __forceinline__ u32 entry(int bits, int second) {
    const int first = (bits & 1) + (bits >> 1 & 1), all = first + (bits >> 2 & 1) + (bits >> 3 & 1);
    if (kConverts) {
        if (second == 1) return all * kValueBits;
        u32 result = 0, rank = 0;
        for (int i = 0; i < 4; ++i) result |= (bits >> i & 1 ? rank++ : 4) << 4 * i;
        return result;
    }
    if (second == 0) return selectors(bits & 3, 0, 2) | all * kValueBits << 16;
    return selectors(bits >> 2, first, 3) | (kValueBits == 16 && all == 4 ? 0xFFFF0000u : 0);
}

struct Entry {
    u32 first, second;
};

// Where the entries of four bits each of a mask stand in the table: those of every second four in one word. A mask lies in
// memory turned left by three bits, so that four of its bits count entries of eight bytes.
struct Places {
    u32 even, odd;

    __device__ __forceinline__ explicit Places(u32 mask)
        : even(mask & 0x78787878u), odd(ptx::shift_around(mask, mask, 4) & 0x78787878u) {}
    // Of bits 4 i to 4 i + 3.
    __device__ __forceinline__ u32 of(int i) const { return ptx::permute(i % 2 ? odd : even, 0, 0x4440 + i / 2); }
};

__device__ __forceinline__ Entry look_up(const char* table, const Places& places, int i) {
    const char* at = table + places.of(i);
    const uint2 both = *reinterpret_cast<const uint2*>(at);
    return {both.x, both.y};
}

// The bytes of a float to its bits under the mask: those of other formats are spread over it by an XOR with themselves.
__device__ __forceinline__ u32 turn(u32 pair) {
    if constexpr (VALUE_TURN == 0) return pair;
    return (pair ^ (pair >> VALUE_TURN)) & decode::kMask;
}

// Fills pairs[kRegisters] with the bits of 32 weights and moves `place` behind their values. `ring`: the queues of a unit;
// `column`: where this lane's words begin there. `step`: 16, bytes of a layer for each bit of a word,
// in a register, so that ptxas multiplies, which leaves the unit that shifts and permutes to others.
__device__ __forceinline__ void expand(
    u32* pairs, u32 mask, u32& place, const char* ring, u32 column, u32 step, const char* table) {
    constexpr u32 kOthers = VALUE_OTHERS;
    constexpr int kFours = kValueBits == 8 ? 2 : 1;  // of weights, that one window has values for
    const Places places(mask);
#pragma unroll
    for (int four = 0; four < 8; four += kFours) {
        const char* at = ring + (column + (place & kRingMask) * step);
        u32 words[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) words[i] = ptx::word(at + i * kLayerBytes);
        const u32 low = ptx::shift_around(words[0], words[1], place), high = ptx::shift_around(words[1], words[2], place);
        u32* own = pairs + 2 * four;
        const Entry a = look_up(table, places, four);
        if constexpr (kValueBits == 8) {
            const Entry b = look_up(table, places, four + 1);
            const u32 first = kConverts ? a.second : a.first >> 16, second = kConverts ? b.second : b.first >> 16;
            const u32 next = ptx::shift(low, high, first);
            if constexpr (kWhole) {
                pairs[four] = ptx::permute(low, 0, a.first);
                pairs[four + 1] = ptx::permute(next, 0, b.first);
            } else if constexpr (kConverts) {
                ptx::widen_e4m3_four(ptx::permute(low, 0, a.first), own[0], own[1]);
                ptx::widen_e4m3_four(ptx::permute(next, 0, b.first), own[2], own[3]);
            } else {
                own[0] = ptx::permute(low, kOthers, a.first);
                own[1] = ptx::permute(low, kOthers, a.second);
                own[2] = ptx::permute(next, kOthers, b.first);
                own[3] = ptx::permute(next, kOthers, b.second);
            }
            place += first + second;
        } else {
            own[0] = ptx::permute(low, kOthers, a.first);
            own[1] = ptx::permute(low, high & (a.second | 0xFFFF), a.second);
            place += a.first >> 16;
        }
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) pairs[i] = turn(pairs[i]);
}

// What turns the bits of a pair into numbers: those of `decode::Finish`, and of integers under the mantissa of a power of
// two, which VALUE_OTHERS brings already, what takes it away again.
template <bool kBf16>
__device__ __forceinline__ u32 finish(u32 pair) {
    if constexpr (VALUE_BITS == 16 || kConverts) return pair;
    if constexpr (DECODE_FINISH == decode::kSubtract) {
        return ptx::fused_multiply_add_pair<kBf16>(
            pair, kBf16 ? decode::kOneBf16 : decode::kOneF16, DECODE_CONSTANT);
    }
    return decode::finish<kBf16>(pair, DECODE_CONSTANT, false);
}

}  // namespace expand
