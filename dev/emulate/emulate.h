// CUDA on a CPU, part 1: the language. Kernels are compiled by the host compiler and run unchanged.
//
// A CUDA thread is a fiber: a stack and a saved stack pointer. The fibers of a block take turns on
// one OS thread. One gives up its turn only where CUDA lets threads wait for each other (a barrier,
// a warp call) and when its kernel ends. The last lane to come does the warp call's work for all.
//
//   EMU_ORDER=forward|reverse|random:SEED   in which order ready threads, warps and blocks run
//   EMU_SM=90|89|86|80    the GPU whose limits hold (shared memory, compute capability)
//   EMU_MULTIPROCESSORS=4, EMU_MEMORY=81920 (MiB)           what the device says it has
//   EMU_STREAMS=late      work in a stream runs not when issued but when something waits for it
//   EMU_FILL=BYTE         what fresh device and shared memory holds (255: NaN in every format)
//   EMU_ERRORS=return     a fault makes the launch fail; otherwise it aborts, for a debugger
//   EMU_REPORT=1          at exit, a line for each kernel: launches, shared memory, bank conflicts
#pragma once
#include <assert.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <algorithm>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

// ---- the sanitizers: what they must be told about fibers; nothing in a plain build --------------
#ifndef __has_feature                  // clang's way to ask; gcc defines macros
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define EMU_ASAN 1
#include <sanitizer/asan_interface.h>
#else
#define EMU_ASAN 0
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
#if !EMU_ASAN
#define __sanitizer_start_switch_fiber(fake, bottom, size) ((void)(fake), (void)(bottom))
#define __sanitizer_finish_switch_fiber(fake, bottom, size) ((void)(fake))
#define __asan_poison_memory_region(p, n) ((void)(p), (void)(n))
#define __asan_unpoison_memory_region(p, n) ((void)(p), (void)(n))
#endif
// The engine itself is no part of what the thread sanitizer judges.
#define EMU_ENGINE __attribute__((no_sanitize("thread"))) inline
#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- qualifiers, vector types, built-in variables -----------------------------------------------
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
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

#define EMU_CUDA_ERRORS(X)                                                                   \
    X(cudaSuccess, 0, "no error")                                                            \
    X(cudaErrorInvalidValue, 1, "invalid argument")                                          \
    X(cudaErrorMemoryAllocation, 2, "out of memory")                                         \
    X(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")                    \
    X(cudaErrorInvalidDevicePointer, 17, "invalid device pointer")                           \
    X(cudaErrorInvalidDevice, 101, "invalid device ordinal")                                 \
    X(cudaErrorNotReady, 600, "device not ready")                                            \
    X(cudaErrorLaunchFailure, 719, "unspecified launch failure")                             \
    X(cudaErrorCooperativeLaunchTooLarge, 720, "too many blocks in cooperative launch")      \
    X(cudaErrorNotSupported, 801, "operation not supported")                                 \
    X(cudaErrorStreamCaptureUnsupported, 900, "operation not permitted in a stream capture") \
    X(cudaErrorStreamCaptureImplicit, 906, "default stream used during a stream capture")
#define X(name, value, text) name = value,
typedef enum cudaError { EMU_CUDA_ERRORS(X) } cudaError_t;
#undef X

namespace emu {

// ---- settings -----------------------------------------------------------------------------------
enum Order { FORWARD, REVERSE, RANDOM };
struct Settings {
    Order order = FORWARD;
    uint32_t seed = 1;
    int sm = 90, multiprocessors = 4, fill = 0xff;
    size_t memory = (size_t)80 << 30;
    bool late = false, abort = true, report = false;
};
inline long number(const char *name, long otherwise) {
    const char *s = getenv(name);
    return s && *s ? strtol(s, nullptr, 0) : otherwise;
}
inline std::string word(const char *name) {
    const char *s = getenv(name);
    return s ? s : "";
}
inline Settings read_settings() {
    Settings s;
    std::string order = word("EMU_ORDER");
    if (order == "reverse") s.order = REVERSE;
    if (order.starts_with("random")) {
        s.order = RANDOM;
        s.seed = order.size() > 7 ? (uint32_t)atoi(&order[7]) * 2654435761u + 1 : 1;
    }
    s.sm = (int)number("EMU_SM", s.sm);
    s.multiprocessors = (int)number("EMU_MULTIPROCESSORS", s.multiprocessors);
    s.memory = (size_t)number("EMU_MEMORY", (long)(s.memory >> 20)) << 20;
    s.fill = (int)number("EMU_FILL", s.fill);
    s.late = word("EMU_STREAMS") == "late";
    s.abort = word("EMU_ERRORS") != "return";
    s.report = number("EMU_REPORT", 0) != 0;
    return s;
}
inline Settings settings = read_settings();

// Shared memory of a multiprocessor, of which a block can have all but 1 KiB when it asks.
constexpr size_t KiB = 1024, SHARED_UNASKED = 48 * KiB;
inline size_t shared_per_multiprocessor() {
    return (settings.sm >= 90 ? 228 : settings.sm == 80 ? 164 : 100) * KiB;
}
inline size_t shared_per_block() { return shared_per_multiprocessor() - KiB; }
// Blocks that a multiprocessor holds at once, as far as threads and shared memory decide
inline int blocks_that_fit(int threads, size_t shared) {
    bool large = settings.sm == 90 || settings.sm == 80;
    int by_threads = (large ? 2048 : 1536) / ((threads + 31) / 32 * 32);
    int by_shared = (int)(shared_per_multiprocessor() / (shared + KiB));
    return std::min({large ? 32 : 16, by_threads, by_shared});
}

EMU_ENGINE uint32_t random32() {        // xorshift
    uint32_t &s = settings.seed;
    s ^= s << 13, s ^= s >> 17, s ^= s << 5;
    return s;
}
EMU_ENGINE int pick(uint32_t ready) {   // whose turn it is: one of the bits
    if (settings.order == FORWARD) return __builtin_ctz(ready);
    if (settings.order == REVERSE) return 31 - __builtin_clz(ready);
    for (int n = random32() % __builtin_popcount(ready); n; n--) ready &= ready - 1;
    return __builtin_ctz(ready);
}

// ---- a block and its threads --------------------------------------------------------------------
constexpr int MAX_THREADS = 1024, MAX_WARPS = 32, MAX_BARRIERS = 16, STACK = 256 * 1024;
constexpr int MAX_BLOCKS = 4096, MAX_ARRAYS = 64;       // blocks at once, __shared__ arrays

struct Kernel {                         // what is known of a kernel, found by its address
    std::string name;
    size_t asked;                       // cudaFuncAttributeMaxDynamicSharedMemorySize, if set
    size_t fixed, shared;               // most static, most shared memory that a block of it had
    unsigned long long launches, wavefronts, conflicts;     // the last two: of ldmatrix
};
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
    const char *what, *file;            // what it waits for and where
    int line, barrier;                  // barrier: its number, -1 otherwise
    unsigned mask;                      // the lanes it waits for in a warp call
    void *fake, *tsan;                  // address, thread sanitizer: its fake stack, its fiber
    AsyncCopy *copies;
    int copies_n, copies_room, group;   // group: that of the next cp.async
};
typedef void (*WarpCall)(void **slots, unsigned lanes);
struct Meeting {                        // lanes of a warp that are arriving at a warp call
    unsigned mask, arrived;
    WarpCall call;
    const char *what, *file;
    int line;
    void *slot[32];                     // each lane's arguments and place for its result
};
struct Arrival {                        // of a warp at a barrier: which lanes, in which turn of it
    unsigned turn, lanes;
    const char *file;
    int line;
};
struct Warp {
    uint32_t live, ready;               // live: not ended; ready: not waiting either
    Arrival arrivals[MAX_BARRIERS];
    int meetings_n;
    Meeting meetings[32];
};
struct Barrier {
    int arrived, expected;              // expected: 0 for all live threads of the block
    unsigned turn;                      // how often it has opened
    const char *file;
    int line;
    char order[2];                      // happens-before marks of two turns
};
struct SharedArray { const void *declaration; char *p; };       // nullptr: the dynamic one
struct Block {
    uint3 index;
    Thread threads[MAX_THREADS];
    Warp warps[MAX_WARPS];
    Barrier barriers[MAX_BARRIERS];
    Thread *current;                    // nullptr: the scheduler
    int threads_n, warps_n, live;
    const unsigned *awaits;             // counter of the grid barrier at which its thread 0 waits
    char *stacks;                       // of all threads
    SharedArray arrays[MAX_ARRAYS];
    int arrays_n;
    size_t static_size;
};
struct Grid {                           // the launch that runs
    Kernel *kernel;
    void (*body)(void *);               // runs the kernel with the arguments that lie at `args`
    void *args;
    size_t dynamic_size;
    bool cooperative, failed;
    unsigned at_barrier;                // blocks that have come to the grid barrier
    Block *blocks[MAX_BLOCKS];          // the first blocks_n are alive: all, or one at a time
    int blocks_n;
    void *sp, *fake, *tsan;             // the scheduler's stack pointer, fake stack, fiber
    const void *stack;                  // and its stack, for the address sanitizer
    size_t stack_size;
    char order_start, order_end;        // happens-before marks: launch to threads, threads to end
};
inline Grid grid{};
inline Block *block = nullptr;          // the one that runs
inline cudaError_t last_error = cudaSuccess;

// ---- faults -------------------------------------------------------------------------------------
EMU_ENGINE void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
EMU_ENGINE void fault(const char *format, ...) {
    char message[2000];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    uint3 b = blockIdx, t = threadIdx;
    const char *name = block ? grid.kernel->name.c_str() : "?";
    fprintf(stderr, "emulate: kernel %s, block (%u,%u,%u)", name, b.x, b.y, b.z);
    if (block && block->current) fprintf(stderr, ", thread (%u,%u,%u)", t.x, t.y, t.z);
    fprintf(stderr, ": %s\n", message);
    fflush(stderr);
    if (settings.abort) abort();
    last_error = cudaErrorLaunchFailure;
}
EMU_ENGINE void give_up();              // drops the whole block; called by one of its threads
#define EMU_FAULT(...) (emu::fault(__VA_ARGS__), emu::give_up())

EMU_ENGINE Thread *current(const char *what) {      // the calling CUDA thread
    if (block && block->current) return block->current;
    fprintf(stderr, "emulate: %s outside of a kernel\n", what);
    abort();
}

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
    uint32_t ready = block->warps[me->warp].ready;
    bool some = ready && !grid.failed;
    switch_fibers(me, some ? &block->threads[me->warp * 32 + pick(ready)] : nullptr);
}
EMU_ENGINE void wait_in(const char *what, const char *file, int line, unsigned mask = 0) {
    Thread *me = block->current;
    block->warps[me->warp].ready &= ~(1u << me->lane);
    me->what = what, me->file = file, me->line = line, me->mask = mask;
    wait();
    me->what = nullptr;
}
EMU_ENGINE void give_up() {
    grid.failed = true;
    block->current->done = true;
    switch_fibers(block->current, nullptr);
}

// ---- warp calls ---------------------------------------------------------------------------------
EMU_ENGINE void complete(Warp &w, int i) {
    Meeting m = w.meetings[i];
    w.meetings[i] = w.meetings[--w.meetings_n];
    if (m.call) m.call(m.slot, m.arrived);
    w.ready |= m.arrived;
}
// All live lanes that mask names meet at one place in the source; the last does the call for all.
EMU_ENGINE void warp_call(const char *what, unsigned mask, void *slot, WarpCall call, EMU_HERE) {
    Thread *me = current(what);
    Warp &w = block->warps[me->warp];
    unsigned bit = 1u << me->lane;
    if (!(mask & bit))
        EMU_FAULT("%s at %s:%d: mask %08x does not name the calling lane %d", what, file, line,
                  mask, me->lane);
    int i = 0;
    while (i < w.meetings_n && w.meetings[i].mask != mask) i++;
    if (i == w.meetings_n) w.meetings[w.meetings_n++] = {mask, 0, call, what, file, line, {}};
    Meeting &m = w.meetings[i];
    if (m.call != call || m.line != line || m.what != what)
        EMU_FAULT("%s at %s:%d while other lanes of mask %08x are in %s at %s:%d", what, file, line,
                  mask, m.what, m.file, m.line);
    m.slot[me->lane] = slot;
    m.arrived |= bit;
    if (m.arrived == (mask & w.live)) complete(w, i);
    else wait_in(what, file, line, mask);
}

// ---- barriers -----------------------------------------------------------------------------------
EMU_ENGINE void open(Barrier &r) {      // all who wait at r go on
    Block *b = block;
    int id = (int)(&r - b->barriers);
    for (Warp *w = b->warps; w < b->warps + b->warps_n; w++) {
        Arrival &a = w->arrivals[id];
        if (a.turn == r.turn + 1 && w->live & ~a.lanes)
            EMU_FAULT("divergent barrier: barrier %d at %s:%d opens without all lanes of a warp",
                      id, a.file, a.line);
    }
    r.arrived = 0;
    r.turn++;
    for (Thread *t = b->threads; t < b->threads + b->threads_n; t++)
        if (t->barrier == id) {
            t->barrier = -1;
            b->warps[t->warp].ready |= 1u << t->lane;
        }
}
enum Part { SYNC, ARRIVE };
// Barrier `id` opens when `expected` threads (0: all that have not ended) have come. __syncthreads
// is barrier 0, for which all must be at the same line. At PTX's numbered barriers warps may meet
// at different lines, but not the lanes of a warp: the hardware counts warps.
EMU_ENGINE void barrier(const char *what, int id, int expected, Part part, EMU_HERE) {
    Thread *me = current(what);
    if (id < 0 || id >= MAX_BARRIERS || expected % 32)
        EMU_FAULT("%s at %s:%d: barrier %d, %d threads: not 0 to 15, or not a multiple of 32", what,
                  file, line, id, expected);
    Barrier &r = block->barriers[id];
    Arrival &a = block->warps[me->warp].arrivals[id];
    if (a.turn != r.turn + 1) a = {r.turn + 1, 0, file, line};
    bool elsewhere = a.line != line || strcmp(a.file, file);
    if (r.arrived && !expected) elsewhere |= r.line != line || strcmp(r.file, file);
    if (elsewhere || (r.arrived && r.expected != expected))
        EMU_FAULT("divergent barrier: %s at %s:%d while others are at the same one at %s:%d", what,
                  file, line, r.file, r.line);
    if (a.lanes >> me->lane & 1)
        EMU_FAULT("%s at %s:%d: the thread comes twice before barrier %d opens", what, file, line,
                  id);
    a.lanes |= 1u << me->lane;
    r.file = file, r.line = line, r.expected = expected;
    r.arrived++;
    char *order = &r.order[r.turn % 2];
    __tsan_release(order);
    bool last = r.arrived == (expected ? expected : block->live);
    if (last) open(r);
    if (part == ARRIVE) return;
    if (!last) {
        me->barrier = id;
        wait_in(what, file, line);
    }
    __tsan_acquire(order);
}

// ---- barriers of a grid -------------------------------------------------------------------------
// Each block adds its share to a counter: 1, block 0 what is left of 2^31. So bit 31 changes when
// the last block comes; thread 0 of each waits for that.
EMU_ENGINE void meet_other_blocks(unsigned *counter, const char *file, int line) {
    if (!grid.cooperative || gridDim.y * gridDim.z != 1)
        EMU_FAULT("grid_barrier at %s:%d: not a cooperative launch of a grid (x,1,1)", file, line);
    unsigned round = *counter >> 31;
    if (!grid.at_barrier++ && *counter << 1)
        EMU_FAULT("grid_barrier at %s:%d: its counter was not 0 at first", file, line);
    char *order = (char *)counter + round;
    __tsan_release(order);
    *counter += blockIdx.x ? 1 : (1u << 31) - (gridDim.x - 1);
    if (*counter >> 31 == round) {
        block->awaits = counter;
        wait_in("grid_barrier", file, line);
    } else {
        grid.at_barrier = 0;
        for (Block **b = grid.blocks; b < grid.blocks + grid.blocks_n; b++)
            if ((*b)->awaits == counter) {
                (*b)->awaits = nullptr;
                (*b)->warps[0].ready |= 1;
            }
    }
    __tsan_acquire(order);
}

// ---- shared memory ------------------------------------------------------------------------------
// New for each block: on the heap, where the address sanitizer sees its ends; without a past for
// the thread sanitizer; filled, so that a read before the first write shows.
EMU_ENGINE char *new_shared(const void *declaration, size_t size) {
    size_t room = (size + 127) / 128 * 128;
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    char *p = (char *)aligned_alloc(128, room);
    memset(p, settings.fill, size);
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
// Static and dynamic together fit in 48 KiB or, for a kernel that asked, in what a block can have;
// those of all blocks that must be there at once, in the multiprocessors.
EMU_ENGINE void check_shared(const char *file, int line) {
    Kernel *k = grid.kernel;
    size_t fixed = block->static_size, dynamic = grid.dynamic_size;
    k->fixed = std::max(k->fixed, fixed);
    k->shared = std::max(k->shared, fixed + dynamic);
    size_t asked = k->asked ? k->asked : dynamic;
    size_t limit = k->asked ? shared_per_block() : SHARED_UNASKED;
    if (fixed > SHARED_UNASKED || fixed + asked > limit)
        EMU_FAULT("%s:%d: %zu bytes of static and %zu of dynamic shared memory: more than %zu",
                  file, line, fixed, asked, limit);
    int fit = settings.multiprocessors * blocks_that_fit(block->threads_n, fixed + dynamic);
    if (grid.cooperative && grid.blocks_n > fit)
        EMU_FAULT("%s:%d: %d blocks in a cooperative launch, with %zu bytes of static shared "
                  "memory: more than the %d that fit", file, line, grid.blocks_n, fixed, fit);
}
template<class T> struct Shared {       // one __shared__ declaration
    EMU_ENGINE T &get(EMU_HERE) {
        Block *b = block;
        for (int i = 0; i < b->arrays_n; i++)
            if (b->arrays[i].declaration == this) return *(T *)b->arrays[i].p;
        if (b->arrays_n == MAX_ARRAYS) EMU_FAULT("more than %d __shared__ arrays", MAX_ARRAYS - 1);
        b->static_size += sizeof(T);
        check_shared(file, line);
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
    w.ready &= ~(1u << me->lane);
    w.live &= ~(1u << me->lane);
    b->live--;
    for (int i = 0; i < w.meetings_n; i++)          // others may have waited only for this one
        if (w.meetings[i].arrived == (w.meetings[i].mask & w.live)) complete(w, i--);
    Barrier &r = b->barriers[0];
    if (r.arrived && !r.expected && r.arrived == b->live) open(r);
}
EMU_ENGINE void fiber() {               // where each thread begins
    Thread *me = block->current;
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
    __tsan_acquire(&grid.order_start);
    grid.body(grid.args);
    __tsan_release(&grid.order_end);
    end(me);
    wait();
    __builtin_unreachable();
}
EMU_ENGINE Block *nth_block(int i) {    // made when first needed; its threads in make_thread
    Block *&b = grid.blocks[i];
    if (b) return b;
    b = (Block *)calloc(1, sizeof(Block));
    b->stacks = (char *)mmap(nullptr, (size_t)MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return b;
}
EMU_ENGINE void make_thread(Block *b, int i, dim3 dim) {
    Thread *t = &b->threads[i];
    unsigned n = i;
    t->idx = {n % dim.x, n / dim.x % dim.y, n / (dim.x * dim.y)};
    t->lane = i % 32, t->warp = i / 32;
    t->done = false, t->what = nullptr, t->barrier = -1, t->fake = nullptr;
    t->copies_n = t->group = 0;
    if (!t->stack) {
        t->stack = b->stacks + (size_t)i * STACK;
        mprotect(t->stack, 4096, PROT_NONE);        // for stacks that overflow
        t->tsan = __tsan_create_fiber(0);
    }
    __asan_unpoison_memory_region(t->stack + STACK - 65536, 65536);     // what an ended thread left
    // tops of stacks are staggered: at equal addresses modulo 4096 they would share cache sets
    t->sp = fresh_stack(t->stack, t->stack + STACK - 64 - i % 32 * 256);
}
EMU_ENGINE void start_block(Block *b, long long i) {
    long long xy = (long long)gridDim.x * gridDim.y;
    b->index = {(unsigned)(i % gridDim.x), (unsigned)(i % xy / gridDim.x), (unsigned)(i / xy)};
    b->threads_n = b->live = blockDim.x * blockDim.y * blockDim.z;
    b->warps_n = (b->threads_n + 31) / 32;
    b->static_size = 0, b->awaits = nullptr;
    memset(b->barriers, 0, sizeof b->barriers);
    free_shared(b);
    block = b;
    new_shared(nullptr, grid.dynamic_size);
    for (int t = 0; t < b->threads_n; t++) make_thread(b, t, blockDim);
    for (int w = 0; w < b->warps_n; w++) {
        int left = b->threads_n - w * 32;
        b->warps[w].live = b->warps[w].ready = left >= 32 ? ~0u : (1u << left) - 1;
        b->warps[w].meetings_n = 0;
        memset(b->warps[w].arrivals, 0, sizeof b->warps[w].arrivals);
    }
}
EMU_ENGINE void deadlock() {            // says how many threads wait where
    std::map<std::string, std::pair<int, std::string>> places;
    for (Block **b = grid.blocks; b < grid.blocks + grid.blocks_n; b++)
        for (Thread *t = (*b)->threads; t < (*b)->threads + (*b)->threads_n; t++) {
            char place[400] = "ended", mask[20] = "", who[100];
            if (t->mask) snprintf(mask, sizeof mask, ", mask %08x", t->mask);
            if (!t->done)
                snprintf(place, sizeof place, "in %s at %s:%d%s", t->what, t->file, t->line, mask);
            uint3 i = (*b)->index, j = t->idx;
            snprintf(who, sizeof who, "(%u,%u,%u) of block (%u,%u,%u)", j.x, j.y, j.z, i.x, i.y,
                     i.z);
            places.emplace(place, std::make_pair(0, who)).first->second.first++;
        }
    std::string all;
    for (auto &[place, who] : places)
        all += "\n    " + std::to_string(who.first) + " threads, the first " + who.second + ", "
             + place;
    fault("deadlock:%s", all.c_str());
    grid.failed = true;
}
EMU_ENGINE int whose_turn(int k, int n, int first) {        // the k-th of n
    return settings.order == REVERSE ? n - 1 - k : (k + first) % n;
}
EMU_ENGINE int who_is_first(int n) { return settings.order == RANDOM ? random32() % n : 0; }

EMU_ENGINE bool run_warps(Block *b) {   // each until none of its lanes can go on; did any run?
    bool ran = false;
    block = b, blockIdx = b->index;
    int first = who_is_first(b->warps_n);
    for (int k = 0; k < b->warps_n && !grid.failed; k++) {
        int w = whose_turn(k, b->warps_n, first);
        uint32_t ready = b->warps[w].ready;
        if (!ready) continue;
        ran = true;
        switch_fibers(nullptr, &b->threads[w * 32 + pick(ready)]);
    }
    return ran;
}
EMU_ENGINE void run_blocks() {          // those that are alive, until all have ended
    for (bool ran = true; ran && !grid.failed;) {
        bool live = ran = false;
        int n = grid.blocks_n, first = who_is_first(n);
        for (int k = 0; k < n && !grid.failed; k++) {
            Block *b = grid.blocks[whose_turn(k, n, first)];
            ran |= run_warps(b);
            live |= b->live;
        }
        if (!ran && live) deadlock();
    }
}
// Blocks run in turn, those of a cooperative launch at once.
EMU_ENGINE void run_grid(Kernel *kernel, dim3 shape, dim3 dim, size_t dynamic_size,
                         bool cooperative, void (*body)(void *), void *args) {
    if (EMU_ASAN && !grid.stack) {
        pthread_attr_t a;
        pthread_getattr_np(pthread_self(), &a);
        pthread_attr_getstack(&a, (void **)&grid.stack, &grid.stack_size);
        pthread_attr_destroy(&a);
    }
    grid.tsan = __tsan_get_current_fiber();
    grid.kernel = kernel, grid.body = body, grid.args = args;
    grid.dynamic_size = dynamic_size, grid.cooperative = cooperative;
    grid.failed = false, grid.at_barrier = 0;
    gridDim = shape, blockDim = dim;
    __tsan_release(&grid.order_start);
    long long total = (long long)shape.x * shape.y * shape.z;
    grid.blocks_n = cooperative ? (int)total : 1;
    for (int i = 0; i < grid.blocks_n && cooperative; i++) start_block(nth_block(i), i);
    if (cooperative) run_blocks();
    for (long long k = 0; k < total && !cooperative && !grid.failed; k++) {
        // to the thread sanitizer, neighbours have threads of their own: races between them show
        if (EMU_TSAN) std::swap(grid.blocks[0], grid.blocks[1]);
        start_block(nth_block(0), settings.order == REVERSE ? total - 1 - k : k);
        run_blocks();
    }
    __tsan_acquire(&grid.order_end);
    block = nullptr;
}

}  // namespace emu

// ---- barriers of a block ------------------------------------------------------------------------
inline void __syncthreads(EMU_HERE) {
    emu::barrier("__syncthreads", 0, 0, emu::SYNC, file, line);
}

// ---- shuffles and votes of a warp ---------------------------------------------------------------
namespace emu {
template<class T> struct Shuffle { T value; int source; T result; };
template<class T> EMU_ENGINE void shuffle_all(void **slots, unsigned lanes) {
    for (unsigned m = lanes; m; m &= m - 1) {
        auto *s = (Shuffle<T> *)slots[__builtin_ctz(m)];
        if (!(lanes >> s->source & 1))
            EMU_FAULT("shuffle: lane %d reads lane %d, which has ended or is not in the mask",
                      __builtin_ctz(m), s->source);
        memcpy((void *)&s->result, &((Shuffle<T> *)slots[s->source])->value, sizeof(T));
    }
}
// The lane itself is read when `source` lies outside of its group of `width` lanes.
template<class T>
EMU_ENGINE T shuffle(const char *what, unsigned mask, T value, int source, int width, EMU_HERE) {
    int lane = current(what)->lane;
    if ((lane ^ source) & ~(width - 1)) source = lane;
    Shuffle<T> s{value, source, value};
    warp_call(what, mask, &s, shuffle_all<T>, file, line);
    return s.result;
}
struct Vote { int yes; unsigned result; };
EMU_ENGINE void vote_all(void **slots, unsigned lanes) {
    unsigned ballot = 0;
    for (int l = 0; l < 32; l++) if (lanes >> l & 1 && ((Vote *)slots[l])->yes) ballot |= 1u << l;
    for (int l = 0; l < 32; l++) if (lanes >> l & 1) ((Vote *)slots[l])->result = ballot;
}
}  // namespace emu
constexpr unsigned EMU_ALL = 0xffffffff;
#define EMU_SHUFFLE(name, by, source)                                                        \
    template<class T> T name(unsigned mask, T v, int by, int width = 32, EMU_HERE) {         \
        int lane = emu::current(#name)->lane;                                                \
        return emu::shuffle(#name, mask, v, source, width, file, line);                      \
    }
EMU_SHUFFLE(__shfl_sync, from, (lane & ~(width - 1)) | (from & (width - 1)))
EMU_SHUFFLE(__shfl_up_sync, by, lane - by)
EMU_SHUFFLE(__shfl_down_sync, by, lane + by)
EMU_SHUFFLE(__shfl_xor_sync, with, lane ^ with)
inline unsigned __ballot_sync(unsigned mask, int yes, EMU_HERE) {
    emu::Vote v{yes, 0};
    emu::warp_call("__ballot_sync", mask, &v, emu::vote_all, file, line);
    return v.result;
}
inline void __syncwarp(unsigned mask = EMU_ALL, EMU_HERE) {
    void *order = &emu::block->warps[emu::current("__syncwarp")->warp];
    __tsan_release(order);
    emu::warp_call("__syncwarp", mask, nullptr, nullptr, file, line);
    __tsan_acquire(order);
}

namespace emu {
template<class To, class From> To bits(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy((void *)&to, &v, sizeof to);
    return to;
}
}  // namespace emu

// ---- intrinsics ---------------------------------------------------------------------------------
template<class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return y < x ? y : x;
}
template<class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    std::common_type_t<A, B> x = a, y = b;
    return x < y ? y : x;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned u) { return emu::bits<float>(u); }
inline unsigned __float_as_uint(float f) { return emu::bits<unsigned>(f); }
inline int __ffs(int x) { return __builtin_ffs(x); }
