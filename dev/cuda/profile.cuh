// profile.cuh: the table of --profile, for train_mamba2.cu. Parts are timed by the events of part;
// beside each stands what it must at least move and calculate, and how near the GPU comes to it.

static const cpu::Dims *opened;            // of the model that trains

static bool in_bf16() { return !strcmp(cpu::flags.dtype, "bf16"); }

// The FLOPs of SSD's forward for a token, of one layer, in chunks of 128 by tiles of 64: a row sees
// 96 columns on average. CB and (CB o L) x go over these; C S and the new state over N and P.
static double ssd_flops(const Dims *d) {
    double GN = (double)(d->G * d->N), HP = (double)(d->H * d->P);
    return 2 * 96 * (GN + HP) + 4 * HP * (double)d->N;
}

// What a part of a step must at least move and calculate, by its formula in the sizes
struct Cost {
    const char *name;
    double times, bytes, flops;            // in a micro-batch; of one time
};
static std::vector<Cost> step_costs(const Dims *d, double params, bool again) {
    double X = in_bf16() ? 2 : 4, resid = cpu::flags.residual_in_fp32 ? 4 : 2;
    double n = (double)d->n, L = (double)d->L, M = (double)d->M, E = (double)d->E, S = (double)d->S;
    double Z = (double)d->Z, H = (double)d->H, F = (double)d->F, V = (double)d->V;
    double states = n / (double)d->Q * H * (double)(d->N * d->P), forward = again ? 2 * L : L;
    double HP = (double)(d->H * d->P), GN = (double)(d->G * d->N), norms = F > 0 ? 2 * L : L;
    std::vector<Cost> costs = {                            // X: bytes of floatX
        {"embed", 1, (4 + resid) * n * M, 0},
        {"norm", (again ? 2 : 1) * norms + 1, (resid + X) * n * M, 0},
        {"conv1d", forward, 2 * X * n * S, 2 * n * S * (double)d->W},
        {"dt", forward, (X + 4) * n * H, 0},
        {"ssd", forward, X * (n * (S + E) + states) + 4 * n * H, n * ssd_flops(d)},
        {"norm_g", forward, 3 * X * n * E, 0},
        {"swiglu", forward, 3 * X * n * F, 0},
        {"classifier", 1, 5 * X * n * V + (2 * X + 4) * V * M, 6 * n * V * M},
        {"g_norm", norms + 1, (3 * resid + (resid > X ? 2 * X : X)) * n * M, 0},
        {"g_swiglu", L, 5 * X * n * F, 0},
        {"g_norm_g", L, 5 * X * n * E, 0},
        {"g_ssd", L, X * (n * (2 * S + E) + 3 * states) + 8 * n * H,
         n * (192 * (2 * HP + 3 * GN) + 8 * HP * (double)d->N)},
        {"g_dt", L, (2 * X + 4) * n * H, 0},
        {"g_conv1d", L, 3 * X * n * S, 4 * n * S * (double)d->W},
        {"g_embed", 1, resid * n * M + 8 * min(n, V) * M, 0},
        {"adamw", 1 / (double)cpu::flags.accum, params * (32 + (X < 4 ? X : 0)), 0},
    };
    auto product = [&](const char *name, const char *gradient, double I, double O, double out) {
        costs.push_back({name, forward, n * (X * I + out * O) + X * I * O, 2 * n * I * O});
        costs.push_back({gradient, L, 2 * X * n * (I + O) + (X + 4) * I * O, 4 * n * I * O});
    };
    product("in_proj", "g_in_proj", M, Z, X);
    product("out_proj", "g_out_proj", E, M, 2 * resid);    // reads and writes the residual stream
    product("fc1", "g_fc1", M, 2 * F, X);
    product("fc2", "g_fc2", F, M, 2 * resid);
    return costs;
}

// Seconds that f takes on the GPU: the least of 5 times
template<class F>
static double gpu_seconds(F f) {
    cudaEvent_t from, to;
    float ms, least = INFINITY;
    CUDA(cudaEventCreate(&from));
    CUDA(cudaEventCreate(&to));
    for (int i = 0; i < 5; i++) {
        CUDA(cudaEventRecord(from, stream));
        f();
        CUDA(cudaEventRecord(to, stream));
        CUDA(cudaEventSynchronize(to));
        CUDA(cudaEventElapsedTime(&ms, from, to));
        least = min(least, ms);
    }
    CUDA(cudaEventDestroy(from));
    CUDA(cudaEventDestroy(to));
    return 1e-3 * (double)least;
}

// What this GPU reaches: bytes a second of a copy, FLOP/s of a square product
struct Ceilings {
    double bytes, flops;
};
#ifdef __CUDACC__
constexpr size_t SIDE = 8192;
#else
constexpr size_t SIDE = 64;                // emulated
#endif
template<typename floatX>
static Ceilings measure_ceilings() {
    size_t count = SIDE * SIDE, bytes = count * sizeof(floatX);
    floatX *a = device_alloc<floatX>(count), *out = device_alloc<floatX>(count);
    CUDA(cudaMemsetAsync(a, 0x3c, bytes, stream));         // small numbers
    double copy = gpu_seconds(
        [&] { CUDA(cudaMemcpyAsync(out, a, bytes, cudaMemcpyDeviceToDevice, stream)); });
    double product = gpu_seconds([&] { linear_forward(out, a, a, SIDE, SIDE, SIDE, 0); });
    CUDA(cudaFree(a));
    CUDA(cudaFree(out));
    return Ceilings{2 * (double)bytes / copy, 2 * (double)count * SIDE / product};
}

// The parts of the profiled steps in the order in which they first came
static void print_parts(const std::vector<Cost> &costs, Ceilings most, double steps, double plain,
                        double profiled) {
    struct Sum {
        const char *name;
        double seconds;
    };
    std::vector<Sum> sums;
    double all = 0;
    for (size_t i = 0; i < profile.marks.size(); i++) {
        size_t k = 0;
        float ms = 0;
        if (i + 1 < profile.marks.size())
            CUDA(cudaEventElapsedTime(&ms, profile.marks[i].event, profile.marks[i + 1].event));
        while (k < sums.size() && strcmp(sums[k].name, profile.marks[i].name)) k++;
        if (k == sums.size()) sums.push_back({profile.marks[i].name, 0});
        sums[k].seconds += 1e-3 * (double)ms / steps;
        all += 1e-3 * (double)ms / steps;
    }
    printf("%-11s %9s %7s %8s %9s  %s\n", "part", "ms a step", "share", "GB/s", "TFLOP/s",
           "of its ceiling");
    for (const Sum &sum : sums) {
        double bytes = 0, flops = 0;
        for (const Cost &c : costs) {
            if (strcmp(c.name, sum.name)) continue;
            bytes = c.times * (double)cpu::flags.accum * c.bytes;
            flops = c.times * (double)cpu::flags.accum * c.flops;
        }
        double by_bytes = bytes / most.bytes, by_flops = flops / most.flops, s = sum.seconds;
        printf("%-11s %9.3f %6.1f%% ", sum.name, 1e3 * s, 100 * s / all);
        if (bytes > 0) {
            printf("%8.0f %9.1f  %3.0f%% of the %s\n", 1e-9 * bytes / s, 1e-12 * flops / s,
                   100 * max(by_bytes, by_flops) / s,
                   by_bytes > by_flops ? "copy's GB/s" : "product's TFLOP/s");
        } else printf("  (copies, and the GPU waiting)\n");
    }
    printf("%-11s %9.3f 100.0%%  a step: %.3f ms with these events, %.3f without%s\n", "sum",
           1e3 * all, 1e3 * profiled, 1e3 * plain,
           cpu::flags.graph ? ", as a CUDA graph" : "");
}

// Two steps to warm up, N without events, N with them
static int gpu_profile(cpu::Int steps) {
    static double start, plain;
    static Ceilings most;
    const cpu::Flags &f = cpu::flags;
    cpu::Int N = min(f.profile, (f.steps - 2) / 2);
    double time = (cpu::now() - start) / (double)N;
    if (steps == 2) {
        most = in_bf16() ? measure_ceilings<bf16>() : measure_ceilings<float>();
        start = cpu::now();
    }
    if (steps == 2 + N) {
        plain = time;
        profile.on = true;
        start = cpu::now();
    }
    if (steps < 2 + 2 * N) return 0;
    cpu::Spec specs[cpu::PARAM_COUNT];
    cpu::param_specs(opened, specs);
    Dims d(*opened);
    double params = (double)cpu::total(specs, cpu::PARAM_COUNT);
    CUDA(cudaStreamSynchronize(stream));
    printf("ceilings: a copy %.0f GB/s, a product of %zu x %zu x %zu %.1f TFLOP/s\n",
           1e-9 * most.bytes, SIDE, SIDE, SIDE, 1e-12 * most.flops);
    print_parts(step_costs(&d, params, opened->kept < opened->L), most, (double)N, plain, time);
    return 1;
}

// MFU = FLOPs of a token x tokens a second / the datasheet's peak. FLOPs are those that the model
// needs, not those that kernels do: forward and backward of the matrix products, 6 for each weight
// of in_proj, out_proj, MLP and head, and 3 times SSD's forward at chunks of 128, where tiles above
// the diagonal are left out (ssd_flops). So neither a worse chunk nor --recompute raises it.
static double gpu_flops(const cpu::Model *m) {
    Dims d(m->d);
    double layer = (double)(d.Z * d.M + d.E * d.M + 3 * d.F * d.M);
    return 6 * ((double)d.L * layer + (double)(d.V * d.M)) + 3 * (double)d.L * ssd_flops(&d);
}

// Dense rates of the datasheets, in TFLOP/s: bf16 tensor cores with sums in float, and float
static double gpu_peak() {
    static const struct { const char *name; double bf16, f32; } peaks[] = {
        {"H100 PCIe", 756, 51}, {"H100 NVL", 835, 60}, {"H100", 989, 67}, {"H200", 989, 67},
        {"H800", 989, 67}, {"GH200", 989, 67}, {"B200", 2250, 75}, {"A100", 312, 19.5},
        {"A800", 312, 19.5}, {"L40S", 362, 91.6}, {"L4", 121, 30.3}, {"A10", 125, 31.2},
        {"RTX 4090", 165, 82.6}, {"RTX 3090", 71, 35.6},
    };
    cudaDeviceProp p;
    CUDA(cudaGetDeviceProperties(&p, (int)cpu::flags.device));
    for (auto &peak : peaks) {
        if (strstr(p.name, peak.name)) return 1e12 * (in_bf16() ? peak.bf16 : peak.f32);
    }
    return 0;
}
