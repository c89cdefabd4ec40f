// CUDA on a CPU, part 1: the language. Kernels are compiled by the host compiler and run unchanged.
//
// A CUDA thread is a fiber: a stack and a saved stack pointer. The fibers of a block take turns on
// one OS thread. One gives up its turn only where CUDA lets threads wait for each other (a barrier,
// a warp call) and when its kernel ends. The last lane to come does the warp call's work for all.
// A fault is reported and aborts, so that a debugger stops there.
//
//   EMU_ORDER=reverse     the last of the threads, warps and blocks that can run comes first;
//   EMU_ORDER=NUMBER      or one at random, by this seed
//   EMU_SM=90|89|86|80    the GPU whose limits hold (shared memory, compute capability)
//   EMU_MULTIPROCESSORS=4, EMU_MEMORY=81920 (MiB)           what the device says it has
//   EMU_STREAMS=late      work in a stream runs not when issued but when something waits for it
//   EMU_REPORT=1          at exit, a line for each kernel: launches, shared memory, bank conflicts
#pragma once
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

// ---- the sanitizers: what they must be told about fibers; nothing in a plain build --------------
#ifndef __has_feature                  // clang's way to ask; gcc defines macros
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char *, int);
extern "C" void AnnotateIgnoreWritesEnd(const char *, int);
#else
#define EMU_TSAN 0
#define __tsan_acquire(p) ((void)(p))
#define __tsan_release(p) ((void)(p))
#define __tsan_create_fiber(flags) nullptr
#define __tsan_get_current_fiber() nullptr
#define __tsan_switch_to_fiber(fiber, flags) ((void)(fiber))
#define AnnotateIgnoreWritesBegin(file, line)
#define AnnotateIgnoreWritesEnd(file, line)
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define EMU_ASAN 1
#include <sanitizer/asan_interface.h>
#else
#define EMU_ASAN 0
#define __sanitizer_start_switch_fiber(fake, bottom, size) ((void)(fake), (void)(bottom))
#define __sanitizer_finish_switch_fiber(fake, bottom, size) ((void)(fake))
#define __asan_poison_memory_region(p, n) ((void)(p), (void)(n))
#define __asan_unpoison_memory_region(p, n) ((void)(p), (void)(n))
#endif
// The engine itself is no part of what the thread sanitizer judges.
#define EMU_ENGINE __attribute__((no_sanitize("thread"))) inline

// ---- qualifiers, vector types, built-in variables -----------------------------------------------
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))    // __shared__ is rewritten by launch.pl

#define EMU_VECTOR(T, N)                                                                     \
    struct alignas(8) N##2 { T x, y; };                                                      \
    struct N##3 { T x, y, z; };                                                              \
    struct alignas(16) N##4 { T x, y, z, w; };                                               \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                     \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(float, float)
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned, uint)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim{}, gridDim{};

namespace emu {

// ---- settings -----------------------------------------------------------------------------------
inline bool says(const char *name, const char *word) {
    const char *s = getenv(name);
    return s && !strcmp(s, word);
}
inline long number(const char *name, long otherwise) {
    const char *s = getenv(name);
    return s ? strtol(s, nullptr, 0) : otherwise;
}
struct Settings {
    bool reverse = says("EMU_ORDER", "reverse"), late = says("EMU_STREAMS", "late");
    uint32_t seed = (uint32_t)number("EMU_ORDER", 0) * 2654435761u;        // 0: no chance
    long sm = number("EMU_SM", 90), multiprocessors = number("EMU_MULTIPROCESSORS", 4);
    size_t memory = (size_t)number("EMU_MEMORY", 81920) << 20;
    bool report = number("EMU_REPORT", 0);
};
inline Settings settings;

constexpr size_t KiB = 1024, SHARED_UNASKED = 48 * KiB;
struct Gpu {                            // what its multiprocessors hold
    long sm;
    size_t shared;                      // of which a block can have all but 1 KiB
    int threads, blocks;
    size_t shared_per_block() const { return shared - KiB; }
    int blocks_that_fit(int size, size_t shared_each) const {
        int by_threads = threads / ((size + 31) / 32 * 32);
        return std::min({blocks, by_threads, (int)(shared / (shared_each + KiB))});
    }
};
constexpr Gpu GPUS[] = {{80, 164 * KiB, 2048, 32}, {86, 100 * KiB, 1536, 16},
                        {89, 100 * KiB, 1536, 24}, {90, 228 * KiB, 2048, 32}};
inline const Gpu &gpu() {
    for (const Gpu &g : GPUS) if (g.sm == settings.sm) return g;
    return GPUS[3];
}

EMU_ENGINE uint32_t random_below(uint32_t n) {      // xorshift
    uint32_t &s = settings.seed;
    s ^= s << 13, s ^= s >> 17, s ^= s << 5;
    return s % n;
}
EMU_ENGINE int pick(uint32_t ready) {   // whose turn it is: one of the bits
    if (settings.reverse) return 31 - __builtin_clz(ready);
    if (settings.seed)
        for (int n = random_below(__builtin_popcount(ready)); n; n--) ready &= ready - 1;
    return __builtin_ctz(ready);
}

// ---- a grid, its blocks and their threads -------------------------------------------------------
constexpr int MAX_THREADS = 1024, MAX_WARPS = 32, MAX_BARRIERS = 16, STACK = 256 * 1024;
constexpr int MAX_BLOCKS = 8192, MAX_ARRAYS = 64, MAX_COPIES = 256;

struct Place {                          // in the source
    const char *file;
    int line;
    bool operator==(const Place &o) const { return line == o.line && !strcmp(file, o.file); }
    static constexpr Place here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};
#define EMU_HERE emu::Place at = emu::Place::here()     // a last parameter: where the caller is

struct AsyncCopy {                      // cp.async, not done before a wait for its group
    void *to;
    const void *from;                   // nullptr: zeros
    int bytes, group;
};
struct Thread {
    void *sp;                           // its stack pointer while others run
    char *stack;
    uint3 idx;
    int lane, warp;
    bool done;
    const char *what;                   // the call that it is in, or was in last
    Place at;
    unsigned mask;                      // the lanes that it waits for there
    int barrier;                        // at which it waits, or -1
    const uint32_t *number;             // which it waits for in a receive
    unsigned round;
    void *fake, *tsan;                  // address, thread sanitizer: its fake stack, its fiber
    AsyncCopy copies[MAX_COPIES];
    int copies_n, group;                // group: that of the next cp.async
};
typedef void (*WarpCall)(void **slots, unsigned lanes);
struct Meeting {                        // lanes of a warp that are arriving at a warp call
    unsigned mask, arrived;
    WarpCall call;
    const Thread *first;
    void *slot[32];                     // each lane's arguments and place for its result
};
struct Arrival {                        // of lanes of a warp at a barrier
    unsigned lanes;
    Place at;
};
struct Warp {
    uint32_t live, ready, receiving;    // live: not ended; ready: not waiting either
    Arrival arrivals[MAX_BARRIERS];
    int meetings_n;
    Meeting meetings[32];
};
struct Barrier {
    int arrived, expected;              // expected: 0 for all live threads of the block
    Place at;                           // of the one that came last
    bool odd;                           // changes when it opens
    char order[2];                      // happens-before marks of this turn and the last
};
struct SharedArray { const void *declaration; char *p; };       // nullptr: the dynamic one
struct Block {
    uint3 index;
    Thread threads[MAX_THREADS];
    Warp warps[MAX_WARPS];
    Barrier barriers[MAX_BARRIERS];
    Thread *current;                    // nullptr: the scheduler
    int threads_n, warps_n, live;
    SharedArray arrays[MAX_ARRAYS];
    int arrays_n;
    size_t static_size;
};
struct Kernel {                         // what is known of a kernel, found by its address
    std::string name;
    size_t asked;                       // cudaFuncAttributeMaxDynamicSharedMemorySize, if set
    size_t shared;                      // most shared memory that a block of it had
    unsigned long long launches, wavefronts, conflicts;     // the last two: of ldmatrix
};
struct Grid {                           // the launch that runs
    Kernel *kernel;
    void (*body)(void *);               // runs the kernel with the arguments that lie at `args`
    void *args;
    size_t dynamic_size;
    Block *blocks[MAX_BLOCKS];          // the first blocks_n are alive: all, or one at a time
    int blocks_n;
    void *sp, *fake, *tsan;             // the scheduler's stack pointer, fake stack, fiber
    const void *stack;                  // and its stack, for the address sanitizer
    size_t stack_size;
    char order_start, order_end, fence; // happens-before marks: launch to threads, threads to end
};
inline Grid grid{};
inline Block *block = nullptr;          // the one that runs

// ---- faults -------------------------------------------------------------------------------------
inline std::string text(const char *format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char *format, ...) {
    char s[2000];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof s, format, args);
    va_end(args);
    return s;
}
inline std::string text(const char *name, uint3 i) {
    return text("%s (%u,%u,%u)", name, i.x, i.y, i.z);
}
inline std::string text(const char *what, Place at) {
    return text("in %s at %s:%d", what, at.file, at.line);
}
[[noreturn]] inline void fault(const std::string &message) {
    std::string where;
    if (block) where += "kernel " + grid.kernel->name + ", " + text("block", blockIdx) + ", ";
    if (Thread *me = block ? block->current : nullptr) {
        where += text("thread", me->idx) + ", ";
        if (me->what) where += text(me->what, me->at) + ", ";
    }
    fprintf(stderr, "emulate: %s%s\n", where.c_str(), message.c_str());
    abort();
}
#define EMU_FAULT(...) emu::fault(emu::text(__VA_ARGS__))

// ---- switching ----------------------------------------------------------------------------------
// emu_switch(save, load): puts the registers that a callee must keep on this stack and its pointer
// into *save, then goes on where `load` was saved. fresh_stack(): what to load to begin in fiber().
EMU_ENGINE void fiber();
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
extern "C" void emu_switch(void **save, void *load);
asm(R"(.text
.weak emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size emu_switch,.-emu_switch
)");
EMU_ENGINE void *fresh_stack(char *, char *top) {   // six registers, where to return to, nullptr
    void **sp = (void **)top - 8;
    sp[6] = (void *)fiber;
    sp[7] = nullptr;
    return sp;
}
#else                                   // any other CPU: the same through a system call
EMU_ENGINE void emu_switch(void **save, void *load) {
    ucontext_t mine;
    *save = &mine;
    swapcontext(&mine, (ucontext_t *)load);
}
EMU_ENGINE void *fresh_stack(char *stack, char *top) {
    ucontext_t *c = (ucontext_t *)(top - 2048);
    getcontext(c);
    c->uc_stack.ss_sp = stack;
    c->uc_stack.ss_size = (size_t)((char *)c - stack);
    makecontext(c, fiber, 0);
    return c;
}
#endif

EMU_ENGINE void switch_fibers(Thread *from, Thread *to) {       // nullptr: the scheduler
    block->current = to;
    if (to) threadIdx = to->idx;
    void **fake = from ? &from->fake : &grid.fake;
    __sanitizer_start_switch_fiber(from && from->done ? nullptr : fake,
                                   to ? to->stack : grid.stack, to ? STACK : grid.stack_size);
    __tsan_switch_to_fiber(to ? to->tsan : grid.tsan, 1);       // 1: no ordering
    emu_switch(from ? &from->sp : &grid.sp, to ? to->sp : grid.sp);
    __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);   // `from` goes on here
}
EMU_ENGINE void wait() {                // the current thread cannot go on: the next of its warp can
    Thread *me = block->current;
    Warp &w = block->warps[me->warp];
    w.ready &= ~(1u << me->lane);
    switch_fibers(me, w.ready ? &block->threads[me->warp * 32 + pick(w.ready)] : nullptr);
}
EMU_ENGINE Thread *enter(const char *what, Place at) {
    Thread *me = block->current;
    me->what = what, me->at = at, me->mask = 0;
    return me;
}

// ---- warp calls ---------------------------------------------------------------------------------
EMU_ENGINE void complete(Warp &w, Meeting &m) {
    if (m.call) m.call(m.slot, m.arrived);
    w.ready |= m.arrived;
    Meeting &last = w.meetings[--w.meetings_n];
    if (&m != &last) m = last;
}
// All live lanes that mask names meet at one place in the source; the last does the call for all.
EMU_ENGINE void warp_call(const char *what, Place at, unsigned mask, void *slot, WarpCall call) {
    Thread *me = enter(what, at);
    Warp &w = block->warps[me->warp];
    if (!(mask >> me->lane & 1))
        EMU_FAULT("mask %08x does not name the calling lane %d", mask, me->lane);
    int i = 0;
    while (i < w.meetings_n && w.meetings[i].mask != mask) i++;
    Meeting &m = w.meetings[i];
    if (i == w.meetings_n) {
        m.mask = mask, m.arrived = 0, m.call = call, m.first = me;
        w.meetings_n++;
    }
    if (m.call != call || m.first->what != what || m.first->at.line != at.line)
        fault(text("while other lanes of mask %08x are ", mask) + text(m.first->what, m.first->at));
    m.slot[me->lane] = slot;
    m.arrived |= 1u << me->lane;
    me->mask = mask;
    if (m.arrived == (mask & w.live)) complete(w, m);
    else wait();
}

// ---- barriers of a block ------------------------------------------------------------------------
EMU_ENGINE void open(Barrier &r) {      // all who wait at r go on
    Block *b = block;
    int id = (int)(&r - b->barriers);
    for (Warp *w = b->warps; w < b->warps + b->warps_n; w++) {
        Arrival &a = w->arrivals[id];
        if (a.lanes && w->live & ~a.lanes)
            EMU_FAULT("divergent barrier: barrier %d opens without all lanes of a warp", id);
        a.lanes = 0;
    }
    r.arrived = 0;
    r.odd = !r.odd;
    for (Thread *t = b->threads; t < b->threads + b->threads_n; t++)
        if (t->barrier == id) {
            t->barrier = -1;
            b->warps[t->warp].ready |= 1u << t->lane;
        }
}
// Barrier `id` opens when `expected` threads (0: all that have not ended) have come. __syncthreads
// is barrier 0, for which all must be at the same line. At PTX's numbered barriers warps may meet
// at different lines, but not the lanes of a warp: the hardware counts warps.
EMU_ENGINE void barrier(const char *what, Place at, int id, int expected) {
    Thread *me = enter(what, at);
    if (id < 0 || id >= MAX_BARRIERS || expected % 32)
        EMU_FAULT("barrier %d, %d threads: not 0 to 15, or not a multiple of 32", id, expected);
    Barrier &r = block->barriers[id];
    Arrival &a = block->warps[me->warp].arrivals[id];
    bool elsewhere = r.arrived && (r.expected != expected || (!expected && !(r.at == at)));
    if (elsewhere || (a.lanes && !(a.at == at)))
        fault("divergent barrier: others are at the same one " + text("one", r.at));
    a.lanes |= 1u << me->lane, a.at = at;
    r.arrived++, r.expected = expected, r.at = at;
    char *order = &r.order[r.odd];
    __tsan_release(order);
    bool last = r.arrived == (expected ? expected : block->live);
    if (last) {
        open(r);
    } else {
        me->barrier = id;
        wait();
    }
    __tsan_acquire(order);
}

// ---- numbers from block to block ----------------------------------------------------------------
// The last bit of a number tells its round. Who waits for one is looked after by the scheduler.
EMU_ENGINE bool has_come(const uint32_t *number, unsigned round) {
    return !((__atomic_load_n(number, __ATOMIC_RELAXED) ^ round) & 1);
}
EMU_ENGINE uint32_t receive(const uint32_t *from, unsigned round, Place at) {
    Thread *me = enter("receive", at);
    if (!has_come(from, round)) {
        me->number = from, me->round = round;
        block->warps[me->warp].receiving |= 1u << me->lane;
        wait();
    }
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}
EMU_ENGINE bool wake_receivers(Block *b) {      // are there any whose number has come?
    bool woken = false;
    for (int i = 0; i < b->threads_n; i++) {
        Thread &t = b->threads[i];
        Warp &w = b->warps[t.warp];
        uint32_t bit = 1u << t.lane;
        if (!(w.receiving & bit) || !has_come(t.number, t.round)) continue;
        w.receiving &= ~bit;
        w.ready |= bit;
        woken = true;
    }
    return woken;
}

// ---- shared memory ------------------------------------------------------------------------------
// New for each block: on the heap, where the address sanitizer sees its ends; without a past for
// the thread sanitizer; filled with NaN, so that a read before the first write shows.
EMU_ENGINE char *new_shared(const void *declaration, size_t size) {
    size_t room = (size + 127) / 128 * 128;
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    char *p = (char *)aligned_alloc(128, room);
    memset(p, 0xff, size);
    __asan_poison_memory_region(p + size, room - size);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    block->arrays[block->arrays_n++] = {declaration, p};
    return p;
}
EMU_ENGINE void free_shared(Block *b) {
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    while (b->arrays_n) free(b->arrays[--b->arrays_n].p);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
}
// Static and dynamic together fit in 48 KiB or, for a kernel that asked, in what a block can have.
EMU_ENGINE void check_shared() {
    Kernel *k = grid.kernel;
    size_t fixed = block->static_size, dynamic = grid.dynamic_size;
    k->shared = std::max(k->shared, fixed + dynamic);
    size_t asked = k->asked ? k->asked : dynamic;
    size_t limit = k->asked ? gpu().shared_per_block() : SHARED_UNASKED;
    if (fixed > SHARED_UNASKED || fixed + asked > limit)
        EMU_FAULT("%zu bytes of static and %zu of dynamic shared memory: more than %zu", fixed,
                  asked, limit);
}
template<class T> struct Shared {       // one __shared__ declaration
    EMU_ENGINE T &get(EMU_HERE) {
        Block *b = block;
        for (int i = 0; i < b->arrays_n; i++)
            if (b->arrays[i].declaration == this) return *(T *)b->arrays[i].p;
        enter("__shared__", at);
        if (b->arrays_n == MAX_ARRAYS) EMU_FAULT("more than %d arrays", MAX_ARRAYS - 1);
        b->static_size += sizeof(T);
        check_shared();
        return *(T *)new_shared(this, sizeof(T));
    }
};
template<class T> T *dynamic_shared() { return (T *)block->arrays[0].p; }

// ---- running a grid -----------------------------------------------------------------------------
EMU_ENGINE void end(Thread *me) {
    Block *b = block;
    Warp &w = b->warps[me->warp];
    if (me->copies_n) EMU_FAULT("thread ends before its %d cp.async copies", me->copies_n);
    me->done = true;
    w.live &= ~(1u << me->lane);
    b->live--;
    for (Meeting *m = w.meetings; m < w.meetings + w.meetings_n; m++)   // others may have waited
        if (m->arrived == (m->mask & w.live)) complete(w, *m--);        // only for this one
    Barrier &r = b->barriers[0];
    if (r.arrived && !r.expected && r.arrived == b->live) open(r);
}
EMU_ENGINE void fiber() {               // where each thread begins
    // the first of all comes from the scheduler, and learns where that has its stack
    __sanitizer_finish_switch_fiber(nullptr, grid.stack ? nullptr : &grid.stack,
                                    grid.stack_size ? nullptr : &grid.stack_size);
    __tsan_acquire(&grid.order_start);
    grid.body(grid.args);
    __tsan_release(&grid.order_end);
    end(block->current);
    wait();
    __builtin_unreachable();
}
EMU_ENGINE void start_thread(Block *b, unsigned i) {
    Thread *t = &b->threads[i];
    t->idx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    t->lane = i % 32, t->warp = i / 32;
    t->done = false, t->what = nullptr, t->barrier = -1, t->fake = nullptr;
    t->copies_n = t->group = 0;
    if (!t->stack) {
        t->stack = (char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(t->stack, 4096, PROT_NONE);        // for stacks that overflow
        t->tsan = __tsan_create_fiber(0);
    }
    __asan_unpoison_memory_region(t->stack + STACK - 65536, 65536);     // what an ended thread left
    // tops of stacks are staggered: at equal addresses modulo 4096 they would share cache sets
    t->sp = fresh_stack(t->stack, t->stack + STACK - 64 - i % 32 * 256);
}
EMU_ENGINE void start_block(Block *&b, long long i) {
    if (!b) b = (Block *)calloc(1, sizeof(Block));
    long long xy = (long long)gridDim.x * gridDim.y;
    b->index = {(unsigned)(i % gridDim.x), (unsigned)(i % xy / gridDim.x), (unsigned)(i / xy)};
    b->threads_n = b->live = blockDim.x * blockDim.y * blockDim.z;
    b->warps_n = (b->threads_n + 31) / 32;
    b->static_size = 0;
    memset(b->barriers, 0, sizeof b->barriers);
    free_shared(b);
    block = b;
    new_shared(nullptr, grid.dynamic_size);
    for (int t = 0; t < b->threads_n; t++) start_thread(b, t);
    for (int w = 0; w < b->warps_n; w++) {
        int left = b->threads_n - w * 32;
        b->warps[w].live = b->warps[w].ready = left >= 32 ? ~0u : (1u << left) - 1;
        b->warps[w].receiving = 0;
        b->warps[w].meetings_n = 0;
        memset(b->warps[w].arrivals, 0, sizeof b->warps[w].arrivals);
    }
}
[[noreturn]] inline void deadlock() {   // says how many threads wait where
    std::map<std::string, std::pair<int, std::string>> places;
    for (Block **b = grid.blocks; b < grid.blocks + grid.blocks_n; b++)
        for (Thread *t = (*b)->threads; t < (*b)->threads + (*b)->threads_n; t++) {
            std::string place = t->done ? "ended" : text(t->what, t->at);
            if (t->mask && !t->done) place += text(", mask %08x", t->mask);
            std::string who = text("thread", t->idx) + text(" of block", (*b)->index);
            places.emplace(place, std::pair(0, who)).first->second.first++;
        }
    std::string all = "deadlock:";
    for (auto &[place, who] : places)
        all += text("\n    %d threads, the first ", who.first) + who.second + ", " + place;
    fault(all);
}
EMU_ENGINE bool run_block(Block *b) {   // until none of its threads can go on; did any run?
    block = b, blockIdx = b->index;
    for (bool ran = false;; ran = true) {
        uint32_t warps = 0;
        for (int w = 0; w < b->warps_n; w++) if (b->warps[w].ready) warps |= 1u << w;
        if (!warps && !wake_receivers(b)) return ran;
        if (!warps) continue;
        int w = pick(warps);
        switch_fibers(nullptr, &b->threads[w * 32 + pick(b->warps[w].ready)]);
    }
}
EMU_ENGINE void run_blocks() {          // those that are alive, until all have ended
    for (bool ran = true, live = true; live;) {
        if (!ran) deadlock();
        live = ran = false;
        for (Block **b = grid.blocks; b < grid.blocks + grid.blocks_n; b++) {
            ran |= run_block(*b);
            live |= (*b)->live;
        }
    }
}
// Blocks run in turn, those of a cooperative launch at once.
EMU_ENGINE void run_grid(Kernel *kernel, dim3 shape, dim3 dim, size_t dynamic_size,
                         bool cooperative, void (*body)(void *), void *args) {
    grid.tsan = __tsan_get_current_fiber();
    grid.kernel = kernel, grid.body = body, grid.args = args;
    grid.dynamic_size = dynamic_size;
    gridDim = shape, blockDim = dim;
    __tsan_release(&grid.order_start);
    long long total = (long long)shape.x * shape.y * shape.z;
    int n = grid.blocks_n = cooperative ? (int)total : 1;
    for (long long k = 0; k < total; k += n) {
        // to the thread sanitizer, neighbours have threads of their own: races between them show
        if (EMU_TSAN) std::swap(grid.blocks[0], grid.blocks[1]);
        for (int i = 0; i < n; i++)
            start_block(grid.blocks[i], settings.reverse ? total - 1 - k - i : k + i);
        run_blocks();
    }
    __tsan_acquire(&grid.order_end);
    block = nullptr;
}

// ---- shuffles and votes of a warp ---------------------------------------------------------------
struct Given { uint64_t value; int source; uint64_t result; };  // by a lane
EMU_ENGINE void shuffle_all(void **slots, unsigned lanes) {
    for (int l = 0; l < 32; l++) {
        if (!(lanes >> l & 1)) continue;
        Given *g = (Given *)slots[l];
        if (!(lanes >> g->source & 1))
            EMU_FAULT("lane %d reads lane %d, which has ended or is not in the mask", l, g->source);
        g->result = ((Given *)slots[g->source])->value;
    }
}
EMU_ENGINE void vote_all(void **slots, unsigned lanes) {
    unsigned yes = 0;
    for (int l = 0; l < 32; l++) if (lanes >> l & 1 && ((Given *)slots[l])->value) yes |= 1u << l;
    for (int l = 0; l < 32; l++) if (lanes >> l & 1) ((Given *)slots[l])->result = yes;
}
}  // namespace emu
constexpr unsigned EMU_ALL = 0xffffffff;
// The lane itself is read when `source` lies outside of its group of `width` lanes.
#define EMU_SHUFFLE(name, by, from)                                                          \
    template<class T> T name(unsigned mask, T v, int by, int width = 32, EMU_HERE) {         \
        int lane = emu::block->current->lane, source = from;                                 \
        if ((lane ^ source) & ~(width - 1)) source = lane;                                   \
        static_assert(sizeof(T) <= 8);                                                       \
        emu::Given g{0, source, 0};                                                          \
        memcpy(&g.value, &v, sizeof v);                                                      \
        emu::warp_call(#name, at, mask, &g, emu::shuffle_all);                               \
        memcpy(&v, &g.result, sizeof v);                                                     \
        return v;                                                                            \
    }
EMU_SHUFFLE(__shfl_sync, of, (lane & ~(width - 1)) | (of & (width - 1)))
EMU_SHUFFLE(__shfl_up_sync, by, lane - by)
EMU_SHUFFLE(__shfl_xor_sync, with, lane ^ with)
inline unsigned __ballot_sync(unsigned mask, int yes, EMU_HERE) {
    emu::Given g{(unsigned)yes, 0, 0};
    emu::warp_call("__ballot_sync", at, mask, &g, emu::vote_all);
    return (unsigned)g.result;
}
inline void __syncwarp(unsigned mask = EMU_ALL, EMU_HERE) {
    void *order = &emu::block->warps[emu::block->current->warp];
    __tsan_release(order);
    emu::warp_call("__syncwarp", at, mask, nullptr, nullptr);
    __tsan_acquire(order);
}
inline void __syncthreads(EMU_HERE) { emu::barrier("__syncthreads", at, 0, 0); }
inline void __threadfence() {
    __tsan_acquire(&emu::grid.fence);
    __tsan_release(&emu::grid.fence);
}

// ---- intrinsics ---------------------------------------------------------------------------------
template<class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    return std::min<std::common_type_t<A, B>>(a, b);
}
template<class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    return std::max<std::common_type_t<A, B>>(a, b);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline int __ffs(int x) { return __builtin_ffs(x); }
