// Mamba-2 on one NVIDIA GPU: the program of train_mamba2.c, with every op as CUDA kernels.
//
// Read train_mamba2.c first. It is included here twice, as namespace cpu (float) and as namespace
// cpu64 (double, the judge), and gives everything that is not arithmetic on the device: flags,
// tokens, checkpoints, log, main. What this file adds is, op by op in the same order, the kernels
// and a launcher with the C function's name and arguments. The letters of the sizes are those of
// the C file.
//
//   floatX     type of activations and of operands of matrix products: bf16, or float to compare
//   float      everything that adds up: accumulators, residual stream, dt and its cumulative sums,
//              decays, running states, gradients of parameters, master weights, moments
//   no atomics every sum has one fixed order, so two runs give the same bits
//   offsets    are size_t: a batch may have more than 2^31 elements
//
// The same source runs on a CPU through dev/emulate, where each thread is a fiber.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>
#include <type_traits>
#include <utility>
#include <vector>
#include "dev/lib/system.h"              // that of the C file, outside its namespaces
#ifdef __CUDACC__
#pragma nv_diag_suppress 177            // functions of the C file that this one does not call
#endif
#define NO_MAIN
#define REAL float
namespace cpu {
#include "train_mamba2.c"
}
#undef REAL
#undef UNROLL
#define REAL double
namespace cpu64 {
#include "train_mamba2.c"
}
#undef REAL

using cpu::die;
typedef __nv_bfloat16 bf16;

// The sizes, as in the C file. A type of its own: calls with cpu::Dims would find the CPU's ops.
struct Dims {
    size_t R, T, n, M, E, H, P, N, G, Q, W, S, Z, F, L, V, chunks, slab;
    float dt_lo, dt_hi, eps;
    size_t pitch;                  // of a row of zxBCdt: Z rounded up, so that every row is aligned

    explicit Dims(const cpu::Dims &d)
        : R(d.R), T(d.T), n(d.n), M(d.M), E(d.E), H(d.H), P(d.P), N(d.N), G(d.G), Q(d.Q), W(d.W),
          S(d.S), Z(d.Z), F(d.F), L(d.L), V(d.V), chunks(d.chunks), slab(d.slab),
          dt_lo((float)d.dt_lo), dt_hi((float)d.dt_hi), eps((float)d.eps),
          pitch((d.Z + 7) / 8 * 8) {
        if (chunks == 1 && Q < 128 && T <= 128) Q = 128;   // what the fast kernels take
    }
};

#undef UNROLL
#define UNROLL _Pragma("unroll")

#include "dev/cuda/device.cuh"          // errors, memory, copies, launches
#include "dev/cuda/ptx.cuh"             // mma, ldmatrix, cp.async, ... as functions
#include "dev/cuda/rows.cuh"            // sums over lanes and blocks; vectors of 8 columns
#include "dev/cuda/tiles.cuh"           // products of 64 x 64 tiles
#include "dev/cuda/gemm.cuh"            // gemm: cuBLASLt

// == embed ========================================================================================
// resid = embedding[ids], from the master weights

// A block per row, 4 columns a thread.
template<bool WIDE, typename residX>
__global__ void __launch_bounds__(256)
embed_forward_kernel(residX *resid, const int *ids, const float *embedding, size_t M) {
    size_t row = blockIdx.x, from = ids[row] * M;
    for (size_t c = threadIdx.x * 4; c < M; c += 256 * 4) {
        store<WIDE>(resid + row * M, c, M, load<WIDE, 4>(embedding + from, c, M));
    }
}
template<typename residX>
static void embed_forward(const Dims *d, residX *resid, const int *ids, const float *embedding) {
    auto kernel = d->M % 4 ? embed_forward_kernel<false, residX>
                           : embed_forward_kernel<true, residX>;
    kernel<<<(unsigned)d->n, 256, 0, stream>>>(resid, ids, embedding, d->M);
    LAUNCHED();
}

// For the backward, the host sorts the rows of a batch by their id, and cuts the rows of each id
// into segments of at most 64, since one id may have a tenth of them. Everything is an int in one
// buffer: count of ids, count of segments, then order (n), of segments: start (n + 1), of ids: id,
// first segment (n + 1 each).
constexpr int SEGMENT = 64;
struct EmbedPlan {
    int *order, *start, *id, *first, ids, segments;
};
static size_t embed_plan_size(size_t n) { return 4 * n + 5; }
static EmbedPlan embed_plan_at(int *buffer, size_t n) {
    int *order = buffer + 2, *start = order + n, *id = start + n + 1;
    return EmbedPlan{order, start, id, id + n + 1, 0, 0};
}

// Fills buffer (embed_plan_size ints) for ids below V.
static void embed_plan(int *buffer, const int *ids, size_t n, size_t V) {
    EmbedPlan p = embed_plan_at(buffer, n);
    int *place = (int *)calloc(V + 1, sizeof(int));
    CHECK(place, "out of memory");
    for (size_t i = 0; i < n; i++) {
        place[ids[i] + 1]++;
    }
    for (size_t v = 0; v < V; v++) {
        int rows = place[v + 1];
        if (rows > 0) {
            p.id[p.ids] = (int)v;
            p.first[p.ids++] = p.segments;
        }
        for (int at = 0; at < rows; at += SEGMENT) {
            p.start[p.segments++] = place[v] + at;
        }
        place[v + 1] += place[v];
    }
    p.first[p.ids] = p.segments;
    p.start[p.segments] = (int)n;
    for (size_t i = 0; i < n; i++) {
        p.order[place[ids[i]]++] = (int)i;
    }
    buffer[0] = p.ids;
    buffer[1] = p.segments;
    free(place);
}

// The sum of the rows of x (.,M) that row(i) names, first <= i < last, in order. A thread has 4
// columns, and 8 rows on their way.
template<bool WIDE, typename X, class F>
__device__ inline VecOf<4> sum_rows(const X *x, size_t c, size_t M, int first, int last,
                                    F row) {
    VecOf<4> sum = {};
    for (int i = first; i < last; i += 8) {
        VecOf<4> next[8];
        UNROLL for (int k = 0; k < 8; k++) {
            bool there = i + k < last;
            next[k] = load<WIDE, 4>(x + (there ? row(i + k) : 0) * M, c, there ? M : 0);
        }
        UNROLL for (int k = 0; k < 8; k++) {
            UNROLL for (int e = 0; e < 4; e++) {
                sum.v[e] += next[k].v[e];
            }
        }
    }
    return sum;
}

// parts (segments,M): the sum of the segment's rows of g_resid.
template<bool WIDE, typename residX>
__global__ void __launch_bounds__(256)
embed_segments_kernel(float *parts, const residX *g_resid, const int *plan, EmbedPlan p, size_t M) {
    size_t segment = blockIdx.x, c = (blockIdx.y * (size_t)256 + threadIdx.x) * 4;
    if (segment >= (size_t)plan[1] || c >= M) return;
    store<WIDE>(parts + segment * M, c, M,
                sum_rows<WIDE>(g_resid, c, M, p.start[segment], p.start[segment + 1],
                               [&](int i) { return (size_t)p.order[i]; }));
}
template<bool WIDE>
__global__ void __launch_bounds__(256)
embed_backward_kernel(float *g_embedding, const float *parts, const int *plan, EmbedPlan p,
                      size_t M) {
    size_t which = blockIdx.x, c = (blockIdx.y * (size_t)256 + threadIdx.x) * 4;
    if (which >= (size_t)plan[0] || c >= M) return;
    float *row = g_embedding + p.id[which] * M;
    VecOf<4> g = load<WIDE, 4>(row, c, M),
             sum = sum_rows<WIDE>(parts, c, M, p.first[which], p.first[which + 1],
                                  [](int segment) { return (size_t)segment; });
    UNROLL for (int e = 0; e < 4; e++) {
        g.v[e] += sum.v[e];
    }
    store<WIDE>(row, c, M, g);
}

// g_embedding (V,M) +=; plan, on the device, is what embed_plan made of ids
template<typename residX>
static void embed_backward(const Dims *d, float *g_embedding, const residX *g_resid, int *plan) {
    float *parts = workspace(d->n * d->M);
    EmbedPlan p = embed_plan_at(plan, d->n);
    dim3 grid((unsigned)d->n, pieces(d->M, 1024));         // as if no id came twice: a fixed shape
    bool wide = d->M % 4 == 0;
    auto segments = wide ? embed_segments_kernel<true, residX>
                         : embed_segments_kernel<false, residX>;
    auto backward = wide ? embed_backward_kernel<true> : embed_backward_kernel<false>;
    segments<<<grid, 256, 0, stream>>>(parts, g_resid, plan, p, d->M);
    LAUNCHED();
    backward<<<grid, 256, 0, stream>>>(g_embedding, parts, plan, p, d->M);
    LAUNCHED();
}

// == rmsnorm ======================================================================================
// u = x^ w, x^ = resid rstd, rstd = 1 / sqrt(mean of resid^2 + eps)
// backward, of v = w g_u:  g_resid += rstd (v - x^ mean(x^ v));  g_w += sum over rows of x^ g_u
template<int K, bool WIDE, typename floatX, typename residX>
__global__ void __launch_bounds__(320)
rmsnorm_forward_kernel(floatX *u, float *rstd, const residX *resid, const float *w, size_t M,
                       float eps) {
    __shared__ float part[32];
    size_t row = blockIdx.x;
    Vec x[K];
    float sum = 0.0f;
    next_may_start();
    wait_for_last();
    UNROLL for (int k = 0; k < K; k++) {
        x[k] = load<WIDE>(resid + row * M, (threadIdx.x + k * blockDim.x) * 8, M);
        UNROLL for (int i = 0; i < 8; i++) {
            sum += x[k].v[i] * x[k].v[i];
        }
    }
    float scale = 1.0f / sqrtf(block_sum(sum, part) / M + eps);
    if (threadIdx.x == 0) rstd[row] = scale;
    UNROLL for (int k = 0; k < K; k++) {
        size_t c = (threadIdx.x + k * blockDim.x) * 8;
        Vec weight = load<WIDE>(w, c, M);
        UNROLL for (int i = 0; i < 8; i++) {
            x[k].v[i] *= scale * weight.v[i];
        }
        store<WIDE>(u + row * M, c, M, x[k]);
    }
}
template<typename floatX, typename residX>
static void rmsnorm_forward(const Dims *d, floatX *u, float *rstd, const residX *resid,
                            const float *w) {
    by_columns(d->M, d->M % 8 == 0, [&](auto K, auto WIDE, unsigned threads) {
        auto kernel = rmsnorm_forward_kernel<K(), WIDE(), floatX, residX>;
        launch_early(kernel, dim3((unsigned)d->n), threads, 0, u, rstd, resid, w, d->M, d->eps);
    });
}

template<int K, bool WIDE, typename floatX, typename residX>
__global__ void __launch_bounds__((THREADS<K, WIDE, floatX>), (BLOCKS<K, WIDE, floatX>))
rmsnorm_backward_kernel(residX *g_resid, float *g_w_parts, floatX *copy, const floatX *g_u,
                        const residX *resid, const float *rstd, const float *w, int add, size_t n,
                        size_t M, size_t span) {
    __shared__ float part[2][32];
    Vec g_w[K] = {};
    Packed<residX, 8> next_x[K], next_g[K];                // of the next row, on their way
    Packed<floatX, 8> next_v[K];
    float next_scale;
    size_t first = blockIdx.x * span, last = min(n, first + span);
    auto column = [&](int k) { return (int)((threadIdx.x + k * blockDim.x) * 8); };
    auto fetch_row = [&](size_t row) {
        size_t columns = row < last ? M : 0;
        next_scale = row < last ? rstd[row] : 0.0f;
        UNROLL for (int k = 0; k < K; k++) {
            next_x[k] = fetch<WIDE>(resid + row * M, column(k), columns);
            next_v[k] = fetch<WIDE>(g_u + row * M, column(k), columns);
            next_g[k] = fetch<WIDE>(g_resid + row * M, column(k), add ? columns : 0);
        }
    };
    if (NEXT_ROW<K, floatX>) fetch_row(first);
    for (size_t row = first; row < last; row++) {
        if (!NEXT_ROW<K, floatX>) fetch_row(row);
        Vec x[K], v[K], g[K];
        float dot = 0.0f, scale = next_scale;
        UNROLL for (int k = 0; k < K; k++) {
            Vec weight = load<WIDE>(w, column(k), M);
            x[k] = next_x[k].unpacked();
            v[k] = next_v[k].unpacked();
            g[k] = next_g[k].unpacked();
            UNROLL for (int i = 0; i < 8; i++) {
                x[k].v[i] *= scale;
                g_w[k].v[i] += x[k].v[i] * v[k].v[i];
                v[k].v[i] *= weight.v[i];
                dot += x[k].v[i] * v[k].v[i];
            }
        }
        if (NEXT_ROW<K, floatX>) fetch_row(row + 1);
        dot = block_sum(dot, part[row % 2]) / M;
        UNROLL for (int k = 0; k < K; k++) {
            UNROLL for (int i = 0; i < 8; i++) {
                g[k].v[i] += scale * (v[k].v[i] - x[k].v[i] * dot);
            }
            store<WIDE>(g_resid + row * M, column(k), M, g[k]);
            if (sizeof(residX) != sizeof(floatX)) store<WIDE>(copy + row * M, column(k), M, g[k]);
        }
    }
    UNROLL for (int k = 0; k < K; k++) {
        store<WIDE>(g_w_parts + blockIdx.x * M, column(k), M, g_w[k]);
    }
}
// g_w +=, g_resid += or, without add, =; copy: the new g_resid in floatX, for the products that
// follow, if it is not floatX itself
template<typename floatX, typename residX>
static void rmsnorm_backward(const Dims *d, residX *g_resid, float *g_w, const floatX *g_u,
                             const residX *resid, const float *rstd, const float *w, floatX *copy,
                             int add) {
    float *g_w_parts = workspace(PARTS * d->M);
    by_columns(d->M, d->M % 8 == 0, [&](auto K, auto WIDE, unsigned threads) {
        size_t span = rows_of_block(d->n, K(), threads), parts = pieces(d->n, span);
        rmsnorm_backward_kernel<K(), WIDE(), floatX, residX>
            <<<(unsigned)parts, threads, 0, stream>>>(
            g_resid, g_w_parts, copy, g_u, resid, rstd, w, add, d->n, d->M, span);
        LAUNCHED();
        add_parts(g_w, g_w_parts, parts, d->M, d->M);
    });
}

// == linear =======================================================================================
// out = in weight^T;  g_in = g_out weight;  g_weight = g_out^T in
// out (n,O) (+)= in (n,I) weight(O,I)^T; pitch: of a row of out, when it is not O
template<typename floatX, typename Out>
static void linear_forward(Out *out, const floatX *in, const floatX *weight, size_t n, size_t I,
                           size_t O, int add, size_t pitch = 0) {
    gemm(out, in, weight, out, add, Product{n, O, I, I, I, pitch ? pitch : O, 0, 1});
}

// g_in = , or left alone when NULL; g_weight (+)= by add
template<typename floatX>
static void linear_backward(floatX *g_in, float *g_weight, const floatX *g_out, const floatX *in,
                            const floatX *weight, size_t n, size_t I, size_t O, int add,
                            size_t pitch = 0) {
    if (!pitch) pitch = O;
    if (g_in) gemm(g_in, g_out, weight, g_in, 0, Product{n, I, O, pitch, I, I, 0, 0});
    gemm(g_weight, g_out, in, g_weight, add, Product{O, I, n, pitch, I, I, 1, 0});
}

// == conv1d =======================================================================================
// xBC_t = silu(pre_t), pre_t = b + sum over k of w_k in_{t-(W-1)+k}; in: x | B | C of zxBCdt
// backward: g_pre = g_xBC silu'(pre);  g_in_t = sum over k of w_k g_pre_{t+(W-1)-k};
//           g_w_k += sum over t of g_pre_t in_{t-(W-1)+k};  g_b += sum of g_pre
// A thread walks `steps` steps of CHANNELS channels with the last TAPS inputs in registers, and the
// next AT_ONCE steps on their way. TAPS is W, or more: missing taps are the oldest, weight 0.
constexpr int AT_ONCE = 4, MOST_TAPS = 8;

template<int TAPS, bool WIDE, bool PACKED, typename floatX>
struct Conv {
    static constexpr int CHANNELS = TAPS <= 4 ? 4 : 2;
    typedef VecOf<CHANNELS> Channels;
    typedef Packed<floatX, CHANNELS> Pack;
    const Dims &d;
    int c, left;                                           // first channel; channels from it on
    const floatX *rows, *past;                             // of this row of the batch, from c on
    const int *doc;
    Channels w[TAPS], b, in[TAPS];                         // in[k]: the input under tap k

    __device__ Conv(const Dims &d, size_t r, int c, const floatX *zxBCdt, const float *weight,
                    const float *bias, const floatX *all_past, const int *docs)
        : d(d), c(c), left(max((int)d.S - c, 0)), rows(zxBCdt + r * d.T * d.pitch + d.E + c),
          past(all_past), doc(PACKED ? docs + r * d.T : NULL) {
        if (past) past += r * (d.W - 1) * d.S + c;
        if (d.W == TAPS) {                                 // channel by channel, TAPS each
            VecOf<CHANNELS *TAPS> all = load<WIDE, CHANNELS * TAPS>(weight, c * TAPS, d.S * TAPS);
            UNROLL for (int i = 0; i < CHANNELS * TAPS; i++) {
                w[i % TAPS].v[i / TAPS] = all.v[i];
            }
        } else {
            UNROLL for (int i = 0; i < CHANNELS * TAPS; i++) {
                size_t channel = c + i / TAPS, tap = i % TAPS + d.W - TAPS;
                bool there = channel < d.S && i % TAPS + d.W >= TAPS;
                w[i % TAPS].v[i / TAPS] = there ? weight[channel * d.W + tap] : 0.0f;
            }
        }
        b = load<WIDE, CHANNELS>(bias, c, d.S);
    }
    __device__ Channels input(int t) const {               // before `past` zeros
        int place = t + (int)d.W - 1;                      // in past (W-1,S)
        if (t >= 0) return load<WIDE, CHANNELS>(rows + t * d.pitch, 0, left);
        return past && place >= 0 ? load<WIDE, CHANNELS>(past + place * d.S, 0, left) : Channels{};
    }
    __device__ void start(int t) {                         // before the first call of next(t)
        UNROLL for (int k = 1; k < TAPS; k++) {
            in[k] = input(t - TAPS + k);
        }
    }
    __device__ int reach(int t) const {                    // how many steps back step t sees
        if (!PACKED) return TAPS;
        int back = 0;
        while (back + 1 < TAPS && doc[t] == (t > back ? doc[t - back - 1] : 0)) back++;
        return back;
    }
    __device__ Channels next(int far, const Channels &now) {   // takes in a step, gives its pre
        UNROLL for (int k = 1; k < TAPS; k++) {
            in[k - 1] = in[k];
        }
        in[TAPS - 1] = now;
        Channels pre = b;
        UNROLL for (int k = 0; k < TAPS; k++) {
            if (TAPS - 1 - k > far) continue;
            UNROLL for (int i = 0; i < CHANNELS; i++) {
                pre.v[i] += w[k].v[i] * in[k].v[i];
            }
        }
        return pre;
    }
};
// Rows of a matrix, the next AT_ONCE of them on their way: take gives row number k of those, and
// asks for the one AT_ONCE below it, or for zeros if there is none.
template<bool WIDE, typename floatX, int CHANNELS>
struct RowsAhead {
    const floatX *next;                                    // the row to ask for
    size_t pitch;
    int left;
    Packed<floatX, CHANNELS> ahead[AT_ONCE];

    __device__ RowsAhead(const floatX *first, size_t pitch, int left, int rows)
        : next(first), pitch(pitch), left(left) {
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
            ask(k, k < rows);
        }
    }
    __device__ void ask(int k, bool there) {
        ahead[k] = fetch<WIDE, CHANNELS>(next, 0, there ? left : 0);
        next += pitch;
    }
    __device__ VecOf<CHANNELS> take(int k, bool more) {
        VecOf<CHANNELS> now = ahead[k].unpacked();
        ask(k, more);
        return now;
    }
};

template<int TAPS, bool WIDE, bool PACKED, typename floatX>
__global__ void __launch_bounds__(256, (LEAN<WIDE, floatX>) ? 3 : 1)
conv1d_forward_kernel(floatX *xBC, const floatX *zxBCdt, const float *w, const float *b,
                      const floatX *past, const int *doc, Dims d, int steps, int slices) {
    typedef Conv<TAPS, WIDE, PACKED, floatX> Conv;
    constexpr int CHANNELS = Conv::CHANNELS;
    int c = (blockIdx.y * 32 + threadIdx.x % 32) * CHANNELS;
    int slice = blockIdx.x * 8 + threadIdx.x / 32, r = slice / slices;
    int t0 = (slice - r * slices) * steps, last = min(t0 + steps, (int)d.T);
    if (c >= (int)d.S || r >= (int)d.R) return;
    Conv conv(d, r, c, zxBCdt, w, b, past, doc);
    RowsAhead<WIDE, floatX, CHANNELS> in(conv.rows + t0 * d.pitch, d.pitch, conv.left, last - t0);
    floatX *to = xBC + (r * d.T + t0) * d.S + c;
    conv.start(t0);
    for (int t = t0, rest = last - t0; t < last; t += AT_ONCE, rest -= AT_ONCE) {
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
            int far = conv.reach(min(t + k, last - 1));
            typename Conv::Channels x = conv.next(far, in.take(k, k + AT_ONCE < rest));
            UNROLL for (int i = 0; i < CHANNELS; i++) {
                x.v[i] *= sigmoid<floatX>(x.v[i]);
            }
            store<WIDE>(to, 0, k < rest ? conv.left : 0, x);
            to += d.S;
        }
    }
}

// Calls f(TAPS, WIDE, PACKED).
template<class F>
static void by_taps(const Dims *d, const int *doc, F f) {
    typedef std::integral_constant<int, 4> Four;
    typedef std::integral_constant<int, 8> Eight;
    auto with = [&](auto TAPS, auto WIDE) {
        doc ? f(TAPS, WIDE, std::true_type()) : f(TAPS, WIDE, std::false_type());
    };
    if (d->W > 4) with(Eight(), std::false_type());
    else if (d->S % 8 == 0 && d->E % 8 == 0) with(Four(), std::true_type());
    else with(Four(), std::false_type());
}
// A warp has a slice of a row, `steps` steps, of 32 threads' channels; a block has eight slices.
// Blocks run in waves, of which the last may be nearly empty: with this many steps, and `more` that
// a thread goes beyond its own, they end soonest.
struct ConvGrid {
    int steps, slices;                                     // slices of a row
    dim3 blocks;
    ConvGrid(const Dims *d, size_t blocks_of_multiprocessor, size_t more) {
        unsigned channels = pieces(d->S, d->W <= 4 ? 128 : 64);
        size_t wave = multiprocessors() * blocks_of_multiprocessor, least = SIZE_MAX;
        for (int n = AT_ONCE; n <= 64 * AT_ONCE; n += AT_ONCE) {
            dim3 grid(pieces(d->R * pieces(d->T, n), 8), channels);
            size_t time = pieces((size_t)grid.x * channels, wave) * (n + more);
            if (time >= least) continue;
            least = time;
            steps = n;
            slices = (int)pieces(d->T, n);
            blocks = grid;
        }
    }
};
static ConvGrid conv_forward_grid(const Dims *d) { return ConvGrid(d, 3, d->W + AT_ONCE); }
static ConvGrid conv_backward_grid(const Dims *d) { return ConvGrid(d, 2, 2 * d->W + AT_ONCE); }

// w (S,W), b (S), past (R,W-1,S): xBC before this row, or NULL
template<typename floatX>
static void conv1d_forward(const Dims *d, floatX *xBC, const floatX *zxBCdt, const float *w,
                           const float *b, const floatX *past, const int *doc) {
    ConvGrid grid = conv_forward_grid(d);
    by_taps(d, doc, [&](auto TAPS, auto WIDE, auto PACKED) {
        conv1d_forward_kernel<TAPS(), WIDE(), PACKED(), floatX>
            <<<grid.blocks, 256, 0, stream>>>(xBC, zxBCdt, w, b, past, doc, *d, grid.steps,
                                               grid.slices);
    });
    LAUNCHED();
}

// A thread goes TAPS - 1 steps past its own: g_in_t needs g_pre up to t + TAPS - 1. due[k] is what
// g_in has so far at the step that is under tap k. Past the end g is 0, and so is all that comes of
// it. parts (grid.x, S W | S): of g_w and g_b.
template<int TAPS, bool WIDE, bool PACKED, typename floatX>
__global__ void __launch_bounds__(256, (LEAN<WIDE, floatX>) ? 2 : 1)
conv1d_backward_kernel(floatX *g_zxBCdt, float *parts, const floatX *g_xBC, const floatX *zxBCdt,
                       const float *w, const float *b, const floatX *past, const int *doc, Dims d,
                       int own_steps, int slices) {
    typedef Conv<TAPS, WIDE, PACKED, floatX> Conv;
    typedef typename Conv::Channels Channels;
    constexpr int CHANNELS = Conv::CHANNELS, ACROSS = 32 * CHANNELS;
    __shared__ float sums[TAPS + 1][8][ACROSS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, T = d.T;
    int c = blockIdx.y * ACROSS + lane * CHANNELS;
    int slice = blockIdx.x * 8 + warp, r = min(slice / slices, (int)d.R - 1);
    int t0 = min((slice - r * slices) * own_steps, T), own = min(own_steps, T - t0);
    int count = min(own + TAPS - 1, T - t0);               // steps of its own, and in all
    Conv conv(d, r, c, zxBCdt, w, b, past, doc);
    RowsAhead<WIDE, floatX, CHANNELS> in(conv.rows + t0 * d.pitch, d.pitch, conv.left, count);
    RowsAhead<WIDE, floatX, CHANNELS> in_g(g_xBC + (r * T + t0) * d.S + c, d.S, conv.left, count);
    // due[0] is of the step TAPS - 1 back, so the first ones have no place.
    floatX *to = g_zxBCdt + (r * T + t0 - (TAPS - 1)) * (ptrdiff_t)d.pitch + d.E + c;
    Channels due[TAPS] = {}, g_w[TAPS + 1] = {};           // g_w[TAPS]: g_b
    auto steps = [&](int i, bool of_own) {                 // AT_ONCE of them from t0 + i on
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
            int far = conv.reach(min(t0 + i + k, T - 1)), done = i + k - (TAPS - 1);
            bool more = i + k + AT_ONCE < count;
            Channels pre = conv.next(far, in.take(k, more)), g = in_g.take(k, more);
            UNROLL for (int j = 1; j < TAPS; j++) {
                due[j - 1] = due[j];
            }
            due[TAPS - 1] = Channels{};
            UNROLL for (int ch = 0; ch < CHANNELS; ch++) {
                float s = sigmoid<floatX>(pre.v[ch]);
                g.v[ch] *= s * (1.0f + pre.v[ch] * (1.0f - s));
                if (of_own) g_w[TAPS].v[ch] += g.v[ch];
            }
            UNROLL for (int j = 0; j < TAPS; j++) {
                if (TAPS - 1 - j > far) continue;
                UNROLL for (int ch = 0; ch < CHANNELS; ch++) {
                    due[j].v[ch] += conv.w[j].v[ch] * g.v[ch];
                    if (of_own) g_w[j].v[ch] += conv.in[j].v[ch] * g.v[ch];
                }
            }
            bool there = (unsigned)done < (unsigned)own;
            store<WIDE>(to, 0, there ? conv.left : 0, due[0]);
            to += d.pitch;
        }
    };
    conv.start(t0);
    int i = 0;
    for (; i < own; i += AT_ONCE) {
        steps(i, true);
    }
    for (; i < own + TAPS - 1; i += AT_ONCE) {
        steps(i, false);
    }
    UNROLL for (int k = 0; k <= TAPS; k++) {
        UNROLL for (int i = 0; i < CHANNELS; i++) {
            sums[k][warp][lane * CHANNELS + i] = g_w[k].v[i];
        }
    }
    __syncthreads();
    parts += blockIdx.x * d.S * (d.W + 1);
    for (int i = threadIdx.x; i < (TAPS + 1) * ACROSS; i += 256) {
        int k = i / ACROSS, column = i % ACROSS, tap = k + (int)d.W - TAPS;
        size_t channel = blockIdx.y * ACROSS + column;
        float sum = 0.0f;
        UNROLL for (int s = 0; s < 8; s++) {
            sum += sums[k][s][column];
        }
        if (channel >= d.S || tap < 0) continue;
        parts[k < TAPS ? channel * d.W + tap : d.S * d.W + channel] = sum;
    }
}

// writes its columns of g_zxBCdt; g_w, g_b +=
template<typename floatX>
static void conv1d_backward(const Dims *d, floatX *g_zxBCdt, float *g_w, float *g_b,
                            const floatX *g_xBC, const floatX *zxBCdt, const float *w,
                            const float *b, const floatX *past, const int *doc) {
    ConvGrid grid = conv_backward_grid(d);
    size_t count = grid.blocks.x, weights = d->S * d->W, pitch = weights + d->S;
    float *parts = workspace(count * pitch);
    by_taps(d, doc, [&](auto TAPS, auto WIDE, auto PACKED) {
        conv1d_backward_kernel<TAPS(), WIDE(), PACKED(), floatX><<<grid.blocks, 256, 0, stream>>>(
            g_zxBCdt, parts, g_xBC, zxBCdt, w, b, past, doc, *d, grid.steps,
            grid.slices);
    });
    LAUNCHED();
    add_parts(g_w, parts, count, weights, pitch);
    add_parts(g_b, parts + weights, count, d->S, pitch);
}

// == dt ===========================================================================================
// dt = clamp(softplus(raw + dt_bias), dt_lo, dt_hi), raw: the last columns of zxBCdt
// backward: g_raw = g_dt sigmoid(raw + dt_bias), 0 where clamped;  g_dt_bias += sum of g_raw
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Warps have 32 heads, and DT_ROWS rows at a time, whose loads are on their way together.
constexpr int DT_ROWS = 4;

template<typename floatX>
__global__ void __launch_bounds__(256)
dt_forward_kernel(float *dt, const floatX *zxBCdt, const float *dt_bias, Dims d) {
    size_t h = blockIdx.y * (size_t)32 + threadIdx.x % 32;
    size_t first = (blockIdx.x * (size_t)8 + threadIdx.x / 32) * DT_ROWS;
    float raw[DT_ROWS];
    if (h >= d.H) return;
    UNROLL for (int k = 0; k < DT_ROWS; k++) {
        size_t row = min(first + k, d.n - 1);
        raw[k] = (float)zxBCdt[row * d.pitch + d.E + d.S + h] + dt_bias[h];
    }
    UNROLL for (int k = 0; k < DT_ROWS; k++) {
        if (first + k >= d.n) break;
        dt[(first + k) * d.H + h] = min(max(softplus(raw[k]), d.dt_lo), d.dt_hi);
    }
}
template<typename floatX>
static void dt_forward(const Dims *d, float *dt, const floatX *zxBCdt, const float *dt_bias) {
    dim3 grid(pieces(d->n, 8 * DT_ROWS), pieces(d->H, 32));
    dt_forward_kernel<floatX><<<grid, 256, 0, stream>>>(dt, zxBCdt, dt_bias, *d);
    LAUNCHED();
}

// A block has a span of rows. It also clears the columns that round the pitch up.
template<typename floatX>
__global__ void __launch_bounds__(256)
dt_backward_kernel(floatX *g_zxBCdt, float *parts, const float *g_dt, const floatX *zxBCdt,
                   const float *dt_bias, Dims d, size_t span) {
    __shared__ float sums[8][32];
    size_t lane = threadIdx.x % 32, slice = threadIdx.x / 32, h = blockIdx.y * (size_t)32 + lane;
    size_t begin = blockIdx.x * span, end = min(d.n, begin + span);
    float sum = 0.0f, bias = h < d.H ? dt_bias[h] : 0.0f;
    for (size_t first = begin + slice; first < end; first += 8 * DT_ROWS) {
        float raw[DT_ROWS], g[DT_ROWS];
        UNROLL for (int k = 0; k < DT_ROWS; k++) {
            size_t row = first + 8 * k;
            bool there = row < end && h < d.H;
            raw[k] = there ? (float)zxBCdt[row * d.pitch + d.E + d.S + h] + bias : 0.0f;
            g[k] = there ? g_dt[row * d.H + h] : 0.0f;
        }
        UNROLL for (int k = 0; k < DT_ROWS; k++) {
            size_t row = first + 8 * k;
            float step = softplus(raw[k]);
            if (step < d.dt_lo || step > d.dt_hi) g[k] = 0.0f;
            if (raw[k] <= 20.0f) g[k] *= sigmoid<float>(raw[k]);
            sum += g[k];
            if (row >= end || h >= d.H + d.pitch - d.Z) continue;
            g_zxBCdt[row * d.pitch + d.E + d.S + h] = (floatX)g[k];
        }
    }
    sums[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || h >= d.H) return;
    sum = 0.0f;
    for (int s = 0; s < 8; s++) {
        sum += sums[s][lane];
    }
    parts[blockIdx.x * d.H + h] = sum;
}
template<typename floatX>
static void dt_backward(const Dims *d, floatX *g_zxBCdt, float *g_dt_bias, const float *g_dt,
                        const floatX *zxBCdt, const float *dt_bias) {
    size_t span = pieces(d->n, PARTS), count = pieces(d->n, span);
    float *parts = workspace(count * d->H);
    dim3 grid((unsigned)count, pieces(d->H + 7, 32));
    dt_backward_kernel<floatX><<<grid, 256, 0, stream>>>(
        g_zxBCdt, parts, g_dt, zxBCdt, dt_bias, *d, span);
    LAUNCHED();
    add_parts(g_dt_bias, parts, count, d->H, d->H);
}

// == ssd ==========================================================================================
// The recurrence of a head, h = exp(dt A) h + dt B x^T, y = C h + D x, worked out chunk by chunk.
// In a chunk of Q steps, with s <= l:
//   cs_l     sum of dt A over the steps up to l         L_ls = exp(cs_l - cs_s)
//   S        state (N,P) before the chunk               CB_ls = C_l . B_s, of all heads of a group
//   y        = (CB o L) diag(dt) x + diag(exp(cs)) C S + D x
//   S next   = exp(cs_last) S + B^T diag(dt exp(cs_last - cs)) x
// Backward, with gS the gradient of the state after the chunk:
//   gS before = exp(cs_last) gS + C^T diag(exp(cs)) g_y;          kappa = exp(cs_last) <S, gS>
//   R         = (CB o L)^T g_y + diag(exp(cs_last - cs)) B gS;    rho_s = dt_s x_s . its last term
//   g_x       = dt R + D g_y;  g_dt (direct) = R . x;  g_D = sum of g_y o x
//   g_CB      = sum over heads of (g_y x^T) o L diag(dt);  G = CB o (this head's part)
//   g_C       = g_CB B + sum over heads of diag(exp(cs)) g_y S^T
//   g_B       = g_CB^T C + sum over heads of diag(dt exp(cs_last - cs)) x gS^T
//   pi_l      = exp(cs_l) C_l . (g_y S^T)_l
//   g of dt A = sum of G_ls over s < t <= l, of rho_s over s < t, of pi_l over l >= t, and kappa
// A change of document cuts: L_ls = 0 across it, and so do the decays to and from the states. cs is
// kept in units of log 2, and no exponent is let above 0.

// One chunk of one head: where its steps are, and how they decay.
template<typename floatX>
struct Chunk {
    size_t token, number, group;                   // first step; among (R, chunks); of B and C
    size_t rows;                                   // steps, fewer than Q at the end
    const floatX *x, *B, *C;                       // of the first step; the next is S elements on
    const float *cs, *dt;                          // (Q)
    const int *doc;
    int doc_before, doc_last;

    __device__ Chunk(const Dims &d, size_t c, size_t h, size_t r, const floatX *xBC,
                     const float *all_cs, const float *all_dt, const int *docs) {
        token = r * d.T + c * d.Q;
        number = r * d.chunks + c;
        group = h / (d.H / d.G);
        rows = min(d.Q, d.T - c * d.Q);
        x = xBC + token * d.S + h * d.P;
        B = xBC + token * d.S + d.E + group * d.N;
        C = B + d.G * d.N;
        cs = all_cs + ((r * d.H + h) * d.chunks + c) * d.Q;
        dt = all_dt + ((r * d.H + h) * d.chunks + c) * d.Q;
        doc = docs ? docs + token : NULL;
        doc_before = doc && c > 0 ? doc[-1] : 0;
        doc_last = doc ? doc[rows - 1] : 0;
    }
    __device__ int doc_at(size_t l) const { return doc ? doc[l] : 0; }
    __device__ float from_start(size_t l) const {
        return l < rows && doc_at(l) == doc_before ? exp2f(min(cs[l], 0.0f)) : 0.0f;
    }
    __device__ float to_end(size_t s) const {
        return s < rows && doc_at(s) == doc_last ? exp2f(min(cs[rows - 1] - cs[s], 0.0f)) : 0.0f;
    }
    __device__ float through() const {
        return doc_last == doc_before ? exp2f(min(cs[rows - 1], 0.0f)) : 0.0f;
    }
    __device__ float L(size_t l, size_t s) const {
        bool sees = s <= l && l < rows && doc_at(l) == doc_at(s);
        return sees ? exp2f(min(cs[l] - cs[s], 0.0f)) : 0.0f;
    }
};

// cs, dts (R,H,chunks,Q): the sums of dt A within each chunk, and dt in the same order; 0 past T.
// A warp per chunk of a head.
__global__ void __launch_bounds__(256)
ssd_prepare_kernel(float *cs, float *dts, const float *dt, const float *A_log, Dims d) {
    size_t c = blockIdx.x, h = blockIdx.y * 8 + threadIdx.x / 32, r = blockIdx.z;
    if (h >= d.H) return;
    float a = -expf(A_log[h]) * 1.44269504f, before = 0.0f;
    size_t to = ((r * d.H + h) * d.chunks + c) * d.Q;
    for (size_t l = threadIdx.x % 32; l < round_up(d.Q, 32); l += 32) {
        size_t t = c * d.Q + l;
        float step = l < d.Q && t < d.T ? dt[(r * d.T + t) * d.H + h] : 0.0f;
        float sum = before + warp_scan(step * a);
        if (l < d.Q) {
            cs[to + l] = sum;
            dts[to + l] = step;
        }
        before = __shfl_sync(~0u, sum, 31);
    }
}

// CB (R,chunks,G,Q,Q) = C B^T, its tiles on and below the diagonal.
template<typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_CB_kernel(float *CB, const floatX *xBC, const float *cs, const float *dts, Dims d) {
    __shared__ Tiles<floatX> tiles;
    size_t side = pieces(d.Q, TILE), l0 = blockIdx.x / side % side * TILE,
        s0 = blockIdx.x % side * TILE;
    size_t c = blockIdx.x / (side * side), g = blockIdx.y;
    if (s0 > l0) return;
    Chunk<floatX> k(d, c, g * (d.H / d.G), blockIdx.z, xBC, cs, dts, NULL);
    float acc[8][4] = {};
    multiply<ALONG_K, ALONG_K>(acc, tiles, 0, d.N,
        [&](size_t l, size_t n) { return l0 + l < k.rows ? (float)k.C[(l0 + l) * d.S + n] : 0.0f; },
        [&](size_t n, size_t s) {
            return s0 + s < k.rows ? (float)k.B[(s0 + s) * d.S + n] : 0.0f;
        });
    CB += (k.number * d.G + g) * d.Q * d.Q;
    each(acc, [&](float v, size_t l, size_t s) {
        if (l0 + l < d.Q && s0 + s < d.Q) CB[(l0 + l) * d.Q + s0 + s] = v;
    });
}

// states (R,chunks,H,N,P): the state before each chunk. A block walks the chunks of a head with a
// tile of the state in its accumulators, and leaves the last one, in float, in final.
template<typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_states_kernel(floatX *states, float *final, const floatX *xBC, const float *cs,
                  const float *dts, const float *initial, const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    size_t across = pieces(d.P, TILE), n0 = blockIdx.x / across * TILE,
        p0 = blockIdx.x % across * TILE;
    size_t h = blockIdx.y, r = blockIdx.z;
    size_t head = (r * d.H + h) * d.N * d.P;               // in initial and final
    auto inside = [&](size_t n, size_t p) { return n0 + n < d.N && p0 + p < d.P; };
    auto at = [&](size_t n, size_t p) { return (n0 + n) * d.P + p0 + p; };
    float acc[8][4] = {};
    if (initial) {
        each(acc,
             [&](float &v, size_t n, size_t p) {
                 v = inside(n, p) ? initial[head + at(n, p)] : 0.0f;
             });
    }
    for (size_t c = 0; c < d.chunks; c++) {
        Chunk<floatX> k(d, c, h, r, xBC, cs, dts, doc);
        floatX *S = states + (k.number * d.H + h) * d.N * d.P;
        float through = k.through();
        each(acc, [&](float &v, size_t n, size_t p) {
            if (inside(n, p)) S[at(n, p)] = (floatX)v;
            v *= through;
        });
        multiply<ACROSS_K, ACROSS_K>(acc, tiles, 0, k.rows,
            [&](size_t n, size_t s) {
                return n0 + n < d.N ? (float)k.B[s * d.S + n0 + n] * k.dt[s] * k.to_end(s) : 0.0f;
            },
            [&](size_t s, size_t p) { return p0 + p < d.P ? (float)k.x[s * d.S + p0 + p] : 0.0f; });
    }
    if (final) {
        each(acc, [&](float v, size_t n, size_t p) {
            if (inside(n, p)) final[head + at(n, p)] = v;
        });
    }
}

// y = diag(exp(cs)) C S + (CB o L) diag(dt) x + D x, a tile of it.
template<typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_scan_kernel(floatX *y, const floatX *states, const floatX *xBC, const float *CB,
                const float *cs, const float *dts, const float *D, const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    size_t side = pieces(d.Q, TILE), across = pieces(d.P, TILE);
    size_t l0 = blockIdx.x / across % side * TILE, p0 = blockIdx.x % across * TILE;
    size_t c = blockIdx.x / (side * across), h = blockIdx.y;
    Chunk<floatX> k(d, c, h, blockIdx.z, xBC, cs, dts, doc);
    if (l0 >= k.rows) return;
    const floatX *S = states + (k.number * d.H + h) * d.N * d.P;
    CB += (k.number * d.G + k.group) * d.Q * d.Q;
    float acc[8][4] = {}, skip = D[h];
    multiply<ALONG_K, ACROSS_K>(acc, tiles, 0, d.N,
        [&](size_t l, size_t n) { return l0 + l < k.rows ? (float)k.C[(l0 + l) * d.S + n] : 0.0f; },
        [&](size_t n, size_t p) { return p0 + p < d.P ? (float)S[n * d.P + p0 + p] : 0.0f; });
    scale_rows(acc, k.from_start(l0 + acc_row(0)), k.from_start(l0 + acc_row(2)));
    multiply<ALONG_K, ACROSS_K>(acc, tiles, 0, min(l0 + TILE, k.rows),
        [&](size_t l, size_t s) {
            return l0 + l < k.rows ? CB[(l0 + l) * d.Q + s] * k.L(l0 + l, s) * k.dt[s] : 0.0f;
        },
        [&](size_t s, size_t p) { return p0 + p < d.P ? (float)k.x[s * d.S + p0 + p] : 0.0f; });
    each(acc, [&](float v, size_t l, size_t p) {
        if (l0 + l >= k.rows || p0 + p >= d.P) return;
        float x = (float)k.x[(l0 + l) * d.S + p0 + p];
        y[(k.token + l0 + l) * d.E + h * d.P + p0 + p] = (floatX)(v + skip * x);
    });
}

// g_states (R,chunks,H,N,P): the gradient of the state AFTER each chunk, walking backward; what
// arrives before the first chunk is g_initial. kappa (R,chunks,H,tiles of the state).
template<typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_g_states_kernel(floatX *g_states, float *kappa, float *g_initial, const floatX *states,
                    const floatX *g_y, const float *g_final, const floatX *xBC, const float *cs,
                    const float *dts, const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    __shared__ float part[4];
    size_t across = pieces(d.P, TILE), n0 = blockIdx.x / across * TILE,
        p0 = blockIdx.x % across * TILE;
    size_t h = blockIdx.y, r = blockIdx.z;
    size_t head = (r * d.H + h) * d.N * d.P;               // in g_initial and g_final
    auto inside = [&](size_t n, size_t p) { return n0 + n < d.N && p0 + p < d.P; };
    auto at = [&](size_t n, size_t p) { return (n0 + n) * d.P + p0 + p; };
    float acc[8][4] = {};
    if (g_final) {
        each(acc,
             [&](float &v, size_t n, size_t p) {
                 v = inside(n, p) ? g_final[head + at(n, p)] : 0.0f;
             });
    }
    for (size_t c = d.chunks; c-- > 0;) {
        Chunk<floatX> k(d, c, h, r, xBC, cs, dts, doc);
        size_t state = (k.number * d.H + h) * d.N * d.P;
        const floatX *gy = g_y + k.token * d.E + h * d.P;
        float through = k.through(), sum = 0.0f;
        each(acc, [&](float &v, size_t n, size_t p) {
            if (inside(n, p)) {
                sum += (float)states[state + at(n, p)] * v;
                g_states[state + at(n, p)] = (floatX)v;
            }
            v *= through;
        });
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
        multiply<ACROSS_K, ACROSS_K>(acc, tiles, 0, k.rows,
            [&](size_t n, size_t l) {
                return n0 + n < d.N ? (float)k.C[l * d.S + n0 + n] * k.from_start(l) : 0.0f;
            },
            [&](size_t l, size_t p) { return p0 + p < d.P ? (float)gy[l * d.E + p0 + p] : 0.0f; });
        if (threadIdx.x == 0) {                            // multiply began with a barrier
            kappa[(k.number * d.H + h) * gridDim.x + blockIdx.x] =
                through * (part[0] + part[1] + part[2] + part[3]);
        }
        __syncthreads();
    }
    if (g_initial) {
        each(acc, [&](float v, size_t n, size_t p) {
            if (inside(n, p)) g_initial[head + at(n, p)] = v;
        });
    }
}

// 64 rows s of a chunk of a head: R = diag(exp(cs_last - cs)) B gS + (CB o L)^T g_y, and from it
// g_x = dt R + D g_y and the direct part of g_dt, R . x. g_D_part (R,chunks,row tiles,H).
template<typename floatX>
__global__ void __launch_bounds__(128, 2)
ssd_g_x_kernel(floatX *g_xBC, float *g_dts, float *rho, float *g_D_part, const floatX *g_states,
               const floatX *g_y, const floatX *xBC, const float *CB, const float *cs,
               const float *dts, const float *D, const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    __shared__ float part[4];
    size_t side = pieces(d.Q, TILE), s0 = blockIdx.x % side * TILE;
    size_t h = blockIdx.y;
    Chunk<floatX> k(d, blockIdx.x / side, h, blockIdx.z, xBC, cs, dts, doc);
    const floatX *gS = g_states + (k.number * d.H + h) * d.N * d.P;
    const floatX *gy = g_y + k.token * d.E + h * d.P;
    floatX *gx = g_xBC + k.token * d.S + h * d.P;
    CB += (k.number * d.G + k.group) * d.Q * d.Q;
    float skip = D[h], Rx[2] = {}, Rx_state[2] = {}, yx = 0.0f;
    for (size_t i = threadIdx.x; i < TILE * d.P; i += 128) {
        size_t s = s0 + i / d.P, p = i % d.P;
        if (s < k.rows) yx += (float)k.x[s * d.S + p] * (float)gy[s * d.E + p];
    }
    for (size_t p0 = 0; p0 < d.P; p0 += TILE) {
        float acc[8][4] = {}, sum[2];
        auto inside = [&](size_t s, size_t p) { return s0 + s < k.rows && p0 + p < d.P; };
        auto x = [&](size_t s, size_t p) { return (float)k.x[(s0 + s) * d.S + p0 + p]; };
        auto y = [&](size_t l, size_t p) { return (float)gy[l * d.E + p0 + p]; };
        multiply<ALONG_K, ACROSS_K>(acc, tiles, 0, d.N,
            [&](size_t s, size_t n) {
                return s0 + s < k.rows ? (float)k.B[(s0 + s) * d.S + n] : 0.0f;
            },
            [&](size_t n, size_t p) { return p0 + p < d.P ? (float)gS[n * d.P + p0 + p] : 0.0f; });
        scale_rows(acc, k.to_end(s0 + acc_row(0)), k.to_end(s0 + acc_row(2)));
        auto times_x = [&](float v, size_t s, size_t p) {
            return inside(s, p) ? v * x(s, p) : 0.0f;
        };
        row_sums(sum, acc, times_x);
        Rx_state[0] += sum[0];
        Rx_state[1] += sum[1];
        multiply<ACROSS_K, ACROSS_K>(acc, tiles, s0, k.rows,
            [&](size_t s, size_t l) {
                return s0 + s < k.rows ? CB[l * d.Q + s0 + s] * k.L(l, s0 + s) : 0.0f;
            },
            [&](size_t l, size_t p) { return p0 + p < d.P ? y(l, p) : 0.0f; });
        row_sums(sum, acc, times_x);
        Rx[0] += sum[0];
        Rx[1] += sum[1];
        each(acc, [&](float v, size_t s, size_t p) {
            if (!inside(s, p)) return;
            gx[(s0 + s) * d.S + p0 + p] = (floatX)(k.dt[s0 + s] * v + skip * y(s0 + s, p));
        });
    }
    bool first = threadIdx.x % 4 == 0;                     // of the lanes that share a row
    UNROLL for (int i = 0; i < 2; i++) {
        size_t s = s0 + acc_row(2 * i);
        if (!first || s >= d.Q) continue;
        g_dts[k.dt - dts + s] = Rx[i];
        rho[k.dt - dts + s] = k.dt[s] * Rx_state[i];
    }
    yx = warp_sum(yx);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = yx;
    __syncthreads();
    if (threadIdx.x == 0) {
        g_D_part[(k.number * side + blockIdx.x % side) * d.H + h] =
            part[0] + part[1] + part[2] + part[3];
    }
}

// 64 rows l of a chunk and group: g_CB (R,chunks,G,Q,Q), summed over the heads of the group, and
// crossing (row tiles; R,H,chunks,Q): at t, the sum of each head's G over these l >= t and all s <
// t. rowsum is what the tiles of s before this one add up to, row by row.
template<typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_g_CB_kernel(float *g_CB, float *crossing, float *rowsum, const floatX *g_y, const floatX *xBC,
                const float *CB, const float *cs, const float *dts, const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    __shared__ float G[TILE][TILE + 1];
    size_t side = pieces(d.Q, TILE), l0 = blockIdx.x % side * TILE, me = threadIdx.x;
    size_t c = blockIdx.x / side, g = blockIdx.y, r = blockIdx.z, heads = d.H / d.G;
    size_t square = ((r * d.chunks + c) * d.G + g) * d.Q * d.Q;
    CB += square;
    g_CB += square;
    crossing += l0 / TILE * d.R * d.H * d.chunks * d.Q;
    for (size_t s0 = 0; s0 <= l0; s0 += TILE) {
        float total[8][4] = {};
        for (size_t h = g * heads; h < (g + 1) * heads; h++) {
            Chunk<floatX> k(d, c, h, r, xBC, cs, dts, doc);
            const floatX *gy = g_y + k.token * d.E + h * d.P;
            size_t step = k.dt - dts;
            float acc[8][4] = {};
            multiply<ALONG_K, ALONG_K>(
                acc, tiles, 0, d.P,
                [&](size_t l, size_t p) {
                    return l0 + l < k.rows ? (float)gy[(l0 + l) * d.E + p] : 0.0f;
                },
                [&](size_t p, size_t s) {
                    return s0 + s < k.rows ? (float)k.x[(s0 + s) * d.S + p] : 0.0f;
                });
            each(acc, [&](float &v, size_t l, size_t s) {
                float L = k.L(l0 + l, s0 + s);
                v *= L != 0.0f ? L * k.dt[s0 + s] : 0.0f;
                G[l][s] = L != 0.0f ? v * CB[(l0 + l) * d.Q + s0 + s] : 0.0f;
            });
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 4; e++) {
                    total[j][e] += acc[j][e];
                }
            }
            __syncthreads();
            if (me < TILE && l0 + me < d.Q) {              // each row: its sum up to s, without s
                float sum = s0 ? rowsum[step + l0 + me] : 0.0f;
                for (int s = 0; s < TILE; s++) {
                    float v = G[me][s];
                    G[me][s] = sum;
                    sum += v;
                }
                rowsum[step + l0 + me] = sum;
            }
            __syncthreads();
            if (me < TILE && s0 + me < d.Q) {              // each column t: over the rows from t on
                float sum = 0.0f;
                for (size_t l = s0 + me > l0 ? s0 + me - l0 : 0; l < TILE && l0 + l < k.rows; l++) {
                    sum += G[l][me];
                }
                crossing[step + s0 + me] = sum;
            }
            __syncthreads();
        }
        each(total, [&](float v, size_t l, size_t s) {
            if (l0 + l < d.Q && s0 + s < d.Q) g_CB[(l0 + l) * d.Q + s0 + s] = v;
        });
    }
}

// g_C (OF_C) or g_B, 64 rows of a chunk and group: the product with g_CB, and every head's part,
// made of g_y and S, or x and gS. pi is the growth that a head's part brings to C . g_C.
template<bool OF_C, typename floatX>
__global__ void __launch_bounds__(128, 3)
ssd_g_BC_kernel(floatX *g_xBC, float *pi, const float *g_CB, const floatX *states,
                const floatX *g_y, const floatX *xBC, const float *cs, const float *dts,
                const int *doc, Dims d) {
    __shared__ Tiles<floatX> tiles;
    size_t side = pieces(d.Q, TILE), l0 = blockIdx.x % side * TILE;
    size_t c = blockIdx.x / side, g = blockIdx.y, r = blockIdx.z, heads = d.H / d.G;
    g_CB += ((r * d.chunks + c) * d.G + g) * d.Q * d.Q;
    for (size_t n0 = 0; n0 < d.N; n0 += TILE) {
        Chunk<floatX> k(d, c, g * heads, r, xBC, cs, dts, doc);
        float total[8][4] = {};
        multiply<OF_C ? ALONG_K : ACROSS_K, ACROSS_K>(
            total, tiles, OF_C ? 0 : l0, OF_C ? min(l0 + TILE, k.rows) : k.rows,
            [&](size_t l, size_t s) {
                size_t row = OF_C ? l0 + l : s, column = OF_C ? s : l0 + l;
                return l0 + l < k.rows && column <= row ? g_CB[row * d.Q + column] : 0.0f;
            },
            [&](size_t s, size_t n) {
                return n0 + n < d.N ? (float)(OF_C ? k.B : k.C)[s * d.S + n0 + n] : 0.0f;
            });
        for (size_t h = g * heads; h < (g + 1) * heads; h++) {
            Chunk<floatX> k(d, c, h, r, xBC, cs, dts, doc);
            const floatX *S = states + (k.number * d.H + h) * d.N * d.P;
            const floatX *in = OF_C ? g_y + k.token * d.E + h * d.P : k.x;
            size_t pitch = OF_C ? d.E : d.S;
            float acc[8][4] = {}, sum[2];
            multiply<ALONG_K, ALONG_K>(
                acc, tiles, 0, d.P,
                [&](size_t l, size_t p) {
                    return l0 + l < k.rows ? (float)in[(l0 + l) * pitch + p] : 0.0f;
                },
                [&](size_t p, size_t n) {
                    return n0 + n < d.N ? (float)S[(n0 + n) * d.P + p] : 0.0f;
                });
            auto decay = [&](size_t l) {
                return OF_C ? k.from_start(l) : l < k.rows ? k.dt[l] * k.to_end(l) : 0.0f;
            };
            scale_rows(acc, decay(l0 + acc_row(0)), decay(l0 + acc_row(2)));
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 4; e++) {
                    total[j][e] += acc[j][e];
                }
            }
            if (!OF_C) continue;
            row_sums(sum, acc, [&](float v, size_t l, size_t n) {
                return l0 + l < k.rows && n0 + n < d.N ? v * (float)k.C[(l0 + l) * d.S + n0 + n]
                                                       : 0.0f;
            });
            UNROLL for (int i = 0; i < 2; i++) {
                size_t l = l0 + acc_row(2 * i);
                float *to = pi + (k.dt - dts) + l;
                if (threadIdx.x % 4 == 0 && l < d.Q) *to = (n0 ? *to : 0.0f) + sum[i];
            }
        }
        floatX *out = g_xBC + k.token * d.S + d.E + (OF_C ? d.G : 0) * d.N + g * d.N;
        each(total, [&](float v, size_t l, size_t n) {
            if (l0 + l < k.rows && n0 + n < d.N) out[(l0 + l) * d.S + n0 + n] = (floatX)v;
        });
    }
}

// The sums over the steps of a chunk, by one warp per head: da_t, the gradient of dt A at t; from
// it g_dt (n,H) and this chunk's part of g_A, g_A_part (R,chunks,H).
__global__ void __launch_bounds__(256)
ssd_finish_kernel(float *g_dt, float *g_A_part, const float *g_dts, const float *crossing,
                  const float *rho, const float *pi, const float *kappa, const float *dts,
                  const float *A_log, unsigned parts, Dims d) {
    size_t c = blockIdx.x, h = blockIdx.y * 8 + threadIdx.x / 32, r = blockIdx.z;
    if (h >= d.H) return;
    size_t lane = threadIdx.x % 32, number = r * d.chunks + c, token = r * d.T + c * d.Q;
    size_t at = ((r * d.H + h) * d.chunks + c) * d.Q, rows = min(d.Q, d.T - c * d.Q);
    float a = -expf(A_log[h]), from_state = 0.0f, before = 0.0f, after = 0.0f, sum = 0.0f;
    for (unsigned i = 0; i < parts; i++) {
        from_state += kappa[(number * d.H + h) * parts + i];
    }
    for (size_t l0 = round_up(rows, 32); l0 > 0; l0 -= 32) {       // from the end: the sums of pi
        size_t l = l0 - 1 - lane;
        float from_l = after + warp_scan(l < rows ? pi[at + l] : 0.0f);
        after = __shfl_sync(~0u, from_l, 31);
        if (l < rows) g_dt[(token + l) * d.H + h] = from_l;
    }
    __syncwarp();
    for (size_t l0 = 0; l0 < rows; l0 += 32) {                     // from the start: the sums of q
        size_t l = l0 + lane, to = (token + l) * d.H + h;
        float upto = before + warp_scan(l < rows ? rho[at + l] : 0.0f);
        float before_l = __shfl_up_sync(~0u, upto, 1);
        if (lane == 0) before_l = before;
        before = __shfl_sync(~0u, upto, 31);
        if (l >= rows) continue;
        float da = before_l + g_dt[to] + from_state;
        for (size_t tile = l / TILE; tile * TILE < d.Q; tile++) {
            da += crossing[tile * d.R * d.H * d.chunks * d.Q + at + l];
        }
        sum += dts[at + l] * da;
        g_dt[to] = g_dts[at + l] + a * da;
    }
    sum = warp_sum(sum);
    if (lane == 0) g_A_part[number * d.H + h] = sum;
}

// g_A_log += A * sum of g_A_part; g_D += sum of g_D_part. A block per head.
__global__ void __launch_bounds__(128)
ssd_head_sums_kernel(float *g_A_log, float *g_D, const float *g_A_part, const float *g_D_part,
                     const float *A_log, size_t chunks, size_t row_tiles, size_t H) {
    __shared__ float part[4];
    size_t h = blockIdx.x, count = blockIdx.y ? chunks * row_tiles : chunks;
    const float *from = blockIdx.y ? g_D_part : g_A_part;
    float sum = 0.0f;
    for (size_t i = threadIdx.x; i < count; i += 128) {
        sum += from[i * H + h];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    sum = part[0] + part[1] + part[2] + part[3];
    if (blockIdx.y) g_D[h] += sum;
    else g_A_log[h] -= expf(A_log[h]) * sum;
}

#include "dev/cuda/ssd_fast.cuh"          // the same steps, for the shapes of most models

// ---- launchers ----------------------------------------------------------------------------------

template<class... P, class... A>
static void ssd_launch(void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared,
                       A... arguments) {
    allow_shared(kernel, shared);
    launch_early(kernel, grid, threads, shared, arguments...);
    LAUNCHED();
}

// What the kernels of one call leave for each other. steps: (R,H,chunks,Q) each.
struct SsdWork {
    float *cs, *dts, *g_dts, *rowsum, *rho, *pi, *crossing;        // crossing: side of them
    float *back_cs, *back_dts;                     // in the place of crossing
    float *CB, *g_CB;                              // (R,chunks,G,Q,Q)
    float *kappa, *g_A_part, *g_D_part;       // (R,chunks,H,parts), (R,chunks,H), (R,chunks,side,H)
    float *local, *local_decay;                    // (items,2,N,P) padded, (items,2)
    unsigned side, across, parts;                  // tiles of a chunk's rows; of P; of a state
    size_t floats;                                 // of all

    explicit SsdWork(const Dims *d, bool allocate = true) {
        side = pieces(d->Q, TILE);
        across = pieces(d->P, TILE);
        parts = pieces(d->N, TILE) * across;
        size_t steps = d->R * d->H * d->chunks * d->Q, heads = d->R * d->chunks * d->H;
        size_t pairs = d->R * d->chunks * d->G * d->Q * d->Q;
        size_t ends = 2 * walk_items(d, walk_length(d));
        floats = (6 + side) * steps + 2 * pairs + heads * (parts + 1 + side) +
                 ends * (128 * FP + 1);
        if (!allocate) return;
        float *at = workspace(floats);
        auto take = [&](size_t count) {
            at += count;
            return at - count;
        };
        CB = take(pairs);                          // first: aligned
        g_CB = take(pairs);
        cs = take(steps);
        dts = take(steps);
        crossing = take(side * steps);
        back_cs = crossing;
        back_dts = crossing + steps;
        g_dts = take(steps);
        rowsum = take(steps);
        pi = take(steps);
        rho = take(steps);
        local = take(ends * 128 * FP);
        local_decay = take(ends);
        kappa = take(heads * parts);
        g_A_part = take(heads);
        g_D_part = take(heads * side);
    }
};

static size_t ssd_work_floats(const Dims *d) { return SsdWork(d, false).floats; }

// Do the fast kernels take this shape, in bf16, on this GPU?
static bool ssd_is_fast(const Dims *d) {
    bool shape = d->Q == FQ && d->P <= FP && d->N <= 128 && d->P % 8 == 0 && d->N % 8 == 0;
    return shape && shared_room() >= sizeof(WalkShared<128>);
}

// y and states from x; or BACK, g_x and g_states from g_y
template<int N, bool BACK, bool DOCS>
static void ssd_walk(const Dims *d, const SsdWork &w, bf16 *out, size_t out_pitch, bf16 *states,
                     float *final, const bf16 *in, size_t in_pitch, const bf16 *xBC,
                     const float *dt, const float *A_log, const float *D, const float *initial,
                     const int *doc) {
    unsigned chunks = d->chunks, R = d->R, kinds = pieces(d->H, 8) + (unsigned)d->G;
    int length = walk_length(d), items = walk_items(d, length);
    int last = walk_items(d, d->R * d->chunks);    // those of the last part of the line
    float *cs = BACK ? w.back_cs : w.cs, *dts = BACK ? w.back_dts : w.dts;
    allow_shared(ssd_prepare_fast_kernel<N, BACK>, CB_SHARED<N>);
    ssd_prepare_fast_kernel<N, BACK><<<dim3(chunks, kinds, R), 256, CB_SHARED<N>, stream>>>(
        w.cs, w.dts, cs, dts, (uint4 *)w.CB, dt, A_log, xBC, *d);
    LAUNCHED();
    if (length % (int)chunks != 0 && items > last) {
        ssd_launch(ssd_local_kernel<N, BACK, DOCS>, dim3(items - last), 512, sizeof(LocalShared<N>),
                   w.local, w.local_decay, in, in_pitch, xBC, cs, dts, A_log, doc, *d, length);
    }
    ssd_launch(ssd_walk_kernel<N, BACK, DOCS>, dim3(min(items, WALKERS)), 256,
               sizeof(WalkShared<N>), out, out_pitch, states, final, w.local, w.local_decay, in,
               in_pitch, xBC, (uint4 *)w.CB, cs, dts, A_log, D, initial, doc, *d, length);
}

template<typename floatX>
static void ssd_forward_any(const Dims *d, const SsdWork &w, floatX *y, floatX *states,
                            float *final, const floatX *xBC, const float *D, const float *initial,
                            const int *doc) {
    unsigned R = d->R, H = d->H, G = d->G, chunks = d->chunks, side = w.side;
    ssd_CB_kernel<floatX><<<dim3(chunks * side * side, G, R), 128, 0, stream>>>(
        w.CB, xBC, w.cs, w.dts, *d);
    LAUNCHED();
    ssd_states_kernel<floatX><<<dim3(w.parts, H, R), 128, 0, stream>>>(
        states, final, xBC, w.cs, w.dts, initial, doc, *d);
    LAUNCHED();
    ssd_scan_kernel<floatX><<<dim3(chunks * side * w.across, H, R), 128, 0, stream>>>(
        y, states, xBC, w.CB, w.cs, w.dts, D, doc, *d);
    LAUNCHED();
}

static void ssd_prepare(const Dims *d, const SsdWork &w, const float *dt, const float *A_log) {
    dim3 grid((unsigned)d->chunks, pieces(d->H, 8), (unsigned)d->R);
    ssd_prepare_kernel<<<grid, 256, 0, stream>>>(w.cs, w.dts, dt, A_log, *d);
    LAUNCHED();
}

// y (n,E); states (R*chunks,H,N,P) work: state before each chunk; final, initial (R,H,N,P) or NULL
template<typename floatX>
static void ssd_forward(const Dims *d, floatX *y, floatX *states, float *final, const floatX *xBC,
                        const float *dt, const float *A_log, const float *D, const float *initial,
                        const int *doc) {
    if constexpr (sizeof(floatX) == sizeof(bf16)) {
        if (ssd_is_fast(d)) {
            auto narrow = doc ? ssd_walk<64, false, true> : ssd_walk<64, false, false>;
            auto wide = doc ? ssd_walk<128, false, true> : ssd_walk<128, false, false>;
            return (d->N <= 64 ? narrow : wide)(d, SsdWork(d), y, d->E, states, final, xBC, d->S,
                                                xBC, dt, A_log, D, initial, doc);
        }
    }
    SsdWork w(d);
    ssd_prepare(d, w, dt, A_log);
    ssd_forward_any(d, w, y, states, final, xBC, D, initial, doc);
}

// In the place of the last two kernels of ssd_backward
template<int N>
static void ssd_backward_fast(const Dims *d, const SsdWork &w, bf16 *g_xBC, float *g_dt,
                              float *g_initial, const bf16 *g_y, const float *g_final,
                              const bf16 *states, bf16 *g_states, const bf16 *xBC, const float *dt,
                              const float *A_log, const float *D, const float *initial,
                              const int *doc) {
    unsigned chunks = d->chunks, R = d->R;
    dim3 grid(chunks, (unsigned)d->G, R);
    bf16 *g_CB = (bf16 *)w.g_CB;
    (doc ? ssd_walk<N, true, true> : ssd_walk<N, true, false>)(
        d, w, g_xBC, d->S, g_states, g_initial, g_y, d->E, xBC, dt, A_log, D, g_final, doc);
    ssd_launch(doc ? ssd_g_CB_fast_kernel<N, true> : ssd_g_CB_fast_kernel<N, false>, grid,
               G_CB_THREADS, sizeof(GcbShared<N>), g_CB, w.g_dts, w.rowsum, w.g_D_part, g_y, xBC,
               w.cs, w.dts, doc, *d);
    ssd_launch(ssd_g_BC_fast_kernel<N>, grid, G_BC_THREADS, sizeof(GbcShared<N>), g_xBC, w.pi,
               w.rho, w.kappa, g_CB, states, g_states, g_y, xBC, w.cs, w.dts, doc, *d,
               initial != NULL, g_final != NULL);
    ssd_launch(ssd_finish_fast_kernel, dim3(chunks, pieces(d->H, 8), R), 256, 0, g_dt, w.g_A_part,
               w.g_dts, w.rowsum, w.pi, w.rho, w.kappa, w.dts, A_log, *d);
}

template<typename floatX>
static void ssd_backward_any(const Dims *d, const SsdWork &w, floatX *g_xBC, float *g_initial,
                             const floatX *g_y, const float *g_final, const floatX *states,
                             floatX *g_states, const floatX *xBC, const float *D, const int *doc) {
    unsigned R = d->R, H = d->H, G = d->G, chunks = d->chunks, side = w.side;
    dim3 grid(chunks * side, G, R);
    ssd_CB_kernel<floatX><<<dim3(chunks * side * side, G, R), 128, 0, stream>>>(
        w.CB, xBC, w.cs, w.dts, *d);
    LAUNCHED();
    ssd_g_states_kernel<floatX><<<dim3(w.parts, H, R), 128, 0, stream>>>(
        g_states, w.kappa, g_initial, states, g_y, g_final, xBC, w.cs, w.dts, doc, *d);
    LAUNCHED();
    ssd_g_x_kernel<floatX><<<dim3(chunks * side, H, R), 128, 0, stream>>>(
        g_xBC, w.g_dts, w.rho, w.g_D_part, g_states, g_y, xBC, w.CB, w.cs, w.dts, D, doc, *d);
    LAUNCHED();
    ssd_g_CB_kernel<floatX><<<grid, 128, 0, stream>>>(
        w.g_CB, w.crossing, w.rowsum, g_y, xBC, w.CB, w.cs, w.dts, doc, *d);
    LAUNCHED();
    ssd_g_BC_kernel<true, floatX><<<grid, 128, 0, stream>>>(
        g_xBC, w.pi, w.g_CB, states, g_y, xBC, w.cs, w.dts, doc, *d);
    LAUNCHED();
    ssd_g_BC_kernel<false, floatX><<<grid, 128, 0, stream>>>(
        g_xBC, w.pi, w.g_CB, g_states, g_y, xBC, w.cs, w.dts, doc, *d);
    LAUNCHED();
}

// g_xBC, g_dt =; g_A_log, g_D +=; g_initial = or NULL; g_final may be NULL; g_states is work
template<typename floatX>
static void ssd_backward(const Dims *d, floatX *g_xBC, float *g_dt, float *g_A_log, float *g_D,
                         float *g_initial, const floatX *g_y, const float *g_final,
                         const floatX *states, floatX *g_states, const floatX *xBC, const float *dt,
                         const float *A_log, const float *D, const float *initial, const int *doc) {
    bool fast = sizeof(floatX) == sizeof(bf16) && ssd_is_fast(d);
    SsdWork w(d);
    if constexpr (sizeof(floatX) == sizeof(bf16)) {
        auto backward = d->N <= 64 ? ssd_backward_fast<64> : ssd_backward_fast<128>;
        if (fast) {
            backward(d, w, g_xBC, g_dt, g_initial, g_y, g_final, states, g_states, xBC, dt, A_log,
                     D, initial, doc);
        }
    }
    if (!fast) {
        ssd_prepare(d, w, dt, A_log);
        ssd_backward_any(d, w, g_xBC, g_initial, g_y, g_final, states, g_states, xBC, D, doc);
        dim3 grid((unsigned)d->chunks, pieces(d->H, 8), (unsigned)d->R);
        ssd_finish_kernel<<<grid, 256, 0, stream>>>(
            g_dt, w.g_A_part, w.g_dts, w.crossing, w.rho, w.pi, w.kappa, w.dts, A_log, w.parts,
            *d);
        LAUNCHED();
    }
    ssd_head_sums_kernel<<<dim3((unsigned)d->H, 2), 128, 0, stream>>>(
        g_A_log, g_D, w.g_A_part, w.g_D_part, A_log, d->R * d->chunks, fast ? 1 : w.side, d->H);
    LAUNCHED();
}

// == gated rmsnorm ================================================================================
// o = v^ w, v = y silu(z), v^ = v rstd over each group of E/G columns; z: first columns of zxBCdt
// backward: g_v = rstd (w g_o - v^ mean(v^ w g_o));  g_y = g_v silu(z);  g_z = g_v y silu'(z);
//           g_w += sum over rows of v^ g_o

template<int K, bool WIDE, typename floatX>
__global__ void __launch_bounds__(320)
gated_rmsnorm_forward_kernel(floatX *o, float *rstd, const floatX *y, const floatX *zxBCdt,
                             const float *w, Dims d) {
    __shared__ float part[32];
    size_t row = blockIdx.x, columns = d.E / d.G, first = blockIdx.y * columns;
    Vec v[K];
    float sum = 0.0f;
    next_may_start();
    wait_for_last();
    UNROLL for (int k = 0; k < K; k++) {
        size_t c = (threadIdx.x + k * blockDim.x) * 8;
        v[k] = load<WIDE>(y + row * d.E + first, c, columns);
        Vec z = load<WIDE>(zxBCdt + row * d.pitch + first, c, columns);
        UNROLL for (int i = 0; i < 8; i++) {
            v[k].v[i] *= z.v[i] * sigmoid<floatX>(z.v[i]);
            sum += v[k].v[i] * v[k].v[i];
        }
    }
    float scale = 1.0f / sqrtf(block_sum(sum, part) / columns + d.eps);
    if (threadIdx.x == 0) rstd[row * d.G + blockIdx.y] = scale;
    UNROLL for (int k = 0; k < K; k++) {
        size_t c = (threadIdx.x + k * blockDim.x) * 8;
        Vec weight = load<WIDE>(w + first, c, columns);
        UNROLL for (int i = 0; i < 8; i++) {
            v[k].v[i] *= scale * weight.v[i];
        }
        store<WIDE>(o + row * d.E + first, c, columns, v[k]);
    }
}
// o (n,E), rstd (n,G)
template<typename floatX>
static void gated_rmsnorm_forward(const Dims *d, floatX *o, float *rstd, const floatX *y,
                                  const floatX *zxBCdt, const float *w) {
    by_columns(d->E / d->G, d->E / d->G % 8 == 0, [&](auto K, auto WIDE, unsigned threads) {
        dim3 grid((unsigned)d->n, (unsigned)d->G);
        auto kernel = gated_rmsnorm_forward_kernel<K(), WIDE(), floatX>;
        launch_early(kernel, grid, threads, 0, o, rstd, y, zxBCdt, w, *d);
    });
}

template<int K, bool WIDE, typename floatX>
__global__ void __launch_bounds__((THREADS<K, WIDE, floatX>), (BLOCKS<K, WIDE, floatX>))
gated_rmsnorm_backward_kernel(floatX *g_y, floatX *g_zxBCdt, float *g_w_parts,
                              const floatX *g_o, const floatX *y, const floatX *zxBCdt,
                              const float *rstd, const float *w, Dims d, size_t span) {
    __shared__ float part[2][32];
    size_t columns = d.E / d.G, group = blockIdx.y * columns;
    size_t first = blockIdx.x * span, last = min(d.n, first + span);
    Vec g_w[K] = {};
    Packed<floatX, 8> next_g[K], next_y[K], next_z[K];     // of the next row, on their way
    float next_scale;
    auto column = [&](int k) { return (int)((threadIdx.x + k * blockDim.x) * 8); };
    auto fetch_row = [&](size_t row) {
        size_t there = row < last ? columns : 0;
        next_scale = row < last ? rstd[row * d.G + blockIdx.y] : 0.0f;
        UNROLL for (int k = 0; k < K; k++) {
            next_g[k] = fetch<WIDE>(g_o + row * d.E + group, column(k), there);
            next_y[k] = fetch<WIDE>(y + row * d.E + group, column(k), there);
            next_z[k] = fetch<WIDE>(zxBCdt + row * d.pitch + group, column(k), there);
        }
    };
    if (NEXT_ROW<K, floatX>) fetch_row(first);
    for (size_t row = first; row < last; row++) {
        if (!NEXT_ROW<K, floatX>) fetch_row(row);
        Packed<floatX, 8> in[K];
        Vec g[K], silu[K], slope[K];                       // of silu, at z
        float dot = 0.0f, scale = next_scale;
        UNROLL for (int k = 0; k < K; k++) {
            in[k] = next_y[k];
            g[k] = next_g[k].unpacked();
            Vec x = in[k].unpacked(), z = next_z[k].unpacked(),
                weight = load<WIDE>(w + group, column(k), columns);
            UNROLL for (int i = 0; i < 8; i++) {
                float s = sigmoid<floatX>(z.v[i]);
                silu[k].v[i] = z.v[i] * s;
                slope[k].v[i] = s + silu[k].v[i] * (1.0f - s);
                float v = x.v[i] * silu[k].v[i] * scale;   // v^
                g_w[k].v[i] += v * g[k].v[i];
                g[k].v[i] *= weight.v[i];
                dot += v * g[k].v[i];
            }
        }
        if (NEXT_ROW<K, floatX>) fetch_row(row + 1);
        dot = block_sum(dot, part[row % 2]) / columns * scale;
        UNROLL for (int k = 0; k < K; k++) {
            Vec x = in[k].unpacked(), g_y_row, g_z_row;
            UNROLL for (int i = 0; i < 8; i++) {
                float g_v = scale * (g[k].v[i] - x.v[i] * silu[k].v[i] * dot);
                g_y_row.v[i] = g_v * silu[k].v[i];
                g_z_row.v[i] = g_v * x.v[i] * slope[k].v[i];
            }
            store<WIDE>(g_y + row * d.E + group, column(k), columns, g_y_row);
            store<WIDE>(g_zxBCdt + row * d.pitch + group, column(k), columns, g_z_row);
        }
    }
    UNROLL for (int k = 0; k < K; k++) {
        store<WIDE>(g_w_parts + blockIdx.x * d.E + group, column(k), columns, g_w[k]);
    }
}
// writes g_y and its columns of g_zxBCdt; g_w +=
template<typename floatX>
static void gated_rmsnorm_backward(const Dims *d, floatX *g_y, floatX *g_zxBCdt, float *g_w,
                                   const floatX *g_o, const floatX *y, const floatX *zxBCdt,
                                   const float *rstd, const float *w) {
    float *g_w_parts = workspace(PARTS * d->E);
    by_columns(d->E / d->G, d->E / d->G % 8 == 0, [&](auto K, auto WIDE, unsigned threads) {
        size_t span = rows_of_block(d->n, K(), threads), parts = pieces(d->n, span);
        dim3 grid((unsigned)parts, (unsigned)d->G);
        gated_rmsnorm_backward_kernel<K(), WIDE(), floatX><<<grid, threads, 0, stream>>>(
            g_y, g_zxBCdt, g_w_parts, g_o, y, zxBCdt, rstd, w, *d, span);
        LAUNCHED();
        add_parts(g_w, g_w_parts, parts, d->E, d->E);
    });
}

// == swiglu =======================================================================================
// h = a silu(b), ab (n,2F): a | b;  g_a = g_h silu(b);  g_b = g_h a silu'(b)

template<bool WIDE, typename floatX>
__global__ void __launch_bounds__(256) swiglu_forward_kernel(floatX *h, const floatX *ab, Dims d) {
    size_t row = blockIdx.x, c = (blockIdx.y * (size_t)256 + threadIdx.x) * 8;
    Vec a = load<WIDE>(ab + row * 2 * d.F, c, d.F),
        b = load<WIDE>(ab + row * 2 * d.F + d.F, c, d.F);
    UNROLL for (int i = 0; i < 8; i++) {
        a.v[i] *= b.v[i] * sigmoid<floatX>(b.v[i]);
    }
    store<WIDE>(h + row * d.F, c, d.F, a);
}
template<typename floatX>
static void swiglu_forward(const Dims *d, floatX *h, const floatX *ab) {
    dim3 grid((unsigned)d->n, pieces(d->F, 2048));
    if (d->F % 8 == 0) swiglu_forward_kernel<true, floatX><<<grid, 256, 0, stream>>>(h, ab, *d);
    else swiglu_forward_kernel<false, floatX><<<grid, 256, 0, stream>>>(h, ab, *d);
    LAUNCHED();
}

template<bool WIDE, typename floatX>
__global__ void __launch_bounds__(256)
swiglu_backward_kernel(floatX *g_ab, const floatX *g_h, const floatX *ab, Dims d) {
    size_t row = blockIdx.x, c = (blockIdx.y * (size_t)256 + threadIdx.x) * 8;
    Vec a = load<WIDE>(ab + row * 2 * d.F, c, d.F),
        b = load<WIDE>(ab + row * 2 * d.F + d.F, c, d.F);
    Vec g = load<WIDE>(g_h + row * d.F, c, d.F);
    UNROLL for (int i = 0; i < 8; i++) {
        float s = sigmoid<floatX>(b.v[i]), g_b = g.v[i] * a.v[i] * s * (1.0f + b.v[i] * (1.0f - s));
        a.v[i] = g.v[i] * b.v[i] * s;
        b.v[i] = g_b;
    }
    store<WIDE>(g_ab + row * 2 * d.F, c, d.F, a);
    store<WIDE>(g_ab + row * 2 * d.F + d.F, c, d.F, b);
}
template<typename floatX>
static void swiglu_backward(const Dims *d, floatX *g_ab, const floatX *g_h, const floatX *ab) {
    dim3 grid((unsigned)d->n, pieces(d->F, 2048));
    if (d->F % 8 == 0)
        swiglu_backward_kernel<true, floatX><<<grid, 256, 0, stream>>>(g_ab, g_h, ab, *d);
    else swiglu_backward_kernel<false, floatX><<<grid, 256, 0, stream>>>(g_ab, g_h, ab, *d);
    LAUNCHED();
}

// == classifier ===================================================================================
// logits = hidden weight^T;  loss = log(sum of exp(logits)) - logits[target];
// g_logits = (softmax - onehot(target)) scale, over the logits;  g_hidden, g_weight as in linear
// The logits of all rows would be the largest tensor of all: they live a slab of rows at a time.

// A row to a block. It reads the row three times: for the greatest logit, for the sum of
// exp(logit - greatest), for the gradients; from `shared`, where the row fits.
template<bool WIDE, typename Logit>
__global__ void __launch_bounds__(512)
cross_entropy_kernel(float *losses, Logit *logits, const int *targets, float scale, int backward,
                     int fits, size_t V) {
    __shared__ float part[2][32];
    extern __shared__ __align__(128) unsigned char shared[];
    size_t row = blockIdx.x, target = targets[row];
    logits += row * V;
    float own = (float)logits[target], greatest = -INFINITY, sum = 0.0f;
    const Logit *x = fits ? (const Logit *)shared : logits;
    for (size_t b = threadIdx.x * 16; fits && b < V * sizeof(Logit); b += 512 * 16) {
        cp_async<16>(shared + b, (const char *)logits + b, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    auto each_logit = [&](auto f) {                        // f(vector of 8, first column)
        for (size_t c = threadIdx.x * 8; c < V; c += 512 * 8) {
            f(load<WIDE>(x, c, V), c);
        }
    };
    each_logit([&](const Vec &v, size_t c) {
        UNROLL for (int i = 0; i < 8; i++) {
            if (WIDE || c + i < V) greatest = max(greatest, v.v[i]);
        }
    });
    greatest = block_max(greatest, part[0]);
    each_logit([&](const Vec &v, size_t c) {
        UNROLL for (int i = 0; i < 8; i++) {
            if (WIDE || c + i < V) sum += exp_of<Logit>(v.v[i] - greatest);
        }
    });
    sum = block_sum(sum, part[1]);
    if (threadIdx.x == 0) losses[row] = logf(sum) + greatest - own;
    if (!backward) return;
    float part_of = scale / sum;
    each_logit([&](Vec v, size_t c) {
        UNROLL for (int i = 0; i < 8; i++) {
            float p = exp_of<Logit>(v.v[i] - greatest) * part_of;
            v.v[i] = p - (c + i == target ? scale : 0.0f);
        }
        store<WIDE>(logits, c, V, v);
    });
}

// A row fits if another block has room for one as well.
template<typename Logit>
static void cross_entropy(float *losses, Logit *logits, const int *targets, float scale,
                          int backward, size_t rows, size_t V) {
    bool wide = V % 8 == 0;
    size_t bytes = V * sizeof(Logit);
    int fits = wide && 2 * bytes <= shared_room() - 4096;
    auto kernel = wide ? cross_entropy_kernel<true, Logit> : cross_entropy_kernel<false, Logit>;
    if (fits) allow_shared(kernel, bytes);
    kernel<<<(unsigned)rows, 512, fits ? bytes : 0, stream>>>(
        losses, logits, targets, scale, backward, fits, V);
    LAUNCHED();
}

// losses (n); g_hidden (n,M) =, g_weight (V,M) (+)= by add; logits (slab,V) is work. With g_hidden
// NULL only the losses, from logits in float, of which half as many rows have room. all_logits
// (n,V), on the host, for --dump, or NULL.
template<typename floatX>
static void classifier(const Dims *d, float *losses, floatX *g_hidden, float *g_weight,
                       floatX *logits, float *all_logits, const floatX *hidden,
                       const floatX *weight, const int *targets, float scale, int add) {
    size_t slab = g_hidden ? d->slab : d->slab * sizeof(floatX) / sizeof(float);
    for (size_t i = 0; i < d->n; i += slab) {
        size_t rows = d->n - i < slab ? d->n - i : slab;
        const floatX *in = hidden + i * d->M;
        if (!g_hidden) {
            float *x = (float *)logits;
            linear_forward(x, in, weight, rows, d->M, d->V, 0);
            cross_entropy(losses + i, x, targets + i, scale, 0, rows, d->V);
            continue;
        }
        linear_forward(logits, in, weight, rows, d->M, d->V, 0);
        if (all_logits) download(all_logits + i * d->V, logits, rows, d->V, d->V);
        cross_entropy(losses + i, logits, targets + i, scale, 1, rows, d->V);
        linear_backward(g_hidden + i * d->M, g_weight, logits, in, weight, rows, d->M, d->V,
                        add || i);
    }
}

// == update =======================================================================================

// The sum of squares of all gradients, first stage; NORM_PARTS is a constant, and so are the bits.
constexpr unsigned NORM_PARTS = 1024;
__global__ void __launch_bounds__(256)
sum_squares_kernel(float *parts, const float *grads, size_t count) {
    __shared__ float part[32];
    float sum = 0.0f;
    for (size_t i = (blockIdx.x * (size_t)256 + threadIdx.x) * 8; i < count;
         i += NORM_PARTS * 256 * 8) {
        Vec g = i + 8 <= count ? load<true>(grads, i, count) : load<false>(grads, i, count);
        UNROLL for (int k = 0; k < 8; k++) {
            sum += g.v[k] * g.v[k];
        }
    }
    sum = block_sum(sum, part);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// AdamW as in the C file:  m = beta1 m + rest1 g,  v = beta2 v + rest2 g^2,
//                          w = keep w - step m / (sqrt(v) root + eps)
// All parameters are one block, and so are their gradients and moments: one launch. Those that
// decay lie in a few ranges of it, which begin and end at multiples of 8.
constexpr int DECAY_RANGES = 8;
struct AdamW {
    float beta1, rest1, beta2, rest2, eps, keep, step, root, grad_scale;
    int ranges;
    size_t from[DECAY_RANGES], to[DECAY_RANGES];
};
// copy: the parameters in floatX for matrix products; count is a multiple of 16
template<typename floatX>
__global__ void __launch_bounds__(256)
adamw_kernel(float *w, floatX *copy, float *m, float *v, const float *g, AdamW s, size_t count) {
    size_t at = (blockIdx.x * (size_t)256 + threadIdx.x) * 8;
    if (at >= count) return;
    float keep = 1.0f;
    for (int i = 0; i < s.ranges; i++) {
        if (at >= s.from[i] && at < s.to[i]) keep = s.keep;
    }
    Vec weight = load<true>(w, at, count), grad = load<true>(g, at, count);
    Vec mean = load<true>(m, at, count), square = load<true>(v, at, count);
    UNROLL for (int i = 0; i < 8; i++) {
        float gi = grad.v[i] * s.grad_scale;
        mean.v[i] = s.beta1 * mean.v[i] + s.rest1 * gi;
        square.v[i] = s.beta2 * square.v[i] + s.rest2 * gi * gi;
        float root = sqrtf(square.v[i]) * s.root + s.eps;
        weight.v[i] = keep * weight.v[i] - s.step * mean.v[i] / root;
    }
    store<true>(w, at, count, weight);
    store<true>(m, at, count, mean);
    store<true>(v, at, count, square);
    if (sizeof(floatX) != sizeof(float)) store<true>(copy, at, count, weight);
}

// == from one stretch of a row to the next ========================================================
// --carry and generation: the convolution's last inputs go on in `past`, the states in `carried`.

template<typename floatX>
__global__ void __launch_bounds__(256)
conv1d_past_kernel(floatX *past_new, const floatX *zxBCdt, const floatX *past, const int *doc,
                   Dims d) {
    size_t c = blockIdx.x * (size_t)256 + threadIdx.x, r = blockIdx.y;
    if (c >= d.S) return;
    for (size_t k = 0; k + 1 < d.W; k++) {                 // in order: past_new may be past
        size_t t = d.T + k;                                // of the W-1 inputs in past, then T
        const int *docs = doc ? doc + r * d.T : NULL;
        floatX value = (floatX)0.0f;
        if (t >= d.W - 1) {
            size_t step = t - (d.W - 1);
            bool same = !docs || docs[step] == docs[d.T - 1];
            if (same) value = zxBCdt[(r * d.T + step) * d.pitch + d.E + c];
        } else if (past && (!docs || docs[d.T - 1] == 0)) {
            value = past[(r * (d.W - 1) + t) * d.S + c];
        }
        past_new[(r * (d.W - 1) + k) * d.S + c] = value;
    }
}
// The W-1 inputs that the next stretch of the same row needs as its past.
template<typename floatX>
static void conv1d_past(const Dims *d, floatX *past_new, const floatX *zxBCdt, const floatX *past,
                        const int *doc) {
    conv1d_past_kernel<floatX><<<dim3(pieces(d->S, 256), (unsigned)d->R), 256, 0, stream>>>(
        past_new, zxBCdt, past, doc, *d);
    LAUNCHED();
}

// == the model on the GPU =========================================================================
// The tables of parameters and activations are those of the C file, and so is the order of a block:
// weights, gradients and moments in float; the weights once more in floatX, for matrix products.
// cpu::Model is the host's side: the batch, and the copies that checkpoints are made of.

template<typename X> struct ParamsOf {
#define X(name, ...) X *name;
    PARAMS(X)
#undef X
};

// Activations are in floatX, but for the residual stream, in residX, and these, in float:
constexpr const char *IN_FLOAT[] = {
    "rstd", "dt", "rstd_g", "rstd2", "rstd_f", "losses", "g_dt", "carried", "carried_new",
};
constexpr const char *IN_RESID[] = {"resid", "g_resid"};

constexpr bool same_name(const char *a, const char *b) {
    return *a == *b && (!*a || same_name(a + 1, b + 1));
}
template<size_t COUNT>
constexpr bool is_in(const char *const (&names)[COUNT], const char *name) {
    for (const char *other : names) {
        if (same_name(name, other)) return true;
    }
    return false;
}
template<typename floatX, typename residX> struct Acts {
#define X(name, ...)                                                        \
    std::conditional_t<is_in(IN_FLOAT, #name), float,                       \
                       std::conditional_t<is_in(IN_RESID, #name), residX, floatX>> *name;
    ACTS(X)
#undef X
    static size_t size(const char *name) {                 // of an element
        if (is_in(IN_FLOAT, name)) return sizeof(float);
        return is_in(IN_RESID, name) ? sizeof(residX) : sizeof(floatX);
    }
};

template<typename FloatX, typename residX>
struct Model {
    typedef FloatX floatX;
    cpu::Model *host;
    Dims d = Dims(cpu::Dims());
    cpu::Spec specs[cpu::PARAM_COUNT], act_specs[cpu::ACT_COUNT];
    ParamsOf<float> w, g, m, v;            // weights, gradients, moments
    float *weights, *grads, *mean, *square;            // the same as blocks
    ParamsOf<floatX> x;                    // the weights in floatX: w itself when that is float
    floatX *copies;
    Acts<floatX, residX> a, acts;          // acts: as allocated; those of --carry trade places in a
    floatX *g_branch;                      // g_resid (n,M) in floatX: itself when residX is that
    int *ids, *targets, *docs, *plan;      // of the micro-batch; plan: embed_plan
    const int *doc;                        // docs, or NULL
    int *host_plan;

    size_t bytes(const cpu::Spec &act) const { return act.count * acts.size(act.name); }
};

// Pointers to all tensors of a block, of which each begins at a multiple of 16 elements.
template<typename X>
static ParamsOf<X> params_at(X *block, const cpu::Spec *specs) {
    ParamsOf<X> params;
    for (size_t k = 0; k < cpu::PARAM_COUNT; k++) {
        ((X **)&params)[k] = block;
        block += round_up(specs[k].count, 16);
    }
    return params;
}

// Pointers to layer l's part of each tensor that has one.
template<typename X>
static ParamsOf<X> layer_params(const cpu::Spec *specs, ParamsOf<X> layer, size_t l, size_t L) {
    for (size_t k = 0; k < cpu::PARAM_COUNT; k++) {
        if (strstr(specs[k].key, "%zu")) ((X **)&layer)[k] += l * (specs[k].count / L);
    }
    return layer;
}

// Likewise of the activations. Without --carry, past and carried are NULL.
static auto layer_acts(const auto *m, size_t l) {
    auto layer = m->a;
    size_t lanes = m->host->d.lanes;
    for (size_t k = 0; k < cpu::ACT_COUNT; k++) {
        const cpu::Spec *s = &m->act_specs[k];
        char **p = &((char **)&layer)[k];
        size_t bytes = s->shape[0] ? m->bytes(*s) / s->shape[0] : 0;       // of a layer
        if (s->shape_text[1] == 'K') *p += l % m->host->d.kept * bytes;
        if (!strncmp(s->shape_text, "(L2,", 4)) *p += l * (m->d.F ? 2 : 1) * bytes;
        if (!strncmp(s->shape_text, "(L,", 3)) {
            *p = lanes ? *p + l * bytes + m->host->lane * (bytes / lanes) : NULL;
        }
    }
    return layer;
}

// The device's shapes: rows of zxBCdt have their pitch, slabs of logits are larger (each one reads
// and writes the head's gradient).
static void device_specs(auto *m, const cpu::Dims &host) {
    cpu::Dims d = host;
    d.Z = m->d.pitch;
    d.slab = max((size_t)2, (d.n + pieces(d.n * d.V, (size_t)1 << 29) - 1) /
                                pieces(d.n * d.V, (size_t)1 << 29));
    d.chunks = m->d.chunks;
    m->d.slab = d.slab;
    cpu::act_specs(&d, m->act_specs);
}

// Scratch memory that the ops take in turn
static size_t work_floats(const Dims *d) {
    size_t sums = PARTS * max(d->M, d->E), embed = d->n * d->M;
    size_t conv = conv_backward_grid(d).blocks.x * d->R * d->S * (d->W + 1);
    return max(max(sums, embed), max(conv, ssd_work_floats(d)));
}

static size_t branch_bytes(const auto *m) {                // of g_branch, where it is not g_resid
    bool same = sizeof(*m->a.g_resid) == sizeof(*m->g_branch);
    return same ? 0 : m->d.n * m->d.M * sizeof(*m->g_branch);
}

static void check_limits(const cpu::Dims *d) {             // of the kernels
    size_t columns = max(d->M, d->E / d->G);
    CHECK(d->W <= MOST_TAPS, "--d-conv %zu: the GPU takes up to %d", d->W, MOST_TAPS);
    CHECK(columns <= MOST_COLUMNS, "norms of %zu columns: the GPU takes up to %d; more --ngroups "
          "divide d_inner", columns, MOST_COLUMNS);
}

// What training takes of the device, by the sizes of open_acts and Device::open
template<class Model>
static cpu::Memory device_memory(const cpu::Dims *host) {
    Model m;
    check_limits(host);
    constexpr bool is_float = sizeof(*m.copies) == sizeof(float);
    m.d = Dims(*host);
    device_specs(&m, *host);
    cpu::param_specs(host, m.specs);
    cpu::Memory memory = {};
    double params = (double)cpu::total(m.specs, cpu::PARAM_COUNT) * sizeof(float);
    memory.weights = is_float ? params : 1.5 * params;
    memory.grads = params;
    memory.moments = 2 * params;
    for (const cpu::Spec &s : m.act_specs) {
        (strcmp(s.name, "logits") ? memory.activations : memory.logits) += (double)m.bytes(s);
    }
    memory.activations += (double)(branch_bytes(&m) + m.d.n * 7 * sizeof(int));
    memory.work = (double)(work_floats(&m.d) * sizeof(float) + CUBLAS_WORKSPACE);
    memory.room = (double)device_room;
    return memory;
}

// Room for a batch's activations and tokens.
static void open_acts(auto *m, cpu::Model *host) {
    m->host = host;
    m->d = Dims(host->d);
    device_specs(m, host->d);
    for (size_t k = 0; k < cpu::ACT_COUNT; k++) {
        size_t bytes = m->bytes(m->act_specs[k]);
        ((char **)&m->acts)[k] = device_alloc<char>(bytes);
        CUDA(cudaMemsetAsync(((char **)&m->acts)[k], 0, bytes, stream));
    }
    m->a = m->acts;
    size_t n = m->d.n;
    workspace(work_floats(&m->d));
    size_t branch = branch_bytes(m);
    (void *&)m->g_branch = branch ? device_alloc<char>(branch) : (void *)m->a.g_resid;
    m->ids = device_alloc<int>(n);
    m->targets = device_alloc<int>(n);
    m->docs = device_alloc<int>(n);
    m->plan = device_alloc<int>(embed_plan_size(n));
    m->host_plan = (int *)cpu::alloc(embed_plan_size(n), sizeof(int));
}

static void close_acts(auto *m) {
    for (size_t k = 0; k < cpu::ACT_COUNT; k++) {
        CUDA(cudaFree(((char **)&m->acts)[k]));
    }
    void *branch = branch_bytes(m) ? m->g_branch : NULL;
    void *others[] = {m->ids, m->targets, m->docs, m->plan, branch};
    for (void *p : others) {
        CUDA(cudaFree(p));
    }
    free(m->host_plan);
}

template<typename floatX>
__global__ void __launch_bounds__(256) cast_kernel(floatX *to, const float *from, size_t count) {
    size_t i = (blockIdx.x * (size_t)256 + threadIdx.x) * 8;
    if (i + 8 <= count) store<true>(to, i, count, load<true>(from, i, count));
    else store<false>(to, i, count, load<false>(from, i, count));
}

// ---- between host and device --------------------------------------------------------------------

template<typename X>
static void upload(X *to, const float *from, size_t count) {
    X *staged = (X *)malloc(count * sizeof(X) + 1);
    CHECK(staged, "out of memory: %zu bytes to copy a tensor to the GPU", count * sizeof(X));
    for (size_t i = 0; i < count; i++) {
        staged[i] = (X)from[i];
    }
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaMemcpy(to, staged, count * sizeof(X), cudaMemcpyHostToDevice));
    free(staged);
}

// --dump: layer l's tensors to where the host would have them, then the host's own function
static void watch(const auto *m, size_t l, int part) {
    cpu::Model *host = m->host;
    if (!host->watch) return;
    cpu::Acts to = cpu::layer_acts(host, l);
    auto from = layer_acts(m, l);
    for (size_t k = 0; k < cpu::ACT_COUNT; k++) {
        const cpu::Spec *s = &host->act_specs[k];
        bool of_layers = s->shape_text[1] == 'K' || !strncmp(s->shape_text, "(L2,", 4);
        bool work = !strncmp(s->shape_text, "(L,", 3) || !strncmp(s->shape_text, "(C,", 3);
        if (work || !strcmp(s->name, "logits") || !s->count) continue;
        size_t count = of_layers ? s->count / s->shape[0] : s->count;
        size_t columns = s->shape[s->rank - 1], pitch = m->act_specs[k].shape[s->rank - 1];
        if (s->rank == 1 || (of_layers && s->rank == 2)) columns = pitch = count;
        float *x = ((float **)&to)[k];
        const void *device = ((void **)&from)[k];
        if (from.size(s->name) == sizeof(float))
            download(x, (const float *)device, count / columns, columns, pitch);
        else download(x, (const bf16 *)device, count / columns, columns, pitch);
    }
    host->watch(host->watcher, l, part);
}

// The gradients that only ever add start from 0; matrices are overwritten by their first product.
static void zero_grads(const auto *m) {
    for (size_t k = 0; k < cpu::PARAM_COUNT; k++) {
        const cpu::Spec *s = &m->specs[k];
        if (s->decay && (s->init != cpu::NORMAL || m->host->d.tied)) continue;
        CUDA(cudaMemsetAsync(((float **)&m->g)[k], 0, s->count * sizeof(float), stream));
    }
}

// What one stretch of a row leaves to the next: W-1 inputs of the convolution and a state for each
// head, of each layer. A row cut over several GPUs would hand them on likewise.
static void swap_states(auto *m) {
    std::swap(m->a.past, m->a.past_new);
    std::swap(m->a.carried, m->a.carried_new);
}

#include "dev/cuda/recurrence.cuh"      // conv1d_dt_step, ssd_recurrence: one token of each row

// ---- layers: read these beside those of the C file ----------------------------------------------

// A part of a step lasts from its part() to the next one: as a range for Nsight, and under
// --profile between two events, which cost the GPU nothing but their place in the queue.
struct Mark {
    const char *name;
    cudaEvent_t event;
};
static struct {
    bool on;
    std::vector<Mark> marks;               // of the profiled steps, in order
} profile;

static void part(const char *name) {
    static const char *open;
    if (!cpu::flags.profile) return;
    if (open) nvtxRangePop();
    nvtxRangePushA(open = name);
    if (!profile.on) return;
    Mark mark = {name, NULL};
    CUDA(cudaEventCreate(&mark.event));
    CUDA(cudaEventRecord(mark.event, stream));
    profile.marks.push_back(mark);
}

// The residual stream after a branch: the one before it plus in (n,I) weight (M,I)^T
template<typename residX>
static residX *after(const auto *m, residX *resid) {
    return resid + m->act_specs[0].shape[1] * m->d.M;
}

template<typename floatX>
static void add_branch(const auto *m, auto *resid, const floatX *in, const floatX *weight,
                       size_t I) {
    gemm(after(m, resid), in, weight, resid, 1, Product{m->d.n, m->d.M, I, I, I, m->d.M, 0, 1});
}

static void layer_forward(const auto *m, size_t l) {
    const Dims *d = &m->d;
    auto w = layer_params(m->specs, m->w, l, d->L);
    auto x = layer_params(m->specs, m->x, l, d->L);
    auto a = layer_acts(m, l);
    part("norm");     rmsnorm_forward(d, a.u, a.rstd, a.resid, w.norm);
    part("in_proj");  linear_forward(a.zxBCdt, a.u, x.in_proj, d->n, d->M, d->Z, 0, d->pitch);
    if (m->host->recurrent) {
        conv1d_dt_step(d, a.xBC, a.dt, a.past, a.zxBCdt, w);
        ssd_recurrence(d, a.y, a.carried, a.xBC, a.dt, w.A_log, w.D);
    } else {
        part("conv1d"); conv1d_forward(d, a.xBC, a.zxBCdt, w.conv_w, w.conv_b, a.past, m->doc);
        if (m->host->d.lanes) conv1d_past(d, a.past_new, a.zxBCdt, a.past, m->doc);
        part("dt");   dt_forward(d, a.dt, a.zxBCdt, w.dt_bias);
        part("ssd");  ssd_forward(d, a.y, a.states, a.carried_new, a.xBC, a.dt, w.A_log, w.D,
                                  a.carried, m->doc);
    }
    part("norm_g");   gated_rmsnorm_forward(d, a.o, a.rstd_g, a.y, a.zxBCdt, w.norm_g);
    part("out_proj"); add_branch(m, a.resid, a.o, x.out_proj, d->E);
    if (d->F) {
        part("norm"); rmsnorm_forward(d, a.u2, a.rstd2, after(m, a.resid), w.norm2);
        part("fc1");  linear_forward(a.ab, a.u2, x.fc1, d->n, d->M, 2 * d->F, 0);
        part("swiglu"); swiglu_forward(d, a.h, a.ab);
        part("fc2");  add_branch(m, after(m, a.resid), a.h, x.fc2, d->F);
    }
    watch(m, l, 0);
}

// g_resid (n,M): on entry the gradient of what the layer returns, on exit of what it was given.
static void layer_backward(const auto *m, size_t l) {
    const Dims *d = &m->d;
    auto w = layer_params(m->specs, m->w, l, d->L), g = layer_params(m->specs, m->g, l, d->L);
    auto x = layer_params(m->specs, m->x, l, d->L);
    auto a = layer_acts(m, l);
    size_t n = d->n, M = d->M, E = d->E, Z = d->Z, F = d->F;
    int add = m->host->add;
    if (m->host->d.kept < d->L) {                          // --recompute
        auto watcher = m->host->watch;
        m->host->watch = NULL;
        layer_forward(m, l);
        m->host->watch = watcher;
    }
    if (F) {
        part("g_fc2"); linear_backward(a.g_h, g.fc2, m->g_branch, a.h, x.fc2, n, F, M, add);
        part("g_swiglu"); swiglu_backward(d, a.g_ab, a.g_h, a.ab);
        part("g_fc1"); linear_backward(a.g_u, g.fc1, a.g_ab, a.u2, x.fc1, n, M, 2 * F, add);
        part("g_norm"); rmsnorm_backward(d, a.g_resid, g.norm2, a.g_u, after(m, a.resid), a.rstd2,
                                         w.norm2, m->g_branch, 1);
    }
    part("g_out_proj"); linear_backward(a.g_o, g.out_proj, m->g_branch, a.o, x.out_proj, n, E, M,
                                        add);
    part("g_norm_g"); gated_rmsnorm_backward(d, a.g_y, a.g_zxBCdt, g.norm_g, a.g_o, a.y, a.zxBCdt,
                                             a.rstd_g, w.norm_g);
    part("g_ssd");    ssd_backward(d, a.g_xBC, a.g_dt, g.A_log, g.D, (float *)NULL, a.g_y,
                                   (float *)NULL, a.states, a.g_states, a.xBC, a.dt, w.A_log, w.D,
                                   a.carried, m->doc);
    part("g_dt");     dt_backward(d, a.g_zxBCdt, g.dt_bias, a.g_dt, a.zxBCdt, w.dt_bias);
    watch(m, l, 1);
    part("g_conv1d"); conv1d_backward(d, a.g_zxBCdt, g.conv_w, g.conv_b, a.g_xBC, a.zxBCdt,
                                      w.conv_w, w.conv_b, a.past, m->doc);
    part("g_in_proj"); linear_backward(a.g_u, g.in_proj, a.g_zxBCdt, a.u, x.in_proj, n, M, Z, add,
                                       d->pitch);
    part("g_norm");   rmsnorm_backward(d, a.g_resid, g.norm, a.g_u, a.resid, a.rstd, w.norm,
                                       m->g_branch, 1);
    watch(m, l, 2);
}

// The tokens of host->ids, targets (but in generation) and doc, to the device
static void take_batch(auto *m) {
    const cpu::Model *host = m->host;
    size_t slab = m->d.slab, bytes = host->d.n * sizeof(int);
    m->d = Dims(host->d);                                  // tasks of --eval have shorter rows
    m->d.slab = slab;
    auto copy = [&](int *to, const int *from) {
        if (from) CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream));
    };
    copy(m->ids, host->ids);
    copy(m->targets, host->targets);
    copy(m->docs, host->doc);
    m->doc = host->doc ? m->docs : NULL;
}

static void model_hidden(auto *m) {
    const Dims *d = &m->d;
    part("embed");    embed_forward(d, m->a.resid, m->ids, m->w.embedding);
    for (size_t l = 0; l < d->L; l++) {
        layer_forward(m, l);
    }
    part("norm");     rmsnorm_forward(d, m->a.hidden, m->a.rstd_f, layer_acts(m, d->L).resid,
                                      m->w.norm_f);
}

// The losses of the tokens; with `backward` also all gradients but the embedding's.
static void model_losses(auto *m, int backward) {
    const Dims *d = &m->d;
    cpu::Model *host = m->host;
    auto a = m->a;
    auto *head = host->d.tied ? m->x.embedding : m->x.lm_head;
    float *g_head = host->d.tied ? m->g.embedding : m->g.lm_head;
    model_hidden(m);
    if (backward && !host->add) zero_grads(m);
    part("classifier");
    classifier(d, a.losses, backward ? a.g_u : NULL, g_head, a.logits, host->all_logits,
               a.hidden, head, m->targets, host->scale, host->add);
    if (!backward) return;
    watch(m, d->L, 1);
    part("g_norm");   rmsnorm_backward(d, a.g_resid, m->g.norm_f, a.g_u, layer_acts(m, d->L).resid,
                                       a.rstd_f, m->w.norm_f, m->g_branch, 0);
    watch(m, d->L, 2);
    for (size_t l = d->L; l-- > 0;) {
        layer_backward(m, l);
    }
}

// A micro-batch is some hundred launches, for a small model more time than its kernels. All but the
// copies of tokens and the embedding's gradient are the same from step to step: they are captured
// as a CUDA graph, which one call launches. Nothing in it belongs to a step: lr, t and the clipping
// come later, with the update. What tells two graphs apart is their key: the first micro-batch of a
// step sets gradients, later ones add; with --carry each has its lane, and the states trade places.
struct Graph {
    struct Key {
        int add, packed;
        size_t lane;
        const void *past, *work;
        float scale;
    } key;
    cudaGraphExec_t exec;
};
constexpr size_t GRAPHS = 16;              // --carry with more micro-batches goes without

template<typename F>
static cudaGraphExec_t capture(F work) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return exec;
}

// model_losses with gradients, as a graph from its second time on. The first one goes step by step,
// and leaves plans of matrix products and work space behind.
static void graph_losses(auto *m) {
    static Graph graphs[GRAPHS];
    static size_t count;
    const cpu::Model *host = m->host;
    Graph::Key key;
    memset(&key, 0, sizeof key);
    key.add = host->add, key.packed = m->doc != NULL, key.lane = host->lane;
    key.past = m->a.past, key.work = workspace(0), key.scale = host->scale;
    size_t i = 0;
    while (i < count && memcmp(&graphs[i].key, &key, sizeof key)) i++;
    bool first = i == count, by_hand = !cpu::flags.graph || host->watch || profile.on;
    if (first && count < GRAPHS) graphs[count++].key = key;
    if (first || by_hand) return model_losses(m, 1);
    if (!graphs[i].exec) graphs[i].exec = capture([&] { model_losses(m, 1); });
    CUDA(cudaGraphLaunch(graphs[i].exec, stream));
}

// The mean loss of the micro-batch; with `backward` also its gradients, added to those of the
// step's earlier micro-batches.
static double model_loss(auto *m, int backward) {
    const Dims *d = &m->d;
    float *losses = m->host->a.losses;
    take_batch(m);
    size_t n = d->n;
    if (backward) {
        graph_losses(m);
        embed_plan(m->host_plan, m->host->ids, n, d->V);   // while the GPU is at work
        CUDA(cudaMemcpyAsync(m->plan, m->host_plan, embed_plan_size(n) * sizeof(int),
                             cudaMemcpyHostToDevice, stream));
        part("g_embed"); embed_backward(d, m->g.embedding, m->a.g_resid, m->plan);
    } else model_losses(m, 0);
    part("host");
    CUDA(cudaMemcpyAsync(losses, m->a.losses, n * sizeof(float), cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)losses[i];
    }
    return sum / (double)n;
}

static void adamw(auto *m, double lr, double grad_scale, cpu::Int t) {
    const cpu::Flags &f = cpu::flags;
    double fix1 = 1 - pow(f.beta1, (double)t), fix2 = 1 - pow(f.beta2, (double)t);
    AdamW s = {(float)f.beta1, (float)(1 - f.beta1), (float)f.beta2, (float)(1 - f.beta2),
               (float)f.eps, (float)(1 - lr * f.weight_decay), (float)(lr / fix1),
               (float)(1 / sqrt(fix2)), (float)grad_scale, 0, {}, {}};
    for (size_t k = 0; k < cpu::PARAM_COUNT; k++) {
        if (!m->specs[k].decay || !m->specs[k].count) continue;
        s.from[s.ranges] = (size_t)(((float **)&m->w)[k] - m->weights);
        s.to[s.ranges] = s.from[s.ranges] + round_up(m->specs[k].count, 16);
        s.ranges++;
    }
    size_t count = m->host->size;
    auto kernel = adamw_kernel<std::remove_pointer_t<decltype(m->copies)>>;
    kernel<<<pieces(count, 2048), 256, 0, stream>>>(
        m->weights, m->copies, m->mean, m->square, m->grads, s, count);
    LAUNCHED();
}

#include "dev/cuda/generate.cuh"        // Sampler: a token at a time
#include "dev/cuda/batch.cuh"           // Batch: a token of each of many rows
#include "dev/cuda/profile.cuh"         // the table of --profile

// ---- the functions of cpu::Backend, for floatX --------------------------------------------------
template<typename floatX, typename residX>
struct Device {
    static inline Model<floatX, residX> model;
    static constexpr bool is_float = sizeof(floatX) == sizeof(float);

    static size_t count(const char *name) {                // elements of an activation
        size_t k = 0;
        while (strcmp(model.act_specs[k].name, name)) k++;
        return model.act_specs[k].count;
    }

    // What a checkpoint is copied to: pinned, the copy is several times as fast. If the system has
    // not so much to pin, it is slow.
    static void pin_checkpoint(cpu::Model *host) {
#ifdef __CUDACC__
        float *blocks[] = {host->weights, host->mean, host->square};
        for (float *block : blocks) {
            if (cudaHostRegister(block, host->size * sizeof(float), cudaHostRegisterDefault))
                cudaGetLastError();
        }
#else
        (void)host;
#endif
    }

    static cpu::Memory memory(const cpu::Dims *d) {
        return device_memory<Model<floatX, residX>>(d);
    }

    static void open(cpu::Model *host) {
        auto *m = &model;
        check_limits(&host->d);
        memcpy(m->specs, host->specs, sizeof m->specs);
        open_acts(m, host);
        if (host->grads && !is_float && !ssd_is_fast(&m->d)) {
            fprintf(stderr, "note: SSD takes about 10 times as long here; the fast kernels take "
                            "chunks of 128, headdim up to 64 and d_state up to 128, both multiples "
                            "of 8, and a GPU with %zu KB of shared memory a block\n",
                    sizeof(WalkShared<128>) >> 10);
        }
        float **blocks[] = {&m->weights, &m->grads, &m->mean, &m->square};
        const float *from[] = {host->weights, NULL, host->mean, host->square};
        ParamsOf<float> *params[] = {&m->w, &m->g, &m->m, &m->v};
        int training = host->grads != NULL;
        for (int i = 0; i < (training ? 4 : 1); i++) {
            *blocks[i] = device_alloc<float>(host->size);
            *params[i] = params_at(*blocks[i], m->specs);
            CUDA(cudaMemsetAsync(*blocks[i], 0, host->size * sizeof(float), stream));
            if (from[i]) upload(*blocks[i], from[i], host->size);
        }
        if (training && cpu::flags.save_every) pin_checkpoint(host);
        if (is_float) {
            m->copies = (floatX *)m->weights;
        } else {
            m->copies = device_alloc<floatX>(host->size);
            cast_kernel<floatX><<<pieces(host->size, 2048), 256, 0, stream>>>(
                m->copies, m->weights, host->size);
            LAUNCHED();
        }
        m->x = params_at(m->copies, m->specs);
        if (!host->d.lanes) return;
        upload(m->a.past, host->a.past, count("past"));
        upload(m->a.carried, host->a.carried, count("carried"));
    }

    // Prints --num-samples samples of up to `count` tokens after the prompt: cpu::generate.
    static void generate(const cpu::Model *host, const cpu::Tokenizer *tok, const int *prompt,
                         size_t prompt_size, cpu::Int count, uint64_t stream_of) {
        cpu::Samples out = cpu::samples_open(tok);
        bool on = std::exchange(profile.on, false);        // its events are not for a graph
        auto draw = [&](auto &&sampler) {
            sampler.feed(prompt, prompt_size);
            cpu::Int issued = 0, i = 0;
            double start = cpu::now();
            for (size_t left = out.left; i < count && left; i++) {
                while (issued < count && issued < i + UNDERWAY) sampler.issue(issued++, stream_of);
                const int *ids = sampler.wait(i);
                if (i == UNDERWAY) start = cpu::now();     // the graph is captured
                left = cpu::samples_take(&out, ids);
            }
            if (cpu::flags.profile && i > 2 * UNDERWAY) {
                double tokens = (double)(i - 1 - UNDERWAY) * (double)out.count;
                fprintf(stderr, "%.0f tokens/s\n", tokens / (cpu::now() - start));
            }
        };
        if (out.count > 1) draw(Batch<Model<floatX, residX>>(&model, host, out.count));
        else draw(Sampler<Model<floatX, residX>>(&model, host, prompt_size));
        cpu::samples_close(&out);
        profile.on = on;
    }

    static double loss(cpu::Model *, int backward) { return model_loss(&model, backward); }

    // The sum of squares in two stages: NORM_PARTS blocks, then the host, in double. Here a step's
    // gradients are complete, in one block: several GPUs would first add up theirs.
    static double norm(cpu::Model *host) {
        static float sums[NORM_PARTS];
        part("adamw");
        float *parts = workspace(NORM_PARTS);
        sum_squares_kernel<<<NORM_PARTS, 256, 0, stream>>>(parts, model.grads, host->size);
        LAUNCHED();
        download(sums, parts, 1, NORM_PARTS, NORM_PARTS);
        double sum = 0;
        for (unsigned i = 0; i < NORM_PARTS; i++) {
            sum += (double)sums[i];
        }
        if (!isfinite(sum)) download(host->grads, model.grads, host->size);
        return sqrt(sum);                                  // the host names the tensor, and stops
    }

    static void update(cpu::Model *, double lr, double grad_scale, cpu::Int t) {
        adamw(&model, lr, grad_scale, t);
        part("host");
    }

    static void carry(cpu::Model *, int fresh) {
        if (!fresh) return swap_states(&model);
        CUDA(cudaMemsetAsync(model.a.past, 0, count("past") * sizeof(floatX), stream));
        CUDA(cudaMemsetAsync(model.a.carried, 0, count("carried") * sizeof(float), stream));
    }

    static void fetch(cpu::Model *host) {
        const auto *m = &model;
        size_t n = host->size;
        download(host->weights, m->weights, n);
        download(host->mean, m->mean, n);
        download(host->square, m->square, n);
        if (host->watch) {                                 // --dump
            download(host->grads, m->grads, n);
            download(host->a.hidden, m->a.hidden, 1, m->d.n * m->d.M, m->d.n * m->d.M);
        }
        if (!host->d.lanes) return;
        download(host->a.past, m->a.past, 1, count("past"), count("past"));
        download(host->a.carried, m->a.carried, 1, count("carried"), count("carried"));
    }
};

// ---- main ---------------------------------------------------------------------------------------
#ifndef TESTING                         // tests include this file for its ops

extern const cpu::Backend gpu_backend;

// Calls f with the Device of the types that the flags name.
template<class F> static auto with_device(F f) {
    if (!strcmp(cpu::flags.dtype, "f32")) return f(Device<float, float>());
    if (cpu::flags.residual_in_fp32) return f(Device<bf16, float>());
    return f(Device<bf16, bf16>());
}
#define OF_DEVICE(function)                                                          \
    [](auto... arguments) {                                                          \
        return with_device([&](auto device) { return device.function(arguments...); }); \
    }

// Which GPU, and can this program run on it? BUILT_FOR is what nvcc compiled for: code for sm_86
// runs on 8.6 and 8.9, not on 8.0 or 9.0.
static void gpu_start() {
    if (!cpu::given[cpu::FLAG_dtype]) cpu::flags.dtype = "bf16";
    CHECK(strcmp(cpu::flags.dtype, "f32") || cpu::flags.residual_in_fp32,
          "--residual-in-fp32 0 is for --dtype bf16");
    CHECK(!cpu::flags.profile || cpu::flags.steps >= 4, "--profile takes at least 4 --steps");
    if (!cpu::flags.chunk_size) cpu::flags.chunk_size = 128;
    int count = 0, device = (int)cpu::flags.device, driver = 0, runtime = 0;
    CUDA(cudaDriverGetVersion(&driver));                   // 0: there is none
    CUDA(cudaRuntimeGetVersion(&runtime));
    CHECK(!driver || driver / 1000 >= runtime / 1000, "the GPU's driver is for CUDA %d.%d, this "
          "program for CUDA %d.%d; update the driver, or build with an older toolkit",
          driver / 1000, driver / 10 % 100, runtime / 1000, runtime / 10 % 100);
    cudaError_t error = cudaGetDeviceCount(&count);
    CHECK(!error && count > 0, "no GPU: %s; train_mamba2 is the program for the CPU",
          cudaGetErrorString(error));
    CHECK(device < count, "--device %d: there are GPUs 0 to %d", device, count - 1);
    CUDA(cudaSetDevice(device));
    cudaDeviceProp p;
    CUDA(cudaGetDeviceProperties(&p, device));
#ifdef BUILT_FOR
    CHECK(p.major == BUILT_FOR / 10 && p.minor >= BUILT_FOR % 10,
          "built for sm_%d, found sm_%d%d: make ARCH=%d%d", BUILT_FOR, p.major, p.minor, p.major,
          p.minor);
#endif
    size_t all;
    CUDA(cudaMemGetInfo(&device_room, &all));
    CUDA(cudaStreamCreate(&stream));
}

static const char *gpu_memory_advice() {
    cpu::Memory memory = gpu_backend.memory(opened);
    size_t batch = cpu::largest_batch(&gpu_backend, opened);
    return cpu::str(": of %.1f that were free, this run takes %s; try --batch %zu%s",
                    memory.room / (1 << 30), cpu::memory_text(&memory), batch ? batch : 1,
                    opened->kept < opened->L ? "" : ", or --recompute");
}

static void gpu_open(cpu::Model *m) {
    opened = &m->d;
    memory_advice = gpu_memory_advice;
    with_device([&](auto device) { device.open(m); });
}

// --compare without a file: the same micro-batch, at the same chunk, by the CPU's ops in float64
// and in float, both as dumps; then the GPU against the first, with the second's error as the
// measure.
static int gpu_compare(cpu::Run *run) {
    char dir[] = "/tmp/train_mamba2_compare_XXXXXX";
    CHECK(mkdtemp(dir), "%s: %s", dir, strerror(errno));
    char *ref = strdup(cpu::str("%s/float64", dir)), *base = strdup(cpu::str("%s/float32", dir));
    const char *dtype = cpu::flags.dtype, *init = *cpu::flags.init ? cpu::flags.init : NULL;
    cpu::Int resid = cpu::flags.residual_in_fp32;
    cpu::flags.dtype = "f32";
    cpu::flags.residual_in_fp32 = 1;
    cpu::flags.chunk_size = (cpu::Int)run->m.d.Q;
    static_assert(sizeof cpu64::flags == sizeof cpu::flags, "one table makes both");
    memcpy(&cpu64::flags, &cpu::flags, sizeof cpu64::flags);
    memcpy(cpu64::given, cpu::given, sizeof cpu64::given);

    static cpu64::Run run64;
    cpu64::Dump dump64;
    run64.device = &cpu64::cpu_backend;
    cpu64::run_open(&run64, init, NULL, 1);
    cpu64::dump_run(&run64, &dump64);
    cpu64::tensors_write(ref, &dump64.list);

    static cpu::Run run32;
    cpu::Dump dump32;
    run32.device = &cpu::cpu_backend;
    cpu::run_open(&run32, init, NULL, 1);
    cpu::dump_run(&run32, &dump32);
    cpu::tensors_write(base, &dump32.list);

    cpu::flags.dtype = dtype;
    cpu::flags.residual_in_fp32 = resid;
    cpu::flags.compare = strdup(cpu::str("%s,%s", ref, base));
    int bad = cpu::compare_dump(run);
    unlink(ref);
    unlink(base);
    rmdir(dir);
    return bad > 0;
}

const cpu::Backend gpu_backend = {
    "GPU", 1, gpu_start, OF_DEVICE(memory), gpu_open, OF_DEVICE(loss), OF_DEVICE(norm),
    OF_DEVICE(update), OF_DEVICE(carry), OF_DEVICE(fetch), OF_DEVICE(generate), gpu_flops, gpu_peak,
    gpu_profile, gpu_compare
};

int main(int argc, char **argv) { return cpu::run_main(argc, argv, &gpu_backend); }
#endif
