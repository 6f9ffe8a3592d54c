// A pair of decoded weights times a scale, rounded once to 16 bits: what a product by cuBLAS reads.
#pragma once

#include "common/ptx.cuh"

namespace scales {

template <bool kBf16>
__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
    const u32 low = ptx::narrow<kBf16>(ptx::widen<kBf16>(static_cast<u16>(pair)) * scale);
    const u32 high = ptx::narrow<kBf16>(ptx::widen<kBf16>(static_cast<u16>(pair >> 16)) * scale);
    return low | high << 16;
}

}  // namespace scales
