// CUDA on a CPU, part 3: the runtime. Memory with a register of what was allocated, against which
// copies and kernel arguments are checked; streams, events, graphs; launches.
#pragma once
#include <chrono>
#include <deque>
#include <functional>
#include <vector>
#include "types.h"
#define CUDART_VERSION 13000

// ---- errors: what a GPU would refuse; what it might let pass is a fault -------------------------
#define EMU_ERRORS(X)                                                                        \
    X(Success, 0) X(ErrorInvalidValue, 1) X(ErrorMemoryAllocation, 2)                        \
    X(ErrorInvalidConfiguration, 9) X(ErrorInvalidDevice, 101) X(ErrorNotReady, 600)         \
    X(ErrorCooperativeLaunchTooLarge, 720)
#define X(name, value) cuda##name = value,
typedef enum cudaError { EMU_ERRORS(X) } cudaError_t;
#undef X
inline const char *cudaGetErrorString(cudaError_t e) {
#define X(name, value) if (e == value) return "cuda" #name;
    EMU_ERRORS(X)
#undef X
    return "unrecognized error code";
}
namespace emu { inline cudaError_t last_error = cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }

// ---- streams: work is queued and, unless EMU_STREAMS=late, done at once -------------------------
// Late, it is done when something waits for it, so that what was not waited for shows, or a pinned
// buffer that was used again too early. A graph is the list of what a captured stream was given.
namespace emu {
typedef std::function<void()> Work;
struct Queued { uint64_t number; Work work; };
}  // namespace emu
struct CUgraph_st { std::vector<emu::Work> nodes; };
struct CUstream_st {
    std::deque<emu::Queued> queue;
    CUgraph_st *capture = nullptr;
};
typedef CUstream_st *cudaStream_t;
typedef CUgraph_st *cudaGraph_t, *cudaGraphExec_t;

namespace emu {
inline CUstream_st default_stream;
inline std::vector<cudaStream_t> streams = {&default_stream};
inline uint64_t issued = 0;
inline int captures = 0;                // streams that are being captured

inline cudaStream_t stream_of(cudaStream_t s) { return s ? s : &default_stream; }
// Does what s was given before that number, and before it what the default stream was given, which
// waits for all others and they for it.
inline void finish(cudaStream_t s, uint64_t before = ~0ull) {
    while (!s->queue.empty() && s->queue.front().number < before) {
        Queued next = std::move(s->queue.front());
        s->queue.pop_front();
        for (cudaStream_t other : streams)
            if (other != s && (s == &default_stream || other == &default_stream))
                finish(other, next.number);
        next.work();
    }
}
inline void enqueue(cudaStream_t stream, Work work) {
    cudaStream_t s = stream_of(stream);
    if (s->capture) return s->capture->nodes.push_back(std::move(work));
    if (captures && s == &default_stream) EMU_FAULT("default stream used during a stream capture");
    s->queue.push_back({++issued, std::move(work)});
    if (!settings.late) finish(s);
}
// A call that makes the host wait, or allocates, must not be made during a capture.
inline void not_in_capture(const char *call) {
    if (captures) EMU_FAULT("%s during a stream capture", call);
}
inline cudaError_t finish_all(const char *call) {
    not_in_capture(call);
    for (cudaStream_t s : streams) finish(s);
    return cudaSuccess;
}
}  // namespace emu

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
inline cudaError_t cudaStreamCreate(cudaStream_t *s) {
    return emu::streams.push_back(*s = new CUstream_st), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    emu::not_in_capture("cudaStreamSynchronize");
    return emu::finish(emu::stream_of(s)), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return emu::finish_all("cudaDeviceSynchronize"); }

inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || s->capture) EMU_FAULT("capture of the default stream, or of one that is captured");
    s->capture = new CUgraph_st;
    emu::captures++;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    *graph = std::exchange(s->capture, nullptr);
    emu::captures--;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long = 0) {
    return *e = new CUgraph_st(*g), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
    emu::enqueue(s, [=] { for (emu::Work &work : e->nodes) work(); });
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { return delete g, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) {
    emu::finish_all("cudaGraphExecDestroy");
    return delete e, cudaSuccess;
}

// ---- events: all that a stream was given before `number` ----------------------------------------
struct CUevent_st {
    cudaStream_t stream;
    uint64_t number;
    bool stamped;
    std::chrono::steady_clock::time_point time;
};
typedef CUevent_st *cudaEvent_t;
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    return *e = new CUevent_st{}, cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    emu::finish_all("cudaEventDestroy");            // work that stamps it may be queued
    return delete e, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = nullptr) {
    e->stream = emu::stream_of(s);
    e->stamped = false;
    if (e->stream->capture) return cudaSuccess;
    emu::enqueue(s, [=] {
        e->time = std::chrono::steady_clock::now();
        e->stamped = true;
    });
    e->number = emu::issued + 1;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    emu::not_in_capture("cudaEventSynchronize");
    return emu::finish(e->stream, e->number), cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 0;
    if (!from->stamped || !to->stamped) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    emu::enqueue(s, [awaited = e->stream, number = e->number] { emu::finish(awaited, number); });
    return cudaSuccess;
}

// ---- memory -------------------------------------------------------------------------------------
namespace emu {
typedef std::map<const char *, size_t> Memory;          // where each allocation begins, its size
inline Memory &device_memory = *new Memory, &pinned_memory = *new Memory;   // outlive the program
inline size_t device_used = 0;

inline size_t left(const Memory &memory, const void *at) {      // bytes from there to its end
    auto next = memory.upper_bound((const char *)at);
    if (next == memory.begin()) return 0;
    auto [p, size] = *--next;
    size_t offset = (size_t)((const char *)at - p);
    return offset < size ? size - offset : 0;
}
inline bool on_device(const void *p, size_t n = 1) { return left(device_memory, p) >= n; }
inline bool is_pinned(const void *p) { return left(pinned_memory, p); }

// Buffers from 64 MiB on take no memory until written, so that offsets beyond 2^31 can be tested.
// They hold zeros, and behind each lies a page that faults.
constexpr size_t SPARSE = (size_t)64 << 20, PAGE = 4096;
inline size_t room(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }
inline char *allocate_sparse(size_t n) {
    void *p = mmap(nullptr, room(n) + PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    mprotect((char *)p + room(n), PAGE, PROT_NONE);
    return (char *)p;
}
inline char *allocate(size_t n) {                       // filled with NaN
    size_t room = (n + 255) / 256 * 256;
    char *p = (char *)aligned_alloc(256, room);
    if (!p) return p;
    memset(p, 0xff, n);
    __asan_poison_memory_region(p + n, room - n);
    return p;
}
// To the address sanitizer, device memory is out of bounds while the host runs.
struct DeviceOpen {                     // while one lives, device memory can be touched
    inline static int depth = 0;
    DeviceOpen() {
        if (EMU_ASAN && !depth++)
            for (auto [p, n] : device_memory) if (n < SPARSE) __asan_unpoison_memory_region(p, n);
    }
    ~DeviceOpen() {
        if (EMU_ASAN && !--depth)
            for (auto [p, n] : device_memory) if (n < SPARSE) __asan_poison_memory_region(p, n);
    }
};
}  // namespace emu

template<class T> cudaError_t cudaMalloc(T **p, size_t n) {
    *p = nullptr;
    emu::not_in_capture("cudaMalloc");
    if (!n) return cudaSuccess;
    if (n > emu::settings.memory - emu::device_used) return cudaErrorMemoryAllocation;
    char *at = n < emu::SPARSE ? emu::allocate(n) : emu::allocate_sparse(n);
    if (!at) return cudaErrorMemoryAllocation;
    if (n < emu::SPARSE) __asan_poison_memory_region(at, n);
    emu::device_memory[at] = n;
    emu::device_used += n;
    *p = (T *)at;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    emu::finish_all("cudaFree");
    auto it = emu::device_memory.find((char *)p);
    if (it == emu::device_memory.end()) EMU_FAULT("cudaFree: not from cudaMalloc");
    size_t n = it->second;
    emu::device_memory.erase(it);
    emu::device_used -= n;
    if (n >= emu::SPARSE) return munmap(p, emu::room(n) + emu::PAGE), cudaSuccess;
    __asan_unpoison_memory_region(p, n);
    return free(p), cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = emu::settings.memory;
    *left = *total - emu::device_used;
    return cudaSuccess;
}
template<class T> cudaError_t cudaMallocHost(T **p, size_t n) {
    *p = (T *)emu::allocate(n ? n : 1);
    if (!*p) return cudaErrorMemoryAllocation;
    emu::pinned_memory[(char *)*p] = n;
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void *p) {
    emu::finish_all("cudaFreeHost");
    if (p && !emu::pinned_memory.erase((char *)p))
        EMU_FAULT("cudaFreeHost: not from cudaMallocHost");
    return free(p), cudaSuccess;
}

// ---- copying and filling ------------------------------------------------------------------------
enum cudaMemcpyKind {                   // bit 0: to the device; bit 1: from it
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice
};
namespace emu {
inline void check_side(const char *side, bool device, const void *p, size_t n) {
    if (device ? !on_device(p, n) : on_device(p))
        EMU_FAULT("cudaMemcpy: the %s is not memory of that kind, or too small", side);
}
inline void copy_now(void *to, const void *from, size_t n) {
    DeviceOpen open;
    memmove(to, from, n);
}
}  // namespace emu
// As on a GPU, pageable memory has been read or written when the call returns.
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    if (!n) return cudaSuccess;
    emu::check_side("target", kind & 1, to, n);
    emu::check_side("source", kind & 2, from, n);
    bool captured = emu::stream_of(stream)->capture;
    auto pageable = [](const void *p) { return !emu::on_device(p) && !emu::is_pinned(p); };
    emu::enqueue(stream, [=] { emu::copy_now(to, from, n); });
    if (!captured && (pageable(to) || pageable(from))) emu::finish(emu::stream_of(stream));
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    cudaMemcpyAsync(to, from, n, kind);
    return emu::finish(&emu::default_stream), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t stream = nullptr) {
    if (n && !emu::on_device(p, n)) EMU_FAULT("cudaMemset: not device memory, or too small");
    emu::enqueue(stream, [=] {
        emu::DeviceOpen open;
        memset(p, byte, n);
    });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int byte, size_t n) { return cudaMemsetAsync(p, byte, n); }

// ---- launching ----------------------------------------------------------------------------------
namespace emu {
inline std::map<const void *, Kernel> kernels;
// What a pointer argument points to must be device or pinned memory, now that the kernel runs.
template<class T> void check_argument(const Kernel *k, int number, const T &value) {
    if constexpr (std::is_pointer_v<T>)
        if (value && !on_device((const void *)value) && !is_pinned((const void *)value))
            EMU_FAULT("kernel %s, argument %d does not point to device memory", k->name.c_str(),
                      number);
}
inline cudaError_t check_shape(Kernel *k, dim3 g, dim3 b, size_t shared, bool cooperative) {
    unsigned long long threads = (unsigned long long)b.x * b.y * b.z;
    unsigned long long blocks = (unsigned long long)g.x * g.y * g.z;
    if (!threads || threads > MAX_THREADS || b.z > 64 || !blocks || g.x > INT_MAX || g.y > 65535
        || g.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (shared > (k->asked ? k->asked : SHARED_UNASKED)) return cudaErrorInvalidValue;
    unsigned long long fit = settings.multiprocessors
                           * gpu().blocks_that_fit((int)threads, std::max(k->shared, shared));
    return cooperative && blocks > fit ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}
// launch("k", k, grid, block, shared, stream)(args): arguments are copied now, used when it runs.
template<class... P>
auto launch(const char *name, void (*f)(P...), dim3 grid, dim3 block, size_t shared = 0,
            cudaStream_t stream = nullptr, bool cooperative = false) {
    return [=](P... args) {
        Kernel *k = &kernels[(const void *)f];
        k->name = name;
        if (cudaError_t e = check_shape(k, grid, block, shared, cooperative)) return last_error = e;
        enqueue(stream, [=] {
            int number = 0;
            (check_argument(k, ++number, args), ...);
            DeviceOpen open;
            k->launches++;
            auto run = [&] { f(args...); };
            run_grid(k, grid, block, shared, cooperative,
                     [](void *p) { (*(decltype(run) *)p)(); }, &run);
        });
        return cudaSuccess;
    };
}
inline void report() {                  // EMU_REPORT=1, at exit
    for (auto &[f, k] : kernels)
        fprintf(stderr, "emulate: %s: %llu launches, %zu bytes of shared memory, %llu ldmatrix "
                "wavefronts, %llu bank conflicts\n", k.name.c_str(), k.launches, k.shared,
                k.wavefronts, k.conflicts);
}
inline int reported_at_exit = settings.report ? atexit(report) : 0;
}  // namespace emu

enum cudaLaunchAttributeID {
    cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeProgrammaticStreamSerialization = 6
};
union cudaLaunchAttributeValue {
    char pad[64];
    int cooperative, programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute { cudaLaunchAttributeID id; cudaLaunchAttributeValue val; };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
// Programmatic serialization is a permission to start early, of which this makes no use.
template<class... P, class... A>
cudaError_t emu_launch(const char *name, const cudaLaunchConfig_t *c, void (*f)(P...), A &&...a) {
    bool cooperative = false;
    for (const cudaLaunchAttribute *x = c->attrs; x < c->attrs + c->numAttrs; x++)
        if (x->id == cudaLaunchAttributeCooperative) cooperative = x->val.cooperative;
    return emu::launch(name, f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream,
                       cooperative)(std::forward<A>(a)...);
}
#define cudaLaunchKernelEx(config, f, ...) emu_launch(#f, config, f, __VA_ARGS__)
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template<class... P> cudaError_t cudaFuncSetAttribute(void (*f)(P...), cudaFuncAttribute, int n) {
    if (n < 0 || (size_t)n > emu::gpu().shared_per_block())
        return emu::last_error = cudaErrorInvalidValue;
    emu::kernels[(const void *)f].asked = (size_t)n;
    return cudaSuccess;
}
template<class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*f)(P...), int threads,
                                                          size_t shared) {
    size_t known = emu::kernels[(const void *)f].shared;        // with the static memory, once run
    *blocks = emu::gpu().blocks_that_fit(threads, std::max(known, shared));
    return cudaSuccess;
}

// ---- the device ---------------------------------------------------------------------------------
struct cudaDeviceProp { char name[256]; int major, minor; };
inline cudaError_t cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    int sm = (int)emu::settings.sm;
    *p = {{}, sm / 10, sm % 10};
    snprintf(p->name, sizeof p->name, "CPU as sm_%d", sm);
    return cudaSetDevice(device);
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrCooperativeLaunch = 95, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr a, int device) {
    *value = a == cudaDevAttrMultiProcessorCount ? (int)emu::settings.multiprocessors
           : a == cudaDevAttrComputeCapabilityMajor ? (int)emu::settings.sm / 10
           : a == cudaDevAttrCooperativeLaunch ? 1
           : (int)emu::gpu().shared_per_block();
    return cudaSetDevice(device);
}
inline cudaError_t cudaDriverGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
