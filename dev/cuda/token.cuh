// token.cuh: the next token, by one kernel, for generate.cuh.
//
// To generate at batch 1 is to read all weights once a token. The kernel has a block on each
// multiprocessor; each matrix is dealt out to the blocks by rows.
//   product     zxBCdt = in_proj rmsnorm(resid)
//   recurrence  conv1d, dt, the recurrence itself, v = y silu(z)
//   product     resid += out_proj (norm_g v^), and the MLP's fc1 and fc2 likewise
//   product     logits = head rmsnorm(resid), at last; then choose: the next token
// Worker::run is this list; what it calls follows in its order, the stream of weights first.
//
// Blocks hear of each other's results by send and receive (ptx.cuh), and each waits for just the
// numbers that it needs. None is sent again before all have read it: who sends the next ones has
// waited for results of all that did. Every block has rows of all matrices that resid goes into, so
// that it misses no round of resid.
// Weights depend on nothing: each lane knows all the vectors that it will need in this token, and
// has the next ones on their way into shared memory while its block computes or waits. What can be
// done before an input is there is done before the wait for it.
// Activations are in float. zxBCdt is a ring of the last W rows, in which the convolution finds its
// inputs.

// What changes from token to token, on the device, so that a CUDA graph can be used again
struct Step {
    int id, time, sampled;                 // the token; its row is time % W; of the uniforms
};

constexpr int TOKEN_THREADS = 512, TOKEN_WARPS = TOKEN_THREADS / 32, SMALL = 10;
constexpr int UNIT_COLUMNS = 64;           // of a unit of the recurrence
enum { IN_PROJ, OUT_PROJ, FC1, FC2, HEAD, MATRICES };

// The matrices of one kind: weight (layers,O,I). The head's layers are slabs of its rows. A block
// has `rows` of them, in pieces: 4 rows of a chunk, which is one vector for each lane of a warp.
template<typename floatX>
struct Matrix {
    const floatX *weight;
    const float *norm;                     // (layers,I) for the input; of FC2 none: SwiGLU of (2I)
    int layers, O, I, groups;              // the norm is of groups of `width` columns
    int total = 0, rows = 0, sweep = 0;    // rows of all layers; of a block; the same in fours
    int width = 0, padded = 0;             // columns of a group, and in whole chunks
};

template<typename floatX>
struct Token {                             // all that the kernel needs
    Dims d = Dims(cpu::Dims());
    Matrix<floatX> matrix[MATRICES];
    int L, E, H, P, N, G, S, W, pitch;     // of d, in 32 bits
    int kinds;                             // of matrices in a layer: 4 with an MLP, else 2
    int columns, slices, units;            // of a unit of the recurrence; units of a head, of all
    const float *embedding, *conv_w, *conv_b, *dt_bias, *A_log, *D;
    struct { const float *tensor; int size; } small[SMALL];        // (L,size): to prefetch
    float *state;                          // (L,H,N,P)
    float *resid, *rings, *v, *ab;         // sent: (M), (L,W,pitch), (E), (2F),
    float *logits, *tops, *sums;           // (V), (blocks), (slabs,blocks)
    Step *step;
    const double *uniforms;                // (count)
    int *ids, count, vocab;                // ids (count): on the host
    float temperature;
    int inputs, parts;                     // shared memory for x and part
    int depth, low;                        // pieces that a warp has on their way: at most, at least
};

// The sums of four numbers over a warp: lane l gets that of number l / 8.
__device__ inline float sum_of_four(const float x[4]) {
    bool high = threadIdx.x & 16, odd = threadIdx.x & 8;
    float a = (high ? x[2] : x[0]) + __shfl_xor_sync(~0u, high ? x[0] : x[2], 16);
    float b = (high ? x[3] : x[1]) + __shfl_xor_sync(~0u, high ? x[1] : x[3], 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
    UNROLL for (int lanes = 4; lanes; lanes /= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
    }
    return sum;
}
__device__ inline float element(const Packed<float, 4> &v, int i) {
    return __uint_as_float((&v.words[0].x)[i]);
}
__device__ inline float element(const Packed<bf16, 8> &v, int i) {
    uint32_t pair = (&v.words[0].x)[i / 2];
    return __uint_as_float(i % 2 ? pair & 0xffff0000 : pair << 16);
}

template<bool WIDE, typename floatX>
struct Worker {                            // a block
    static constexpr int LANE = 16 / sizeof(floatX), CHUNK = 32 * LANE, SLICE = 128;
    static constexpr int ROUNDS = 4, NORMS = 2;            // vectors of 4 in registers, of a thread
    typedef Packed<floatX, LANE> Vector;
    struct Share {                         // of a warp in a matrix: a stretch of the block's pieces
        const floatX *from;                // in layer 0, the first one
        size_t stride;                     // to the next layer
        int count, chunk, row, column;     // how many there are; where the first one is
        int start, rows;                   // the block's rows
        int I, sweep, width, padded;       // as in Matrix
    };
    const Token<floatX> &t;
    // in shared memory
    Vector *ring;                          // (depth,4,TOKEN_THREADS)
    Share (*shares)[TOKEN_WARPS];
    float *x, *part;                       // input of a product; sums of chunks (chunks,sweep)
    float *squares, *scale;                // of x: in slices of 128 columns; by groups
    float *resid;                          // of this block's rows
    float *xBC, *last;                     // of the recurrence: its entries
    int *places;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, me = blockIdx.x;
    Step now;                              // read before any block can write the next one

    __device__ Worker(const Token<floatX> &t, char *memory) : t(t), now(*t.step) {
        ring = (Vector *)memory + threadIdx.x;
        shares = (Share (*)[TOKEN_WARPS])(memory + t.depth * 4 * TOKEN_THREADS * sizeof(Vector));
        x = (float *)(shares + MATRICES), part = x + t.inputs;
        xBC = part + t.parts, last = xBC + entries(), places = (int *)(last + entries());
        squares = (float *)(places + entries()), scale = squares + t.inputs / SLICE;
        resid = scale + t.G;
    }

    // ---- the token: all that a block does ----
    __device__ void run() {
        int token = now.time - t.W, turn = now.time / t.W, newest = now.time - turn * t.W;
        unsigned vs = token * t.L, resids = token * (t.L * t.kinds / 2 + 1) + 1;       // rounds
        int warps = MATRICES * TOKEN_WARPS;
        if ((int)threadIdx.x < warps) deal(threadIdx.x / TOKEN_WARPS, threadIdx.x % TOKEN_WARPS);
        __syncthreads();
        int first = shares[OUT_PROJ][0].start;
        for (int r = threadIdx.x; r < shares[OUT_PROJ][0].rows; r += TOKEN_THREADS) {
            resid[r] = t.embedding[now.id * t.d.M + first + r];
            send(t.resid + first + r, resid[r], resids);
        }
        prefetch(0);
        while (ahead < t.depth) ask();
        auto add = [&](int r, float sum) {
            resid[r] += sum;
            send(t.resid + first + r, resid[r], resids);
        };
        for (int l = 0; l < t.L; l++) {
            const float *ring = t.rings + (size_t)l * t.W * t.pitch;
            float *z = (float *)ring + newest * t.pitch + shares[IN_PROJ][0].start;
            prefetch(l + 1);
            prepare(l, ring, newest, me);
            product<IN_PROJ>(l, t.resid, resids, [&](int r, float sum) { send(z + r, sum, turn); });
            recurrence(l, ring, newest, turn, ++vs);
            resids++;
            product<OUT_PROJ>(l, t.v, vs, add);
            if (t.kinds == 2) continue;
            float *ab = t.ab + shares[FC1][0].start;
            product<FC1>(l, t.resid, resids, [&](int r, float sum) { send(ab + r, sum, vs); });
            resids++;
            product<FC2>(l, t.ab, vs, add);
        }
        float best = -FLT_MAX;
        for (int slab = 0; slab < t.matrix[HEAD].layers; slab++) {
            int at = first_of(slab);
            product<HEAD>(slab, t.resid, resids, [&](int r, float sum) {
                if (at + r < t.vocab) best = max(best, sum);
                send(t.logits + at + r, sum, token + 1);
            });
        }
        cp_async_wait<0>();
        choose(best, token + 1);
    }

    // ---- the stream of weights ----
    int ahead = 0, put = 0, get = 0;       // pieces asked for and not taken; places in the ring
    int kind = -1, layer = 0, left = 0;    // of what will be asked for next
    int row = 0, end = 0, column = 0, I = 0, sweep = 0, width = 0, padded = 0;
    const floatX *from = NULL;

    __device__ int rows_of(int kind, int layer) const {    // of this block
        const Share &share = shares[kind][0];
        const Matrix<floatX> &m = t.matrix[kind];
        return min(share.rows, m.total - layer * m.O - share.start);
    }
    __device__ void deal(int kind, int warp) {
        const Matrix<floatX> &m = t.matrix[kind];
        int fours = m.sweep / 4, count = fours * (m.groups * m.padded / CHUNK);
        int each = pieces(count, TOKEN_WARPS), first = min(warp * each, count);
        int chunk = fours ? first / fours : 0, row = first * 4 - chunk * m.sweep;
        int group = m.padded ? chunk * CHUNK / m.padded : 0;
        int column = chunk * CHUNK - group * m.padded;
        int start = m.O * me / (int)gridDim.x, end = m.O * (me + 1) / (int)gridDim.x;
        size_t at = (size_t)(start + row) * m.I + group * m.width + column;
        shares[kind][warp] = {m.weight + at, (size_t)m.O * m.I, min(each, count - first), chunk,
                              row, column, start, end - start, m.I, m.sweep, m.width, m.padded};
    }
    __device__ void aim() {                // at the next matrix, when this one has been asked for
        while (!left && (kind != HEAD || layer < t.matrix[HEAD].layers)) {
            if (kind == HEAD) layer++;
            else if (++kind == t.kinds) kind = 0, layer++;
            if (kind < HEAD && layer == t.L) kind = HEAD, layer = 0;
            const Share &share = shares[kind][warp];
            end = kind < HEAD ? share.rows : rows_of(HEAD, layer);
            left = end > 0 ? share.count : 0;
            row = share.row, column = share.column + lane * LANE;
            from = share.from + layer * share.stride + lane * LANE;
            I = share.I, sweep = share.sweep, width = share.width, padded = share.padded;
        }
    }
    __device__ void ask() {
        if (ahead == t.depth) return;
        aim();
        Vector *to = ring + put * 4 * TOKEN_THREADS;
        UNROLL for (int k = 0; k < 4; k++) {
            bool valid = left && row + k < end && column < width;
            if (WIDE) cp_async<16>(to + k * TOKEN_THREADS, from + k * I, valid);
            else to[k * TOKEN_THREADS] = fetch<false, LANE>(from + k * I - column, column,
                                                            valid ? width : 0);
        }
        cp_async_commit();
        put = put + 1 < t.depth ? put + 1 : 0;
        ahead++;
        left = max(left - 1, 0);
        row += 4, from += 4 * I;
        if (row < sweep) return;
        row = 0, column += CHUNK, from += CHUNK - sweep * I;
        if (column >= padded) column -= padded, from += width - padded;
    }
    // sums += the oldest piece times what x has for it: 4 columns and, in bf16, 4 more `half` after
    __device__ void take(const float *x, int half, float sums[4]) {
        float4 a = *(const float4 *)x, b = *(const float4 *)(LANE == 8 ? x + half : x);
        float xs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        t.low == 4 ? cp_async_wait<3>() : cp_async_wait<1>();
        UNROLL for (int k = 0; k < 4; k++) {
            Vector w = ring[(get * 4 + k) * TOKEN_THREADS];
            UNROLL for (int i = 0; i < LANE; i++) {
                sums[k] += element(w, i) * xs[i];
            }
        }
        get = get + 1 < t.depth ? get + 1 : 0;
        ahead--;
    }

    // ---- out(row, weight x): x is in, RMS-normed by groups, times norm; or SwiGLU of in ----
    __device__ VecOf<4> received(const float *in, int c, int columns, unsigned round) const {
        VecOf<4> x = {};
        if (WIDE && c < columns) {
            float4 four = receive4(in + c, round);
            x = {four.x, four.y, four.z, four.w};
        }
        UNROLL for (int i = 0; i < 4 && !WIDE; i++) {
            if (c + i < columns) x.v[i] = receive(in + c + i, round);
        }
        return x;
    }
    template<int KIND, class Out>
    __device__ void product(int layer, const float *in, unsigned round, Out out) {
        constexpr bool NORM = KIND != FC2;
        const Matrix<floatX> &m = t.matrix[KIND];
        const Share &share = shares[KIND][warp];
        int rows = KIND == HEAD ? rows_of(HEAD, layer) : share.rows;
        int all = m.groups * m.padded, slices = m.padded / SLICE, chunks = m.padded / CHUNK;
        if (rows <= 0) return;
        const float *norm = m.norm + (KIND == HEAD ? 0 : layer * m.I);
        auto group_of = [&](int c) { return KIND == OUT_PROJ && m.groups > 1 ? c / m.padded : 0; };
        for (int c0 = threadIdx.x * 4; c0 < all; c0 += NORMS * TOKEN_THREADS * 4) {
            VecOf<4> norms[NORMS];
            UNROLL for (int k = 0, c = c0; k < NORMS && NORM; k++, c += TOKEN_THREADS * 4) {
                int g = group_of(c), column = c - g * m.padded;
                if (c < all) norms[k] = load<WIDE, 4>(norm + g * m.width, column, m.width);
            }
            aim();
            UNROLL for (int k = 0, c = c0; k < NORMS; k++, c += TOKEN_THREADS * 4) {
                if (c >= all) break;
                int g = group_of(c), column = c - g * m.padded;
                VecOf<4> a = received(in + g * m.width, column, m.width, round), b = norms[k];
                if (!NORM) b = received(in + m.I, column, m.width, round);
                float square = 0.0f;
                UNROLL for (int i = 0; i < 4; i++) {
                    square += a.v[i] * a.v[i];
                    a.v[i] *= NORM ? b.v[i] : b.v[i] * sigmoid<floatX>(b.v[i]);
                }
                // columns 8i..8i+3 of all i are together, and so are 8i+4..8i+7 (in float, all):
                // a warp reads neighbours, without bank conflicts
                store<true>(x + c / LANE * 4 + c % LANE / 4 * (all / LANE * 4), 0, 4, a);
                square = warp_sum(square);
                if (lane == 0) squares[c / SLICE] = square;
            }
        }
        ask();                             // now: later it would be in the way of what blocks send
        __syncthreads();
        int group = TOKEN_THREADS - 1 - threadIdx.x;       // the last warp has least to do
        if (group < m.groups) {
            float sum = 0.0f;
            for (int i = 0; i < slices; i++) {
                sum += squares[group * slices + i];
            }
            scale[group] = NORM ? 1.0f / sqrtf(sum / m.width + t.d.eps) : 1.0f;
        }
        float *to = part + share.chunk * m.sweep + share.row;
        const float *from = x + (share.chunk * 32 + lane) * 4;
        for (int count = share.count, row = share.row; count > 0; count--, to += 4) {
            float sums[4] = {};
            take(from, all / 2, sums);
            if (ahead < t.low) ask();
            float sum = sum_of_four(sums);
            if (lane % 8 == 0) to[lane / 8] = sum;
            row += 4;
            if (row < m.sweep) continue;
            row = 0, from += 128;
        }
        __syncthreads();
        for (int row = threadIdx.x; row < rows; row += TOKEN_THREADS) {
            const float *of_chunk = part + row;
            float sum = 0.0f;
            for (int g = 0; g < m.groups; g++) {
                float of_group = 0.0f;
                _Pragma("unroll 4")
                for (int i = 0; i < chunks; i++, of_chunk += m.sweep) {
                    of_group += *of_chunk;
                }
                sum += scale[g] * of_group;
            }
            out(row, sum);
        }
    }

    // ---- columns of heads: v = y silu(z); the state is updated in place ----
    // A unit is up to `columns` columns of a head; units go to the blocks in turn. Of a row of
    // zxBCdt it needs as entries x (columns), B (N), C (N), z (columns) and dt. A thread has 4
    // columns of the state and every so many-th n, of which ROUNDS are on their way at once.
    int unit = -1, head = 0, first = 0;    // whose entries these are; its first column
    int quad = threadIdx.x % (t.columns / 4), slice = threadIdx.x / (t.columns / 4);
    VecOf<4> old[ROUNDS];

    __device__ int z_entry() const { return t.columns + 2 * t.N; }
    __device__ int entries() const { return (int)round_up(z_entry() + t.columns + 1, 4); }

    // Where the entries are in a row. Past the edge of a head, any will do.
    __device__ void find(int next) {
        int N = t.N, z = z_entry();
        unit = next;
        head = unit / t.slices;
        first = (unit - head * t.slices) * t.columns;
        int group = head / (t.H / t.G);
        for (int i = threadIdx.x; i <= z + t.columns; i += TOKEN_THREADS) {
            int edge = head * t.P + min(first + (i < z ? i : i - z), t.P - 1), n = i - t.columns;
            if (i < t.columns) places[i] = t.E + edge;
            else if (i < z) places[i] = 2 * t.E + group * N + (n < N ? n : n - N + t.G * N);
            else places[i] = i < z + t.columns ? edge : t.E + t.S + head;
        }
    }
    __device__ float *row_of_state(int layer, int n) const {
        return t.state + ((size_t)(layer * t.H + head) * t.N + n) * t.P;
    }
    __device__ void fetch_states(int layer, int n0) {
        int step = TOKEN_THREADS / (t.columns / 4), n = n0 + slice;
        UNROLL for (int k = 0; k < ROUNDS; k++, n += step) {
            if (n < t.N) old[k] = load<WIDE, 4>(row_of_state(layer, n), first + quad * 4, t.P);
        }
    }
    // All that does not wait for the new row. An entry of x, B or C starts as the convolution of
    // the old rows, with `last` the newest weight; z's have D, and dt's has A, with the bias.
    __device__ void prepare(int layer, const float *ring, int newest, int next) {
        int z = z_entry(), h;
        if (next >= t.units) return;
        if (next != unit) find(next);
        h = layer * t.H + head;
        fetch_states(layer, 0);
        for (int i = threadIdx.x; i <= z + t.columns; i += TOKEN_THREADS) {
            if (i >= z) {
                last[i] = i < z + t.columns ? t.D[h] : t.dt_bias[h];
                if (i == z + t.columns) xBC[i] = -expf(t.A_log[h]);
                continue;
            }
            int place = places[i], channel = layer * t.S + place - t.E, slot = newest;
            const float *w = t.conv_w + (size_t)channel * t.W;
            float sum = t.conv_b[channel], taps[3], olds[3];
            auto older = [&] {
                slot = slot + 1 < t.W ? slot + 1 : 0;
                return ring[slot * t.pitch + place];
            };
            UNROLL for (int k = 0; k < 3; k++) {           // from the oldest on: together, in one
                taps[k] = k + 1 < t.W ? w[k] : 0.0f;       // of the usual length
                olds[k] = k + 1 < t.W ? older() : 0.0f;
            }
            last[i] = w[t.W - 1];
            UNROLL for (int k = 0; k < 3; k++) {
                sum += taps[k] * olds[k];
            }
            for (int k = 3; k + 1 < t.W; k++) {
                sum += w[k] * older();
            }
            xBC[i] = sum;
        }
    }
    __device__ void recurrence(int layer, const float *ring, int newest, unsigned round,
                               unsigned sent) {
        __shared__ __align__(16) float sums[TOKEN_WARPS][UNIT_COLUMNS];
        int N = t.N, z = z_entry(), quads = t.columns / 4, step = TOKEN_THREADS / quads;
        const float *row = ring + newest * t.pitch;
        aim();
        for (int next = me; next < t.units; next += gridDim.x) {
            if (next != unit) prepare(layer, ring, newest, next);
            for (int i = threadIdx.x; i <= z + t.columns; i += TOKEN_THREADS) {
                float value = receive(row + places[i], round);
                if (i == z + t.columns) {                  // dt, and the decay
                    value = min(max(softplus(value + last[i]), t.d.dt_lo), t.d.dt_hi);
                    last[i] = expf(xBC[i] * value);
                } else {
                    if (i < z) value = xBC[i] + last[i] * value;
                    value *= sigmoid<floatX>(value);
                }
                xBC[i] = value;
            }
            ask();
            __syncthreads();
            float dt = xBC[z + t.columns], decay = last[z + t.columns], sum[4] = {};
            VecOf<4> x = load<true, 4>(xBC + quad * 4, 0, 4);
            for (int n0 = 0; n0 < N; n0 += ROUNDS * step) {
                if (n0 > 0) fetch_states(layer, n0);
                UNROLL for (int k = 0; k < ROUNDS; k++) {
                    int n = n0 + slice + k * step;
                    if (n >= N) break;
                    float input = dt * xBC[t.columns + n], output = xBC[t.columns + N + n];
                    UNROLL for (int i = 0; i < 4; i++) {
                        old[k].v[i] = decay * old[k].v[i] + input * x.v[i];
                        sum[i] += output * old[k].v[i];
                    }
                    store<WIDE>(row_of_state(layer, n), first + quad * 4, t.P, old[k]);
                }
            }
            for (int lanes = 16; lanes >= quads; lanes /= 2) {
                UNROLL for (int i = 0; i < 4; i++) {
                    sum[i] += __shfl_xor_sync(~0u, sum[i], lanes);
                }
            }
            if (lane < quads) memcpy(&sums[warp][quad * 4], sum, sizeof sum);
            __syncthreads();
            int i = threadIdx.x;
            if (i < t.columns && first + i < t.P) {
                float y = last[z] * xBC[i];
                UNROLL for (int w = 0; w < TOKEN_WARPS; w++) {
                    y += sums[w][i];
                }
                send(t.v + head * t.P + first + i, y * xBC[z + i], sent);
            }
            if (next + (int)gridDim.x < t.units) __syncthreads();
        }
    }
    // A layer's small tensors, and its states, into the L2 cache: a tensor a warp
    __device__ void prefetch(int layer) const {
        if (warp >= SMALL || layer == t.L) return;
        int size = t.small[warp].size;
        const float *tensor = t.small[warp].tensor + (size_t)layer * size;
        for (int i = (me * 32 + lane) * 32; i < size; i += gridDim.x * 32 * 32) {
            prefetch_line(tensor + i);
        }
    }

    // ---- the next token, as cpu::sample without top-k and top-p ----
    // The most likely one, the first of equals; or, at a temperature, that at which the sum of the
    // probabilities from 0 on passes u. The logits are in spans: the rows of a slab that a block
    // has. Each block finds out for itself in which span the token is.
    __device__ void choose(float best, unsigned round) {
        __shared__ float work[3][32];
        const Matrix<floatX> &m = t.matrix[HEAD];
        int blocks = gridDim.x, spans = m.layers * blocks;
        float top = -FLT_MAX, earlier = 0.0f;
        best = block_max(best, work[0]);
        __threadfence();                   // *t.step has been read; who chooses will write it
        if (threadIdx.x == 0) send(t.tops + me, best, round);
        for (int b = threadIdx.x; b < blocks; b += TOKEN_THREADS) {
            top = max(top, receive(t.tops + b, round));
        }
        __threadfence();
        top = block_max(top, work[1]);
        auto tokens_of = [&](int slab) {
            return min(rows_of(HEAD, slab), t.vocab - first_of(slab));
        };
        if (t.temperature <= 0.0f) {
            for (int b = threadIdx.x; b < me; b += TOKEN_THREADS) {
                if (receive(t.tops + b, round) == top) earlier = 1.0f;
            }
            earlier = block_max(earlier, work[2]);
            if (earlier > 0.0f || receive(t.tops + me, round) != top) return;
            float at = -FLT_MAX;           // minus the token's number
            for (int slab = 0; slab < m.layers; slab++) {
                for (int i = threadIdx.x; i < tokens_of(slab); i += TOKEN_THREADS) {
                    int token = first_of(slab) + i;
                    if (t.logits[token] == top) at = max(at, -(float)token);
                }
            }
            at = block_max(at, work[0]);
            if (threadIdx.x == 0) chosen(at > -FLT_MAX ? (int)-at : t.vocab - 1);
            return;
        }
        float colder = 1.0f / t.temperature;
        auto likelihood = [&](int token) { return expf((t.logits[token] - top) * colder); };
        for (int slab = 0; slab < m.layers; slab++) {
            float sum = 0.0f;
            for (int i = threadIdx.x; i < tokens_of(slab); i += TOKEN_THREADS) {
                sum += likelihood(first_of(slab) + i);
            }
            sum = block_sum(sum, work[slab % 2 * 2]);
            if (threadIdx.x == 0) send(t.sums + slab * blocks + me, sum, round);
        }
        for (int i = threadIdx.x; i < spans; i += TOKEN_THREADS) {
            part[i] = receive(t.sums + i, round);
        }
        __syncthreads();
        if (warp > 0) return;
        double all = 0.0, before = 0.0, u = t.uniforms[now.sampled % t.count];
        auto of_span = [&](int i) { return part[i]; };
        pick(spans, INFINITY, &all, of_span);
        int span = pick(spans, u * all, &before, of_span), slab = span / blocks;
        if (span - slab * blocks != me) return;
        int first = first_of(slab);
        auto of_token = [&](int i) { return likelihood(first + i); };
        int i = pick(tokens_of(slab), u * all, &before, of_token);
        if (lane == 0) chosen(min(first + i, t.vocab - 1));
    }
    // By a warp: the first of `count` numbers with which the sum, from *before on, passes the
    // target, or the last one; *before: then the sum before it
    template<class F>
    __device__ int pick(int count, double target, double *before, F number) const {
        int each = pieces(count, 32), i = min(lane * each, count), end = min(i + each, count);
        double mine = 0.0;
        _Pragma("unroll 4")
        for (int k = i; k < end; k++) {
            mine += number(k);
        }
        double upto = *before + warp_scan(mine), sum = upto - mine;
        unsigned passed = __ballot_sync(~0u, target < upto);
        int owner = passed ? __ffs(passed) - 1 : max(count - 1, 0) / max(each, 1);
        while (i + 1 < end && target >= sum + number(i)) {
            sum += number(i++);
        }
        *before = __shfl_sync(~0u, passed ? sum : upto, passed ? owner : 31);
        return __shfl_sync(~0u, i, owner);
    }
    __device__ int first_of(int slab) const {
        return slab * t.matrix[HEAD].O + shares[HEAD][0].start;
    }
    __device__ void chosen(int id) const {
        t.ids[now.sampled % t.count] = id;
        *t.step = {id, now.time + 1, now.sampled + 1};
    }
};
template<bool WIDE, typename floatX>
__global__ void __launch_bounds__(TOKEN_THREADS)
token_kernel(const __grid_constant__ Token<floatX> t) {
    extern __shared__ __align__(128) char token_shared[];
    Worker<WIDE, floatX>(t, token_shared).run();
}
