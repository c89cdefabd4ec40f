// generate.cuh: sampling text, for train_mamba2.cu.
//
// The prompt, but for its last token, goes through the parallel form, in pieces. From there on each
// token is one step of the recurrence, as a CUDA graph: for one text a kernel (token.cuh), for many
// the layers of training with a row to each text (batch.cuh). The GPU runs ahead of what is printed,
// by UNDERWAY tokens.
#include "choose.cuh"
#include "token.cuh"

constexpr int UNDERWAY = 4;
static int sums_at_once = 4096;            // of chunks in shared memory, for the head (tests: less)

// past (L,W-1,S) into the rings (L,W,pitch) of the token at time W
template<typename floatX>
__global__ void __launch_bounds__(256)
fill_rings_kernel(float *rings, const floatX *past, Dims d) {
    size_t l = blockIdx.y, i = blockIdx.x * (size_t)256 + threadIdx.x, k = i / d.S, c = i % d.S;
    if (k + 1 >= d.W) return;
    send(rings + (l * d.W + k + 1) * d.pitch + d.E + c, past[(l * (d.W - 1) + k) * d.S + c], 0);
}

// Drawing tokens for rows: random numbers go to the device in time, ids come back.
struct Draws {
    size_t rows;
    int *ids, *drawn;                      // (UNIFORMS,rows), on the host; (rows)
    double *uniforms;                      // (UNIFORMS,rows)
    Choice choice;
    cudaGraphExec_t graph = NULL;
    cudaEvent_t done[UNDERWAY];

    Draws(size_t rows, const cpu::Model &host) : rows(rows) {
        const cpu::Flags &f = cpu::flags;
        CUDA(cudaMallocHost(&ids, UNIFORMS * rows * sizeof(int)));
        uniforms = device_alloc<double>(UNIFORMS * rows);
        drawn = device_alloc<int>(rows);
        CUDA(cudaMemsetAsync(drawn, 0, rows * sizeof(int), stream));
        choice = {(int)host.d.vocab, (float)f.temperature, f.top_k, f.top_p};
        for (cudaEvent_t &event : done) {
            CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        }
    }
    ~Draws() {
        CUDA(cudaStreamSynchronize(stream));
        CUDA(cudaFreeHost(ids));
        CUDA(cudaFree(uniforms));
        CUDA(cudaFree(drawn));
        for (cudaEvent_t event : done) {
            CUDA(cudaEventDestroy(event));
        }
        if (graph) CUDA(cudaGraphExecDestroy(graph));
    }
    // The next id of each row, from logits (rows,V), to `next` and to the host
    void choose(int *next, const float *logits, size_t V) {
        choose_kernel<<<(unsigned)rows, CHOOSER_THREADS, 0, stream>>>(next, ids, drawn, logits,
                                                                      uniforms, choice, V);
        LAUNCHED();
    }
    // Issues token i of each row; row r has the random numbers of stream_of + r. The first step
    // leaves plans of matrix products behind, which could not be made in a capture.
    template<class F> void draw(cpu::Int i, uint64_t stream_of, F step) {
        std::vector<double> u(i % UNIFORMS ? 0 : UNIFORMS * rows);
        for (size_t k = 0; k < u.size(); k++) {
            u[k] = cpu::random_uniform((uint64_t)cpu::flags.seed, stream_of + k % rows,
                                       (uint64_t)i + k / rows);
        }
        if (!u.empty()) {
            CUDA(cudaMemcpyAsync(uniforms, u.data(), u.size() * sizeof(double),
                                 cudaMemcpyHostToDevice, stream));
        }
        bool by_hand = i == 0 || !cpu::flags.graph;
        if (by_hand) step();
        else if (!graph) graph = capture(step);
        if (!by_hand) CUDA(cudaGraphLaunch(graph, stream));
        CUDA(cudaEventRecord(done[i % UNDERWAY], stream));
    }
    const int *wait(cpu::Int i) {          // ids (rows)
        CUDA(cudaEventSynchronize(done[i % UNDERWAY]));
        return ids + i % UNIFORMS * rows;
    }
};

template<class Model>
struct Prompt {                            // reads it
    cpu::Model view = {};                  // one row of at most `most` tokens
    Model m;
    size_t most;

    Prompt(const Model *trained, const cpu::Model *host, size_t size)
        : m(*trained), most(min(size, (size_t)256)) {
        view.d = host->d;
        view.d.Q = 128;
        cpu::dims_batch(&view.d, 1, most);
        view.d.lanes = view.d.kept = 1;
        open_acts(&m, &view);
    }
    ~Prompt() {
        CUDA(cudaStreamSynchronize(stream));
        close_acts(&m);
    }
    void read(const int *tokens, size_t count) {           // into past and carried
        for (size_t i = 0; i < count; i += most) {
            cpu::dims_batch(&view.d, 1, min(count - i, most));
            view.ids = tokens + i;
            take_batch(&m);
            model_hidden(&m);
            swap_states(&m);
        }
    }
};

template<class Model>
struct Sampler : Draws, Prompt<Model> {    // one row
    typedef typename Model::floatX floatX;
    using Prompt<Model>::view, Prompt<Model>::m, Prompt<Model>::read;
    Token<floatX> t;
    size_t shared;                         // memory of the kernel
    int blocks;
    bool wide;

    Sampler(const Model *trained, const cpu::Model *host, size_t size)
        : Draws(1, *host), Prompt<Model>(trained, host, size) {}
    ~Sampler() {
        CUDA(cudaStreamSynchronize(stream));
        void *buffers[] = {t.resid, t.rings, t.v, t.ab, t.logits, t.tops, t.sums, t.step};
        for (void *p : buffers) {
            CUDA(cudaFree(p));
        }
    }

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
        t.matrix[HEAD] = {view.d.tied ? m.x.embedding : m.x.lm_head, m.w.norm_f, 1, (int)d.V, M, 1};
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
        t.ids = ids;
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
        read(tokens, count - 1);
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
        bool cut = choice.top_k || choice.top_p < 1;       // which the kernel leaves to choose()
        if (cut && choice.temperature > 0) choose(&t.step->id, t.logits, m.d.V);
    }
    void issue(cpu::Int i, uint64_t stream_of) {           // token i
        draw(i, stream_of, [&] { token(); });
    }
};
