// dev/test/device.h: the tests of train_mamba2.cu: its ops on the device, in float and in bf16,
// against the CPU's in double, the judge. Part of test_mamba2.c when that is compiled as CUDA, by
// nvcc or through dev/emulate.
//
// Errors here are root mean squares, relative to that of the judge's result. The bounds:
//   float   twice the error of the CPU's op in float, and 2e-6: sums are in another order
//   bf16    rounding to bf16 errs by at most 2^-8 of a number, by 2^-8/sqrt(3) = 2.3e-3 in the mean
//           square; tensors that are sums without cancellation are made with up to 4 roundings one
//           after another, and independent ones add up in squares: 4.5e-3
//   ssd     in bf16 what it costs to round every input once (see test_ssd): g_A_log may be a small
//           difference of large sums, and no fixed bound would hold for it

typedef std::vector<double> Values;

static Values normals(size_t count) {
    Values v(count);
    for (double &x : v) x = cpu::random_normal(1, 1, draws++);
    return v;
}

// ---- a tensor, for the judge (v), for the CPU in float (f) and on the device (x) ---------------
static std::vector<void *> on_device;               // of the current case
static void free_device() {
    for (void *p : on_device) CUDA(cudaFree(p));
    on_device.clear();
}

// Its rows have `columns`; on the device `pitch`, and NaN between them. As an argument of an op of
// the CPU, it becomes the pointer that the op takes.
template<typename X> struct Tensor {
    Values v;
    std::vector<float> f;
    X *x = NULL;
    size_t columns, pitch;

    Tensor(const Values &values, size_t columns, size_t pitch)
        : v(values), columns(columns), pitch(pitch) {
        if (v.empty()) return;                      // an optional one that is not there
        std::vector<X> padded(v.size() / columns * pitch, (X)NAN);
        for (size_t i = 0; i < v.size(); i++) {     // all three have what X can hold
            padded[i / columns * pitch + i % columns] = (X)(float)v[i];
            v[i] = (double)(float)(X)(float)v[i];
        }
        f.assign(v.begin(), v.end());
        x = device_alloc<X>(padded.size());
        on_device.push_back(x);
        CUDA(cudaMemcpy(x, padded.data(), padded.size() * sizeof(X), cudaMemcpyHostToDevice));
    }
    explicit Tensor(const Values &values) : Tensor(values, values.size(), values.size()) {}
    explicit Tensor(size_t count) : Tensor(Values(count, NAN)) {}         // to be written

    operator double *() { return v.empty() ? NULL : v.data(); }
    operator float *() { return f.empty() ? NULL : f.data(); }
    Values get() const {                            // what the device has
        if (!x) return {};
        std::vector<float> got(v.size());
        download(got.data(), x, v.size() / columns, columns, pitch);
        return Values(got.begin(), got.end());
    }
};

#define BOTH(op, ...) (cpu64::op(&c64, __VA_ARGS__), cpu::op(&c, __VA_ARGS__))

// ---- comparing ----------------------------------------------------------------------------------

static double error(const Values &got, const Values &want) {
    double square = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++) {
        square += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    return square == 0 ? 0 : sqrt(square / (size > 0 ? size : 1));
}

template<typename X> static double bound(double cpu_error) {
    return sizeof(X) == sizeof(float) ? 2 * cpu_error + 2e-6 : sqrt(4 / 3.0) * pow(2, -8);
}

// Columns from..to of a tensor, all of them by default. X is the type of the op's arithmetic.
template<typename X, typename T>
static void check(const char *name, const Tensor<T> &t, size_t from = 0, size_t to = 0) {
    auto part = [&](const Values &v) {
        Values columns;
        for (size_t i = 0; i < v.size(); i++)
            if (!to || (i % t.columns >= from && i % t.columns < to)) columns.push_back(v[i]);
        return columns;
    };
    Values want = part(t.v);
    double cpu_error = error(part(Values(t.f.begin(), t.f.end())), want);
    expect(error(part(t.get()), want), bound<X>(cpu_error), "%s", name);
}

// ---- sizes --------------------------------------------------------------------------------------

struct Sizes {
    size_t R, T, M, H, P, N, G, Q, W, F, V;
};
template<class D> static D dims_of(const Sizes &s) {        // cpu::Dims or cpu64::Dims
    D d = {};
    d.R = s.R, d.T = s.T, d.n = s.R * s.T, d.M = s.M, d.H = s.H, d.P = s.P, d.N = s.N, d.G = s.G;
    d.Q = s.Q, d.W = s.W, d.F = s.F, d.V = s.V, d.E = s.H * s.P, d.L = d.kept = 1;
    d.S = d.E + 2 * d.G * d.N, d.Z = d.E + d.S + d.H;
    d.chunks = pieces(d.T, d.Q), d.slab = 8, d.dt_hi = 1e30, d.eps = 1e-5;
    return d;
}

// Documents, a new one at each step with the given probability; none of them when it is 0
struct Documents {
    std::vector<int> ids;
    const int *host = NULL;
    int *device = NULL;

    Documents(const Sizes &s, double rate) : ids(s.R * s.T) {
        if (rate == 0) return;
        for (size_t i = 0; i < ids.size(); i++)
            ids[i] = (i % s.T ? ids[i - 1] : 0) + (uniform(0, 1) < rate);
        host = ids.data();
        device = put(ids);
    }
    static int *put(const std::vector<int> &v) {
        int *p = device_alloc<int>(v.size());
        on_device.push_back(p);
        CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(int), cudaMemcpyHostToDevice));
        return p;
    }
};

// ---- ssd ----------------------------------------------------------------------------------------
// What rounding costs: the judge again, with each element of what the kernels multiply as bf16 (x,
// B, C, g_y, the states that come in) off by up to 2^-8 of itself, at random. How far that moves a
// result tells how well conditioned it is, and is the bound. The kernels round other things, CB o
// L, states, decays, results, but none of their products has more rounded factors than this. The
// error of a result of few elements is a random number: 3/sqrt(count) is 3 standard deviations.
constexpr int SHAKES = 4;

// A second run, which must give the same bits: emulated, with threads in the opposite order, and
// none under a sanitizer, which is slow.
template<class Run, class Results> static Results once_more(Run run, const Results &first) {
#ifdef __CUDACC__
    (void)first;
    return run();
#else
    if (EMU_ASAN || EMU_TSAN) return first;
    emu::settings.reverse = !emu::settings.reverse;
    Results again = run();
    emu::settings.reverse = !emu::settings.reverse;
    return again;
#endif
}

template<typename floatX>
static void test_ssd(const Sizes &s, bool with_states, double rate, double longest_dt = 0.1) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    Dims d(c);
    size_t n = d.n, H = d.H, S = d.S, GN = d.G * d.N, state = d.R * H * d.N * d.P;
    Values few_dt(n * H), decays(H), zeros(H, 0.0), none;
    for (double &x : few_dt) x = longest_dt * exp(uniform(-4.6, 0));
    for (double &x : decays) x = uniform(0, 2.77);
    Documents doc(s, rate);
    Tensor<floatX> xBC(normals(n * S), S, S), g_y(normals(n * d.E)), y(n * d.E), g_xBC(n * S);
    Tensor<floatX> states(state * d.chunks), g_states(state * d.chunks);
    Tensor<float> dt(few_dt), A_log(decays), D(normals(H)), g_dt(n * H), g_A_log(zeros), g_D(zeros);
    Tensor<float> initial(with_states ? normals(state) : none);
    Tensor<float> g_final(with_states ? normals(state) : none);
    Tensor<float> last(with_states ? Values(state) : none);
    Tensor<float> g_initial(with_states ? Values(state) : none);

    const char *names[] = {"y",       "g_x", "g_B",   "g_C",      "g_dt",
                           "g_A_log", "g_D", "final", "g_initial"};
    auto results = [&](auto of) {
        Values g = of(g_xBC), parts[3];
        for (size_t i = 0; i < g.size(); i++)
            parts[(i % S >= d.E) + (i % S >= d.E + GN)].push_back(g[i]);
        return std::vector<Values>{of(y), parts[0], parts[1], parts[2], of(g_dt), of(g_A_log),
                                   of(g_D), of(last), of(g_initial)};
    };
    auto by_device = [&] {
        CUDA(cudaMemset(g_A_log.x, 0, H * sizeof(float)));
        CUDA(cudaMemset(g_D.x, 0, H * sizeof(float)));
        ssd_forward(&d, y.x, states.x, last.x, xBC.x, dt.x, A_log.x, D.x, initial.x, doc.device);
        ssd_backward(&d, g_xBC.x, g_dt.x, g_A_log.x, g_D.x, g_initial.x, g_y.x, g_final.x, states.x,
                     g_states.x, xBC.x, dt.x, A_log.x, D.x, initial.x, doc.device);
        return results([](auto &t) { return t.get(); });
    };
    auto on_cpu = [&](auto *dims, auto forward, auto backward) {
        forward(dims, y, states, last, xBC, dt, A_log, D, initial, doc.host);
        backward(dims, g_xBC, g_dt, g_A_log, g_D, g_initial, g_y, g_final, states, g_states, xBC,
                 dt, A_log, D, initial, doc.host);
    };
    auto judge = [&] {
        g_A_log.v = g_D.v = zeros;
        on_cpu(&c64, cpu64::ssd_forward, cpu64::ssd_backward);
        return results([](auto &t) { return t.v; });
    };
    auto got = by_device(), again = once_more(by_device, got), want = judge();
    on_cpu(&c, cpu::ssd_forward, cpu::ssd_backward);
    auto base = results([](auto &t) { return Values(t.f.begin(), t.f.end()); });
    Values cost(want.size(), 0.0), *factors[] = {&xBC.v, &g_y.v, &initial.v, &g_final.v};
    for (int i = 0; i < SHAKES && sizeof(floatX) == sizeof(bf16); i++) {
        std::vector<Values> kept;
        for (Values *v : factors) {
            kept.push_back(*v);
            for (double &x : *v) x *= 1 + pow(2, -8) * uniform(-1, 1);
        }
        auto moved = judge();
        for (int k = 0; k < 4; k++) *factors[k] = kept[k];
        for (size_t k = 0; k < want.size(); k++)
            cost[k] += pow(error(moved[k], want[k]), 2) / SHAKES;
    }
    const char *shape = cpu::str("%zu x %zu, H %zu P %zu N %zu G %zu Q %zu%s%s", d.R, d.T, H, d.P,
                                 d.N, d.G, d.Q, with_states ? ", states" : "",
                                 rate > 0 ? ", documents" : "");
    for (size_t k = 0; k < want.size(); k++) {
        if (want[k].empty()) continue;
        double most = sizeof(floatX) == sizeof(float)
                          ? bound<float>(error(base[k], want[k]))
                          : sqrt(cost[k]) * (1 + 3 / sqrt(want[k].size()));
        EXPECT(got[k] == again[k], "%s: %s, the bits of two runs", shape, names[k]);
        expect(error(got[k], want[k]), most, "%s: %s", shape, names[k]);
    }
    free_device();
}

static void test_ssd_float(void) {
    //              R  T    M  H  P   N   G  Q    W  F  V
    test_ssd<float>({1, 9,   8, 1, 4,  3,  1, 8,   4, 0, 16}, true, 0);
    test_ssd<float>({2, 70,  8, 4, 7,  18, 2, 16,  4, 0, 16}, true, 0.05);
    test_ssd<float>({1, 150, 8, 2, 66, 70, 1, 128, 4, 0, 16}, false, 0.02);
}
static void test_ssd_bf16(void) {                   // the plain kernels
    test_ssd<bf16>({2, 70,  8, 4, 7,  18, 2, 16,  4, 0, 16}, true, 0.05);
    test_ssd<bf16>({1, 150, 8, 2, 66, 70, 1, 128, 4, 0, 16}, true, 0.02);
    test_ssd<bf16>({2, 100, 8, 2, 64, 64, 1, 64,  4, 0, 16}, true, 0);
}
static void test_ssd_fast(void) {
    test_ssd<bf16>({1, 50,  8, 3, 8,  8,   1, 128, 4, 0, 16}, true, 0.05);
    test_ssd<bf16>({1, 150, 8, 3, 64, 64,  1, 128, 4, 0, 16}, true, 0.02);
    test_ssd<bf16>({2, 200, 8, 3, 64, 128, 1, 128, 4, 0, 16}, true, 0.02);
    test_ssd<bf16>({1, 333, 8, 6, 64, 128, 2, 128, 4, 0, 16}, true, 0);
    test_ssd<bf16>({1, 300, 8, 6, 32, 40,  2, 128, 4, 0, 16}, true, 0.02);
    test_ssd<bf16>({1, 257, 8, 4, 64, 128, 1, 128, 4, 0, 16}, true, 0, 2.0);       // strong decay
    test_ssd<bf16>({1, 385, 8, 9, 64, 128, 1, 128, 4, 0, 16}, false, 0);
    test_ssd<bf16>({12, 20, 8, 24, 8, 8,   1, 128, 4, 0, 16}, true, 0.02);     // a chunk a row
    test_ssd<bf16>({4, 1300, 8, 16, 8, 16, 1, 128, 4, 0, 16}, true, 0.002);    // rows cut
}

// ---- the other ops ------------------------------------------------------------------------------
template<typename floatX, typename residX = float> static void test_norms(const Sizes &s) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    Dims d(c);
    size_t n = d.n, M = d.M, E = d.E, Z = d.Z;
    Tensor<residX> resid(normals(n * M)), g_resid(normals(n * M));
    Tensor<float> w(normals(M)), rstd(n), g_w(normals(M));
    Tensor<floatX> u(n * M), g_u(normals(n * M)), copy(n * M);
    rmsnorm_forward(&d, u.x, rstd.x, resid.x, w.x);
    rmsnorm_backward(&d, g_resid.x, g_w.x, g_u.x, resid.x, rstd.x, w.x, copy.x, 1);
    BOTH(rmsnorm_forward, u, rstd, resid, w);
    BOTH(rmsnorm_backward, g_resid, g_w, g_u, resid, rstd, w);
    check<floatX>("u", u);
    check<float>("rstd", rstd);
    check<residX>("g_resid", g_resid);
    check<float>("g_w", g_w);

    Tensor<floatX> z(normals(n * Z), Z, d.pitch), y(normals(n * E)), o(n * E), g_o(normals(n * E));
    Tensor<floatX> g_y(n * E), g_z(Values(n * Z), Z, d.pitch);
    Tensor<float> gate_w(normals(E)), gate_rstd(n * d.G), g_gate_w(normals(E));
    gated_rmsnorm_forward(&d, o.x, gate_rstd.x, y.x, z.x, gate_w.x);
    gated_rmsnorm_backward(&d, g_y.x, g_z.x, g_gate_w.x, g_o.x, y.x, z.x, gate_rstd.x, gate_w.x);
    BOTH(gated_rmsnorm_forward, o, gate_rstd, y, z, gate_w);
    BOTH(gated_rmsnorm_backward, g_y, g_z, g_gate_w, g_o, y, z, gate_rstd, gate_w);
    check<floatX>("o", o);
    check<floatX>("g_y", g_y);
    check<floatX>("g_norm_g", g_gate_w);
    check<floatX>("g_z", g_z, 0, E);
    free_device();
}
static void test_all_norms(void) {
    test_norms<float>({2, 37, 20, 4, 6, 5, 2, 16, 4, 0, 16});
    test_norms<bf16>({2, 37, 72, 4, 16, 8, 2, 16, 4, 0, 16});
    test_norms<bf16, bf16>({2, 37, 72, 4, 16, 8, 2, 16, 4, 0, 16});
    test_norms<bf16>({1, 5, 2304, 36, 64, 8, 1, 16, 4, 0, 16});     // two vectors a thread
    test_norms<float>({1, 3, 5200, 82, 64, 8, 1, 16, 4, 0, 16});    // four
}

template<typename floatX> static void test_conv1d(const Sizes &s, double rate, bool with_past) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    Dims d(c);
    size_t n = d.n, Z = d.Z, S = d.S, W = d.W;
    Documents doc(s, rate);
    Tensor<floatX> z(normals(n * Z), Z, d.pitch), g_z(Values(n * Z), Z, d.pitch);
    Tensor<floatX> xBC(n * S), g_xBC(normals(n * S));
    Tensor<floatX> past(with_past ? normals(d.R * (W - 1) * S) : Values());
    Tensor<float> w(normals(S * W)), bias(normals(S)), g_w(normals(S * W)), g_b(normals(S));
    conv1d_forward(&d, xBC.x, z.x, w.x, bias.x, past.x, doc.device);
    conv1d_backward(&d, g_z.x, g_w.x, g_b.x, g_xBC.x, z.x, w.x, bias.x, past.x, doc.device);
    BOTH(conv1d_forward, xBC, z, w, bias, past, doc.host);
    BOTH(conv1d_backward, g_z, g_w, g_b, g_xBC, z, w, bias, past, doc.host);
    check<floatX>("xBC", xBC);
    check<float>("g_w", g_w);
    check<float>("g_b", g_b);
    check<floatX>("g_in", g_z, d.E, d.E + S);
    free_device();
}
static void test_all_conv1d(void) {
    test_conv1d<float>({2, 37, 8, 3, 6,  5, 1, 16, 4, 0, 16}, 0.1, true);
    test_conv1d<bf16>({2, 70,  8, 4, 16, 8, 1, 16, 3, 0, 16}, 0.1, true);
    test_conv1d<bf16>({1, 70,  8, 4, 16, 8, 1, 16, 6, 0, 16}, 0, false);
}

template<typename floatX> static void test_dt_and_mlp(const Sizes &s) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    c.dt_lo = c64.dt_lo = 0.2, c.dt_hi = c64.dt_hi = 2.5;
    Dims d(c);
    size_t n = d.n, Z = d.Z, F = d.F;
    Tensor<floatX> z(normals(n * Z), Z, d.pitch), g_z(Values(n * Z), Z, d.pitch);
    Tensor<float> bias(normals(d.H)), dt(n * d.H), g_dt(normals(n * d.H)), g_bias(normals(d.H));
    dt_forward(&d, dt.x, z.x, bias.x);
    dt_backward(&d, g_z.x, g_bias.x, g_dt.x, z.x, bias.x);
    BOTH(dt_forward, dt, z, bias);
    BOTH(dt_backward, g_z, g_bias, g_dt, z, bias);
    check<float>("dt", dt);
    check<float>("g_dt_bias", g_bias);
    check<floatX>("g_raw", g_z, Z - d.H, Z);

    Tensor<floatX> ab(normals(n * 2 * F)), h(n * F), g_h(normals(n * F)), g_ab(n * 2 * F);
    swiglu_forward(&d, h.x, ab.x);
    swiglu_backward(&d, g_ab.x, g_h.x, ab.x);
    BOTH(swiglu_forward, h, ab);
    BOTH(swiglu_backward, g_ab, g_h, ab);
    check<floatX>("h", h);
    check<floatX>("g_ab", g_ab);
    free_device();
}
static void test_all_dt_and_mlp(void) {
    test_dt_and_mlp<float>({2, 37, 8, 3, 6,  5, 1, 16, 4, 21, 16});
    test_dt_and_mlp<bf16>({2, 70,  8, 4, 16, 8, 1, 16, 3, 40, 16});
}

template<typename floatX> static void test_linear(size_t n, size_t I, size_t O) {
    Tensor<floatX> in(normals(n * I)), weight(normals(O * I)), out(n * O), g_out(normals(n * O));
    Tensor<floatX> g_in(n * I);
    Tensor<float> g_weight(normals(O * I));
    linear_forward(out.x, in.x, weight.x, n, I, O, 0);
    linear_backward(g_in.x, g_weight.x, g_out.x, in.x, weight.x, n, I, O, 1);
    cpu64::linear_forward(out, in, weight, n, I, O, 0);
    cpu64::linear_backward(g_in, g_weight, g_out, in, weight, n, I, O, 1);
    cpu::linear_forward(out, in, weight, n, I, O, 0);
    cpu::linear_backward(g_in, g_weight, g_out, in, weight, n, I, O, 1);
    check<floatX>("out", out);
    check<floatX>("g_in", g_in);
    check<float>("g_weight", g_weight);
    free_device();
}
static void test_all_linear(void) {
    test_linear<float>(37, 20, 51);
    test_linear<bf16>(37, 20, 51);                  // rows that cuBLAS does not take
    test_linear<bf16>(40, 64, 96);
}

// The two ends of the model, where ids are: some often, so that their gradients are in segments
template<typename floatX, typename residX = float> static void test_ends(const Sizes &s) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    Dims d(c);
    size_t n = d.n, M = d.M, V = d.V;
    std::vector<int> ids(n), plan(embed_plan_size(n));
    for (int &id : ids) id = uniform(0, 1) < 0.7 ? 3 : (int)uniform(0, (double)V);
    int *device_ids = Documents::put(ids);
    embed_plan(plan.data(), ids.data(), n, V);
    Tensor<float> embedding(normals(V * M)), g_embedding(normals(V * M));
    Tensor<residX> resid(n * M), g_resid(normals(n * M));
    embed_forward(&d, resid.x, device_ids, embedding.x);
    embed_backward(&d, g_embedding.x, g_resid.x, Documents::put(plan));
    BOTH(embed_forward, resid, ids.data(), embedding);
    BOTH(embed_backward, g_embedding, g_resid, ids.data());
    check<residX>("resid", resid);
    check<float>("g_embedding", g_embedding);

    Values small = normals(V * M);                  // logits about 1: exp makes of their rounding
    for (double &x : small) x /= sqrt((double)M);   // that much more
    Tensor<floatX> hidden(normals(n * M)), weight(small), g_hidden(n * M), logits(d.slab * V);
    Tensor<float> losses(n), g_weight(normals(V * M));
    classifier(&d, losses.x, g_hidden.x, g_weight.x, logits.x, (float *)NULL, hidden.x, weight.x,
               device_ids, 1.0f / n, 1);
    cpu64::classifier(&c64, losses, g_hidden, g_weight, logits, NULL, hidden, weight, ids.data(),
                      1.0 / n, 1);
    cpu::classifier(&c, losses, g_hidden, g_weight, logits, NULL, hidden, weight, ids.data(),
                    1.0f / n, 1);
    check<floatX>("losses", losses);
    check<floatX>("g_hidden", g_hidden);
    check<floatX>("g_weight", g_weight);
    free_device();
}
static void test_all_ends(void) {
    test_ends<float>({3, 67, 20, 1, 8, 8, 1, 16, 4, 0, 51});
    test_ends<bf16>({3, 67,  24, 1, 8, 8, 1, 16, 4, 0, 56});
    test_ends<bf16, bf16>({3, 67, 24, 1, 8, 8, 1, 16, 4, 0, 56});
}

// ---- generation: whole models, a token at a time ------------------------------------------------
// Logits against the CPU's in double, and each token against cpu::sample with the same logits. One
// row is for the kernel of a token. More are for a batch, whose activations are in floatX, so it errs
// as the form of training does, by up to half as much again.
template<typename floatX>
static void test_tokens(const Sizes &s, size_t L, int tied, size_t prompt, double temperature,
                        size_t rows = 1, cpu::Int top_k = 0, double top_p = 1) {
    auto c = dims_of<cpu::Dims>(s);
    auto c64 = dims_of<cpu64::Dims>(s);
    c.L = c.kept = c64.L = c64.kept = L, c.tied = c64.tied = tied;
    c.vocab = c64.vocab = s.V - 3;
    static cpu64::Model judge, recurrent;
    cpu64::model_allocate(&judge, &c64, 0);
    cpu64::model_init(&judge, 1);
    std::vector<float> weights(judge.size);
    for (size_t i = 0; i < judge.size; i++) {
        if (judge.weights + i >= judge.w.embedding + s.V * s.M) judge.weights[i] *= 2;
        judge.weights[i] = weights[i] = (float)(floatX)(float)judge.weights[i];
    }
    static cudaStream_t of_graphs;                  // the default one cannot be captured
    if (!of_graphs) CUDA(cudaStreamCreate(&of_graphs));
    stream = of_graphs;
    Model<floatX, float> m = {};
    cpu::Model host = {};
    host.d = c;
    m.d = Dims(c);
    cpu::param_specs(&c, m.specs);
    m.weights = device_alloc<float>(judge.size);
    m.copies = device_alloc<floatX>(judge.size);
    upload(m.weights, weights.data(), judge.size);
    upload(m.copies, weights.data(), judge.size);
    m.w = params_at(m.weights, m.specs);
    m.x = params_at(m.copies, m.specs);

    std::vector<int> tokens(prompt);
    for (int &id : tokens) id = (int)uniform(0, (double)c.vocab);
    cpu64::sampler_open(&recurrent, &judge, rows, prompt);
    const double *want = cpu64::sampler_feed(&recurrent, tokens.data(), prompt);
    cpu64::sampler_recurrent(&recurrent);
    double parallel = 0;                            // error of the same prompt in training's form
    if (rows > 1) {
        Tensor<float> logits(Values(want, want + s.V));
        Prompt<Model<floatX, float>> all(&m, &host, prompt);
        all.read(tokens.data(), prompt);
        linear_forward(logits.x, all.m.a.hidden + (prompt - 1) * s.M,
                       tied ? m.x.embedding : m.x.lm_head, 1, s.M, s.V, 0);
        parallel = error(logits.get(), logits.v);
        free_device();
    }
    cpu::flags.temperature = temperature, cpu::flags.top_k = top_k, cpu::flags.top_p = top_p;
    auto run = [&](auto &sampler, float *const &device_logits) {    // there after feed()
        std::vector<float> logits(rows * s.V);
        sampler.feed(tokens.data(), prompt);
        for (int i = 0; i < 5; i++) {              // more than W
            sampler.issue(i, 1);
            const int *ids = sampler.wait(i);
            download(logits.data(), device_logits, rows * s.V);
            for (size_t r = 0; r < rows; r++) {
                const float *x = logits.data() + r * s.V;
                const double *row = want + (i ? r * s.V : 0);          // the prompt's is for all
                double most = rows > 1     ? 1.5 * parallel + 2e-6
                              : prompt > 1 ? 2 * bound<floatX>(1e-6)
                                           : 4e-6;
                expect(error(Values(x, x + s.V), Values(row, row + s.V)), most, "logits");
                double u = cpu::random_uniform((uint64_t)cpu::flags.seed, 1 + r, (uint64_t)i);
                int same = cpu::sample(x, c.vocab, temperature, top_k, top_p, u);
                expect(ids[r] == same ? 0 : 1, 0, "token");
            }
            want = cpu64::sampler_feed(&recurrent, ids, rows);
        }
    };
    if (rows > 1) {
        Batch<Model<floatX, float>> batch(&m, &host, rows);
        run(batch, batch.logits);
    } else {
        Sampler<Model<floatX, float>> sampler(&m, &host, prompt);
        run(sampler, sampler.t.logits);
    }
    cpu::flags.top_k = 0, cpu::flags.top_p = 1;
    free(recurrent.acts);
    free(judge.acts);
    free(judge.weights);
    CUDA(cudaFree(m.weights));
    CUDA(cudaFree(m.copies));
    stream = NULL;
}
static void test_all_tokens(void) {
    test_tokens<float>({1, 11, 24, 4, 10, 6, 2, 8, 4, 0, 53}, 3, 1, 1, 0.8);   // odd sizes
    test_tokens<bf16>({1, 11, 24, 4, 18, 6, 2, 8, 3, 20, 61}, 2, 0, 1, 0);
    test_tokens<bf16>({1, 11, 64, 6, 16, 16, 2, 8, 4, 40, 1024}, 3, 1, 1, 0.8);      // 6 units
    test_tokens<bf16>({1, 11, 272, 4, 64, 130, 1, 8, 1, 0, 64}, 2, 0, 7, 0.8);  // N > 128
    sums_at_once = 64;                              // the head in slabs
    test_tokens<float>({1, 11, 136, 1, 136, 16, 1, 8, 4, 0, 800}, 1, 1, 5, 0.8);
    sums_at_once = 4096;
    test_tokens<float>({1, 11, 24, 4, 10, 6, 2, 8, 4, 0, 53}, 2, 1, 4, 1.2, 1, 9, 0.8);
}
static void test_all_rows(void) {
    test_tokens<float>({1, 11, 24, 4, 10, 6, 2, 8, 4, 0, 53}, 3, 1, 1, 0.8, 3);       // odd sizes
    test_tokens<float>({1, 11, 24, 4, 18, 6, 2, 8, 3, 20, 61}, 2, 0, 6, 0, 2);
    test_tokens<float>({1, 11, 24, 1, 96, 200, 1, 8, 6, 0, 1200}, 1, 1, 3, 1.5, 5, 100, 0.9);
    test_tokens<float>({1, 11, 16, 2, 8, 8, 1, 8, 1, 0, 2100}, 1, 0, 2, 1.2, 2, 0, 0.5);
    test_tokens<bf16>({1, 11, 64, 2, 64, 128, 1, 8, 4, 40, 1040}, 2, 1, 7, 0.9, 9, 7, 1);
}
