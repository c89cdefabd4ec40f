// bench.c: how fast the CPU program is, part by part, as percent of the machine's peak.
//
//     make bench                   all tables (about two minutes);  build/bench gemm ssd step decode
//
// Machines are shared and clocks move, so nothing is compared across time: the peak is measured
// anew beside every sample, and each row gives medians over the samples.

#define NO_MAIN
#include "train_mamba2.c"

enum { SAMPLES = 9 };

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, size_t count) {
    qsort(v, count, sizeof(double), compare_doubles);
    return v[count/2];
}

static real *filled(size_t count) {
    real *x = alloc_reals(count);
    PARALLEL_FOR
    for (size_t i = 0; i < count; i++) x[i] = (real)(random_uniform(1, 2, i) - 0.5);
    return x;
}

// Runs work() SAMPLES times, each for at least 50 ms; gives the median of its seconds and of its
// share of the peak beside it.
typedef struct { double seconds, share; } Speed;
static Speed measure(void (*work)(void *), void *what, double flops) {
    double seconds[SAMPLES], shares[SAMPLES];
    work(what);
    for (size_t i = 0; i < SAMPLES; i++) {
        double peak = fma_sample(), start = now(), count = 0;
        do work(what), count++; while (now() - start < 0.05);
        seconds[i] = (now() - start)/count;
        shares[i] = flops/seconds[i]/peak;
    }
    Speed s = { median(seconds, SAMPLES), median(shares, SAMPLES) };
    return s;
}

// ---- matrix products at the trainer's shapes ----------------------------------------------------
typedef struct { size_t n, I, O; real *in, *weight, *out; int kind; } Gemm;

static void run_gemm(void *what) {
    Gemm *g = (Gemm *)what;
    if (g->kind == 0) matmul(g->out, g->O, g->in, g->I, 1, g->weight, 1, g->I, g->n, g->O, g->I, 0);
    if (g->kind == 1) matmul(g->in, g->I, g->out, g->O, 1, g->weight, g->I, 1, g->n, g->I, g->O, 0);
    if (g->kind == 2) matmul(g->weight, g->I, g->out, 1, g->O, g->in, g->I, 1, g->O, g->I, g->n, 0);
}

static void bench_gemm(void) {
    static const struct { const char *name; size_t n, I, O; } shapes[] = {
        { "130m in_proj", 1024, 768, 3352 },   { "130m out_proj", 1024, 1536, 768 },
        { "130m head", 1024, 768, 50288 },     { "small in_proj", 2048, 256, 1160 },
        { "small out_proj", 2048, 512, 256 },  { "small head", 2048, 256, 272 },
        { "mini in_proj", 2048, 128, 648 },    { "mini out_proj", 2048, 256, 128 },
    };
    printf("\nmatrix products, GFLOP/s and percent of peak\n%-16s %-18s %16s %16s %16s\n", "", "n x I x O",
           "out = in W^T", "g_in = g_out W", "g_W = g_out^T in");
    for (size_t i = 0; i < sizeof shapes/sizeof *shapes; i++) {
        size_t n = shapes[i].n, I = shapes[i].I, O = shapes[i].O;
        Gemm g = { n, I, O, filled(n*I), filled(O*I), filled(n*O), 0 };
        printf("%-16s %-18s", shapes[i].name, str("%zu x %zu x %zu", n, I, O));
        for (g.kind = 0; g.kind < 3; g.kind++) {
            double flops = 2.0*(double)(n*I*O);
            Speed s = measure(run_gemm, &g, flops);
            printf("   %8.1f %3.0f%%", flops/s.seconds*1e-9, 100*s.share), fflush(stdout);
        }
        printf("\n");
        free(g.in), free(g.weight), free(g.out);
    }
}

// ---- SSD by form and chunk ------------------------------------------------------------------------
typedef struct {
    Dims d;
    real *xBC, *dt, *A_log, *D, *y, *states, *g_states, *final, *g_xBC, *g_dt, *g_A, *g_D;
    int form;                           // 0 recurrence, 1 forward, 2 backward
} Ssd;

static void run_ssd(void *what) {
    Ssd *s = (Ssd *)what;
    const Dims *d = &s->d;
    if (s->form == 0)
        ssd_recurrence(d, s->y, s->final, s->xBC, s->dt, s->A_log, s->D, NULL, NULL);
    if (s->form == 1)
        ssd_forward(d, s->y, s->states, NULL, s->xBC, s->dt, s->A_log, s->D, NULL, NULL);
    if (s->form == 2)
        ssd_backward(d, s->g_xBC, s->g_dt, s->g_A, s->g_D, NULL, s->y, NULL, s->states, s->g_states,
                     s->xBC, s->dt, s->A_log, s->D, NULL, NULL);
}

// FLOPs that are useful, a token: half of the products with a triangular mask are not
static double ssd_flops(const Dims *d, int backward) {
    double Q = (double)d->Q, E = (double)d->E, N = (double)d->N, G = (double)d->G;
    return backward ? 8*N*E + 2*Q*E + 3*Q*N*G : 4*N*E + Q*E + Q*N*G;
}

static void bench_ssd(void) {
    static const size_t chunks[] = { 16, 32, 64, 128, 256 };
    Ssd s;
    Dims *d = &s.d;
    memset(&s, 0, sizeof s);
    d->H = 24, d->P = 64, d->N = 128, d->G = 1, d->E = d->H*d->P, d->S = d->E + 2*d->N, d->V = 1;
    d->Q = 16;
    dims_batch(d, 1, 1024);
    size_t work = d->chunks*d->E*d->N;
    s.xBC = filled(d->n*d->S), s.dt = filled(d->n*d->H), s.y = filled(d->n*d->E);
    s.A_log = filled(d->H), s.D = filled(d->H), s.g_xBC = filled(d->n*d->S), s.g_dt = filled(d->n*d->H);
    s.g_A = filled(d->H), s.g_D = filled(d->H), s.final = filled(d->E*d->N);
    s.states = filled(work), s.g_states = filled(work);
    for (size_t i = 0; i < d->n*d->H; i++) s.dt[i] = (real)(0.05 + 0.04*(double)s.dt[i]);
    printf("\nSSD of mamba2-130m (24 heads of 64, d_state 128), T = 1024: us a token, percent of peak\n");
    Speed r = measure(run_ssd, &s, 5.0*(double)(d->n*d->E*d->N));
    printf("recurrence, forward         %8.1f %3.0f%%\n", 1e6*r.seconds/(double)d->n, 100*r.share);
    for (size_t i = 0; i < sizeof chunks/sizeof *chunks; i++) {
        d->Q = chunks[i];
        dims_batch(d, 1, 1024);
        s.form = 1;
        Speed f = measure(run_ssd, &s, ssd_flops(d, 0)*(double)d->n);
        s.form = 2;
        Speed b = measure(run_ssd, &s, ssd_flops(d, 1)*(double)d->n);
        printf("chunks of %3zu      forward  %8.1f %3.0f%%     backward %8.1f %3.0f%%\n", d->Q,
               1e6*f.seconds/(double)d->n, 100*f.share, 1e6*b.seconds/(double)d->n, 100*b.share);
    }
}

// ---- a training step by component -------------------------------------------------------------------
static Run run;

static void open_model(const char *preset, size_t R, size_t T) {
    memset(&run, 0, sizeof run);
    run.device = &cpu_backend;
    flags_default();
    flags.model = preset, flags.batch = (Int)R, flags.seq_len = (Int)T, flags.val_frac = 0;
    run_open(&run, NULL, NULL, 1);
}

static void bench_step(const char *preset, size_t R, size_t T, int with_ssd) {
    double shares[SAMPLES], rates[SAMPLES], sum = 0;
    open_model(preset, R, T);
    const Dims *d = &run.m.d;
    double flops = 6*(double)parameter_count(run.m.specs);
    if (with_ssd) flops += (double)d->L*(ssd_flops(d, 0) + ssd_flops(d, 1));
    size_t count = preset[0] == 'm' && preset[1] == 'a' ? 5 : SAMPLES;
    for (size_t i = 0; i <= count; i++) {
        if (i == 1) memset(laps, 0, sizeof laps);            // the first step warms up
        double peak = fma_sample(), start = now();
        model_zero_grad(&run.m);
        loader_next(&run.train);
        set_batch(&run.m, &run.train, 1);
        model_loss(&run.m, 1);
        gradient_norm(&run.m);
        adamw(&run.m, 1e-4, 1, (Int)i + 1);
        lap("adamw");
        if (i) rates[i - 1] = (double)d->n/(now() - start), shares[i - 1] = rates[i - 1]*flops/peak;
    }
    printf("\n%s, %zu x %zu tokens: %.0f tokens/s, %.0f%% of peak by 6N%s FLOPs a token\n", preset, R, T,
           median(rates, count), 100*median(shares, count), with_ssd ? " + SSD's" : "");
    for (size_t i = 0; laps[i].name; i++) sum += laps[i].seconds;
    for (size_t i = 0; laps[i].name; i++)
        printf("  %-12s %8.2f ms %5.1f%%\n", laps[i].name, 1e3*laps[i].seconds/(double)count,
               100*laps[i].seconds/sum);
    free(run.m.weights), free(run.m.grads), free(run.m.mean), free(run.m.square), free(run.m.acts);
}

// ---- decoding --------------------------------------------------------------------------------------
static const real *big;
enum { BIG = 1 << 28 };                 // bytes, beyond any cache
static void run_read(void *what) {
    double *sum = (double *)what, total = 0;
    OMP(parallel for reduction(+:total) schedule(static))
    for (size_t i = 0; i < BIG/sizeof(real)/1024; i++) {
        real part = 0;
        OMP(simd reduction(+:part))
        for (size_t j = 0; j < 1024; j++) part += big[i*1024 + j];
        total += (double)part;
    }
    *sum = total;
}

static Model sampler;
static void run_decode(void *what) { sampler_feed(&sampler, (const int *)what, 1); }

static void bench_decode(void) {
    double sum;
    int id = 10;
    open_model("mamba2-130m", 1, 64);
    sampler_open(&sampler, &run.m, 1, 1);
    sampler_recurrent(&sampler);
    big = filled(BIG/sizeof(real));
    Speed read = measure(run_read, &sum, 1), step = measure(run_decode, &id, 1);
    double bytes = (double)(parameter_count(run.m.specs)*sizeof(real));
    printf("\ndecoding mamba2-130m: %.1f tokens/s, weights read at %.1f GB/s, %.0f%% of %.1f GB/s\n",
           1/step.seconds, bytes/step.seconds*1e-9, 100*bytes/step.seconds/(BIG/read.seconds),
           BIG/read.seconds*1e-9);
}

int main(int argc, char **argv) {
    const char *all = argc > 1 ? "" : "gemm ssd step decode";
    printf("%d threads, peak %.0f GFLOP/s (%s)\n", omp_get_max_threads(), fma_peak()*1e-9,
           sizeof(real) == 4 ? "float" : "double");
    for (int i = argc > 1; i < argc; i++) {
        const char *what = argc > 1 ? argv[i] : all;
        if (strstr(what, "gemm")) bench_gemm();
        if (strstr(what, "ssd")) bench_ssd();
        if (strstr(what, "step")) bench_step("mini", 8, 256, 1), bench_step("small", 8, 256, 1),
                                  bench_step("mamba2-130m", 1, 1024, 0);
        if (strstr(what, "decode")) bench_decode();
    }
    return 0;
}
