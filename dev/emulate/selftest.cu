// Does the shim do what a GPU does? One source, checked against plain C++ by both:
//   nvcc -std=c++20 -O2 -arch=sm_90 dev/emulate/selftest.cu -lcublasLt -o selftest && ./selftest
//   make test-emulate-shim
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cublasLt.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

typedef __nv_bfloat16 bf16;
#define CHECK(call) check((call) == 0, #call, __LINE__)
static void check(bool ok, const char *what, int line) {
    if (ok) return;
    printf("selftest.cu:%d: failed: %s\n", line, what);
    exit(1);
}

#include "../cuda/ptx.cuh"              // the wrappers that the kernels use

// ---- helpers ------------------------------------------------------------------------------------
template<class T> struct Device {       // n elements on the device, with a way to and fro
    T *p;
    size_t n;
    explicit Device(size_t n) : n(n) { CHECK(cudaMalloc(&p, n * sizeof(T))); }
    explicit Device(const std::vector<T> &v) : Device(v.size()) {
        CHECK(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    Device(const Device &) = delete;
    ~Device() { CHECK(cudaFree(p)); }
    std::vector<T> host() const {
        std::vector<T> v(n);
        CHECK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }
};
static uint32_t random32() {
    static uint64_t s = 1;
    s = s * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(s >> 32);
}
static float uniform() { return (float)(random32() >> 8) / (1 << 23) - 1; }     // -1 to 1
static std::vector<bf16> random_bf16(size_t n) {
    std::vector<bf16> v(n);
    for (bf16 &x : v) x = (bf16)uniform();
    return v;
}
static bool close_to(double got, double want, double bound) { return fabs(got - want) <= bound; }
static bool launched() { return !cudaGetLastError() && !cudaDeviceSynchronize(); }

// ---- built-in variables -------------------------------------------------------------------------
__global__ void number_kernel(unsigned *out) {
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
static bool test_numbers() {
    unsigned blocks = 2 * 3 * 4, threads = 5 * 3 * 7;
    Device<unsigned> out(blocks * threads);
    number_kernel<<<dim3(2, 3, 4), dim3(5, 3, 7)>>>(out.p);
    bool ok = launched();
    std::vector<unsigned> v = out.host();
    for (unsigned i = 0; i < v.size(); i++) ok &= v[i] == i / threads * 1000 + i % threads;
    return ok;
}

// ---- shuffles and votes -------------------------------------------------------------------------
__global__ void shuffle_kernel(double *out, int width) {
    int l = threadIdx.x;
    double v = 100 + l;
    out[l] = __shfl_sync(~0u, v, l * 5 + 3, width);
    out[32 + l] = __shfl_up_sync(~0u, v, 3, width);
    out[64 + l] = __shfl_xor_sync(~0u, v, 5, width);
    out[96 + l] = 0;
    if (l % 4 == 1) out[96 + l] = __shfl_sync(0x22222222, (float)v, l + 4);     // 8 lanes only
}
static bool test_shuffles() {
    bool ok = true;
    for (int width = 32; width >= 8; width /= 4) {
        Device<double> out(128);
        shuffle_kernel<<<1, 32>>>(out.p, width);
        ok &= launched();
        std::vector<double> v = out.host();
        for (int l = 0; l < 32; l++) {
            int first = l / width * width, i = l % width;
            auto is = [&](int row, int lane) { ok &= v[32 * row + l] == 100 + lane; };
            is(0, first + (i * 5 + first * 5 + 3) % width);
            is(1, i < 3 ? l : l - 3);
            is(2, l ^ 5);
            ok &= v[96 + l] == (l % 4 == 1 ? 100 + (l + 4) % 32 : 0);
        }
    }
    return ok;
}
__global__ void vote_kernel(unsigned *out) {
    int l = threadIdx.x;
    if (l < 24) {
        unsigned b = __ballot_sync(0xffffff, l % 3 == 0);
        if (l == 0) out[0] = b;
    }
}
static bool test_votes() {
    Device<unsigned> out(1);
    vote_kernel<<<1, 32>>>(out.p);
    bool ok = launched();
    unsigned thirds = 0;
    for (int l = 0; l < 24; l += 3) thirds |= 1u << l;
    return ok && out.host()[0] == thirds;
}

// ---- shared memory and barriers -----------------------------------------------------------------
__global__ void reverse_kernel(int *out, int rounds) {
    __shared__ int a[256], b[256];
    extern __shared__ int sums[];
    int t = threadIdx.x;
    a[t] = t;
    for (int r = 0; r < rounds; r++) {
        __syncthreads();
        b[t] = a[255 - t] + 1;
        __syncthreads();
        a[t] = b[t];
    }
    int v = a[t];
    for (int m = 16; m; m /= 2) v += __shfl_xor_sync(~0u, v, m);
    if (t % 32 == 0) sums[t / 32] = v;
    __syncthreads();
    for (int w = 0; w < 8; w++) v += w == t / 32 ? 0 : sums[w];
    out[blockIdx.x * 256 + t] = v;
}
static bool test_barriers() {
    Device<int> out(3 * 256);
    reverse_kernel<<<3, 256, 8 * sizeof(int)>>>(out.p, 3);
    bool ok = launched();
    for (int v : out.host()) ok &= v == 255 * 256 / 2 + 3 * 256;
    return ok;
}
// Warps 0 and 1 fill two buffers in turn, 2 and 3 add them up: a numbered barrier for each buffer,
// at which the two kinds meet at different lines.
__global__ void roles_kernel(int *out, int rounds) {
    __shared__ int buffer[2][64];
    int t = threadIdx.x % 64, sum = 0;
    for (int r = 0; r < rounds; r++) {
        int full = 1 + r % 2;
        if (threadIdx.x < 64) {
            buffer[r % 2][t] = r * 100 + t;
            barrier_wait(full, 128);
        } else {
            barrier_wait(full, 128);
            sum += buffer[r % 2][63 - t];
        }
    }
    if (threadIdx.x >= 64) out[t] = sum;
}
static bool test_named_barriers() {
    Device<int> out(64);
    roles_kernel<<<1, 128>>>(out.p, 9);
    bool ok = launched();
    std::vector<int> v = out.host();
    for (int t = 0; t < 64; t++) ok &= v[t] == 3600 + 9 * (63 - t);
    return ok;
}
__global__ void big_shared_kernel(int *out, int n) {
    __shared__ int last[32];
    extern __shared__ int numbers[];
    for (int i = threadIdx.x; i < n; i += 32) numbers[i] = i;
    __syncthreads();
    last[threadIdx.x] = numbers[n - 1 - threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = last[31 - threadIdx.x];
}
static bool test_shared_limits() {
    Device<int> out(32);
    int most;
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    int room = most - 128, n = room / 4;            // 128 bytes are static
    big_shared_kernel<<<1, 32, room>>>(out.p, n);
    bool ok = cudaGetLastError() == cudaErrorInvalidValue;          // did not ask for so much
    auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    ok &= cudaFuncSetAttribute(big_shared_kernel, limit, most + 1) == cudaErrorInvalidValue;
    cudaGetLastError();
    ok &= !cudaFuncSetAttribute(big_shared_kernel, limit, room);
    big_shared_kernel<<<1, 32, room>>>(out.p, n);
    ok &= launched();
    std::vector<int> v = out.host();
    for (int t = 0; t < 32; t++) ok &= v[t] == n - 32 + t;
    return ok;
}

// ---- intrinsics ---------------------------------------------------------------------------------
__global__ void intrinsic_kernel(float *f, int *i) {
    f[0] = __fdividef(3.0f, 2.0f), f[1] = __uint_as_float(0x40490fdbu);
    f[2] = max(1.0f, 2.5f), f[3] = min(3.0f, -2.0f);
    i[0] = __ffs(0x50);
}
static bool test_intrinsics() {
    Device<float> f(4);
    Device<int> i(1);
    intrinsic_kernel<<<1, 1>>>(f.p, i.p);
    bool ok = launched();
    std::vector<float> got = f.host();
    const float want[] = {1.5f, 3.14159274f, 2.5f, -2};
    for (int k = 0; k < 4; k++) ok &= close_to(got[k], want[k], 1e-6);
    return ok && i.host()[0] == 5;
}

// ---- bf16 ---------------------------------------------------------------------------------------
// By the definition, in double: the nearest of the two neighbours, the even one in a tie.
static unsigned short nearest_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f) return 0x7fff;
    uint32_t below = u >> 16, step = u & 0xffff;    // by magnitude
    return (unsigned short)(below + (step > 0x8000 || (step == 0x8000 && below % 2)));
}
__global__ void bf16_kernel(unsigned short *out, float *back, const float *in, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    bf16 h = (bf16)in[i];
    out[i] = __bfloat16_as_ushort(h);
    back[i] = (float)__ushort_as_bfloat16((unsigned short)i);
}
static bool test_bf16() {
    int n = 1 << 16;
    std::vector<float> in(n);
    for (int i = 0; i < n; i++) {                   // every encoding, with ties and near ties
        uint32_t low[] = {0, 0x8000, 0x7fff, 0x8001}, u = (uint32_t)i << 16 | low[i / 7 % 4];
        memcpy(&in[i], &u, 4);
    }
    Device<float> x(in), back(n);
    Device<unsigned short> out(n);
    bf16_kernel<<<n / 128, 128>>>(out.p, back.p, x.p, n);
    bool ok = launched();
    std::vector<unsigned short> v = out.host();
    std::vector<float> f = back.host();
    for (int i = 0; i < n; i++) {
        uint32_t u = (uint32_t)i << 16, got;
        memcpy(&got, &f[i], 4);
        bool nan = (u & 0x7fffffff) > 0x7f800000;
        ok &= v[i] == nearest_bf16(in[i]) && (nan ? f[i] != f[i] : got == u);
        ok &= __bfloat16_as_ushort((bf16)in[i]) == v[i];            // on the host too
    }
    return ok;
}

// ---- tensor cores -------------------------------------------------------------------------------
// D (16,8) = A (16,16) B (16,8), from registers by the layout in the PTX manual.
__global__ void mma_kernel(float *D, const bf16 *A, const bf16 *B) {
    int l = threadIdx.x, g = l / 4, t = l % 4;
    auto pair = [](bf16 low, bf16 high) {
        return (uint32_t)__bfloat16_as_ushort(low) | (uint32_t)__bfloat16_as_ushort(high) << 16;
    };
    uint32_t a[4], b[2];
    for (int r = 0; r < 4; r++) {
        const bf16 *p = A + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
        a[r] = pair(p[0], p[1]);
    }
    for (int r = 0; r < 2; r++) {
        const bf16 *p = B + (2 * t + 8 * r) * 8 + g;
        b[r] = pair(p[0], p[8]);
    }
    float d[4] = {1, 1, 1, 1};
    mma(d, a, b);
    for (int r = 0; r < 4; r++) D[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = d[r];
}
static bool test_mma() {
    std::vector<bf16> A = random_bf16(16 * 16), B = random_bf16(16 * 8);
    Device<bf16> a(A), b(B);
    Device<float> d(16 * 8);
    mma_kernel<<<1, 32>>>(d.p, a.p, b.p);
    bool ok = launched();
    std::vector<float> v = d.host();
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = 1;
            for (int k = 0; k < 16; k++) sum += (double)(float)A[i * 16 + k] * (float)B[k * 8 + j];
            ok &= close_to(v[i * 8 + j], sum, 1e-5);
        }
    return ok;
}
// Two loads of four 8x8 matrices that lie below each other: plain, then transposed. The first ones
// are stored again, in descending order.
__global__ void ldmatrix_kernel(unsigned short *out, const unsigned short *in) {
    __shared__ __align__(16) unsigned short rows[32][24];
    int l = threadIdx.x;
    for (int c = 0; c < 8; c++) rows[l][c] = in[8 * l + c];
    __syncwarp();
    uint32_t r[2][4];
    ldmatrix(r[0], rows[l]);
    ldmatrix_trans(r[1], rows[l]);
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 4; i++) {
            unsigned short *p = out + ((k * 4 + i) * 32 + l) * 2;
            p[0] = (unsigned short)r[k][i], p[1] = (unsigned short)(r[k][i] >> 16);
        }
    __syncwarp();
    stmatrix(rows[(l & 7) | (24 - (l & 24))], r[0]);
    __syncwarp();
    for (int c = 0; c < 8; c++) out[512 + 8 * l + c] = rows[l][c];
}
static bool test_ldmatrix() {
    std::vector<unsigned short> in(256);
    for (unsigned short &x : in) x = (unsigned short)random32();
    Device<unsigned short> x(in), out(768);
    ldmatrix_kernel<<<1, 32>>>(out.p, x.p);
    bool ok = launched();
    std::vector<unsigned short> v = out.host();
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < 2; h++) {
                int row = l / 4, col = 2 * (l % 4) + h;
                ok &= v[(i * 32 + l) * 2 + h] == in[64 * i + 8 * row + col];
                ok &= v[((4 + i) * 32 + l) * 2 + h] == in[64 * i + 8 * col + row];
            }
    for (int i = 0; i < 256; i++) ok &= v[512 + i] == in[(i & 63) | (192 - (i & 192))];
    return ok;
}
// Three groups of copies, waited for one by one, the last in pieces of 4 bytes; lanes from 24 on
// copy zeros.
__global__ void cp_async_kernel(uint4 *out, const uint4 *in) {
    __shared__ uint4 s[3][32];
    int l = threadIdx.x;
    for (int k = 0; k < 3; k++) {
        const unsigned *from = (const unsigned *)(in + 32 * k + l);
        if (k < 2) cp_async<16>(&s[k][l], from, l < 24);
        else for (int i = 0; i < 4; i++) cp_async<4>((unsigned *)&s[k][l] + i, from + i, l < 24);
        cp_async_commit();
    }
    cp_async_wait<2>();
    __syncthreads();
    out[l] = s[0][31 - l];
    cp_async_wait<0>();
    __syncthreads();
    out[32 + l] = s[1][31 - l];
    out[64 + l] = s[2][31 - l];
}
static bool test_cp_async() {
    std::vector<uint4> in(96);
    for (uint4 &x : in) x = make_uint4(random32(), random32(), random32(), random32());
    Device<uint4> x(in), out(96);
    cp_async_kernel<<<1, 32>>>(out.p, x.p);
    bool ok = launched();
    std::vector<uint4> v = out.host();
    const uint4 zero = {0, 0, 0, 0};
    for (int i = 0; i < 96; i++) {
        int from = i / 32 * 32 + 31 - i % 32;
        ok &= !memcmp(&v[i], from % 32 < 24 ? &in[from] : &zero, sizeof zero);
    }
    return ok;
}

__global__ void pairs_kernel(uint32_t *product, float *power, const uint32_t *a,
                             const uint32_t *b) {
    int i = threadIdx.x;
    product[i] = mul_bf16x2(a[i], b[i]);
    power[i] = exp2_fast((float)i / 8 - 16);
}
static bool test_pairs_and_powers() {
    std::vector<bf16> a = random_bf16(512), b = random_bf16(512);
    a[0] = (bf16)-0.0f;
    std::vector<uint32_t> x(256), y(256);
    memcpy(x.data(), a.data(), 1024);
    memcpy(y.data(), b.data(), 1024);
    Device<uint32_t> dx(x), dy(y), product(256);
    Device<float> power(256);
    pairs_kernel<<<1, 256>>>(product.p, power.p, dx.p, dy.p);
    bool ok = launched();
    std::vector<uint32_t> got = product.host();
    std::vector<float> powers = power.host();
    for (int i = 0; i < 512; i++) {                 // rounded once
        unsigned short want = nearest_bf16((float)a[i] * (float)b[i]);
        ok &= (unsigned short)(got[i / 2] >> i % 2 * 16) == want;
    }
    for (int i = 0; i < 256; i++)
        ok &= close_to(powers[i] / exp2((double)i / 8 - 16), 1, 3e-7);
    return ok;
}

// ---- copies, large buffers ----------------------------------------------------------------------
static bool test_copies() {
    std::vector<int> in(60);
    for (int i = 0; i < 60; i++) in[i] = i;
    Device<int> x(in), y(60);
    CHECK(cudaMemset(y.p, 0, 60 * sizeof(int)));
    CHECK(cudaMemcpy(y.p + 10, x.p, 20 * sizeof(int), cudaMemcpyDeviceToDevice));
    bool ok = true;
    std::vector<int> out = y.host();
    for (int i = 0; i < 60; i++) ok &= out[i] == (i >= 10 && i < 30 ? i - 10 : 0);
    size_t before, after, total;
    CHECK(cudaMemGetInfo(&before, &total));
    Device<char> big(8 << 20);
    CHECK(cudaMemGetInfo(&after, &total));
    return ok && before <= total && before - after >= 8u << 20;
}
__global__ void far_kernel(float *x, size_t pitch) {
    x[threadIdx.x * pitch + threadIdx.x] = (float)threadIdx.x;
}
static bool test_far_offsets() {                    // elements beyond 2^31
    size_t pitch = (1ull << 31) / 30;
    Device<float> x(31 * pitch + 32);
    far_kernel<<<1, 32>>>(x.p, pitch);
    bool ok = launched();
    for (size_t t = 0; t < 32; t++) {
        float v = -1;
        CHECK(cudaMemcpy(&v, x.p + t * pitch + t, 4, cudaMemcpyDeviceToHost));
        ok &= v == (float)t;
    }
    return ok;
}

// ---- streams, events, graphs, launch attributes -------------------------------------------------
__global__ void add_kernel(int *to, const int *from, int n, int plus) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) to[i] += from[i] + plus;
}
static bool test_streams() {
    const int n = 1000;
    cudaStream_t work, copy;
    cudaEvent_t begin, done;
    CHECK(cudaStreamCreate(&work));
    CHECK(cudaStreamCreate(&copy));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&done));
    int *pinned;
    CHECK(cudaMallocHost(&pinned, n * sizeof(int)));
    Device<int> to(std::vector<int>(n, 1)), from(std::vector<int>(n, 10));
    CHECK(cudaEventRecord(begin, work));
    add_kernel<<<8, 128, 0, work>>>(to.p, from.p, n, 5);
    CHECK(cudaEventRecord(done, work));
    CHECK(cudaStreamWaitEvent(copy, done, 0));
    CHECK(cudaMemcpyAsync(pinned, to.p, n * sizeof(int), cudaMemcpyDeviceToHost, copy));
    CHECK(cudaStreamSynchronize(copy));
    bool ok = true;
    for (int i = 0; i < n; i++) ok &= pinned[i] == 16;
    float ms = -1;
    CHECK(cudaEventElapsedTime(&ms, begin, done));
    CHECK(cudaFreeHost(pinned));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(done));
    return ok && ms >= 0;
}
static bool test_graph() {
    const int n = 100;
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK(cudaStreamCreate(&s));
    Device<int> x(std::vector<int>(n, 0)), y(std::vector<int>(n, 1)), z(std::vector<int>(n, 9));
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    CHECK(cudaMemsetAsync(z.p, 0, n * sizeof(int), s));
    for (int plus = 1; plus <= 3; plus++) add_kernel<<<1, 128, 0, s>>>(x.p, y.p, n, plus);
    CHECK(cudaMemcpyAsync(z.p, x.p, n / 2 * sizeof(int), cudaMemcpyDeviceToDevice, s));
    CHECK(cudaStreamEndCapture(s, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    bool ok = x.host()[0] == 0 && z.host()[0] == 9;             // nothing has run yet
    for (int times = 0; times < 4; times++) CHECK(cudaGraphLaunch(replay, s));
    CHECK(cudaStreamSynchronize(s));
    std::vector<int> a = x.host(), b = z.host();
    for (int i = 0; i < n; i++) ok &= a[i] == 4 * 9 && b[i] == (i < n / 2 ? 36 : 0);
    CHECK(cudaGraphExecDestroy(replay));
    CHECK(cudaGraphDestroy(graph));
    return ok;
}
static bool test_launch_ex() {
    Device<int> x(std::vector<int>(64, 1)), y(std::vector<int>(64, 2));
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2), config.blockDim = dim3(32);
    int major;
    CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    config.attrs = &early, config.numAttrs = major >= 9;
    CHECK(cudaLaunchKernelEx(&config, add_kernel, x.p, (const int *)y.p, 64, 3));
    bool ok = launched();
    for (int v : x.host()) ok &= v == 6;
    return ok;
}

// ---- cooperative launches, numbers from block to block ------------------------------------------
// In each round all threads get the numbers of all others, and send their mean. They alternate
// between two rows: who sends a row again has heard from all that they have read it. One result
// goes to pinned memory.
__global__ void send_kernel(float *rows, float *result, int rounds) {
    int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine = (float)(i % 8);
    for (int r = 0; r < rounds; r++) {
        float *x = rows + r % 2 * n;
        send(x + i, mine, r / 2 + 1);
        double sum = 0;                             // of float numbers but for their last bit
        for (int k = 0; k < n; k += 8) {
            float4 four = receive4(x + k, r / 2 + 1);
            sum += (double)four.x + four.y + four.z + four.w;
            for (int m = 4; m < 8; m++) {
                sum += receive(x + k + m, r / 2 + 1);
            }
        }
        mine = (float)(sum / n);
    }
    if (i == n - 1) *result = mine;
}
static bool test_cooperative() {
    const int threads = 64, rounds = 5;
    int multiprocessors, fit, able;
    CHECK(cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, 0));
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, send_kernel, threads, 0));
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaStream_t s;
    CHECK(cudaStreamCreate(&s));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(multiprocessors * fit + 1), config.blockDim = dim3(threads);
    config.stream = s, config.attrs = &together, config.numAttrs = 1;
    size_t n = multiprocessors * threads;
    Device<float> rows(2 * n);
    float *result;
    CHECK(cudaMallocHost(&result, sizeof *result));
    bool ok = able && cudaLaunchKernelEx(&config, send_kernel, rows.p, result, rounds)
        == cudaErrorCooperativeLaunchTooLarge;
    cudaGetLastError();
    config.gridDim = dim3(multiprocessors);
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < 2; i++) {
        CHECK(cudaMemsetAsync(rows.p, 0, 2 * n * sizeof(float), s));
        CHECK(cudaLaunchKernelEx(&config, send_kernel, rows.p, result, rounds));
    }
    CHECK(cudaStreamEndCapture(s, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    for (int times = 0; times < 3; times++) {
        *result = -1;
        CHECK(cudaGraphLaunch(replay, s));
        CHECK(cudaStreamSynchronize(s));
        ok &= fabsf(*result - 3.5f) < 1e-5f;
    }
    CHECK(cudaGraphExecDestroy(replay));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaFreeHost(result));
    return ok;
}

// ---- cuBLASLt -----------------------------------------------------------------------------------
struct Case { bool bf16_in, bf16_out, transA, transB; int m, n, k; float beta; };
static double element(const float *x, bool trans, int pitch, int i, int j) {
    return trans ? x[j + (size_t)i * pitch] : x[i + (size_t)j * pitch];
}
static std::vector<bf16> narrow(const std::vector<float> &v) { return {v.begin(), v.end()}; }
static std::vector<float> widen(const std::vector<bf16> &v) { return {v.begin(), v.end()}; }
static cublasLtMatrixLayout_t layout(cudaDataType type, int rows, int cols, int pitch) {
    cublasLtMatrixLayout_t l;
    CHECK(cublasLtMatrixLayoutCreate(&l, type, rows, cols, pitch));
    return l;
}
static bool run_matmul(const Case &c, void *A, void *B, void *D, int pitches[3]) {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    size_t room = 1 << 20;
    float alpha = 0.5f, beta = c.beta;
    cudaDataType in = c.bf16_in ? CUDA_R_16BF : CUDA_R_32F;
    cudaDataType out = c.bf16_out ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t ta = c.transA ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t tb = c.transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    CHECK(cublasLtCreate(&handle));
    auto compute = c.bf16_in ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_PEDANTIC;
    CHECK(cublasLtMatmulDescCreate(&desc, compute, CUDA_R_32F));
    CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
    CHECK(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
    auto a = layout(in, c.transA ? c.k : c.m, c.transA ? c.m : c.k, pitches[0]);
    auto b = layout(in, c.transB ? c.n : c.k, c.transB ? c.k : c.n, pitches[1]);
    auto d = layout(out, c.m, c.n, pitches[2]);
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &room, sizeof room));
    // not OUTPUT_TYPE: parts of a sum would be rounded to bf16 before they are added up
    uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    CHECK(cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes));
    CHECK(cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, d, d, preference, 1, &result, &found));
    bool ok = found == 1 && result.workspaceSize <= room;
    Device<char> work(room);
    CHECK(cublasLtMatmul(handle, desc, &alpha, A, a, B, b, &beta, D, d, D, d, &result.algo, work.p,
                         room, nullptr));
    CHECK(cudaDeviceSynchronize());
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    return ok;
}
static bool test_one_matmul(const Case &c) {
    int pitches[3] = {(c.transA ? c.k : c.m) + 8, c.transB ? c.n : c.k, c.m + 16};
    size_t sizes[3] = {(size_t)pitches[0] * (c.transA ? c.m : c.k),
                       (size_t)pitches[1] * (c.transB ? c.k : c.n), (size_t)pitches[2] * c.n};
    std::vector<float> x[3];                        // A, B, C: numbers that bf16 has
    for (int i = 0; i < 3; i++) x[i] = widen(random_bf16(sizes[i]));
    Device<float> A(x[0]), B(x[1]), D(x[2]);
    Device<bf16> hA(narrow(x[0])), hB(narrow(x[1])), hD(narrow(x[2]));
    void *a = c.bf16_in ? (void *)hA.p : A.p, *b = c.bf16_in ? (void *)hB.p : B.p;
    bool ok = run_matmul(c, a, b, c.bf16_out ? (void *)hD.p : D.p, pitches);
    std::vector<float> got = c.bf16_out ? widen(hD.host()) : D.host();
    for (int i = 0; i < pitches[2]; i++)
        for (int j = 0; j < c.n; j++) {
            size_t at = i + (size_t)j * pitches[2];
            double before = c.beta * x[2][at], sum = before;
            for (int k = 0; k < c.k && i < c.m; k++)
                sum += 0.5 * element(x[0].data(), c.transA, pitches[0], i, k)
                           * element(x[1].data(), c.transB, pitches[1], k, j);
            double want = i < c.m ? sum : x[2][at];                 // what pads a column stays
            // a sum in bf16: an H200 rounds the product, and then the sum
            double room = fabs(want) + (c.beta ? fabs(want - before) : 0);
            ok &= close_to(got[at], want, c.bf16_out ? room / 256 + 1e-5 : 1e-5);
        }
    return ok;
}
static bool test_cublas() {
    bool ok = true;
    for (int i = 0; i < 16; i++) {
        bool bf16_in = i & 1, bf16_out = bf16_in && i & 2, transA = i & 4, transB = i & 8;
        ok &= test_one_matmul({bf16_in, bf16_out, transA, transB, 24, 40, 56, 0});
        ok &= test_one_matmul({bf16_in, bf16_out, transA, transB, 24, 40, 56, 1});
    }
    return ok;
}

// ---- what only the shim has ---------------------------------------------------------------------
#ifdef __CUDACC__
static bool test_shim() { return true; }
#else
__global__ void conflict_kernel(int pitch) {
    extern __shared__ __align__(128) unsigned short rows[];
    for (int i = threadIdx.x; i < 32 * pitch; i += 32) rows[i] = 0;
    __syncwarp();
    uint32_t r[4];
    ldmatrix(r, rows + threadIdx.x * pitch);
}
static unsigned long long conflicts(int pitch) {
    unsigned long long before = emu::kernels[(const void *)conflict_kernel].conflicts;
    conflict_kernel<<<1, 32, 64 * 72>>>(pitch);
    CHECK(cudaDeviceSynchronize());
    return emu::kernels[(const void *)conflict_kernel].conflicts - before;
}
static bool test_shim() {
    // rows of 128 bytes: all eight of a matrix in one place; of 144: none; of 64: four in each
    bool ok = conflicts(64) == 4 * 7 && conflicts(72) == 0 && conflicts(32) == 4 * 3;
    Device<float> fresh(3);
    for (float v : fresh.host()) ok &= v != v;
    return ok;
}
#endif

int main() {
    struct { const char *name; bool (*run)(); } tests[] = {
        {"thread and block numbers", test_numbers}, {"shuffles", test_shuffles},
        {"votes", test_votes},
        {"barriers and shared memory", test_barriers}, {"numbered barriers", test_named_barriers},
        {"limits of shared memory", test_shared_limits},
        {"intrinsics", test_intrinsics}, {"bf16", test_bf16}, {"mma", test_mma},
        {"ldmatrix, stmatrix", test_ldmatrix}, {"cp.async", test_cp_async},
        {"pairs of bf16, exp2", test_pairs_and_powers}, {"copies", test_copies},
        {"offsets beyond 2^31", test_far_offsets}, {"streams and events", test_streams},
        {"graph", test_graph}, {"cudaLaunchKernelEx", test_launch_ex},
        {"cooperative launch, send and receive, pinned memory", test_cooperative},
        {"cublasLtMatmul", test_cublas},
        {"conflicts and fresh memory", test_shim},
    };
    int passed = 0, failed = 0;
    for (auto &t : tests) {
        bool ok = t.run();
        ok ? passed++ : failed++;
        if (!ok) printf("%s: WRONG\n", t.name);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
