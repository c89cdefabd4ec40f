// time_ssd.cu: how long the kernels of SSD take, shape by shape, alone and in a row.
//
//     nvcc -std=c++20 -O3 -arch=native -Xcompiler -fopenmp dev/cuda/time_ssd.cu -o build/time_ssd \
//         -lcublasLt -lcublas -lz
//     build/time_ssd [documents]
//
// Medians of 15 runs, in ms. A kernel alone is timed between events around it; "all" is the whole
// pass, where a kernel may begin while the last blocks of the one before are running.
#include <vector>
static void launched(const char *function, int line);
#define LAUNCHED() launched(__func__, __LINE__)
#define TESTING
#include "../../train_mamba2.cu"
#include <algorithm>

// ---- events after each kernel -------------------------------------------------------------------

struct Stamp {
    const char *function;
    int line;
    cudaEvent_t event;
};
static std::vector<Stamp> stamps;
static size_t used;
static bool stamping;

static void launched(const char *function, int line) {
    CUDA(cudaGetLastError());
    if (!stamping) return;
    if (used == stamps.size()) {
        stamps.push_back({});
        CUDA(cudaEventCreate(&stamps[used].event));
    }
    stamps[used].function = function;
    stamps[used].line = line;
    CUDA(cudaEventRecord(stamps[used++].event, stream));
}
static float median(std::vector<float> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// The kernels that `pass` launches one by one, then all of it
template<class F> static float time_pass(const char *name, F pass) {
    constexpr int RUNS = 15;
    std::vector<std::vector<float>> each;
    for (int run = -2; run < RUNS; run++) {
        used = 0;
        stamping = true;
        launched("", 0);
        pass();
        stamping = false;
        CUDA(cudaStreamSynchronize(stream));
        each.resize(used - 1);
        for (size_t i = 0; run >= 0 && i + 1 < used; i++) {
            float ms;
            CUDA(cudaEventElapsedTime(&ms, stamps[i].event, stamps[i + 1].event));
            each[i].push_back(ms);
        }
    }
    std::vector<float> all;
    for (int run = -2; run < RUNS; run++) {                // four in a row: launches do not show
        CUDA(cudaEventRecord(stamps[0].event, stream));
        for (int i = 0; i < 4; i++) pass();
        CUDA(cudaEventRecord(stamps[1].event, stream));
        CUDA(cudaStreamSynchronize(stream));
        float ms;
        CUDA(cudaEventElapsedTime(&ms, stamps[0].event, stamps[1].event));
        if (run >= 0) all.push_back(ms / 4);
    }
    printf("  %-9s all %.4f; one by one", name, median(all));
    for (auto &v : each) printf(" %.4f", median(v));
    printf("\n");
    fflush(stdout);
    return median(all);
}

// ---- inputs: hashes of the index ----------------------------------------------------------------

template<typename X> __global__ void fill_kernel(X *x, size_t n, float low, float high) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t u = (uint32_t)i * 2654435761u;
        u ^= u >> 15;
        u *= 2246822519u;
        u ^= u >> 13;
        x[i] = (X)(low + (high - low) * (u >> 8) / (1 << 24));
    }
}
static std::vector<void *> taken;
template<typename X> static X *random_numbers(size_t n, float low, float high) {
    X *x = device_alloc<X>(n);
    taken.push_back(x);
    fill_kernel<X><<<1024, 256, 0, stream>>>(x, n, low, high);
    CUDA(cudaGetLastError());
    return x;
}

static void time_shape(size_t R, size_t T, size_t H, size_t N, bool documents) {
    cpu::Dims c = {};
    c.R = R, c.T = T, c.n = R * T, c.M = H * 32, c.E = H * 64, c.H = H, c.P = 64, c.N = N, c.G = 1;
    c.Q = 128, c.W = 4, c.S = c.E + 2 * N, c.Z = c.E + c.S + H, c.V = 16, c.dt_hi = 1e30;
    c.eps = 1e-5, c.chunks = (T + 127) / 128, c.slab = 8192, c.kept = 1, c.L = 1;
    Dims d(c);
    size_t n = R * T, states = R * d.chunks * H * N * 64;
    bf16 *x = random_numbers<bf16>(n * d.S, -2, 2), *y = random_numbers<bf16>(n * d.E, 0, 0);
    bf16 *g_y = random_numbers<bf16>(n * d.E, -2, 2), *g_x = random_numbers<bf16>(n * d.S, 0, 0);
    bf16 *S = random_numbers<bf16>(states, 0, 0), *gS = random_numbers<bf16>(states, 0, 0);
    float *dt = random_numbers<float>(n * H, 0.001f, 0.1f);
    float *A_log = random_numbers<float>(H, 0, 2.77f), *D = random_numbers<float>(H, 0.5f, 1);
    float *g_dt = random_numbers<float>(n * H, 0, 0), *g_A = random_numbers<float>(H, 0, 0);
    float *g_D = random_numbers<float>(H, 0, 0);
    int *doc = NULL;
    if (documents) {
        std::vector<int> host(n);
        for (size_t i = 0; i < n; i++) host[i] = (int)(i % T / 300);
        taken.push_back(doc = device_alloc<int>(n));
        CUDA(cudaMemcpy(doc, host.data(), n * sizeof(int), cudaMemcpyHostToDevice));
    }
    printf("%zu x %zu, %zu heads, d_state %zu%s\n", R, T, H, N, documents ? ", documents" : "");
    float forward = time_pass("forward", [&] {
        ssd_forward<bf16>(&d, y, S, NULL, x, dt, A_log, D, NULL, doc);
    });
    float backward = time_pass("backward", [&] {
        ssd_backward<bf16>(&d, g_x, g_dt, g_A, g_D, NULL, g_y, NULL, S, gS, x, dt, A_log, D, NULL,
                           doc);
    });
    printf("  together %.4f ms, %.2f ns a token\n", forward + backward,
           (forward + backward) * 1e6 / n);
    for (void *p : taken) CUDA(cudaFree(p));
    taken.clear();
}

int main(int argc, char **argv) {
    bool documents = argc > 1 && !strcmp(argv[1], "documents");
    bool first_only = argc > 1 && !strcmp(argv[1], "130m");
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, 0));
    printf("%s\n", device.name);
    time_shape(32, 1024, 24, 128, documents);
    if (first_only) return 0;
    time_shape(2, 16384, 24, 128, documents);
    time_shape(1, 131072, 24, 128, documents);
    time_shape(8, 4096, 64, 64, documents);
    time_shape(64, 512, 64, 64, documents);
    time_shape(8, 4096, 64, 128, documents);
    time_shape(16, 2048, 80, 128, documents);
    return 0;
}
