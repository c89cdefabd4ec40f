// test_ops.cu: every op of train_mamba2.cu against the CPU's in float64, at odd sizes, in float and
// bf16.
//
// Builds with nvcc for a GPU and through dev/emulate for a CPU. `test_ops` runs all; `test_ops
// quick` leaves out the larger cases (for sanitizers). A line for each tensor: the GPU's error, the
// CPU's in float32 for the measure, the verdict; exit 1 if one is wrong. Errors are root mean
// squares of the differences over that of the reference, and a NaN is never right.
//   float   at most twice the CPU's error and 2e-6: sums are in another order
//   bf16    at most 4 roundings, 4 * 2^-8 / sqrt(12) = 4.5e-3; g_A_log, a small difference of large
//           sums, 1.5e-2
#define TESTING
#include "../../train_mamba2.cu"
#include <vector>

typedef std::vector<double> Values;
static int passed, failed;

// ---- numbers here, on the device, and in float32 ------------------------------------------------

static double uniform() {
    static uint64_t i;
    return cpu::random_uniform(1, 0, i++);
}
static Values normals(size_t count, double scale = 1) {
    static uint64_t i;
    Values v(count);
    for (double &x : v) x = scale * cpu::random_normal(2, 0, i++);
    return v;
}

static std::vector<void *> on_device;               // of the current case
static void free_device() {
    for (void *p : on_device) CUDA(cudaFree(p));
    on_device.clear();
}
template<typename X> static X *room(size_t count) { // filled with NaN
    X *p = device_alloc<X>(count);
    CUDA(cudaMemset(p, 0xff, count * sizeof(X)));
    on_device.push_back(p);
    return p;
}
template<typename X> static X *put(Values &v) {     // rounds v as the device will have it
    std::vector<X> rounded(v.size());
    for (size_t i = 0; i < v.size(); i++) {
        rounded[i] = (X)(float)v[i];
        v[i] = (double)(float)rounded[i];
    }
    X *p = room<X>(v.size());
    CUDA(cudaMemcpy(p, rounded.data(), v.size() * sizeof(X), cudaMemcpyHostToDevice));
    return p;
}
static int *put(const std::vector<int> &v) {
    int *p = room<int>(v.size());
    CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(int), cudaMemcpyHostToDevice));
    return p;
}
template<typename X> static Values get(const X *p, size_t count) {
    std::vector<float> v(count);
    download(v.data(), p, 1, count, count);
    return Values(v.begin(), v.end());
}
static std::vector<float> narrowed(const Values &v) {
    return std::vector<float>(v.begin(), v.end());
}

// Columns from..to of rows of `pitch`
template<typename V>
static Values columns(const V &v, size_t pitch, size_t from, size_t to) {
    Values part;
    for (size_t i = 0; i < v.size(); i += pitch) part.insert(part.end(), &v[i] + from, &v[i] + to);
    return part;
}

static double error(const Values &got, const Values &want) {
    double square = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++) {
        square += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return square == 0 ? 0 : sqrt(square / (size > 0 ? size : 1));
}
static void check(const char *name, const Values &want, const Values &gpu, const Values &cpu_float,
                  double bf16_bound = 0) {          // 0: float arithmetic, whatever floatX is
    double e = error(gpu, want), c = error(cpu_float, want);
    bool right = e <= (bf16_bound > 0 ? bf16_bound : 2 * c + 2e-6);
    printf("  %-10s %.2e  (CPU float %.2e)%s\n", name, e, c, right ? "" : "  WRONG");
    right ? passed++ : failed++;
}
static void check(const char *name, const Values &want, const Values &gpu,
                  const std::vector<float> &cpu_float, double bf16_bound = 0) {
    check(name, want, gpu, Values(cpu_float.begin(), cpu_float.end()), bf16_bound);
}

// ---- sizes --------------------------------------------------------------------------------------

struct Sizes {
    size_t R, T, M, H, P, N, G, Q, W, F, V;
};
template<class D> static D dims(const Sizes &s) {   // cpu::Dims or cpu64::Dims
    D d = {};
    d.R = s.R, d.T = s.T, d.n = s.R * s.T, d.M = s.M, d.H = s.H, d.P = s.P, d.N = s.N, d.G = s.G;
    d.Q = s.Q, d.W = s.W, d.F = s.F, d.V = s.V, d.E = s.H * s.P, d.L = d.kept = 1;
    d.S = d.E + 2 * d.G * d.N, d.Z = d.E + d.S + d.H;
    d.chunks = pieces(d.T, d.Q), d.slab = 8, d.dt_hi = 1e30, d.eps = 1e-5;
    return d;
}
static std::vector<int> documents(const Sizes &s, double rate) {
    std::vector<int> doc(s.R * s.T);
    for (size_t i = 0; i < doc.size(); i++)
        doc[i] = (i % s.T ? doc[i - 1] : 0) + (uniform() < rate);
    return doc;
}
template<typename floatX> static double bound(double at_bf16 = 4.5e-3) {
    return sizeof(floatX) == sizeof(float) ? 0 : at_bf16;
}

// ---- ssd ----------------------------------------------------------------------------------------

template<typename floatX>
static void test_ssd(const Sizes &s, bool with_states, double rate, double longest_dt = 0.1) {
    auto c = dims<cpu::Dims>(s);
    auto c64 = dims<cpu64::Dims>(s);
    Dims d(c);
    size_t n = d.n, H = d.H, state = d.R * H * d.N * d.P, states = state * d.chunks;
    printf("ssd %s: %zu x %zu, H %zu P %zu N %zu G %zu Q %zu%s%s\n",
           sizeof(floatX) == 4 ? "float" : "bf16", s.R, s.T, s.H, s.P, s.N, s.G, s.Q,
           with_states ? ", initial and final states" : "", rate > 0 ? ", documents" : "");
    Values xBC = normals(n * d.S), D = normals(H), initial = normals(state), g_y = normals(n * d.E);
    Values g_final = normals(state), dt(n * H), A_log(H);
    for (double &x : dt) x = longest_dt * exp(-4.6 * uniform());
    for (double &x : A_log) x = 2.77 * uniform();
    std::vector<int> docs = documents(s, rate);
    const int *doc = rate > 0 ? docs.data() : NULL, *gpu_doc = rate > 0 ? put(docs) : NULL;

    floatX *x = put<floatX>(xBC), *gy = put<floatX>(g_y), *y = room<floatX>(n * d.E);
    floatX *S = room<floatX>(states), *gS = room<floatX>(states), *g_x = room<floatX>(n * d.S);
    float *dts = put<float>(dt), *a = put<float>(A_log), *skip = put<float>(D);
    float *s0 = put<float>(initial), *gf = put<float>(g_final), *last = room<float>(state);
    float *g_dt = room<float>(n * H), *g_A = room<float>(H), *g_D = room<float>(H);
    float *g_s0 = room<float>(state);
    if (!with_states) s0 = gf = last = g_s0 = NULL;
    Values got[2][4];
    for (int run = 0; run < 2; run++) {             // twice: equal bits
        CUDA(cudaMemset(g_A, 0, H * sizeof(float)));
        CUDA(cudaMemset(g_D, 0, H * sizeof(float)));
        ssd_forward(&d, y, S, last, x, dts, a, skip, s0, gpu_doc);
        ssd_backward(&d, g_x, g_dt, g_A, g_D, g_s0, gy, gf, S, gS, x, dts, a, skip, s0, gpu_doc);
        got[run][0] = get(y, n * d.E);
        got[run][1] = get(g_x, n * d.S);
        got[run][2] = get(g_dt, n * H);
        got[run][3] = get(g_A, H);
    }
    for (int i = 0; i < 4; i++) {
        bool same = got[0][i] == got[1][i];
        same ? passed++ : failed++;
        if (!same) printf("  two runs differ, WRONG\n");
    }

    auto judge = [&](auto *model, auto forward, auto backward, auto convert) {
        (void)model;
        typedef decltype(convert(xBC)) V;
        V xs = convert(xBC), ds = convert(dt), as = convert(A_log), Ds = convert(D);
        V is = convert(initial), gys = convert(g_y), gfs = convert(g_final);
        std::vector<V> out = {V(n * d.E), V(states), V(state), V(n * d.S), V(n * H), V(H), V(H),
                              V(state), V(states)};
        auto *i = with_states ? is.data() : NULL;
        forward(out[0].data(), out[1].data(), out[2].data(), xs.data(), ds.data(), as.data(),
                Ds.data(), i, doc);
        backward(out[3].data(), out[4].data(), out[5].data(), out[6].data(),
                 with_states ? out[7].data() : NULL, gys.data(), with_states ? gfs.data() : NULL,
                 out[1].data(), out[8].data(), xs.data(), ds.data(), as.data(), Ds.data(), i, doc);
        return out;
    };
    auto want = judge(&c64, [&](auto... v) { cpu64::ssd_forward(&c64, v...); },
                      [&](auto... v) { cpu64::ssd_backward(&c64, v...); },
                      [](const Values &v) { return v; });
    auto base = judge(&c, [&](auto... v) { cpu::ssd_forward(&c, v...); },
                      [&](auto... v) { cpu::ssd_backward(&c, v...); }, narrowed);
    double b = bound<floatX>();
    check("y", want[0], got[0][0], base[0], b);
    auto part = [&](const char *name, size_t from, size_t to) {
        check(name, columns(want[3], d.S, from, to), columns(got[0][1], d.S, from, to),
              columns(base[3], d.S, from, to), b);
    };
    part("g_x", 0, d.E);
    part("g_B", d.E, d.E + d.G * d.N);
    part("g_C", d.E + d.G * d.N, d.S);
    check("g_dt", want[4], got[0][2], base[4], b);
    check("g_A_log", want[5], got[0][3], base[5], bound<floatX>(1.5e-2));
    check("g_D", want[6], get(g_D, H), base[6], b);
    if (with_states) {
        check("final", want[2], get(last, state), base[2], b);
        check("g_initial", want[7], get(g_s0, state), base[7], b);
    }
    free_device();
}

// ---- the recurrence of generation against the parallel form -------------------------------------

template<typename floatX>
static void test_steps(const Sizes &s) {
    Dims d(dims<cpu::Dims>(s)), one(dims<cpu::Dims>(Sizes{s.R, 1, s.M, s.H, s.P, s.N, s.G, 1, s.W,
                                                          s.F, s.V}));
    size_t R = d.R, T = d.T, state = R * d.H * d.N * d.P, taps = R * (d.W - 1) * d.S;
    printf("steps %s\n", sizeof(floatX) == 4 ? "float" : "bf16");
    Values z = normals(d.n * d.pitch), w = normals(d.S * d.W), b = normals(d.S), A = normals(d.H);
    Values D = normals(d.H), bias = normals(d.H), steps(d.n * d.E), zero_past(taps), zero(state);
    floatX *zs = put<floatX>(z), *x = room<floatX>(d.n * d.S), *y = room<floatX>(d.n * d.E);
    floatX *S = room<floatX>(state * d.chunks), *past = put<floatX>(zero_past);
    floatX *row = room<floatX>(R * d.pitch);
    float *ws = put<float>(w), *bs = put<float>(b), *as = put<float>(A), *Ds = put<float>(D);
    float *biases = put<float>(bias), *dt = room<float>(d.n * d.H), *last = room<float>(state);
    float *now = put<float>(zero);
    conv1d_forward(&d, x, zs, ws, bs, (floatX *)NULL, NULL);
    dt_forward(&d, dt, zs, biases);
    ssd_forward(&d, y, S, last, x, dt, as, Ds, NULL, NULL);
    Values want = get(y, d.n * d.E);
    for (size_t t = 0; t < T; t++) {
        for (size_t r = 0; r < R; r++) {
            CUDA(cudaMemcpy(row + r * d.pitch, zs + (r * T + t) * d.pitch, d.pitch * sizeof(floatX),
                            cudaMemcpyDeviceToDevice));
        }
        conv1d_forward(&one, x, row, ws, bs, past, NULL);
        conv1d_past(&one, past, row, past, NULL);
        dt_forward(&one, dt, row, biases);
        ssd_recurrence(&one, y, now, x, dt, as, Ds, now, NULL);
        Values ys = get(y, R * d.E);
        for (size_t i = 0; i < R * d.E; i++) steps[(i / d.E * T + t) * d.E + i % d.E] = ys[i];
    }
    check("y", want, steps, want, bound<floatX>());
    check("state", get(last, state), get(now, state), get(last, state), bound<floatX>());
    free_device();
}

int main(int argc, char **argv) {
    bool quick = argc > 1 && !strcmp(argv[1], "quick");
    //               R  T    M   H  P   N   G  Q   W  F  V
    test_ssd<float>({1, 9,   8,  1, 4,  3,  1, 8,  4, 0, 16}, true, 0);
    test_ssd<float>({2, 70,  8,  4, 7,  18, 2, 16, 4, 0, 16}, true, 0.05);
    test_ssd<bf16>({2, 70,   8,  4, 7,  18, 2, 16, 4, 0, 16}, true, 0.05);
    test_ssd<bf16>({1, 50,   8,  3, 8,  8,  1, 128, 4, 0, 16}, true, 0.05);      // the fast kernels
    test_ssd<bf16>({1, 150,  8,  3, 64, 64, 1, 128, 4, 0, 16}, true, 0.02);
    test_steps<float>({2, 11, 8, 4, 10, 6, 2, 8, 4, 0, 16});
    test_steps<bf16>({2, 11, 8, 4, 10, 6, 2, 8, 3, 0, 16});
    if (!quick) {
        test_ssd<float>({1, 150, 8, 2, 66, 70, 1, 128, 4, 0, 16}, false, 0.02);
        test_ssd<bf16>({1, 150, 8, 2, 66, 70, 1, 128, 4, 0, 16}, true, 0.02);
        test_ssd<bf16>({2, 100, 8, 2, 64, 64, 1, 64, 4, 0, 16}, true, 0);
        test_ssd<bf16>({2, 200, 8, 3, 64, 128, 1, 128, 4, 0, 16}, true, 0.02);
        test_ssd<bf16>({1, 333, 8, 6, 64, 128, 2, 128, 4, 0, 16}, true, 0);
        test_ssd<bf16>({1, 300, 8, 6, 32, 40, 2, 128, 4, 0, 16}, true, 0.02);
        test_ssd<bf16>({1, 257, 8, 4, 64, 128, 1, 128, 4, 0, 16}, true, 0, 2.0);   // strong decay
        test_ssd<bf16>({1, 385, 8, 9, 64, 128, 1, 128, 4, 0, 16}, false, 0);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
