// dev/test/host.h: the tests of what only the host does, whatever the device: exp and matrix
// products of the CPU, sampling, the optimizer, tokens, files. Part of test_mamba2.c, whose tools
// it uses.

// ================================================================================================
// Numbers: exp, silu, softplus, matrix products
// ================================================================================================

// Every 1009th float, of both signs, with NaN, infinities, denormals and zeros
static float nth_float(uint32_t i) {
    float x;
    memcpy(&x, &i, 4);
    return x;
}
#define EACH_FLOAT(x) \
    for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 1009) \
        for (double x = (double)nth_float((uint32_t)bits), once = 1; once > 0; once = 0)

// The error in units of the last place of ref
static double ulps(real x, double ref) {
    int exponent;
    frexp(ref, &exponent);
    return fabs((double)x - ref)/ldexp(EPS, exponent - 1);
}

static void test_elementwise(void) {
    const real infinite = (real)INFINITY;
    EACH_FLOAT(x) {
        double e = exp(-fabs(x)), s = x/(1 + exp(-x)), soft = fmax(x, 0) + log1p(e);
        real v = (real)x;
        if (isnan(x)) {
            EXPECT(isnan(expr(v)) && isnan(silu(v)) && isnan(silu_grad(v)) && isnan(softplus(v)),
                   "NaN becomes a number");
            continue;
        }
        if (x >= -87 && x <= 88) {      // where the result is a normal float
            expect(ulps(expr(v), exp(x)), 1.5, "expr(%g)", x);
            if (fabs(s) >= FLT_MIN) expect(ulps(silu(v), s), 4, "silu(%g)", x);
        } else if (x > 88) {
            EXPECT((double)expr(v) >= 1e38 && (double)silu(v) == x, "silu or expr(%g)", x);
        } else if (x > -1e6) {
            EXPECT((double)expr(v) <= 2e-38 && fabs((double)silu(v)) <= 2e-32, "tail at %g", x);
        }
        if (x <= 20 && soft > FLT_MIN) expect(ulps(softplus(v), soft), 3, "softplus(%g)", x);
        if (x > 20) EXPECT((double)softplus(v) == x, "softplus(%g)", x);
        if (fabs(x) < 80) {             // relative to the terms that are summed
            double q = 1/(1 + exp(-x));
            expect(fabs((double)silu_grad(v) - q*(1 + x*(1 - q)))/(q*(1 + fabs(x)*(1 - q))),
                   rounding(sizeof(real) == 8 || x < 0 ? 8 : 8 + (size_t)x), "silu_grad(%g)", x);
        }
    }
    EXPECT(expr(0) == 1 && softplus(infinite) == infinite && silu(0) == 0, "special values");
}

// A matrix stored as it is, or transposed: element (i,k) is at i*row + k*col.
typedef struct { real *x; size_t row, col; } Matrix;

static Matrix random_matrix(size_t rows, size_t cols, int transposed_) {
    Matrix m = { random_buffer(rows*cols, -1, 1), transposed_ ? 1 : cols, transposed_ ? rows : 1 };
    return m;
}

// The largest error of C = beta before + A B, each as a part of the sum of the sizes of its terms
static double product_error(const real *C, const real *before, size_t ldc, Matrix A, Matrix B,
                            size_t M, size_t N, size_t K, double beta) {
    double most = 0;
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = beta != 0 ? beta*(double)before[i*ldc + j] : 0, size = fabs(sum) + 1e-30;
            for (size_t k = 0; k < K; k++) {
                double term = (double)A.x[i*A.row + k*A.col]*(double)B.x[k*B.row + j*B.col];
                sum += term, size += fabs(term);
            }
            double e = fabs((double)C[i*ldc + j] - sum)/size;
            if (!(e <= most)) most = e;
        }
    return most;
}

// Between the rows of C lie columns that are not its own.
static double gaps_touched(const real *C, const real *before, size_t ldc, size_t M, size_t N) {
    double touched = 0;
    for (size_t i = 0; i < M; i++)
        touched += bits_different(C + i*ldc + N, before + i*ldc + N, ldc - N);
    return touched;
}

// Few rows, edges of tiles, more than a slab in each direction and in two
static const size_t product_sizes[][3] = {
    { 1, 1, 1 }, { 3, 5, 7 }, { 4, 65, 33 }, { 5, 33, 65 }, { 17, 50, 129 }, { 8, 48, 64 },
    { 2, 9, 0 }, { 97, 101, 211 }, { 131, 197, 400 }, { 2051, 5, 3 }, { 5, 1163, 9 },
    { 1, 300, 70 }, { 9, 1163, 801 }, { 2051, 5, 801 }, { 2050, 1160, 2 },
};

static void test_matmul(void) {
    int threads = omp_get_max_threads();
    for (size_t s = 0; s < sizeof product_sizes/sizeof *product_sizes; s++)
        for (int kind = 0; kind < 6; kind++) {               // NN NT TN, set or add
            size_t M = product_sizes[s][0], N = product_sizes[s][1], K = product_sizes[s][2];
            size_t ldc = N + 3;
            Matrix A = random_matrix(M, K, kind%3 == 2), B = random_matrix(K, N, kind%3 == 1);
            real *before = random_buffer(M*ldc, -1, 1), *first = NULL;
            int add = kind >= 3;
            for (size_t i = 0; i < M*ldc && !add; i++) before[i] = NAN;      // set: must not matter
            for (int t = 1; t <= 3; t++) {
                real *C = copy_of(before, M*ldc);
                omp_set_num_threads(t);
                matmul(C, ldc, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, add);
                expect(product_error(C, before, ldc, A, B, M, N, K, add), rounding(K + 2),
                       "%zu x %zu x %zu, kind %d, %d threads", M, N, K, kind, t);
                expect(gaps_touched(C, before, ldc, M, N), 0, "beyond C, %zu x %zu x %zu", M, N, K);
                if (first) expect(bits_different(C, first, M*ldc), 0, "%d threads", t), free(C);
                else first = C;
            }
            if (K) {                    // a NaN in A reaches its whole row of C, and no other
                size_t row = M/2, wrong = 0;
                A.x[row*A.row + K/2*A.col] = NAN;
                for (size_t i = 0; i < M*ldc; i++) before[i] = 1;
                matmul(before, ldc, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, add);
                for (size_t i = 0; i < M*N; i++)
                    wrong += (i/N == row) != !!isnan((double)before[i/N*ldc + i%N]);
                expect((double)wrong, 0, "NaN in %zu x %zu x %zu, kind %d", M, N, K, kind);
            }
            free(A.x), free(B.x), free(before), free(first);
        }
    omp_set_num_threads(threads);
}

static void test_matmul_small(void) {
    static const double betas[] = { 0, 1, 0.5 };
    for (size_t s = 0; s < 600; s++) {
        size_t M = (size_t)uniform(1, 71), N = (size_t)uniform(1, 71), ldc = N + 2;
        size_t K = s % 20 ? (size_t)uniform(1, 140) : 0;
        double beta = betas[s%3];
        Matrix A = random_matrix(M, K, s/3%2), B = random_matrix(K, N, 0);
        real *before = random_buffer(M*ldc, -1, 1), *C;
        for (size_t i = 0; i < M*ldc && beta == 0; i++) before[i] = NAN;
        C = copy_of(before, M*ldc);
        for (size_t i = 0; i < M*N && s/6%2; i++) C[i/N*ldc + i%N] = NAN;        // not read then
        matmul_small(C, ldc, A.x, A.row, A.col, B.x, B.row, M, N, K, (real)beta, s/6%2 ? before : C);
        expect(product_error(C, before, ldc, A, B, M, N, K, beta), rounding(K + 2),
               "%zu x %zu x %zu, beta %g", M, N, K, beta);
        expect(gaps_touched(C, before, ldc, M, N), 0, "beyond C, %zu x %zu x %zu", M, N, K);
        free(A.x), free(B.x), free(before), free(C);
    }
}

static real eight_bits(real x) {         // to nearest, ties to even, as rint does
    int e = x == 0 ? 0 : ilogb((double)x);
    return (real)ldexp(rint(ldexp((double)x, 7 - e)), e - 7);
}

// Ten steps of training in bf16 bring the loss down, from nearly where float has it: each product
// of a layer is off by at most 2^-7 of its size.
static void train_in_bf16(void) {
    Model m;
    const Kind kind = { 5, 2, 1, 1, 1, 1 };
    Dims d = kind_dims(&kind);
    open_model(&m, &d, 1);
    double single = model_loss(&m, 0), first = 0, last = 0;
    matmul_bf16 = 1;
    for (Int step = 1; step <= 10; step++) {
        last = loss_and_gradient(&m);
        if (step == 1) first = last;
        adamw(&m, 1e-2, fmin(1, 1/gradient_norm(&m)), step);
    }
    matmul_bf16 = 0;
    expect(fabs(first - single)/single, 4.0*(double)d.L/128, "loss in bf16 %g, in float %g", first,
           single);
    EXPECT(last < first - 0.1, "loss after ten steps: %g, before: %g", last, first);
    close_model(&m);
}

// In bf16 both operands are rounded to 8 bits: each by at most 2^-8. The sums are in float.
static void test_bf16(void) {
    if (!bf16_available()) return;
    train_in_bf16();
    for (size_t s = 0; s < sizeof product_sizes/sizeof *product_sizes; s++)
        for (int kind = 0; kind < 6; kind++) {
            size_t M = product_sizes[s][0], N = product_sizes[s][1], K = product_sizes[s][2];
            Matrix A = random_matrix(M, K, kind%3 == 2), B = random_matrix(K, N, kind%3 == 1);
            real *before = random_buffer(M*N, -1, 1), *C = copy_of(before, M*N);
            matmul_bf16 = 1;
            matmul(C, N, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, kind >= 3);
            matmul_bf16 = 0;
            expect(product_error(C, before, N, A, B, M, N, K, kind >= 3),
                   2.0/256 + 1.0/65536 + rounding(K + 2), "bf16 of %zu x %zu x %zu", M, N, K);
            for (size_t i = 0; i < M*K; i++) A.x[i] = eight_bits(A.x[i]);
            for (size_t i = 0; i < K*N; i++) B.x[i] = eight_bits(B.x[i]);
            expect(product_error(C, before, N, A, B, M, N, K, kind >= 3), rounding(K + 2),
                   "bf16 of rounded %zu x %zu x %zu", M, N, K);
            free(A.x), free(B.x), free(before), free(C);
        }
}

// ================================================================================================
// Sampling
// ================================================================================================

static void test_sampling(void) {
    const real logits[] = { 1, 3, 2, 3, (real)-1, 9 };       // the last is padding
    const int trials = 10000;
    static const struct { double temperature, top_p; Int top_k; double odds[6]; } cases[] = {
        { 0,   1,    0, { 0, 1, 0, 0, 0, 0 } },              // of two equal ones the first
        { 0,   0.1,  3, { 0, 1, 0, 0, 0, 0 } },
        { 1,   0,    0, { 0, 1, 0, 0, 0, 0 } },              // at least one
        { 1,   1,    1, { 0, 1, 0, 0, 0, 0 } },
        { 2,   1,    2, { 0, 1, 0, 1, 0, 0 } },
        { 1,   1,    3, { 0, 1, 0.36787944117144233, 1, 0, 0 } },
        { 0.5, 1,    3, { 0, 1, 0.13533528323661270, 1, 0, 0 } },
        { 1,   0.3,  0, { 0, 1, 0, 0, 0, 0 } },              // 3 has 0.39 of all
        { 1,   0.5,  0, { 0, 1, 0, 1, 0, 0 } },
        { 1,   0.95, 0, { 0.13533528323661270, 1, 0.36787944117144233, 1, 0, 0 } },
        { 1,   1,   99, { 0.13533528323661270, 1, 0.36787944117144233, 1, 0.0183156388887342, 0 } },
        { 1,   1,    0, { 0.13533528323661270, 1, 0.36787944117144233, 1, 0.0183156388887342, 0 } },
    };
    for (size_t i = 0; i < sizeof cases/sizeof *cases; i++) {
        double counts[6] = { 0 }, sum = 0;
        for (int k = 0; k < trials; k++)                     // evenly spaced: the counts are exact
            counts[sample(logits, 5, cases[i].temperature, cases[i].top_k, cases[i].top_p,
                          (k + 0.5)/trials)]++;
        for (int k = 0; k < 6; k++) sum += cases[i].odds[k];
        for (int k = 0; k < 6; k++)
            expect(fabs(counts[k]/trials - cases[i].odds[k]/sum),
                   cases[i].odds[k] > 0 ? 1.0/trials : 0, "case %zu: token %d drawn %g times of %d",
                   i, k, counts[k], trials);
    }
}

// ================================================================================================
// Initialization and optimizer
// ================================================================================================

// Where a new weight lies in the range that it is drawn from, evenly: 0 to 1
static double place_in_range(const Dims *d, const Spec *s, double w) {
    double fan_in = sqrt((double)s->shape[s->rank - 1]);
    switch (s->init) {
    case FAN_IN:   return (w*fan_in + 1)/2;
    case FAN_IN_L: return (w*fan_in*sqrt((double)d->L) + 1)/2;
    case CONV:     return (w*sqrt((double)d->W) + 1)/2;
    case A_LOG:    return (exp(w) - 1)/15;
    default:       return log(log1p(exp(w))/0.001)/log(100); // dt_bias: dt from 0.001 to 0.1
    }
}

// Means of n independent numbers lie within five deviations of what is expected, but for one seed
// in a million.
static void test_initialization(void) {
    int threads = omp_get_max_threads();
    Model m, other;
    Dims d = dims_of(&shapes[1]);
    d.L = 300, d.kept = 1, d.tied = 0, d.V = 500;            // enough weights of each kind
    for (int part = 0; part < 2; part++) {
        Model *x = part ? &other : &m;
        memset(x, 0, sizeof *x);
        model_allocate(x, &d, 0);
        omp_set_num_threads(1 + 2*part);
        model_init(x, 1337);
    }
    omp_set_num_threads(threads);
    expect(bits_different(m.weights, other.weights, m.size), 0, "the same seed");
    model_init(&other, 1338);
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        const Spec *s = &m.specs[k];
        const real *w = ((real **)&m.w)[k];
        int normal = s->init == NORMAL, ones = s->init == ONES;
        double sum = 0, square = 0, n = (double)s->count;
        for (size_t i = 0; i < s->count; i++) {
            double x = (double)w[i];
            if (ones) EXPECT(x == 1, "%s is %g", s->name, x);
            else if (normal) x /= 0.02;
            else x = place_in_range(&d, s, x);
            EXPECT(normal ? fabs(x) < 6 : x > -1e-5 && x < 1 + 1e-5, "%s is %g", s->name,
                   (double)w[i]);
            sum += x, square += x*x;
        }
        if (ones || !s->count) continue;
        expect(fabs(sum/n - (normal ? 0 : 0.5)), 5*sqrt((normal ? 1 : 1/12.0)/n), "mean of %s",
               s->name);
        expect(fabs(square/n - (normal ? 1 : 1/3.0)), 5*sqrt((normal ? 2 : 4/45.0)/n),
               "mean square of %s", s->name);
        EXPECT(bits_different(w, ((real **)&other.w)[k], s->count) > n, "%s: the seed", s->name);
    }
    free(m.weights), free(m.acts), free(other.weights), free(other.acts);
}

static void test_learning_rate(void) {
    static const struct { const char *schedule; double steps, warmup, frac, t, lr; } cases[] = {
        { "constant", 100, 10, 0, 1, 0.1 },   { "constant", 100, 10, 0, 10, 1 },
        { "constant", 100, 10, 0, 11, 1 },    { "constant", 100, 10, 0, 100, 1 },
        { "constant", 100, 0, 0, 1, 1 },      { "constant", 5, 10, 0, 5, 0.5 },
        { "linear", 100, 20, 0, 10, 0.5 },    { "linear", 100, 20, 0, 20, 1 },
        { "linear", 100, 20, 0, 60, 0.6 },    { "linear", 100, 20, 0, 100, 0.2 },
        { "linear", 10, 0, 0, 1, 0.92 },      { "linear", 10, 10, 0, 10, 1 },
        { "cosine", 100, 20, 0, 20, 1 },      { "cosine", 100, 20, 0, 60, 0.6 },
        { "cosine", 100, 20, 0, 40, 0.6 + 0.4*0.70710678118654752 },
        { "cosine", 100, 20, 0, 100, 0.2 },   { "cosine", 1, 0, 0, 1, 0.2 },
        { "wsd", 100, 10, 0.2, 5, 0.5 },      { "wsd", 100, 10, 0.2, 80, 1 },
        { "wsd", 100, 10, 0.2, 81, 0.96 },    { "wsd", 100, 10, 0.2, 90, 0.6 },
        { "wsd", 100, 10, 0.2, 100, 0.2 },    { "wsd", 100, 90, 0.2, 95, 0.6 },
        { "wsd", 13, 0, 0.2, 10, 1 },         { "wsd", 13, 0, 0.2, 12, 0.2 + 0.8/3 },
        { "wsd", 100, 10, 0, 100, 1 },        { "wsd", 100, 0, 1, 50, 0.6 },
    };
    flags.lr = 1, flags.min_lr = 0.2;
    for (size_t i = 0; i < sizeof cases/sizeof *cases; i++) {
        flags.schedule = cases[i].schedule, flags.steps = (Int)cases[i].steps;
        flags.warmup = (Int)cases[i].warmup, flags.decay_frac = cases[i].frac;
        double lr = learning_rate((Int)cases[i].t);
        expect(fabs(lr - cases[i].lr), 8*DBL_EPSILON, "%s at step %g of %g: %.17g, expected %.17g",
               cases[i].schedule, cases[i].t, cases[i].steps, lr, cases[i].lr);
    }
}

// Four steps against the formulas of the paper, written out for one number at a time
static void test_adamw(void) {
    static const char *const decayed = " embedding in_proj out_proj fc1 fc2 lm_head ";
    const double lr = 0.01, clip = 0.3;
    Model m;
    Kind kind = { 2, 2, 0, 1, 0, 0 };
    Dims d = kind_dims(&kind);
    open_model(&m, &d, 0);
    flags.beta1 = 0.8, flags.beta2 = 0.9, flags.eps = 0.01, flags.weight_decay = 0.5;
    double *w = doubles_of(m.weights, m.size), *mean = (double *)alloc(m.size, sizeof(double));
    double *square = (double *)alloc(m.size, sizeof(double));
    for (Int t = 1; t <= 4; t++) {
        double norm = 0;
        for (size_t k = 0; k < PARAM_COUNT; k++) {
            const Spec *s = &m.specs[k];
            real *g = ((real **)&m.g)[k];
            double decay = strstr(decayed, str(" %s ", s->name)) ? 0.5 : 0;
            for (size_t i = 0; i < s->count; i++) {
                size_t at = (size_t)(g - m.grads) + i;
                g[i] = (real)uniform(-1, 1);
                norm += (double)g[i]*(double)g[i];
                double x = (double)g[i]*clip;
                mean[at] = 0.8*mean[at] + 0.2*x, square[at] = 0.9*square[at] + 0.1*x*x;
                w[at] -= lr*decay*w[at];
                w[at] -= lr*mean[at]/(1 - pow(0.8, (double)t))
                       / (sqrt(square[at]/(1 - pow(0.9, (double)t))) + 0.01);
            }
        }
        expect(fabs(gradient_norm(&m) - sqrt(norm))/sqrt(norm), (double)m.size*DBL_EPSILON, "norm");
        adamw(&m, lr, clip, t);
        expect(error_of(m.weights, w, w, m.size), rounding(16), "weights, step %d", (int)t);
        expect(error_of(m.mean, mean, mean, m.size), rounding(16), "mean, step %d", (int)t);
        expect(error_of(m.square, square, square, m.size), rounding(16), "square, step %d", (int)t);
    }
    m.grads[3] = NAN;
    EXPECT(isnan(gradient_norm(&m)), "a NaN is lost in the norm");
    free(w), free(mean), free(square), close_model(&m);
}

static void test_outliers(void) {
    Recent r;
    memset(&r, 0, sizeof r);
    for (int i = 0; i < WINDOW; i++) {
        EXPECT(outlier(&r, 7.1, 3) == (i >= HISTORY) && !outlier(&r, 6.9, 3), "after %d values", i);
        remember(&r, 5 + i%2);                               // mean 5.5, deviation 0.5
    }
    for (int i = 0; i < WINDOW; i++) remember(&r, i%2*2);    // mean 1, deviation 1
    EXPECT(!outlier(&r, 3.99, 3) && outlier(&r, 4.01, 3), "three deviations");
    EXPECT(!outlier(&r, 1e9, 0) && !outlier(&r, -1e9, 3), "off, and far below");
}

// ================================================================================================
// Tokens
// ================================================================================================

// A shard of llm.c (version 1 or 7), or with version 0 the tokens as bytes of text
static const char *write_tokens(const char *name, int version, const int *tokens, size_t count) {
    const char *path = strdup(str("%s/%s", scratch, name));
    size_t width = version == 7 ? 4 : version ? 2 : 1, start = version ? 1024 : 0;
    char *bytes = (char *)alloc(start + width*count, 1);
    const int32_t header[] = { version == 7 ? 20240801 : 20240520, version, (int32_t)count };
    if (version) memcpy(bytes, header, sizeof header);
    for (size_t i = 0; i < count; i++) memcpy(bytes + start + i*width, &tokens[i], width);
    write_file(path, bytes, start + width*count);
    free(bytes);
    return path;
}

enum { END = 9999 };                    // end of text in the shards of these tests
static const size_t shard_sizes[] = { 83, 31, 7, 58 };
enum { SHARDS = sizeof shard_sizes/sizeof *shard_sizes };

// Shard i holds the tokens 1000 i, 1000 i + 1, ..; with documents each 9th is the end of text.
static void write_shards(int documents) {
    for (size_t s = 0; s < SHARDS; s++) {
        int tokens[100];
        for (size_t i = 0; i < shard_sizes[s]; i++)
            tokens[i] = documents && i % 9 == 0 ? END : (int)(1000*s + i);
        write_tokens(str("shard_%zu.bin", s), 1, tokens, shard_sizes[s]);
    }
}

static Loader open_shards(size_t R, size_t T, size_t accum, int shuffle, int packed, int carry) {
    static Tokenizer *bytes;
    Loader d;
    if (!bytes) bytes = tokenizer_bytes();
    flags.eot = END;
    loader_open(&d, str("%s/shard_*.bin", scratch), "--data", bytes);
    d.shuffle = shuffle, d.packed = packed, d.carry = carry, d.seed = 5, d.accum = accum;
    int quiet = open("/dev/null", O_WRONLY), old = dup(2);   // it warns: the third is too small
    dup2(quiet, 2);
    loader_start(&d, 10000, R, T, 1);
    dup2(old, 2);
    close(quiet), close(old);
    return d;
}

static void close_loader(Loader *d) {
    free(d->tokens), free(d->rows), free(d->ids), free(d->targets), free(d->doc), free(d->shards);
}

// Without shuffling: shard after shard, micro-batch k from token k*R*T on, targets one further
static void test_file_order(void) {
    const size_t R = 2, T = 5, n = R*T;
    write_shards(0);
    Loader d = open_shards(R, T, 1, 0, 0, 0);
    for (size_t epoch = 0; epoch < 2; epoch++)
        for (size_t s = 0; s < SHARDS; s++)
            for (size_t k = 0; k < (shard_sizes[s] - 1)/n; k++) {
                loader_next(&d);
                for (size_t i = 0; i < n; i++)
                    EXPECT(d.ids[i] == (int)(1000*s + k*n + i) && d.targets[i] == d.ids[i] + 1,
                           "epoch %zu, shard %zu, micro-batch %zu, token %zu: %d, target %d",
                           epoch, s, k, i, d.ids[i], d.targets[i]);
                EXPECT(d.epoch == epoch && d.shard == s && d.batch == k + 1, "position");
            }
    close_loader(&d);
}

// All 24 orders of four come equally often, but for chance: five deviations.
static void test_shuffle(void) {
    double counts[256] = { 0 };
    for (uint64_t stream = 0; stream < 2400; stream++) {
        size_t *v = counting(4);
        shuffle_sizes(v, 4, 1, stream);
        counts[v[0] + 4*v[1] + 16*v[2] + 64*v[3]]++;
        free(v);
    }
    for (size_t i = 0, orders = 0; i < 256; i++) {
        if (counts[i] > 0) orders++, expect(fabs(counts[i] - 100), 5*sqrt(100), "order %zu", i);
        if (i == 255) EXPECT(orders == 24, "%zu orders", orders);
    }
}

// Shuffled: in an epoch as many micro-batches as in file order, no token twice, the order new in
// each epoch and with each seed. (Every token is its own document's: no end of text, no cut.)
static void test_shuffled_epoch(void) {
    const size_t R = 2, T = 5, n = R*T, all = (82/n + 30/n + 57/n)*n, tokens = 6*all;
    size_t moved = 0, elsewhere = 0, in_order = 0, starts = 0;
    uint64_t place[SHARDS*1000] = { 0 };                     // of a token: its micro-batch
    write_shards(0);
    Loader d = open_shards(R, T, 1, 1, 0, 0), same = open_shards(R, T, 1, 1, 0, 0);
    Loader other = open_shards(R, T, 1, 1, 0, 0);
    other.seed = 6;
    for (int epoch = 0, start = 0; epoch < 6; epoch++) {
        char seen[SHARDS*1000] = { 0 };
        for (size_t i = 0; i < all; i++) {
            if (i % n == 0) loader_next(&d), loader_next(&same), loader_next(&other);
            int id = d.ids[i%n];
            EXPECT((int)d.epoch == epoch && !seen[id]++, "epoch %d: token %d again", epoch, id);
            EXPECT(d.targets[i%n] == id + 1, "token %d has the target %d", id, d.targets[i%n]);
            EXPECT(same.ids[i%n] == id, "another order with the same seed");
            if (i % T) EXPECT(id == d.ids[i%n - 1] + 1, "a row is not a stretch of its shard");
            else in_order += i % n && id == d.ids[i%n - T] + (int)T;
            elsewhere += id != other.ids[i%n], moved += place[id] != d.batch;
            place[id] = d.batch;
            if (i == 0) starts += epoch && start != id/1000, start = id/1000;
        }
    }
    EXPECT(moved > tokens/2, "only %zu tokens of %zu are not where they were", moved, tokens);
    EXPECT(elsewhere > tokens/2, "only %zu tokens are elsewhere with another seed", elsewhere);
    EXPECT(in_order < tokens/n/2, "%zu rows go on where the one above stops", in_order);
    EXPECT(starts > 0, "all epochs start with the same shard");
    close_loader(&d), close_loader(&same), close_loader(&other);
}

// A resumed loader goes on exactly where it was, wherever that was.
static void test_seek(void) {
    enum { STEPS = 60, MOST = 12 };
    write_shards(1);
    for (int kind = 0; kind < 12; kind++) {
        size_t R = 2, T = kind % 2 ? 5 : 6, n = R*T, accum = 1 + (size_t)kind/4;
        int shuffle = kind & 1, carry = kind/2 & 1, packed = kind/4 == 1;
        Loader d = open_shards(R, T, accum, shuffle, packed, carry), again = d;
        int ids[STEPS + 4][2*MOST], fresh[STEPS + 4];
        uint64_t at[STEPS + 4][3];
        for (size_t k = 0; k < STEPS + 4; k++) {
            at[k][0] = d.epoch, at[k][1] = d.shard, at[k][2] = d.batch;
            loader_next(&d);
            memcpy(ids[k], d.ids, n*sizeof(int)), memcpy(ids[k] + MOST, d.targets, n*sizeof(int));
            fresh[k] = d.fresh;
        }
        EXPECT(d.epoch > 1, "only epoch %d was reached", (int)d.epoch);
        again = open_shards(R, T, accum, shuffle, packed, carry);
        for (size_t k = 0; k < STEPS; k++) {
            size_t from = k*37 % STEPS;                      // back and forth
            loader_seek(&again, at[from][0], at[from][1], at[from][2]);
            for (size_t i = from; i < from + 4; i++) {
                loader_next(&again);
                expect(bytes_different(again.ids, ids[i], n*sizeof(int))
                       + bytes_different(again.targets, ids[i] + MOST, n*sizeof(int))
                       + (again.fresh != fresh[i]), 0, "kind %d, micro-batch %zu", kind, i);
            }
        }
        close_loader(&d), close_loader(&again);
    }
}

// Documents stay whole when they are shuffled, each behind its end of text, and doc counts those.
static void test_documents(void) {
    const size_t R = 3, T = 7;
    write_shards(1);
    for (int shuffle = 0; shuffle < 2; shuffle++) {
        Loader d = open_shards(R, T, 1, shuffle, 1, 0);
        size_t jumps = 0;
        for (size_t k = 0; k < 60; k++) {
            loader_next(&d);
            for (size_t i = 0; i < R*T; i++) {
                int id = d.ids[i], next = d.targets[i], count = i % T ? d.doc[i - 1] : 0;
                EXPECT(d.doc[i] == count + (id == END), "doc of token %zu", i);
                if (id == END) EXPECT(next % 1000 % 9 == 1, "a document begins with %d", next);
                else EXPECT(next == id + 1 || next == END, "%d is followed by %d", id, next);
                if (i % T && d.ids[i - 1] == END) jumps += i > 1 && d.ids[i - 2] + 2 != id;
            }
        }
        EXPECT(shuffle == (jumps > 60), "%zu documents were moved", jumps);
        close_loader(&d);
    }
}

// --carry: each lane goes on where it stopped; lanes cover the shard without overlap.
static void test_lanes(void) {
    const size_t R = 2, T = 5, accum = 2, lanes = R*accum;
    write_shards(0);
    Loader d = open_shards(R, T, accum, 0, 0, 1);
    for (size_t s = 0, k = 0; s < 2*SHARDS; s++) {
        size_t size = (shard_sizes[s%SHARDS] - 1)/lanes, steps = size/T;
        for (k = 0; k < steps*accum; k++) {
            loader_next(&d);
            EXPECT(d.fresh == (k < accum), "fresh states in micro-batch %zu", k);
            for (size_t i = 0; i < R*T; i++) {
                size_t lane = k%accum*R + i/T, at = lane*size + k/accum*T + i%T;
                EXPECT(d.ids[i] == (int)(s%SHARDS*1000 + at) && d.targets[i] == d.ids[i] + 1,
                       "shard %zu, micro-batch %zu, token %zu is %d", s, k, i, d.ids[i]);
            }
        }
    }
    close_loader(&d);
}

// Text is bytes; its end is held back; several files are one stream, an end of text before each.
static void test_text(void) {
    int tokens[256];
    Tokenizer *bytes = tokenizer_bytes();
    Loader d, val;
    for (int i = 0; i < 256; i++) tokens[i] = i;
    const char *a = write_tokens("a.txt", 0, tokens, 256);
    const char *b = write_tokens("b.txt", 0, tokens + 40, 3);
    loader_open(&d, a, "--data", bytes);
    EXPECT(d.text_size == 256 && !memcmp(d.text, tokens, sizeof tokens), "bytes of a text");
    loader_split(&d, &val, 0.1);
    EXPECT(d.text_size == 230 && val.text_size == 26 && val.text[0] == 230, "the last part");
    loader_open(&d, str("%s,%s/*.txt,%s", b, scratch, a), "--data", bytes);
    EXPECT(d.text_size == 261 && d.text[0] == 256 && d.text[1] == 0 && d.text[257] == 256
           && d.text[258] == 40, "two texts, sorted, without duplicates");
    const char *zipped = str("%s/c.txt.gz", scratch);
    gzFile file = gzopen(zipped, "wb");
    gzwrite(file, "packed", 6), gzclose(file);
    loader_open(&d, zipped, "--data", bytes);
    EXPECT(d.text_size == 6 && d.text[5] == 'd', "gzip");
    int wide[] = { 0, 70000, 128255 };
    write_tokens("wide.bin", 7, wide, 3);
    loader_open(&d, str("%s/wide.bin", scratch), "--data", bytes);
    loader_start(&d, 128256, 1, 2, 1);
    loader_next(&d);
    EXPECT(d.ids[1] == 70000 && d.targets[1] == 128255, "tokens of 32 bits");
}

// ================================================================================================
// Files
// ================================================================================================

// A tensor in each type that is read, with values that all of them can hold
static void test_safetensors(void) {
    const double values[] = { 0, 1, -1.5, 0.25, 3, -448 };
    const uint16_t half[] = { 0, 0x3c00, 0xbe00, 0x3400, 0x4200, 0xdf00 };
    const size_t shape[] = { 2, 3 };
    static const char *const types[] = { "F64", "F32", "F16", "BF16" };
    const char *path = strdup(str("%s/x.safetensors", scratch));
    for (int type = 0; type < 4; type++) {
        Text t = { NULL, 0, 0 };
        size_t width = dtype_size(types[type]);
        real got[6];
        Tensor x = { "x", 2, { 2, 3 }, 6, got };
        const char *header = str("{\"x\":{\"dtype\":\"%s\",\"shape\":[2,3],"
                                 "\"data_offsets\":[0,%zu]}}", types[type], 6*width);
        uint64_t size = strlen(header);
        put_bytes(&t, &size, 8), put_bytes(&t, header, size);
        for (int i = 0; i < 6; i++) {
            float single = (float)values[i];
            const char *at[] = { (const char *)&values[i], (const char *)&single,
                                 (const char *)&half[i], (const char *)&single + 2 };
            put_bytes(&t, at[type], width);
        }
        write_file(path, t.data, t.size);
        TensorFile f = tensor_file_open(path);
        tensor_read(&f, json_get(f.header, "x"), &x);
        for (int i = 0; i < 6; i++)
            EXPECT((double)got[i] == values[i], "%s: %g, not %g", types[type], (double)got[i],
                   values[i]);
        tensor_file_close(&f), free(t.data);
    }
    real *a = random_buffer(6, -1, 1), *b = random_buffer(5, -1, 1), a2[6], b2[5];
    Tensors list = { NULL, 0, 0 };
    const size_t five[] = { 5 };
    tensors_add(&list, "b", 1, five, b), tensors_add(&list, "a", 2, shape, a);
    tensors_write(path, &list);
    TensorFile f = tensor_file_open(path);
    Tensor x = { "a", 2, { 2, 3 }, 6, a2 }, y = { "b", 1, { 5 }, 5, b2 };
    tensor_read(&f, json_get(f.header, "a"), &x), tensor_read(&f, json_get(f.header, "b"), &y);
    expect(bits_different(a, a2, 6) + bits_different(b, b2, 5), 0, "written and read");
    tensor_file_close(&f);
    free(list.list), free(a), free(b);
}

// IEEE half precision, written out once more: every one of them
static void test_half(void) {
    for (unsigned i = 0; i < 1 << 16; i++) {
        int e = (int)(i >> 10 & 31), m = (int)(i & 1023);
        double x = half_value((uint16_t)i), sign = i >> 15 ? -1 : 1;
        if (e == 31 && m) EXPECT(isnan(x), "%04x is %g", i, x);
        else {
            double ref = e == 31 ? INFINITY : e ? (1 + m/1024.0)*pow(2, e - 15)
                       : m/1024.0*pow(2, -14);
            EXPECT(x == sign*ref && (signbit(x) != 0) == (i >> 15 != 0), "%04x is %g", i, x);
        }
    }
}

static void test_json_and_tokenizer(void) {
    char all[256], text[1024];
    Text t = { NULL, 0, 0 };
    size_t size = 0, count;
    for (int i = 0; i < 256; i++) all[i] = (char)i;
    for (unsigned c = 1; c < 0x80; c++) text[size++] = (char)c;
    size += (size_t)sprintf(text + size, "\u00e9\u4e16\U0001f600\"\\/");
    put_json_string(&t, text, size);
    Json *j = json_parse("test", t.data, t.size);
    EXPECT(j->size == size && !memcmp(j->text, text, size), "a string does not come back");
    json_free(j), free(t.data);
    static const char *const source = "{\"a\": [1, -2.5e3, {\"b\": \"\\u00e9\\ud83d\\ude00\\n\"}], "
                                      "\"c\": true}";
    j = json_parse("test", source, strlen(source));
    const Json *a = json_get(j, "a");
    EXPECT(a->span == 6 && strtod((a + 2)->text, NULL) == -2500 && json_bool(j, "test", "c", 0),
           "numbers");
    EXPECT(!strcmp(json_get(a + 3, "b")->text, "\u00e9\U0001f600\n"), "escapes");
    json_free(j);
    Tokenizer *bytes = tokenizer_bytes();
    int32_t *ids = tokenizer_encode(bytes, "test", all, 256, &count);
    EXPECT(count == 256 && bytes->eot == 256 && bytes->vocab == 257, "sizes of the byte tokenizer");
    for (int i = 0; i < 256; i++) {
        const char *piece = tokenizer_piece(bytes, i, &size);
        EXPECT(ids[i] == i && size == 1 && piece[0] == all[i], "byte %d", i);
    }
    free(ids);
}

// A model comes back from a directory with the same bits, and makes the same loss.
static void test_model_files(void) {
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m, read;
        Text config = { NULL, 0, 0 };
        Tensors list = { NULL, 0, 0 };
        Dims d = kind_dims(&kinds[i]), found;
        if (d.E % d.M) d.M = d.E;                            // config.json has a whole expand
        d.dt_lo = 0.001, d.dt_hi = i%2 ? INFINITY : 0.5;
        open_model(&m, &d, 0);
        put_config(&config, &d, 0);
        write_file(str("%s/config.json", scratch), config.data, config.size);
        tensors_add_params(&list, &m, &m.w, "");
        tensors_write(str("%s/model.safetensors", scratch), &list);
        read_config(scratch, &found);
        EXPECT(found.M == d.M && found.L == d.L && found.H == d.H && found.P == d.P
               && found.N == d.N && found.G == d.G && found.W == d.W && found.V == d.V
               && found.F == d.F && found.E == d.E && found.tied == d.tied && found.eps == d.eps
               && found.dt_lo == d.dt_lo, "config.json of model %zu", i);
        EXPECT(found.dt_hi == d.dt_hi || (i%2 && found.dt_hi > 3e38), "dt_limit %g", found.dt_hi);
        memset(&read, 0, sizeof read);
        model_allocate(&read, &d, 0);
        read_weights(scratch, &read);
        expect(bits_different(m.weights, read.weights, m.size), 0, "weights of model %zu", i);
        free(config.data), free(list.list), free(read.weights), free(read.acts), close_model(&m);
    }
}

