// choose.cuh: the next token of each row from its logits, as cpu::sample, for train_mamba2.cu.
constexpr int UNIFORMS = 256;              // of a row, on the device at a time

struct Choice {
    int vocab;
    float temperature;
    cpu::Int top_k;
    double top_p;
};

// Floats as integers of the same order
__device__ inline unsigned order_of(float x) {
    unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

constexpr int CHOOSER_THREADS = 1024, CHOOSER_WARPS = CHOOSER_THREADS / 32;

struct Chooser {                           // a block
    const float *logits;
    int vocab;
    float (*work)[32];                     // [2], in shared memory, used in turns
    float top = -INFINITY, colder = 1.0f;
    int turn = 0;

    template<class F> __device__ void each(F f) const {
        for (int i = threadIdx.x; i < vocab; i += CHOOSER_THREADS) {
            f(i, logits[i]);
        }
    }
    __device__ float likelihood(float logit) const { return expf((logit - top) * colder); }

    __device__ float largest(float mine) { return block_max(mine, work[turn++ % 2]); }
    template<class F> __device__ float sum_from(unsigned least, F weight) {
        float sum = 0.0f;
        each([&](int, float logit) {
            if (order_of(logit) >= least) sum += weight(logit);
        });
        return block_sum(sum, work[turn++ % 2]);
    }
    // Without sorting: bit by bit, the greatest logit with which the sum of the weights, over all
    // that are not less, passes the target. What is below `least` weighs nothing.
    template<class F> __device__ unsigned find(double target, unsigned least, F weight) {
        unsigned found = 0;
        for (unsigned bit = 1u << 31; bit; bit /= 2) {
            if (sum_from(max(found | bit, least), weight) > target) found |= bit;
        }
        return found;
    }
    __device__ int first_id(unsigned order) {              // of that logit
        float id = 1.0f - vocab;                           // minus the id; the last one for NaN
        each([&](int i, float logit) {
            if (order_of(logit) == order) id = max(id, -(float)i);
        });
        return (int)-largest(id);
    }
    // The id at which the sum of the likelihoods from 0 on passes u of the whole: in which of 32
    // spans of ids is it, one to a warp, then in which 32nd of that, and so on?
    __device__ int first_past(double u) {
        __shared__ double sums[CHOOSER_WARPS];
        int first = 0, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        double before = 0.0, target = 0.0;
        for (int size = vocab, span; size > 1; size = span) {
            span = (size + CHOOSER_WARPS - 1) / CHOOSER_WARPS;
            int end = min(first + min((warp + 1) * span, size), vocab);
            double sum = 0.0;
            for (int i = first + warp * span + lane; i < end; i += 32) {
                sum += likelihood(logits[i]);
            }
            sum = warp_sum(sum);
            __syncthreads();
            if (lane == 0) sums[warp] = sum;
            __syncthreads();
            for (int w = 0; w < CHOOSER_WARPS && size == vocab; w++) {
                target += u * sums[w];
            }
            int w = 0;
            while (w < CHOOSER_WARPS - 1 && before + sums[w] <= target) {
                before += sums[w++];
            }
            first = min(first + w * span, vocab - 1);
        }
        return first;
    }
    __device__ int choose(const Choice &c, double u) {
        each([&](int, float logit) { top = max(top, logit); });
        top = largest(top);
        if (c.temperature <= 0.0f) return first_id(order_of(top));
        colder = 1.0f / c.temperature;
        if (!c.top_k && c.top_p >= 1.0) return first_past(u);
        auto one = [](float) { return 1.0f; };
        auto likely = [&](float logit) { return likelihood(logit); };
        unsigned least = 0;
        if (c.top_k && c.top_k < vocab) least = find((double)c.top_k - 1.0, 0, one);
        if (c.top_p < 1.0) {
            least = max(least, find(c.top_p * sum_from(least, likely), least, likely));
        }
        return first_id(find(u * sum_from(least, likely), least, likely));
    }
};
// A row to a block. ids (rows) is the next input, shown (UNIFORMS,rows) is on the host; drawn (rows)
// counts tokens.
__global__ void __launch_bounds__(CHOOSER_THREADS)
choose_kernel(int *ids, int *shown, int *drawn, const float *logits, const double *uniforms,
              Choice choice, size_t V) {
    __shared__ float work[2][32];
    int row = blockIdx.x, slot = drawn[row] % UNIFORMS * gridDim.x + row;
    Chooser chooser = {logits + row * V, choice.vocab, work};
    int id = chooser.choose(choice, uniforms[slot]);
    __syncthreads();                       // all have read drawn
    if (threadIdx.x > 0) return;
    ids[row] = shown[slot] = id;
    drawn[row]++;
}
