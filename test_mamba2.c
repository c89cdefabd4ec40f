// test_mamba2.c: the tests of train_mamba2.c, and of train_mamba2.cu.
//
//     make test              as C, in float and in double: build/test_float, build/test_double
//     make test_mamba2cu     as CUDA, for a GPU; make test-emulate runs that on a CPU
//     build/test_float       all tests; the exit status tells.  build/test_float ssd: those with
//                            "ssd" in their name.  -v first: each measurement and its bound
//
// A test measures errors and holds each against a bound that is derived, not tuned: from epsilon
// and the number of roundings, or 0 where the bits must be the same. Every comparison is written
// `!(error <= bound)` or so that a NaN fails it.
//
// The double build (-DREAL=double) is where gradients are proven: by finite differences, to ten
// digits. The same tests run in float, where they prove that float takes the same paths. The ops of
// the device are then held against the CPU's in double (dev/test/device.h). What is not arithmetic,
// from tokens to files, is tested in dev/test/host.h.

#ifdef __cplusplus                      // as CUDA
#define TESTING
#include "train_mamba2.cu"
#include <vector>
using cpu::cpu_backend, cpu::flags_default, cpu::now, cpu::random_uniform, cpu::remove_tree,
    cpu::run_main;
#else
#define NO_MAIN
#include "train_mamba2.c"
#endif

// ================================================================================================
// Measuring
// ================================================================================================

// The test that runs now: its worst error, as a part of its bound
static struct { double error, bound; size_t checks, failed; } test;
static int verbose;

// One measurement. What is printed when it fails says where.
PRINTF(3, 4) static void expect(double error, double bound, const char *format, ...) {
    double ratio = error == 0 ? 0 : error/bound;
    double worst = test.error == 0 ? 0 : test.error/test.bound;
    if (!test.checks++ || !(ratio <= worst)) test.error = error, test.bound = bound;
    int good = error <= bound;
    if (!good) test.failed++;
    if (good ? !verbose : test.failed > 5) return;
    va_list args;
    va_start(args, format);
    printf("      error %.2e, at most %.1e%s: ", error, bound, good ? "" : ", WRONG");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

#define EXPECT(ok, ...) expect((ok) ? 0 : 1, 0, __VA_ARGS__)

static uint64_t draws;                  // how many random numbers this test has had

static double uniform(double low, double high) {
    return low + (high - low)*random_uniform(1, 0, draws++);
}

static char scratch[PATH_MAX];          // a directory for the files of the tests

#ifdef __cplusplus
#include "dev/test/device.h"
#else

static const double EPS = sizeof(real) == 4 ? FLT_EPSILON : DBL_EPSILON;

static double bytes_different(const void *a, const void *b, size_t size) {
    const char *x = (const char *)a, *y = (const char *)b;
    size_t count = 0;
    for (size_t i = 0; i < size; i++) count += x[i] != y[i];
    return (double)count;
}

static double bits_different(const real *a, const real *b, size_t count) {
    return bytes_different(a, b, count*sizeof(real));
}

// Of k operations after one another each is off by at most eps/2 of its result: together, to
// first order, by k eps/2 of the largest of them. Twice that, for what was rounded before.
static double rounding(size_t k) { return EPS*(double)k; }

// The largest error of x, as a part of the largest of `sizes`: of ref itself, or of what was summed
// up to make it
static double error_of(const real *x, const double *ref, const double *sizes, size_t count) {
    double most = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        double e = fabs((double)x[i] - ref[i]);
        if (!(e <= most)) most = e;
        size = fmax(size, fabs(sizes[i]));
    }
    return most == 0 ? 0 : most/size;
}

static real *random_buffer(size_t count, double low, double high) {
    real *x = alloc_reals(count);
    for (size_t i = 0; i < count; i++) x[i] = (real)uniform(low, high);
    return x;
}

static real *copy_of(const real *x, size_t count) {
    real *y = alloc_reals(count);
    memcpy(y, x, count*sizeof(real));
    return y;
}

static double *doubles_of(const real *x, size_t count) {
    double *y = (double *)alloc(count, sizeof(double));
    for (size_t i = 0; i < count; i++) y[i] = (double)x[i];
    return y;
}

// ---- shapes -------------------------------------------------------------------------------------
// Odd ones: nothing is a multiple of anything; 1 of everything; a chunk and a convolution longer
// than the row; groups of one, of some and of all heads; more rows than a block of ROWS.
typedef struct { size_t R, T, M, H, P, N, G, Q, W, F, V; } Shape;
static const Shape shapes[] = {
//    R    T   M  H   P   N  G   Q  W   F   V
    { 1,   1,  1, 1,  1,  1, 1,  1, 1,  1,  2 },
    { 2,  13,  7, 2,  3,  5, 1,  4, 4,  5, 11 },
    { 1,   3,  5, 2,  2,  3, 2,  8, 5,  3,  5 },
    { 1,  17,  9, 6,  5,  3, 3, 16, 2,  3, 17 },
    { 5,  15,  3, 3,  7,  2, 1, 15, 7,  1,  9 },
    { 2,  33, 21, 3, 16, 16, 3,  7, 3, 17, 50 },
    { 1, 150, 35, 2, 20, 33, 1, 64, 4, 33, 70 },
};
enum { SHAPE_COUNT = sizeof shapes/sizeof *shapes };

static Dims dims_of(const Shape *s) {
    Dims d;
    memset(&d, 0, sizeof d);
    d.M = s->M, d.H = s->H, d.P = s->P, d.N = s->N, d.G = s->G, d.Q = s->Q, d.W = s->W, d.F = s->F;
    d.E = d.H*d.P, d.S = d.E + 2*d.G*d.N, d.Z = d.S + d.E + d.H, d.V = d.vocab = s->V;
    d.eps = 0.1;                        // large enough that its place in the formulas matters
    d.dt_hi = INFINITY;
    dims_batch(&d, s->R, s->T);
    d.slab = ceil_div(d.n, 3);          // three slabs of logits
    return d;
}

static const char *shape_text(const Dims *d) {
    return str("R %zu T %zu M %zu H %zu P %zu N %zu G %zu Q %zu W %zu", d->R, d->T, d->M, d->H,
               d->P, d->N, d->G, d->Q, d->W);
}

static int *random_ids(size_t count, size_t vocab) {
    int *ids = (int *)alloc(count, sizeof(int));
    for (size_t i = 0; i < count; i++) ids[i] = (int)uniform(0, (double)vocab);
    return ids;
}

// Documents of about five tokens. Every second row goes on with document 0.
static int *random_doc(const Dims *d) {
    int *doc = (int *)alloc(d->n, sizeof(int));
    for (size_t i = 0; i < d->n; i++) {
        int before = i % d->T ? doc[i - 1] : (int)(i/d->T % 2);
        doc[i] = before + (i % d->T && uniform(0, 1) < 0.2);
    }
    return doc;
}

// ================================================================================================
// The ops, forward and backward
// ================================================================================================
// Forward: each against its formula, in double, written down as plainly as can be. Backward: the
// loss is a random linear functional of an op's outputs. Its derivative along a direction v, which
// moves all elements of an input at once, must be <gradient, v>: one wrong element shows.

typedef struct {                        // an input or an output, and its gradient
    const char *name;
    size_t count, pitch, first, width;  // of each `pitch` elements, `width` from `first` on belong
    int adds;                           // to the op; adds: it adds to the gradient
    real *x, *g;
} Arg;

enum { IN = 5, OUT = 2 };
typedef struct {
    Dims d;
    Arg in[IN], out[OUT];
    size_t ins, outs;
    int variant;                        // 1: states from before the row, 2: documents
    int *ids, *doc;
    real *work[3];
    real scale;
} Op;

static Arg *arg(Arg *a, const char *name, size_t count, double low, double high, int adds) {
    a->name = name, a->count = a->pitch = a->width = count, a->first = 0, a->adds = adds;
    a->x = random_buffer(count, low, high), a->g = random_buffer(count, -1, 1);
    return a;
}
static Arg *input(Op *o, const char *name, size_t count, double low, double high, int adds) {
    return arg(&o->in[o->ins++], name, count, low, high, adds);
}
static void output_arg(Op *o, const char *name, size_t count) {
    arg(&o->out[o->outs++], name, count, -1, 1, 0);
}
static void zxBCdt_input(Op *o, double size, size_t first, size_t width) {
    Arg *a = input(o, "zxBCdt", o->d.n*o->d.Z, -size, size, 0);
    a->pitch = o->d.Z, a->first = first, a->width = width;
}

static void embed_setup(Op *o) {
    o->ids = random_ids(o->d.n, o->d.V);
    input(o, "embedding", o->d.V*o->d.M, -1, 1, 1);
    output_arg(o, "resid", o->d.n*o->d.M);
}
static void embed_formula(const Op *o, double *out) {
    size_t M = o->d.M;
    for (size_t k = 0; k < o->d.n*M; k++) out[k] = (double)o->in[0].x[(size_t)o->ids[k/M]*M + k%M];
}
static void embed_fwd(Op *o) { embed_forward(&o->d, o->out[0].x, o->ids, o->in[0].x); }
static void embed_bwd(Op *o) { embed_backward(&o->d, o->in[0].g, o->out[0].g, o->ids); }

static void rmsnorm_setup(Op *o) {
    o->work[0] = alloc_reals(o->d.n);
    input(o, "resid", o->d.n*o->d.M, -1, 1, 1), input(o, "w", o->d.M, -1, 1, 1);
    output_arg(o, "u", o->d.n*o->d.M);
}
static void rmsnorm_formula(const Op *o, double *out) {
    size_t M = o->d.M;
    for (size_t i = 0; i < o->d.n; i++) {
        const real *r = o->in[0].x + i*M, *w = o->in[1].x;
        double sum = 0;
        for (size_t j = 0; j < M; j++) sum += (double)r[j]*(double)r[j];
        for (size_t j = 0; j < M; j++)
            out[i*M + j] = (double)r[j]/sqrt(sum/(double)M + o->d.eps)*(double)w[j];
    }
}
static void rmsnorm_fwd(Op *o) {
    rmsnorm_forward(&o->d, o->out[0].x, o->work[0], o->in[0].x, o->in[1].x);
}
static void rmsnorm_bwd(Op *o) {
    rmsnorm_backward(&o->d, o->in[0].g, o->in[1].g, o->out[0].g, o->in[0].x, o->work[0],
                     o->in[1].x);
}

static void linear_setup(Op *o) {
    input(o, "in", o->d.n*o->d.M, -1, 1, 0);
    input(o, "weight", o->d.Z*o->d.M, -1, 1, o->variant & 1);
    output_arg(o, "out", o->d.n*o->d.Z);
}
static void linear_formula(const Op *o, double *out) {
    size_t M = o->d.M, Z = o->d.Z;
    for (size_t k = 0; k < o->d.n*Z*M; k++)
        out[k/M] += (double)o->in[0].x[k/M/Z*M + k%M]*(double)o->in[1].x[k/M%Z*M + k%M];
}
static void linear_fwd(Op *o) {
    linear_forward(o->out[0].x, o->in[0].x, o->in[1].x, o->d.n, o->d.M, o->d.Z, 0);
}
static void linear_bwd(Op *o) {
    linear_backward(o->in[0].g, o->in[1].g, o->out[0].g, o->in[0].x, o->in[1].x, o->d.n, o->d.M,
                    o->d.Z, o->variant & 1);
}

static void conv1d_setup(Op *o) {
    const Dims *d = &o->d;
    zxBCdt_input(o, 2, d->E, d->S);
    input(o, "w", d->S*d->W, -1, 1, 1), input(o, "b", d->S, -1, 1, 1);
    output_arg(o, "xBC", d->n*d->S);
    if (o->variant & 1) o->work[0] = random_buffer(d->R*(d->W - 1)*d->S, -2, 2);     // past
}
static double silu_of(double x) { return x/(1 + exp(-x)); }
static void conv1d_formula(const Op *o, double *out) {
    const Dims *d = &o->d;
    for (size_t k = 0; k < d->n*d->S; k++) {
        size_t i = k/d->S, c = k%d->S, t = i%d->T, W1 = d->W - 1;
        double sum = (double)o->in[2].x[c];
        for (size_t back = 0; back <= W1; back++) {
            int before = back > t, same = !o->doc || o->doc[i] == (before ? 0 : o->doc[i - back]);
            double x = !same ? 0 : !before ? (double)o->in[0].x[(i - back)*d->Z + d->E + c]
                     : o->work[0] ? (double)o->work[0][(i/d->T*W1 + W1 + t - back)*d->S + c] : 0;
            sum += (double)o->in[1].x[c*d->W + W1 - back]*x;
        }
        out[k] = silu_of(sum);
    }
}
static void conv1d_fwd(Op *o) {
    conv1d_forward(&o->d, o->out[0].x, o->in[0].x, o->in[1].x, o->in[2].x, o->work[0], o->doc);
}
static void conv1d_bwd(Op *o) {
    conv1d_backward(&o->d, o->in[0].g, o->in[1].g, o->in[2].g, o->out[0].g, o->in[0].x, o->in[1].x,
                    o->in[2].x, o->work[0], o->doc);
}

// Values of which softplus is too near to a limit, where there is no derivative, move away.
static void dt_setup(Op *o) {
    Dims *d = &o->d;
    zxBCdt_input(o, 4, d->Z - d->H, d->H);
    input(o, "dt_bias", d->H, -0.1, 0.1, 1);
    output_arg(o, "dt", d->n*d->H);
    if (o->variant & 1) d->dt_lo = 0.2, d->dt_hi = 2.5;
    for (size_t i = 0; i < d->n*d->H; i++) {
        real *raw = &o->in[0].x[i/d->H*d->Z + d->Z - d->H + i%d->H];
        double dt = log1p(exp((double)*raw + (double)o->in[1].x[i%d->H]));
        if (i % 7 == 6) *raw = 30;                           // softplus(x) = x
        else if (fabs(dt - d->dt_lo) < 0.2) *raw -= 3;
        else if (fabs(dt - d->dt_hi) < 0.3) *raw += 1;
    }
}
static void dt_formula(const Op *o, double *out) {
    const Dims *d = &o->d;
    for (size_t k = 0; k < d->n*d->H; k++) {
        double raw = (double)o->in[0].x[k/d->H*d->Z + d->Z - d->H + k%d->H];
        out[k] = fmin(fmax(log1p(exp(raw + (double)o->in[1].x[k%d->H])), d->dt_lo), d->dt_hi);
    }
}
static void dt_fwd(Op *o) { dt_forward(&o->d, o->out[0].x, o->in[0].x, o->in[1].x); }
static void dt_bwd(Op *o) {
    dt_backward(&o->d, o->in[0].g, o->in[1].g, o->out[0].g, o->in[0].x, o->in[1].x);
}

// Heads whose states last for ever (decay near 1), for some tokens, and for one (near 0)
static real decay_A_log(size_t h) { return (real)(h % 3 == 0 ? 0.1 : h % 3 == 1 ? -6 : 2.3); }

static void ssd_setup(Op *o) {
    const Dims *d = &o->d;
    size_t states = d->R*d->H*d->N*d->P;
    input(o, "xBC", d->n*d->S, -1, 1, 0), input(o, "dt", d->n*d->H, 0.01, 2, 0);
    input(o, "A_log", d->H, 0, 0, 1), input(o, "D", d->H, -1, 1, 1);
    for (size_t h = 0; h < d->H; h++) o->in[2].x[h] = decay_A_log(h);
    output_arg(o, "y", d->n*d->E);
    if (o->variant & 1) input(o, "initial", states, -1, 1, 0), output_arg(o, "final", states);
    for (int i = 0; i < 2; i++) o->work[i] = alloc_reals(d->R*d->chunks*d->H*d->N*d->P);
}
static void ssd_fwd(Op *o) {
    ssd_forward(&o->d, o->out[0].x, o->work[0], o->out[1].x, o->in[0].x, o->in[1].x, o->in[2].x,
                o->in[3].x, o->in[4].x, o->doc);
}
static void ssd_bwd(Op *o) {
    ssd_backward(&o->d, o->in[0].g, o->in[1].g, o->in[2].g, o->in[3].g, o->in[4].g, o->out[0].g,
                 o->out[1].g, o->work[0], o->work[1], o->in[0].x, o->in[1].x, o->in[2].x,
                 o->in[3].x, o->in[4].x, o->doc);
}

static void gated_setup(Op *o) {
    const Dims *d = &o->d;
    input(o, "y", d->n*d->E, -1, 1, 0), zxBCdt_input(o, 2, 0, d->E), input(o, "w", d->E, -1, 1, 1);
    output_arg(o, "o", d->n*d->E);
    o->work[0] = alloc_reals(d->n*d->G);
}
static void gated_formula(const Op *o, double *out) {
    size_t E = o->d.E, m = E/o->d.G;
    for (size_t k = 0; k < o->d.n*E; k += m) {               // a group of a row
        double sum = 0;
        for (size_t j = k; j < k + m; j++) {
            out[j] = (double)o->in[0].x[j]*silu_of((double)o->in[1].x[j/E*o->d.Z + j%E]);
            sum += out[j]*out[j];
        }
        for (size_t j = k; j < k + m; j++)
            out[j] *= (double)o->in[2].x[j%E]/sqrt(sum/(double)m + o->d.eps);
    }
}
static void gated_fwd(Op *o) {
    gated_rmsnorm_forward(&o->d, o->out[0].x, o->work[0], o->in[0].x, o->in[1].x, o->in[2].x);
}
static void gated_bwd(Op *o) {
    gated_rmsnorm_backward(&o->d, o->in[0].g, o->in[1].g, o->in[2].g, o->out[0].g, o->in[0].x,
                           o->in[1].x, o->work[0], o->in[2].x);
}

static void swiglu_setup(Op *o) {
    input(o, "ab", o->d.n*2*o->d.F, -3, 3, 0);
    output_arg(o, "h", o->d.n*o->d.F);
}
static void swiglu_formula(const Op *o, double *out) {
    size_t F = o->d.F;
    for (size_t k = 0; k < o->d.n*F; k++)
        out[k] = (double)o->in[0].x[k/F*2*F + k%F]*silu_of((double)o->in[0].x[k/F*2*F + F + k%F]);
}
static void swiglu_fwd(Op *o) { swiglu_forward(&o->d, o->out[0].x, o->in[0].x); }
static void swiglu_bwd(Op *o) { swiglu_backward(&o->d, o->in[0].g, o->out[0].g, o->in[0].x); }

// Its loss is given: scale times the sum of losses.
static void classifier_setup(Op *o) {
    const Dims *d = &o->d;
    o->ids = random_ids(d->n, d->V);
    o->work[0] = alloc_reals(d->slab*d->V);
    o->scale = (real)0.7;
    input(o, "hidden", d->n*d->M, -1, 1, 0), input(o, "weight", d->V*d->M, -1, 1, o->variant & 1);
    output_arg(o, "losses", d->n);
    for (size_t i = 0; i < d->n; i++) o->out[0].g[i] = o->scale;
}
static void classifier_formula(const Op *o, double *out) {
    size_t M = o->d.M, V = o->d.V;
    for (size_t i = 0; i < o->d.n; i++) {
        double sum = 0, target = 0;
        for (size_t v = 0; v < V; v++) {
            double logit = 0;
            for (size_t j = 0; j < M; j++)
                logit += (double)o->in[0].x[i*M + j]*(double)o->in[1].x[v*M + j];
            sum += exp(logit);
            if ((int)v == o->ids[i]) target = logit;
        }
        out[i] = log(sum) - target;
    }
}
static void classifier_fwd(Op *o) {
    classifier(&o->d, o->out[0].x, NULL, NULL, o->work[0], NULL, o->in[0].x, o->in[1].x, o->ids,
               o->scale, 0);
}
static void classifier_bwd(Op *o) {
    classifier(&o->d, o->out[0].x, o->in[0].g, o->in[1].g, o->work[0], NULL, o->in[0].x, o->in[1].x,
               o->ids, o->scale, o->variant & 1);
}

// Five points: of the step h = eps^(1/5) the formula is off by h^4, and rounding by eps/h, which is
// the same, eps^(4/5): 3e-13 in double, 3e-6 in float, times what fifth derivatives and sums of
// many terms amount to.
static double step_size(void) { return pow(EPS, 0.2); }
static double difference_bound(void) { return 300*pow(EPS, 0.8); }
static const double stencil[4][2] = {
    { -2, 1.0/12 }, { -1, -8.0/12 }, { 1, 8.0/12 }, { 2, -1.0/12 }
};

static double op_loss(Op *o, void (*forward)(Op *), double *size) {
    double sum = 0, square = 0;
    forward(o);
    for (size_t k = 0; k < o->outs; k++)
        for (size_t i = 0; i < o->out[k].count; i++) {
            double term = (double)o->out[k].x[i]*(double)o->out[k].g[i];
            sum += term, square += term*term;
        }
    *size = sqrt(square);                                    // what rounding is relative to
    return sum;
}

static int owns(const Arg *a, size_t i) {
    return i%a->pitch >= a->first && i%a->pitch < a->first + a->width;
}

static void check_gradient(Op *o, Arg *a, const real *before, void (*forward)(Op *)) {
    real *x = copy_of(a->x, a->count), *v = random_buffer(a->count, -1, 1);
    double h = step_size(), slope = 0, dot = 0, square = 0, size, touched = 0;
    for (size_t i = 0; i < a->count; i++) {
        if (!owns(a, i)) touched += a->g[i] != before[i], v[i] = 0;
        double term = ((double)a->g[i] - (a->adds ? (double)before[i] : 0))*(double)v[i];
        dot += term, square += term*term;
    }
    for (int k = 0; k < 4; k++) {
        for (size_t i = 0; i < a->count; i++)
            a->x[i] = (real)((double)x[i] + stencil[k][0]*h*(double)v[i]);
        slope += stencil[k][1]*op_loss(o, forward, &size)/h;
    }
    expect(touched, 0, "%s: columns that belong to another op", a->name);
    expect(fabs(slope - dot)/(sqrt(square) + size), difference_bound(),
           "%s, variant %d, %s: slope %.9g, gradient %.9g", a->name, o->variant, shape_text(&o->d),
           slope, dot);
    memcpy(a->x, x, a->count*sizeof(real));
    free(x), free(v);
}

static void op_open(Op *o, void (*setup)(Op *), const Dims *d, int variant) {
    memset(o, 0, sizeof *o);
    o->d = *d, o->variant = variant;
    setup(o);
    if (variant & 2) o->doc = random_doc(d);
}

static void op_close(Op *o) {
    for (size_t k = 0; k < o->ins; k++) free(o->in[k].x), free(o->in[k].g);
    for (size_t k = 0; k < o->outs; k++) free(o->out[k].x), free(o->out[k].g);
    for (size_t k = 0; k < 3; k++) free(o->work[k]);
    free(o->ids), free(o->doc);
}

// Inputs are of size 1. Errors are relative to that, or to the largest output if it is larger.
static void check_formula(const Op *o, void (*formula)(const Op *, double *)) {
    const Dims *d = &o->d;
    size_t count = o->out[0].count;
    double *ref = (double *)alloc(2*count, sizeof(double)), *sizes = ref + count;
    formula(o, ref);
    for (size_t i = 0; i < count; i++) sizes[i] = fmax(1, fabs(ref[i]));
    expect(error_of(o->out[0].x, ref, sizes, count), rounding(d->M + d->E + d->W + 8),
           "forward, variant %d: %s", o->variant, shape_text(d));
    free(ref);
}

static void check_op(void (*setup)(Op *), void (*formula)(const Op *, double *),
                     void (*forward)(Op *), void (*backward)(Op *), const Shape *shape,
                     int variant) {
    Op o;
    real *before[IN], *g_out[OUT];
    Dims d = dims_of(shape);
    op_open(&o, setup, &d, variant);
    forward(&o);
    if (formula) check_formula(&o, formula);
    for (size_t k = 0; k < o.ins; k++) before[k] = copy_of(o.in[k].g, o.in[k].count);
    for (size_t k = 0; k < o.outs; k++) g_out[k] = copy_of(o.out[k].g, o.out[k].count);
    backward(&o);
    for (size_t k = 0; k < o.outs; k++) {                    // an op may use it as work space
        memcpy(o.out[k].g, g_out[k], o.out[k].count*sizeof(real));
        free(g_out[k]);
    }
    for (size_t k = 0; k < o.ins; k++) check_gradient(&o, &o.in[k], before[k], forward);
    for (size_t k = 0; k < o.ins; k++) free(before[k]);
    op_close(&o);
}

#define OP_TEST(name, formula) \
    static void test_##name(void) { \
        for (size_t i = 0; i < 4*SHAPE_COUNT; i++) \
            check_op(name##_setup, formula, name##_fwd, name##_bwd, &shapes[i/4], (int)(i%4)); \
    }
OP_TEST(embed, embed_formula)
OP_TEST(rmsnorm, rmsnorm_formula)
OP_TEST(linear, linear_formula)
OP_TEST(conv1d, conv1d_formula)
OP_TEST(dt, dt_formula)
OP_TEST(ssd, NULL)                      // see below
OP_TEST(gated, gated_formula)
OP_TEST(swiglu, swiglu_formula)
OP_TEST(classifier, classifier_formula)

// ================================================================================================
// SSD: chunks = recurrence = attention
// ================================================================================================
// Two judges in double, each with its own backward: the recurrence, which is the definition, and
// the quadratic form, in which the row is one chunk. Both read the inputs of an Op and take its
// output gradients; states and documents as there. With all inputs made positive, the sign of A
// included, they sum up the sizes of all terms, which rounding errors are relative to.

typedef struct {
    double *y, *final, *xBC, *dt, *A_log, *D, *initial;      // inputs: g_y, g_final and the others;
    double sign;                                             // results: y, final, g_ of the others
} Ssd;
enum { SSD_TENSORS = 7 };

static const Arg *ssd_arg(const Op *o, size_t i) { return i < OUT ? &o->out[i] : &o->in[i - OUT]; }

static Ssd ssd_inputs(const Op *o, int sizes) {
    Ssd s;
    for (size_t i = 0; i < SSD_TENSORS; i++) {
        const Arg *a = ssd_arg(o, i);
        double *x = ((double **)&s)[i] = doubles_of(i < OUT ? a->g : a->x, a->count);
        for (size_t k = 0; k < a->count && sizes && i != 4; k++) x[k] = fabs(x[k]);     // not A_log
    }
    s.sign = sizes ? 1 : -1;
    return s;
}

static Ssd ssd_zeros(const Op *o) {
    Ssd s;
    for (size_t i = 0; i < SSD_TENSORS; i++)
        ((double **)&s)[i] = (double *)alloc(ssd_arg(o, i)->count, sizeof(double));
    return s;
}

static void ssd_free(Ssd *s) { for (size_t i = 0; i < SSD_TENSORS; i++) free(((double **)s)[i]); }

static int begins_document(const Dims *d, const int *doc, size_t i) {
    return doc && doc[i] != (i % d->T ? doc[i - 1] : 0);
}

// One head of one row. out: y, final, and the gradients of the rest.
static void recurrence(const Op *o, const Ssd *in, Ssd *out, size_t r, size_t h) {
    const Dims *d = &o->d;
    size_t T = d->T, H = d->H, N = d->N, P = d->P, NP = N*P, at = (r*H + h)*NP;
    size_t to_B = d->E + h/(H/d->G)*N, to_C = to_B + d->G*N;
    double *states = (double *)alloc((T + 1)*NP, sizeof(double)), *g = states, *state = states;
    double A = in->sign*exp(in->A_log[h]), D = in->D[h];
    if (o->ins > 4) memcpy(states, in->initial + at, NP*sizeof(double));
    for (size_t i = r*T; i < (r + 1)*T; i++, state += NP) {
        const double *row = in->xBC + i*d->S, *x = row + h*P, *B = row + to_B, *C = row + to_C;
        double dt = in->dt[i*H + h], a = begins_document(d, o->doc, i) ? 0 : exp(-dt*fabs(A));
        for (size_t p = 0; p < P; p++) out->y[i*d->E + h*P + p] = D*x[p];
        for (size_t k = 0; k < NP; k++) {
            state[NP + k] = a*state[k] + dt*B[k/P]*x[k%P];
            out->y[i*d->E + h*P + k%P] += C[k/P]*state[NP + k];
        }
    }
    if (o->ins > 4) memcpy(out->final + at, state, NP*sizeof(double));
    g = (double *)alloc(NP, sizeof(double));
    if (o->ins > 4) memcpy(g, in->final + at, NP*sizeof(double));
    for (size_t i = (r + 1)*T; i-- > r*T; state -= NP) {
        const double *row = in->xBC + i*d->S, *x = row + h*P, *B = row + to_B, *C = row + to_C;
        const double *g_y = in->y + i*d->E + h*P, *before = state - NP;
        double *g_row = out->xBC + i*d->S, *g_x = g_row + h*P, *g_B = g_row + to_B, g_a = 0;
        double dt = in->dt[i*H + h], a = begins_document(d, o->doc, i) ? 0 : exp(-dt*fabs(A));
        for (size_t p = 0; p < P; p++) g_x[p] += D*g_y[p], out->D[h] += g_y[p]*x[p];
        for (size_t k = 0; k < NP; k++) {
            g[k] += C[k/P]*g_y[k%P];
            g_row[to_C + k/P] += state[k]*g_y[k%P];
            g_B[k/P] += g[k]*dt*x[k%P];
            g_x[k%P] += g[k]*dt*B[k/P];
            out->dt[i*H + h] += g[k]*B[k/P]*x[k%P];
            g_a += g[k]*before[k];
            g[k] *= a;
        }
        out->dt[i*H + h] += g_a*a*A;
        out->A_log[h] += g_a*a*A*dt;
    }
    if (o->ins > 4) memcpy(out->initial + at, g, NP*sizeof(double));
    free(states), free(g);
}

// The same without states before and after the row:
//     y_l = sum over s <= l of (C_l B_s) exp(A (dt_s+1 + .. + dt_l)) dt_s x_s + D x_l
static void attention(const Op *o, const Ssd *in, Ssd *out, size_t r, size_t h) {
    const Dims *d = &o->d;
    size_t T = d->T, H = d->H, N = d->N, P = d->P, to_B = d->E + h/(H/d->G)*N, to_C = to_B + d->G*N;
    double A = -exp(in->A_log[h]);
    for (size_t l = r*T; l < (r + 1)*T; l++)
        for (size_t s = r*T; s <= l; s++) {
            const double *xl = in->xBC + l*d->S, *xs = in->xBC + s*d->S, dt = in->dt[s*H + h];
            const double *g_y = in->y + l*d->E + h*P;
            double *y = out->y + l*d->E + h*P, *g_l = out->xBC + l*d->S, *g_s = out->xBC + s*d->S;
            double sum = 0, CB = 0, g_W = 0;
            if (o->doc && o->doc[l] != o->doc[s]) continue;
            for (size_t k = s + 1; k <= l; k++) sum += in->dt[k*H + h];
            for (size_t k = 0; k < N; k++) CB += xl[to_C + k]*xs[to_B + k];
            double L = exp(sum*A), W = CB*L*dt, skip = s == l ? in->D[h] : 0;
            for (size_t p = h*P, q = 0; q < P; p++, q++) {
                y[q] += (W + skip)*xs[p];
                g_s[p] += (W + skip)*g_y[q];
                g_W += g_y[q]*xs[p];
            }
            if (s == l) out->D[h] += g_W;
            for (size_t k = 0; k < N; k++) {
                g_l[to_C + k] += g_W*L*dt*xs[to_B + k];
                g_s[to_B + k] += g_W*L*dt*xl[to_C + k];
            }
            out->dt[s*H + h] += g_W*CB*L;
            for (size_t k = s + 1; k <= l; k++) out->dt[k*H + h] += g_W*W*A;
            out->A_log[h] += g_W*W*A*sum;
        }
}

typedef void Form(const Op *o, const Ssd *in, Ssd *out, size_t r, size_t h);
static Ssd by_form(Form *form, const Op *o, int sizes) {
    Ssd in = ssd_inputs(o, sizes), out = ssd_zeros(o);
    for (size_t k = 0; k < o->d.R*o->d.H; k++) form(o, &in, &out, k/o->d.H, k%o->d.H);
    ssd_free(&in);
    return out;
}

// The longest chain of roundings: products of all decays, twice, and sums over a state.
static double ssd_bound(const Dims *d) { return rounding(2*d->T + d->N + d->P); }

static void compare_ssd(const Op *o, const Ssd *ref, const Ssd *sizes, const char *form) {
    for (size_t i = 0; i < SSD_TENSORS; i++) {
        const Arg *a = ssd_arg(o, i);
        const double *x = ((double *const *)ref)[i], *size = ((double *const *)sizes)[i];
        if (a->count)
            expect(error_of(i < OUT ? a->x : a->g, x, size, a->count), ssd_bound(&o->d),
                   "chunks and %s, %s, variant %d: %s", form, a->name, o->variant,
                   shape_text(&o->d));
    }
}

static void run_ssd(Op *o) {
    memset(o->in[2].g, 0, o->d.H*sizeof(real));              // they are added to
    memset(o->in[3].g, 0, o->d.H*sizeof(real));
    ssd_fwd(o), ssd_bwd(o);
}

static void test_ssd_forms(void) {
    const size_t chunks[] = { 1, 2, 7, 16, 0, 1 };           // the last two: T, T + 1
    for (size_t i = 0; i < 4*SHAPE_COUNT; i++)
        for (size_t q = 0; q < 6; q++) {
            Op o;
            Dims d = dims_of(&shapes[i/4]);
            d.Q = q < 4 ? chunks[q] : d.T + chunks[q];
            dims_batch(&d, d.R, d.T);
            op_open(&o, ssd_setup, &d, (int)(i%4));
            for (size_t h = 0; h < d.H && q % 2; h++)        // states that last longer, or vanish
                o.in[2].x[h] = (real)(h % 3 == 0 ? -12 : h % 3 == 1 ? 5 : 0);
            run_ssd(&o);
            Ssd ref = by_form(recurrence, &o, 0), sizes = by_form(recurrence, &o, 1);
            compare_ssd(&o, &ref, &sizes, "recurrence");
            if (!(o.variant & 1)) {
                Ssd other = by_form(attention, &o, 0);
                compare_ssd(&o, &other, &sizes, "attention");
                ssd_free(&other);
            }
            real *y = alloc_reals(d.n*d.E), *final = alloc_reals(d.R*d.H*d.N*d.P);
            ssd_recurrence(&d, y, final, o.in[0].x, o.in[1].x, o.in[2].x, o.in[3].x, o.in[4].x,
                           o.doc);
            expect(error_of(y, ref.y, sizes.y, d.n*d.E), ssd_bound(&d), "ssd_recurrence, y: %s",
                   shape_text(&d));
            expect(error_of(final, ref.final, sizes.final, o.out[1].count), ssd_bound(&d),
                   "ssd_recurrence, final: %s", shape_text(&d));
            free(y), free(final), ssd_free(&ref), ssd_free(&sizes), op_close(&o);
        }
}

// ================================================================================================
// The model
// ================================================================================================

typedef struct { size_t shape, layers; int tied, mlp, packed, lanes; } Kind;
static const Kind kinds[] = {
    { 1, 2, 1, 0, 0, 0 }, { 1, 2, 0, 1, 1, 1 }, { 3, 2, 1, 1, 1, 0 },
    { 4, 3, 0, 0, 0, 1 }, { 5, 2, 1, 1, 0, 1 },
};
enum { KIND_COUNT = sizeof kinds/sizeof *kinds };

static Dims kind_dims(const Kind *k) {
    Dims d = dims_of(&shapes[k->shape]);
    d.L = d.kept = k->layers, d.tied = k->tied, d.F = k->mlp ? d.F : 0;
    d.lanes = k->lanes ? d.R : 0;
    return d;
}

static void open_model(Model *m, const Dims *d, int packed) {
    memset(m, 0, sizeof *m);
    model_allocate(m, d, 1);
    model_init(m, 7);
    for (size_t k = 0; k < PARAM_COUNT; k++)
        for (size_t i = 0; i < m->specs[k].count; i++) {
            ((real **)&m->w)[k][i] += (real)uniform(-0.3, 0.3);          // no weight is 0 or 1
            ((real **)&m->g)[k][i] = 1;                      // as if left from the step before
        }
    for (size_t i = 0; i < d->L*d->lanes*d->E*d->N; i++) m->a.carried[i] = (real)uniform(-1, 1);
    for (size_t i = 0; i < d->L*d->lanes*(d->W - 1)*d->S; i++) m->a.past[i] = (real)uniform(-1, 1);
    m->ids = random_ids(d->n, d->V), m->targets = random_ids(d->n, d->V);
    m->doc = packed ? random_doc(d) : NULL;
    m->scale = (real)(1.0/(double)d->n);
}

static void close_model(Model *m) {
    free(m->weights), free(m->grads), free(m->mean), free(m->square), free(m->acts);
    free((int *)m->ids), free((int *)m->targets), free((int *)m->doc);
}

static double loss_and_gradient(Model *m) {
    model_zero_grad(m);
    return model_loss(m, 1);
}

static void test_model_gradient(void) {
    double h = step_size();
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m;
        Dims d = kind_dims(&kinds[i]);
        open_model(&m, &d, kinds[i].packed);
        double loss = loss_and_gradient(&m);
        for (size_t k = 0; k < PARAM_COUNT; k++) {
            size_t count = m.specs[k].count;
            real *w = ((real **)&m.w)[k], *g = ((real **)&m.g)[k];
            real *at = copy_of(w, count), *v = random_buffer(count, -0.25, 0.25);
            double slope = 0, dot = 0, square = 0;
            for (size_t j = 0; j < count; j++) {
                double term = (double)g[j]*(double)v[j];
                dot += term, square += term*term;
            }
            for (int s = 0; s < 4; s++) {
                for (size_t j = 0; j < count; j++)
                    w[j] = (real)((double)at[j] + stencil[s][0]*h*(double)v[j]);
                slope += stencil[s][1]*model_loss(&m, 0)/h;
            }
            memcpy(w, at, count*sizeof(real));
            if (count)
                expect(fabs(slope - dot)/(sqrt(square) + loss), difference_bound(),
                       "%s of model %zu: slope %.9g, gradient %.9g", m.specs[k].name, i, slope,
                       dot);
            free(at), free(v);
        }
        close_model(&m);
    }
}

// The same bits with --recompute
static void test_recompute(void) {
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m, again;
        Dims d = kind_dims(&kinds[i]);
        draws = 0, open_model(&m, &d, kinds[i].packed);
        d.kept = 1;
        draws = 0, open_model(&again, &d, kinds[i].packed);
        EXPECT(loss_and_gradient(&m) == loss_and_gradient(&again), "loss of model %zu", i);
        expect(bits_different(m.grads, again.grads, m.size), 0, "gradients of model %zu", i);
        close_model(&m), close_model(&again);
    }
}

// Two micro-batches of half the rows add up to the gradient of one batch, but for rounding.
static void test_accumulation(void) {
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m, half;
        Dims d = kind_dims(&kinds[i]);
        d.lanes = d.lanes ? 4 : 0;
        dims_batch(&d, 4, d.T);
        draws = 0, open_model(&m, &d, kinds[i].packed);
        dims_batch(&d, 2, d.T);
        draws = 0, open_model(&half, &d, 0);
        memcpy(half.a.past, m.a.past, d.L*d.lanes*(d.W - 1)*d.S*sizeof(real));
        memcpy(half.a.carried, m.a.carried, d.L*d.lanes*d.E*d.N*sizeof(real));
        const int *ids = half.ids, *targets = half.targets;
        double loss = loss_and_gradient(&m), sum = 0;
        model_zero_grad(&half);
        half.scale = m.scale;
        for (size_t k = 0; k < 2; k++) {
            half.ids = m.ids + k*d.n, half.targets = m.targets + k*d.n;
            half.doc = m.doc ? m.doc + k*d.n : NULL;
            half.lane = k*d.R;
            sum += model_loss(&half, 1)/2;
            half.add = 1;
        }
        expect(fabs(sum - loss)/loss, rounding(d.n), "loss of model %zu", i);
        for (size_t k = 0; k < PARAM_COUNT; k++) {
            double *ref = doubles_of(((real **)&m.g)[k], m.specs[k].count);
            expect(error_of(((real **)&half.g)[k], ref, ref, m.specs[k].count), rounding(4*d.n),
                   "%s of model %zu", m.specs[k].name, i);
            free(ref);
        }
        expect(bits_different(m.a.carried_new, half.a.carried_new, d.L*d.lanes*d.E*d.N), 0,
               "states of model %zu", i);
        half.ids = ids, half.targets = targets, half.doc = NULL;
        close_model(&m), close_model(&half);
    }
}

// ---- structure: what must not depend on what ----------------------------------------------------

static real *logits_of(Model *m) {       // (n,V)
    m->all_logits = alloc_reals(m->d.n*m->d.V);
    model_loss(m, 0);
    return m->all_logits;
}

static void test_causality(void) {
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m;
        Dims d = kind_dims(&kinds[i]);
        open_model(&m, &d, kinds[i].packed);
        real *before = logits_of(&m);
        for (size_t t = 0; t < d.n; t += 1 + t/7) {          // of row t/T
            int *id = (int *)&m.ids[t], old = *id;
            *id = (old + 1) % (int)d.V;
            real *after = logits_of(&m);
            for (size_t k = 0; k < d.n; k++) {
                double changed = bits_different(before + k*d.V, after + k*d.V, d.V);
                int may = k >= t && k/d.T == t/d.T && (!m.doc || m.doc[k] == m.doc[t]);
                if (!may) expect(changed, 0, "model %zu: token %zu depends on token %zu", i, k, t);
                if (k == t) EXPECT(changed > 0, "model %zu: token %zu has no effect", i, k);
            }
            *id = old;
            free(after);
        }
        free(before), close_model(&m);
    }
}

// A row alone has the same bits as among others (from five tokens on: fewer go another way).
static void test_rows_independent(void) {
    for (size_t i = 0; i < KIND_COUNT; i++) {
        Model m, one;
        Dims d = kind_dims(&kinds[i]);
        draws = 0, open_model(&m, &d, kinds[i].packed);
        real *all = logits_of(&m);
        d.lanes = d.lanes ? 1 : 0;
        dims_batch(&d, 1, d.T);
        size_t past = (d.W - 1)*d.S, states = d.E*d.N, R = m.d.R;
        for (size_t r = 0; r < R; r++) {
            draws = 0, open_model(&one, &d, 0);
            memcpy(one.weights, m.weights, m.size*sizeof(real));
            memcpy((int *)one.ids, m.ids + r*d.T, d.T*sizeof(int));
            one.doc = m.doc ? m.doc + r*d.T : NULL;
            for (size_t l = 0; l < d.L && d.lanes; l++) {
                memcpy(one.a.past + l*past, m.a.past + (l*R + r)*past, past*sizeof(real));
                memcpy(one.a.carried + l*states, m.a.carried + (l*R + r)*states,
                       states*sizeof(real));
            }
            real *alone = logits_of(&one);
            expect(bits_different(alone, all + r*d.T*d.V, d.T*d.V), 0, "model %zu, row %zu", i, r);
            one.doc = NULL;
            free(alone), close_model(&one);
        }
        free(all), close_model(&m);
    }
}

// Through all layers and the classifier: sums over the channels, the states and the row.
static double model_bound(const Dims *d) { return rounding(d->L*(d->M + d->E + d->N + 2*d->T)); }

// A row of --carry in two steps, cut anywhere, has the logits of the whole row; so has a packed
// one. Cut between two chunks, they have the same bits (from five tokens on).
static void test_carry(void) {
    for (size_t i = 0; i < 2*SHAPE_COUNT; i++)
        for (size_t cut = 1; cut < shapes[i/2].T; cut += cut < 9 ? 1 : 1 + cut/8) {
            Model m;
            Dims d = dims_of(&shapes[i/2]);
            d.L = d.kept = 2, d.lanes = d.R, d.tied = 1, d.F = 0, d.slab = d.n;
            open_model(&m, &d, (int)i%2);
            real *whole = logits_of(&m);
            const int *ids = m.ids, *targets = m.targets, *doc = m.doc;
            int *part_ids = random_ids(d.n, d.V), *part_doc = doc ? random_doc(&d) : NULL;
            for (size_t from = 0, size = cut; from < d.T; from += size, size = d.T - cut) {
                dims_batch(&m.d, d.R, size);
                for (size_t k = 0; k < m.d.n; k++) {
                    size_t at = k/size*d.T + from + k%size, row = k/size*d.T + from;
                    part_ids[k] = ids[at];
                    if (doc) part_doc[k] = doc[at] - (from ? doc[row - 1] : 0);
                }
                m.ids = part_ids, m.doc = part_doc;
                real *part = logits_of(&m);
                for (size_t r = 0; r < d.R; r++) {
                    const real *x = part + r*size*d.V, *y = whole + (r*d.T + from)*d.V;
                    int same = cut % d.Q == 0 && m.d.n > 4;
                    double *ref = doubles_of(y, size*d.V);
                    expect(same ? bits_different(x, y, size*d.V) : error_of(x, ref, ref, size*d.V),
                           same ? 0 : model_bound(&d), "packed %zu, row %zu from %zu: %s", i%2, r,
                           from, shape_text(&d));
                    free(ref);
                }
                swap_states(&m);
                free(part);
            }
            m.ids = ids, m.targets = targets, m.doc = doc;
            free(whole), free(part_ids), free(part_doc), close_model(&m);
        }
}

// Documents packed into a row have the logits that each has alone.
static void test_packed(void) {
    for (size_t i = 0; i < SHAPE_COUNT; i++) {
        Model m;
        Dims d = dims_of(&shapes[i]);
        d.L = d.kept = 2, d.tied = 1, d.F = 0;
        open_model(&m, &d, 1);
        real *whole = logits_of(&m);
        const int *ids = m.ids, *doc = m.doc;
        for (size_t from = 0, to; from < d.n; from = to) {
            for (to = from + 1; to < d.n && to % d.T && doc[to] == doc[from]; ) to++;
            dims_batch(&m.d, 1, to - from);
            m.d.slab = least(m.d.n, d.slab), m.ids = ids + from, m.doc = NULL;
            real *alone = logits_of(&m);
            double *ref = doubles_of(whole + from*d.V, (to - from)*d.V);
            expect(error_of(alone, ref, ref, (to - from)*d.V), model_bound(&d),
                   "tokens %zu to %zu: %s", from, to, shape_text(&d));
            free(alone), free(ref);
        }
        m.ids = ids, m.doc = doc;
        free(whole), close_model(&m);
    }
}

// Three steps of training on any number of threads: the same bits of all weights
static void test_threads(void) {
    int threads = omp_get_max_threads();
    const int counts[] = { 1, 2, 3, 5 };
    real *first = NULL;
    double first_norm = 0, norm = 0;
    const Kind kind = { 5, 2, 1, 1, 1, 1 };
    for (int i = 0; i < 4; i++) {
        Model m;
        Dims d = kind_dims(&kind);
        dims_batch(&d, 7, 33);
        d.lanes = 7;
        omp_set_num_threads(counts[i]);
        draws = 0, open_model(&m, &d, 1);
        for (Int step = 1; step <= 3; step++) {
            loss_and_gradient(&m);
            norm = gradient_norm(&m);
            adamw(&m, 1e-2, fmin(1, 1/norm), step);
            swap_states(&m);
        }
        if (!first) first = copy_of(m.weights, m.size), first_norm = norm;
        expect(bits_different(first, m.weights, m.size), 0, "weights, %d threads", counts[i]);
        EXPECT(norm == first_norm, "norm, %d threads", counts[i]);
        close_model(&m);
    }
    omp_set_num_threads(threads);
    free(first);
}

// The prompt in pieces through the parallel form, the rest token by token: at each token the logits
// of one pass over the whole row.
static void test_generation(void) {
    for (size_t i = 0; i < 2*SHAPE_COUNT; i++) {
        Model m, s;
        Dims d = dims_of(&shapes[i/2]);
        d.L = d.kept = 2, d.tied = (int)(i%2), d.F *= i%2;
        dims_batch(&d, 1, d.T);
        d.slab = d.n;
        open_model(&m, &d, 0);
        real *parallel = logits_of(&m);
        for (size_t prompt = 1; prompt <= d.T; prompt += 1 + prompt/2)
            for (size_t piece = 1; piece <= prompt; piece += 1 + piece) {
                sampler_open(&s, &m, 1, piece);
                const real *logits = sampler_feed(&s, m.ids, prompt);
                sampler_recurrent(&s);
                for (size_t t = prompt;; t++) {
                    double *ref = doubles_of(parallel + (t - 1)*d.V, d.V);
                    expect(error_of(logits, ref, ref, d.V), model_bound(&d),
                           "token %zu, prompt of %zu in pieces of %zu: %s", t - 1, prompt, piece,
                           shape_text(&d));
                    free(ref);
                    if (t == d.T || t > prompt + 20) break;
                    logits = sampler_feed(&s, m.ids + t, 1);
                }
                free(s.acts);
            }
        free(parallel), close_model(&m);
    }
}

#include "dev/test/host.h"
#endif

// ================================================================================================
// The run of all tests
// ================================================================================================

typedef struct { const char *name; void (*run)(void); } Test;
static const Test tests[] = {
#ifdef __cplusplus
    { "ssd in float", test_ssd_float },
    { "ssd in bf16, any shape", test_ssd_bf16 },
    { "ssd in bf16, the fast kernels", test_ssd_fast },
    { "norms", test_all_norms },
    { "conv1d", test_all_conv1d },
    { "dt, swiglu", test_all_dt_and_mlp },
    { "linear", test_all_linear },
    { "embed, classifier", test_all_ends },
    { "tokens one by one", test_all_tokens },
    { "tokens of many rows", test_all_rows },
#else
    { "embed", test_embed },
    { "rmsnorm", test_rmsnorm },
    { "linear", test_linear },
    { "conv1d", test_conv1d },
    { "dt", test_dt },
    { "ssd", test_ssd },
    { "gated_rmsnorm", test_gated },
    { "swiglu", test_swiglu },
    { "classifier", test_classifier },
    { "ssd: chunks, recurrence, attention", test_ssd_forms },
    { "exp, silu, softplus", test_elementwise },
    { "matmul", test_matmul },
    { "matmul_small", test_matmul_small },
    { "matmul in bf16", test_bf16 },
    { "gradient of the model", test_model_gradient },
    { "recompute", test_recompute },
    { "accumulation", test_accumulation },
    { "causality", test_causality },
    { "rows are independent", test_rows_independent },
    { "carried states", test_carry },
    { "packed documents", test_packed },
    { "number of threads", test_threads },
    { "generation = parallel", test_generation },
    { "sampling", test_sampling },
    { "initialization", test_initialization },
    { "learning rate", test_learning_rate },
    { "adamw", test_adamw },
    { "outliers", test_outliers },
    { "tokens in file order", test_file_order },
    { "shuffle", test_shuffle },
    { "tokens shuffled", test_shuffled_epoch },
    { "tokens after a seek", test_seek },
    { "tokens of documents", test_documents },
    { "tokens of lanes", test_lanes },
    { "text", test_text },
    { "safetensors", test_safetensors },
    { "half precision", test_half },
    { "json, byte tokenizer", test_json_and_tokenizer },
    { "model directory", test_model_files },
#endif
};

int main(int argc, char **argv) {
    size_t passed = 0, failed = 0;
    (void)run_main, (void)cpu_backend;
    if (argc > 1 && !strcmp(argv[1], "-v")) verbose = 1, argc--, argv++;
    const char *tmp = getenv("TMPDIR");
    snprintf(scratch, sizeof scratch, "%s/test_mamba2.XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(scratch), "%s: could not create: %s", scratch, strerror(errno));
    for (size_t i = 0; i < sizeof tests/sizeof *tests; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1])) continue;
        double start = now();
        memset(&test, 0, sizeof test);
        draws = 0;
        flags_default();
        tests[i].run();
        int good = test.checks && !test.failed;
        if (!test.checks) {
            printf("skip  %s: not in this build\n", tests[i].name);
            continue;
        }
        printf("%s  %-34s %6zu checks  worst %.1e  bound %.1e  %5.2f s\n", good ? "ok  " : "FAIL",
               tests[i].name, test.checks, test.error, test.bound, now() - start);
        fflush(stdout);
        passed += (size_t)good, failed += (size_t)!good;
    }
    remove_tree(scratch);
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed || !passed;
}
