// The activations of pairs of a token and an expert, in the order of the pairs: y[p] = x[order[p] / top_k]. One CTA a pair.
#pragma once

#include "common/ptx.cuh"

namespace gather {

constexpr int kThreads = 256;

}  // namespace gather

extern "C" __global__ void __launch_bounds__(gather::kThreads) TERSOR_ENTRY(
    const u16* __restrict__ x,      // [T, IC], rows that start on 16 bytes
    const int* __restrict__ order,  // [P]
    u16* __restrict__ y,            // [P, y_stride], the last elements of a row are padding
    long long stride,
    long long y_stride,             // a multiple of 8, at least IC
    int ic,
    int top_k) {
    ptx::wait_for_earlier_kernels();
    ptx::launch_dependents();
    const long long pair = blockIdx.x;
    const u16* row = x + __ldcg(order + pair) / top_k * stride;
    u16* target = y + pair * y_stride;
    for (int first = threadIdx.x * 8; first < ic; first += gather::kThreads * 8) {
        *reinterpret_cast<uint4*>(target + first) = __ldcg(reinterpret_cast<const uint4*>(row + first));
    }
}
