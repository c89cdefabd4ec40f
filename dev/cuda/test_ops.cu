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

// ---- the other ops ------------------------------------------------------------------------------

// A tensor here in double and float, and on the device as X.
template<typename X> struct Tensor {
    Values v;
    std::vector<float> f;
    X *x;
    explicit Tensor(Values values) : v(values) {
        x = put<X>(v);
        f = narrowed(v);
    }
    void check_against(const char *name, double b = 0) { check(name, v, get(x, v.size()), f, b); }
};

template<typename floatX>
static void test_norms(const Sizes &s) {
    auto c = dims<cpu::Dims>(s);
    auto c64 = dims<cpu64::Dims>(s);
    Dims d(c);
    double b = bound<floatX>();
    size_t n = d.n, M = d.M, E = d.E, Z = d.Z;
    printf("norms %s: %zu rows, M %zu, E %zu in %zu groups\n",
           sizeof(floatX) == 4 ? "float" : "bf16", n, M, E, d.G);
    Tensor<float> resid(normals(n * M)), w(normals(M)), rstd{Values(n)}, g_resid(normals(n * M));
    Tensor<float> g_w(normals(M));
    Tensor<floatX> u{Values(n * M)}, g_u(normals(n * M)), copy{Values(n * M)};
    rmsnorm_forward(&d, u.x, rstd.x, resid.x, w.x);
    cpu64::rmsnorm_forward(&c64, u.v.data(), rstd.v.data(), resid.v.data(), w.v.data());
    cpu::rmsnorm_forward(&c, u.f.data(), rstd.f.data(), resid.f.data(), w.f.data());
    rmsnorm_backward(&d, g_resid.x, g_w.x, g_u.x, resid.x, rstd.x, w.x, copy.x);
    cpu64::rmsnorm_backward(&c64, g_resid.v.data(), g_w.v.data(), g_u.v.data(), resid.v.data(),
                            rstd.v.data(), w.v.data());
    cpu::rmsnorm_backward(&c, g_resid.f.data(), g_w.f.data(), g_u.f.data(), resid.f.data(),
                          rstd.f.data(), w.f.data());
    u.check_against("u", b);
    rstd.check_against("rstd");
    g_resid.check_against("g_resid");
    g_w.check_against("g_w");

    // z with the pitch of the device there, without it here
    Values z = normals(n * Z), padded(n * d.pitch);
    for (size_t i = 0; i < n * Z; i++)
        padded[i / Z * d.pitch + i % Z] = z[i] = (float)(floatX)(float)z[i];
    Tensor<floatX> zs(padded), y(normals(n * E)), o{Values(n * E)}, g_o(normals(n * E));
    Tensor<floatX> g_y{Values(n * E)}, g_zs{Values(n * d.pitch)};
    Tensor<float> wg(normals(E)), rstd_g{Values(n * d.G)}, g_wg(normals(E));
    std::vector<float> zf = narrowed(z), g_zf(n * Z);
    Values g_z(n * Z);
    gated_rmsnorm_forward(&d, o.x, rstd_g.x, y.x, zs.x, wg.x);
    cpu64::gated_rmsnorm_forward(&c64, o.v.data(), rstd_g.v.data(), y.v.data(), z.data(),
                                 wg.v.data());
    cpu::gated_rmsnorm_forward(&c, o.f.data(), rstd_g.f.data(), y.f.data(), zf.data(), wg.f.data());
    gated_rmsnorm_backward(&d, g_y.x, g_zs.x, g_wg.x, g_o.x, y.x, zs.x, rstd_g.x, wg.x);
    cpu64::gated_rmsnorm_backward(&c64, g_y.v.data(), g_z.data(), g_wg.v.data(), g_o.v.data(),
                                  y.v.data(), z.data(), rstd_g.v.data(), wg.v.data());
    cpu::gated_rmsnorm_backward(&c, g_y.f.data(), g_zf.data(), g_wg.f.data(), g_o.f.data(),
                                y.f.data(), zf.data(), rstd_g.f.data(), wg.f.data());
    o.check_against("o", b);
    g_y.check_against("g_y", b);
    g_wg.check_against("g_norm_g");
    check("g_z", columns(g_z, Z, 0, E), columns(get(g_zs.x, n * d.pitch), d.pitch, 0, E),
          columns(g_zf, Z, 0, E), b);
    free_device();
}

template<typename floatX>
static void test_conv(const Sizes &s, double rate, bool with_past) {
    auto c = dims<cpu::Dims>(s);
    auto c64 = dims<cpu64::Dims>(s);
    Dims d(c);
    double b = bound<floatX>();
    size_t n = d.n, Z = d.Z, S = d.S, W = d.W;
    printf("conv1d %s: %zu x %zu, S %zu, W %zu%s\n", sizeof(floatX) == 4 ? "float" : "bf16", s.R,
           s.T, S, W, with_past ? ", past" : "");
    std::vector<int> docs = documents(s, rate);
    const int *doc = rate > 0 ? docs.data() : NULL, *gpu_doc = rate > 0 ? put(docs) : NULL;
    Values z = normals(n * Z), padded(n * d.pitch), g_z(n * Z);
    for (size_t i = 0; i < n * Z; i++)
        padded[i / Z * d.pitch + i % Z] = z[i] = (float)(floatX)(float)z[i];
    std::vector<float> zf = narrowed(z), g_zf(n * Z);
    Tensor<floatX> zs(padded), xBC{Values(n * S)}, g_xBC(normals(n * S)), g_zs{Values(n * d.pitch)};
    Tensor<floatX> past(normals(d.R * (W - 1) * S));
    Tensor<float> w(normals(S * W)), bias(normals(S)), g_w(normals(S * W)), g_b(normals(S));
    floatX *p = with_past ? past.x : NULL;
    double *p64 = with_past ? past.v.data() : NULL;
    float *p32 = with_past ? past.f.data() : NULL;
    conv1d_forward(&d, xBC.x, zs.x, w.x, bias.x, p, gpu_doc);
    cpu64::conv1d_forward(&c64, xBC.v.data(), z.data(), w.v.data(), bias.v.data(), p64, doc);
    cpu::conv1d_forward(&c, xBC.f.data(), zf.data(), w.f.data(), bias.f.data(), p32, doc);
    conv1d_backward(&d, g_zs.x, g_w.x, g_b.x, g_xBC.x, zs.x, w.x, bias.x, p, gpu_doc);
    cpu64::conv1d_backward(&c64, g_z.data(), g_w.v.data(), g_b.v.data(), g_xBC.v.data(), z.data(),
                           w.v.data(), bias.v.data(), p64, doc);
    cpu::conv1d_backward(&c, g_zf.data(), g_w.f.data(), g_b.f.data(), g_xBC.f.data(), zf.data(),
                         w.f.data(), bias.f.data(), p32, doc);
    xBC.check_against("xBC", b);
    g_w.check_against("g_w");
    g_b.check_against("g_b");
    check("g_in", columns(g_z, Z, d.E, d.E + S),
          columns(get(g_zs.x, n * d.pitch), d.pitch, d.E, d.E + S), columns(g_zf, Z, d.E, d.E + S),
          b);
    free_device();
}

template<typename floatX>
static void test_linear(size_t n, size_t I, size_t O) {
    double b = bound<floatX>();
    printf("linear %s: %zu x %zu x %zu\n", sizeof(floatX) == 4 ? "float" : "bf16", n, I, O);
    Tensor<floatX> in(normals(n * I)), weight(normals(O * I)), out{Values(n * O)};
    Tensor<floatX> g_out(normals(n * O)), g_in{Values(n * I)};
    Tensor<float> g_weight(normals(O * I));
    linear_forward(out.x, in.x, weight.x, n, I, O, 0);
    cpu64::linear_forward(out.v.data(), in.v.data(), weight.v.data(), n, I, O, 0);
    cpu::linear_forward(out.f.data(), in.f.data(), weight.f.data(), n, I, O, 0);
    linear_backward(g_in.x, g_weight.x, g_out.x, in.x, weight.x, n, I, O, 1);
    cpu64::linear_backward(g_in.v.data(), g_weight.v.data(), g_out.v.data(), in.v.data(),
                           weight.v.data(), n, I, O, 1);
    cpu::linear_backward(g_in.f.data(), g_weight.f.data(), g_out.f.data(), in.f.data(),
                         weight.f.data(), n, I, O, 1);
    out.check_against("out", b);
    g_in.check_against("g_in", b);
    g_weight.check_against("g_weight");
    free_device();
}

// ---- the recurrence of generation against the parallel form -------------------------------------

template<typename floatX>
static void test_steps(const Sizes &s) {
    Dims d(dims<cpu::Dims>(s));
    size_t T = d.T, state = d.H * d.N * d.P;
    printf("steps %s\n", sizeof(floatX) == 4 ? "float" : "bf16");
    Values z = normals(T * d.pitch), w = normals(d.S * d.W), b = normals(d.S), A = normals(d.H);
    Values D = normals(d.H), bias = normals(d.H), zero(state), zero_ring(d.W * d.pitch), steps, want;
    floatX *zs = put<floatX>(z), *x = room<floatX>(T * d.S), *y = room<floatX>(T * d.E);
    floatX *S = room<floatX>(state * d.chunks);
    float *ws = put<float>(w), *bs = put<float>(b), *as = put<float>(A), *Ds = put<float>(D);
    float *biases = put<float>(bias), *dt = room<float>(T * d.H), *last = room<float>(state);
    float *now = put<float>(zero), *ring = put<float>(zero_ring), *rows = put<float>(z);
    float *v = room<float>(d.E);
    Step *step = room<Step>(1);
    conv1d_forward(&d, x, zs, ws, bs, (floatX *)NULL, NULL);
    dt_forward(&d, dt, zs, biases);
    ssd_forward(&d, y, S, last, x, dt, as, Ds, NULL, NULL);
    Values ys = get(y, T * d.E);
    for (size_t t = 0; t < T; t++) {
        Step at = {0, (int)t, 0};
        CUDA(cudaMemcpy(step, &at, sizeof at, cudaMemcpyHostToDevice));
        CUDA(cudaMemcpy(ring + t % d.W * d.pitch, rows + t * d.pitch, d.pitch * sizeof(float),
                        cudaMemcpyDeviceToDevice));
        ssd_recurrence<floatX>(&d, v, now, ring, ws, bs, biases, as, Ds, step);
        Values vs = get(v, d.E);
        for (size_t e = 0; e < d.E; e++) {
            double gate = z[t * d.pitch + e];
            steps.push_back(vs[e]);
            want.push_back(ys[t * d.E + e] * gate / (1 + exp(-gate)));
        }
    }
    check("v", want, steps, want, bound<floatX>());
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
    test_norms<float>({2, 37, 20, 4, 6, 5, 2, 16, 4, 0, 16});
    test_norms<bf16>({2, 37, 72, 4, 16, 8, 2, 16, 4, 0, 16});
    test_conv<float>({2, 37, 8, 3, 6, 5, 1, 16, 4, 0, 16}, 0.1, true);
    test_conv<bf16>({2, 70, 8, 4, 16, 8, 1, 16, 3, 0, 16}, 0.1, true);
    test_conv<bf16>({1, 70, 8, 4, 16, 8, 1, 16, 6, 0, 16}, 0, false);
    test_linear<float>(37, 20, 51);
    test_linear<bf16>(37, 20, 51);
    test_linear<bf16>(40, 64, 96);
    test_steps<float>({1, 11, 8, 4, 10, 6, 2, 8, 4, 0, 16});
    test_steps<bf16>({1, 11, 8, 4, 18, 6, 2, 8, 3, 0, 16});
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
