// CUDA on a CPU, part 3: the runtime. Memory with a register of what was allocated, against which
// copies and kernel arguments are checked; streams, events, graphs; launches.
#pragma once
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <vector>
#include <sys/syscall.h>
#include <unistd.h>
#include "types.h"
#define CUDART_VERSION 13000

struct CUstream_st;
typedef CUstream_st *cudaStream_t;

// ---- complaints ---------------------------------------------------------------------------------
inline cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }
inline const char *cudaGetErrorString(cudaError_t e) {
#define X(name, value, text) if (e == name) return text;
    EMU_CUDA_ERRORS(X)
#undef X
    return "unrecognized error code";
}
namespace emu {
// A wrong call: one that a GPU might let pass today and fail on tomorrow.
inline cudaError_t wrong(cudaError_t e, const char *call, const char *why) {
    fprintf(stderr, "emulate: %s: %s\n", call, why);
    fflush(stderr);
    if (settings.abort) abort();
    return last_error = e;
}

// ---- memory -------------------------------------------------------------------------------------
struct Allocation { size_t size, mapped; };             // mapped: 0, or bytes of address space
typedef std::map<char *, Allocation> Memory;
inline Memory &device_memory = *new Memory, &pinned_memory = *new Memory;   // outlive the program
inline size_t device_used = 0;

// The allocation that p points into, and what is left of it from there; {nullptr, 0} if none.
inline std::pair<char *, size_t> find(const Memory &memory, const void *p) {
    auto it = memory.upper_bound((char *)p);
    if (it == memory.begin()) return {nullptr, 0};
    --it;
    size_t offset = (size_t)((char *)p - it->first);
    if (offset >= it->second.size) return {nullptr, 0};
    return {it->first, it->second.size - offset};
}
inline bool on_device(const void *p, size_t n) { return find(device_memory, p).second >= n; }
inline bool touches_device(const void *p) { return find(device_memory, p).first; }
inline bool is_pinned(const void *p) { return find(pinned_memory, p).first; }

// To the address sanitizer, device memory is out of bounds while the host runs.
inline void poison_device(bool closed) {
    if (!EMU_ASAN) return;
    for (auto &[p, a] : device_memory)
        if (!a.mapped && closed) __asan_poison_memory_region(p, a.size);
        else if (!a.mapped) __asan_unpoison_memory_region(p, a.size);
}
struct DeviceOpen {                     // while one lives, device memory can be touched
    inline static int depth = 0;
    DeviceOpen() { if (!depth++) poison_device(false); }
    ~DeviceOpen() { if (!--depth) poison_device(true); }
};

// Buffers from 64 MiB on take no memory until written, so that offsets beyond 2^31 can be tested:
// they map one file of fill bytes, privately, again and again. Behind each lies a page that faults.
constexpr size_t SPARSE = (size_t)64 << 20, PIECE = (size_t)16 << 20, PAGE = 4096;
inline int fill_file() {
    static int file = -1;
    if (file >= 0) return file;
    file = (int)syscall(SYS_memfd_create, "emulate", 0);
    std::vector<char> bytes(PIECE, (char)settings.fill);
    return write(file, bytes.data(), PIECE) == (ssize_t)PIECE ? file : file = -1;
}
inline char *map_sparse(size_t size, size_t *mapped) {
    *mapped = (size + PIECE - 1) / PIECE * PIECE + PAGE;
    void *p = mmap(nullptr, *mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    for (size_t at = 0; at < size; at += PIECE) {
        size_t n = std::min(PIECE, (size - at + PAGE - 1) / PAGE * PAGE);
        void *piece = mmap((char *)p + at, n, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fill_file(), 0);
        if (piece == MAP_FAILED) return nullptr;
    }
    return (char *)p;
}
inline char *allocate(size_t size) {
    size_t room = (size + 255) / 256 * 256;
    char *p = (char *)aligned_alloc(256, room);
    if (!p) return p;
    memset(p, settings.fill, size);
    __asan_poison_memory_region(p + size, room - size);
    return p;
}

// ---- streams, events, graphs --------------------------------------------------------------------
// Work is queued and, unless EMU_STREAMS=late, done at once. Late, it is done when something waits
// for it, so that what was not waited for shows, or a pinned buffer that was used again too early.
typedef std::function<void()> Work;
struct Queued { uint64_t number; Work work; };
}  // namespace emu

struct CUgraph_st { std::vector<emu::Work> nodes; };
struct CUgraphExec_st { std::shared_ptr<std::vector<emu::Work>> nodes; };
struct CUstream_st {
    std::deque<emu::Queued> queue;
    bool blocking = true;               // keeps order with the default stream
    CUgraph_st *capture = nullptr;
};
struct CUevent_st {                     // all that its stream was given before `number`
    cudaStream_t stream;
    uint64_t number = 0;
    bool stamped = false;
    std::chrono::steady_clock::time_point time;
};
typedef CUgraph_st *cudaGraph_t;
typedef CUgraphExec_st *cudaGraphExec_t;
typedef CUevent_st *cudaEvent_t;

namespace emu {
inline CUstream_st default_stream;
inline std::set<cudaStream_t> streams = {&default_stream};
inline uint64_t issued = 0;
inline int captures = 0;                // streams that are being captured

inline cudaStream_t stream_of(cudaStream_t s) { return s ? s : &default_stream; }
inline void finish(cudaStream_t s, uint64_t before = ~0ull) {   // does what s was given before that
    while (streams.count(s) && !s->queue.empty() && s->queue.front().number < before) {
        Queued next = std::move(s->queue.front());
        s->queue.pop_front();
        if (s == &default_stream) {
            for (cudaStream_t other : streams)
                if (other != s && other->blocking) finish(other, next.number);
        } else if (s->blocking) finish(&default_stream, next.number);
        next.work();
    }
}
inline void finish_all() { for (cudaStream_t s : streams) finish(s); }
inline cudaError_t enqueue(cudaStream_t stream, Work work) {
    cudaStream_t s = stream_of(stream);
    if (s->capture) { s->capture->nodes.push_back(std::move(work)); return cudaSuccess; }
    if (captures && s == &default_stream)
        return wrong(cudaErrorStreamCaptureImplicit, "default stream",
                     "used during a stream capture");
    s->queue.push_back({++issued, std::move(work)});
    if (!settings.late) finish(s);
    return last_error;
}
// A call that makes the host wait, or allocates, must not be made during a capture.
inline bool in_capture(const char *call) {
    return captures && wrong(cudaErrorStreamCaptureUnsupported, call, "during a stream capture");
}
}  // namespace emu

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed
};
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    *s = new CUstream_st;
    (*s)->blocking = flags != cudaStreamNonBlocking;
    emu::streams.insert(*s);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithFlags(s, 0); }
inline cudaError_t cudaStreamDestroy(cudaStream_t s) {
    emu::finish(s);
    emu::streams.erase(s);
    delete s;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    if (emu::in_capture("cudaStreamSynchronize")) return emu::last_error;
    emu::finish(emu::stream_of(s));
    return emu::last_error;
}
inline cudaError_t cudaDeviceSynchronize() {
    if (emu::in_capture("cudaDeviceSynchronize")) return emu::last_error;
    emu::finish_all();
    return emu::last_error;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = new CUevent_st{};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    emu::finish_all();                  // work that stamps it may be queued
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream = nullptr) {
    e->stream = emu::stream_of(stream);
    e->stamped = false;
    if (e->stream->capture) return cudaSuccess;
    cudaError_t error = emu::enqueue(stream, [=] {
        e->time = std::chrono::steady_clock::now();
        e->stamped = true;
    });
    e->number = emu::issued + 1;
    return error;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (emu::in_capture("cudaEventSynchronize")) return emu::last_error;
    if (e->number) emu::finish(e->stream, e->number);
    return emu::last_error;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = 0;
    for (cudaEvent_t e : {from, to})    // what has not been waited for has not been stamped
        if (!e->stamped) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned = 0) {
    if (!e->number) return cudaSuccess;
    cudaStream_t awaited = e->stream;
    uint64_t number = e->number;
    return emu::enqueue(s, [=] { emu::finish(awaited, number); });
}

// A graph is the list of what the captured streams were given, in the order of issue.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (!s || s->capture)
        return emu::wrong(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture",
                          "the default stream, or one that is being captured");
    s->capture = new CUgraph_st;
    emu::captures++;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    cudaGraph_t g = *graph = s->capture;
    if (!g) return emu::wrong(cudaErrorInvalidValue, "cudaStreamEndCapture", "no capture");
    s->capture = nullptr;
    emu::captures--;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long = 0) {
    *e = new CUgraphExec_st{std::make_shared<std::vector<emu::Work>>(g->nodes)};
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    return emu::enqueue(s, [nodes = exec->nodes] { for (auto &work : *nodes) work(); });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { delete exec; return cudaSuccess; }

// ---- allocating ---------------------------------------------------------------------------------
inline cudaError_t cudaMalloc(void **p, size_t n) {
    *p = nullptr;
    if (emu::in_capture("cudaMalloc")) return emu::last_error;
    if (!n) return cudaSuccess;
    if (n > emu::settings.memory - emu::device_used) return cudaErrorMemoryAllocation;
    size_t mapped = 0;
    char *at = n < emu::SPARSE ? emu::allocate(n) : emu::map_sparse(n, &mapped);
    if (!at) return cudaErrorMemoryAllocation;
    if (EMU_ASAN && !mapped) __asan_poison_memory_region(at, n);
    emu::device_memory[at] = {n, mapped};
    emu::device_used += n;
    *p = at;
    return cudaSuccess;
}
template<class T> cudaError_t cudaMalloc(T **p, size_t n) { return cudaMalloc((void **)p, n); }
inline cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    if (emu::in_capture("cudaFree")) return emu::last_error;
    emu::finish_all();
    auto it = emu::device_memory.find((char *)p);
    if (it == emu::device_memory.end())
        return emu::wrong(cudaErrorInvalidValue, "cudaFree", "not from cudaMalloc");
    auto [n, mapped] = it->second;
    emu::device_memory.erase(it);
    emu::device_used -= n;
    if (mapped) munmap(p, mapped);
    else { __asan_unpoison_memory_region(p, n); free(p); }
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = emu::settings.memory;
    *left = *total - emu::device_used;
    return cudaSuccess;
}
template<class T> cudaError_t cudaMallocHost(T **p, size_t n) {
    *p = (T *)emu::allocate(n ? n : 1);
    if (!*p) return cudaErrorMemoryAllocation;
    emu::pinned_memory[(char *)*p] = {n, 0};
    return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void *p) {
    emu::finish_all();
    if (p && !emu::pinned_memory.erase((char *)p))
        return emu::wrong(cudaErrorInvalidValue, "cudaFreeHost", "not from cudaMallocHost");
    free(p);
    return cudaSuccess;
}

// ---- copying and filling ------------------------------------------------------------------------
enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice
};
namespace emu {
inline const char *why_not(const void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (to_device ? !on_device(to, n) : touches_device(to))
        return "the target is not memory of that kind, or too small";
    if (from_device ? !on_device(from, n) : touches_device(from))
        return "the source is not memory of that kind, or too small";
    return nullptr;
}
inline void copy_now(void *to, const void *from, size_t n) {
    DeviceOpen open;
    memmove(to, from, n);
}
}  // namespace emu
// As on a GPU, pageable memory is read before the call returns, and written before it returns.
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    if (!n) return cudaSuccess;
    const char *why = emu::why_not(to, from, n, kind);
    if (why) return emu::wrong(cudaErrorInvalidValue, "cudaMemcpy", why);
    auto pageable = [](const void *p) { return !emu::touches_device(p) && !emu::is_pinned(p); };
    bool captured = emu::stream_of(stream)->capture;
    if (!captured && pageable(from)) {
        auto staged = std::make_shared<std::vector<char>>(n);
        emu::copy_now(staged->data(), from, n);
        return emu::enqueue(stream, [=] { emu::copy_now(to, staged->data(), n); });
    }
    cudaError_t e = emu::enqueue(stream, [=] { emu::copy_now(to, from, n); });
    if (!captured && pageable(to)) emu::finish(emu::stream_of(stream));
    return e;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    cudaError_t e = cudaMemcpyAsync(to, from, n, kind);
    emu::finish(&emu::default_stream);
    return e ? e : emu::last_error;
}
inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t stream = nullptr) {
    if (n && !emu::on_device(p, n))
        return emu::wrong(cudaErrorInvalidValue, "cudaMemset", "not device memory, or too small");
    return emu::enqueue(stream, [=] {
        emu::DeviceOpen open;
        memset(p, byte, n);
    });
}
inline cudaError_t cudaMemset(void *p, int byte, size_t n) { return cudaMemsetAsync(p, byte, n); }

// ---- launching ----------------------------------------------------------------------------------
namespace emu {
inline std::map<const void *, Kernel> kernels;
inline Kernel *find_kernel(const void *f, const char *text) {   // text: "k<A, B>, more"
    Kernel *k = &kernels[f];
    if (!k->name.empty()) return k;
    for (int depth = 0; *text && (*text != ',' || depth); k->name += *text++)
        depth += (*text == '<') - (*text == '>');
    return k;
}
// What a pointer argument points to must be device or pinned memory, now that the kernel runs.
template<class T> void check_argument(const Kernel *k, int number, const T &value) {
    if constexpr (std::is_pointer_v<T>) {
        const void *p = (const void *)value;
        if (p && !touches_device(p) && !is_pinned(p)) {
            std::string call = "kernel " + k->name + ", argument " + std::to_string(number);
            wrong(cudaErrorLaunchFailure, call.c_str(), "does not point to device memory");
        }
    }
}
inline cudaError_t check_shape(Kernel *k, dim3 g, dim3 b, size_t shared, bool cooperative) {
    unsigned long long threads = (unsigned long long)b.x * b.y * b.z;
    size_t limit = k->asked ? k->asked : SHARED_UNASKED;
    bool fits = threads && threads <= MAX_THREADS && b.z <= 64 && g.x && g.y && g.z
        && g.x <= INT_MAX && g.y <= 65535 && g.z <= 65535;
    if (fits && shared <= limit) {
        unsigned long long room = settings.multiprocessors
                                * blocks_that_fit((int)threads, k->fixed + shared);
        bool too_many = cooperative && (unsigned long long)g.x * g.y * g.z > room;
        return last_error = too_many ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
    }
    fprintf(stderr, "emulate: kernel %s: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic "
            "shared memory of at most %zu\n", k->name.c_str(), g.x, g.y, g.z, b.x, b.y, b.z, shared,
            limit);
    return last_error = fits ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
}
// launch("k", k, grid, block, shared, stream)(args): arguments are copied now, used when it runs.
template<class... P>
auto launch(const char *name, void (*f)(P...), dim3 grid, dim3 block, size_t shared = 0,
            cudaStream_t stream = nullptr, bool cooperative = false) {
    return [=](P... args) {
        Kernel *k = find_kernel((const void *)f, name);
        if (cudaError_t e = check_shape(k, grid, block, shared, cooperative)) return e;
        return enqueue(stream, [=] {
            int number = 0;
            (check_argument(k, ++number, args), ...);
            DeviceOpen open;
            k->launches++;
            k->shared = std::max(k->shared, shared);
            auto run = [&] { f(args...); };
            run_grid(k, grid, block, shared, cooperative,
                     [](void *p) { (*(decltype(run) *)p)(); }, &run);
        });
    };
}
struct Report {                         // EMU_REPORT=1, at exit
    ~Report() {
        if (!settings.report) return;
        for (auto &[f, k] : kernels)
            fprintf(stderr, "emulate: %s: %llu launches, %zu bytes of shared memory, %llu ldmatrix "
                    "wavefronts, %llu bank conflicts\n", k.name.c_str(), k.launches, k.shared,
                    k.wavefronts, k.conflicts);
    }
};
inline Report report_at_exit;           // made after `kernels`, so ended before it
}  // namespace emu

enum cudaLaunchAttributeID {
    cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
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
cudaError_t emu_launch(const char *text, const cudaLaunchConfig_t *c, void (*f)(P...), A &&...a) {
    bool cooperative = false;
    for (const cudaLaunchAttribute *a = c->attrs; a < c->attrs + c->numAttrs; a++)
        if (a->id == cudaLaunchAttributeCooperative) cooperative = a->val.cooperative;
    auto run = emu::launch(text, f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream,
                           cooperative);
    return run(std::forward<A>(a)...);
}
#define cudaLaunchKernelEx(config, ...) emu_launch(#__VA_ARGS__, config, __VA_ARGS__)
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template<class... P>
cudaError_t emu_attribute(const char *text, void (*f)(P...), cudaFuncAttribute, int value) {
    if (value < 0 || (size_t)value > emu::shared_per_block())
        return emu::last_error = cudaErrorInvalidValue;
    emu::find_kernel((const void *)f, text)->asked = (size_t)value;
    return cudaSuccess;
}
#define cudaFuncSetAttribute(...) emu_attribute(#__VA_ARGS__, __VA_ARGS__)
template<class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*f)(P...), int threads,
                                                          size_t shared) {
    *blocks = emu::blocks_that_fit(threads, emu::kernels[(const void *)f].fixed + shared);
    return cudaSuccess;
}

// ---- the device ---------------------------------------------------------------------------------
struct cudaDeviceProp { char name[256]; int major, minor; };
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (device) return cudaErrorInvalidDevice;
    snprintf(p->name, sizeof p->name, "CPU as sm_%d", emu::settings.sm);
    p->major = emu::settings.sm / 10, p->minor = emu::settings.sm % 10;
    return cudaSuccess;
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrCooperativeLaunch = 95, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr a, int device) {
    if (device) return cudaErrorInvalidDevice;
    *value = a == cudaDevAttrMultiProcessorCount ? emu::settings.multiprocessors
           : a == cudaDevAttrComputeCapabilityMajor ? emu::settings.sm / 10
           : a == cudaDevAttrCooperativeLaunch ? 1
           : (int)emu::shared_per_block();
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int d) { return d ? cudaErrorInvalidDevice : cudaSuccess; }
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
