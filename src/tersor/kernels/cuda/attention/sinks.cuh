// The end of a softmax, with a sink or without.
// Parameters: those of pages.cuh.
#pragma once

#include "attention/pages.cuh"

namespace sinks {

// What sums are multiplied by at last, of a head with a sink or without (-inf).
__device__ __forceinline__ float last_factor(float largest, float weights, float sink) {
    const float most = fmaxf(largest, sink);
    const float own = ptx::power_of_two(largest - most);
    return own / (weights * own + ptx::power_of_two(sink - most));
}

// Scores of heads that belong to no token (gpt-oss).
struct Sinks {
    const void* values;  // [heads], float32 or as activations; or nothing
    int wide;

    __device__ __forceinline__ float of(int head) const {
        if (values == nullptr) return pages::lowest();
        const float sink = wide ? __ldcg(static_cast<const float*>(values) + head)
                                : ptx::widen<BF16>(__ldcg(static_cast<const u16*>(values) + head));
        return sink * pages::kLog2e;
    }
};

}  // namespace sinks
