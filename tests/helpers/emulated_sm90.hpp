// What kernels of sm_90a use beside `emulated.hpp`: barriers in shared memory, the copy engine and its swizzle, and
// products of a warpgroup. It ends the process where a kernel breaks a rule that a GPU would not tell of:
//
//     - a copy lands at any time, till then there is NaN where it goes; its bytes have to be those announced
//     - operands in shared memory, and registers of an operand, stay as they are while a product is under way
//     - sums hold NaN until the product has been waited for, and nobody writes to them
//     - what threads wrote to shared memory is fenced before the tensor cores read it
//     - a barrier takes no more arrivals than it was made for, and nothing waits for ever
#pragma once

#include <map>

#include "emulated.hpp"

#define __grid_constant__

namespace emulated {

[[noreturn]] inline void fail(const char* what, u64 where = 0) {
    fprintf(stderr, "thread %d: %s (%llu)\n", now, what, where);
    abort();
}

struct Phase { int count, here; long long bytes; u32 parity; };
struct Named { int count = 0, here = 0, turn = 0; };
// What the driver would encode: `tensor_map` of tests/helpers/emulated.py.
struct Map { u64 address; long long rows, columns, stride; int element, box_rows; };  // no rows: bytes in `columns`
struct Box { u32 shared, barrier; Map map; int column, row; };
struct Operand { u32 at; u16 value; };
struct Read { std::vector<Operand> operands; int waits = 128; };  // threads that have not waited for the product
struct Group {  // a warpgroup
    Barrier barrier;
    u32 a[128][4];
    u64 descriptions[128][2];
    float left[64][32], right[32][256];
    std::map<int, Read> reads;  // of each product under way
};
struct Pending { u32* d; std::vector<float> sums; int group; bool whole; };  // int32, all of which a float has
struct Products {
    bool fenced = false;
    int committed = 0, issued = 0, ended = 0;
    std::vector<Pending> sums;
    std::deque<std::pair<const u32*, std::vector<u32>>> registers;
    std::deque<int> groups;  // of each product under way
};

std::map<u32, Phase> barriers;
inline void linger() { for (int i = emulated::random() % 32; i > 0; --i) yield(); }
Named named[16];
std::vector<Box> boxes;
std::vector<Group> groups;
std::vector<Products> products;
int unfenced[(256 << 10) / 16];  // the thread that wrote there, plus one
std::vector<std::vector<u32>> written;
long long patience;
bool announced_late = false;  // whether bytes may come before they are announced

inline Phase& phase(u32 barrier) {
    if (barrier % 8 || !barriers.count(barrier)) fail("no barrier was made there", barrier);
    return barriers[barrier];
}
inline void settle(Phase& one) {
    if (one.here < one.count || one.bytes) return;
    one.here = 0;
    one.parity ^= 1;
    patience = 0;
}
inline u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }
inline void land(int index) {
    const Box box = boxes[index];
    boxes.erase(boxes.begin() + index);
    Phase& one = phase(box.barrier);
    if (box.map.rows == 0) {
        memcpy(attention_memory + box.shared, reinterpret_cast<const void*>(box.map.address), box.map.columns);
    }
    one.bytes -= box.map.rows == 0 ? box.map.columns : box.map.box_rows * 128;
    for (int row = 0; row < box.map.box_rows; ++row) {
        const int size = box.map.element == 0 ? 1 : 2;  // CU_TENSOR_MAP_DATA_TYPE_UINT8, or 16 bits
        for (int column = 0; column < 128 / size; ++column) {
            u16 value = 0;
            const long long from_row = box.row + row, from = box.column + column;
            if (from_row < box.map.rows && from < box.map.columns) {
                const u64 place = box.map.address + (from_row * box.map.stride + from) * size;
                memcpy(&value, reinterpret_cast<const void*>(place), size);
            }
            memcpy(attention_memory + swizzled(box.shared + row * 128 + column * size), &value, size);
        }
    }
    if (one.bytes < 0 && !announced_late) fail("more bytes than were announced", box.barrier);
    settle(one);
}
inline void start_block() {
    barriers.clear();
    boxes.clear();
    for (Named& one : named) one = {};
    groups = std::vector<Group>(fibers.size() / 128);
    products = std::vector<Products>(fibers.size());
    written = std::vector<std::vector<u32>>(fibers.size());
    memset(unfenced, 0, sizeof unfenced);
    patience = 0;
}
inline void end_block() {
    if (!boxes.empty()) fail("copies are under way where a CTA ends", boxes.size());
    for (const Products& one : products) if (!one.sums.empty()) fail("products are under way where a CTA ends");
    for (const Named& one : named) if (one.here) fail("somebody has come to a barrier where a CTA ends", one.here);
    for (const auto& one : barriers) {
        if (one.second.here || one.second.bytes) fail("a phase is open where a CTA ends", one.first);
    }
}
inline void note_write(const unsigned char* to, const void* from, int bytes) {
    if (memcmp(to, from, bytes) == 0) return;
    const u32 place = static_cast<u32>(to - attention_memory) / 16;
    unfenced[place] = now + 1;
    written[now].push_back(place);
}
const bool hooked = [] {
    before_block = start_block;
    after_block = end_block;
    before_write = note_write;
    before_landing = linger;
    return true;
}();

// Element (across, along) of an operand: `along` is what a product adds over; rows of 128 bytes are of one `across`, or
// where `turned` of one `along`.
inline Operand element(u64 description, bool turned, int across, int along) {
    const u32 start = (description & 0x3fff) << 4;
    const u32 columns = (description >> 16 & 0x3fff) << 4, rows = (description >> 32 & 0x3fff) << 4;
    if (description >> 62 != 1 || description >> 49 & 7) fail("not a 128-byte swizzle from its start", description);
    const u32 at = swizzled(
        turned ? start + across / 64 * columns + along / 8 * rows + along % 8 * 128 + across % 64 * 2
               : start + across / 8 * rows + across % 8 * 128 + along * 2);
    if (at + 2 > sizeof attention_memory) fail("an operand beyond shared memory", at);
    if (unfenced[at / 16]) fail("an operand that was written without a fence", at);
    u16 value;
    memcpy(&value, attention_memory + at, 2);
    return {at, value};
}
template <bool kBf16> float number(u16 x) {
    static const std::vector<float> all = [] {
        std::vector<float> found(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) found[i] = wide<kBf16>(static_cast<u16>(i));
        return found;
    }();
    return all[x];
}

// A number of the 16 bits of an operand: kBytes as two int8, kFloats as two e4m3, else as a float.
constexpr int kBytes = 2, kFloats = 3;
template <int kKind> float number_of(u16 value, int part) {
    if constexpr (kKind == kBytes) return static_cast<signed char>(value >> 8 * part);
    if constexpr (kKind == kFloats) return half_to_float(half_of(ptx::widen_e4m3_pair(value), part));
    return number<kKind == 1>(value);
}

// Issues D[64, N] (+)= A[64, 16] * B[16, N] of fp16 (kKind 0) or bf16 (1), or of pairs of int8 (kBytes), whose sums are
// int32, or of e4m3 (kFloats): A is in registers, or described where `a` is null.
template <int kKind, class Sum, int kSums>
void multiply(Sum (&sums_of)[kSums], const u32* a, u64 left, u64 right, bool turned, bool accumulate) {
    constexpr int kParts = kKind >= kBytes ? 2 : 1;
    u32* const d = reinterpret_cast<u32*>(sums_of);
    Group& group = groups[now / 128];
    const int lane = now % 128;
    if (a != nullptr) memcpy(group.a[lane], a, sizeof group.a[lane]);
    group.descriptions[lane][0] = left;
    group.descriptions[lane][1] = right;
    if (group.barrier.here == 127) {
        for (const auto& one : group.descriptions) {
            if (one[0] != left || one[1] != right) fail("threads of a warpgroup describe operands otherwise");
        }
        std::vector<Operand> read;
        for (int k = 0; k < 16; ++k) {
            for (int i = 0; i < 2 * kSums; ++i) {
                read.push_back(element(right, turned, i, k));
                for (int p = 0; p < kParts; ++p) {
                    group.right[kParts * k + p][i] = number_of<kKind>(read.back().value, p);
                }
            }
            for (int i = 0; i < 64; ++i) {
                u16 value;
                if (a != nullptr) {
                    value = half_of(group.a[i / 16 * 32 + i % 8 * 4 + k % 8 / 2][i % 16 / 8 + k / 8 * 2], k % 2);
                } else {
                    read.push_back(element(left, false, i, k));
                    value = read.back().value;
                }
                for (int p = 0; p < kParts; ++p) group.left[i][kParts * k + p] = number_of<kKind>(value, p);
            }
        }
        group.reads[products[now].issued].operands = std::move(read);
    }
    meet(group.barrier, 128);
    Products& own = products[now];
    auto found = std::find_if(own.sums.begin(), own.sums.end(), [&](const Pending& one) { return one.d == d; });
    if (found == own.sums.end()) {
        if (!own.fenced) fail("registers are not fenced before a product");
        own.sums.push_back({d, std::vector<float>(sums_of, sums_of + kSums), 0, kKind == kBytes});
        found = own.sums.end() - 1;
        memset(d, 255, sizeof sums_of);
    }
    found->group = own.committed;
    for (int i = 0; i < kSums; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = accumulate ? found->sums[i] : 0.0f;
        for (int k = 0; k < 16 * kParts; ++k) sum += group.left[row][k] * group.right[k][column];
        found->sums[i] = sum;
    }
    ++own.issued;
    own.groups.push_back(own.committed);
    own.registers.push_back({a, a == nullptr ? std::vector<u32>() : std::vector<u32>(a, a + 4)});
}

}  // namespace emulated

namespace wgmma {
using namespace emulated;

inline void fence() { products[now].fenced = true; }
inline void commit() { ++products[now].committed; }
template <int kPending> void wait() {
    for (int i = emulated::random() % 4; i > 0; --i) yield();
    Products& own = products[now];
    const int ended = own.committed - kPending;  // groups before this one
    while (!own.groups.empty() && own.groups.front() < ended) {
        const auto& operand = own.registers.front();
        for (size_t i = 0; i < operand.second.size(); ++i) {
            if (operand.first[i] != operand.second[i]) fail("a register of an operand changed under a product");
        }
        auto& reads = groups[now / 128].reads;
        const auto read = reads.find(own.ended++);
        if (--read->second.waits == 0) {
            for (const Operand& one : read->second.operands) {
                if (memcmp(attention_memory + one.at, &one.value, 2)) fail("an operand changed under a product", one.at);
            }
            reads.erase(read);
        }
        own.groups.pop_front();
        own.registers.pop_front();
    }
    for (size_t i = own.sums.size(); i-- > 0;) {
        Pending& one = own.sums[i];
        if (one.group >= ended) continue;
        for (size_t j = 0; j < one.sums.size(); ++j) {
            if (one.d[j] != 0xffffffffu) fail("sums were written under a product", j);
            one.d[j] = one.whole ? static_cast<u32>(static_cast<int>(one.sums[j])) : __float_as_uint(one.sums[j]);
        }
        own.sums.erase(own.sums.begin() + i);
    }
    own.fenced = false;
}
template <bool kBf16> struct MultiplyKeys {
    template <int kSums> static void run(float (&d)[kSums], u64 a, u64 b, int accumulate) {
        emulated::multiply<kBf16>(d, nullptr, a, b, false, accumulate);
    }
};
template <bool kBf16> struct MultiplyValues {
    template <int kSums> static void run(float (&d)[kSums], const u32* a, u64 b, int accumulate) {
        emulated::multiply<kBf16>(d, a, 0, b, true, accumulate);
    }
};

}  // namespace wgmma

namespace ptx {

inline void barrier_init(u32 barrier, u32 arrivals) {
    if (barrier % 8 || barriers.count(barrier)) fail("a barrier is made twice, or not at 8 bytes", barrier);
    barriers[barrier] = {static_cast<int>(arrivals), 0, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) {
    Phase& one = phase(barrier);
    if (++one.here > one.count) fail("more arrivals than a barrier takes", barrier);
    settle(one);
}
inline void barrier_expect(u32 barrier, u32 bytes) {
    phase(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    while (phase(barrier).parity == parity) {
        if (++patience > 3 * static_cast<long long>(fibers.size())) {  // nobody gets any further
            std::vector<int> mine;
            for (size_t i = 0; i < boxes.size(); ++i) if (boxes[i].barrier == barrier) mine.push_back(i);
            const bool other = mine.empty() || emulated::random() % 2;
            if (!boxes.empty()) {
                patience = 0;
                land(other ? emulated::random() % boxes.size() : mine[emulated::random() % mine.size()]);
            } else if (patience > 2000000) {
                fail("everybody waits", barrier);
            }
        }
        yield();
    }
}
inline bool elect() {
    share({});
    return now % 32 == 0;
}
inline u32 kept(u32 value) { return value; }
inline float inverse(float x) { return 1.0f / x; }
inline void prefetch_map(const void*) {}
inline void send(const Box& box) {
    boxes.push_back(box);
    if (emulated::random() % 4 == 0) land(boxes.size() - 1);  // others land when nobody gets any further
}
inline void tensor_copy(u32 shared, const void* map, int column, int row, u32 barrier) {
    Map from;
    memcpy(&from, map, sizeof from);
    const u32 aligned = from.box_rows == 1 ? 128 : 1024;  // addresses decide on the swizzle, so a row may stand anywhere
    if (shared % aligned || from.address % 16 || from.stride % 8) fail("a box is not aligned", shared);
    if (row < 0 || row >= from.rows || column < 0 || column >= from.columns) fail("a box outside its tensor", row);
    memset(attention_memory + shared, 255, from.box_rows * 128);
    send({shared, barrier, from, column, row});
}
inline void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
    const u64 address = reinterpret_cast<u64>(global);
    if (shared % 16 || address % 16 || bytes % 16) fail("a copy is not aligned", shared);
    memset(attention_memory + shared, 255, bytes);
    send({shared, barrier, {address, 0, bytes, 0, 0, 0}, 0, 0});
}
inline u32 multiply_pair(u32 a, u32 b) {
    const auto half = [&](int i) {
        return static_cast<u32>(float_to_half(half_to_float(half_of(a, i)) * half_to_float(half_of(b, i))));
    };
    return half(0) | half(1) << 16;
}
inline void end_reads() {
    for (u32 place : written[now]) {
        if (unfenced[place] == now + 1) unfenced[place] = 0;
    }
    written[now].clear();
}
template <int kRegisters> void give_registers() {}
template <int kRegisters> void take_registers() {}
inline Named& come(int index, int threads) {
    Named& one = named[index];
    if (one.here == 0) one.count = threads;
    if (one.count != threads) fail("threads come to a barrier that is of others", index);
    if (++one.here == threads) {
        one.here = 0;
        ++one.turn;
    }
    return one;
}
template <int kFirst, int kThreads> void arrive_one_of(int index) { come(kFirst + index, kThreads); }
template <int kFirst, int kThreads> void sync_one_of(int index) {
    const int turn = named[kFirst + index].turn;
    Named& one = come(kFirst + index, kThreads);
    while (one.turn == turn) yield();
}
template <int kId, int kThreads> void sync_threads() { sync_one_of<kId, kThreads>(0); }

}  // namespace ptx
