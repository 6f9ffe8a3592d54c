// The end of an item of the sm90 schedule alone, as a kernel for `emulated.py`: results are made of sums that are given,
// with a norm ahead (NORM 1) or behind (NORM 2). What only the rings call is declared and never reached.
#pragma once

template <class T> T __ldg(const T* p) { return *p; }
inline void __stcg(float* p, float x) { *p = x; }
inline void __threadfence() {}

namespace ptx {

struct Never {
    template <class T> operator T() const { abort(); }
};
#define NEVER(name) template <int kCtas = 0, class... T> Never name(T...) { abort(); }
NEVER(address_in) NEVER(barrier_arrive) NEVER(barrier_arrive_at) NEVER(barrier_expect) NEVER(barrier_init)
NEVER(barrier_wait) NEVER(bulk_copy) NEVER(bulk_copy_once) NEVER(copy_async_16_once) NEVER(copy_async_8_once)
NEVER(end_reads) NEVER(evict_first_policy) NEVER(fused_multiply_add_pair) NEVER(kept) NEVER(minimum_pair_f16)
NEVER(prefetch_map)
NEVER(rotate) NEVER(store_in) NEVER(store_matrices_turned) NEVER(tensor_copy) NEVER(tensor_copy_to_all)
NEVER(wait_for_earlier_kernels)
#undef NEVER
inline void prefetch(const void* place) { *static_cast<const volatile char*>(place); }

inline emulated::Barrier named[16];
template <int kId, int kThreads> void sync_threads() { emulated::meet(named[kId], kThreads); }
template <int kFirst, int kThreads> void sync_one_of(int index) { emulated::meet(named[kFirst + index], kThreads); }

}  // namespace ptx

namespace decode {

template <class... T> u32 raise(T...) { abort(); }
template <bool kBf16> u32 finish(u32, u32, bool) { abort(); }

}  // namespace decode

#include "dense/sm90_store.cuh"

// A CTA has kRows rows; `sums` are [rows of all CTAs, kTokens], each to be multiplied by `factor`.
extern "C" void TERSOR_ENTRY(
    const float* given, const float* row_scales, const u16* bias, const u16* residual, u16* y, const float* norm_weight,
    u16* scaled, float* squares, int oc, int ic, int n, float norm_scale, float norm_eps) {
    using namespace linear;
    static float token_scales[kTokens];
    const Norms norms{norm_weight, scaled, squares, norm_scale, norm_eps};
    Item item{};
    item.first_row = blockIdx.x * kRows;
    item.end_token = n;
    if (kNormIn && threadIdx.x < 32) scale_tokens(token_scales, norms, ic, n);
    __syncthreads();
    RowTerms terms(oc, item, row_scales, 1.0f);
    terms.add_bias(bias, {});
    float sums[kSums];
    for (int i = 0; i < kSums; ++i) {
        const int row = terms.first_row + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
        sums[i] = given[row * kTokens + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2];
    }
    __syncthreads();
    const TileScales of_tokens(token_scales, nullptr, item);
    Met met;
    met.load(item, terms, {}, residual, norms);
    store_few(sums, item, terms, {}, of_tokens, met, residual != nullptr, y, norms);
}
