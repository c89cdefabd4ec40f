// generate.cuh: sampling text, for train_mamba2.cu.
//
// The prompt, but for its last token, goes through the parallel form, in pieces. From there on each
// token is one step of the recurrence: a kernel (token.cuh), as a CUDA graph. The GPU runs ahead of
// what is printed, by UNDERWAY tokens.
#include "token.cuh"

constexpr int UNDERWAY = 4, UNIFORMS = 256;
static int sums_at_once = 4096;            // of chunks in shared memory, for the head (tests: less)

// past (L,W-1,S) into the rings (L,W,pitch) of the token at time W
template<typename floatX>
__global__ void __launch_bounds__(256)
fill_rings_kernel(float *rings, const floatX *past, Dims d) {
    size_t l = blockIdx.y, i = blockIdx.x * (size_t)256 + threadIdx.x, k = i / d.S, c = i % d.S;
    if (k + 1 >= d.W) return;
    send(rings + (l * d.W + k + 1) * d.pitch + d.E + c, past[(l * (d.W - 1) + k) * d.S + c], 0);
}

template<class Model>
struct Sampler {
    typedef typename Model::floatX floatX;
    cpu::Model view;                       // one row of at most `most` tokens
    Model m;
    size_t most;
    Token<floatX> t;
    size_t shared;                         // memory of the kernel
    int blocks;
    bool wide;
    float *host_logits;                    // (V)
    double *uniforms;                      // (UNIFORMS)
    cudaGraphExec_t graph;
    cudaEvent_t done[UNDERWAY];

    Sampler(const Model *trained, const cpu::Model *host, size_t most)
        : m(*trained), most(most), uniforms(NULL), graph(NULL) {
        memset(&view, 0, sizeof view);
        view.d = host->d;
        view.d.Q = 128;
        cpu::dims_batch(&view.d, 1, most);
        view.d.lanes = view.d.kept = 1;
        open_acts(&m, &view);
        host_logits = (float *)cpu::alloc(m.d.V, sizeof(float));
        for (cudaEvent_t &event : done) {
            CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        }
    }
    ~Sampler() {
        CUDA(cudaStreamSynchronize(stream));
        close_acts(&m);
        void *buffers[] = {t.resid, t.rings, t.v, t.ab, t.logits, t.tops, t.sums, t.step, uniforms};
        for (void *p : buffers) {
            CUDA(cudaFree(p));
        }
        CUDA(cudaFreeHost(t.ids));
        free(host_logits);
        for (cudaEvent_t event : done) {
            CUDA(cudaEventDestroy(event));
        }
        if (graph) CUDA(cudaGraphExecDestroy(graph));
    }
    const floatX *head() const { return view.d.tied ? m.x.embedding : m.x.lm_head; }

    static float *sent(size_t count) {     // of round 0
        float *x = device_alloc<float>(count);
        CUDA(cudaMemsetAsync(x, 0, count * sizeof(float), stream));
        return x;
    }
    void open_token() {                    // when the prompt is in the states
        const Dims &d = m.d;
        int M = (int)d.M, F = (int)d.F, parts = sums_at_once, inputs = 0;
        blocks = (int)min(multiprocessors(), min(min(d.Z, d.V), F ? 2 * d.F : d.V));
        t.d = d;
        t.L = (int)d.L, t.E = (int)d.E, t.H = (int)d.H, t.P = (int)d.P, t.N = (int)d.N;
        t.G = (int)d.G, t.S = (int)d.S, t.W = (int)d.W, t.pitch = (int)d.pitch;
        t.kinds = F ? 4 : 2;
        t.embedding = m.w.embedding, t.conv_w = m.w.conv_w, t.conv_b = m.w.conv_b;
        t.dt_bias = m.w.dt_bias, t.A_log = m.w.A_log, t.D = m.w.D;
        t.matrix[IN_PROJ] = {m.x.in_proj, m.w.norm, t.L, (int)d.Z, M, 1};
        t.matrix[OUT_PROJ] = {m.x.out_proj, m.w.norm_g, t.L, M, t.E, t.G};
        t.matrix[FC1] = {m.x.fc1, m.w.norm2, t.L, 2 * F, M, 1};
        t.matrix[FC2] = {m.x.fc2, m.w.norm2, t.L, M, F, 1};
        t.matrix[HEAD] = {head(), m.w.norm_f, 1, (int)d.V, M, 1};
        int lane = 16 / sizeof(floatX), chunk = 32 * lane;
        wide = t.P % 4 == 0;
        for (Matrix<floatX> &a : t.matrix) {
            a.width = a.I / a.groups;
            a.padded = (int)round_up(a.width, chunk);
            a.total = a.layers * a.O;
            int chunks = a.groups * a.padded / chunk;
            if (&a == &t.matrix[HEAD]) {   // in slabs, if its sums would take too much room
                a.layers = pieces(round_up(pieces(a.O, blocks), 4) * chunks, parts);
                a.O = pieces(a.O, a.layers);
            }
            a.rows = pieces(a.O, blocks);
            a.sweep = (int)round_up(a.rows, 4);
            wide = wide && a.I % lane == 0 && a.width % 4 == 0;
            inputs = max(inputs, a.groups * a.padded);
            parts = max(parts, a.sweep * chunks);
        }
        for (t.columns = 16; t.columns < UNIT_COLUMNS; t.columns *= 2) {   // a unit for each block
            if ((int)pieces(t.P, t.columns) * t.H <= blocks) break;
        }
        t.slices = pieces(t.P, t.columns);
        t.units = t.slices * t.H;
        t.inputs = inputs;
        t.parts = parts;
        size_t entries = round_up(2 * (t.columns + t.N) + 1, 4);
        size_t floats = inputs + inputs / 128 + parts + t.G + 3 * entries + t.matrix[OUT_PROJ].rows;
        size_t piece = 4 * TOKEN_THREADS * 16, room = shared_room() - 6144;
        size_t fixed = floats * sizeof(float) +
                       MATRICES * TOKEN_WARPS * sizeof(typename Worker<true, floatX>::Share);
        CHECK(fixed + 2 * piece <= room, "the model is too wide to generate on this GPU");
        t.depth = (int)min((size_t)6, (room - fixed) / piece);
        t.low = t.depth > 4 ? 4 : 2;
        shared = fixed + t.depth * piece;

        t.resid = sent(d.M);
        t.rings = sent(d.L * d.W * d.pitch);
        t.v = sent(d.E);
        t.ab = sent(2 * d.F);
        t.logits = sent(d.V);
        t.tops = sent(blocks);
        t.sums = sent(blocks * t.matrix[HEAD].layers);
        t.state = m.a.carried;
        t.step = device_alloc<Step>(1);
        uniforms = device_alloc<double>(UNIFORMS);
        CUDA(cudaMallocHost(&t.ids, UNIFORMS * sizeof(int)));
        t.uniforms = uniforms;
        t.count = UNIFORMS;
        t.vocab = (int)view.d.vocab;
        t.temperature = (float)cpu::flags.temperature;
        const float *small[] = {m.w.norm, m.w.norm_g, m.w.norm2, m.w.conv_w, m.w.conv_b,
                                m.w.dt_bias, m.w.A_log, m.w.D, t.rings, t.state};
        int sizes[] = {M, t.E, F ? M : 0, t.S * t.W, t.S, t.H, t.H, t.H, t.W * t.pitch, t.E * t.N};
        for (int k = 0; k < SMALL; k++) {
            t.small[k] = {small[k], sizes[k]};
        }
    }

    // Takes in the prompt but for its last token, from which the first step goes on.
    void feed(const int *tokens, size_t count) {
        for (size_t i = 0; i < count - 1; i += most) {
            cpu::dims_batch(&view.d, 1, min(count - 1 - i, most));
            view.ids = tokens + i;
            take_batch(&m);
            model_hidden(&m);
            swap_states(&m);
        }
        const Dims *d = &m.d;
        open_token();
        dim3 grid(pieces((d->W - 1) * d->S, 256), (unsigned)d->L);
        if (d->W > 1) fill_rings_kernel<floatX><<<grid, 256, 0, stream>>>(t.rings, m.a.past, *d);
        Step start = {tokens[count - 1], (int)d->W, 0};
        CUDA(cudaMemcpyAsync(t.step, &start, sizeof start, cudaMemcpyHostToDevice, stream));
    }

    void token() {                         // from step->id to the next
        auto kernel = wide ? token_kernel<true, floatX> : token_kernel<false, floatX>;
        allow_shared(kernel, shared);
        launch_together(kernel, blocks, TOKEN_THREADS, shared, t);
    }

    // Issues token i.
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
        if (!graph) graph = capture([&] { token(); });
        CUDA(cudaGraphLaunch(graph, stream));
        if (f.temperature > 0 && (f.top_k || f.top_p < 1)) {           // sorts: on the host
            double uniform = cpu::random_uniform((uint64_t)f.seed, stream_of, (uint64_t)i);
            download(host_logits, t.logits, 1, m.d.V, m.d.V);
            int id = cpu::sample(host_logits, view.d.vocab, f.temperature, f.top_k, f.top_p,
                                 uniform);
            CUDA(cudaMemcpy(&t.step->id, &id, sizeof id, cudaMemcpyHostToDevice));
            t.ids[slot] = id;
        }
        CUDA(cudaEventRecord(done[i % UNDERWAY], stream));
    }
    int wait(cpu::Int i) {
        CUDA(cudaEventSynchronize(done[i % UNDERWAY]));
        return t.ids[i % UNIFORMS];
    }
};
