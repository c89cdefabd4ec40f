// generate.cuh: one token at a time, for train_mamba2.cu.
//
// Generation at batch 1 is bound by reading all weights once a token, and by launches: three
// kernels a layer, each of which may start before the last one ends (programmatic dependent launch,
// from Hopper on) and asks for its weights while it waits. Activations are in float.
//   gemv            zxBCdt = in_proj rmsnorm(resid)
//   ssd_recurrence  conv1d, dt, the recurrence itself, v = y silu(z)
//   gemv            resid += out_proj (norm_g v^)
// zxBCdt is a ring of the last W rows, in which the convolution finds its inputs.

// What changes from token to token, on the device, so that a CUDA graph can be used again
struct Step {
    int id, time, sampled;                 // the token; its row is time % W; of the uniforms
};

// out (O) (+)= weight (O,I) x, a warp per row, where x (I) is in, RMS-normed by groups, times w;
// or, w NULL, SwiGLU of in (2I). ring: out is row time % ring of (ring,pitch).
// In shared memory the columns 8i..8i+3 of x are together, and so are 8i+4..8i+7: a warp then reads
// neighbours, without bank conflicts.
enum { AHEAD = 4 };                        // vectors of 8 that a lane asks for at a time
template<bool WIDE, typename floatX>
__global__ void __launch_bounds__(256, 4)
gemv_kernel(float *out, const floatX *weight, const float *in, const float *w, int I, int O,
            int groups, float eps, int add, const Step *step, int ring, size_t pitch) {
    extern __shared__ __align__(128) float x[];
    __shared__ float part[2][32];
    constexpr int UNIT = WIDE ? 4 : 1;
    int lane = threadIdx.x % 32, row = blockIdx.x * 8 + threadIdx.x / 32, columns = I / groups;
    int half = (I + 7) / 8 * 4;
    auto place = [&](int c) { return c / 8 * 4 + c % 4 + (c / 4 % 2 ? half : 0); };
    Vec next[AHEAD];
    auto fetch = [&](int c0) {
        UNROLL for (int k = 0; k < AHEAD; k++) {
            next[k] = load<WIDE>(weight + (size_t)row * I, c0 + (k * 32 + lane) * 8, I);
        }
    };
    next_may_start();
    if (row < O) fetch(0);
    wait_for_last();
    if (step) out += step->time % ring * pitch;
    for (int g = 0; g < groups && w; g++) {
        float sum = 0.0f;
        _Pragma("unroll 2")
        for (int c = g * columns + threadIdx.x * UNIT; c < (g + 1) * columns; c += 256 * UNIT) {
            UNROLL for (int i = 0; i < UNIT; i++) {
                float v = in[c + i];
                sum += v * v;
                x[place(c + i)] = v * w[c + i];
            }
        }
        float scale = 1.0f / sqrtf(block_sum(sum, part[g % 2]) / columns + eps);
        for (int c = g * columns + threadIdx.x * UNIT; c < (g + 1) * columns; c += 256 * UNIT) {
            UNROLL for (int i = 0; i < UNIT; i++) {
                x[place(c + i)] *= scale;
            }
        }
    }
    for (int c = threadIdx.x; c < I && !w; c += 256) {
        x[place(c)] = in[c] * in[I + c] * sigmoid<floatX>(in[I + c]);
    }
    for (int c = I + threadIdx.x; c < 2 * half; c += 256) {
        x[place(c)] = 0.0f;
    }
    __syncthreads();
    for (; row < O; row += gridDim.x * 8) {
        float sum = 0.0f;
        for (int c0 = 0; c0 < I; c0 += AHEAD * 256) {
            if (c0 > 0 || row >= gridDim.x * 8) fetch(c0);
            UNROLL for (int k = 0; k < AHEAD; k++) {
                int c = c0 + (k * 32 + lane) * 8;
                if (c >= I) continue;
                float4 low = *(const float4 *)&x[c / 2], high = *(const float4 *)&x[half + c / 2];
                const float *v = next[k].v;
                sum += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w +
                       v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w;
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) out[row] = add ? out[row] + sum : sum;
    }
}
template<typename floatX>
static void gemv(float *out, const floatX *weight, const float *in, const float *w, size_t I,
                 size_t O, size_t groups, float eps, int add, const Step *step = NULL,
                 size_t ring = 1, size_t pitch = 0) {
    unsigned warps = pieces(O, pieces(O, 8 * 528)), shared = (unsigned)((I + 8) * sizeof(float));
    bool wide = I % 8 == 0 && I / groups % 4 == 0;
    auto kernel = wide ? gemv_kernel<true, floatX> : gemv_kernel<false, floatX>;
    CHECK(shared < shared_room() - 1024, "rows of %zu columns are too long for the GPU", I);
    if (shared > 48 << 10) allow_shared(kernel, shared);
    launch_early(kernel, dim3(pieces(warps, 8)), 256, shared, out, weight, in, w, (int)I, (int)O,
                 (int)groups, eps, add, step, (int)ring, pitch);
}

// STEP_P columns p of a head: v (E) = y silu(z); state (H,N,P) is updated in place. A thread has a
// column and every STEP_SLICES-th n, of which STEP_N at a time are on their way.
constexpr int STEP_P = 16, STEP_SLICES = 32, STEP_N = 4;
template<typename floatX>
__global__ void __launch_bounds__(STEP_P *STEP_SLICES)
ssd_recurrence_kernel(float *v, float *state, const float *zxBCdt, const float *conv_w,
                      const float *conv_b, const float *dt_bias, const float *A_log,
                      const float *D, const Step *step, Dims d) {
    extern __shared__ float xBC[];                         // x (STEP_P), B (N), C (N)
    __shared__ float sums[STEP_SLICES][STEP_P + 1];
    int p = threadIdx.x % STEP_P, slice = threadIdx.x / STEP_P, p0 = blockIdx.x * STEP_P;
    size_t h = blockIdx.y, group = h / (d.H / d.G), column = h * d.P + p0 + p;
    bool inside = p0 + p < d.P;
    next_may_start();
    float A = -expf(A_log[h]), skip = D[h], bias = dt_bias[h], old[STEP_N];
    state += h * d.N * d.P + p0 + p;
    auto fetch = [&](int n0) {
        UNROLL for (int k = 0; k < STEP_N; k++) {
            size_t n = n0 + slice + k * STEP_SLICES;
            old[k] = inside && n < d.N ? state[n * d.P] : 0.0f;
        }
    };
    wait_for_last();
    int time = step->time;
    const float *row = zxBCdt + time % d.W * d.pitch;
    float raw = row[d.E + d.S + h] + bias, z = inside ? row[column] : 0.0f;
    fetch(0);
    for (size_t i = threadIdx.x; i < STEP_P + 2 * d.N; i += STEP_P * STEP_SLICES) {
        size_t bc = i - STEP_P, c = h * d.P + p0 + i;
        if (i >= STEP_P) c = d.E + bc / d.N * d.G * d.N + group * d.N + bc % d.N;
        if (i < STEP_P && p0 + i >= d.P) continue;
        float pre = conv_b[c];
        UNROLL for (size_t k = 0; k < 8; k++) {            // from the oldest on
            if (k >= d.W) continue;
            pre += conv_w[c * d.W + k] * zxBCdt[(time + 1 + k) % d.W * d.pitch + d.E + c];
        }
        xBC[i] = pre * sigmoid<floatX>(pre);
    }
    __syncthreads();
    const float *B = xBC + STEP_P, *C = B + d.N;
    float dt = min(max(softplus(raw), d.dt_lo), d.dt_hi), decay = expf(A * dt), x = xBC[p];
    float sum = 0.0f;
    for (int n0 = 0; n0 < d.N; n0 += STEP_N * STEP_SLICES) {
        if (n0 > 0) fetch(n0);
        UNROLL for (int k = 0; k < STEP_N; k++) {
            size_t n = n0 + slice + k * STEP_SLICES;
            if (!inside || n >= d.N) continue;
            float s = decay * old[k] + dt * B[n] * x;
            state[n * d.P] = s;
            sum += C[n] * s;
        }
    }
    sums[slice][p] = sum;
    __syncthreads();
    if (slice > 0 || !inside) return;
    float y = skip * x;
    UNROLL for (int i = 0; i < STEP_SLICES; i++) {
        y += sums[i][p];
    }
    v[column] = y * z * sigmoid<floatX>(z);
}
template<typename floatX>
static void ssd_recurrence(const Dims *d, float *v, float *state, const float *zxBCdt,
                           const float *conv_w, const float *conv_b, const float *dt_bias,
                           const float *A_log, const float *D, const Step *step) {
    dim3 grid(pieces(d->P, STEP_P), (unsigned)d->H);
    launch_early(ssd_recurrence_kernel<floatX>, grid, STEP_P * STEP_SLICES,
                 (STEP_P + 2 * d->N) * sizeof(float), v, state, zxBCdt, conv_w, conv_b, dt_bias,
                 A_log, D, step, *d);
}

// past (L,W-1,S) into the rings (L,W,pitch) of the token at time W
template<typename floatX>
__global__ void __launch_bounds__(256)
fill_rings_kernel(float *rings, const floatX *past, Dims d) {
    size_t l = blockIdx.y, i = blockIdx.x * (size_t)256 + threadIdx.x, k = i / d.S, c = i % d.S;
    if (k + 1 >= d.W) return;
    rings[(l * d.W + k + 1) * d.pitch + d.E + c] = past[(l * (d.W - 1) + k) * d.S + c];
}

// The next token from the logits of `vocab` tokens, as cpu::sample without top-k and top-p: the
// most likely one, the first of equals; or, at a temperature, that at which the sum of the
// probabilities from 0 on passes u. One block; each warp has 8 spans of tokens, in order.
constexpr int SPANS = 8;
__global__ void __launch_bounds__(1024)
sample_kernel(Step *step, int *ids, const float *logits, const double *uniforms, int count,
              int vocab, float temperature) {
    __shared__ float best[32];
    __shared__ int best_at[32];
    __shared__ double sums[32 * SPANS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, top_at = vocab;
    int span = (int)round_up(pieces(vocab, 32 * SPANS), 32), first = warp * SPANS * span;
    float top = -INFINITY;
    auto join = [&](float other, int at) {
        if (other > top || (other == top && at < top_at)) {
            top = other;
            top_at = at;
        }
    };
    next_may_start();
    wait_for_last();
    _Pragma("unroll 8")
    for (int i = first + lane; i < min(vocab, first + SPANS * span); i += 32) {
        join(logits[i], i);
    }
    for (int lanes = 16; lanes; lanes /= 2) {
        float other = __shfl_xor_sync(~0u, top, lanes);
        int at = __shfl_xor_sync(~0u, top_at, lanes);
        join(other, at);
    }
    if (lane == 0) best[warp] = top;
    if (lane == 0) best_at[warp] = top_at;
    __syncthreads();
    for (int w = 0; w < 32; w++) {
        join(best[w], best_at[w]);
    }
    int slot = step->sampled % count;
    auto likelihood = [&](int i) {
        return i < vocab && temperature > 0.0f ? expf((logits[i] - top) / temperature) : 0.0f;
    };
    for (int k = 0; k < SPANS; k++) {
        float sum = 0.0f;
        _Pragma("unroll 8")
        for (int i = lane; i < span; i += 32) {
            sum += likelihood(first + k * span + i);
        }
        double all_lanes = warp_sum((double)sum);
        if (lane == 0) sums[warp * SPANS + k] = all_lanes;
    }
    __syncthreads();                                       // and all have read step->sampled
    if (threadIdx.x == 0) {
        step->id = ids[slot] = min(top_at, vocab - 1);     // until another warp knows better
        step->sampled++;
        step->time++;
    }
    double of_warp = 0.0;                                  // lane w has that of warp w
    for (int k = 0; k < SPANS; k++) {
        of_warp += sums[lane * SPANS + k];
    }
    double upto = warp_scan(of_warp), u = uniforms[slot] * __shfl_sync(~0u, upto, 31);
    double before = __shfl_sync(~0u, upto - of_warp, warp), mine = __shfl_sync(~0u, of_warp, warp);
    __syncthreads();
    if (temperature <= 0.0f || u < before || u >= before + mine) return;
    for (int k = 0; k < SPANS; k++) {
        double sum = sums[warp * SPANS + k];
        for (int i = 0; i < span && u < before + sum; i += 32) {
            int at = first + k * span + i + lane;
            double here = before + warp_scan((double)likelihood(at));
            unsigned passed = __ballot_sync(~0u, u < here);
            if (passed && lane == __ffs(passed) - 1) step->id = ids[slot] = min(at, vocab - 1);
            if (passed) return;
            double next = __shfl_sync(~0u, here, 31);
            sum -= next - before;
            before = next;
        }
        before += sum;
    }
}

// ---- generation ---------------------------------------------------------------------------------
// The prompt goes through the parallel form, in pieces; then each token is one step of the
// recurrence, as a CUDA graph. The GPU runs ahead of what is printed, by UNDERWAY tokens.
constexpr int UNDERWAY = 4, UNIFORMS = 256;

template<class Model>
struct Sampler {
    typedef typename Model::floatX floatX;
    cpu::Model view;                       // one row of at most `most` tokens
    Model m;
    size_t most;
    float *resid, *rings, *v, *ab;         // (M), (L,W,pitch), (E), (2F)
    float *logits, *host_logits;           // (V)
    Step *step;
    double *uniforms;
    int *ids, *host_ids;                   // (UNIFORMS): the tokens that were sampled
    cudaGraphExec_t graph;
    cudaEvent_t done[UNDERWAY];

    Sampler(const Model *trained, const cpu::Model *host, size_t most)
        : m(*trained), most(most), graph(NULL) {
        memset(&view, 0, sizeof view);
        view.d = host->d;
        view.d.Q = 128;
        cpu::dims_batch(&view.d, 1, most);
        view.d.lanes = view.d.kept = 1;
        open_acts(&m, &view);
        size_t ring = m.d.L * m.d.W * m.d.pitch;
        resid = device_alloc<float>(m.d.M);
        rings = device_alloc<float>(ring);
        v = device_alloc<float>(m.d.E);
        ab = device_alloc<float>(2 * m.d.F);
        logits = device_alloc<float>(m.d.V);
        step = device_alloc<Step>(1);
        uniforms = device_alloc<double>(UNIFORMS);
        ids = device_alloc<int>(UNIFORMS);
        CUDA(cudaMemsetAsync(rings, 0, ring * sizeof(float), stream));
        CUDA(cudaMallocHost(&host_ids, UNIFORMS * sizeof(int)));
        host_logits = (float *)cpu::alloc(m.d.V, sizeof(float));
        for (cudaEvent_t &event : done) {
            CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        }
    }
    ~Sampler() {
        CUDA(cudaStreamSynchronize(stream));
        close_acts(&m);
        void *buffers[] = {resid, rings, v, ab, logits, step, uniforms, ids};
        for (void *p : buffers) {
            CUDA(cudaFree(p));
        }
        CUDA(cudaFreeHost(host_ids));
        free(host_logits);
        for (cudaEvent_t event : done) {
            CUDA(cudaEventDestroy(event));
        }
        if (graph) CUDA(cudaGraphExecDestroy(graph));
    }
    const floatX *head() const { return view.d.tied ? m.x.embedding : m.x.lm_head; }

    // Takes in the prompt; leaves the logits after its last token, and the states for step().
    void feed(const int *tokens, size_t count) {
        for (size_t i = 0; i < count; i += most) {
            cpu::dims_batch(&view.d, 1, count - i < most ? count - i : most);
            view.ids = tokens + i;
            take_batch(&m);
            model_hidden(&m);
            swap_states(&m);
        }
        const Dims *d = &m.d;
        linear_forward(logits, m.a.hidden + (d->n - 1) * d->M, head(), 1, d->M, d->V, 0);
        dim3 grid(pieces((d->W - 1) * d->S, 256), (unsigned)d->L);
        if (d->W > 1) fill_rings_kernel<floatX><<<grid, 256, 0, stream>>>(rings, m.a.past, *d);
        Step start = {0, (int)d->W - 1, 0};                // the first sample makes it W
        CUDA(cudaMemcpyAsync(step, &start, sizeof start, cudaMemcpyHostToDevice, stream));
    }

    void token() {                         // from step->id to the next
        const Dims *d = &m.d;
        Dims one = *d;
        one.R = one.T = one.n = 1;
        embed_forward(&one, resid, &step->id, m.w.embedding);
        for (size_t l = 0; l < d->L; l++) {
            auto w = layer_params(m.specs, m.w, l, d->L);
            auto x = layer_params(m.specs, m.x, l, d->L);
            float *zxBCdt = rings + l * d->W * d->pitch;
            gemv(zxBCdt, x.in_proj, resid, w.norm, d->M, d->Z, 1, d->eps, 0, step, d->W, d->pitch);
            ssd_recurrence<floatX>(d, v, layer_acts(&m, l).carried, zxBCdt, w.conv_w, w.conv_b,
                                   w.dt_bias, w.A_log, w.D, step);
            gemv(resid, x.out_proj, v, w.norm_g, d->E, d->M, d->G, d->eps, 1);
            if (!d->F) continue;
            gemv(ab, x.fc1, resid, w.norm2, d->M, 2 * d->F, 1, d->eps, 0);
            gemv(resid, x.fc2, ab, (float *)NULL, d->F, d->M, 1, d->eps, 1);
        }
        gemv(logits, head(), resid, m.w.norm_f, d->M, d->V, 1, d->eps, 0);
        choose();
    }
    void choose() {                        // from logits to step->id
        launch_early(sample_kernel, dim3(1), 1024, 0, step, ids, logits, uniforms, (int)UNIFORMS,
                     (int)view.d.vocab, (float)cpu::flags.temperature);
    }

    // Issues token i; the first one's logits are there.
    void issue(cpu::Int i, uint64_t stream_of) {
        const cpu::Flags &f = cpu::flags;
        double u[UNIFORMS];
        int slot = (int)(i % UNIFORMS);
        for (int k = 0; k < UNIFORMS && slot == 0; k++) {
            u[k] = cpu::random_uniform((uint64_t)f.seed, stream_of, (uint64_t)(i + k));
        }
        if (slot == 0) {
            CUDA(cudaMemcpyAsync(uniforms, u, sizeof u, cudaMemcpyHostToDevice, stream));
        }
        if (i > 0 && !graph) graph = capture([&] { token(); });
        if (i > 0) CUDA(cudaGraphLaunch(graph, stream));
        else choose();
        if (f.temperature > 0 && (f.top_k || f.top_p < 1)) {           // sorts: on the host
            double uniform = cpu::random_uniform((uint64_t)f.seed, stream_of, (uint64_t)i);
            download(host_logits, logits, 1, m.d.V, m.d.V);
            int id = cpu::sample(host_logits, view.d.vocab, f.temperature, f.top_k, f.top_p,
                                 uniform);
            CUDA(cudaMemcpy(&step->id, &id, sizeof id, cudaMemcpyHostToDevice));
            CUDA(cudaMemcpy(ids + slot, &id, sizeof id, cudaMemcpyHostToDevice));
        }
        CUDA(cudaMemcpyAsync(host_ids + slot, ids + slot, sizeof(int), cudaMemcpyDeviceToHost,
                             stream));
        CUDA(cudaEventRecord(done[i % UNDERWAY], stream));
    }
    int wait(cpu::Int i) {
        CUDA(cudaEventSynchronize(done[i % UNDERWAY]));
        return host_ids[i % UNIFORMS];
    }
};
