// From packed words to registers of floats, two of 16 or four of 8 bits, or of four int8: one decoder, driven by a table,
// for every weight type and target.
//
// A lane's words are decoded in groups. Register j of a group is
//     (rotate(word a, r) ^ rotate(word b, s) ^ rotate(word c, t)) & DECODE_MASK
// where the table DECODE_TERMS lists a, r, b, s, c, t for each j (b and c are -1 where there is no such term), and word
// index DECODE_WORDS means the XOR of all words of the group. With DECODE_SHIFT the table has half as many rows and
// each yields two registers, P & mask and (P << shift) & mask. With DECODE_RAISED every second register keeps its bits
// that many places above the mask, which saves moving them down; `finish` divides. With DECODE_SPREAD of 4 what is masked
// are eight codes that say places in tables, and `choose` makes four registers of them.
// tersor/layouts/decode_tables.py holds the tables; decode_groups.py beside it packs so that this comes out right, and says
// which power of two or offset the numbers still carry.
//
// Plain C++ but for `finish`: a CPU test compiles it and runs it over all codes.
#ifndef TERSOR_COMMON_DECODE  // of a row set: may be read again for another (mixed/sm90_level.cuh)
#define TERSOR_COMMON_DECODE

#ifdef __CUDACC__
#include "common/ptx.cuh"
#else
#define __device__
#define __forceinline__ inline
using u32 = unsigned int;
#endif

namespace decode {

constexpr int kWords = DECODE_WORDS;          // packed words in a group
constexpr int kRegisters = DECODE_REGISTERS;  // registers a group decodes to
constexpr int kSpread = DECODE_SPREAD;        // of which so many are made of one that is masked
constexpr u32 kMask = DECODE_MASK;            // where the codes' bits stand in a register
constexpr bool kPlain = kMask == ~0u;         // whether all bits of a word are a code's, so that nothing is decoded
constexpr int kShift = DECODE_SHIFT;          // 0, or the left shift that gives the second register of a row
constexpr int kRaised = DECODE_RAISED;        // 0, or how much higher the codes stand in every second register
constexpr int kTerms[] = {DECODE_TERMS};      // a, r, b, s, c, t for each row
constexpr int kMasked = kRegisters / kSpread;

__device__ __forceinline__ u32 rotate(u32 word, int left) {
    left %= 32;
    if (left == 0) return word;
#ifdef __CUDACC__
    return ptx::rotate(word, left);
#else
    return (word << left) | (word >> (32 - left));
#endif
}

__device__ __forceinline__ u32 source(const u32* words, int index) {
    if (index < kWords) return words[index];
    u32 all = words[0];
#pragma unroll
    for (int i = 1; i < kWords; ++i) all ^= words[i];
    return all;
}

// Fills registers[kRegisters] with the masked code bits of words[kWords], of tables every fourth; `mask` is kMask, wherever
// it is kept.
__device__ __forceinline__ void extract(u32* registers, const u32* words, u32 mask = kMask) {
    constexpr int kRows = kShift == 0 ? kMasked : kMasked / 2;
    static_assert(sizeof(kTerms) / sizeof(int) == 6 * kRows, "DECODE_TERMS must have six entries a row");
    static_assert(kRaised == 0 || kShift == 0, "a register is moved or raised");
    static_assert(kSpread == 1 || (kRaised == 0 && kShift == 0), "codes of tables stand where they are read");
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        const int raised = row % 2 * kRaised;
        u32 p = rotate(source(words, kTerms[6 * row]), kTerms[6 * row + 1] + raised);
#pragma unroll
        for (int term = 2; term < 6; term += 2) {
            if (kTerms[6 * row + term] >= 0) {
                p ^= rotate(source(words, kTerms[6 * row + term]), kTerms[6 * row + term + 1] + raised);
            }
        }
        if constexpr (kShift == 0) {
            registers[row * kSpread] = p & mask << raised;
        } else {
            registers[2 * row] = p & mask;
            registers[2 * row + 1] = (p << kShift) & mask;
        }
    }
}

// Four codes of at most 7 bits less a zero point of at most 128, which stands in every byte of `zeros`, as int8: the top
// bits, set, keep a byte from borrowing of the next.
__device__ __forceinline__ u32 subtract_bytes(u32 codes, u32 zeros) {
    constexpr u32 kTops = 0x80808080u;
    return ((codes | kTops) - zeros) ^ kTops;
}

// Of the eight bytes of `low` and `high` those that the lower four nibbles of `selectors` say.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selectors) {
#ifdef __CUDACC__
    return ptx::permute(low, high, selectors);
#else
    u32 four = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 place = selectors >> 4 * i & 7;
        four |= ((place < 4 ? low >> 8 * place : high >> 8 * (place - 4)) & 0xFFu) << 8 * i;
    }
    return four;
#endif
}

// Four codes become int8 of the whole row by the ratio r of their scale to its (tersor/layouts/ratios.py): (r (q - z) + 128)
// >> 8. The offset is 32768 + 128 - r z, in both halves, so that of two such sums side by side none is negative, and borrows.
// `kSigned`: codes of kBits bits stand in the top of their bytes, in two's complement; else they are bytes.
template <int kBits, bool kSigned>
__device__ __forceinline__ u32 apply_ratio(u32 codes, u32 ratio, u32 offset) {
    u32 even, odd;
    if constexpr (kSigned) {
        constexpr u32 kCode = ((1u << kBits) - 1) * 0x00010001u, kTop = (1u << (kBits - 1)) * 0x00010001u;
        even = (codes >> (8 - kBits) & kCode) ^ kTop;
        odd = (codes >> (16 - kBits) & kCode) ^ kTop;
    } else {
        even = codes & 0x00FF00FFu;
        odd = permute(codes, 0, 0x4341u);
    }
    return permute(even * ratio + offset, odd * ratio + offset, 0x7351u) ^ 0x80808080u;
}

// The highest bit of every byte, in all bits of that byte.
__device__ __forceinline__ u32 repeat_signs(u32 bytes) {
#ifdef __CUDACC__
    return ptx::repeat_signs(bytes);
#else
    return (bytes >> 7 & 0x01010101u) * 0xFFu;
#endif
}

// Four codes less a zero point, of magnitudes up to 16, as e4m3 times 2^9: sign and magnitude, which e4m3 counts from its
// smallest step on. Beside the top bit the zero point less the code is the magnitude where it is not negative, and the
// sign is there, too; where it is, that bit is gone, and the others are the complement of the magnitude less one.
__device__ __forceinline__ u32 subtract_to_e4m3(u32 codes, u32 zeros) {
    constexpr u32 kTops = 0x80808080u;
    const u32 differences = (zeros | kTops) - codes;
    const u32 magnitudes = differences ^ (~repeat_signs(differences) & ~kTops);
    return magnitudes + ((~magnitudes & kTops) >> 7);
}

// Eight codes in four[0], those of one row in its lower half, become the pairs of numbers that they say: of the first row
// in registers 0 and 2, of the second in 1 and 3. A row has four registers of tables: the lower bytes of its eight numbers,
// then the upper ones.
__device__ __forceinline__ void choose(u32* four, const u32* tables) {
    const u32 codes = four[0];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const u32* table = tables + 4 * row;
        const u32 own = row == 0 ? codes : codes >> 16;
        const u32 lower = permute(table[0], table[1], own), upper = permute(table[2], table[3], own);
        four[row] = permute(lower, upper, 0x5140u);
        four[row + 2] = permute(lower, upper, 0x7362u);
    }
}

#ifdef __CUDACC__

// What turns masked code bits into numbers; the names are those of tersor.layouts.decode_groups.Finish.
enum Finish {
    kAsIs = 0,         // the bits are already the float, up to a power of two that the epilogue applies
    kMultiply = 1,     // multiply by 2^(127 - bias): bf16 has no room for the weight's own small exponent
    kSubtract = 2,     // OR the bits under the mantissa of a power of two, then subtract it and the code's offset
    kInt8ToBf16 = 3,   // eight bits under seven: the top bit chooses which constant to add
    kUint8ToBf16 = 4,  // as before, then subtract the zero point less 128
    kHalve = 5,        // half of a float with fp16's exponents, of which the top one is an ordinary number
    kSubtractBytes = 6,  // four codes less their row's zero point, as int8
    kSubtractToE4m3 = 7,  // the same, or less the offset of their format, as e4m3
    kChoose = 8,       // what codes say in the table of their row (`choose`)
};

static_assert(DECODE_FINISH >= kAsIs && DECODE_FINISH <= kChoose, "DECODE_FINISH is a Finish");
static_assert((DECODE_FINISH == kChoose) == (kSpread == 4), "tables make four registers of one");

// The mask for a loop that calls `extract`. An instruction has room for one constant; where the power of two above an
// integer's bits is one, ptxas fetches the mask anew each time unless it seems to come from a variable: `count` >= 0.
__device__ __forceinline__ u32 kept_mask(int count) {
    return DECODE_FINISH == kSubtract ? ptx::kept(kMask + (count >> 31)) : kMask;
}

constexpr u32 kOneBf16 = 0x3F803F80u, kOneF16 = 0x3C003C00u;

// The constant of `finish` for a raised register of integers in fp16: (1024 + 2^raised code) / 2^raised has less of the
// 1024 to take away.
__device__ __forceinline__ u32 raise(u32 constant) {
    static_assert(kRaised == 0 || (DECODE_FINISH == kSubtract && kRaised == 4), "960 is 1024 - 1024 / 16");
    return kRaised == 0 ? constant : ptx::fused_multiply_add_pair<false>(constant, kOneF16, 0x63806380u);
}

// `constant` is DECODE_CONSTANT, or what stands for the row's zero point; `second`: the pair may be raised, and then the
// constant is, too.
template <bool kBf16>
__device__ __forceinline__ u32 finish(u32 pair, u32 constant, bool second) {
    constexpr u32 kOne = kBf16 ? kOneBf16 : kOneF16;
    constexpr u32 kSigns = 0x80008000u;
    if constexpr (DECODE_FINISH == kMultiply) {
        return ptx::fused_multiply_add_pair<kBf16>(pair, constant, kSigns);
    } else if constexpr (DECODE_FINISH == kSubtract) {
        constexpr u32 kMagic = kBf16 ? 0x43004300u : 0x64006400u;  // 128 or 1024
        const u32 factor = second ? kOne - kRaised * 0x04000400u : kOne;  // of fp16
        return ptx::fused_multiply_add_pair<kBf16>(pair | kMagic, factor, constant);
    } else if constexpr (DECODE_FINISH == kInt8ToBf16 || DECODE_FINISH == kUint8ToBf16) {
        // value = low7 - 128 + 128 * top. (128 + low7) - 256 or - 128: bf16 -256 and -128 differ in bit 7, where the
        // top bit stands.
        const u32 low = (pair & 0x007F007Fu) | 0x43004300u;
        const u32 addend = (pair & 0x00800080u) ^ 0xC380C380u;
        const u32 value = ptx::fused_multiply_add_pair<kBf16>(low, kOne, addend);
        if constexpr (DECODE_FINISH == kInt8ToBf16) return value;
        return ptx::fused_multiply_add_pair<kBf16>(value, kOne, constant);
    } else if constexpr (DECODE_FINISH == kHalve) {
        // Minus the half: one less in the exponent of a normal number, the bits moved down by one for the lowest two
        // exponents, where the lesser number, the greater magnitude, is right. Below the lowest exponent the first is
        // infinity or NaN, which the minimum passes over.
        const u32 normal = (pair | kSigns) - 0x04000400u;
        const u32 subnormal = ((pair >> 1) & ((kMask & ~kSigns) >> 1)) | kSigns;
        return ptx::minimum_pair_f16(normal, subnormal) ^ (~pair & kSigns);
    } else if constexpr (DECODE_FINISH == kSubtractBytes) {
        return subtract_bytes(pair, constant);
    } else if constexpr (DECODE_FINISH == kSubtractToE4m3) {
        return subtract_to_e4m3(pair, constant);
    } else {
        return pair;
    }
}

#endif

}  // namespace decode

#endif  // TERSOR_COMMON_DECODE
