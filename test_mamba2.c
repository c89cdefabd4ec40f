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
// gradients; states and documents as there. With all inputs made positive, sign of A included, they
// sum up the sizes of all terms, which rounding errors are relative to.

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

static Ssd by_form(void (*form)(const Op *, const Ssd *, Ssd *, size_t, size_t), const Op *o, int sizes) {
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
                   "chunks and %s, %s, variant %d: %s", form, a->name, o->variant, shape_text(&o->d));
    }
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
            Ssd ref = by_form(recurrence, &o, 0), sizes = by_form(recurrence, &o, 1);
            compare_ssd(&o, &ref, &sizes, "recurrence");
            if (!(o.variant & 1)) {
                Ssd other = by_form(attention, &o, 0);
                compare_ssd(&o, &other, &sizes, "attention");
                ssd_free(&other);
            }
            real *y = buffer(d.n*d.E), *final = buffer(d.R*d.H*d.N*d.P);
            ssd_recurrence(&d, y, final, o.in[0].x, o.in[1].x, o.in[2].x, o.in[3].x, o.in[4].x, o.doc);
            expect(error_of(y, ref.y, sizes.y, d.n*d.E), ssd_bound(&d), "ssd_recurrence, y: %s",
                   shape_text(&d));
            expect(error_of(final, ref.final, sizes.final, o.out[1].count), ssd_bound(&d),
                   "ssd_recurrence, final: %s", shape_text(&d));
            free(y), free(final), ssd_free(&ref), ssd_free(&sizes), op_close(&o);
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
            Ssd sizes = by_form(recurrence, &o, 1);
            const real *parts[] = { y, final, g_xBC, g_dt, sums, sums + d.H, g_initial };
            for (size_t k = 0; k < SSD_TENSORS; k++) {
                const Arg *a = ssd_arg(&o, k);
                const real *whole = k < OUT ? a->x : a->g;
                double *ref = doubles_of(whole, a->count);
                int same = cut % d.Q == 0 && k != 4 && k != 5;           // sums over tokens
                expect(same ? bits_different(parts[k], whole, a->count)
                            : error_of(parts[k], ref, ((double **)&sizes)[k], a->count),
                       same ? 0 : ssd_bound(&d), "%s, cut at %zu: %s", a->name, cut, shape_text(&d));
                free(ref);
            }
            free(y), free(g_xBC), free(g_dt), free(sums), free(middle), free(final), free(g_middle);
            free(g_initial), free(doc2), ssd_free(&sizes), op_close(&o);
        }
}

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
        if (x <= 20 && soft > FLT_MIN) expect(ulps(softplus(v), soft), 2, "softplus(%g)", x);
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
    for (size_t i = 0; i < M; i++) touched += bits_different(C + i*ldc + N, before + i*ldc + N, ldc - N);
    return touched;
}

static const size_t product_sizes[][3] = {
    { 1, 1, 1 }, { 3, 5, 7 }, { 4, 65, 33 }, { 5, 33, 65 }, { 17, 50, 129 }, { 8, 48, 64 }, { 2, 9, 0 },
    { 97, 101, 211 }, { 131, 197, 400 }, { 2051, 5, 3 }, { 5, 1163, 9 }, { 1, 300, 70 }, { 9, 97, 801 },
};

static void test_matmul(void) {
    int threads = omp_get_max_threads();
    for (size_t s = 0; s < sizeof product_sizes/sizeof *product_sizes; s++)
        for (int kind = 0; kind < 6; kind++) {               // NN NT TN, set or add
            size_t M = product_sizes[s][0], N = product_sizes[s][1], K = product_sizes[s][2], ldc = N + 3;
            Matrix A = random_matrix(M, K, kind%3 == 2), B = random_matrix(K, N, kind%3 == 1);
            real *before = random_buffer(M*ldc, -1, 1), *first = NULL;
            int add = kind >= 3;
            for (size_t i = 0; i < M*ldc && !add; i++) before[i] = NAN;      // set: must not matter
            for (int t = 1; t <= 3; t++) {
                real *C = copy_of(before, M*ldc);
                omp_set_num_threads(t);
                matmul(C, ldc, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, add), finish();
                expect(product_error(C, before, ldc, A, B, M, N, K, add), rounding(K + 2),
                       "%zu x %zu x %zu, kind %d, %d threads", M, N, K, kind, t);
                expect(gaps_touched(C, before, ldc, M, N), 0, "beyond C, %zu x %zu x %zu", M, N, K);
                if (first) expect(bits_different(C, first, M*ldc), 0, "%d threads differ from 1", t);
                if (!first) first = C;
                else free(C);
            }
            if (K) {                    // a NaN in A reaches its whole row of C, and no other
                size_t row = M/2, wrong = 0;
                A.x[row*A.row + K/2*A.col] = NAN;
                for (size_t i = 0; i < M*ldc; i++) before[i] = 1;
                matmul(before, ldc, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, add), finish();
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
        size_t M = (size_t)uniform(1, 71), N = (size_t)uniform(1, 71), K = s % 20 ? (size_t)uniform(1, 140) : 0;
        size_t ldc = N + 2;
        double beta = betas[s%3];
        Matrix A = random_matrix(M, K, s/3%2), B = random_matrix(K, N, 0);
        real *before = random_buffer(M*ldc, -1, 1), *C;
        for (size_t i = 0; i < M*ldc && beta == 0; i++) before[i] = NAN;
        C = copy_of(before, M*ldc);
        matmul_small(C, ldc, A.x, A.row, A.col, B.x, B.row, M, N, K, (real)beta);
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

// In bf16 both operands are rounded to 8 bits, half a unit of 2^-8 each; the sums are in float.
static void test_bf16(void) {
    if (!bf16_available()) return;
    for (size_t s = 0; s < sizeof product_sizes/sizeof *product_sizes; s++)
        for (int kind = 0; kind < 6; kind++) {
            size_t M = product_sizes[s][0], N = product_sizes[s][1], K = product_sizes[s][2];
            Matrix A = random_matrix(M, K, kind%3 == 2), B = random_matrix(K, N, kind%3 == 1);
            real *before = random_buffer(M*N, -1, 1), *C = copy_of(before, M*N);
            matmul_bf16 = 1;
            matmul(C, N, A.x, A.row, A.col, B.x, B.row, B.col, M, N, K, kind >= 3);
            matmul_bf16 = 0;
            expect(product_error(C, before, N, A, B, M, N, K, kind >= 3), 1.0/256 + rounding(K + 2),
                   "bf16 of %zu x %zu x %zu", M, N, K);
            for (size_t i = 0; i < M*K; i++) A.x[i] = eight_bits(A.x[i]);
            for (size_t i = 0; i < K*N; i++) B.x[i] = eight_bits(B.x[i]);
            expect(product_error(C, before, N, A, B, M, N, K, kind >= 3), rounding(K + 2),
                   "bf16 of rounded %zu x %zu x %zu", M, N, K);
            free(A.x), free(B.x), free(before), free(C);
        }
}

// ================================================================================================
// The model
// ================================================================================================

typedef struct { size_t shape, layers; int tied, mlp, packed, lanes; } Kind;
static const Kind kinds[] = {
    { 1, 2, 1, 0, 0, 0 }, { 1, 2, 0, 1, 1, 1 }, { 3, 2, 1, 1, 1, 0 }, { 4, 3, 0, 0, 0, 1 }, { 5, 2, 1, 1, 0, 1 },
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
    for (size_t k = 0; k < PARAM_COUNT; k++)                 // no weight is 0 or 1, no norm small
        for (size_t i = 0; i < m->specs[k].count; i++)
            ((real **)&m->w)[k][i] += (real)uniform(-0.3, 0.3);
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
                       "%s of model %zu: slope %.9g, gradient %.9g", m.specs[k].name, i, slope, dot);
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

// Two micro-batches of half the rows add up to the gradient of one batch, but for the order of sums.
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

// ---- structure: what must not depend on what -------------------------------------------------------

static real *logits_of(Model *m) {       // (n,V)
    m->all_logits = buffer(m->d.n*m->d.V);
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
                memcpy(one.a.carried + l*states, m.a.carried + (l*R + r)*states, states*sizeof(real));
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

// A row of --carry in two steps, cut anywhere, has the logits of the whole row; so has a packed one.
static void test_carry(void) {
    for (size_t i = 0; i < 2*SHAPE_COUNT; i++)
        for (size_t cut = 1; cut < shapes[i/2].T; cut += 1 + cut/3) {
            Model m;
            Dims d = dims_of(&shapes[i/2]);
            d.L = d.kept = 2, d.lanes = d.R, d.tied = 1, d.F = 0;
            open_model(&m, &d, (int)i%2);
            real *whole = logits_of(&m);
            const int *ids = m.ids, *targets = m.targets, *doc = m.doc;
            int *part_ids = random_ids(d.n, d.V), *part_doc = doc ? (int *)alloc(d.n, sizeof(int)) : NULL;
            for (size_t from = 0, size = cut; from < d.T; from += size, size = d.T - cut) {
                dims_batch(&m.d, d.R, size);
                m.d.slab = ceil_div(m.d.n, 2);
                for (size_t k = 0; k < m.d.n; k++) {
                    size_t at = k/size*d.T + from + k%size, row = k/size*d.T + from;
                    part_ids[k] = ids[at];
                    if (doc) part_doc[k] = doc[at] - (from ? doc[row - 1] : 0);
                }
                m.ids = part_ids, m.doc = part_doc;
                real *part = logits_of(&m);
                for (size_t r = 0; r < d.R; r++) {
                    double *ref = doubles_of(whole + (r*d.T + from)*d.V, size*d.V);
                    expect(error_of(part + r*size*d.V, ref, ref, size*d.V), model_bound(&d),
                           "packed %zu, row %zu from %zu: %s", i%2, r, from, shape_text(&d));
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
            m.d.slab = m.d.n, m.ids = ids + from, m.doc = NULL;
            m.d.slab = least(m.d.slab, d.slab);
            real *alone = logits_of(&m);
            double *ref = doubles_of(whole + from*d.V, (to - from)*d.V);
            expect(error_of(alone, ref, ref, (to - from)*d.V), model_bound(&d), "tokens %zu to %zu: %s",
                   from, to, shape_text(&d));
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
                sampler_open(&s, &m, piece);
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

static void test_sampling(void) {
    const real logits[] = { 1, 3, 2, 3, (real)-1, 9 };       // the last is padding
    enum { DRAWS = 10000 };
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
        { 1,   1,   99, { 0.13533528323661270, 1, 0.36787944117144233, 1, 0.018315638888734179, 0 } },
        { 1,   1,    0, { 0.13533528323661270, 1, 0.36787944117144233, 1, 0.018315638888734179, 0 } },
    };
    for (size_t i = 0; i < sizeof cases/sizeof *cases; i++) {
        double counts[6] = { 0 }, sum = 0;
        for (int k = 0; k < DRAWS; k++)                      // evenly spaced: the counts are exact
            counts[sample(logits, 5, cases[i].temperature, cases[i].top_k, cases[i].top_p,
                          (k + 0.5)/DRAWS)]++;
        for (int k = 0; k < 6; k++) sum += cases[i].odds[k];
        for (int k = 0; k < 6; k++)
            expect(fabs(counts[k]/DRAWS - cases[i].odds[k]/sum), cases[i].odds[k] > 0 ? 1.0/DRAWS : 0,
                   "case %zu: token %d drawn %g times of %d", i, k, counts[k], DRAWS);
    }
}

// ================================================================================================
// Initialization and optimizer
// ================================================================================================

// The mean of n independent numbers lies within five deviations of its expectation, but for one
// seed in a million.
static void test_initialization(void) {
    Model m, other;
    Dims d = dims_of(&shapes[6]);
    const double bounds[] = { 1, 5.5*0.02, 1, 1, 1, log(-expm1(-0.1)) + 0.1, log(16) };    // by init
    d.L = d.kept = 3, d.tied = 0, d.dt_hi = INFINITY;
    for (int part = 0; part < 2; part++) {
        Model *x = part ? &other : &m;
        memset(x, 0, sizeof *x);
        model_allocate(x, &d, 0);
        omp_set_num_threads(1 + 2*part);
        model_init(x, 1337);
    }
    omp_set_num_threads(omp_get_num_procs());
    expect(bits_different(m.weights, other.weights, m.size), 0, "the same seed");
    model_init(&other, 1338);
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        const Spec *s = &m.specs[k];
        const real *w = ((real **)&m.w)[k];
        size_t count = s->count;
        double fan_in = (double)s->shape[s->rank - 1], high = bounds[s->init], low = -high, sum = 0, square = 0;
        if (s->init == FAN_IN) high = 1/sqrt(fan_in), low = -high;
        if (s->init == FAN_IN_L) high = 1/sqrt(3*fan_in), low = -high;
        if (s->init == CONV) high = 0.5, low = -high;        // W = 4
        if (s->init == DT_BIAS) low = log(expm1(0.001));
        if (s->init == A_LOG) low = 0;
        if (s->init == ONES) low = 1;
        for (size_t i = 0; i < count; i++) {
            double x = (double)w[i];
            EXPECT(x >= low - 1e-6 && x <= high + 1e-6, "%s is %g", s->name, x);
            sum += x, square += x*x;
        }
        int even = s->init == FAN_IN || s->init == FAN_IN_L || s->init == CONV;
        double deviation = even ? high/sqrt(3) : 0.02;
        if (even || s->init == NORMAL) {
            expect(fabs(sum/(double)count), 5*deviation/sqrt((double)count), "mean of %s", s->name);
            expect(fabs(sqrt(square/(double)count)/deviation - 1), 5/sqrt((double)count),
                   "deviation of %s", s->name);
        }
        if (s->init != ONES) EXPECT(bits_different(w, ((real **)&other.w)[k], count) > 0,
                                    "%s does not depend on the seed", s->name);
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
        { "wsd", 100, 10, 0.2, 100, 0.2 },    { "wsd", 100, 90, 0.2, 95, 0.6 },      // from warmup on
        { "wsd", 13, 0, 0.2, 10, 1 },         { "wsd", 13, 0, 0.2, 12, 0.2 + 0.8/3 },  // D = round(2.6)
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
    for (int i = 0; i < 3*WINDOW; i++) {
        if (i < HISTORY) EXPECT(!outlier(&r, 1e9, 3), "after %d values", i);
        remember(&r, i < WINDOW ? 1e6 : i%2*2);              // the old ones are forgotten: mean 1, sd 1
    }
    EXPECT(!outlier(&r, 3.99, 3) && outlier(&r, 4.01, 3), "three deviations");
    EXPECT(!outlier(&r, 1e9, 0) && !outlier(&r, -1e9, 3), "off, and far below");
}

// ================================================================================================
// Tokens
// ================================================================================================

static char scratch[PATH_MAX];          // a directory for the files of the tests

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
        write_tokens(str("shard_%zu.bin", s), s % 2 && 0 ? 7 : 1, tokens, shard_sizes[s]);
    }
}

static Loader open_shards(size_t R, size_t T, size_t accum, int shuffle, int packed, int carry) {
    static Tokenizer *bytes;
    Loader d;
    if (!bytes) bytes = tokenizer_bytes();
    flags.eot = END, given[FLAG_eot] = 1;
    loader_open(&d, str("%s/shard_*.bin", scratch), "--data", bytes);
    d.shuffle = shuffle, d.packed = packed, d.carry = carry, d.seed = 5, d.accum = accum;
    int quiet = open("/dev/null", O_WRONLY), old = dup(2);   // the third shard is too small: a warning
    dup2(quiet, 2);
    loader_start(&d, 10000, R, T, 1);
    dup2(old, 2);
    close(quiet), close(old);
    given[FLAG_eot] = 0;
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
                           "epoch %zu, shard %zu, micro-batch %zu, token %zu: %d, target %d", epoch, s, k,
                           i, d.ids[i], d.targets[i]);
                EXPECT(d.epoch == epoch && d.shard == s && d.batch == k + 1, "position");
            }
    close_loader(&d);
}

// Shuffled: in an epoch as many micro-batches as in file order, no token twice, the order new in
// each epoch and with each seed. (Every token is its own document's: no end of text, no cut.)
static void test_shuffled_epoch(void) {
    const size_t R = 2, T = 5, n = R*T, all = (82/n + 30/n + 57/n)*n;
    write_shards(0);
    Loader d = open_shards(R, T, 1, 1, 0, 0), same = open_shards(R, T, 1, 1, 0, 0), other = same;
    other = open_shards(R, T, 1, 1, 0, 0), other.seed = 6;
    size_t moved = 0, seed_moved = 0, rows_ascend = 0;
    for (uint64_t epoch = 0; epoch < 6; epoch++) {
        char seen[SHARDS*1000] = { 0 };
        for (size_t i = 0; i < all; i++) {
            if (i % n == 0) loader_next(&d), loader_next(&same), loader_next(&other);
            int id = d.ids[i%n];
            EXPECT(d.epoch == epoch && !seen[id]++, "epoch %d: token %d comes twice", (int)epoch, id);
            EXPECT(d.targets[i%n] == id + 1, "token %d has the target %d", id, d.targets[i%n]);
            EXPECT(same.ids[i%n] == id, "another order with the same seed");
            if (i % T) EXPECT(id == d.ids[i%n - 1] + 1, "a row is not a stretch of its shard");
            moved += i % n == 0 && id != (int)(i%82), seed_moved += id != other.ids[i%n];
            rows_ascend += i % n == T && id == d.ids[i%n - T] + (int)T;
        }
    }
    expect(6*(double)all/(double)n/4, (double)moved, "micro-batches are in file order");
    expect(6*(double)all/2, (double)seed_moved, "the order does not depend on the seed");
    expect((double)rows_ascend, 6*(double)all/(double)n/2, "rows are in file order");
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
    const char *a = write_tokens("a.txt", 0, tokens, 256), *b = write_tokens("b.txt", 0, tokens + 40, 3);
    loader_open(&d, a, "--data", bytes);
    EXPECT(d.text_size == 256 && !memcmp(d.text, tokens, sizeof tokens), "bytes of a text");
    loader_split(&d, &val, 0.1);
    EXPECT(d.text_size == 230 && val.text_size == 26 && val.text[0] == 230, "the last part");
    loader_open(&d, str("%s,%s/*.txt,%s", b, scratch, a), "--data", bytes);
    EXPECT(d.text_size == 261 && d.text[0] == 256 && d.text[257] == 256 && d.text[258] == 40 && d.text[1] == 0,
           "two texts, sorted, without duplicates");
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
        const char *header = str("{\"x\":{\"dtype\":\"%s\",\"shape\":[2,3],\"data_offsets\":[0,%zu]}}",
                                 types[type], 6*width);
        uint64_t size = strlen(header);
        put_bytes(&t, &size, 8), put_bytes(&t, header, size);
        for (int i = 0; i < 6; i++) {
            float single = (float)values[i];
            const char *at = type == 0 ? (const char *)&values[i] : type == 1 ? (const char *)&single
                           : type == 2 ? (const char *)&half[i] : (const char *)&single + 2;
            put_bytes(&t, at, width);
        }
        write_file(path, t.data, t.size);
        TensorFile f = tensor_file_open(path);
        tensor_read(&f, json_get(f.header, "x"), &x);
        for (int i = 0; i < 6; i++)
            EXPECT((double)got[i] == values[i], "%s: %g for %g", types[type], (double)got[i], values[i]);
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
            double ref = e == 31 ? INFINITY : e ? (1 + m/1024.0)*pow(2, e - 15) : m/1024.0*pow(2, -14);
            EXPECT(x == sign*ref && !!signbit(x) == (i >> 15), "%04x is %g", i, x);
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
    static const char *const source = "{\"a\": [1, -2.5e3, {\"b\": \"\\u00e9\\ud83d\\ude00\\n\"}], \"c\": true}";
    j = json_parse("test", source, strlen(source));
    const Json *a = json_get(j, "a");
    EXPECT(a->span == 6 && strtod((a + 2)->text, NULL) == -2500 && json_bool(j, "test", "c", 0), "numbers");
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
        EXPECT(found.M == d.M && found.L == d.L && found.H == d.H && found.P == d.P && found.N == d.N
               && found.G == d.G && found.W == d.W && found.V == d.V && found.F == d.F && found.E == d.E
               && found.tied == d.tied && found.eps == d.eps && found.dt_lo == d.dt_lo,
               "config.json of model %zu", i);
        EXPECT(found.dt_hi == d.dt_hi || (i%2 && found.dt_hi > 3e38), "dt_limit %g", found.dt_hi);
        memset(&read, 0, sizeof read);
        model_allocate(&read, &d, 0);
        read_weights(scratch, &read);
        expect(bits_different(m.weights, read.weights, m.size), 0, "weights of model %zu", i);
        free(config.data), free(list.list), free(read.weights), free(read.acts), close_model(&m);
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
    { "tokens shuffled", test_shuffled_epoch },
    { "tokens after a seek", test_seek },
    { "tokens of documents", test_documents },
    { "tokens of lanes", test_lanes },
    { "text", test_text },
    { "safetensors", test_safetensors },
    { "half precision", test_half },
    { "json, byte tokenizer", test_json_and_tokenizer },
    { "model directory", test_model_files },
};

int main(int argc, char **argv) {
    size_t passed = 0, failed = 0;
    (void)run_main, (void)cpu_backend;
    snprintf(scratch, sizeof scratch, "%s/test_mamba2.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
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
