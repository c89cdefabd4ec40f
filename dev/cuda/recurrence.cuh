// recurrence.cuh: conv1d, dt and SSD for one token of each row, for train_mamba2.cu.
//
//     x | B | C = silu(b + sum over k of w_k in_{t-(W-1)+k})
//     dt = clamp(softplus(raw + dt_bias), dt_lo, dt_hi)
//     h = exp(dt A) h + dt B x^T;   y = C h + D x
//
// To read h (N,P) of each head and to write it back is nearly all of the work: all rows together
// read weights once, but each row has its own states, 18.9 MB of them at mamba2-130m.

// A thread has a channel of the convolution, or a head's dt. past is read before the wait: it is
// the last token's.
template<typename floatX>
__global__ void __launch_bounds__(256)
conv1d_dt_step_kernel(floatX *xBC, float *dt, floatX *past, const floatX *zxBCdt,
                      ParamsOf<float> w, Dims d) {
    int c = blockIdx.x * 256 + threadIdx.x, S = (int)d.S, W = (int)d.W, h = c - S;
    size_t r = blockIdx.y;
    past += r * (W - 1) * S + c;
    zxBCdt += r * d.pitch + d.E + c;
    floatX in[MOST_TAPS];
    float weight[MOST_TAPS];
    UNROLL for (int k = 0; k < MOST_TAPS; k++) {
        if (c < S && k + 1 < W) in[k] = past[k * S];
        if (c < S && k < W) weight[k] = w.conv_w[c * W + k];
    }
    next_may_start();
    wait_for_last();
    if (h >= 0) {
        if (h >= (int)d.H) return;
        float step = softplus((float)*zxBCdt + w.dt_bias[h]);
        dt[r * d.H + h] = min(max(step, d.dt_lo), d.dt_hi);
        return;
    }
    float pre = w.conv_b[c];
    UNROLL for (int k = 0; k < MOST_TAPS; k++) {
        if (k >= W) break;
        if (k + 1 == W) in[k] = *zxBCdt;
        pre += weight[k] * (float)in[k];
        if (k > 0) past[(k - 1) * S] = in[k];
    }
    xBC[r * S + c] = (floatX)(pre * sigmoid<floatX>(pre));
}
// xBC (R,S), dt (R,H); past (R,W-1,S) moves on by a step, in place; w of a layer
template<typename floatX>
static void conv1d_dt_step(const Dims *d, floatX *xBC, float *dt, floatX *past,
                           const floatX *zxBCdt, const ParamsOf<float> &w) {
    dim3 grid(pieces(d->S + d->H, 256), (unsigned)d->R);
    launch_early(conv1d_dt_step_kernel<floatX>, grid, 256, 0, xBC, dt, past, zxBCdt, w, *d);
}

// A block has up to 64 columns of a head of a row; a thread 4 of them, and 8 neighbouring n of each
// 128. The states are those of the last token: they are asked for before the wait.
constexpr int STATE_COLUMNS = 64, STATE_ROWS = 8;

template<int HEADDIM, bool WIDE, typename floatX>
__global__ void __launch_bounds__(256, 3)
ssd_recurrence_kernel(floatX *y, float *state, const floatX *xBC, const float *dts,
                      const float *A_log, const float *D, Dims d, int heads) {
    __shared__ float sums[8][STATE_COLUMNS];
    int P = HEADDIM ? HEADDIM : (int)d.P, N = (int)d.N;
    int first = blockIdx.x * STATE_COLUMNS, h = blockIdx.y;
    int t = threadIdx.x, quad = t % 16 * 4, columns = min(max(P - first - quad, 0), 4);
    size_t r = blockIdx.z;
    const floatX *x = xBC + r * d.S + h * P, *B = xBC + r * d.S + d.E + h / heads * N;
    const floatX *C = B + d.G * d.N;
    float sum[4] = {}, A = -expf(A_log[h]), skip = D[h];
    state += (r * d.H + h) * d.N * d.P + first + quad;
    for (int n0 = 0; n0 < N; n0 += 16 * STATE_ROWS) {
        int n = n0 + t / 16 * STATE_ROWS;
        float *at = state + n * P;
        auto there = [&](int k) { return n + (WIDE ? 0 : k) < N ? columns : 0; };
        VecOf<4> old[STATE_ROWS];
        UNROLL for (int k = 0; k < STATE_ROWS; k++) {
            old[k] = load<WIDE, 4>(at + k * P, 0, there(k));
        }
        next_may_start();
        wait_for_last();
        auto some_b = fetch<WIDE>(B, n, N), some_c = fetch<WIDE>(C, n, N);
        VecOf<4> in = load<WIDE, 4>(x, first + quad, P);
        float dt = dts[r * d.H + h], decay = expf(dt * A);
        Vec b = some_b.unpacked(), c = some_c.unpacked();
        UNROLL for (int k = 0; k < STATE_ROWS; k++) {
            UNROLL for (int i = 0; i < 4; i++) {
                old[k].v[i] = decay * old[k].v[i] + dt * b.v[k] * in.v[i];
                sum[i] += c.v[k] * old[k].v[i];
            }
            store<WIDE>(at + k * P, 0, there(k), old[k]);
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], 16);
        if (t % 32 < 16) sums[t / 32][quad + i] = sum[i];
    }
    __syncthreads();
    if (t >= STATE_COLUMNS || first + t >= P) return;
    float result = skip * (float)x[first + t];
    UNROLL for (int k = 0; k < 8; k++) {
        result += sums[k][t];
    }
    y[r * d.E + h * P + first + t] = (floatX)result;
}
// y (R,E); state (R,H,N,P) is updated in place
template<typename floatX>
static void ssd_recurrence(const Dims *d, floatX *y, float *state, const floatX *xBC,
                           const float *dt, const float *A_log, const float *D) {
    dim3 grid(pieces(d->P, STATE_COLUMNS), (unsigned)d->H, (unsigned)d->R);
    bool wide = d->P % 4 == 0 && d->N % 8 == 0 && d->S % 8 == 0 && d->E % 8 == 0;
    auto kernel = !wide         ? ssd_recurrence_kernel<0, false, floatX>
                  : d->P == 64 ? ssd_recurrence_kernel<64, true, floatX>
                               : ssd_recurrence_kernel<0, true, floatX>;
    launch_early(kernel, grid, 256, 0, y, state, xBC, dt, A_log, D, *d, (int)(d->H / d->G));
}
