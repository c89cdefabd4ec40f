// batch.cuh: sampling many texts at once, for train_mamba2.cu.
//
// A step is the forward pass of training, for R rows of one token, with the convolution and SSD as
// steps of the recurrence; then each row chooses its next token. All of it is a CUDA graph.

// to (L,R,count), each row of a layer the one in from (L,count)
template<typename X>
__global__ void __launch_bounds__(256) spread_kernel(X *to, const X *from, size_t count) {
    size_t i = blockIdx.x * (size_t)256 + threadIdx.x, r = blockIdx.y, l = blockIdx.z;
    if (i < count) to[(l * gridDim.y + r) * count + i] = from[l * count + i];
}
template<typename X>
static void spread(X *to, const X *from, size_t count, const Dims &d) {
    if (!count) return;
    dim3 grid(pieces(count, 256), (unsigned)d.R, (unsigned)d.L);
    spread_kernel<X><<<grid, 256, 0, stream>>>(to, from, count);
    LAUNCHED();
}

template<class Model>
struct Batch : Draws {
    const Model *trained;
    const cpu::Model *host;
    cpu::Model view = {};                  // R rows of one token
    Model m;
    float *logits;                         // (R,V)

    Batch(const Model *trained, const cpu::Model *host, size_t R)
        : Draws(R, *host), trained(trained), host(host), m(*trained) {
        view.d = host->d;
        view.recurrent = 1;
        view.d.Q = 128;
        cpu::dims_batch(&view.d, R, 1);
        view.d.kept = 1;
        view.d.lanes = R;
        open_acts(&m, &view);
        CUDA(cudaFree(m.acts.carried_new));                // states are updated in place
        m.acts.carried_new = NULL;
        logits = device_alloc<float>(R * m.d.V);
    }
    ~Batch() {
        CUDA(cudaStreamSynchronize(stream));
        close_acts(&m);
        CUDA(cudaFree(logits));
    }

    // Takes in the prompt but for its last token, from which all rows go on.
    void feed(const int *tokens, size_t count) {
        Prompt<Model> prompt(trained, host, count);
        prompt.read(tokens, count - 1);
        spread(m.a.past, prompt.m.a.past, (m.d.W - 1) * m.d.S, m.d);
        spread(m.a.carried, prompt.m.a.carried, m.d.E * m.d.N, m.d);
        std::vector<int> last(m.d.R, tokens[count - 1]);
        CUDA(cudaMemcpyAsync(m.ids, last.data(), last.size() * sizeof(int),
                             cudaMemcpyHostToDevice, stream));
    }
    void step() {                          // from m.ids to the next
        const Dims &d = m.d;
        const auto *head = view.d.tied ? m.x.embedding : m.x.lm_head;
        model_hidden(&m);
        linear_forward(logits, m.a.hidden, head, d.R, d.M, d.V, 0);
        choose(m.ids, logits, d.V);
    }
    void issue(cpu::Int i, uint64_t stream_of) {           // token i of each row
        draw(i, stream_of, [&] { step(); });
    }
};
