// train_mamba2.c: trains Mamba-2 language models on the CPU, in plain C.
//
// All that is about Mamba-2 is in this file: the model of "Transformers are SSMs" (Dao and Gu 2024,
// arXiv 2405.21060; below: the paper), its forward and its backward pass written out by hand, AdamW
// and the data loader, checkpoints, sampling and the training run. What any program might need lies
// in dev/lib: matrix products, JSON, tokenizer, checksums, a plot. No library but OpenMP and zlib.
// Read it from top to bottom; `grep -n '^// ====' train_mamba2.c` prints the table of contents.
//
//     make && ./train_mamba2            trains a small model on Shakespeare, about two minutes
//     ./train_mamba2 --help             all flags
//
// One letter for each size, here, in the CUDA file, in the tests and in doc/:
//
//     R  rows of a batch            T  tokens of a row           n = R*T
//     M  d_model                    E  d_inner = expand*M        L  layers
//     H  heads                      P  headdim (E = H*P)         N  d_state
//     G  groups of B and C          W  width of the convolution  Q  chunk of SSD
//     S  = E + 2GN channels of the convolution: x | B | C
//     Z  = S + E + H columns of in_proj's output: z | x | B | C | dt
//     F  d_intermediate of the MLP  V  rows of the vocabulary, padded
//
// Tensors have the paper's names: u x z B C dt A D y. `g_x` is the gradient of the loss with
// respect to x. Gradients of weights add up over the micro-batches of a step; those of activations
// are overwritten. Arrays are row-major, with the shape beside the name: `x (n,E)`.
//
// The file is C11 and C++20 at once, because train_mamba2.cu includes it, in float and, compiled
// with -DREAL=double, in double: the double program is the judge of the float one.

#include "dev/lib/system.h"              // of the system

#ifndef REAL
#define REAL float
#endif
typedef REAL real;                      // the type of all weights, activations and gradients

#ifndef _OPENMP                          // built with -fopenmp-simd: one thread
static int omp_get_max_threads(void) { return 1; }
static void omp_set_num_threads(int n) { (void)n; }
#endif

#ifndef HELPERS_ONCE                    // macros, seen once even when the file is included twice
#define HELPERS_ONCE
#define PRINTF(f, a) __attribute__((format(printf, f, a)))
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#define OMP(...) PRAGMA(omp __VA_ARGS__)
#define PARALLEL_FOR OMP(parallel for schedule(static))
#define SIMD OMP(simd)
#define CHECK(ok, ...) do { if (!(ok)) die(__VA_ARGS__); } while (0)
#endif

#include "dev/lib/tools.h"               // errors, memory, files, text, random numbers, time
#include "dev/lib/json.h"
#include "dev/lib/tokenizer.h"           // bytes, and byte-level BPE from a tokenizer.json
#include "dev/lib/safetensors.h"
#include "dev/lib/plot.h"                // loss.png
#include "dev/lib/log.h"                 // log.jsonl and its curves

#define VERSION "0.1"

enum { RANDOM_ORDER = 1000, RANDOM_SAMPLE };     // streams of random numbers; tensor k has stream k

// ================================================================================================
// Three tables: flags, parameters, activations. Everything else about them is generated
// ================================================================================================

// ---- flags --------------------------------------------------------------------------------------
// One row makes a field of `Flags`, a line of --help, the parser, an entry of the log's first line.
// The default is written as a user would write it; "" means: decided later (see the help text).

typedef int64_t Int;
typedef int64_t Switch;                 // present or not
typedef double Num;
typedef const char *Str;
typedef const char *Opt;                // a string that may be left out

// clang-format off
#define FLAGS(X)                                                                                 \
/*type   name            default  least most   group    meaning                                */ \
X(Str,    data, "data/tinyshakespeare.txt.gz", 0, 0, Data, "text or llm.c shards, also gzipped")  \
X(Str,    val_data,       "",       0, 0,      Data,    "validation tokens, likewise")            \
X(Num,    val_frac,       "0.1",    0, 0.9,    Data,    "held back of one text without --val-data")\
X(Str,    tokenizer,      "",       0, 0,      Data,    "a tokenizer.json; without it: bytes")    \
X(Int,    eot,            "-1",    -1, 1e9,    Data,    "end-of-text; -1: the tokenizer's")        \
X(Switch, packed,         "",       0, 1,      Data,    "states start afresh at end-of-text")     \
X(Int,    shuffle,        "1",      0, 1,      Data,    "0: file order")                          \
X(Int,    seed,           "1337",   0, 9e15,   Data,    "of initialization, order and sampling")  \
X(Str,    model,          "mini",   0, 0,      Model,   "a preset: PRESETS")                      \
X(Str,    init,           "",       0, 0,      Model,   "start from a model directory")           \
X(Int,    d_model,        "",       1, 1e6,    Model,   "width of the residual stream")           \
X(Int,    n_layer,        "",       1, 1e5,    Model,   "layers")                                 \
X(Int,    d_state,        "",       1, 1e5,    Model,   "N, the size of a state beside headdim")  \
X(Int,    headdim,        "",       1, 1e5,    Model,   "P, channels of a head")                  \
X(Int,    expand,         "",       1, 64,     Model,   "d_inner / d_model")                      \
X(Int,    ngroups,        "",       1, 1e5,    Model,   "groups of heads that share B and C")     \
X(Int,    d_conv,         "",       1, 64,     Model,   "width of the causal convolution")        \
X(Int,    vocab_size,     "",       1, 2e9,    Model,   "before padding; default: the data's")    \
X(Int,    d_intermediate, "",       0, 1e6,    Model,   "of a SwiGLU MLP in each layer; 0: none") \
X(Int,    tie,            "",       0, 1,      Model,   "1: the head's weight is the embedding")  \
X(Str,    dt_limit,       "",       0, 0,      Model,   "LO,HI: bounds of dt; default 0,inf")     \
X(Int,    chunk_size,     "0",      0, 4096,   Model,   "tokens of a chunk of SSD; 0: the fastest")\
X(Int,    steps,          "1300",   0, 1e12,   Train,   "optimizer steps in all")                 \
X(Int,    batch,          "8",      1, 1e6,    Train,   "rows of a micro-batch")                  \
X(Int,    seq_len,        "256",    1, 1e8,    Train,   "tokens of a row")                        \
X(Int,    accum,          "1",      1, 1e6,    Train,   "micro-batches of a step")                \
X(Switch, carry,          "",       0, 1,      Train,   "rows go on where they stopped")          \
X(Switch, recompute,      "",       0, 1,      Train,   "keep activations of one layer only")     \
X(Str,    dtype,          "",       0, 0,      Train,   "of products: f32 (CPU) or bf16 (GPU)")   \
X(Int,    residual_in_fp32, "1",    0, 1,      Train,   "GPU: 0: the residual stream in bf16")    \
X(Int,    threads,        "",       1, 4096,   Train,   "default: OMP_NUM_THREADS, or all cores") \
X(Num,    lr,             "4e-3",   0, 1e3,    AdamW,   "peak learning rate")                     \
X(Num,    min_lr,         "",       0, 1e3,    AdamW,   "last learning rate; default lr/10")      \
X(Int,    warmup,         "50",     0, 1e12,   AdamW,   "steps of linear warmup")                 \
X(Str,    schedule,       "cosine", 0, 0,      AdamW,   "constant, linear, cosine or wsd")        \
X(Num,    decay_frac,     "0.2",    0, 1,      AdamW,   "wsd: the part of the steps that decays") \
X(Num,    weight_decay,   "0.1",    0, 1e3,    AdamW,   "of matrices and the embedding")          \
X(Num,    beta1,          "0.9",    0, 0.9999, AdamW,   "decay of the mean")                      \
X(Num,    beta2,          "0.95",   0, 0.9999, AdamW,   "decay of the mean square")               \
X(Num,    eps,            "1e-8",   0, 1,      AdamW,   "added to the root")                      \
X(Num,    clip,           "1",      0, 1e30,   AdamW,   "largest gradient norm; 0: none")         \
X(Num,    skip_loss,      "0",      0, 1e6,    AdamW,   "skip steps so many deviations up; 0: off")\
X(Num,    skip_norm,      "0",      0, 1e6,    AdamW,   "likewise by the gradient's norm")        \
X(Str,    out,            "out",    0, 0,      Output,  "directory of checkpoints, log and plot") \
X(Switch, resume,         "",       0, 1,      Output,  "go on from the newest good checkpoint")  \
X(Int,    save_every,     "250",    0, 1e12,   Output,  "steps between checkpoints; 0: none")     \
X(Int,    keep,           "2",      0, 1e9,    Output,  "newest checkpoints that stay; 0: all")   \
X(Int,    eval_every,     "250",    0, 1e12,   Output,  "steps between validations; 0: none")     \
X(Int,    eval_batches,   "0",      0, 1e12,   Output,  "micro-batches of a validation; 0: all")  \
X(Int,    sample_every,   "650",    0, 1e12,   Output,  "steps between samples of text; 0: none") \
X(Int,    log_every,      "20",     1, 1e12,   Output,  "steps between progress lines")           \
X(Int,    plot,           "1",      0, 1,      Output,  "1: OUT/loss.png at every validation")    \
X(Int,    generate,       "",       0, 1e12,   Text,    "print N tokens after --prompt, stop")    \
X(Str,    prompt,         "",       0, 0,      Text,    "text to go on from; - reads stdin")      \
X(Int,    num_samples,    "1",      1, 1e4,    Text,    "samples at once; 15 dashes between two") \
X(Num,    temperature,    "0.8",    0, 1e3,    Text,    "0: always the most likely token")        \
X(Int,    top_k,          "0",      0, 1e9,    Text,    "from the k most likely tokens; 0: all")  \
X(Num,    top_p,          "1",      0, 1,      Text,    "from the fewest tokens of probability P")\
X(Str,    eval,           "",       0, 0,      Inspect, "score a text, a shard or tasks, stop")   \
X(Str,    dump,           "",       0, 0,      Inspect, "write all tensors of a micro-batch, stop")\
X(Opt,    compare,        "",       0, 0,      Inspect, "REF[,BASE]: compare with dumps, stop")   \
X(Int,    profile,        "0",      0, 1e9,    Inspect, "time the parts of N steps, stop")        \
X(Switch, dry_run,        "",       0, 1,      Inspect, "print shape, memory and data, stop")     \
X(Int,    device,         "0",      0, 1024,   Inspect, "number of the GPU")                      \
X(Int,    graph,          "1",      0, 1,      Inspect, "GPU: 1: replay steps as CUDA graphs")     \
X(Switch, help,           "",       0, 1,      Inspect, "this text")                              \
X(Switch, version,        "",       0, 1,      Inspect, "version and build")
// clang-format on

#define X(type, name, ...) type name;
typedef struct { FLAGS(X) } Flags;      // flags.d_model is what --d-model says
#undef X
#define X(type, name, ...) FLAG_##name,
enum { FLAGS(X) FLAG_COUNT };           // given[FLAG_d_model]: the user said it
#undef X

typedef struct {
    const char *type, *name, *text;     // text: the default
    double least, most;
    const char *group, *help;
    size_t offset;                      // of its field in Flags
} FlagSpec;
#define X(type, name, text, least, most, group, help) \
    { #type, #name, text, least, most, #group, help, offsetof(Flags, name) },
static const FlagSpec flag_specs[] = { FLAGS(X) };
#undef X

static Flags flags;
static int given[FLAG_COUNT];

// ---- presets: the official models, and small ones for a CPU -------------------------------------
typedef struct { const char *name; Int d_model, n_layer, d_state, headdim, vocab_size; } Preset;
static const Preset presets[] = {       // vocab_size 0: the data's
    { "nano",          64,  2,  32, 16, 0 },
    { "mini",         128,  4,  64, 32, 0 },
    { "small",        256,  6, 128, 64, 0 },
    { "mamba2-130m",  768, 24, 128, 64, 50277 },
    { "mamba2-370m", 1024, 48, 128, 64, 50277 },
    { "mamba2-780m", 1536, 48, 128, 64, 50277 },
    { "mamba2-1.3b", 2048, 48, 128, 64, 50277 },
    { "mamba2-2.7b", 2560, 64, 128, 64, 50277 },
};
enum { PRESET_COUNT = sizeof presets/sizeof presets[0] };

// ---- sizes --------------------------------------------------------------------------------------
typedef struct {
    size_t R, T, n, M, E, L, H, P, N, G, W, Q, S, Z, F, V;
    size_t chunks;                      // of a row: T/Q, rounded up
    size_t slab;                        // rows of logits that exist at a time
    size_t kept;                        // layers whose activations are kept: L, or 1 (--recompute)
    size_t lanes;                       // rows whose states are carried from step to step, or 0
    size_t vocab;                       // rows that are tokens, not padding
    int tied;
    double dt_lo, dt_hi, eps;
} Dims;

static size_t ceil_div(size_t a, size_t b) { return (a + b - 1)/b; }
static size_t round_up(size_t a, size_t b) { return ceil_div(a, b)*b; }

// The sizes that follow from the batch's; logits exist for at most 2^26 numbers at a time.
static void dims_batch(Dims *d, size_t R, size_t T) {
    d->R = R, d->T = T, d->n = mul(R, T);
    d->chunks = ceil_div(T, d->Q);
    size_t slabs = ceil_div(mul(d->n, d->V), (size_t)1 << 26);
    d->slab = ceil_div(d->n, slabs);
}

// ---- parameters ---------------------------------------------------------------------------------
// How each starts (section 3 of the official code's modules): matrices as PyTorch's Linear, the
// last ones of a residual branch over sqrt(L); dt log-uniform in [0.001, 0.1], A in [1, 16].
enum { ONES, NORMAL, FAN_IN, FAN_IN_L, CONV, DT_BIAS, A_LOG };

// clang-format off
#define PARAMS(X) \
/*  name         shape            init       decay  name in a checkpoint (Hugging Face's)        */\
X(embedding,   (V, M),          NORMAL,    1,  "backbone.embeddings.weight")                       \
X(norm,        (L, M),          ONES,      0,  "backbone.layers.%zu.norm.weight")                  \
X(in_proj,     (L, Z, M),       FAN_IN,    1,  "backbone.layers.%zu.mixer.in_proj.weight")         \
X(conv_w,      (L, S, 1, W),    CONV,      0,  "backbone.layers.%zu.mixer.conv1d.weight")          \
X(conv_b,      (L, S),          CONV,      0,  "backbone.layers.%zu.mixer.conv1d.bias")            \
X(dt_bias,     (L, H),          DT_BIAS,   0,  "backbone.layers.%zu.mixer.dt_bias")                \
X(A_log,       (L, H),          A_LOG,     0,  "backbone.layers.%zu.mixer.A_log")                  \
X(D,           (L, H),          ONES,      0,  "backbone.layers.%zu.mixer.D")                      \
X(norm_g,      (L, E),          ONES,      0,  "backbone.layers.%zu.mixer.norm.weight")            \
X(out_proj,    (L, M, E),       FAN_IN_L,  1,  "backbone.layers.%zu.mixer.out_proj.weight")        \
X(norm2,       (mlp, M),        ONES,      0,  "backbone.layers.%zu.norm2.weight")                 \
X(fc1,         (mlp, F2, M),    FAN_IN,    1,  "backbone.layers.%zu.mlp.fc1.weight")               \
X(fc2,         (mlp, M, F),     FAN_IN_L,  1,  "backbone.layers.%zu.mlp.fc2.weight")               \
X(norm_f,      (M),             ONES,      0,  "backbone.norm_f.weight")                           \
X(lm_head,     (Vh, M),         FAN_IN,    1,  "lm_head.weight")

// ---- activations, their gradients, and work space -----------------------------------------------
// Those with a leading K are kept for the backward pass: one for each layer, or with --recompute a
// single one that is computed again.
#define ACTS(X) \
/*  name       shape             what                                                            */\
X(resid,     (L2, n, M))      /* the residual stream before each norm, and at the end            */\
X(u,         (K, n, M))       /* rmsnorm(resid)                                                  */\
X(rstd,      (K, n))          /* 1/rms of a row of resid                                         */\
X(zxBCdt,    (K, n, Z))       /* u in_proj^T                                                     */\
X(xBC,       (K, n, S))       /* silu(conv1d(zxBCdt's xBC))                                      */\
X(dt,        (K, n, H))       /* softplus(zxBCdt's dt + dt_bias), clamped                        */\
X(states,    (K, C, H, N, P)) /* SSD's state before each of the C chunks of the batch            */\
X(y,         (K, n, E))       /* SSD(x, dt, A, B, C) + D x                                       */\
X(rstd_g,    (K, n, G))       /* 1/rms of y silu(z), for each group                              */\
X(o,         (K, n, E))       /* rmsnorm(y silu(z))                                              */\
X(u2,        (Kmlp, n, M))    /* the MLP's: rmsnorm(resid)                                       */\
X(rstd2,     (Kmlp, n))                                                                            \
X(ab,        (Kmlp, n, F2))   /* u2 fc1^T: a | b                                                 */\
X(h,         (Kmlp, n, F))    /* a silu(b)                                                       */\
X(hidden,    (n, M))          /* rmsnorm(the last resid)                                         */\
X(rstd_f,    (n))                                                                                  \
X(losses,    (n))             /* -log p(target)                                                  */\
X(logits,    (slab, V))       /* of one slab of rows; then their gradient                        */\
X(g_resid,   (n, M))                                                                               \
X(g_u,       (n, M))          /* also of hidden and u2                                           */\
X(g_o,       (n, E))                                                                               \
X(g_y,       (n, E))                                                                               \
X(g_dt,      (n, H))                                                                               \
X(g_xBC,     (n, S))                                                                               \
X(g_zxBCdt,  (n, Z))                                                                               \
X(g_h,       (nmlp, F))                                                                            \
X(g_ab,      (nmlp, F2))                                                                           \
X(g_states,  (C, H, N, P))    /* the gradient of the state after each chunk                      */\
X(past,      (L, lanes, W1, S))  /* --carry: the convolution's last inputs, before and after     */\
X(past_new,  (L, lanes, W1, S))                                                                    \
X(carried,   (L, lanes, H, N, P)) /* --carry: the states of all layers, before and after       */\
X(carried_new, (L, lanes, H, N, P))
// clang-format on

// A row of PARAMS or ACTS with its shape in numbers; expanded from both tables below.
typedef struct {
    const char *name, *shape_text;
    size_t rank, shape[5], count;
    int init, decay;
    const char *key;                    // in a checkpoint
} Spec;

// For example: X(A_log, (L, H), ...) declares `real *A_log;` in Params, and p.A_log is (L,H).
#define X(name, ...) real *name;
typedef struct { PARAMS(X) } Params;
typedef struct { ACTS(X) } Acts;
#undef X
enum { PARAM_COUNT = sizeof(Params)/sizeof(real *), ACT_COUNT = sizeof(Acts)/sizeof(real *) };

static Spec spec(const char *name, const char *shape_text, const size_t *shape, size_t rank) {
    Spec s = { name, shape_text, rank, { 1, 1, 1, 1, 1 }, 1, 0, 0, NULL };
    for (size_t i = 0; i < rank; i++) s.shape[i] = shape[i], s.count = mul(s.count, shape[i]);
    return s;
}

#define SHAPE(...) { __VA_ARGS__ }
#define X(name_, shape_, init_, decay_, key_) { \
        const size_t sizes[] = SHAPE shape_; \
        specs[i] = spec(#name_, #shape_, sizes, sizeof sizes/sizeof sizes[0]); \
        specs[i].init = init_, specs[i].decay = decay_, specs[i++].key = key_; }
static void param_specs(const Dims *d, Spec specs[PARAM_COUNT]) {
    size_t M = d->M, E = d->E, L = d->L, H = d->H, W = d->W, S = d->S, Z = d->Z, F = d->F, V = d->V;
    size_t mlp = F ? L : 0, F2 = 2*F, Vh = d->tied ? 0 : V, i = 0;
    PARAMS(X)
}
#undef X
#define X(name_, shape_) { \
        const size_t sizes[] = SHAPE shape_; \
        specs[i++] = spec(#name_, #shape_, sizes, sizeof sizes/sizeof sizes[0]); }
static void act_specs(const Dims *d, Spec specs[ACT_COUNT]) {
    size_t n = d->n, M = d->M, E = d->E, L = d->L, H = d->H, P = d->P, N = d->N, G = d->G, S = d->S;
    size_t Z = d->Z, F = d->F, V = d->V, K = d->kept, lanes = d->lanes, slab = d->slab;
    size_t Kmlp = F ? K : 0, nmlp = F ? n : 0, F2 = 2*F, W1 = d->W - 1, C = d->R*d->chunks;
    size_t L2 = (F ? 2 : 1)*L + 1, i = 0;
    ACTS(X)
}
#undef X

static size_t total(const Spec *specs, size_t count) {
    size_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += round_up(specs[i].count, 16);
    return sum;
}

// Points `tensors`, a Params or an Acts, to their places in one block.
static real *place(real *block, void *tensors, const Spec *specs, size_t count) {
    real *p = block;
    for (size_t i = 0; i < count; i++) {
        ((real **)tensors)[i] = p;
        p += round_up(specs[i].count, 16);
    }
    return block;
}

static real *allocate_params(Params *params, const Spec *specs, int cleared) {
    size_t size = total(specs, PARAM_COUNT);
    void *block = cleared ? alloc(size, sizeof(real)) : alloc_work(size, sizeof(real));
    return place((real *)block, params, specs, PARAM_COUNT);
}

static real *allocate_acts(Acts *acts, const Spec *specs) {
    size_t size = total(specs, ACT_COUNT);
    return place((real *)alloc_work(size, sizeof(real)), acts, specs, ACT_COUNT);
}

#include "dev/lib/flags.h"                // flags_parse, print_help, die_usage

static void expect_one_of(size_t i, const char *value, const char *choices) {
    size_t n = strlen(value);
    for (const char *c = choices; *c; c += strcspn(c, " "), c += *c == ' ')
        if (!strncmp(c, value, n) && strcspn(c, " ") == n) return;
    die_usage("%s %s: expected one of: %s", flag_name(i), value, choices);
}

// What the range of a single value cannot tell
static void flags_check(void) {
    expect_one_of(FLAG_schedule, flags.schedule, "constant linear cosine wsd");
    if (given[FLAG_dtype]) expect_one_of(FLAG_dtype, flags.dtype, "f32 bf16");
    if (given[FLAG_dt_limit]) {
        char *comma, *end = NULL;
        double lo = strtod(flags.dt_limit, &comma), hi = NAN;
        if (*comma == ',') hi = strtod(comma + 1, &end);
        if (!(lo >= 0 && lo <= hi) || *end || end == comma + 1 || comma == flags.dt_limit)
            die_usage("--dt-limit %s: expected LO,HI with 0 <= LO <= HI", flags.dt_limit);
        flags.dt_limit = strdup(str("%.17g,%.17g", lo, hi));
    }
}

#include "dev/lib/matmul.h"               // matmul, matmul_small, transpose

// ================================================================================================
// The operations, in network order: each forward beside its backward, under one formula
// ================================================================================================
// Every element of an output has one owner thread and a fixed order of sums, so that the bits do
// not depend on the number of threads. Gradients of vectors, sums over all rows, are made in two
// stages: one part for each block of ROWS rows, then the sum of the parts.

enum { ROWS = 64, MAX_CONV = 64 };      // MAX_CONV: the largest --d-conv

// g (m) += the sum of parts (blocks,m)
static void sum_parts(real *g, const real *parts, size_t blocks, size_t m) {
    PARALLEL_FOR
    for (size_t i0 = 0; i0 < m; i0 += 256) {
        size_t i1 = i0 + 256 < m ? i0 + 256 : m;
        for (size_t b = 0; b < blocks; b++)
            SIMD for (size_t i = i0; i < i1; i++) g[i] += parts[b*m + i];
    }
}

// exp(x) to 1 ulp, in a form that vectorizes. NaN passes through; x is clamped to where the result
// is a normal number, which no formula here can tell from 0 or infinity.
static inline real expr(real x) {
    if (sizeof(real) == 8) return (real)exp((double)x);
    float v = (float)x;
    v = v < -87.0f ? -87.0f : v > 88.0f ? 88.0f : v;
    float k = v*1.44269504f + 12582912.0f;                   // round to an integer in the low bits
    float n = k - 12582912.0f, r = v - n*0.693145752f - n*1.42860677e-6f;    // x = n log 2 + r
    float p = 1.0f + (r + r*r*(0.49999994f + r*(0.16666521f + r*(0.04166839f
                                              + r*(0.008368745f + r*0.0013814539f)))));
    uint32_t bits;
    memcpy(&bits, &k, 4);
    bits = (bits << 23) + (127u << 23);                      // 2^n as a float
    float scale;
    memcpy(&scale, &bits, 4);
    return (real)(p*scale);
}

static inline real sigmoid(real x) { return 1/(1 + expr(-x)); }
static inline real silu(real x) { return x/(1 + expr(-x)); }
static inline real silu_grad(real x) { real s = sigmoid(x); return s*(1 + x*(1 - s)); }

// ---- embedding: resid = embedding[ids] ----------------------------------------------------------
// resid (n,M)  ids (n)  embedding (V,M)
static void embed_forward(const Dims *d, real *resid, const int *ids, const real *embedding) {
    size_t M = d->M;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++)
        memcpy(resid + i*M, embedding + (size_t)ids[i]*M, M*sizeof(real));
}

// A thread owns columns, so that rows of the same token are summed in order.
static void embed_backward(const Dims *d, real *g_embedding, const real *g_resid, const int *ids) {
    size_t M = d->M;
    PARALLEL_FOR
    for (size_t c = 0; c < M; c += 32) {
        size_t end = c + 32 < M ? c + 32 : M;
        for (size_t i = 0; i < d->n; i++) {
            real *g = g_embedding + (size_t)ids[i]*M;
            SIMD for (size_t j = c; j < end; j++) g[j] += g_resid[i*M + j];
        }
    }
}

// ---- RMSNorm: u = r/rms(r) * w, rms(r) = sqrt(mean(r^2) + eps) ----------------------------------
// u, resid (n,M)  rstd (n) = 1/rms  w (M)
static void rmsnorm_forward(const Dims *d, real *u, real *rstd, const real *resid, const real *w) {
    size_t M = d->M;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++) {
        const real *r = resid + i*M;
        real sum = 0;
        OMP(simd reduction(+:sum))
        for (size_t j = 0; j < M; j++) sum += r[j]*r[j];
        real s = rstd[i] = (real)(1/sqrt((double)sum/(double)M + d->eps));
        SIMD for (size_t j = 0; j < M; j++) u[i*M + j] = r[j]*s*w[j];
    }
}

// With v = r*rstd: g_r += rstd*(g_u w - v*mean(g_u w v)), g_w += sum over rows of g_u v.
static void rmsnorm_backward(const Dims *d, real *g_resid, real *g_w, const real *g_u,
                             const real *resid, const real *rstd, const real *w) {
    size_t M = d->M, blocks = ceil_div(d->n, ROWS);
    real *parts = alloc_reals(blocks*M);
    PARALLEL_FOR
    for (size_t b = 0; b < blocks; b++) {
        real *part = parts + b*M;
        for (size_t i = b*ROWS; i < d->n && i < (b + 1)*ROWS; i++) {
            const real *r = resid + i*M, *g = g_u + i*M;
            real s = rstd[i], dot = 0;
            OMP(simd reduction(+:dot))
            for (size_t j = 0; j < M; j++) dot += g[j]*w[j]*r[j];
            dot *= s*s/(real)M;
            SIMD for (size_t j = 0; j < M; j++) {
                g_resid[i*M + j] += s*(g[j]*w[j] - r[j]*dot);
                part[j] += g[j]*r[j]*s;
            }
        }
    }
    sum_parts(g_w, parts, blocks, M);
    free(parts);
}

// ---- linear: out = in weight^T ------------------------------------------------------------------
// out (n,O)  in (n,I)  weight (O,I)   add: out += instead of out =
static void linear_forward(real *out, const real *in, const real *weight, size_t n, size_t I,
                           size_t O, int add) {
    matmul(out, O, in, I, 1, weight, 1, I, n, O, I, add);
}

// g_in = g_out weight, g_weight = g_out^T in; add: g_weight += (from the second micro-batch on)
static void linear_backward(real *g_in, real *g_weight, const real *g_out, const real *in,
                            const real *weight, size_t n, size_t I, size_t O, int add) {
    matmul(g_in, I, g_out, O, 1, weight, I, 1, n, I, O, 0);
    matmul(g_weight, I, g_out, 1, O, in, I, 1, O, I, n, add);
}

// ---- causal convolution of each channel, then SiLU ----------------------------------------------
// xBC[t] = silu(b + sum over k < W of w[k]*in[t - (W-1) + k]), in = columns E..E+S of zxBCdt.
// xBC (n,S)  zxBCdt (n,Z)  w (S,W)  b (S)  past (R,W-1,S): the inputs before the row, or NULL: 0.
// Inputs of another document (doc (n), or NULL) count as 0; past belongs to document 0.

// The input that is `back` tokens before token t of row r; `zero` (S) where there is none.
static const real *conv_tap(const Dims *d, const real *zxBCdt, const real *past, const int *doc,
                            const real *zero, size_t r, size_t t, size_t back) {
    const int *row = doc ? doc + r*d->T : NULL;
    if (back > t) {
        if (!past || (row && row[t] != 0)) return zero;
        return past + (r*(d->W - 1) + d->W - 1 - (back - t))*d->S;
    }
    if (row && row[t] != row[t - back]) return zero;
    return zxBCdt + (r*d->T + t - back)*d->Z + d->E;
}

// The W taps of token i, the oldest first
static void conv_taps(const Dims *d, const real **taps, const real *zxBCdt, const real *past,
                      const int *doc, const real *zero, size_t i) {
    for (size_t k = 0; k < d->W; k++)
        taps[k] = conv_tap(d, zxBCdt, past, doc, zero, i/d->T, i%d->T, d->W - 1 - k);
}

// out (S) = b + the sum over k of wt[k] taps[k]; wt (W,S) is w transposed
static void conv_sum(const Dims *d, real *out, const real *const *taps, const real *wt,
                     const real *b) {
    size_t S = d->S, c = 0;
    for (; c + VL <= S; c += VL) {
        vec sum = *(const vec_at *)(b + c);
        for (size_t k = 0; k < d->W; k++)
            sum += *(const vec_at *)(wt + k*S + c) * *(const vec_at *)(taps[k] + c);
        *(vec_at *)(out + c) = sum;
    }
    for (; c < S; c++) {
        out[c] = b[c];
        for (size_t k = 0; k < d->W; k++) out[c] += wt[k*S + c]*taps[k][c];
    }
}

static real *transposed(const real *w, size_t rows, size_t cols) {
    real *t = alloc_reals(rows*cols);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) t[j*rows + i] = w[i*cols + j];
    return t;
}

static void conv1d_forward(const Dims *d, real *xBC, const real *zxBCdt, const real *w,
                           const real *b, const real *past, const int *doc) {
    size_t S = d->S;
    real *wt = transposed(w, S, d->W), *zero = alloc_reals(S);
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++) {
        const real *taps[MAX_CONV];
        real *out = xBC + i*S;
        conv_taps(d, taps, zxBCdt, past, doc, zero, i);
        conv_sum(d, out, taps, wt, b);
        SIMD for (size_t c = 0; c < S; c++) out[c] = silu(out[c]);
    }
    free(wt), free(zero);
}

// The W-1 inputs that the next stretch of the same row needs as its past
static void conv1d_past(const Dims *d, real *past_new, const real *zxBCdt, const real *past,
                        const int *doc) {
    size_t S = d->S, W1 = d->W - 1;
    real *zero = alloc_reals(S);
    for (size_t r = 0; r < d->R; r++)
        for (size_t k = 0; k < W1; k++)
            memmove(past_new + (r*W1 + k)*S,
                    conv_tap(d, zxBCdt, past, doc, zero, r, d->T - 1, W1 - 1 - k), S*sizeof(real));
    free(zero);
}

// With p = the sum before silu: g_p = g_xBC silu'(p); g_in[t] = sum of w[k] g_p[t + (W-1) - k];
// g_w[k] += sum over t of g_p[t] in[t - (W-1) + k]; g_b += sum over t of g_p[t]. g_xBC becomes g_p.
static void conv1d_backward(const Dims *d, real *g_zxBCdt, real *g_w, real *g_b, real *g_xBC,
                            const real *zxBCdt, const real *w, const real *b, const real *past,
                            const int *doc) {
    size_t S = d->S, W = d->W, T = d->T, blocks = ceil_div(d->n, ROWS), m = S*(W + 1);
    real *wt = transposed(w, S, W), *zero = alloc_reals(S);
    real *parts = alloc_reals(blocks*m), *sums = alloc_reals(m);
    PARALLEL_FOR
    for (size_t block = 0; block < blocks; block++) {
        real *part = parts + block*m, *p = alloc_reals(S);
        for (size_t i = block*ROWS; i < d->n && i < (block + 1)*ROWS; i++) {
            const real *taps[MAX_CONV];
            real *g = g_xBC + i*S;
            conv_taps(d, taps, zxBCdt, past, doc, zero, i);
            conv_sum(d, p, taps, wt, b);
            SIMD for (size_t c = 0; c < S; c++) {
                g[c] *= silu_grad(p[c]);
                part[W*S + c] += g[c];
            }
            for (size_t k = 0; k < W; k++) {
                real *gw = part + k*S;
                const real *in = taps[k];
                SIMD for (size_t c = 0; c < S; c++) gw[c] += g[c]*in[c];
            }
        }
        free(p);
    }
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++) {                      // the tap k of token i + (W-1) - k
        const real *taps[MAX_CONV];
        for (size_t k = 0; k < W; k++) {
            size_t later = i + W - 1 - k;
            int there = i%T + W - 1 - k < T && (!doc || doc[i] == doc[later]);
            taps[k] = there ? g_xBC + later*S : zero;
        }
        conv_sum(d, g_zxBCdt + i*d->Z + d->E, taps, wt, zero);
    }
    sum_parts(sums, parts, blocks, m);
    for (size_t c = 0; c < S; c++) {
        for (size_t k = 0; k < W; k++) g_w[c*W + k] += sums[k*S + c];
        g_b[c] += sums[W*S + c];
    }
    free(wt), free(zero), free(parts), free(sums);
}

// ---- step size: dt = clamp(softplus(raw + dt_bias), dt_limit) -----------------------------------
// dt (n,H)  raw = the last H columns of zxBCdt (n,Z)  dt_bias (H)
static real softplus(real x) { return x > 20 ? x : (real)log1p(exp((double)x)); }

static void dt_forward(const Dims *d, real *dt, const real *zxBCdt, const real *dt_bias) {
    size_t H = d->H;
    real lo = (real)d->dt_lo, hi = (real)d->dt_hi;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++)
        for (size_t h = 0; h < H; h++) {
            real v = softplus(zxBCdt[(i + 1)*d->Z - H + h] + dt_bias[h]);
            dt[i*H + h] = v < lo ? lo : v > hi ? hi : v;
        }
}

// softplus' = sigmoid; nothing flows where dt was clamped
static void dt_backward(const Dims *d, real *g_zxBCdt, real *g_dt_bias, const real *g_dt,
                        const real *zxBCdt, const real *dt_bias) {
    size_t H = d->H, blocks = ceil_div(d->n, ROWS);
    real lo = (real)d->dt_lo, hi = (real)d->dt_hi, *parts = alloc_reals(blocks*H);
    PARALLEL_FOR
    for (size_t b = 0; b < blocks; b++)
        for (size_t i = b*ROWS; i < d->n && i < (b + 1)*ROWS; i++)
            for (size_t h = 0; h < H; h++) {
                real raw = zxBCdt[(i + 1)*d->Z - H + h] + dt_bias[h], g = g_dt[i*H + h];
                real v = lo > 0 || hi < INFINITY ? softplus(raw) : lo;
                g = v < lo || v > hi ? 0 : raw > 20 ? g : g*(real)(1/(1 + exp(-(double)raw)));
                g_zxBCdt[(i + 1)*d->Z - H + h] = g;
                parts[b*H + h] += g;
            }
    sum_parts(g_dt_bias, parts, blocks, H);
    free(parts);
}

// ---- SSD, the state space model -----------------------------------------------------------------
// For each head, with a_t = exp(dt_t A), A = -exp(A_log), and its group's B and C (section 2):
//
//     state_t = a_t state_{t-1} + B_t (dt_t x_t)^T        y_t = C_t state_t + D x_t
//
// This is the definition, and what generation does token by token. state (N,P), x, y (P), B, C (N).
static void ssd_step(const Dims *d, real *y, real *state, const real *x, const real *B,
                     const real *C, real dt, real A_log, real D) {
    real a = expr(-dt*expr(A_log));
    for (size_t p = 0; p < d->P; p++) y[p] = D*x[p];
    for (size_t i = 0; i < d->N; i++) {
        real *s = state + i*d->P, b = B[i]*dt, c = C[i];
        SIMD for (size_t p = 0; p < d->P; p++) {
            s[p] = a*s[p] + b*x[p];
            y[p] += c*s[p];
        }
    }
}

// The whole row so, in order of time; final (R,H,N,P) may be the same memory as initial.
static void ssd_recurrence(const Dims *d, real *y, real *final, const real *xBC, const real *dt,
                           const real *A_log, const real *D, const real *initial, const int *doc) {
    size_t E = d->E, H = d->H, P = d->P, N = d->N, G = d->G, S = d->S, T = d->T;
    OMP(parallel for schedule(static) collapse(2))
    for (size_t r = 0; r < d->R; r++)
        for (size_t h = 0; h < H; h++) {
            real *state = final + (r*H + h)*N*P;
            if (!initial) memset(state, 0, N*P*sizeof(real));
            else memmove(state, initial + (r*H + h)*N*P, N*P*sizeof(real));
            for (size_t i = r*T; i < (r + 1)*T; i++) {
                const real *x = xBC + i*S + h*P, *B = xBC + i*S + E + h/(H/G)*N, *C = B + G*N;
                if (doc && doc[i] != (i > r*T ? doc[i - 1] : 0)) memset(state, 0, N*P*sizeof(real));
                ssd_step(d, y + i*E + h*P, state, x, B, C, dt[i*H + h], A_log[h], D[h]);
            }
        }
}

// Training cuts the row into chunks of Q tokens (section 6): between chunks the recurrence runs on
// whole states, within a chunk everything is a matrix product. With L_ls = a_l a_{l-1} .. a_{s+1}
// for s <= l, else 0; in_l = a_l .. a_first; out_s = a_last .. a_{s+1}; total = a_last .. a_first:
//
//     1. states    S' = total S + B^T (out dt x)           S before the chunk, S' after it
//     2. outputs   y  = (CB o L) (dt x) + in (C S) + D x   CB = C B^T
//
// (a vector in front of a matrix scales its rows; o multiplies element by element).
//
// L is built from products of the a's, each row from the one above: no exponential of a difference
// of sums can overflow or cancel, and a document's first token simply has a = 0, which cuts every
// path from before it. Products below TINY become 0 before they become slow denormal numbers.
//
// Backward, with g_S' known from the chunks behind it:
//
//     3. g_S   = total g_S' + C^T (in g_y)
//     4. g_CB  = (g_y (dt x)^T) o L                        summed over the heads of a group
//        R     = (CB o L)^T g_y + out (B g_S')             the gradient of dt x
//        g_x   = dt R + D g_y      g_dt = R x + A g_a      g_D = sum of g_y x
//        g_C   = g_CB B   + in (g_y S^T)                   summed over the heads of a group
//        g_B   = g_CB^T C + out dt (x g_S'^T)
//        g_a_t = sum over s < t <= l of path_ls            log a_t lies on all paths across t:
//              + sum over s < t of rho_s                   from token s to token l, or to S',
//              + sum over l >= t of pi_l + kappa           from S to token l, or to S'
//        path  = g_CB o CB (of this head)                  rho_s = out_s dt_s x_s (B_s g_S')
//        pi_l  = in_l g_y_l (C_l S)                        kappa = total <S, g_S'>
//        g_A_log = A sum of dt g_a

static const real TINY = (real)1e-30;
enum { BEST_CHUNK = 64 };               // tokens; measured by `make bench`

typedef struct {                        // one chunk: where it lies and what surrounds it
    size_t first, len, index;           // first of its tokens (in n), their number, index in C
    const real *x, *B, *C;              // of its first token and of group g; pitch S
} Chunk;

static Chunk chunk_at(const Dims *d, const real *xBC, size_t index, size_t g) {
    size_t r = index/d->chunks, t = index%d->chunks*d->Q;
    Chunk c = { r*d->T + t, d->Q < d->T - t ? d->Q : d->T - t, index, NULL, NULL, NULL };
    c.x = xBC + c.first*d->S;
    c.B = c.x + d->E + g*d->N;
    c.C = c.B + d->G*d->N;
    return c;
}

// a (len) and dt (len) of head h; a = 0 where a document begins
static void ssd_decay(const Dims *d, real *a, real *dt_h, const Chunk *c, const real *dt,
                      real A_log, size_t h, const int *doc) {
    real A = -expr(A_log);
    for (size_t i = 0; i < c->len; i++) dt_h[i] = dt[(c->first + i)*d->H + h];
    SIMD for (size_t i = 0; i < c->len; i++) a[i] = expr(dt_h[i]*A);
    if (doc) for (size_t i = 0; i < c->len; i++) {
        size_t at = c->first + i;
        if (doc[at] != (at%d->T ? doc[at - 1] : 0)) a[i] = 0;
    }
}

static real flush(real v) { return v < TINY ? 0 : v; }

// in (len) and out (len); returns total
static real ssd_in_out(real *in, real *out, const real *a, size_t len) {
    real v = 1;
    for (size_t i = len; i-- > 0; ) out[i] = v, v = flush(v*a[i]);
    real total = v;
    v = 1;
    for (size_t i = 0; i < len; i++) in[i] = v = flush(v*a[i]);
    return total;
}

// L (len,len), row by row, pitch Q
static void ssd_mask(real *L, const real *a, size_t len, size_t Q) {
    for (size_t l = 0; l < len; l++) {
        const real *above = L + (l - 1)*Q;
        real *row = L + l*Q, al = a[l];
        if (l) SIMD for (size_t s = 0; s < l; s++) row[s] = flush(above[s]*al);
        row[l] = 1;
        for (size_t s = l + 1; s < len; s++) row[s] = 0;
    }
}

// out (m,cols) = w (m) times rows of in, pitch ld
static void scale_rows(real *out, const real *w, const real *in, size_t ld, size_t m, size_t cols) {
    for (size_t i = 0; i < m; i++)
        SIMD for (size_t j = 0; j < cols; j++) out[i*cols + j] = w[i]*in[i*ld + j];
}

// out (rows,cols), contiguous = in, pitch ld: rows that lie far apart would fight for the same few
// lines of L1
static void gather(real *out, const real *in, size_t ld, size_t rows, size_t cols) {
    for (size_t i = 0; i < rows; i++) memcpy(out + i*cols, in + i*ld, cols*sizeof(real));
}

// Products with a triangle skip most of its zeros: rows go in strips, this many of len from i on.
static size_t strip(size_t len, size_t i) { return least(24, len - i); }

// Steps 1 and 3 go through the chunks in order; in parallel go the rows and their groups, and if
// these are fewer than the threads, parts of the heads of a group.
typedef struct { size_t r, g, first, last; } Heads;

static size_t ssd_parts(const Dims *d) {
    size_t parts = ceil_div((size_t)omp_get_max_threads(), d->R*d->G);
    return parts < d->H/d->G ? parts : d->H/d->G;
}

static Heads ssd_heads(const Dims *d, size_t i, size_t parts) {
    size_t of_group = d->H/d->G, each = ceil_div(of_group, parts), g = i/parts % d->G;
    size_t first = i % parts*each, last = first + each < of_group ? first + each : of_group;
    Heads h = { i/parts/d->G, g, g*of_group + first, g*of_group + last };
    return h;
}

// Step 1: states before each chunk, and the last one of each row
static void ssd_states(const Dims *d, real *states, real *final, const real *xBC, const real *dt,
                       const real *A_log, const real *initial, const int *doc) {
    size_t H = d->H, P = d->P, N = d->N, Q = d->Q, S = d->S, NP = N*P, parts = ssd_parts(d);
    OMP(parallel)
    {
        real *a = alloc_reals(4*Q + Q*P + Q*N), *in = a + Q, *out = in + Q, *dt_h = out + Q;
        real *u = dt_h + Q, *B = u + Q*P;
        OMP(for schedule(static))
        for (size_t i = 0; i < d->R*d->G*parts; i++) {
            Heads part = ssd_heads(d, i, parts);
            for (size_t k = 0; k < d->chunks; k++) {
                Chunk c = chunk_at(d, xBC, part.r*d->chunks + k, part.g);
                gather(B, c.B, S, c.len, N);
                for (size_t h = part.first; h < part.last; h++) {
                    size_t rh = part.r*H + h;
                    real *state = states + (c.index*H + h)*NP;
                    real *next = k + 1 < d->chunks ? state + H*NP : final ? final + rh*NP : NULL;
                    if (!k && initial) memcpy(state, initial + rh*NP, NP*sizeof(real));
                    if (!k && !initial) memset(state, 0, NP*sizeof(real));
                    if (!next) continue;
                    ssd_decay(d, a, dt_h, &c, dt, A_log[h], h, doc);
                    real total = ssd_in_out(in, out, a, c.len);
                    for (size_t t = 0; t < c.len; t++) out[t] *= dt_h[t];
                    scale_rows(u, out, c.x + h*P, S, c.len, P);
                    matmul_small(next, P, B, 1, N, u, P, N, P, c.len, total, state);
                }
            }
        }
        free(a);
    }
}

// y (n,E)  xBC (n,S)  dt (n,H)  A_log, D (H)  initial, final (R,H,N,P) or NULL  doc (n) or NULL
// states (R*chunks,H,N,P): before each chunk
static void ssd_forward(const Dims *d, real *y, real *states, real *final, const real *xBC,
                        const real *dt, const real *A_log, const real *D, const real *initial,
                        const int *doc) {
    size_t E = d->E, H = d->H, P = d->P, N = d->N, G = d->G, Q = d->Q, S = d->S;
    ssd_states(d, states, final, xBC, dt, A_log, initial, doc);
    OMP(parallel)
    {
        real *L = alloc_reals(2*Q*Q + 2*N*Q + 2*Q*P + 4*Q), *CB = L + Q*Q, *Bt = CB + Q*Q;
        real *C = Bt + N*Q, *x = C + N*Q, *yh = x + Q*P, *a = yh + Q*P, *in = a + Q, *out = in + Q;
        real *dt_h = out + Q;
        OMP(for schedule(static) collapse(2))
        for (size_t k = 0; k < d->R*d->chunks; k++)
            for (size_t g = 0; g < G; g++) {
                Chunk c = chunk_at(d, xBC, k, g);
                gather(C, c.C, S, c.len, N);
                transpose(Bt, Q, c.B, S, c.len, N);
                matmul_small(CB, Q, C, N, 1, Bt, Q, c.len, c.len, N, 0, CB);
                for (size_t h = g*(H/G); h < (g + 1)*(H/G); h++) {       // step 2
                    gather(x, c.x + h*P, S, c.len, P);
                    ssd_decay(d, a, dt_h, &c, dt, A_log[h], h, doc);
                    ssd_in_out(in, out, a, c.len);
                    ssd_mask(L, a, c.len, Q);
                    const real *state = states + (k*H + h)*N*P;
                    matmul_small(yh, P, C, N, 1, state, P, c.len, P, N, 0, yh);
                    for (size_t i = 0; i < c.len; i++) {
                        SIMD for (size_t j = 0; j <= i; j++) L[i*Q + j] *= CB[i*Q + j]*dt_h[j];
                        SIMD for (size_t p = 0; p < P; p++)
                            yh[i*P + p] = in[i]*yh[i*P + p] + D[h]*x[i*P + p];
                    }
                    for (size_t i = 0, m; i < c.len; i += m) {
                        m = strip(c.len, i);
                        matmul_small(yh + i*P, P, L + i*Q, Q, 1, x, P, m, P, i + m, 1, yh + i*P);
                    }
                    for (size_t i = 0; i < c.len; i++)
                        memcpy(y + (c.first + i)*E + h*P, yh + i*P, P*sizeof(real));
                }
            }
        free(L);
    }
}

// Step 3: g_states (R*chunks,H,N,P), the gradient of the state after each chunk
static void ssd_states_backward(const Dims *d, real *g_states, real *g_initial, const real *g_y,
                                const real *g_final, const real *xBC, const real *dt,
                                const real *A_log, const int *doc) {
    size_t E = d->E, H = d->H, P = d->P, N = d->N, Q = d->Q, S = d->S, NP = N*P;
    size_t parts = ssd_parts(d);
    OMP(parallel)
    {
        real *a = alloc_reals(4*Q + Q*P + Q*N), *in = a + Q, *out = in + Q, *dt_h = out + Q;
        real *u = dt_h + Q, *C = u + Q*P;
        OMP(for schedule(static))
        for (size_t i = 0; i < d->R*d->G*parts; i++) {
            Heads part = ssd_heads(d, i, parts);
            for (size_t k = d->chunks; k-- > 0; ) {
                Chunk c = chunk_at(d, xBC, part.r*d->chunks + k, part.g);
                gather(C, c.C, S, c.len, N);
                for (size_t h = part.first; h < part.last; h++) {
                    size_t rh = part.r*H + h, last = k + 1 == d->chunks;
                    real *g = g_states + (c.index*H + h)*NP;
                    real *before = k ? g - H*NP : g_initial ? g_initial + rh*NP : NULL;
                    if (last && g_final) memcpy(g, g_final + rh*NP, NP*sizeof(real));
                    if (last && !g_final) memset(g, 0, NP*sizeof(real));
                    if (!before) continue;
                    ssd_decay(d, a, dt_h, &c, dt, A_log[h], h, doc);
                    real total = ssd_in_out(in, out, a, c.len);
                    scale_rows(u, in, g_y + c.first*E + h*P, E, c.len, P);
                    matmul_small(before, P, C, 1, N, u, P, N, P, c.len, total, g);
                }
            }
        }
        free(a);
    }
}

// g_a (len) of one chunk and head from its four kinds of paths. path (len,len, pitch Q) is
// destroyed: row l becomes the sum of the rows from l on, so that no difference is taken and
// nothing cancels.
static void ssd_g_a(real *g_a, real *path, const real *rho, const real *pi, real kappa, size_t len,
                    size_t Q) {
    real before = 0, after = 0;
    for (size_t t = len; t-- > 0; ) {
        real *row = path + t*Q, sum = 0;
        if (t + 1 < len) SIMD for (size_t s = 0; s <= t; s++) row[s] += row[Q + s];
        OMP(simd reduction(+:sum))
        for (size_t s = 0; s < t; s++) sum += row[s];
        after += pi[t];
        g_a[t] = sum + after + kappa;
    }
    for (size_t t = 0; t < len; t++) g_a[t] += before, before += rho[t];
}

// The work space of one thread in step 4, in the order of use. Pitches are Q, but N of B and C, and
// P of x, gy and R.
typedef struct { real *L, *CB, *g_CB, *path, *B, *C, *Bt, *Ct, *x, *gy, *xt, *gt, *R, *gBt, *gCt,
                 *tmp, *a, *in, *out, *dt, *rho, *pi, *g_a; } SsdWork;

static SsdWork ssd_work(const Dims *d) {
    size_t QQ = d->Q*d->Q, QP = d->Q*d->P, NQ = d->N*d->Q, Q = d->Q, sum = 0;
    size_t sizes[] = { QQ, QQ, QQ, QQ, NQ, NQ, NQ, NQ, QP, QP, QP, QP, QP, NQ, NQ, NQ,
                       Q, Q, Q, Q, Q, Q, Q };
    SsdWork w;
    for (size_t i = 0; i < sizeof w/sizeof(real *); i++) sum += round_up(sizes[i], 16);
    real *p = alloc_reals(sum);
    for (size_t i = 0; i < sizeof w/sizeof(real *); i++)
        ((real **)&w)[i] = p, p += round_up(sizes[i], 16);
    return w;
}

// Step 4 for one head of a chunk: writes its columns of g_xBC, its g_dt without A g_a, and g_a, g_D
// for each token; adds to w->g_CB (len,len) and to w->gBt, w->gCt (N,len), g_B and g_C transposed.
static void ssd_head_backward(const Dims *d, const SsdWork *w, const Chunk *c, size_t h,
                              real *g_xBC, real *g_dt, real *g_a, real *g_D, const real *g_y,
                              const real *state, const real *g_state, const real *dt,
                              const real *A_log, const real *D, const int *doc) {
    size_t E = d->E, H = d->H, P = d->P, N = d->N, Q = d->Q, S = d->S, len = c->len;
    const real *x = w->x, *gy = w->gy;
    gather(w->x, c->x + h*P, S, len, P);
    gather(w->gy, g_y + c->first*E + h*P, E, len, P);
    ssd_decay(d, w->a, w->dt, c, dt, A_log[h], h, doc);
    real total = ssd_in_out(w->in, w->out, w->a, len), kappa = 0;
    ssd_mask(w->L, w->a, len, Q);
    transpose(w->xt, Q, x, P, len, P);
    transpose(w->gt, Q, gy, P, len, P);

    // the gradients of CB and of its paths; from here on L is CB o L
    for (size_t l = 0, m; l < len; l += m) {
        m = strip(len, l);
        size_t columns = least(round_up(l + m, VL), Q);      // whole vectors
        matmul_small(w->path + l*Q, Q, gy + l*P, P, 1, w->xt, Q, m, columns, P, 0, w->path);
    }
    for (size_t l = 0; l < len; l++) {
        real *path = w->path + l*Q, *g_CB = w->g_CB + l*Q, *L = w->L + l*Q;
        const real *CB = w->CB + l*Q;
        SIMD for (size_t s = 0; s <= l; s++) {
            real v = path[s]*L[s]*w->dt[s];
            g_CB[s] += v;
            path[s] = v*CB[s];
            L[s] *= CB[s];
        }
    }

    // R = out (B g_S') + (CB o L)^T g_y, and what depends on its rows
    matmul_small(w->R, P, w->B, N, 1, g_state, P, len, P, N, 0, w->R);
    for (size_t s = 0; s < len; s++) {
        real *R = w->R + s*P, dot = 0;
        SIMD for (size_t p = 0; p < P; p++) R[p] *= w->out[s];
        OMP(simd reduction(+:dot))
        for (size_t p = 0; p < P; p++) dot += R[p]*x[s*P + p];
        w->rho[s] = w->dt[s]*dot;
    }
    for (size_t s = 0, m; s < len; s += m) {
        m = strip(len, s);
        matmul_small(w->R + s*P, P, w->L + s*Q + s, 1, Q, gy + s*P, P, m, P, len - s, 1,
                     w->R + s*P);
    }
    for (size_t s = 0; s < len; s++) {
        real *R = w->R + s*P, *gx = g_xBC + (c->first + s)*S + h*P, Rx = 0, gyx = 0;
        OMP(simd reduction(+:Rx,gyx))
        for (size_t p = 0; p < P; p++) {
            Rx += R[p]*x[s*P + p];
            gyx += gy[s*P + p]*x[s*P + p];
            gx[p] = w->dt[s]*R[p] + D[h]*gy[s*P + p];
        }
        g_dt[(c->first + s)*H + h] = Rx;
        g_D[(c->first + s)*H + h] = gyx;
    }

    // g_B^T += g_S' (out dt x)^T, g_C^T += S (in g_y)^T and pi from it
    for (size_t s = 0; s < len; s++) w->out[s] *= w->dt[s];
    for (size_t p = 0; p < P; p++)
        SIMD for (size_t s = 0; s < len; s++) {
            w->xt[p*Q + s] *= w->out[s];
            w->gt[p*Q + s] *= w->in[s];
        }
    matmul_small(w->gBt, Q, g_state, P, 1, w->xt, Q, N, len, P, 1, w->gBt);
    matmul_small(w->tmp, Q, state, P, 1, w->gt, Q, N, len, P, 0, w->tmp);
    for (size_t l = 0; l < len; l++) w->pi[l] = 0;
    for (size_t i = 0; i < N; i++)
        SIMD for (size_t l = 0; l < len; l++) {
            w->pi[l] += w->tmp[i*Q + l]*w->Ct[i*Q + l];
            w->gCt[i*Q + l] += w->tmp[i*Q + l];
        }
    OMP(simd reduction(+:kappa))
    for (size_t i = 0; i < N*P; i++) kappa += state[i]*g_state[i];
    ssd_g_a(w->g_a, w->path, w->rho, w->pi, total*kappa, len, Q);
    for (size_t i = 0; i < len; i++) g_a[(c->first + i)*H + h] = w->g_a[i];
}

// g_xBC (n,S), g_dt (n,H) are written, g_A_log, g_D (H) added to; g_initial, g_final (R,H,N,P) or
// NULL; states are ssd_forward's, g_states (R*chunks,H,N,P) is work space
static void ssd_backward(const Dims *d, real *g_xBC, real *g_dt, real *g_A_log, real *g_D,
                         real *g_initial, const real *g_y, const real *g_final,
                         const real *states, real *g_states, const real *xBC, const real *dt,
                         const real *A_log, const real *D, const real *initial, const int *doc) {
    size_t H = d->H, P = d->P, N = d->N, G = d->G, Q = d->Q, S = d->S, n = d->n;
    real *g_a = alloc_reals(2*n*H), *g_D_token = g_a + n*H;
    (void)initial;                                           // it is the first of states
    ssd_states_backward(d, g_states, g_initial, g_y, g_final, xBC, dt, A_log, doc);
    OMP(parallel)
    {
        SsdWork w = ssd_work(d);
        OMP(for schedule(static) collapse(2))
        for (size_t k = 0; k < d->R*d->chunks; k++)
            for (size_t g = 0; g < G; g++) {
                Chunk c = chunk_at(d, xBC, k, g);
                real *gB = g_xBC + c.first*S + (size_t)(c.B - c.x), *gC = gB + G*N;
                gather(w.B, c.B, S, c.len, N);
                gather(w.C, c.C, S, c.len, N);
                transpose(w.Bt, Q, w.B, N, c.len, N);
                transpose(w.Ct, Q, w.C, N, c.len, N);
                matmul_small(w.CB, Q, w.C, N, 1, w.Bt, Q, c.len, c.len, N, 0, w.CB);
                memset(w.g_CB, 0, Q*Q*sizeof(real));
                memset(w.gBt, 0, N*Q*sizeof(real));
                memset(w.gCt, 0, N*Q*sizeof(real));
                for (size_t h = g*(H/G); h < (g + 1)*(H/G); h++)
                    ssd_head_backward(d, &w, &c, h, g_xBC, g_dt, g_a, g_D_token, g_y,
                                      states + (k*H + h)*N*P, g_states + (k*H + h)*N*P, dt, A_log,
                                      D, doc);
                transpose(gB, S, w.gBt, Q, N, c.len);
                transpose(gC, S, w.gCt, Q, N, c.len);
                matmul_small(gB, S, w.g_CB, 1, Q, w.C, N, c.len, N, c.len, 1, gB);
                matmul_small(gC, S, w.g_CB, Q, 1, w.B, N, c.len, N, c.len, 1, gC);
            }
        free(w.L);
    }
    PARALLEL_FOR
    for (size_t h = 0; h < H; h++) {
        double A = -exp((double)A_log[h]), sum_a = 0, sum_D = 0;
        for (size_t i = h; i < n*H; i += H) {
            sum_a += (double)dt[i]*(double)g_a[i];
            sum_D += (double)g_D_token[i];
            g_dt[i] += (real)A*g_a[i];
        }
        g_A_log[h] += (real)(A*sum_a);
        g_D[h] += (real)sum_D;
    }
    free(g_a);
}

// ---- gated RMSNorm: o = rmsnorm(y silu(z)) w, over each of the G groups of E/G channels ---------
// o, y (n,E)  rstd (n,G)  z = the first E columns of zxBCdt (n,Z)  w (E)
static void gated_rmsnorm_forward(const Dims *d, real *o, real *rstd, const real *y,
                                  const real *zxBCdt, const real *w) {
    size_t E = d->E, G = d->G, m = E/G;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++)
        for (size_t g = 0; g < G; g++) {
            const real *yg = y + i*E + g*m, *z = zxBCdt + i*d->Z + g*m, *wg = w + g*m;
            real *og = o + i*E + g*m, sum = 0;
            OMP(simd reduction(+:sum))
            for (size_t j = 0; j < m; j++) {
                og[j] = yg[j]*silu(z[j]);
                sum += og[j]*og[j];
            }
            real s = rstd[i*G + g] = (real)(1/sqrt((double)sum/(double)m + d->eps));
            SIMD for (size_t j = 0; j < m; j++) og[j] *= s*wg[j];
        }
}

// With v = y silu(z) rstd, q = g_o w: g = rstd*(q - v*mean(q v)), g_y = g silu(z),
// g_z = g y silu'(z), g_w += sum over rows of g_o v. Writes the z columns of g_zxBCdt.
static void gated_rmsnorm_backward(const Dims *d, real *g_y, real *g_zxBCdt, real *g_w,
                                   const real *g_o, const real *y, const real *zxBCdt,
                                   const real *rstd, const real *w) {
    size_t E = d->E, G = d->G, m = E/G, blocks = ceil_div(d->n, ROWS);
    real *parts = alloc_reals(blocks*E);
    PARALLEL_FOR
    for (size_t b = 0; b < blocks; b++) {
        real *sig = alloc_reals(m);
        for (size_t ig = b*ROWS*G; ig < d->n*G && ig < (b + 1)*ROWS*G; ig++) {
            size_t i = ig/G, g = ig%G;
            const real *yg = y + i*E + g*m, *go = g_o + i*E + g*m, *wg = w + g*m;
            const real *z = zxBCdt + i*d->Z + g*m;
            real *gy = g_y + i*E + g*m, *gz = g_zxBCdt + i*d->Z + g*m, *part = parts + b*E + g*m;
            real s = rstd[ig], dot = 0;
            OMP(simd reduction(+:dot))
            for (size_t j = 0; j < m; j++) {
                sig[j] = sigmoid(z[j]);
                real v = yg[j]*z[j]*sig[j]*s;
                part[j] += go[j]*v;
                dot += go[j]*wg[j]*v;
            }
            dot /= (real)m;
            SIMD for (size_t j = 0; j < m; j++) {
                real zs = z[j]*sig[j], grad = s*(go[j]*wg[j] - yg[j]*zs*s*dot);
                gy[j] = grad*zs;
                gz[j] = grad*yg[j]*(sig[j] + zs*(1 - sig[j]));
            }
        }
        free(sig);
    }
    sum_parts(g_w, parts, blocks, E);
    free(parts);
}

// ---- SwiGLU of the MLP: h = a silu(b) -----------------------------------------------------------
// h (n,F)  ab (n,2F): a | b
static void swiglu_forward(const Dims *d, real *h, const real *ab) {
    size_t F = d->F;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++)
        SIMD for (size_t j = 0; j < F; j++) h[i*F + j] = ab[2*i*F + j]*silu(ab[(2*i + 1)*F + j]);
}

static void swiglu_backward(const Dims *d, real *g_ab, const real *g_h, const real *ab) {
    size_t F = d->F;
    PARALLEL_FOR
    for (size_t i = 0; i < d->n; i++) {
        const real *a = ab + 2*i*F, *b = a + F, *g = g_h + i*F;
        real *g_a = g_ab + 2*i*F, *g_b = g_a + F;
        SIMD for (size_t j = 0; j < F; j++) {
            g_a[j] = g[j]*silu(b[j]);
            g_b[j] = g[j]*a[j]*silu_grad(b[j]);
        }
    }
}

// ---- classifier: loss = log(sum of exp(logits)) - logits[target], logits = hidden weight^T ------
// One row of logits (V) becomes its gradient (softmax - 1[target])*scale; returns the loss.
static real cross_entropy(real *logits, size_t V, int target, real scale) {
    real top = logits[0], sum = 0;
    OMP(simd reduction(max:top))
    for (size_t v = 1; v < V; v++) top = logits[v] > top ? logits[v] : top;
    real loss = top - logits[target];
    OMP(simd reduction(+:sum))
    for (size_t v = 0; v < V; v++) sum += logits[v] = expr(logits[v] - top);
    real k = scale/sum;
    SIMD for (size_t v = 0; v < V; v++) logits[v] *= k;
    logits[target] -= scale;
    return loss + (real)log((double)sum);
}

// losses (n)  hidden, g_hidden (n,M)  weight, g_weight (V,M)  targets (n)  logits: work (slab,V).
// Rows go through in slabs, so that the (n,V) logits never exist at once. Without g_hidden only the
// losses; with all_logits (n,V) a copy of the logits. add as in linear_backward.
static void classifier(const Dims *d, real *losses, real *g_hidden, real *g_weight, real *logits,
                       real *all_logits, const real *hidden, const real *weight,
                       const int *targets, real scale, int add) {
    size_t M = d->M, V = d->V;
    for (size_t i = 0; i < d->n; i += d->slab) {
        size_t m = d->slab < d->n - i ? d->slab : d->n - i;
        linear_forward(logits, hidden + i*M, weight, m, M, V, 0);
        if (all_logits) memcpy(all_logits + i*V, logits, m*V*sizeof(real));
        PARALLEL_FOR
        for (size_t j = 0; j < m; j++)
            losses[i + j] = cross_entropy(logits + j*V, V, targets[i + j], scale);
        if (g_hidden)
            linear_backward(g_hidden + i*M, g_weight, logits, hidden + i*M, weight, m, M, V,
                            add || i);
    }
}

// ================================================================================================
// The model: layers between embedding and classifier, forward and backward
// ================================================================================================

typedef struct {
    Dims d;
    Spec specs[PARAM_COUNT], act_specs[ACT_COUNT];
    size_t size;                        // of a block of parameters, in reals
    Params w, g, m, v;                  // weights, gradients, AdamW's moments
    real *weights, *grads, *mean, *square;       // the same as blocks
    Acts a;
    real *acts;
    const int *ids, *targets, *doc;     // of the micro-batch (n); doc NULL: not packed
    real scale;                         // of the loss: 1 / targets of the step
    int add;                            // 0: the step's first micro-batch, gradients start from 0
    size_t lane;                        // --carry: of the micro-batch's first row
    int recurrent;                      // generation: one token at a time
    int remote;                         // here are only losses and the states of --carry
    real *all_logits;                   // (n,V) a copy for --dump, or NULL
    void (*watch)(void *watcher, size_t layer, int part);    // --dump: called in each layer
    void *watcher;
} Model;

static size_t parameter_count(const Spec *specs) {
    size_t sum = 0;
    for (size_t k = 0; k < PARAM_COUNT; k++) sum += specs[k].count;
    return sum;
}

static void model_allocate(Model *m, const Dims *d, int training) {
    m->d = *d;
    param_specs(d, m->specs);
    act_specs(d, m->act_specs);
    m->size = total(m->specs, PARAM_COUNT);
    m->weights = allocate_params(&m->w, m->specs, 1);
    if (training) {                     // a device's gradients come here only to be looked at
        m->grads = allocate_params(&m->g, m->specs, !m->remote);
        m->mean = allocate_params(&m->m, m->specs, 1);
        m->square = allocate_params(&m->v, m->specs, 1);
    }
    for (size_t k = 0; k < ACT_COUNT && m->remote; k++) {    // the rest is on the device
        Spec *s = &m->act_specs[k];
        if (strncmp(s->shape_text, "(L, ", 4) && strcmp(s->name, "losses")) s->count = 0;
    }
    m->acts = allocate_acts(&m->a, m->act_specs);
}

// The i-th element of a new parameter; stream is its row in PARAMS. Rounded to float, so that the
// float and the double program start from the same model.
static float draw(const Dims *d, const Spec *s, uint64_t seed, uint64_t stream, uint64_t i) {
    double u = random_uniform(seed, stream, i), dt;
    double fan_in = 1/sqrt((double)s->shape[s->rank - 1]);
    switch (s->init) {
    case NORMAL:   return (float)(0.02*random_normal(seed, stream, i));
    case FAN_IN:   return (float)((2*u - 1)*fan_in);
    case FAN_IN_L: return (float)((2*u - 1)*fan_in/sqrt((double)d->L));
    case CONV:     return (float)((2*u - 1)/sqrt((double)d->W));
    case A_LOG:    return (float)log(1 + 15*u);
    case DT_BIAS:  dt = fmax(exp(u*log(0.1/0.001) + log(0.001)), 1e-4);
                   return (float)(dt + log(-expm1(-dt)));    // the inverse of softplus
    default:       return 1;
    }
}

static void model_init(Model *m, uint64_t seed) {
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        Spec s = m->specs[k];
        real *w = ((real **)&m->w)[k];
        PARALLEL_FOR
        for (size_t i = 0; i < s.count; i++) w[i] = draw(&m->d, &s, seed, k, i);
    }
}

// Pointers to layer l's part of each tensor that has one: layer.in_proj is (Z,M).
static Params layer_params(const Model *m, Params layer, size_t l) {
    for (size_t k = 0; k < PARAM_COUNT; k++)
        if (strstr(m->specs[k].key, "%zu"))
            ((real **)&layer)[k] += l*(m->specs[k].count/m->d.L);
    return layer;
}

// Likewise of the activations. Without --carry, past and carried are NULL.
static Acts layer_acts(const Model *m, size_t l) {
    Acts layer = m->a;
    for (size_t k = 0; k < ACT_COUNT; k++) {
        const Spec *s = &m->act_specs[k];
        real **p = &((real **)&layer)[k];
        size_t size = s->shape[0] ? s->count/s->shape[0] : 0;            // of a layer
        if (s->shape_text[1] == 'K') *p += l % m->d.kept*size;
        if (!strncmp(s->shape_text, "(L2,", 4)) *p += l*(m->d.F ? 2 : 1)*size;
        if (!strncmp(s->shape_text, "(L,", 3))
            *p = m->d.lanes ? *p + l*size + m->lane*(size/m->d.lanes) : NULL;
    }
    return layer;
}

// The residual stream after a branch: the one before it plus in (n,I) weight (M,I)^T
static real *after(const Model *m, real *resid) { return resid + m->act_specs[0].shape[1]*m->d.M; }

static void add_branch(const Model *m, real *resid, const real *in, const real *weight, size_t I) {
    memcpy(after(m, resid), resid, m->d.n*m->d.M*sizeof(real));
    linear_forward(after(m, resid), in, weight, m->d.n, I, m->d.M, 1);
}

static void layer_forward(Model *m, size_t l) {
    const Dims *d = &m->d;
    Params w = layer_params(m, m->w, l);
    Acts a = layer_acts(m, l);
    rmsnorm_forward(d, a.u, a.rstd, a.resid, w.norm);                               lap("norm");
    linear_forward(a.zxBCdt, a.u, w.in_proj, d->n, d->M, d->Z, 0);                  lap("in_proj");
    conv1d_forward(d, a.xBC, a.zxBCdt, w.conv_w, w.conv_b, a.past, m->doc);         lap("conv1d");
    if (d->lanes) conv1d_past(d, a.past_new, a.zxBCdt, a.past, m->doc);
    dt_forward(d, a.dt, a.zxBCdt, w.dt_bias);                                       lap("dt");
    if (m->recurrent)
        ssd_recurrence(d, a.y, a.carried_new, a.xBC, a.dt, w.A_log, w.D, a.carried, m->doc);
    else
        ssd_forward(d, a.y, a.states, a.carried_new, a.xBC, a.dt, w.A_log, w.D, a.carried, m->doc);
    lap("ssd");
    gated_rmsnorm_forward(d, a.o, a.rstd_g, a.y, a.zxBCdt, w.norm_g);               lap("norm_g");
    add_branch(m, a.resid, a.o, w.out_proj, d->E);                                  lap("out_proj");
    if (d->F) {
        rmsnorm_forward(d, a.u2, a.rstd2, after(m, a.resid), w.norm2);              lap("norm");
        linear_forward(a.ab, a.u2, w.fc1, d->n, d->M, 2*d->F, 0);                   lap("fc1");
        swiglu_forward(d, a.h, a.ab);                                               lap("swiglu");
        add_branch(m, after(m, a.resid), a.h, w.fc2, d->F);                         lap("fc2");
    }
    if (m->watch) m->watch(m->watcher, l, 0);
}

// g_resid (n,M): on entry the gradient of what the layer returns, on exit of what it was given.
static void layer_backward(Model *m, size_t l) {
    const Dims *d = &m->d;
    Params w = layer_params(m, m->w, l), g = layer_params(m, m->g, l);
    Acts a = layer_acts(m, l);
    size_t n = d->n, M = d->M, E = d->E, Z = d->Z, F = d->F;
    if (d->kept < d->L) {                                    // --recompute
        void (*watch)(void *, size_t, int) = m->watch;
        m->watch = NULL, layer_forward(m, l), m->watch = watch;
    }
    if (F) {
        linear_backward(a.g_h, g.fc2, a.g_resid, a.h, w.fc2, n, F, M, m->add);      lap("fc2");
        swiglu_backward(d, a.g_ab, a.g_h, a.ab);                                    lap("swiglu");
        linear_backward(a.g_u, g.fc1, a.g_ab, a.u2, w.fc1, n, M, 2*F, m->add);      lap("fc1");
        rmsnorm_backward(d, a.g_resid, g.norm2, a.g_u, after(m, a.resid), a.rstd2, w.norm2);
        lap("norm");
    }
    linear_backward(a.g_o, g.out_proj, a.g_resid, a.o, w.out_proj, n, E, M, m->add);
    lap("out_proj");
    gated_rmsnorm_backward(d, a.g_y, a.g_zxBCdt, g.norm_g, a.g_o, a.y, a.zxBCdt, a.rstd_g,
                           w.norm_g);
    lap("norm_g");
    ssd_backward(d, a.g_xBC, a.g_dt, g.A_log, g.D, NULL, a.g_y, NULL, a.states, a.g_states, a.xBC,
                 a.dt, w.A_log, w.D, a.carried, m->doc);                            lap("ssd");
    dt_backward(d, a.g_zxBCdt, g.dt_bias, a.g_dt, a.zxBCdt, w.dt_bias);             lap("dt");
    if (m->watch) m->watch(m->watcher, l, 1);                // conv1d_backward overwrites g_xBC
    conv1d_backward(d, a.g_zxBCdt, g.conv_w, g.conv_b, a.g_xBC, a.zxBCdt, w.conv_w, w.conv_b,
                    a.past, m->doc);                                                lap("conv1d");
    linear_backward(a.g_u, g.in_proj, a.g_zxBCdt, a.u, w.in_proj, n, M, Z, m->add); lap("in_proj");
    rmsnorm_backward(d, a.g_resid, g.norm, a.g_u, a.resid, a.rstd, w.norm);         lap("norm");
    if (m->watch) m->watch(m->watcher, l, 2);
}

static void model_hidden(Model *m) {
    const Dims *d = &m->d;
    embed_forward(d, m->a.resid, m->ids, m->w.embedding);                           lap("embed");
    for (size_t l = 0; l < d->L; l++) layer_forward(m, l);
    rmsnorm_forward(d, m->a.hidden, m->a.rstd_f, layer_acts(m, d->L).resid, m->w.norm_f);
    lap("norm");
}

// The mean loss of the micro-batch; with `backward` also its gradients, added to those of the
// step's earlier micro-batches.
static double model_loss(Model *m, int backward) {
    const Dims *d = &m->d;
    Acts a = m->a;
    const real *head = d->tied ? m->w.embedding : m->w.lm_head;
    real *g_head = d->tied ? m->g.embedding : m->g.lm_head;
    double sum = 0;
    model_hidden(m);
    classifier(d, a.losses, backward ? a.g_u : NULL, g_head, a.logits, m->all_logits, a.hidden,
               head, m->targets, m->scale, m->add);
    lap("classifier");
    for (size_t i = 0; i < d->n; i++) sum += (double)a.losses[i];
    if (backward) {
        if (m->watch) m->watch(m->watcher, d->L, 1);
        memset(a.g_resid, 0, d->n*d->M*sizeof(real));
        rmsnorm_backward(d, a.g_resid, m->g.norm_f, a.g_u, layer_acts(m, d->L).resid, a.rstd_f,
                         m->w.norm_f);                                              lap("norm");
        if (m->watch) m->watch(m->watcher, d->L, 2);
        for (size_t l = d->L; l-- > 0; ) layer_backward(m, l);
        embed_backward(d, m->g.embedding, a.g_resid, m->ids);                       lap("embed");
    }
    return sum/(double)d->n;
}

// Before the first micro-batch of a step: the gradients that only ever add start from 0. (Matrices
// are overwritten by their first product; that saves a pass over most of the memory.)
static void model_zero_grad(Model *m) {
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        int product = m->specs[k].decay && (m->specs[k].init != NORMAL || m->d.tied);
        if (!product) memset(((real **)&m->g)[k], 0, m->specs[k].count*sizeof(real));
    }
    m->add = 0;
    last_lap = now();
}

// ================================================================================================
// AdamW, clipping, schedule, outliers
// ================================================================================================

// The norm of all gradients together, in double, in a fixed order; NaN and Inf come through.
static double gradient_norm(Model *m) {
    size_t block = 4096, blocks = ceil_div(m->size, block);
    double *parts = (double *)alloc(blocks, sizeof(double)), sum = 0;
    PARALLEL_FOR
    for (size_t b = 0; b < blocks; b++) {
        size_t end = (b + 1)*block < m->size ? (b + 1)*block : m->size;
        double part = 0;
        OMP(simd reduction(+:part))
        for (size_t i = b*block; i < end; i++) part += (double)m->grads[i]*(double)m->grads[i];
        parts[b] = part;
    }
    for (size_t b = 0; b < blocks; b++) sum += parts[b];
    free(parts);
    return sqrt(sum);
}

// Step t = 1, 2, ... of AdamW (Loshchilov and Hutter 2019) as PyTorch has it:
//   m = beta1 m + (1-beta1) g,  v = beta2 v + (1-beta2) g^2,
//   w -= lr*decay*w,            w -= lr * m/(1-beta1^t) / (sqrt(v/(1-beta2^t)) + eps)
static void adamw(Model *m, double lr, double grad_scale, Int t) {
    double fix1 = 1 - pow(flags.beta1, (double)t), fix2 = 1 - pow(flags.beta2, (double)t);
    real b1 = (real)flags.beta1, b2 = (real)flags.beta2, gs = (real)grad_scale;
    real c1 = (real)(1 - flags.beta1), c2 = (real)(1 - flags.beta2), eps = (real)flags.eps;
    real step = (real)(lr/fix1), root = (real)(1/sqrt(fix2));
    for (size_t k = 0; k < PARAM_COUNT; k++) {
        real *w = ((real **)&m->w)[k], *g = ((real **)&m->g)[k];
        real *mean = ((real **)&m->m)[k], *square = ((real **)&m->v)[k];
        real keep = (real)(1 - lr*(m->specs[k].decay ? flags.weight_decay : 0));
        OMP(parallel for simd schedule(static))
        for (size_t i = 0; i < m->specs[k].count; i++) {
            real gi = g[i]*gs;
            mean[i] = b1*mean[i] + c1*gi;
            square[i] = b2*square[i] + c2*gi*gi;
            w[i] = keep*w[i] - step*mean[i]/((real)sqrt(square[i])*root + eps);
        }
    }
}

// Step t = 1 .. steps: a linear warmup, t/W of lr; then from lr to min_lr in the form of
// --schedule, which the last step reaches (wsd: lr stays until the last decay_frac of all steps).
static double learning_rate(Int t) {
    double lr = flags.lr, low = flags.min_lr, W = (double)flags.warmup, steps = (double)flags.steps;
    double decay = round(flags.decay_frac*steps), x = (double)t;
    if (x <= W) return lr*x/W;
    double part = steps > W ? (x - W)/(steps - W) : 1;
    if (!strcmp(flags.schedule, "linear")) return low + (lr - low)*(1 - part);
    if (!strcmp(flags.schedule, "cosine")) return low + (lr - low)/2*(1 + cos(M_PI*part));
    if (!strcmp(flags.schedule, "wsd")) {
        double start = fmax(W, steps - decay);
        return x <= start ? lr : low + (lr - low)*(steps - x)/(steps - start);
    }
    return lr;
}

// A value more than `limit` standard deviations above the mean of the last 128 is an outlier.
enum { WINDOW = 128, HISTORY = 16 };     // values kept, and those that it takes to judge
typedef struct { double values[WINDOW]; Int count; } Recent;

static int outlier(const Recent *r, double value, double limit) {
    Int n = r->count < WINDOW ? r->count : (Int)WINDOW;
    if (limit <= 0 || n < HISTORY) return 0;
    double mean = 0, var = 0;
    for (Int i = 0; i < n; i++) mean += r->values[i]/(double)n;
    for (Int i = 0; i < n; i++) var += (r->values[i] - mean)*(r->values[i] - mean)/(double)n;
    return value - mean > limit*sqrt(var);
}

static void remember(Recent *r, double value) { r->values[r->count++ % WINDOW] = value; }

// ================================================================================================
// Tokens: text and llm.c shards into micro-batches
// ================================================================================================
// Files named *.bin are shards of llm.c. Others are text; several are one stream, each behind an
// end-of-text token.

#include "dev/lib/shards.h"              // match_files, shard_header, read_shard

typedef struct { const char *path; size_t tokens, first; } Shard;       // first: of a text's tokens

typedef struct {
    Shard *shards;                      // the files, in the order of their paths
    size_t files, count;                // count: of shards; all texts together are a single one
    int version;                        // of the shards: 1 or 7; 0: text
    const Tokenizer *tokenizer;         // NULL: the tokens' bytes are not known
    int eot;
    size_t vocab;                       // rows of the model: no token may be beyond
    int *text;                          // the text's tokens
    size_t text_size;
    uint32_t fingerprint;               // tells one set of data from another
    size_t R, T, accum;                 // a micro-batch, micro-batches of a step (--carry)
    int shuffle, packed, carry;
    uint64_t seed;
    uint64_t epoch, shard, batch;       // position: the next micro-batch
    int *tokens;                        // of the current shard, in this epoch's order, or NULL
    size_t size, phase, *rows;          // rows: the order of its rows, when shuffled
    int *ids, *targets, *doc;           // the micro-batch (R*T); doc: NULL unless packed
    int fresh;                          // --carry: its rows start a new stretch, states are 0
} Loader;

static void append_text(Loader *d, Shard *file, int eot_first) {
    Bytes b = read_file(file->path);
    size_t count;
    int32_t *ids = tokenizer_encode(d->tokenizer, file->path, b.data, b.size, &count);
    CHECK(count, "%s is empty", file->path);
    d->text = (int *)realloc(d->text, (d->text_size + count + 1)*sizeof(int));
    CHECK(d->text, "out of memory: %zu tokens of text", d->text_size + count);
    if (eot_first) d->text[d->text_size++] = d->eot;
    file->first = d->text_size;
    memcpy(d->text + d->text_size, ids, count*sizeof(int));
    d->text_size += count;
    free(ids), free(b.data);
}

// Opens the files that match `patterns`; the vocabulary and the batch come later, in loader_start.
static void loader_open(Loader *d, const char *patterns, const char *flag,
                        const Tokenizer *tokenizer) {
    memset(d, 0, sizeof *d);
    size_t shards = 0;
    char **paths = match_files(patterns, &d->files, flag);
    for (size_t i = 0; i < d->files; i++) shards += (size_t)is_shard_name(paths[i]);
    CHECK(!shards || shards == d->files, "%s: some of the files are shards (.bin), others, as %s, "
          "are text; give one kind", flag, paths[is_shard_name(paths[0]) ? d->files - 1 : 0]);
    d->shards = (Shard *)alloc(d->files, sizeof(Shard));
    d->count = shards ? d->files : 1;
    d->tokenizer = tokenizer;
    d->eot = flags.eot >= 0 ? (int)flags.eot : tokenizer->eot;
    for (size_t i = 0; i < d->files; i++) {
        d->shards[i].path = paths[i];
        if (shards) {
            int version = shard_header(paths[i], &d->shards[i].tokens);
            CHECK(!d->version || version == d->version, "%s: version %d, but %s has version %d",
                  paths[i], version, paths[0], d->version);
            d->version = version;
        } else append_text(d, &d->shards[i], d->files > 1);
    }
    free(paths);
    if (!shards) d->shards[0].tokens = d->text_size;
}

// The last part of a single text becomes the validation set.
static void loader_split(Loader *train, Loader *val, double fraction) {
    size_t first = (size_t)floor((1 - fraction)*(double)train->text_size);
    *val = *train;
    train->text_size = train->shards[0].tokens = first;
    val->shards = (Shard *)alloc(1, sizeof(Shard));
    val->shards[0].path = strdup(str("the last part of %s", train->shards[0].path));
    val->text += first;
    val->shards[0].tokens = val->text_size -= first;
}

// A resumed run must go on with the same data: the sizes of all shards, or the text itself.
static uint32_t loader_fingerprint(const Loader *d) {
    uint32_t crc = 0;
    for (size_t i = 0; i < d->count; i++)
        crc = crc_of(crc, &d->shards[i].tokens, sizeof(size_t));
    return crc_of(crc, d->text, d->text_size*sizeof(int));
}

// Micro-batches of a shard of `size` tokens
static size_t loader_batches(const Loader *d, size_t size) {
    if (!size) return 0;
    if (d->carry) return d->accum*((size - 1)/(d->R*d->accum)/d->T);
    return (size - 1)/(d->R*d->T);
}

// Sets the batch, checks all tokens that are there, and tells whether there is a micro-batch; when
// one is required, no micro-batch is an error.
static int loader_start(Loader *d, size_t vocab, size_t R, size_t T, int required) {
    size_t n = mul(R, T), batches = 0;
    d->vocab = vocab, d->R = R, d->T = T;
    d->fingerprint = loader_fingerprint(d);
    if (!d->accum) d->accum = 1;
    if (d->version && d->tokenizer->byte_level && vocab > 272) {         // it is not theirs
        d->tokenizer = NULL;
        if (flags.eot < 0) d->eot = d->version == 1 ? 50256 : 128000;
    }
    d->ids = (int *)alloc(n, sizeof(int));
    d->targets = (int *)alloc(n, sizeof(int));
    if (d->packed) d->doc = (int *)alloc(n, sizeof(int));
    for (size_t i = 0; d->text && i < d->files; i++) {
        size_t begin = d->shards[i].first;
        size_t end = i + 1 < d->files ? d->shards[i + 1].first : d->text_size;
        check_tokens(d->shards[i].path, d->text + begin, end - begin, vocab);
    }
    for (size_t i = 0; i < d->count; i++) {
        size_t k = loader_batches(d, d->shards[i].tokens);
        if (!k && (d->count > 1 || !required))
            fprintf(stderr, "warning: %s is not used: its %zu tokens do not make a micro-batch of "
                    "%zu rows of %zu\n", d->shards[i].path, d->shards[i].tokens, R, T);
        batches += k;
    }
    CHECK(batches || !required, "%s: %zu tokens, expected at least %zu for a micro-batch of %zu "
          "rows of %zu tokens; give more data, or a smaller --batch or --seq-len",
          d->shards[0].path, d->shards[0].tokens, n*(d->carry ? d->accum : 1) + 1, R, T);
    return batches > 0;
}

// Puts `count` numbers in random order, always the same for a seed and a stream.
static void shuffle_sizes(size_t *v, size_t count, uint64_t seed, uint64_t stream) {
    for (size_t i = count; i > 1; i--) {
        size_t j = random_bits(seed, stream, i) % i, t = v[j];
        v[j] = v[i - 1];
        v[i - 1] = t;
    }
}

static size_t *counting(size_t count) {
    size_t *v = (size_t *)alloc(count, sizeof(size_t));
    for (size_t i = 0; i < count; i++) v[i] = i;
    return v;
}

// The documents of a shard in random order. A document begins with its end-of-text token.
static void shuffle_documents(Loader *d, uint64_t stream) {
    size_t count = 0, at = 0, *first = (size_t *)alloc(d->size + 1, sizeof(size_t));
    for (size_t i = 0; i < d->size; i++)
        if (!i || d->tokens[i] == d->eot) first[count++] = i;
    first[count] = d->size;
    size_t *order = counting(count);
    shuffle_sizes(order, count, d->seed, stream);
    int *mixed = (int *)alloc(d->size, sizeof(int));
    for (size_t i = 0; i < count; i++) {
        size_t begin = first[order[i]], size = first[order[i] + 1] - begin;
        memcpy(mixed + at, d->tokens + begin, size*sizeof(int));
        at += size;
    }
    free(d->tokens), free(first), free(order);
    d->tokens = mixed;
}

// Loads shard number d->shard of epoch d->epoch. Shuffled: the shards' order, the documents' order
// in a shard, where the first row begins and the rows' order all change with each epoch.
static void loader_load(Loader *d) {
    uint64_t stream = RANDOM_ORDER + 4*(d->epoch*d->count + d->shard) + 4;
    size_t *order = counting(d->count);
    if (d->shuffle) shuffle_sizes(order, d->count, d->seed, hash64(d->epoch + 1));
    const Shard *shard = &d->shards[order[d->shard]];
    free(order), free(d->tokens), free(d->rows);
    d->rows = NULL, d->phase = 0, d->size = shard->tokens;
    if (d->text) {
        d->tokens = (int *)alloc(d->size, sizeof(int));
        memcpy(d->tokens, d->text, d->size*sizeof(int));
    } else d->tokens = read_shard(shard->path, d->version, shard->tokens, d->vocab);
    if (!d->shuffle) return;
    shuffle_documents(d, stream);
    if (d->carry) return;
    size_t room = (d->size - 1) % (d->R*d->T) + 1;           // keeps the number of micro-batches
    d->phase = random_bits(d->seed, stream + 1, 0) % (room < d->T ? room : d->T);
    size_t rows = loader_batches(d, d->size)*d->R;
    d->rows = counting(rows);
    shuffle_sizes(d->rows, rows, d->seed, stream + 2);
}

static void loader_seek(Loader *d, uint64_t epoch, uint64_t shard, uint64_t batch) {
    free(d->tokens);
    d->tokens = NULL, d->epoch = epoch, d->shard = shard, d->batch = batch;
}

// Fills ids, targets and doc with the next micro-batch.
static void loader_next(Loader *d) {
    if (!d->tokens) loader_load(d);
    while (d->batch >= loader_batches(d, d->size)) {
        d->batch = 0;
        if (++d->shard == d->count) d->shard = 0, d->epoch++;
        loader_load(d);
    }
    for (size_t r = 0; r < d->R; r++) {
        size_t at = d->phase + d->T*(d->rows ? d->rows[d->batch*d->R + r] : d->batch*d->R + r);
        if (d->carry) {
            size_t lane = d->batch % d->accum*d->R + r, size = (d->size - 1)/(d->R*d->accum);
            at = lane*size + d->batch/d->accum*d->T;
        }
        memcpy(d->ids + r*d->T, d->tokens + at, d->T*sizeof(int));
        memcpy(d->targets + r*d->T, d->tokens + at + 1, d->T*sizeof(int));
    }
    for (size_t i = 0, seen = 0; d->doc && i < d->R*d->T; i++) {
        if (i % d->T == 0) seen = 0;
        d->doc[i] = (int)(seen += d->ids[i] == d->eot);
    }
    d->fresh = d->batch/d->accum == 0;
    d->batch++;
}

// Bytes of text that the targets of the micro-batch stand for, or 0 when that is not known.
static size_t target_bytes(const Loader *d) {
    size_t bytes = 0, size;
    if (!d->tokenizer) return 0;
    for (size_t i = 0; i < d->R*d->T; i++) {
        if (d->targets[i] == d->eot) continue;
        tokenizer_piece(d->tokenizer, d->targets[i], &size);
        bytes += size;
    }
    return bytes;
}

// ================================================================================================
// Checkpoints: a model directory that Hugging Face loads, and the trainer's own files beside it
// ================================================================================================
//   config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
//   optimizer.safetensors  carry.safetensors (--carry)  state.json  checksums.txt, written last

#include "dev/lib/huggingface.h"        // config.json, reading and naming of weights
#include "dev/lib/directory.h"          // checksums, finding and pruning checkpoints, the lock

// ---- the trainer's state ------------------------------------------------------------------------
typedef struct {
    Int step, adam_t, tokens;           // steps done, updates applied, tokens seen
    double best;                        // lowest validation loss
    Recent loss, norm;                  // of --skip-loss and --skip-norm
} Progress;

static void put_recent(Text *t, const char *name, const Recent *r) {
    put(t, "\"%s\":{\"count\":%" PRId64 ",\"values\":[", name, r->count);
    for (Int i = 0; i < WINDOW && i < r->count; i++) put(t, "%s%.17g", i ? "," : "", r->values[i]);
    put(t, "]}");
}

static void put_state(Text *t, const Progress *p, const Loader *d) {
    put(t, "{\"step\":%" PRId64 ",\"adam_t\":%" PRId64 ",\"tokens\":%" PRId64 ",\n", p->step,
        p->adam_t, p->tokens);
    if (isfinite(p->best)) put(t, "\"best\":%.17g,\n", p->best);
    put(t, "\"data\":{\"epoch\":%" PRIu64 ",\"shard\":%" PRIu64 ",\"batch\":%" PRIu64
        ",\"fingerprint\":%u},\n", d->epoch, d->shard, d->batch, d->fingerprint);
    put_recent(t, "recent_loss", &p->loss), put(t, ",\n");
    put_recent(t, "recent_norm", &p->norm), put(t, ",\n\"flags\":");
    put_flags(t);
    put(t, "}\n");
}

static void read_recent(Recent *r, const Json *state, const char *path, const char *name) {
    const Json *o = json_expect(json_get(state, name), JSON_OBJECT, path, name);
    const Json *values = json_expect(json_get(o, "values"), JSON_ARRAY, path, name);
    r->count = (Int)json_size(json_get(o, "count"), path, name);
    size_t i = 0;
    JSON_EACH(v, values) if (i < WINDOW) r->values[i++] = json_double(v, path, name);
}

// ---- writing ------------------------------------------------------------------------------------
static void carry_tensors(Tensors *t, const Model *m) {
    const Dims *d = &m->d;
    const size_t past[] = { d->L, d->lanes, d->W - 1, d->S };
    const size_t states[] = { d->L, d->lanes, d->H, d->N, d->P };
    tensors_add(t, "past", 4, past, m->a.past);
    tensors_add(t, "states", 5, states, m->a.carried);
}

// Everything in OUT/step_N; complete on the disk before it takes that name.
static void save_checkpoint(const Model *m, const Progress *p, const Loader *data) {
    const Tokenizer *tok = data->tokenizer;
    const char *out = flags.out;
    char *dir = strdup(str("%s/step_%08" PRId64, out, p->step));
    char *aside = strdup(str("%s/.writing", out)), *old = strdup(str("%s/.replaced", out));
    struct statvfs disk;
    double need = 1.01*(double)(m->size*3*sizeof(real)) + (1 << 20);
    CHECK(statvfs(out, &disk) == 0, "%s: %s", out, strerror(errno));
    double room = (double)disk.f_bavail*(double)disk.f_frsize;
    CHECK(room > need, "%s: %.1f MB are free on its disk, a checkpoint takes %.1f MB; make room, "
          "then go on with --resume", out, room/1e6, need/1e6);
    remove_tree(aside);
    CHECK(mkdir(aside, 0777) == 0, "%s: %s", aside, strerror(errno));
    Text t = { NULL, 0, 0 }, sums = { NULL, 0, 0 };
    Tensors list = { NULL, 0, 0 };
    put_config(&t, &m->d, data->eot);
    finish_text(&sums, aside, "config.json", &t);
    if (data->eot < 0) put(&t, "{}\n");
    else put(&t, "{\n  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n  \"pad_token_id\": %d\n}\n",
             data->eot, data->eot, data->eot);
    finish_text(&sums, aside, "generation_config.json", &t);
    if (tok) {
        put_bytes(&t, tok->file.data, tok->file.size);
        finish_text(&sums, aside, "tokenizer.json", &t);
        put_tokenizer_config(&t, tok);
        finish_text(&sums, aside, "tokenizer_config.json", &t);
    }
    tensors_add_params(&list, m, &m->w, "");
    finish_tensors(&sums, aside, "model.safetensors", &list);
    tensors_add_params(&list, m, &m->m, "exp_avg.");
    tensors_add_params(&list, m, &m->v, "exp_avg_sq.");
    finish_tensors(&sums, aside, "optimizer.safetensors", &list);
    if (m->d.lanes) {
        carry_tensors(&list, m);
        finish_tensors(&sums, aside, "carry.safetensors", &list);
    }
    put_state(&t, p, data);
    finish_text(&sums, aside, "state.json", &t);
    put(&sums, "%08x %zu checksums\n", crc_of(0, sums.data, sums.size), sums.size);
    write_file(str("%s/checksums.txt", aside), sums.data, sums.size);
    free(sums.data);
    sync_directory(aside);
    remove_tree(old);
    CHECK(!exists(dir) || rename(dir, old) == 0, "%s: is in the way: %s", dir, strerror(errno));
    CHECK(rename(aside, dir) == 0, "%s: could not get its name: %s", dir, strerror(errno));
    point_link(str("%s/last", out), strrchr(dir, '/') + 1);
    sync_directory(out);
    remove_tree(old);
    free(dir), free(aside), free(old);
}

// ---- finding and reading ------------------------------------------------------------------------
static Json *read_state(const char *dir) {
    char *path = strdup(str("%s/state.json", dir));
    Bytes b = read_file(path);
    Json *state = json_parse(path, b.data, b.size);
    free(b.data), free(path);
    return state;
}

static void restore_tensors(const char *dir, const char *name, Tensors *list) {
    read_tensors(dir, name, list, NULL);
    check_all_read(dir, list);
    free(list->list);
    memset(list, 0, sizeof *list);
}

static void restore_checkpoint(const char *dir, const Json *state, Model *m, Progress *p,
                               Loader *d) {
    char *path = strdup(str("%s/state.json", dir));
    const Json *data = json_expect(json_get(state, "data"), JSON_OBJECT, path, "data");
    Tensors list = { NULL, 0, 0 };
    CHECK((uint32_t)json_size(json_get(data, "fingerprint"), path, "fingerprint")
          == d->fingerprint, "--resume: the files of --data %s are not those that %s was "
          "trained on; a run can only go on as it was", flags.data, dir);
    read_weights(dir, m);
    tensors_add_params(&list, m, &m->m, "exp_avg.");
    tensors_add_params(&list, m, &m->v, "exp_avg_sq.");
    restore_tensors(dir, "optimizer.safetensors", &list);
    if (m->d.lanes) {
        carry_tensors(&list, m);
        restore_tensors(dir, "carry.safetensors", &list);
    }
    p->step = (Int)json_size(json_get(state, "step"), path, "step");
    p->adam_t = (Int)json_size(json_get(state, "adam_t"), path, "adam_t");
    p->tokens = (Int)json_size(json_get(state, "tokens"), path, "tokens");
    p->best = json_number(state, path, "best", INFINITY);
    read_recent(&p->loss, state, path, "recent_loss");
    read_recent(&p->norm, state, path, "recent_norm");
    loader_seek(d, json_size(json_get(data, "epoch"), path, "epoch"),
                json_size(json_get(data, "shard"), path, "shard"),
                json_size(json_get(data, "batch"), path, "batch"));
    free(path);
}

// ================================================================================================
// Generating text
// ================================================================================================
// The prompt goes through the parallel form, in pieces; then each token is one step of the
// recurrence, at the same cost however long the text is. The states are those of --carry.

static void swap_states(Model *m) {
    Acts *a = &m->a;
    real *past = a->past, *carried = a->carried;
    a->past = a->past_new, a->past_new = past;
    a->carried = a->carried_new, a->carried_new = carried;
}

static void clear_states(Model *m) {
    const Dims *d = &m->d;
    memset(m->a.past, 0, d->L*d->lanes*(d->W - 1)*d->S*sizeof(real));
    memset(m->a.carried, 0, d->L*d->lanes*d->E*d->N*sizeof(real));
}

// A view of a model's weights, with activations for T tokens of a prompt, and then for one token of
// each of R rows
static void sampler_open(Model *s, const Model *m, size_t R, size_t T) {
    memset(s, 0, sizeof *s);
    s->d = m->d, s->w = m->w;
    dims_batch(&s->d, 1, T > R ? T : R);
    s->d.lanes = s->d.slab = R, s->d.kept = 1;
    memcpy(s->specs, m->specs, sizeof s->specs);
    act_specs(&s->d, s->act_specs);
    s->acts = allocate_acts(&s->a, s->act_specs);
    clear_states(s);
}

// Feeds tokens: of the prompt, and returns the logits (V) after the last one; or one of each row,
// and returns the logits (R,V) after them.
static const real *sampler_feed(Model *s, const int *ids, size_t count) {
    size_t M = s->d.M, most = s->act_specs[0].shape[1];
    for (size_t i = 0; i < count; i += s->d.n) {
        if (!s->recurrent) dims_batch(&s->d, 1, count - i < most ? count - i : most);
        s->ids = ids + i;
        model_hidden(s);
        if (!s->recurrent) swap_states(s);
    }
    const real *head = s->d.tied ? s->w.embedding : s->w.lm_head;
    size_t R = s->d.R;
    linear_forward(s->a.logits, s->a.hidden + (s->d.n - R)*M, head, R, M, s->d.V, 0);
    return s->a.logits;
}

// From here on one token at a time, with the states updated in place. All rows begin with those of
// the first.
static void sampler_recurrent(Model *s) {
    size_t R = s->d.lanes, past = (s->d.W - 1)*s->d.S, state = s->d.E*s->d.N;
    for (size_t i = 0; i < s->d.L*R; i++) {                  // row i % R of a layer
        size_t first = i/R*R;
        memmove(s->a.past + i*past, s->a.past + first*past, past*sizeof(real));
        memmove(s->a.carried + i*state, s->a.carried + first*state, state*sizeof(real));
    }
    s->recurrent = 1;
    s->a.carried_new = s->a.carried, s->a.past_new = s->a.past;
    dims_batch(&s->d, R, 1);
}

typedef struct { double logit; int id; } Candidate;
static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = (const Candidate *)a, *y = (const Candidate *)b;
    return x->logit < y->logit ? 1 : x->logit > y->logit ? -1 : x->id - y->id;
}

// A token from softmax(logits/temperature), cut to the top k and to the fewest of probability p;
// u is uniform in (0,1). Temperature 0 takes the most likely one.
static int sample(const real *logits, size_t vocab, double temperature, Int top_k, double top_p,
                  double u) {
    Candidate *c = (Candidate *)alloc(vocab, sizeof(Candidate));
    double top = -INFINITY, sum = 0, kept = 0;
    size_t count = vocab, i;
    for (i = 0; i < vocab; i++) {
        c[i].logit = (double)logits[i], c[i].id = (int)i;
        top = fmax(top, c[i].logit);
    }
    if (temperature == 0) top_k = 1, temperature = 1;
    if (top_k || top_p < 1) qsort(c, vocab, sizeof *c, compare_candidates);
    if (top_k && (size_t)top_k < count) count = (size_t)top_k;
    for (i = 0; i < count; i++) sum += c[i].logit = exp((c[i].logit - top)/temperature);
    for (i = 0; i < count && (!i || kept < top_p*sum); i++) kept += c[i].logit;
    count = i;
    u *= kept;
    for (i = 0; i + 1 < count && u >= c[i].logit; i++) u -= c[i].logit;
    int id = c[i].id;
    free(c);
    return id;
}

// What --num-samples samples have said. The first is printed as it comes, the others after it.
typedef struct {
    const Tokenizer *tok;
    size_t count, left;                 // all of them; those that have not come to end of text
    char *ended;                        // (count)
    Text *texts;                        // (count)
} Samples;

static Samples samples_open(const Tokenizer *tok) {
    size_t count = (size_t)flags.num_samples;
    Samples s = { tok, count, count, (char *)alloc(count, 1), (Text *)alloc(count, sizeof(Text)) };
    return s;
}

// Takes in the next token of each; returns how many go on, 0 also when nobody reads them.
static size_t samples_take(Samples *s, const int *ids) {
    for (size_t k = 0; k < s->count; k++) {
        size_t size;
        const char *piece = tokenizer_piece(s->tok, ids[k], &size);
        if (!s->ended[k] && ids[k] == s->tok->eot) s->ended[k] = 1, s->left--;
        if (s->ended[k]) continue;
        if (k) put_bytes(&s->texts[k], piece, size);
        else fwrite(piece, 1, size, stdout), fflush(stdout);
    }
    return ferror(stdout) ? 0 : s->left;
}

// Prints all but the first.
static void samples_close(Samples *s) {
    for (size_t k = 1; k < s->count; k++) {
        printf("\n---------------\n");
        if (s->texts[k].size) fwrite(s->texts[k].data, 1, s->texts[k].size, stdout);
        free(s->texts[k].data);
    }
    free(s->texts), free(s->ended);
}

// Prints --num-samples samples of up to `count` tokens after the prompt: rows of a batch, each with
// its own stream of random numbers. End of text ends a sample.
static void generate(const Model *m, const Tokenizer *tok, const int *prompt, size_t prompt_size,
                     Int count, uint64_t stream) {
    Model s;
    Samples out = samples_open(tok);
    size_t R = out.count, V = m->d.V;
    int *ids = (int *)alloc(R, sizeof(int));
    sampler_open(&s, m, R, prompt_size < 256 ? prompt_size : 256);
    const real *logits = sampler_feed(&s, prompt, prompt_size);
    sampler_recurrent(&s);
    for (Int i = 0; i < count; i++) {
        PARALLEL_FOR
        for (size_t k = 0; k < R; k++) {
            const real *x = logits + (i ? k*V : 0);          // the prompt's are all alike
            double u = random_uniform((uint64_t)flags.seed, stream + k, (uint64_t)i);
            ids[k] = sample(x, m->d.vocab, flags.temperature, flags.top_k, flags.top_p, u);
        }
        if (!samples_take(&out, ids)) break;
        if (i + 1 < count) logits = sampler_feed(&s, ids, R);
    }
    samples_close(&out);
    free(ids), free(s.acts);
}

// The tokens of --prompt; an empty one is a newline (bytes) or end of text.
static int *prompt_tokens(const Tokenizer *tok, size_t *count) {
    Text t = { NULL, 0, 0 };
    char piece[4096];
    if (strcmp(flags.prompt, "-")) put(&t, "%s", flags.prompt);
    else for (size_t n; (n = fread(piece, 1, sizeof piece, stdin)); ) put_bytes(&t, piece, n);
    if (!t.size && tok->byte_level) put(&t, "\n");
    if (t.size) {
        int *ids = tokenizer_encode(tok, "--prompt", t.data, t.size, count);
        free(t.data);
        return ids;
    }
    CHECK(tok->eot >= 0, "--prompt is empty and the tokenizer has no end-of-text token");
    int *ids = (int *)alloc(1, sizeof(int));
    ids[0] = tok->eot, *count = 1;
    return ids;
}

// ================================================================================================
// The run: everything that main() does
// ================================================================================================

struct Run;

// What a model takes of a device's memory, and what there is, in bytes
typedef struct { double weights, grads, moments, activations, logits, work, room; } Memory;

// What a device does. train_mamba2.cu fills in the same table for the GPU; the Model's weights,
// moments and gradients are then copies that fetch() brings up to date.
typedef struct {
    const char *name;
    int remote;                                              // it has memory of its own
    void (*start)(void);                                     // flags are read: is it there?
    Memory (*memory)(const Dims *d);                         // what such a model takes
    void (*open)(Model *m);                                  // the weights are set: get ready
    double (*loss)(Model *m, int backward);                  // of one micro-batch
    double (*norm)(Model *m);                                // of all gradients
    void (*update)(Model *m, double lr, double grad_scale, Int t);
    void (*carry)(Model *m, int fresh);                      // the states: 1: clear, 0: step on
    void (*fetch)(Model *m);
    void (*generate)(const Model *m, const Tokenizer *tok, const int *prompt, size_t prompt_size,
                     Int count, uint64_t stream);
    double (*flops)(const Model *m);                         // of training, for a token
    double (*peak)(void);                                    // FLOP/s of the device, 0: unknown
    int (*profile)(Int steps);                               // after each one; 1: printed, stop
    int (*compare)(struct Run *run);                         // --compare without a file, or NULL
} Backend;

typedef struct Run {
    const Backend *device;
    Model m;
    Tokenizer *tok;
    Loader train, val;
    int has_val;
    Progress p;
    double started, peak, last_val;
    Int first_step, last_val_step;
    FILE *log;
    Curve train_curve, val_curve;
} Run;

// ---- setting up ---------------------------------------------------------------------------------

static const Preset *find_preset(const char *name) {
    Text names = { NULL, 0, 0 };
    for (size_t i = 0; i < PRESET_COUNT; i++) {
        if (!strcmp(name, presets[i].name)) return free(names.data), &presets[i];
        put(&names, " %s", presets[i].name);
    }
    die_usage("--model %s: expected one of%s; or give a directory to --init", name, names.data);
}

// Flags of the shape and the sizes that they stand for: over a preset, against a loaded model, and
// filled in for the log and the checkpoint
typedef struct { size_t flag; Int *value; size_t *size, preset; } ShapeFlag;
enum { SHAPE_FLAGS = 10 };

static void shape_flags(Dims *d, size_t *expand, size_t *tie, ShapeFlag list[SHAPE_FLAGS]) {
    const Preset *p = find_preset(flags.model);
    const ShapeFlag all[SHAPE_FLAGS] = {
        { FLAG_d_model, &flags.d_model, &d->M, (size_t)p->d_model },
        { FLAG_n_layer, &flags.n_layer, &d->L, (size_t)p->n_layer },
        { FLAG_d_state, &flags.d_state, &d->N, (size_t)p->d_state },
        { FLAG_headdim, &flags.headdim, &d->P, (size_t)p->headdim },
        { FLAG_expand, &flags.expand, expand, 2 },
        { FLAG_ngroups, &flags.ngroups, &d->G, 1 },
        { FLAG_d_conv, &flags.d_conv, &d->W, 4 },
        { FLAG_vocab_size, &flags.vocab_size, &d->vocab, (size_t)p->vocab_size },
        { FLAG_d_intermediate, &flags.d_intermediate, &d->F, 0 },
        { FLAG_tie, &flags.tie, tie, 1 },
    };
    memcpy(list, all, sizeof all);
}

// The sizes of a new model: the preset's, with the flags over them
static void new_dims(Dims *d, size_t data_vocab) {
    ShapeFlag list[SHAPE_FLAGS];
    size_t expand, tie;
    memset(d, 0, sizeof *d);
    shape_flags(d, &expand, &tie, list);
    for (size_t i = 0; i < SHAPE_FLAGS; i++)
        *list[i].size = given[list[i].flag] ? (size_t)*list[i].value : list[i].preset;
    if (!d->vocab) d->vocab = data_vocab;
    d->E = mul(d->M, expand), d->V = round_up(d->vocab, 16), d->tied = (int)tie;
    d->eps = 1e-5, d->dt_lo = 0, d->dt_hi = INFINITY;
    if (*flags.dt_limit) {
        char *comma;
        d->dt_lo = strtod(flags.dt_limit, &comma), d->dt_hi = strtod(comma + 1, NULL);
    }
    if (d->E % d->P)
        die_usage("--headdim %zu does not divide d_inner = expand*d_model = %zu", d->P, d->E);
    if (d->E/d->P % d->G)
        die_usage("--ngroups %zu does not divide the %zu heads", d->G, d->E/d->P);
}

// What follows from a model's sizes; a loaded model must have the shape that the user asked for.
static void finish_dims(Dims *d, const char *dir, size_t R, size_t T) {
    ShapeFlag list[SHAPE_FLAGS];
    size_t expand = d->E/d->M, tie = (size_t)d->tied;
    shape_flags(d, &expand, &tie, list);
    for (size_t i = 0; i < SHAPE_FLAGS; i++) {
        CHECK(!dir || !given[list[i].flag] || (size_t)*list[i].value == *list[i].size
              || list[i].flag == FLAG_vocab_size, "%s %" PRId64 ": the model in %s has %zu",
              flag_name(list[i].flag), *list[i].value, dir, *list[i].size);
        *list[i].value = (Int)*list[i].size;
    }
    const char *limit = str("%.17g,%.17g", d->dt_lo, d->dt_hi);
    CHECK(!dir || !given[FLAG_dt_limit] || !strcmp(flags.dt_limit, limit), "--dt-limit %s: the "
          "model in %s has %s", flags.dt_limit, dir, limit);
    flags.dt_limit = strdup(limit);
    d->H = d->E/d->P, d->S = d->E + 2*d->G*d->N, d->Z = d->S + d->E + d->H;
    CHECK(d->H % d->G == 0, "%s: n_groups %zu does not divide the %zu heads", dir ? dir
          : "--ngroups", d->G, d->H);
    d->Q = flags.chunk_size ? (size_t)flags.chunk_size : (size_t)BEST_CHUNK;
    d->kept = flags.recompute ? 1 : d->L;
    d->lanes = flags.carry ? mul(R, (size_t)flags.accum) : 0;
    dims_batch(d, R, T);
}

static Tokenizer *choose_tokenizer(const char *dir) {        // dir: a model directory, or NULL
    char *path = strdup(dir ? str("%s/tokenizer.json", dir) : "");
    if (!given[FLAG_tokenizer] && exists(path)) return tokenizer_load(path);
    return *flags.tokenizer ? tokenizer_load(flags.tokenizer) : tokenizer_bytes();
}

static double memory_sum(const Memory *m) {
    return m->weights + m->grads + m->moments + m->activations + m->logits + m->work;
}

static const char *memory_text(const Memory *m) {
    const double GiB = 1 << 30;
    return str("%.2f GiB: weights %.2f, gradients %.2f, moments %.2f, activations %.2f, logits "
               "%.2f, work %.2f%s", memory_sum(m)/GiB, m->weights/GiB, m->grads/GiB,
               m->moments/GiB, m->activations/GiB, m->logits/GiB, m->work/GiB,
               flags.recompute ? " (--recompute)" : "");
}

static int batch_fits(const Backend *device, Dims d, size_t R) {
    dims_batch(&d, R, d.T);
    if (d.lanes) d.lanes = mul(R, (size_t)flags.accum);
    Memory m = device->memory(&d);
    return memory_sum(&m) <= 0.95*m.room;
}

// In steps that double until one is too many, and then halve
static size_t largest_batch(const Backend *device, const Dims *d) {
    size_t fits = 0, step = 1;
    while (step < 1 << 20 && batch_fits(device, *d, fits + step)) fits += step, step *= 2;
    for (; step; step /= 2)
        if (batch_fits(device, *d, fits + step)) fits += step;
    return fits;
}

static size_t loader_tokens(const Loader *d) {
    size_t sum = 0;
    for (size_t i = 0; i < d->count; i++) sum += d->shards[i].tokens;
    return sum;
}

static void print_summary(const Run *run) {
    const Dims *d = &run->m.d;
    Spec specs[PARAM_COUNT];
    double tokens = (double)loader_tokens(&run->train);
    double seen = (double)flags.steps*(double)flags.accum*(double)d->n;
    param_specs(d, specs);
    Memory memory = run->device->memory(d);
    printf("model    %s: %s parameters, %zu layers, d_model %zu, %zu heads of %zu, d_state %zu, "
           "vocabulary %zu (%zu rows)%s\n", *flags.init ? flags.init : flags.model,
           human((double)parameter_count(specs)), d->L, d->M, d->H, d->P, d->N, d->vocab, d->V,
           d->F ? str(", MLP %zu", d->F) : "");
    printf("memory   %s\n", memory_text(&memory));
    printf("data     %s: %s tokens to train on, %s to validate\n", flags.data, human(tokens),
           run->has_val ? human((double)loader_tokens(&run->val)) : "none");
    printf("training %" PRId64 " steps of %" PRId64 " x %zu x %zu tokens (%.2f epochs), lr %g %s, "
           "seed %" PRId64 "\n", flags.steps, flags.accum, d->R, d->T,
           tokens > 0 ? seen/tokens : 0, flags.lr, flags.schedule, flags.seed);
    printf("device   %s, %s, chunks of %zu tokens; output in %s/\n", run->device->name, flags.dtype,
           d->Q, flags.out);
}

// Opens data and model. dir: a model directory to start from, or NULL; state: that of dir when it
// is a checkpoint to go on from, else NULL.
static void run_open(Run *run, const char *dir, const Json *state, int training) {
    Loader *t = &run->train, *v = &run->val;
    if (state) restore_flags(dir, state);
    if (!given[FLAG_min_lr] && (!state || given[FLAG_lr])) flags.min_lr = flags.lr/10;
    run->device->start();
    run->tok = choose_tokenizer(dir);
    loader_open(t, flags.data, "--data", run->tok);
    if (*flags.val_data) loader_open(v, flags.val_data, "--val-data", run->tok);
    else if (t->text && t->files == 1 && flags.val_frac > 0) loader_split(t, v, flags.val_frac);
    Dims d;
    if (dir) read_config(dir, &d);
    else new_dims(&d, *flags.tokenizer || !t->version ? (size_t)run->tok->vocab
                      : t->version == 1 ? 50257 : 128256);
    finish_dims(&d, dir, (size_t)flags.batch, (size_t)flags.seq_len);
    t->shuffle = (int)flags.shuffle, t->packed = v->packed = (int)flags.packed;
    t->carry = (int)flags.carry, t->seed = (uint64_t)flags.seed, t->accum = (size_t)flags.accum;
    loader_start(t, dir ? d.V : d.vocab, d.R, d.T, 1);
    run->has_val = v->files && loader_start(v, dir ? d.V : d.vocab, d.R, d.T, *flags.val_data != 0);
    CHECK(flags.eot < (Int)d.V, "--eot %" PRId64 ": the vocabulary has %zu rows", flags.eot, d.V);
    if (dir && t->tokenizer && (size_t)run->tok->vocab < d.V) d.vocab = (size_t)run->tok->vocab;
    run->p.best = INFINITY;
    run->m.d = d;
    run->m.remote = run->device->remote && !flags.dump && !flags.compare;
    if (flags.dry_run) return;
    model_allocate(&run->m, &d, training);
    if (state) restore_checkpoint(dir, state, &run->m, &run->p, t);
    else if (dir) read_weights(dir, &run->m);
    else model_init(&run->m, (uint64_t)flags.seed);
    run->device->open(&run->m);
}

static void set_batch(Model *m, const Loader *d, size_t micro_batches) {
    m->ids = d->ids, m->targets = d->targets, m->doc = d->doc;
    m->scale = (real)(1.0/(double)(m->d.n*micro_batches));
}

// Mean loss per token over a loader's micro-batches (at most `most`, 0: all), and bits per byte
static double evaluate(Run *run, Loader *d, Int most, double *bits_per_byte) {
    Model *m = &run->m;
    size_t lanes = m->d.lanes, bytes = 0, count = 0, all = 0;
    double sum = 0;
    loader_seek(d, 0, 0, 0);
    for (size_t i = 0; i < d->count; i++) all += loader_batches(d, d->shards[i].tokens);
    m->d.lanes = 0;                     // rows stand alone
    for (; count < all && (!most || (Int)count < most); count++) {
        loader_next(d);
        set_batch(m, d, 1);
        sum += run->device->loss(m, 0);
        bytes += target_bytes(d);
    }
    m->d.lanes = lanes;
    double mean = sum/(double)count;
    *bits_per_byte = bytes ? mean*(double)(count*m->d.n)/(double)bytes/log(2) : NAN;
    return mean;
}

// The model directory for --generate and --eval: --init, or the newest checkpoint
static const char *trained_model(void) {
    const char *last = strdup(str("%s/last", flags.out));
    CHECK(*flags.init || exists(last), "%s: no trained model; train first, or give a model "
          "directory to --init", last);
    return *flags.init ? flags.init : last;
}

// Opens a trained model without data, gradients and moments, for R rows of T tokens; returns its
// directory.
static const char *weights_open(Run *run, size_t R, size_t T) {
    const char *dir = trained_model();
    Dims d;
    read_config(dir, &d);
    run->tok = choose_tokenizer(dir);
    if ((size_t)run->tok->vocab < d.V) d.vocab = (size_t)run->tok->vocab;
    flags.carry = 0, flags.recompute = 1;
    finish_dims(&d, dir, R, T);
    run->device->start();
    run->m.remote = run->device->remote;
    model_allocate(&run->m, &d, 0);
    read_weights(dir, &run->m);
    run->device->open(&run->m);
    return dir;
}

#include "dev/lib/inspect.h"            // --dump, --compare, tasks of --eval

// ---- log and plot -------------------------------------------------------------------------------

static void put_log(Run *run, Text *line) {
    fwrite(line->data, 1, line->size, run->log);
    CHECK(fflush(run->log) == 0, "%s/log.jsonl: %s", flags.out, strerror(errno));
    free(line->data);
}

// A new log begins with all flags; a resumed one loses the lines behind the step it goes on from.
static void log_open(Run *run, int resumed) {
    char *path = strdup(str("%s/log.jsonl", flags.out)), *aside = strdup(str("%s.new", path));
    Text t = { NULL, 0, 0 };
    if (resumed && exists(path))
        t = log_kept(path, (double)run->p.step, &run->train_curve, &run->val_curve);
    else
        put(&t, "{\"config\":"), put_flags(&t), put(&t, "}\n");
    write_file(aside, t.data, t.size);
    CHECK(rename(aside, path) == 0 && (run->log = fopen(path, "a")), "%s: %s", path,
          strerror(errno));
    free(t.data), free(path), free(aside);
}

static void draw_plot(const Run *run) {
    const Curve *t = &run->train_curve, *v = &run->val_curve;
    const Series series[] = { { "train", 0x1f77b4, t->points, t->count },
                              { "val", 0xd62728, v->points, v->count } };
    plot_write(str("%s/loss.png", flags.out), str("%s on %s", flags.model, flags.data), "step",
               "loss (nats per token)", series, run->has_val ? 2 : 1);
}

// ---- the steps ----------------------------------------------------------------------------------

// Stops the run when a loss, a gradient or a weight is not a number: nothing of it must be saved.
static void check_finite(const Model *m, const char *what, double value, const Params *p) {
    if (isfinite(value)) return;
    for (size_t k = 0; k < PARAM_COUNT; k++)
        for (size_t i = 0; i < m->specs[k].count; i++) {
            double x = (double)((real *const *)p)[k][i];
            CHECK(isfinite(x), "%s is %g: %s has %g at element %zu; nothing was saved since the "
                  "last checkpoint; try a smaller --lr, or look at the data", what, value,
                  m->specs[k].name, x, i);
        }
    die("%s is %g though all weights are finite; nothing was saved since the last checkpoint; try "
        "a smaller --lr, or look at the data", what, value);
}

static void log_step(Run *run, double loss, double norm, double lr, double seconds, int skipped) {
    const Progress *p = &run->p;
    double tokens = (double)(run->m.d.n*(size_t)flags.accum);
    double use = run->device->flops(&run->m)*tokens/seconds/run->peak;
    int digits = sizeof(real) == 4 ? 9 : 17, width = (int)strlen(str("%" PRId64, flags.steps));
    Text line = { NULL, 0, 0 };
    put(&line, "{\"step\":%" PRId64 ",\"loss\":%.*g,\"grad_norm\":%.*g,\"lr\":%.17g,", p->step,
        digits, loss, digits, norm, lr);
    put(&line, "\"tokens\":%" PRId64 ",\"tokens_per_s\":%.6g,\"mfu\":%s,\"time\":%.3f%s}\n",
        p->tokens, tokens/seconds, run->peak > 0 ? str("%.4g", use) : "null", now() - run->started,
        skipped ? ",\"skipped\":true" : "");
    put_log(run, &line);
    if (p->step % flags.log_every && p->step != flags.steps
        && p->step != run->first_step + 1) return;
    double left = (now() - run->started)/(double)(p->step - run->first_step)
                * (double)(flags.steps - p->step);
    printf("step %*" PRId64 "/%" PRId64 " %5.1f%% | loss %.4f | norm %.3f | lr %.2e | %s tok/s%s | "
           "ETA %s%s\n", width, p->step, flags.steps, 100.0*(double)p->step/(double)flags.steps,
           loss, norm, lr, human(tokens/seconds),
           run->peak > 0 ? str(" | %.0f%% of peak", 100*use) : "", duration(left),
           skipped ? " | skipped" : "");
}

// One optimizer step: the gradients of K micro-batches, then an update unless it is an outlier
static void train_step(Run *run) {
    Model *m = &run->m;
    const Backend *device = run->device;
    Progress *p = &run->p;
    double start = now(), loss = 0, lr = learning_rate(++p->step);
    model_zero_grad(m);
    for (size_t k = 0; k < (size_t)flags.accum; k++) {
        loader_next(&run->train);
        set_batch(m, &run->train, (size_t)flags.accum);
        m->lane = k*m->d.R, m->add = k > 0;
        if (flags.carry && k == 0 && run->train.fresh) device->carry(m, 1);
        loss += device->loss(m, 1)/(double)flags.accum;
    }
    if (flags.carry) device->carry(m, 0);
    check_finite(m, str("step %" PRId64 ": the loss", p->step), loss, &m->w);
    double norm = device->norm(m);
    check_finite(m, str("step %" PRId64 ": the gradient's norm", p->step), norm, &m->g);
    int skipped = outlier(&p->loss, loss, flags.skip_loss)
               || outlier(&p->norm, norm, flags.skip_norm);
    remember(&p->loss, loss), remember(&p->norm, norm);
    if (!skipped)
        device->update(m, lr, flags.clip > 0 ? fmin(1, flags.clip/(norm + 1e-6)) : 1, ++p->adam_t);
    lap("adamw");
    p->tokens += (Int)(m->d.n*(size_t)flags.accum);
    curve_add(&run->train_curve, (double)p->step, loss);
    log_step(run, loss, norm, lr, now() - start, skipped);
}

static void validate(Run *run) {
    double bits, loss = evaluate(run, &run->val, flags.eval_batches, &bits);
    Int step = run->p.step;
    check_finite(&run->m, str("step %" PRId64 ": the validation loss", step), loss, &run->m.w);
    Text line = { NULL, 0, 0 };
    put(&line, "{\"step\":%" PRId64 ",\"val_loss\":%.*g,\"val_bpb\":%s}\n", step,
        sizeof(real) == 4 ? 9 : 17, loss, isfinite(bits) ? str("%.9g", bits) : "null");
    put_log(run, &line);
    curve_add(&run->val_curve, (double)step, loss);
    printf("step %" PRId64 " | validation loss %.4f nats per token%s\n", step, loss,
           isfinite(bits) ? str(", %.4f bits per byte", bits) : "");
    if (flags.plot) draw_plot(run);
    run->last_val = loss, run->last_val_step = step;
}

static void print_sample(Run *run) {
    int first = run->tok->byte_level ? '\n' : run->tok->eot;
    if (!run->train.tokenizer || first < 0) return;
    printf("---- sample at step %" PRId64 "\n", run->p.step);
    run->device->generate(&run->m, run->tok, &first, 1, 300, RANDOM_SAMPLE);
    printf("\n----\n");
}

// A checkpoint of what the host has, as it was at that step
typedef struct { Model *m; Progress p; Loader data; int better; } Save;
static Save saving;
static pthread_t saver;
static int in_saving;

static void save_now(const Save *s) {
    double sum = 0;
    for (size_t i = 0; i < s->m->size; i++) sum += 0*(double)s->m->weights[i];
    check_finite(s->m, str("step %" PRId64 ": a weight", s->p.step), sum, &s->m->w);
    save_checkpoint(s->m, &s->p, &s->data);
    if (s->better) point_link(str("%s/best", flags.out), str("step_%08" PRId64, s->p.step));
    prune_checkpoints(flags.out, flags.keep, s->p.step);
    printf("step %" PRId64 " | saved %s/step_%08" PRId64 "%s\n", s->p.step, flags.out, s->p.step,
           s->better ? " (best)" : "");
}

static void *save_thread(void *s) {
    in_background = 1;
    save_now((const Save *)s);
    return NULL;
}

static void save_wait(void) {
    if (in_saving) pthread_join(saver, NULL);
    in_saving = 0;
}

// A device's weights are copied to the host, and written from there while training goes on; the
// next save and the end of the program wait for that. The CPU's own weights cannot wait.
static void save(Run *run) {
    save_wait();
    run->device->fetch(&run->m);
    saving.better = run->last_val_step == run->p.step && run->last_val < run->p.best;
    if (saving.better) run->p.best = run->last_val;
    saving.m = &run->m, saving.p = run->p, saving.data = run->train;
    if (!run->device->remote) {
        save_now(&saving);
        return;
    }
    static int asked;
    if (!asked++) atexit(save_wait);
    int error = pthread_create(&saver, NULL, save_thread, &saving);
    CHECK(!error, "no thread to save with: %s", strerror(error));
    in_saving = 1;
}

static volatile sig_atomic_t stop_signal;

static void on_signal(int sig) {
    if (stop_signal) _exit(128 + sig);                       // the second one: at once
    stop_signal = sig;
}

static int due(Int step, Int every) { return every && (step % every == 0 || step == flags.steps); }

static int cpu_profile(Int steps) {
    double sum = 0;
    if (steps < flags.profile && steps < flags.steps) return 0;
    for (size_t i = 0; laps[i].name; i++) sum += laps[i].seconds;
    printf("%-12s %10s %7s\n", "part", "ms a step", "share");
    for (size_t i = 0; laps[i].name; i++)
        printf("%-12s %10.2f %6.1f%%\n", laps[i].name, 1e3*laps[i].seconds/(double)steps,
               100*laps[i].seconds/sum);
    return 1;
}

static int run_training(Run *run) {
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);
    run->started = now(), run->first_step = run->p.step;
    while (run->p.step < flags.steps && !stop_signal) {
        train_step(run);
        if (flags.profile && run->device->profile(run->p.step - run->first_step)) return 0;
        if (run->has_val && due(run->p.step, flags.eval_every)) validate(run);
        if (due(run->p.step, flags.sample_every)) print_sample(run);
        if (due(run->p.step, flags.save_every) || (stop_signal && flags.save_every)) save(run);
    }
    save_wait();
    if (flags.plot) draw_plot(run);
    if (!stop_signal) return 0;
    printf("stopped by signal %d after step %" PRId64 "%s\n", (int)stop_signal, run->p.step,
           flags.save_every ? "; --resume goes on" : "; nothing was saved, as --save-every is 0");
    return 128 + stop_signal;
}

// ---- the verbs of main --------------------------------------------------------------------------

static int verb_train(Run *run) {
    size_t count;
    free(list_checkpoints(flags.out, &count));
    CHECK(!count || flags.resume, "--out %s holds %zu checkpoints; go on with --resume, or choose "
          "another directory", flags.out, count);
    int existed = exists(flags.out);
    if (existed) lock_out(flags.out);
    char *dir = find_checkpoint(flags.out);
    Json *state = dir ? read_state(dir) : NULL;
    run_open(run, dir ? dir : *flags.init ? flags.init : NULL, state, 1);
    if (!existed) lock_out(flags.out);  // bad input leaves no directory behind
    json_free(state), free(dir);
    if (run->p.step >= flags.steps)
        return printf("nothing to do: already at step %" PRId64 " of %" PRId64 "\n", run->p.step,
                      flags.steps), 0;
    print_summary(run);
    run->peak = run->device->peak();
    log_open(run, state != NULL);
    return run_training(run);
}

static int verb_generate(Run *run) {
    size_t count;
    const char *dir = weights_open(run, 1, 1);
    const Dims *d = &run->m.d;
    CHECK(d->V <= 272 || *flags.tokenizer || exists(str("%s/tokenizer.json", dir)), "%s has %zu "
          "tokens and no tokenizer.json; give one to --tokenizer", dir, d->V);
    int *prompt = prompt_tokens(run->tok, &count);
    for (size_t i = 0; i < count; i++)
        CHECK((size_t)prompt[i] < d->V, "--prompt: token %d is outside the vocabulary of %zu",
              prompt[i], d->V);
    run->device->generate(&run->m, run->tok, prompt, count, flags.generate, RANDOM_SAMPLE);
    return 0;
}

static int verb_eval(Run *run) {
    double bits, loss;
    if (is_task_file(flags.eval)) return eval_tasks(run);
    flags.data = flags.eval, flags.val_data = "", flags.val_frac = 0;
    flags.shuffle = flags.carry = 0;
    run_open(run, trained_model(), NULL, 0);
    loss = evaluate(run, &run->train, 0, &bits);
    printf("%s: loss %.9g nats per token, %s bits per byte\n", flags.eval, loss,
           isfinite(bits) ? str("%.9g", bits) : "unknown");
    return 0;
}

// --dry-run, --dump and --compare: nothing in --out is touched
static int verb_inspect(Run *run) {
    Dump dump;
    if (flags.compare && !*flags.compare && !run->device->compare)
        die_usage("--compare needs a dump to compare with: REF or REF,BASE");
    run_open(run, *flags.init ? flags.init : NULL, NULL, 1);
    if (flags.compare && !*flags.compare) return run->device->compare(run);
    if (flags.compare) return compare_dump(run) ? 1 : 0;
    if (flags.dry_run) {
        print_summary(run);
        double room = run->device->memory(&run->m.d).room/(1 << 30);
        printf("largest --batch that fits in the %.1f GiB that are free: %zu\n", room,
               largest_batch(run->device, &run->m.d));
        return 0;
    }
    dump_run(run, &dump);
    tensors_write(flags.dump, &dump.list);
    printf("%zu tensors written to %s\n", dump.list.count, flags.dump);
    return 0;
}

static int run_main(int argc, char **argv, const Backend *device) {
    static Run run;
    program = argv[0], run.device = device;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    flags_parse(argc, argv);
    if (flags.help) print_help();
    if (flags.version) printf("train_mamba2 %s, %zu-bit floats\n", VERSION, 8*sizeof(real));
    if (flags.help || flags.version) return fflush(stdout) || ferror(stdout) ? 1 : 0;
    flags_check();
    if (given[FLAG_threads]) omp_set_num_threads((int)flags.threads);
    flags.threads = omp_get_max_threads();
    if (!given[FLAG_generate] && !given[FLAG_eval] && !given[FLAG_dump] && !flags.compare
        && !flags.dry_run) return verb_train(&run);
    int status = given[FLAG_generate] ? verb_generate(&run) : given[FLAG_eval] ? verb_eval(&run)
               : verb_inspect(&run);
    fflush(stdout);                     // what these verbs print is their result
    CHECK(!ferror(stdout) || errno == EPIPE, "standard output: %s", strerror(errno));
    return status;
}

// ---- the CPU as a device ------------------------------------------------------------------------

static void cpu_start(void) {
    if (!*flags.dtype) flags.dtype = "f32";
    CHECK(flags.residual_in_fp32, "--residual-in-fp32 0 is for train_mamba2cu");
    if (strcmp(flags.dtype, "bf16")) return;
    CHECK(bf16_available(), "--dtype bf16: this processor or this build has no bf16 instruction "
          "(AVX512_BF16); use --dtype f32");
    matmul_bf16 = 1;
}

static Memory cpu_memory(const Dims *d) {
    Memory m = { 0, 0, 0, 0, 0, 0, 0 };
    Spec params[PARAM_COUNT], acts[ACT_COUNT];
    param_specs(d, params);
    act_specs(d, acts);
    m.weights = m.grads = (double)(total(params, PARAM_COUNT)*sizeof(real));
    m.moments = 2*m.weights;
    m.logits = (double)(d->slab*d->V*sizeof(real));
    m.activations = (double)(total(acts, ACT_COUNT)*sizeof(real)) - m.logits;
    m.room = (double)sysconf(_SC_AVPHYS_PAGES)*(double)sysconf(_SC_PAGESIZE);
    return m;
}

// Six for each parameter, as everyone counts: the recurrence is left out.
static double cpu_flops(const Model *m) { return 6*(double)parameter_count(m->specs); }

static void cpu_open(Model *m) { (void)m; }
static void cpu_fetch(Model *m) { (void)m; }

static void cpu_carry(Model *m, int fresh) { if (fresh) clear_states(m); else swap_states(m); }

static const Backend cpu_backend = {
    "CPU", 0, cpu_start, cpu_memory, cpu_open, model_loss, gradient_norm, adamw, cpu_carry,
    cpu_fetch, generate, cpu_flops, fma_peak, cpu_profile, NULL
};

#ifndef NO_MAIN
int main(int argc, char **argv) { return run_main(argc, argv, &cpu_backend); }
#endif
