// Programmatic dependent launch in kernels that older GPUs run, too: before compute capability 9.0 there is none, and
// every kernel starts when the one before it has ended.
#pragma once

#include "common/ptx.cuh"

namespace launch {

// The next kernel may start, and waits itself before it reads what this one writes.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
    ptx::launch_dependents();
#endif
}

// Waits until the kernels before this one have ended.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    ptx::wait_for_earlier_kernels();
#endif
}

}  // namespace launch
