"""Small kernels for the tests of the JIT, with a GPU and without."""

from __future__ import annotations

from tersor.kernels.jit import KernelSource

_AXPY = """
#pragma once
#include "twice.cuh"
extern "C" __global__ void __launch_bounds__(256) TERSOR_ENTRY(const float* x, float* y, long long n, float a) {
    extern __shared__ float ring[];
    __shared__ float seen[64];
    const long long i = blockIdx.x * 256ll + threadIdx.x;
    ring[SLOT + threadIdx.x] = i < n ? x[i] : 0.0f;
    if (threadIdx.x < 64) seen[threadIdx.x] = ring[SLOT + threadIdx.x];
    __syncthreads();
    if (i < n) y[i] = twice(ring[SLOT + threadIdx.x]) * a + OFFSET + seen[threadIdx.x % 64] * 0.0f;
}
"""

_SPILL = """
extern "C" __global__ void __launch_bounds__(1024) TERSOR_ENTRY(const float* x, float* y, int n) {
    float v[128];
#pragma unroll
    for (int j = 0; j < 128; ++j) v[j] = x[j * n + threadIdx.x];
    for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int j = 0; j < 128; ++j) v[j] = v[j] * v[(j + 1) % 128] + x[k];
    }
#pragma unroll
    for (int j = 0; j < 128; ++j) y[j * n + threadIdx.x] = v[j];
}
"""

_TWO = """
extern "C" __global__ void TERSOR_ENTRY(float* x) { x[0] = 1.0f; }
extern "C" __global__ void another(float* x) { x[0] = 2.0f; }
"""


def axpy(offset: int = 0, name: str = "tersor_test_axpy", arguments: str = "PPqf", slot: int = 0) -> KernelSource:
    """y = 2 * a * x + offset for n floats; arguments are x, y, n, a.

    A block has 256 threads, 256 bytes of static shared memory, and 1024 of dynamic from float `slot` on.
    """
    twice = "#pragma once\n__device__ __forceinline__ float twice(float v) { return 2.0f * v; }\n"
    texts = {"axpy.cuh": _AXPY, "twice.cuh": twice}
    return KernelSource(name, "axpy.cuh", {"OFFSET": offset, "SLOT": slot}, arguments, texts=texts)


def spilling() -> KernelSource:
    """A kernel whose 128 live values do not fit the 64 registers of a thread in a block of 1024."""
    return KernelSource("tersor_test_spill", "spill.cuh", {}, "PPi", texts={"spill.cuh": _SPILL})


def broken() -> KernelSource:
    """A kernel with a warning-free first line and two errors."""
    text = 'extern "C" __global__ void TERSOR_ENTRY(float* x) {\n    x[0] = missing_name;\n    other_name();\n}'
    return KernelSource("tersor_test_broken", "broken.cuh", {}, "P", texts={"broken.cuh": text})


def two_entries() -> KernelSource:
    """A header that breaks the rule of one kernel a header."""
    return KernelSource("tersor_test_two", "two.cuh", {}, "P", texts={"two.cuh": _TWO})
