// One function per PTX instruction, named for its effect. No CUDA toolkit header is needed.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

namespace ptx {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return static_cast<u32>(address);
}

// Byte s of the eight of `low` and `high` for each of four selectors s, four bits each from the lowest on, of which the
// highest is clear; __byte_perm would clear it first.
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selectors) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selectors));
    return result;
}

// The highest bit of every byte, in all bits of that byte; __byte_perm has no such selectors.
__device__ __forceinline__ u32 repeat_signs(u32 bytes) {
    u32 signs;
    asm("prmt.b32 %0, %1, 0, 0xBA98;" : "=r"(signs) : "r"(bytes));
    return signs;
}

// Rotates left; in assembly, so that under a mask no compiler makes a shift and a rotation of it.
__device__ __forceinline__ u32 rotate(u32 word, int left) {
    u32 turned;
    asm("shf.l.wrap.b32 %0, %1, %1, %2;" : "=r"(turned) : "r"(word), "r"(left));
    return turned;
}

// The same value, which ptxas then keeps in a register: what it can compute from threadIdx it computes in every round
// of a loop.
__device__ __forceinline__ u32 kept(u32 value) {
    u32 same;
    asm volatile("{ .reg .b32 lane; mov.u32 lane, %laneid; shfl.sync.idx.b32 %0, %1, lane, 31, -1; }"
                 : "=r"(same)
                 : "r"(value));
    return same;
}

// Weights are read once: tell L2 to drop them first.
__device__ __forceinline__ u64 evict_first_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_async_16_once(u32 shared, const void* global, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copy_async_8_once(u32 shared, const void* global, u64 policy) {
    asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "l"(policy)
                 : "memory");
}

// Copies the first `bytes` (0 to 16) and fills the rest of the 16 with zeros.
__device__ __forceinline__ void copy_async_16_zero_fill(u32 shared, const void* global, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's newest groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&fragment)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared)
                 : "memory");
}

// The same, each matrix transposed: undoes store_matrices_turned.
__device__ __forceinline__ void load_matrices_turned(u32 (&fragment)[4], u32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared)
                 : "memory");
}

// D[16, 8] += A[16, 16] * B[16, 8] in float32; PTX ISA 9.0, "Matrix Fragments for mma.m16n8k16".
template <bool kBf16>
__device__ __forceinline__ void multiply_add(float (&d)[4], const u32* a, u32 b0, u32 b1) {
    if constexpr (kBf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Elementwise a * b + c on two packed 16-bit floats; subnormals are kept.
template <bool kBf16>
__device__ __forceinline__ u32 fused_multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 d;
    if constexpr (kBf16) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    }
    return d;
}

// Ones in each half that is the same in both words, which hold pairs of fp16 that are neither negative nor NaN.
__device__ __forceinline__ u32 equal_halves(u32 a, u32 b) {
    u32 mask;
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
    return mask;
}

// The lesser of each half; of a number and a NaN, the number.
__device__ __forceinline__ u32 minimum_pair_f16(u32 a, u32 b) {
    u32 d;
    asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

template <bool kBf16>
__device__ __forceinline__ float widen(u16 value) {
    float wide;
    if constexpr (kBf16) {
        wide = __uint_as_float(static_cast<u32>(value) << 16);
    } else {
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    }
    return wide;
}

template <bool kBf16>
__device__ __forceinline__ u16 narrow(float value) {
    u16 result;
    if constexpr (kBf16) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    }
    return result;
}

// mbarriers (PTX ISA 9.0, "mbarrier"): a phase ends when all arrivals and all announced bytes are in.
__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers that this thread initialised visible to the copy engine, and to a cluster that then meets.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for what this thread reads of shared memory, before it tells that the copy engine may write there again: an
// arrival alone overtakes loads, which wait long where wgmma reads, too (PTX ISA 9.0, "Async proxy").
__device__ __forceinline__ void end_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The address that a shared address of this CTA has in another of the cluster.
__device__ __forceinline__ u32 address_in(u32 shared, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
    return there;
}

// Arrives at the barrier that stands at the same address in another CTA of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, rank)) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

// True in one lane of a whole warp, which ptxas then knows to be one: the operands of copies live in uniform registers,
// and for what may be several threads it loops over them.
__device__ __forceinline__ bool elect() {
    u32 one;
    asm volatile("{ .reg .pred one; elect.sync _|one, -1; selp.u32 %0, 1, 0, one; }" : "=r"(one));
    return one != 0;
}

// A contiguous copy by the copy engine, of weights that are read once; bytes is a multiple of 16.
__device__ __forceinline__ void bulk_copy_once(u32 shared, const void* global, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared),
        "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// The same of what others read, too: a contiguous copy by the copy engine; bytes is a multiple of 16.
__device__ __forceinline__ void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// The box of a two-dimensional tensor map that starts at (column, row); what lies outside the tensor becomes zero.
__device__ __forceinline__ void tensor_copy(u32 shared, const void* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Has L2 fetch the 32 bytes that an address is in.
__device__ __forceinline__ void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}

// Fetches a tensor map before its first copy.
__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The same box for every CTA of a cluster: it arrives at this address, and counts at this barrier, in each of them.
template <int kCtas>
__device__ __forceinline__ void tensor_copy_to_all(u32 shared, const void* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<u16>((1 << kCtas) - 1))
        : "memory");
}

// Programmatic dependent launch: the next kernel may start, and this one waits until those before it have ended.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Registers move from the warpgroups that copy to those that compute; every warp of a group must call it.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers among `kThreads` threads of the CTA, whole warps; `kId` is 1 to 15.
template <int kId, int kThreads>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Tells such a barrier that this warp has come, without waiting for the others.
template <int kId, int kThreads>
__device__ __forceinline__ void arrive_threads() {
    asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// One of several such barriers, told apart at run time: kFirst + index.
template <int kFirst, int kThreads>
__device__ __forceinline__ void sync_one_of(int index) {
    asm volatile("bar.sync %0, %1;" ::"r"(kFirst + index), "n"(kThreads) : "memory");
}

// A barrier among all threads of a cluster, which may come to it apart.
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// The same in two parts, ahead of which only `barrier_init_fence` orders anything: a release waits for all of a GPU.
__device__ __forceinline__ void arrive_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ __forceinline__ void wait_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ int cluster_ctas() {
    int count;
    asm("mov.u32 %0, %cluster_nctaid.x;" : "=r"(count));
    return count;
}

// Stores four floats in another CTA of the cluster; its barrier counts the 16 bytes when they are there.
__device__ __forceinline__ void store_in(u32 there, const float* four, u32 barrier_there) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     there),
                 "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(barrier_there)
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that a warp holds, two a lane.
__device__ __forceinline__ u32 transpose_8x8(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Stores four 8x8 matrices of 16-bit elements, each transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_turned(u32 shared, const u32 (&fragment)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
}

// Rounds two floats to e4m3, the first in the low byte; beyond 448 they become 448, NaN stays NaN.
__device__ __forceinline__ u32 to_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// Counts this arrival and returns how many came before; orders this thread's earlier writes before it.
__device__ __forceinline__ u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

}  // namespace ptx
