// test_mamba2.c: the tests of train_mamba2.c. `make test` runs them in float and in double.
//
//     ./test_mamba2            all tests; the exit status tells
//     ./test_mamba2 ssd        those with "ssd" in their name
//
// A test measures errors and holds each against a bound that is derived, not tuned: from epsilon
// and the number of roundings, or 0 where the bits must be the same. Every comparison is written
// `!(error <= bound)`, so that a NaN fails it.
//
// The double build (-DREAL=double) is where gradients are proven: by finite differences, to ten
// digits. The same tests run in float, where they prove that float takes the same paths.

#define NO_MAIN
#include "train_mamba2.c"

// ================================================================================================
// Measuring
// ================================================================================================

static const double EPS = sizeof(real) == 4 ? FLT_EPSILON : DBL_EPSILON;

// The test that runs now: its worst error, as a part of its bound
static struct { double error, bound; size_t checks, failed; } test;

// One measurement. What is printed when it fails says where.
PRINTF(3, 4) static void expect(double error, double bound, const char *format, ...) {
    double ratio = error == 0 ? 0 : error/bound, worst = test.error == 0 ? 0 : test.error/test.bound;
    if (!test.checks++ || !(ratio <= worst)) test.error = error, test.bound = bound;
    if (error <= bound || test.failed++ >= 5) return;
    va_list args;
    va_start(args, format);
    printf("      error %.2e, at most %.1e: ", error, bound);
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

#define EXPECT(ok, ...) expect((ok) ? 0 : 1, 0, __VA_ARGS__)

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

// The largest error of x, as a part of the largest value of ref
static double error_of(const real *x, const double *ref, size_t count) {
    double most = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        double e = fabs((double)x[i] - ref[i]);
        if (!(e <= most)) most = e;
        size = fmax(size, fabs(ref[i]));
    }
    return most == 0 ? 0 : most/size;
}

static uint64_t draws;                  // how many random numbers this test has had

static double uniform(double low, double high) {
    return low + (high - low)*random_uniform(1, 0, draws++);
}

// The seam to a device: arrays of the ops under test come from here (where a GPU could reach them,
// too), and after ops and before their results are read there is a finish().
static real *buffer(size_t count) { return alloc_reals(count); }
static void finish(void) {}

static real *random_buffer(size_t count, double low, double high) {
    real *x = buffer(count);
    for (size_t i = 0; i < count; i++) x[i] = (real)uniform(low, high);
    return x;
}

static real *copy_of(const real *x, size_t count) {
    real *y = buffer(count);
    memcpy(y, x, count*sizeof(real));
    return y;
}

static double *doubles_of(const real *x, size_t count) {
    double *y = (double *)alloc(count, sizeof(double));
    for (size_t i = 0; i < count; i++) y[i] = (double)x[i];
    return y;
}

// ---- shapes -------------------------------------------------------------------------------------
// Odd ones: nothing is a multiple of anything; 1 of everything; a chunk and a convolution longer than
// the row; groups of one, of some and of all heads; more rows than a block of ROWS.
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
    return str("R %zu T %zu M %zu H %zu P %zu N %zu G %zu Q %zu W %zu", d->R, d->T, d->M, d->H, d->P,
               d->N, d->G, d->Q, d->W);
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
// Gradients of the ops
// ================================================================================================
// The loss is a random linear functional of an op's outputs. Its derivative along a direction v,
// which moves all elements of an input at once, must be <gradient, v>: one wrong element shows.

typedef struct {                        // an input or an output, and its gradient
    const char *name;
    size_t count, pitch, first, width;  // of each `pitch` elements `width` from `first` on belong to
    int adds;                           // the op; adds: it adds to the gradient
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
static void embed_fwd(Op *o) { embed_forward(&o->d, o->out[0].x, o->ids, o->in[0].x); }
static void embed_bwd(Op *o) { embed_backward(&o->d, o->in[0].g, o->out[0].g, o->ids); }

static void rmsnorm_setup(Op *o) {
    o->work[0] = buffer(o->d.n);
    input(o, "resid", o->d.n*o->d.M, -1, 1, 1), input(o, "w", o->d.M, -1, 1, 1);
    output_arg(o, "u", o->d.n*o->d.M);
}
static void rmsnorm_fwd(Op *o) {
    rmsnorm_forward(&o->d, o->out[0].x, o->work[0], o->in[0].x, o->in[1].x);
}
static void rmsnorm_bwd(Op *o) {
    rmsnorm_backward(&o->d, o->in[0].g, o->in[1].g, o->out[0].g, o->in[0].x, o->work[0], o->in[1].x);
}

static void linear_setup(Op *o) {
    input(o, "in", o->d.n*o->d.M, -1, 1, 0), input(o, "weight", o->d.Z*o->d.M, -1, 1, o->variant & 1);
    output_arg(o, "out", o->d.n*o->d.Z);
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
    for (int i = 0; i < 2; i++) o->work[i] = buffer(d->R*d->chunks*d->H*d->N*d->P);
}
static void ssd_fwd(Op *o) {
    ssd_forward(&o->d, o->out[0].x, o->work[0], o->out[1].x, o->in[0].x, o->in[1].x, o->in[2].x,
                o->in[3].x, o->in[4].x, o->doc);
}
static void ssd_bwd(Op *o) {
    ssd_backward(&o->d, o->in[0].g, o->in[1].g, o->in[2].g, o->in[3].g, o->in[4].g, o->out[0].g,
                 o->out[1].g, o->work[0], o->work[1], o->in[0].x, o->in[1].x, o->in[2].x, o->in[3].x,
                 o->in[4].x, o->doc);
}

static void gated_setup(Op *o) {
    const Dims *d = &o->d;
    input(o, "y", d->n*d->E, -1, 1, 0), zxBCdt_input(o, 2, 0, d->E), input(o, "w", d->E, -1, 1, 1);
    output_arg(o, "o", d->n*d->E);
    o->work[0] = buffer(d->n*d->G);
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
static void swiglu_fwd(Op *o) { swiglu_forward(&o->d, o->out[0].x, o->in[0].x); }
static void swiglu_bwd(Op *o) { swiglu_backward(&o->d, o->in[0].g, o->out[0].g, o->in[0].x); }

// Its loss is given: scale times the sum of losses.
static void classifier_setup(Op *o) {
    const Dims *d = &o->d;
    o->ids = random_ids(d->n, d->V);
    o->work[0] = buffer(d->slab*d->V);
    o->scale = (real)0.7;
    input(o, "hidden", d->n*d->M, -1, 1, 0), input(o, "weight", d->V*d->M, -1, 1, o->variant & 1);
    output_arg(o, "losses", d->n);
    for (size_t i = 0; i < d->n; i++) o->out[0].g[i] = o->scale;
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
static const double stencil[4][2] = { { -2, 1.0/12 }, { -1, -8.0/12 }, { 1, 8.0/12 }, { 2, -1.0/12 } };

static double op_loss(Op *o, void (*forward)(Op *), double *size) {
    double sum = 0, square = 0;
    forward(o), finish();
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

static void check_op(void (*setup)(Op *), void (*forward)(Op *), void (*backward)(Op *),
                     const Shape *shape, int variant) {
    Op o;
    real *before[IN], *g_out[OUT];
    Dims d = dims_of(shape);
    op_open(&o, setup, &d, variant);
    forward(&o);
    for (size_t k = 0; k < o.ins; k++) before[k] = copy_of(o.in[k].g, o.in[k].count);
    for (size_t k = 0; k < o.outs; k++) g_out[k] = copy_of(o.out[k].g, o.out[k].count);
    backward(&o), finish();
    for (size_t k = 0; k < o.outs; k++) {                    // an op may use it as work space
        memcpy(o.out[k].g, g_out[k], o.out[k].count*sizeof(real));
        free(g_out[k]);
    }
    for (size_t k = 0; k < o.ins; k++) check_gradient(&o, &o.in[k], before[k], forward);
    for (size_t k = 0; k < o.ins; k++) free(before[k]);
    op_close(&o);
}

#define GRADIENT_TEST(name) \
    static void test_##name##_gradient(void) { \
        for (size_t i = 0; i < 4*SHAPE_COUNT; i++) \
            check_op(name##_setup, name##_fwd, name##_bwd, &shapes[i/4], (int)(i%4)); \
    }
GRADIENT_TEST(embed)
GRADIENT_TEST(rmsnorm)
GRADIENT_TEST(linear)
GRADIENT_TEST(conv1d)
GRADIENT_TEST(dt)
GRADIENT_TEST(ssd)
GRADIENT_TEST(gated)
GRADIENT_TEST(swiglu)
GRADIENT_TEST(classifier)

// ================================================================================================
// SSD: chunks = recurrence = attention
// ================================================================================================
// Two judges in double, each with its own backward: the recurrence, which is the definition, and the
// quadratic form, in which the row is one chunk. Both read the inputs of an Op and take its output
// gradients; states and documents as there.

typedef struct { double *y, *final, *xBC, *dt, *A_log, *D, *initial; } Ssd;      // or gradients of them

static Ssd ssd_inputs(const Op *o) {
    Ssd s = { doubles_of(o->out[0].g, o->out[0].count), doubles_of(o->out[1].g, o->out[1].count),
              doubles_of(o->in[0].x, o->in[0].count), doubles_of(o->in[1].x, o->in[1].count),
              doubles_of(o->in[2].x, o->in[2].count), doubles_of(o->in[3].x, o->in[3].count),
              doubles_of(o->in[4].x, o->in[4].count) };
    return s;                           // y and final: their gradients
}

static Ssd ssd_zeros(const Op *o) {
    Ssd s;
    const size_t sizes[] = { o->out[0].count, o->out[1].count, o->in[0].count, o->in[1].count,
                             o->in[2].count, o->in[3].count, o->in[4].count };
    for (size_t i = 0; i < 7; i++) ((double **)&s)[i] = (double *)alloc(sizes[i], sizeof(double));
    return s;
}

static void ssd_free(Ssd *s) { for (size_t i = 0; i < 7; i++) free(((double **)s)[i]); }

static int begins_document(const Dims *d, const int *doc, size_t i) {
    return doc && doc[i] != (i % d->T ? doc[i - 1] : 0);
}

// One head of one row. out: y, final, and the gradients of the rest.
static void recurrence(const Op *o, const Ssd *in, Ssd *out, size_t r, size_t h) {
    const Dims *d = &o->d;
    size_t T = d->T, H = d->H, N = d->N, P = d->P, NP = N*P, at = (r*H + h)*NP;
    size_t to_B = d->E + h/(H/d->G)*N, to_C = to_B + d->G*N;
    double *states = (double *)alloc((T + 1)*NP, sizeof(double)), *g = states, *state = states;
    double A = -exp(in->A_log[h]), D = in->D[h];
    if (o->ins > 4) memcpy(states, in->initial + at, NP*sizeof(double));
    for (size_t i = r*T; i < (r + 1)*T; i++, state += NP) {
        const double *row = in->xBC + i*d->S, *x = row + h*P, *B = row + to_B, *C = row + to_C;
        double dt = in->dt[i*H + h], a = begins_document(d, o->doc, i) ? 0 : exp(dt*A);
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
        double dt = in->dt[i*H + h], a = begins_document(d, o->doc, i) ? 0 : exp(dt*A);
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

// The same without states: y_l = sum over s <= l of (C_l B_s) exp(A (dt_s+1 + .. + dt_l)) dt_s x_s + D x_l
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

// Relative to the largest element of a tensor. The longest chain of roundings goes through all
// tokens, then over a state; the gradient of A sums that over all rows.
static void compare_ssd(const Op *o, const Ssd *ref, const char *form) {
    const Dims *d = &o->d;
    const real *ours[] = { o->out[0].x, o->out[1].x, o->in[0].g, o->in[1].g, o->in[2].g, o->in[3].g,
                           o->in[4].g };
    const size_t counts[] = { o->out[0].count, o->out[1].count, o->in[0].count, o->in[1].count,
                              o->in[2].count, o->in[3].count, o->in[4].count };
    static const char *const names[] = { "y", "final", "g_xBC", "g_dt", "g_A_log", "g_D", "g_initial" };
    for (size_t i = 0; i < 7; i++)
        if (counts[i])
            expect(error_of(ours[i], ((double *const *)ref)[i], counts[i]),
                   rounding(2*d->T + d->N + d->P), "chunks and %s, %s, variant %d: %s", form, names[i],
                   o->variant, shape_text(d));
}

static void run_ssd(Op *o) {
    memset(o->in[2].g, 0, o->d.H*sizeof(real));              // they are added to
    memset(o->in[3].g, 0, o->d.H*sizeof(real));
    ssd_fwd(o), ssd_bwd(o), finish();
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
            for (size_t h = 0; h < d.H && q % 2; h++)        // states that last even longer, or vanish
                o.in[2].x[h] = (real)(h % 3 == 0 ? -12 : h % 3 == 1 ? 5 : 0);
            run_ssd(&o);
            Ssd in = ssd_inputs(&o), by_recurrence = ssd_zeros(&o), by_attention = ssd_zeros(&o);
            for (size_t k = 0; k < d.R*d.H; k++) {
                recurrence(&o, &in, &by_recurrence, k/d.H, k%d.H);
                if (!(o.variant & 1)) attention(&o, &in, &by_attention, k/d.H, k%d.H);
            }
            compare_ssd(&o, &by_recurrence, "recurrence");
            if (!(o.variant & 1)) compare_ssd(&o, &by_attention, "attention");
            real *y = buffer(o.out[0].count), *final = buffer(d.R*d.H*d.N*d.P);
            ssd_recurrence(&d, y, final, o.in[0].x, o.in[1].x, o.in[2].x, o.in[3].x, o.in[4].x, o.doc);
            expect(error_of(y, by_recurrence.y, o.out[0].count), rounding(2*d.T + d.N + d.P),
                   "ssd_recurrence, y: %s", shape_text(&d));
            if (o.outs > 1)
                expect(error_of(final, by_recurrence.final, o.out[1].count), rounding(2*d.T),
                       "ssd_recurrence, final: %s", shape_text(&d));
            free(y), free(final);
            ssd_free(&in), ssd_free(&by_recurrence), ssd_free(&by_attention), op_close(&o);
        }
}

// A row in two parts, the second from the final state of the first, and the gradients back. Where
// the cut is between two chunks, the bits are the same.
static void test_ssd_split(void) {
    for (size_t i = 0; i < 2*SHAPE_COUNT; i++)
        for (size_t cut = 1; cut < shapes[i/2].T; cut += cut < 9 ? 1 : 5) {
            Op o;
            Shape shape = shapes[i/2];
            shape.R = 1;
            Dims d = dims_of(&shape), d1 = d, d2 = d;
            dims_batch(&d1, 1, cut), dims_batch(&d2, 1, d.T - cut);
            op_open(&o, ssd_setup, &d, i % 2 ? 3 : 1);
            run_ssd(&o);
            size_t NP = d.H*d.N*d.P, nS = d.n*d.S, nH = d.n*d.H, nE = d.n*d.E;
            real *y = buffer(nE), *g_xBC = buffer(nS), *g_dt = buffer(nH), *sums = buffer(2*d.H);
            real *middle = buffer(NP), *final = buffer(NP), *g_middle = buffer(NP), *g_initial = buffer(NP);
            real *xBC = o.in[0].x, *dt = o.in[1].x, *A_log = o.in[2].x, *D = o.in[3].x, *w = o.work[0];
            int *doc2 = o.doc ? (int *)alloc(d2.n, sizeof(int)) : NULL;
            for (size_t t = 0; doc2 && t < d2.n; t++) doc2[t] = o.doc[cut + t] - o.doc[cut - 1];
            ssd_forward(&d1, y, w, middle, xBC, dt, A_log, D, o.in[4].x, o.doc);
            ssd_forward(&d2, y + cut*d.E, w, final, xBC + cut*d.S, dt + cut*d.H, A_log, D, middle, doc2);
            ssd_backward(&d2, g_xBC + cut*d.S, g_dt + cut*d.H, sums, sums + d.H, g_middle,
                         o.out[0].g + cut*d.E, o.out[1].g, w, o.work[1], xBC + cut*d.S, dt + cut*d.H,
                         A_log, D, middle, doc2);
            ssd_backward(&d1, g_xBC, g_dt, sums, sums + d.H, g_initial, o.out[0].g, g_middle, w,
                         o.work[1], xBC, dt, A_log, D, o.in[4].x, o.doc);
            finish();
            const real *whole[] = { o.out[0].x, o.out[1].x, o.in[0].g, o.in[1].g, o.in[4].g, o.in[2].g };
            const real *parts[] = { y, final, g_xBC, g_dt, g_initial, sums };
            const size_t counts[] = { nE, NP, nS, nH, NP, d.H };
            for (size_t k = 0; k < 6; k++) {
                double *ref = doubles_of(whole[k], counts[k]);
                int same = cut % d.Q == 0 && k < 5;
                double error = same ? bits_different(parts[k], whole[k], counts[k])
                                    : error_of(parts[k], ref, counts[k]);
                expect(error, same ? 0 : rounding(2*d.T + d.N + d.P), "result %zu, cut at %zu: %s", k,
                       cut, shape_text(&d));
                free(ref);
            }
            free(y), free(g_xBC), free(g_dt), free(sums), free(middle), free(final), free(g_middle);
            free(g_initial), free(doc2), op_close(&o);
        }
}

// ================================================================================================
// The run of all tests
// ================================================================================================

typedef struct { const char *name; void (*run)(void); } Test;
static const Test tests[] = {
    { "gradient of embed", test_embed_gradient },
    { "gradient of rmsnorm", test_rmsnorm_gradient },
    { "gradient of linear", test_linear_gradient },
    { "gradient of conv1d", test_conv1d_gradient },
    { "gradient of dt", test_dt_gradient },
    { "gradient of ssd", test_ssd_gradient },
    { "gradient of gated_rmsnorm", test_gated_gradient },
    { "gradient of swiglu", test_swiglu_gradient },
    { "gradient of classifier", test_classifier_gradient },
    { "ssd: chunks, recurrence, attention", test_ssd_forms },
    { "ssd: a row in two parts", test_ssd_split },
};

int main(int argc, char **argv) {
    size_t passed = 0, failed = 0;
    (void)run_main, (void)cpu_backend;
    for (size_t i = 0; i < sizeof tests/sizeof *tests; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1])) continue;
        double start = now();
        memset(&test, 0, sizeof test);
        draws = 0;
        flags_default();
        tests[i].run();
        int good = test.checks && !test.failed;
        printf("%s  %-34s %6zu checks  worst %.1e  bound %.1e  %5.2f s\n", good ? "ok  " : "FAIL",
               tests[i].name, test.checks, test.error, test.bound, now() - start);
        fflush(stdout);
        passed += (size_t)good, failed += (size_t)!good;
    }
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed || !passed;
}
