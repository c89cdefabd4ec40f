// Planted faults: each must be reported, by the plain build or under one of the sanitizers, with
// the message that the table at the end expects. faults.sh runs them all.
//   faults           lists them: number, expected message, name
//   faults NUMBER    commits one; says WRONG when the fault shows in a result
#include <cuda_runtime.h>
#include <cublasLt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "../cuda/ptx.cuh"

static int *ints;                       // 64 on the device, zeros
static float *floats;                   // 64 on the device, fresh
static float *pinned;                   // 64 on the host, zeros
static cudaStream_t stream, other;

static void expect(bool ok) { puts(ok ? "as expected" : "WRONG"); }
static void see(cudaError_t e) { puts(cudaGetErrorString(e)); }
static void see(cublasStatus_t s) { puts(s ? "refused" : "taken"); }
static void expect_number(float *on_device) {       // NaN is not a number
    float v;
    cudaMemcpy(&v, on_device, sizeof v, cudaMemcpyDeviceToHost);
    expect(v == v);
}

// ---- barriers and warp calls --------------------------------------------------------------------
__global__ void two_barriers_kernel(int *o) {
    if (threadIdx.x < 16) {
        __syncthreads();
        o[0] = 1;
    } else {
        __syncthreads();
        o[1] = 1;
    }
}
static void two_barriers() { two_barriers_kernel<<<1, 32>>>(ints); }

__global__ void deadlock_kernel(int *o) {
    if (threadIdx.x < 16) __syncthreads();
    else o[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
}
static void deadlock() { deadlock_kernel<<<1, 32>>>(ints); }

__global__ void early_return_kernel(int *o) {
    if (threadIdx.x >= 20) return;
    o[threadIdx.x] = __shfl_xor_sync(0xffffffff, (int)threadIdx.x, 4);
}
static void early_return() { early_return_kernel<<<1, 32>>>(ints); }

__global__ void not_named_kernel(int *o) {
    o[threadIdx.x] = __shfl_xor_sync(0x0000ffff, (int)threadIdx.x, 1);
}
static void not_named() { not_named_kernel<<<1, 32>>>(ints); }

__global__ void two_shuffles_kernel(int *o) {
    if (threadIdx.x < 16) o[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1, 1);
    else o[threadIdx.x] = __shfl_xor_sync(0xffffffff, 2, 1);
}
static void two_shuffles() { two_shuffles_kernel<<<1, 32>>>(ints); }

__global__ void half_warp_mma_kernel(float *o) {
    uint32_t a[4] = {}, b[2] = {};
    float d[4] = {};
    if (threadIdx.x < 16) return;
    mma(d, a, b);
    o[threadIdx.x] = d[0];
}
static void half_warp_mma() { half_warp_mma_kernel<<<1, 32>>>(floats); }

__global__ void short_count_kernel(int *o) {        // there are three warps
    barrier_wait(1, 128);
    o[threadIdx.x % 64] = 1;
}
static void short_count() { short_count_kernel<<<1, 96>>>(ints); }

__global__ void half_warps_kernel(int *o) {         // warps may meet at different lines, lanes not
    if (threadIdx.x % 32 < 16) barrier_wait(1, 64);
    else barrier_wait(1, 64);
    o[threadIdx.x] = 1;
}
static void half_warps() { half_warps_kernel<<<1, 64>>>(ints); }

__global__ void few_lanes_kernel(int *o) {          // 32 threads, but of two warps
    if (threadIdx.x % 32 < 16) barrier_wait(1, 32);
    o[threadIdx.x] = 1;
}
static void few_lanes() { few_lanes_kernel<<<1, 64>>>(ints); }

__global__ void counts_differ_kernel(int *o) {
    if (threadIdx.x < 32) barrier_wait(1, 64);
    else barrier_wait(1, 96);
    o[threadIdx.x] = 1;
}
static void counts_differ() { counts_differ_kernel<<<1, 64>>>(ints); }

// ---- numbers from block to block ----------------------------------------------------------------
// Each block waits for the next one's number.
__global__ void pass_on_kernel(float *x, int silent) {
    if ((int)blockIdx.x == silent) return;
    send(x + blockIdx.x, 1.0f, 1);
    x[32 + blockIdx.x] = receive(x + (blockIdx.x + 1) % gridDim.x, 1);
}
static void together(int blocks, int silent) {
    cudaLaunchAttribute together = {cudaLaunchAttributeCooperative, {}};
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {blocks, 1, 0, nullptr, &together, 1};
    cudaMemset(floats, 0, 32 * sizeof(float));
    cudaLaunchKernelEx(&config, pass_on_kernel, floats, silent);
}
static void one_has_ended() { together(4, 2); }
static void too_many_blocks() {
    together(200, -1);
    see(cudaGetLastError());
}
static void not_together() {
    cudaMemset(floats, 0, 32 * sizeof(float));
    pass_on_kernel<<<4, 1>>>(floats, -1);
}

// ---- memory -------------------------------------------------------------------------------------
__global__ void past_global_kernel(int *o) { o[threadIdx.x] = 1; }
static void past_global() { past_global_kernel<<<1, 65>>>(ints); }

__global__ void past_static_kernel(int *o, int k) {
    __shared__ int s[32];
    s[threadIdx.x + k] = 1;
    o[threadIdx.x] = s[threadIdx.x];
}
static void past_static() { past_static_kernel<<<1, 32>>>(ints, 3); }

__global__ void past_dynamic_kernel(int *o) {
    extern __shared__ int s[];
    s[threadIdx.x] = 1;
    o[threadIdx.x] = s[threadIdx.x];
}
static void past_dynamic() { past_dynamic_kernel<<<1, 32, 31 * sizeof(int)>>>(ints); }

__global__ void far_kernel(float *o, size_t at) { o[at] = 1; }
static void past_sparse() {
    float *large;
    size_t n = (size_t)3 << 30;
    cudaMalloc(&large, n * sizeof(float));
    far_kernel<<<1, 1>>>(large, n);
}
__global__ void misaligned_kernel(float *o) {
    float4 v = *(float4 *)(o + 1);
    o[0] = v.x;
}
static void misaligned() { misaligned_kernel<<<1, 1>>>(floats); }
static void host_writes() { ints[3] = 1; }
static void host_pointer() {
    int host[64];
    past_global_kernel<<<1, 32>>>(host);
}
static void freed_pointer() {
    cudaFree(ints);
    past_global_kernel<<<1, 32>>>(ints);
}

__global__ void fresh_shared_kernel(float *o) {
    __shared__ float s[32];
    if (threadIdx.x) s[threadIdx.x] = 1;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x];
}
static void fresh_shared() {
    fresh_shared_kernel<<<1, 32>>>(floats);
    expect_number(floats);
}
static void fresh_device() { expect_number(floats); }

// ---- races --------------------------------------------------------------------------------------
__global__ void shared_race_kernel(int *o) {
    __shared__ int s[64];
    s[threadIdx.x] = threadIdx.x;
    o[threadIdx.x] = s[(threadIdx.x + 1) % 64];
}
static void shared_race() { shared_race_kernel<<<1, 64>>>(ints); }

__global__ void global_race_kernel(int *o) { o[0] = o[0] + 1; }
static void global_race() { global_race_kernel<<<1, 64>>>(ints); }
static void block_race() { global_race_kernel<<<64, 1>>>(ints); }

__global__ void no_way_back_kernel(int *o) {        // one buffer: it is written while it is read
    __shared__ int s[32];
    int t = threadIdx.x % 32;
    for (int r = 1; r <= 2; r++) {
        if (threadIdx.x < 32) {
            s[t] = r;
            barrier_wait(r, 64);
        } else {
            barrier_wait(r, 64);
            o[t] += s[t];
        }
    }
}
static void no_way_back() { no_way_back_kernel<<<1, 64>>>(ints); }

// ---- asynchronous copies, ldmatrix --------------------------------------------------------------
__global__ void no_wait_kernel(float *o, const float *in, bool wait) {
    __shared__ float4 s[32];
    cp_async<16>(&s[threadIdx.x % 16], in + 4 * (threadIdx.x % 16), true);
    cp_async_commit();
    if (wait) cp_async_wait<1>();                   // should be 0
    float v = s[threadIdx.x % 16].x;
    cp_async_wait<0>();
    o[threadIdx.x] = v;
}
static void no_wait() {
    cudaMemset(floats, 0, 64 * sizeof(float));
    no_wait_kernel<<<1, 16>>>(floats, floats, false);
    expect_number(floats);
}
static void wrong_group() {
    cudaMemset(floats, 0, 64 * sizeof(float));
    no_wait_kernel<<<1, 16>>>(floats, floats, true);
    expect_number(floats);
}
__global__ void never_waits_kernel(const float *in) {
    __shared__ float4 s[32];
    cp_async<16>(&s[threadIdx.x], in, true);
    cp_async_commit();
}
static void never_waits() { never_waits_kernel<<<1, 32>>>(floats); }

__global__ void ldmatrix_kernel(int pitch) {
    __shared__ uint16_t s[32 * 64];
    uint32_t r[4];
    ldmatrix(r, s + threadIdx.x * pitch);
}
static void odd_row() { ldmatrix_kernel<<<1, 32>>>(60); }
__global__ void stmatrix_kernel(int pitch) {
    __shared__ uint16_t s[32 * 64];
    uint32_t r[4] = {};
    stmatrix(s + threadIdx.x * pitch, r);
}
static void odd_row_stored() { stmatrix_kernel<<<1, 32>>>(60); }
static void bank_conflicts() {
    atexit(emu::report);
    ldmatrix_kernel<<<1, 32>>>(64);
}

// ---- launches -----------------------------------------------------------------------------------
static void too_many_threads() {
    past_global_kernel<<<1, 2000>>>(ints);
    see(cudaGetLastError());
}
static void not_asked_for() {
    past_dynamic_kernel<<<1, 1, 100 * 1024>>>(ints);
    see(cudaGetLastError());
}
static void other_asked() {                         // the limit is each kernel's own
    auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaFuncSetAttribute(misaligned_kernel, limit, 100 * 1024);
    not_asked_for();
}
static void too_much() {
    emu::settings.sm = 86;
    auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    see(cudaFuncSetAttribute(past_dynamic_kernel, limit, 100 * 1024));
}
__global__ void both_kernel(int *o) {
    __shared__ int s[1024];
    extern __shared__ int d[];
    s[threadIdx.x] = d[threadIdx.x] = 1;
    o[threadIdx.x] = s[threadIdx.x];
}
static void both() { both_kernel<<<1, 32, 46 * 1024>>>(ints); }

// ---- copies, streams, graphs --------------------------------------------------------------------
static void wrong_kind() {
    int host[64] = {};
    cudaMemcpy(ints, host, sizeof host, cudaMemcpyDeviceToHost);
}
static void too_long() {
    int host[65] = {};
    cudaMemcpy(ints, host, sizeof host, cudaMemcpyHostToDevice);
}
static void not_waited_for() {
    emu::settings.late = true;
    cudaMemset(floats, 0x3f, 64 * sizeof(float));
    cudaDeviceSynchronize();
    cudaMemcpyAsync(pinned, floats, 64 * sizeof(float), cudaMemcpyDeviceToHost, stream);
    expect(pinned[0] > 0);
}
static void used_again() {
    emu::settings.late = true;
    pinned[0] = 1;
    cudaMemcpyAsync(floats, pinned, 64 * sizeof(float), cudaMemcpyHostToDevice, stream);
    pinned[0] = 2;
    cudaStreamSynchronize(stream);
    float v;
    cudaMemcpy(&v, floats, sizeof v, cudaMemcpyDeviceToHost);
    expect(v == 1);
}
static void no_event() {
    emu::settings.late = true;
    cudaMemsetAsync(floats, 0, 64 * sizeof(float), stream);
    cudaMemcpyAsync(pinned, floats, 64 * sizeof(float), cudaMemcpyDeviceToHost, other);
    cudaStreamSynchronize(other);
    expect(pinned[0] == 0);
}
static void capture_waits() {
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    cudaStreamSynchronize(stream);
}
static void capture_allocates() {
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    cudaMalloc(&ints, 100);
}
static void capture_missed() {
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
    past_global_kernel<<<1, 32>>>(ints);            // on the default stream
}

// ---- cuBLASLt -----------------------------------------------------------------------------------
static cublasStatus_t product(cudaDataType in, cudaDataType out, int pitch, size_t offset,
                              size_t room, float beta = 0) {
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t x, d;
    cublasLtMatmulAlgo_t algo = {{emu::WORKSPACE}};
    float one = 1;
    char *p;
    cudaMalloc(&p, 1 << 20);
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&x, in, 8, 8, pitch);
    cublasLtMatrixLayoutCreate(&d, out, 8, 8, 8);
    return cublasLtMatmul(nullptr, desc, &one, p + offset, x, p, x, &beta, p + 4096, d, p + 4096, d,
                          &algo, p + 8192, room, stream);
}
static void odd_pitch() { see(product(CUDA_R_16BF, CUDA_R_32F, 9, 0, emu::WORKSPACE)); }
static void odd_pointer() { see(product(CUDA_R_16BF, CUDA_R_32F, 8, 2, emu::WORKSPACE)); }
static void odd_types() { see(product(CUDA_R_32F, CUDA_R_16BF, 8, 0, emu::WORKSPACE)); }
static void no_workspace() { see(product(CUDA_R_16BF, CUDA_R_32F, 8, 0, 1000)); }

static void nothing() {                             // the control: no build may report it
    together(4, -1);
    past_global_kernel<<<1, 64>>>(ints);
    see(cudaDeviceSynchronize());
}

int main(int argc, char **argv) {
    struct { const char *message; const char *name; void (*commit)(); } faults[] = {
        {"Success", "nothing", nothing},
        {"divergent barrier", "barriers at two lines", two_barriers},
        {"deadlock:", "a barrier and a shuffle that wait for each other", deadlock},
        {"has ended or is not in the mask", "shuffle after an early return", early_return},
        {"does not name the calling lane", "lane that its mask does not name", not_named},
        {"while other lanes of mask", "lanes at two shuffles", two_shuffles},
        {"needs all 32 lanes", "mma with half a warp", half_warp_mma},
        {"deadlock:", "numbered barrier that a warp never reaches", short_count},
        {"divergent barrier", "numbered barrier with two counts", counts_differ},
        {"divergent barrier", "lanes of a warp at one numbered barrier at two lines", half_warps},
        {"without all lanes of a warp", "numbered barrier with half of two warps", few_lanes},
        {"deadlock:", "number from a block that has ended", one_has_ended},
        {"LaunchTooLarge", "more blocks than fit in a cooperative launch", too_many_blocks},
        {"deadlock:", "number from a block that has not begun, in a plain launch", not_together},
        {"AddressSanitizer", "past the end of device memory", past_global},
        {"AddressSanitizer", "past the end of static shared memory", past_static},
        {"AddressSanitizer", "past the end of dynamic shared memory", past_dynamic},
        {"status 139|SEGV", "past the end of 12 GiB", past_sparse},
        {"misaligned address", "misaligned vector load", misaligned},
        {"AddressSanitizer", "host writes to device memory", host_writes},
        {"does not point to device memory", "kernel gets a host pointer", host_pointer},
        {"does not point to device memory", "kernel gets a freed pointer", freed_pointer},
        {"WRONG", "shared memory never written", fresh_shared},
        {"WRONG", "device memory never written", fresh_device},
        {"data race", "race in shared memory", shared_race},
        {"data race", "race in device memory", global_race},
        {"data race", "race between blocks", block_race},
        {"data race", "buffer filled again before it was read", no_way_back},
        {"WRONG", "cp.async without a wait", no_wait},
        {"WRONG", "cp.async with a wait for an older group", wrong_group},
        {"cp.async copies", "thread ends before its copies", never_waits},
        {"not aligned to 16 bytes", "ldmatrix of a misaligned row", odd_row},
        {"not aligned to 16 bytes", "stmatrix of a misaligned row", odd_row_stored},
        {"28 bank conflicts", "bank conflicts of ldmatrix", bank_conflicts},
        {"InvalidConfiguration", "2000 threads in a block", too_many_threads},
        {"InvalidValue", "more dynamic shared memory than asked for", not_asked_for},
        {"InvalidValue", "another kernel asked for it", other_asked},
        {"InvalidValue", "asked for more than the GPU has", too_much},
        {"more than 49152", "static and dynamic shared memory too large together", both},
        {"cudaMemcpy: the target is not", "copy of the wrong kind", wrong_kind},
        {"cudaMemcpy: the target is not", "copy too long", too_long},
        {"WRONG", "copy not waited for", not_waited_for},
        {"WRONG", "pinned buffer used again too early", used_again},
        {"WRONG", "no event between two streams", no_event},
        {"during a stream capture", "synchronizing in a capture", capture_waits},
        {"during a stream capture", "allocating in a capture", capture_allocates},
        {"during a stream capture", "default stream in a capture", capture_missed},
        {"pitch that is not a multiple", "cuBLAS with a pitch of 18 bytes", odd_pitch},
        {"pointer not aligned", "cuBLAS with a pointer at 2 bytes", odd_pointer},
        {"types other than", "cuBLAS with types that it has no kernel for", odd_types},
        {"less workspace than", "cuBLAS with too little workspace", no_workspace},
    };
    int n = sizeof faults / sizeof *faults, i = argc > 1 ? atoi(argv[1]) : -1;
    if (i < 0 || i >= n) {
        for (i = 0; i < n; i++) printf("%d\t%s\t%s\n", i, faults[i].message, faults[i].name);
        return 0;
    }
    setvbuf(stdout, nullptr, _IONBF, 0);
    cudaMalloc(&ints, 64 * sizeof(int));
    cudaMalloc(&floats, 64 * sizeof(float));
    cudaMallocHost(&pinned, 64 * sizeof(float));
    cudaMemset(ints, 0, 64 * sizeof(int));
    for (int k = 0; k < 64; k++) pinned[k] = 0;
    cudaStreamCreate(&stream);
    cudaStreamCreate(&other);
    faults[i].commit();
    return 0;
}
