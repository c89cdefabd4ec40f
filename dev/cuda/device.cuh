// device.cuh: errors, memory, copies and launches, for train_mamba2.cu.

#define CUDA(call) cuda_check(call, #call, __FILE__, __LINE__)
#ifndef LAUNCHED                         // dev/cuda/time_ssd.cu puts a clock here
#define LAUNCHED() CUDA(cudaGetLastError())
#endif
static void cuda_check(cudaError_t error, const char *call, const char *file, int line) {
    CHECK(!error, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(error));
}

static void cublas_check(cublasStatus_t status, const char *call, const char *file, int line) {
    CHECK(!status, "%s:%d: %s: cuBLAS status %d", file, line, call, (int)status);
}
#define CUBLAS(call) cublas_check(call, #call, __FILE__, __LINE__)

static cudaStream_t stream;        // every kernel and copy runs in its order

static size_t device_room;         // bytes of the device that were free at the start
static const char *(*memory_advice)();             // the plan, and what would fit

template<typename X>
static X *device_alloc(size_t count) {
    void *p;
    size_t bytes = (count ? count : 1) * sizeof(X);
    cudaError_t error = cudaMalloc(&p, bytes);
    CHECK(error != cudaErrorMemoryAllocation, "%s:%d: cudaMalloc: the GPU has no %.2f GiB left%s",
          __FILE__, __LINE__, (double)bytes / (1 << 30), memory_advice ? memory_advice() : "");
    cuda_check(error, "cudaMalloc", __FILE__, __LINE__);
    return (X *)p;
}

// Scratch memory for the time of one op: the next op takes the same. It grows when it must, which
// after the first step it need not: work_floats() has seen to that.
static float *workspace(size_t floats) {
    static float *memory;
    static size_t room;
    if (floats > room) {
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaFree(memory));
        memory = device_alloc<float>(floats);
        room = floats;
    }
    return memory;
}

// to (count) on the host, from the device
static void download(float *to, const float *from, size_t count) {
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(to, from, count * sizeof(float), cudaMemcpyDeviceToHost));
}
// to (rows,columns), from (rows,pitch)
template<typename X>
static void download(float *to, const X *from, size_t rows, size_t columns, size_t pitch) {
    X *staged = (X *)malloc(rows * pitch * sizeof(X) + 1);
    CHECK(staged, "out of memory: %zu bytes to copy a tensor from the GPU",
          rows * pitch * sizeof(X));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(staged, from, rows * pitch * sizeof(X), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < rows * columns; i++) {
        to[i] = (float)staged[i / columns * pitch + i % columns];
    }
    free(staged);
}

__host__ __device__ inline size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }
__host__ __device__ inline unsigned pieces(size_t count, size_t each) {
    return (unsigned)((count + each - 1) / each);
}

static size_t device_attribute(cudaDeviceAttr which) {
    int device, value;
    CUDA(cudaGetDevice(&device));
    CUDA(cudaDeviceGetAttribute(&value, which, device));
    return (size_t)value;
}
// Shared memory that a block may have, and asking for more than the 48 KB that every block may.
static size_t shared_room() {
    static const size_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return room;
}
static size_t multiprocessors() {
    static const size_t count = device_attribute(cudaDevAttrMultiProcessorCount);
    return count;
}
static bool is_hopper() {                      // or newer
    static const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    return hopper;
}
template<class Kernel>
static void allow_shared(Kernel kernel, size_t bytes) {
    CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}
template<class... P, class... A>
static void launch_with(cudaLaunchAttribute attribute, bool has_attribute,
                        void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
                        A... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = has_attribute;
    CUDA(cudaLaunchKernelEx(&config, kernel, P(arguments)...));
}
// A kernel that may begin before the one before it has ended, where the GPU can do that (see
// wait_for_last)
template<class Kernel, class... A>
static void launch_early(Kernel kernel, dim3 grid, unsigned threads, size_t shared,
                         A... arguments) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    launch_with(early, is_hopper(), kernel, grid, threads, shared, arguments...);
}
// A kernel whose blocks wait for each other: all of them run at once.
template<class Kernel, class... A>
static void launch_together(Kernel kernel, size_t blocks, unsigned threads, size_t shared,
                            A... arguments) {
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    launch_with(together, true, kernel, dim3((unsigned)blocks), threads, shared, arguments...);
}
