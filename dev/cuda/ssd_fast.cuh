// == ssd, the fast kernels ========================================================================
// For bf16, chunks of 128 steps, headdim up to 64 and d_state up to 128, both multiples of 8
// (smaller ones are padded with zeros to 64, and 64 or 128), on GPUs with 227 KB of shared memory:
// everything else takes the kernels above. The same formulas; the work is dealt out otherwise:
//   - copies run ahead of the arithmetic (cp.async); tiles lie so that banks do not conflict
//   - warps of one block have different roles, so that their latencies overlap
//   - decays are products of two factors, exp2(cs_l - cs_a) and exp2(cs_a - cs_s), with a step a
//     between, s <= a <= l: tables of 128 in place of an exponential for each element, and no
//     exponent above 0. Documents cut the factors: since they come in order, l and s are of one
//     document just when both are of the document of a.
constexpr int FQ = 128, FP = 64;                   // steps of a chunk; columns of a head, padded
constexpr int PAD = 8;                            // of rows in shared memory, where they are padded

// Two bf16 in a register.
__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
__device__ inline float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline float decay(float exponent, bool same_document) {
    return same_document ? exp2_fast(fminf(exponent, 0.0f)) : 0.0f;
}

// A tile in shared memory has rows of COLS, either padded by 16 bytes (PAD), or (0) with the
// 16-byte pieces of row r permuted by r % 8. Either way ldmatrix has no bank conflicts; padding
// makes cp.async dearer, permuting takes registers. The second form is of row + r, col + c, where
// row and col are multiples of 8 and r, c < 16: what depends on the lane is apart, so that it is
// computed once.
template<int COLS, int PADDED> __device__ inline int at(int row, int col) {
    return row * (COLS + PADDED) + (PADDED ? col : col ^ row % 8 * 8);
}
template<int COLS, int PADDED>
__device__ inline int at(unsigned row, unsigned col, unsigned r, unsigned c) {
    if (PADDED) return (row + r) * (COLS + PADDED) + col + c;
    return row * COLS + col / 64 * 64 + ((r * COLS + (c ^ r % 8 * 8)) ^ col % 64);
}

// Operands of mma from the part of a tile that begins at (row, col). A is 16x16 (m,k), or with _t
// stored (k,m). B is 16 (k) x 16 (n), stored (n,k), or with _t (k,n): r and r + 2 are two
// fragments.
template<int COLS, int PADDED>
__device__ inline void load_a(uint32_t r[4], const bf16 *tile, int row, int col, unsigned lane) {
    ldmatrix(r, tile + at<COLS, PADDED>(row, col, lane % 16, lane / 16 * 8));
}
template<int COLS, int PADDED>
__device__ inline void load_a_t(uint32_t r[4], const bf16 *tile, int row, int col, unsigned lane) {
    ldmatrix_trans(r,
                   tile + at<COLS, PADDED>(row, col, lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
}
template<int COLS, int PADDED>
__device__ inline void load_b(uint32_t r[4], const bf16 *tile, int row, int col, unsigned lane) {
    ldmatrix(r, tile + at<COLS, PADDED>(row, col, lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
}
template<int COLS, int PADDED>
__device__ inline void load_b_t(uint32_t r[4], const bf16 *tile, int row, int col, unsigned lane) {
    ldmatrix_trans(r, tile + at<COLS, PADDED>(row, col, lane % 16, lane / 16 * 8));
}

// Threads 0 <= me < THREADS start copying ROWS x COLS elements; zeros from `rows` and `cols` on.
template<int ROWS, int COLS, int PADDED, int THREADS>
__device__ inline void load_tile(bf16 *to, const bf16 *from, size_t pitch, int rows, int cols,
                                 int me) {
    constexpr int STEP = THREADS / (COLS / 8);             // rows at once
    int row = me / (COLS / 8), col = me % (COLS / 8) * 8;
    bool inside = col < cols;
    from += row * pitch + col;
    UNROLL for (int i = 0; i < ROWS / STEP; i++, from += STEP * pitch) {
        bool valid = inside && row + i * STEP < rows;
        cp_async<16>(to + at<COLS, PADDED>(row + i * STEP, col), from, valid);
    }
}
template<int ROWS, int COLS, int PADDED, int THREADS> // and back
__device__ inline void store_tile(bf16 *to, const bf16 *from, size_t pitch, int rows, int cols,
                                  int me) {
    constexpr int STEP = THREADS / (COLS / 8);
    int row = me / (COLS / 8), col = me % (COLS / 8) * 8;
    to += row * pitch + col;
    if (col >= cols) rows = 0;
    UNROLL for (int i = 0; i < ROWS / STEP; i++, to += STEP * pitch) {
        if (row + i * STEP >= rows) break;
        *(uint4 *)to = *(const uint4 *)(from + at<COLS, PADDED>(row + i * STEP, col));
    }
}

// ---- sums of dt A, and CB -----------------------------------------------------------------------
// Blocks of two kinds for each chunk:
//   eight heads   cs, dts (R,H,chunks,Q) from dt (n,H), through shared memory; a warp a head
//   a group       CB as bf16 operands A: 16x16 tile (i,j), j <= i, lies at i (i+1)/2 + j, lane by
//                 lane; warp i has row i of the tiles
constexpr int CB_TILES = 36;
template<int N> constexpr size_t CB_SHARED = 2 * FQ * (N + PAD) * sizeof(bf16);
constexpr size_t STEPS_SHARED = 8 * (FQ + 4) * sizeof(float);

template<int N>
__device__ inline void make_CB(bf16 *B, uint4 *CB, const bf16 *xBC, size_t g, const Dims &d) {
    bf16 *C = B + FQ * (N + PAD);
    size_t c = blockIdx.x, r = blockIdx.z;
    int me = threadIdx.x, lane = me % 32, warp = me / 32, rows = (int)min((size_t)FQ, d.T - c * FQ);
    const bf16 *from = xBC + (r * d.T + c * FQ) * d.S + d.E + g * d.N;
    load_tile<FQ, N, PAD, 256>(B, from, d.S, rows, d.N, me);
    load_tile<FQ, N, PAD, 256>(C, from + d.G * d.N, d.S, rows, d.N, me);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a[N / 16][4], b[4];
    UNROLL for (int k = 0; k < N / 16; k++) {
        load_a<N, PAD>(a[k], C, 16 * warp, 16 * k, lane);
    }
    CB += (((r * d.chunks + c) * d.G + g) * CB_TILES + warp * (warp + 1) / 2) * 32 + lane;
    for (int j = 0; j <= warp; j++) {
        float v[2][4] = {};
        UNROLL for (int k = 0; k < N / 16; k++) {
            load_b<N, PAD>(b, B, 16 * j, 16 * k, lane);
            mma(v[0], a[k], b);
            mma(v[1], a[k], b + 2);
        }
        CB[j * 32] = make_uint4(pack(v[0][0], v[0][1]), pack(v[0][2], v[0][3]),
                                pack(v[1][0], v[1][1]), pack(v[1][2], v[1][3]));
    }
}

template<int N>
__global__ void __launch_bounds__(256, 2)
ssd_prepare_fast_kernel(float *cs, float *dts, uint4 *CB, const float *dt, const float *A_log,
                        const bf16 *xBC, Dims d) {
    extern __shared__ __align__(128) unsigned char shared[];
    next_may_start();
    int groups_of_8 = (int)pieces(d.H, 8), h0 = blockIdx.y * 8;
    if ((int)blockIdx.y >= groups_of_8) {
        make_CB<N>((bf16 *)shared, CB, xBC, blockIdx.y - groups_of_8, d);
        return;
    }
    float (*tile)[FQ + 4] = (float (*)[FQ + 4])shared;
    size_t c = blockIdx.x, r = blockIdx.z;
    for (int i = threadIdx.x; i < 8 * FQ; i += 256) {
        size_t h = h0 + i % 8, t = c * FQ + i / 8;
        tile[i % 8][i / 8] = h < d.H && t < d.T ? dt[(r * d.T + t) * d.H + h] : 0.0f;
    }
    __syncthreads();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t h = h0 + warp;
    if (h >= d.H) return;
    float4 step = *(const float4 *)&tile[warp][4 * lane], sum;
    float a = -expf(A_log[h]) * 1.44269504f;
    sum.x = step.x * a;
    sum.y = sum.x + step.y * a;
    sum.z = sum.y + step.z * a;
    sum.w = sum.z + step.w * a;
    float before = __shfl_up_sync(~0u, warp_scan(sum.w), 1);
    if (lane == 0) before = 0.0f;
    size_t to = ((r * d.H + h) * d.chunks + c) * FQ + 4 * lane;
    *(float4 *)(cs + to) = make_float4(before + sum.x, before + sum.y, before + sum.z,
                                       before + sum.w);
    *(float4 *)(dts + to) = step;
}

// ---- what a part of the sequence adds to the state, or to its gradient --------------------------
// One kernel for both directions. A block (4 warps) has a head and walks the chunks of a segment of
// the sequence with S or gS (N,P) in float accumulators, N/4 rows a warp:
//   forward   S  = through S  + (dt exp(cs_last - cs) B)^T x
//   BACK      gS = through gS + (exp(cs) C)^T g_y, from the end
// K: B or C; V: x or g_y. Both come in halves of a chunk.
//   LOCAL     from zero; leaves what the segment adds (local) and how it decays what comes in
//             (local_decay). Only where rows and heads alone do not fill the GPU are there several
//             segments, and this pass
//   not       (BACK only) from what the segments beyond leave; writes gS after each chunk, and
//             kappa = through <S, gS>
// Here is the seam for splitting a sequence over GPUs: it would exchange local and local_decay.
constexpr int HALF = 64;
template<int N> struct SumShared {
    bf16 S[N * (FP + PAD)];                        // S in, then gS out
    bf16 V[2][HALF * (FP + PAD)], K[2][HALF * (N + PAD)];
    float scale[FQ], through, part[4];
};

template<int N, bool BACK, bool LOCAL, bool DOCS>
__global__ void __launch_bounds__(128, N == 64 ? 4 : 3)
ssd_sum_kernel(bf16 *g_states, float *kappa, float *g_initial, float *local, float *local_decay,
               const bf16 *states, const bf16 *in, size_t in_pitch, const float *g_final,
               const bf16 *xBC, const float *cs, const float *dts, const int *doc, Dims d,
               int segment_chunks, bool has_initial) {
    extern __shared__ __align__(128) unsigned char shared[];
    SumShared<N> &sm = *(SumShared<N> *)shared;
    next_may_start();
    wait_for_last();
    constexpr int MT = N / 64;
    int me = threadIdx.x, lane = me % 32, warp = me / 32, g = lane / 4, t4 = lane % 4;
    int n0 = warp * (N / 4), chunks = d.chunks, P = d.P;
    int segment = blockIdx.y + (BACK && LOCAL), begin = segment * segment_chunks,
        end = min(begin + segment_chunks, chunks);
    size_t h = blockIdx.x, r = blockIdx.z, head = (r * d.H + h) * d.N * P, group = h / (d.H / d.G);
    auto ends = [&](int s) { return (r * (gridDim.y - !LOCAL) + s) * d.H + h; };   // in local
    // Of the segment's first chunk, what comes out at its start is only wanted as g_initial.
    int count = end - begin - (!LOCAL && !(g_initial && begin == 0));
    auto chunk = [&](int i) { return BACK ? end - 1 - i : begin + i; };
    float acc[MT][8][4];
    auto each_pair = [&](auto f) {                 // f(two accumulators, their n and p)
        UNROLL for (int i = 0; i < MT; i++) {
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 4; e += 2) {
                    f(acc[i][j][e], acc[i][j][e + 1], n0 + g + 16 * i + 4 * e, 8 * j + 2 * t4);
                }
            }
        }
    };
    auto load_half = [&](int i, int half) {
        if (i < count) {
            int t0 = chunk(i) * FQ + half * HALF, left = (int)d.T - t0;
            size_t token = r * d.T + t0;
            load_tile<HALF, FP, PAD, 128>(sm.V[half], in + token * in_pitch + h * P, in_pitch, left,
                                          P, me);
            const bf16 *K = xBC + token * d.S + d.E + ((BACK ? d.G : 0) + group) * d.N;
            load_tile<HALF, N, PAD, 128>(sm.K[half], K, d.S, left, d.N, me);
        }
        cp_async_commit();
    };
    // S or gS that are zero are not in memory.
    auto has_gS = [&](int i) { return !LOCAL && (g_final || chunk(i) + 1 < chunks); };
    auto has_S = [&](int i) { return has_gS(i) && (has_initial || chunk(i) > 0); };
    auto load_S = [&](int i) {
        if (i >= end - begin || !has_S(i)) return;
        const bf16 *S = states + ((r * chunks + chunk(i)) * d.H + h) * d.N * P;
        load_tile<N, FP, PAD, 128>(sm.S, S, P, d.N, P, me);
    };
    float next_scale = 0.0f, next_through = 0.0f;  // of step `me` of a chunk; of the chunk
    auto fetch = [&](int i) {
        if (i >= end - begin) return;
        int c = chunk(i);
        size_t at = ((r * d.H + h) * chunks + c) * FQ;
        float now = cs[at + me], last = cs[at + FQ - 1];
        int k = 0, before = 0, k_last = 0;
        if (DOCS) {
            const int *docs = doc + r * d.T + c * FQ;
            int rows = min(FQ, (int)d.T - c * FQ);
            k = docs[min(me, rows - 1)];
            k_last = docs[rows - 1];
            before = c > 0 ? docs[-1] : 0;
        }
        next_through = decay(last, k_last == before);
        next_scale = BACK ? decay(now, k == before) : dts[at + me] * decay(last - now, k == k_last);
    };
    load_S(0);
    load_half(0, 0);
    load_half(0, 1);
    fetch(0);
    each_pair([&](float &u, float &v, int n, int p) {
        bool there = !LOCAL && g_final && n < d.N && p < P;
        float2 s = there ? *(const float2 *)(g_final + head + n * P + p) : make_float2(0.0f, 0.0f);
        u = s.x;
        v = s.y;
    });
    for (int s = gridDim.y - 1; !LOCAL && s > segment; s--) {      // what comes from beyond
        float through = local_decay[ends(s - 1)];
        const float *from = local + ends(s - 1) * N * FP;
        each_pair([&](float &u, float &v, int n, int p) {
            float2 a = *(const float2 *)(from + n * FP + p);
            u = u * through + a.x;
            v = v * through + a.y;
        });
    }
    float total = 1.0f;
    for (int i = 0; i < end - begin; i++) {
        sm.scale[me] = next_scale;
        if (me == 0) sm.through = next_through;
        cp_async_wait<1>();
        __syncthreads();
        float through = sm.through;
        if (has_gS(i)) {
            float sum = 0.0f;
            each_pair([&](float &u, float &v, int n, int p) {
                uint32_t *S = (uint32_t *)&sm.S[n * (FP + PAD) + p];
                if (has_S(i)) sum += low(*S) * u + high(*S) * v;
                *S = pack(u, v);
            });
            sum = warp_sum(sum);
            if (lane == 0) sm.part[warp] = sum;
            __syncthreads();
            bf16 *to = g_states + ((r * chunks + chunk(i)) * d.H + h) * d.N * P;
            store_tile<N, FP, PAD, 128>(to, sm.S, P, d.N, P, me);
        }
        if (!LOCAL && me == 0) {
            const float *part = sm.part;
            float sum = has_S(i) ? part[0] + part[1] + part[2] + part[3] : 0.0f;
            kappa[(r * chunks + chunk(i)) * d.H + h] = through * sum;
        }
        if (i == count) break;
        fetch(i + 1);
        total *= through;
        each_pair([&](float &u, float &v, int, int) {
            u *= through;
            v *= through;
        });
        #pragma unroll 1
        for (int half = 0; half < 2; half++) {
            UNROLL for (int k = 0; k < HALF; k += 16) {
                uint32_t a[MT][4], b[4];
                float2 e0 = *(const float2 *)&sm.scale[half * HALF + k + 2 * t4];
                float2 e1 = *(const float2 *)&sm.scale[half * HALF + k + 8 + 2 * t4];
                UNROLL for (int m = 0; m < MT; m++) {
                    load_a_t<N, PAD>(a[m], sm.K[half], k, n0 + 16 * m, lane);
                    UNROLL for (int e = 0; e < 4; e++) {
                        float2 f = e < 2 ? e0 : e1;
                        a[m][e] = pack(low(a[m][e]) * f.x, high(a[m][e]) * f.y);
                    }
                }
                UNROLL for (int j = 0; j < 8; j += 2) {
                    load_b_t<FP, PAD>(b, sm.V[half], k, 8 * j, lane);
                    UNROLL for (int m = 0; m < MT; m++) {
                        mma(acc[m][j], a[m], b);
                        mma(acc[m][j + 1], a[m], b + 2);
                    }
                }
            }
            __syncthreads();                       // this half, and S, are free
            if (half == 0) load_S(i + 1);
            load_half(i + 1, half);
            if (half == 0) {
                cp_async_wait<1>();
                __syncthreads();
            }
        }
    }
    if (LOCAL) {
        size_t which = ends(blockIdx.y);
        each_pair([&](float &u, float &v, int n, int p) {
            *(float2 *)(local + (which * N + n) * FP + p) = make_float2(u, v);
        });
        if (me == 0) local_decay[which] = total;
    } else if (g_initial && begin == 0) {
        each_pair([&](float &u, float &v, int n, int p) {
            if (n < d.N && p < P) *(float2 *)(g_initial + head + n * P + p) = make_float2(u, v);
        });
    }
}

// ---- forward: states and y in one kernel --------------------------------------------------------
// A block walks the chunks of a segment for two heads of a group, then those of its next walk;
// copies run a chunk ahead, over the end of a walk too, so that only the first one waits for them.
//   state warps   S = through S + (dt exp(cs_last - cs) B)^T x, in float accumulators; they fetch
//                 B, C and CB, and write the boundary states
//   y warps       y = M x + diag(exp(cs)) C S, M = (CB o L) diag(dt) with D added on its diagonal;
//                 they fetch x, cs, dt
// Four of each a head. Of the state (N,P) a state warp has N/4 rows; y warp w has the 16-row tiles
// w and 7 - w of M, 9 of its 36 tiles. In row tile i of M, but for its diagonal tile, L_ls dt_s is
// exp2(cs_l - cs_a) ratio_s with a = 16 i: one exponential for a column instead of one an element.
// Two barriers a chunk: at BOTH all meet, this chunk and S being there; at FREE the state warps
// wait until the y warps, which only announce it, no longer need C and S.
// Walk `number` of pairs x segments x R: heads `first` and `first` + 1 of a group, in row r.
struct Walk {
    int group, first, segment, begin, end;
    size_t r;
    __device__ void set(int number, int pairs, int segments, int segment_chunks, const Dims &d) {
        int all_pairs = pairs * (int)d.G, pair = number % all_pairs;
        group = pair / pairs;
        first = pair % pairs * 2;
        segment = number / all_pairs % segments;
        r = number / all_pairs / segments;
        begin = segment * segment_chunks;
        end = min(begin + segment_chunks, (int)d.chunks);
    }
};

template<int N> struct WalkShared {
    bf16 x[2][2][FQ * (FP + PAD)];                 // of 2 chunks, 2 heads
    bf16 B[FQ * (N + PAD)], C[FQ * (N + PAD)];
    bf16 S[2][N * (FP + PAD)];                     // of 2 heads
    uint4 CB[2][CB_TILES * 32];                    // of 2 chunks
    float cs[2][2][FQ], dt[2][2][FQ];              // of 2 chunks, 2 heads
    int doc[2][FQ];
    bf16 weight[8][FQ], ratio[8][2][FQ];           // of each state warp; of each y warp
    Walk walk[3];                                  // one ends, one is on, one is being fetched
};

// to[s] = dt_s exp2(cs at `from` - cs_s), by one warp for itself
template<bool DOCS>
__device__ inline void decays(bf16 *to, const float *cs, const float *dt, const int *doc,
                              int from) {
    int s = threadIdx.x % 32 * 4;
    float4 c = *(const float4 *)(cs + s), step = *(const float4 *)(dt + s);
    int4 k = DOCS ? *(const int4 *)(doc + s) : make_int4(0, 0, 0, 0);
    float a = cs[from];
    int here = DOCS ? doc[from] : 0;
    uint32_t first =
        pack(step.x * decay(a - c.x, k.x == here), step.y * decay(a - c.y, k.y == here));
    uint32_t second =
        pack(step.z * decay(a - c.z, k.z == here), step.w * decay(a - c.w, k.w == here));
    *(uint2 *)(to + s) = make_uint2(first, second);
}

template<int N, bool DOCS>
__global__ void __launch_bounds__(512, 1)
ssd_walk_kernel(bf16 *y, bf16 *states, float *final, const float *local, const float *local_decay,
                const bf16 *xBC, const uint4 *CB, const float *cs, const float *dts, const float *D,
                const float *initial, const int *doc, Dims d, int segments, int segment_chunks) {
    extern __shared__ __align__(128) unsigned char shared[];
    WalkShared<N> &sm = *(WalkShared<N> *)shared;
    next_may_start();
    wait_for_last();
    constexpr int MT = N / 64, BOTH = 1, FREE = 2; // barriers
    int me = threadIdx.x % 256, lane = me % 32, g = lane / 4, t4 = lane % 4;
    int all_warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warp = all_warp % 4,
        slot = all_warp / 4 % 2;
    int heads = d.H / d.G, pairs = (heads + 1) / 2, chunks = d.chunks, P = d.P;
    int walks = pairs * d.G * segments * d.R;
    auto put_walk = [&](int number, int turn) {    // for all to read
        if (threadIdx.x > 0 || number >= walks) return;
        sm.walk[turn].set(number, pairs, segments, segment_chunks, d);
    };
    auto head = [&](const Walk &w) {               // of this warp; the last one twice if odd
        return w.group * heads + min(w.first + slot, heads - 1);
    };
    auto doc_before = [&](const Walk &w) {
        return DOCS && w.begin > 0 ? doc[w.r * d.T + w.begin * FQ - 1] : 0;
    };
    // load(walk, chunk, buffer) of the chunk after this one, be it of the next walk
    auto load_next = [&](auto load, int number, int turn, int chunk, int buffer) {
        if (chunk + 1 < sm.walk[turn].end) {
            load(sm.walk[turn], chunk + 1, buffer ^ 1);
        } else if (number + (int)gridDim.x < walks) {
            const Walk &next = sm.walk[(turn + 1) % 3];
            load(next, next.begin, buffer ^ 1);
        }
        cp_async_commit();
    };
    float acc[2][8][4];                            // S or y: 16-row tiles, 8-column tiles
    int buffer = 0, turn = 0;
    put_walk(blockIdx.x, 0);
    __syncthreads();

    if (all_warp < 8) {                            // ---- state warps ----
        int n0 = warp * (N / 4);
        auto each_pair = [&](auto f) {             // f(two accumulators, their n and p)
            UNROLL for (int i = 0; i < MT; i++) {
                UNROLL for (int j = 0; j < 8; j++) {
                    UNROLL for (int e = 0; e < 4; e += 2) {
                        f(acc[i][j][e], acc[i][j][e + 1], n0 + g + 16 * i + 4 * e, 8 * j + 2 * t4);
                    }
                }
            }
        };
        auto inside = [&](int n, int p) { return n < d.N && p < P; };
        auto load_BC = [&](const Walk &w, int chunk, int to) {
            int left = (int)d.T - chunk * FQ;
            const bf16 *B = xBC + (w.r * d.T + chunk * FQ) * d.S + d.E + w.group * d.N;
            load_tile<FQ, N, PAD, 256>(sm.B, B, d.S, left, d.N, me);
            load_tile<FQ, N, PAD, 256>(sm.C, B + d.G * d.N, d.S, left, d.N, me);
            const uint4 *from = CB + ((w.r * chunks + chunk) * d.G + w.group) * CB_TILES * 32;
            for (int i = me; i < CB_TILES * 32; i += 256) {
                cp_async<16>(&sm.CB[to][i], from + i, true);
            }
        };
        load_BC(sm.walk[0], sm.walk[0].begin, buffer);
        cp_async_commit();
        for (int number = blockIdx.x; number < walks; number += gridDim.x, turn = (turn + 1) % 3) {
            const Walk &w = sm.walk[turn];
            put_walk(number + gridDim.x, (turn + 1) % 3);
            int h = head(w), before = doc_before(w);
            bool mine = w.first + slot < heads;
            size_t state = (w.r * d.H + h) * d.N * P;      // in initial and final
            each_pair([&](float &u, float &v, int n, int p) {
                bool there = initial && w.segment == 0 && inside(n, p);
                float2 s = there ? *(const float2 *)(initial + state + n * P + p)
                                 : make_float2(0.0f, 0.0f);
                u = s.x;
                v = s.y;
            });
            for (int s = 0; s < w.segment; s++) {  // what the segments before this one leave
                size_t which = (w.r * (segments - 1) + s) * d.H + h;
                float through = local_decay[which];
                each_pair([&](float &u, float &v, int n, int p) {
                    float2 a = *(const float2 *)(local + (which * N + n) * FP + p);
                    u = u * through + a.x;
                    v = v * through + a.y;
                });
            }
            #pragma unroll 1
            for (int chunk = w.begin; chunk < w.end; chunk++, buffer ^= 1) {
                bool update = chunk + 1 < w.end || (final && w.end == chunks);
                bool empty = chunk == 0 && !initial;
                const bf16 *x = sm.x[buffer][slot];
                const float *my_cs = sm.cs[buffer][slot];
                if (!empty) {
                    each_pair([&](float &u, float &v, int n, int p) {
                        *(uint32_t *)&sm.S[slot][n * (FP + PAD) + p] = pack(u, v);
                    });
                }
                cp_async_wait<0>();
                barrier_wait(BOTH, 512);
                if (mine && !empty) {
                    bf16 *to = states + ((w.r * chunks + chunk) * d.H + h) * d.N * P;
                    store_tile<N, FP, PAD, 128>(to, sm.S[slot], P, d.N, P, me % 128);
                }
                int doc_last = DOCS ? sm.doc[buffer][FQ - 1] : 0;
                if (update) {
                    float through = decay(my_cs[FQ - 1], doc_last == before);
                    bf16 *weight = sm.weight[all_warp];
                    decays<DOCS>(weight, my_cs, sm.dt[buffer][slot], sm.doc[buffer], FQ - 1);
                    __syncwarp();
                    each_pair([&](float &u, float &v, int, int) {
                        u *= through;
                        v *= through;
                    });
                    UNROLL for (int k = 0; k < FQ; k += 16) {
                        uint32_t a[MT][4], b[4];
                        uint32_t w0 = *(const uint32_t *)(weight + k + 2 * t4);
                        uint32_t w1 = *(const uint32_t *)(weight + k + 8 + 2 * t4);
                        UNROLL for (int i = 0; i < MT; i++) {
                            load_a_t<N, PAD>(a[i], sm.B, k, n0 + 16 * i, lane);
                            UNROLL for (int e = 0; e < 4; e++) {
                                a[i][e] = mul_bf16x2(a[i][e], e < 2 ? w0 : w1);
                            }
                        }
                        UNROLL for (int j = 0; j < 8; j += 2) {
                            load_b_t<FP, PAD>(b, x, k, 8 * j, lane);
                            UNROLL for (int i = 0; i < MT; i++) {
                                mma(acc[i][j], a[i], b);
                                mma(acc[i][j + 1], a[i], b + 2);
                            }
                        }
                    }
                }
                before = doc_last;
                barrier_wait(FREE, 512);           // B, C and S are no longer needed
                load_next(load_BC, number, turn, chunk, buffer);
            }
            if (mine && final && w.end == chunks) {
                each_pair([&](float &u, float &v, int n, int p) {
                    if (inside(n, p)) *(float2 *)(final + state + n * P + p) = make_float2(u, v);
                });
            }
        }
    } else {                                       // ---- y warps ----
        const int tile[2] = {warp, 7 - warp};
        bf16 (*ratio)[FQ] = sm.ratio[all_warp - 8];
        auto scale = [&](int i, float upper, float lower) {
            UNROLL for (int j = 0; j < 8; j++) {
                acc[i][j][0] *= upper;
                acc[i][j][1] *= upper;
                acc[i][j][2] *= lower;
                acc[i][j][3] *= lower;
            }
        };
        auto load_x = [&](const Walk &w, int chunk, int to) {      // and cs, dt, doc
            int left = (int)d.T - chunk * FQ;
            const bf16 *x = xBC + (w.r * d.T + chunk * FQ) * d.S + (w.group * heads + w.first) * P;
            load_tile<FQ, FP, PAD, 256>(sm.x[to][0], x, d.S, left, P, me);
            load_tile<FQ, FP, PAD, 256>(sm.x[to][1], x + P, d.S, left,
                                        w.first + 1 < heads ? P : 0, me);
            int i = me % 128;
            if (i < 64) {
                size_t from = ((w.r * d.H + head(w)) * chunks + chunk) * FQ + i % 32 * 4;
                float *steps = i < 32 ? sm.cs[to][slot] : sm.dt[to][slot];
                cp_async<16>(steps + i % 32 * 4, (i < 32 ? cs : dts) + from, true);
            }
            if (DOCS && me < FQ) {
                const int *docs = doc + w.r * d.T + chunk * FQ;
                cp_async<4>(&sm.doc[to][me], docs + min(me, left - 1), true);
            }
        };
        load_x(sm.walk[0], sm.walk[0].begin, buffer);
        cp_async_commit();
        for (int number = blockIdx.x; number < walks; number += gridDim.x, turn = (turn + 1) % 3) {
            const Walk &w = sm.walk[turn];
            int h = head(w), before = doc_before(w);
            bool mine = w.first + slot < heads;
            float skip = D[h];
            #pragma unroll 1
            for (int chunk = w.begin; chunk < w.end; chunk++, buffer ^= 1) {
                const float *my_cs = sm.cs[buffer][slot], *my_dt = sm.dt[buffer][slot];
                const int *my_doc = sm.doc[buffer];
                const bf16 *x = sm.x[buffer][slot];
                auto same = [&](int l, int k) { return !DOCS || my_doc[l] == k; };
                cp_async_wait<0>();
                barrier_wait(BOTH, 512);
                load_next(load_x, number, turn, chunk, buffer);
                UNROLL for (int i = 0; i < 2; i++) {
                    decays<DOCS>(ratio[i], my_cs, my_dt, my_doc, 16 * tile[i]);
                    UNROLL for (int j = 0; j < 8; j++) {
                        UNROLL for (int e = 0; e < 4; e++) {
                            acc[i][j][e] = 0.0f;
                        }
                    }
                }
                __syncwarp();
                if (chunk > 0 || initial) {        // C S
                    UNROLL for (int k = 0; k < N; k += 16) {
                        uint32_t a[2][4], b[4];
                        UNROLL for (int i = 0; i < 2; i++) {
                            load_a<N, PAD>(a[i], sm.C, 16 * tile[i], k, lane);
                        }
                        UNROLL for (int j = 0; j < 8; j += 2) {
                            load_b_t<FP, PAD>(b, sm.S[slot], k, 8 * j, lane);
                            UNROLL for (int i = 0; i < 2; i++) {
                                mma(acc[i][j], a[i], b);
                                mma(acc[i][j + 1], a[i], b + 2);
                            }
                        }
                    }
                    UNROLL for (int i = 0; i < 2; i++) {
                        int a = 16 * tile[i];
                        float e = decay(my_cs[a], same(a, before));
                        scale(i, e, e);
                    }
                }
                if (DOCS) before = my_doc[FQ - 1];
                barrier_arrive(FREE, 512);         // C and S are no longer needed
                auto row = [&](int i) {
                    return sm.CB[buffer] + tile[i] * (tile[i] + 1) / 2 * 32 + lane;
                };
                auto add = [&](int i, const uint32_t m[4], const uint32_t b[4][4]) {
                    UNROLL for (int p = 0; p < 8; p++) {
                        mma(acc[i][p], m, &b[p / 2][p % 2 * 2]);
                    }
                };
                auto below = [&](int i, int j, const uint32_t b[4][4]) {  // tile (i,j) of M, j < i
                    uint4 v = row(i)[j * 32];
                    uint32_t f0 = *(const uint32_t *)(ratio[i] + 16 * j + 2 * t4);
                    uint32_t f1 = *(const uint32_t *)(ratio[i] + 16 * j + 2 * t4 + 8);
                    uint32_t m[4] = {mul_bf16x2(v.x, f0), mul_bf16x2(v.y, f0),
                                     mul_bf16x2(v.z, f1), mul_bf16x2(v.w, f1)};
                    add(i, m, b);
                };
                UNROLL for (int j = 0; j < 7; j++) {
                    if (j >= 4 && j >= tile[1]) continue;
                    uint32_t b[4][4];
                    UNROLL for (int p = 0; p < 4; p++) {
                        load_b_t<FP, PAD>(b[p], x, 16 * j, 16 * p, lane);
                    }
                    below(1, j, b);
                    if (j < 3) if (j < tile[0]) below(0, j, b);
                }
                UNROLL for (int i = 0; i < 2; i++) {               // the diagonal tile
                    int a = 16 * tile[i];
                    float l_cs[2] = {my_cs[a + g], my_cs[a + g + 8]};
                    int l_doc[2] = {DOCS ? my_doc[a + g] : 0, DOCS ? my_doc[a + g + 8] : 0};
                    scale(i, decay(l_cs[0] - my_cs[a], same(a, l_doc[0])),
                          decay(l_cs[1] - my_cs[a], same(a, l_doc[1])));
                    uint4 v = row(i)[tile[i] * 32];
                    uint32_t m[4] = {v.x, v.y, v.z, v.w}, b[4][4];
                    UNROLL for (int p = 0; p < 4; p++) {
                        load_b_t<FP, PAD>(b[p], x, a, 16 * p, lane);
                    }
                    UNROLL for (int e = 0; e < 4; e++) {
                        int s = 8 * (e / 2) + 2 * t4, past = s - 8 * (e % 2) - g;  // s - l
                        float2 c = *(const float2 *)(my_cs + a + s),
                               dt = *(const float2 *)(my_dt + a + s);
                        float l = l_cs[e % 2];
                        float u = low(m[e]) * decay(l - c.x, same(a + s, l_doc[e % 2])) * dt.x;
                        float v = high(m[e]) * decay(l - c.y, same(a + s + 1, l_doc[e % 2])) * dt.y;
                        m[e] = pack(past > 0 ? 0.0f : past == 0 ? u + skip : u,
                                    past >= 0 ? 0.0f : past == -1 ? v + skip : v);
                    }
                    add(i, m, b);
                }
                // Neighbouring lanes swap, so that each has 4 columns of a row: whole sectors are
                // written.
                UNROLL for (int i = 0; i < 2; i++) {
                    UNROLL for (int e = 0; e < 4; e += 2) {
                        int l = chunk * FQ + 16 * tile[i] + g + 4 * e,
                            p = 8 * (lane & 1) + 2 * (lane & 2);
                        bf16 *to = y + (w.r * d.T + l) * d.E + h * P + p;
                        UNROLL for (int j = 0; j < 8; j += 2) {
                            uint32_t u = pack(acc[i][j][e], acc[i][j][e + 1]);
                            uint32_t v = pack(acc[i][j + 1][e], acc[i][j + 1][e + 1]);
                            uint32_t got = __shfl_xor_sync(~0u, lane & 1 ? u : v, 1);
                            uint2 four = lane & 1 ? make_uint2(got, v) : make_uint2(u, got);
                            if (mine && l < d.T && 8 * j + p < P) *(uint2 *)(to + 8 * j) = four;
                        }
                    }
                }
            }
        }
    }
}

// ---- in how many segments to cut the sequence ---------------------------------------------------
// One, when rows and heads alone fill the GPU. In units of the time of a chunk, as measured on an
// H200, where WALKERS blocks walk at once, or BACK_WALKERS of ssd_sum_kernel; a block takes 2.5
// more to start. These are constants, not the numbers of the GPU at hand: the bits depend on them.
constexpr int WALKERS = 132, BACK_WALKERS = 3 * 132;

template<class Cost> static int cheapest_segments(int chunks, Cost cost) {
    int best = 1;
    for (int n = 2; n <= chunks; n++) {
        if ((int)pieces(chunks, pieces(chunks, n)) == n && cost(n) < cost(best)) best = n;
    }
    return best;
}
// The pass of local sums takes about half the time of the walk.
static int forward_segments(const Dims *d) {
    float walks = d->R * d->G * pieces(d->H / d->G, 2);
    return cheapest_segments((int)d->chunks, [&](int n) {
        float length = pieces(d->chunks, n);
        float local = n > 1 ? 0.55f * walks * (n - 1) * length / WALKERS + 2.0f : 0.0f;
        return ceilf(walks * n / WALKERS) * length + 2.5f + local;
    });
}
// Fewer blocks than places take less long for a chunk, but not much: each waits for its copies. A
// block adds up what the segments beyond its own leave, half of them on average.
static int backward_segments(const Dims *d) {
    float heads = d->R * d->H;
    return cheapest_segments((int)d->chunks, [&](int n) {
        auto pass = [&](int segments) {
            float full = heads * segments / BACK_WALKERS;
            return pieces(d->chunks, n) * (full < 1 ? 0.75f + 0.25f * full : ceilf(full)) + 2.5f;
        };
        float join = 0.15f * n * ceilf(heads * n / BACK_WALKERS);
        return pass(n) + (n > 1 ? pass(n - 1) + join : 0.0f);
    });
}

// ---- backward 2: g_x, g_CB and the row sums of G ------------------------------------------------
// A block (20 warps) per chunk and group loops over the heads of the group, with three roles in a
// pipeline, one barrier a head:
//   warps 18-19  copy x and g_y of head i + 2 and gS of head i + 1 to shared memory
//   warps 8-17   head i + 1: each has one of the ten 32x32 blocks (s,l) on or above the diagonal:
//                V = x g_y^T; g_CB^T += V o L dt; W = CB^T o L, to shared memory; row sums of G
//   warps 0-7    head i: 16 rows s each: R = diag(exp(cs_last - cs)) B gS + W g_y; g_x; R . x
// G is made of the rounded W, the one in R, so that row sums and the column sums in R . x cancel as
// they must; CB stays in float here, or G would be rounded twice. L of a block above the diagonal
// is exp2(cs_l - cs of the block's first l) exp2(that - cs of its last s) exp2(that - cs_s).
constexpr int G_X_THREADS = 640;
__device__ inline int tile_number(int i, int j) { return i * (17 - i) / 2 + j - i; }   // i <= j < 8
template<int N> struct GxShared {
    bf16 xy[3][2 * FQ * FP];                       // x, g_y of three heads; at first C and B
    bf16 gS[2][N * FP];                            // of two heads
    uint4 W[2][CB_TILES][32];                      // 16x16 tiles as operands A, of two heads
    float4 CB[10][2][2][2][32];                    // of each block: ii, jj, n, lane
    float cs[3][FQ], dt[3][FQ], s_decay[3][FQ], l_decay[3][FQ];
    float rowsum[2][4][FQ], diagonal[2][4];        // by block of s
    int doc[FQ];
};

template<int N>
__global__ void __launch_bounds__(G_X_THREADS, 1)
ssd_g_x_fast_kernel(bf16 *g_xBC, bf16 *g_CB, float *g_dts, float *rowsum, float *g_D_part,
                    const bf16 *g_states, const bf16 *g_y, const bf16 *xBC, const float *cs,
                    const float *dts, const float *D, const int *doc, Dims d, bool has_g_final) {
    extern __shared__ __align__(128) unsigned char shared[];
    GxShared<N> &sm = *(GxShared<N> *)shared;
    next_may_start();
    wait_for_last();
    int me = threadIdx.x, lane = me % 32, warp = __shfl_sync(~0u, me / 32, 0), g = lane / 4,
        t4 = lane % 4;
    auto fresh = [&] {                             // addresses made of these are worked out again
        lane = opaque(threadIdx.x) & 31;
        g = lane / 4;
        t4 = lane % 4;
    };
    int c = blockIdx.x, chunks = d.chunks, heads = d.H / d.G, first = blockIdx.y * heads;
    int rows = min(FQ, (int)d.T - c * FQ), P = d.P;
    size_t r = blockIdx.z, token = r * d.T + c * FQ, number = r * chunks + c;
    const bf16 *C = sm.xy[1], *B = sm.xy[2];       // before the loop
    size_t steps = ((r * d.H + first) * chunks + c) * FQ;        // of this chunk and the first head
    auto all_meet = [] { barrier_wait(1, G_X_THREADS); };
    if (warp >= 18) {                              // ---- copies ----
        me -= 18 * 32;
        auto load_xy = [&](int i) {
            bf16 *to = sm.xy[i % 3];
            int column = (first + i) * P;
            auto load = [&](int rows) {
                load_tile<FQ, FP, 0, 64>(to, xBC + token * d.S + column, d.S, rows, P, me);
                load_tile<FQ, FP, 0, 64>(to + FQ * FP, g_y + token * d.E + column, d.E, rows, P,
                                         me);
            };
            if (rows < FQ) load(rows);
            else load(FQ);                         // without the comparisons: fewer registers
        };
        float next_cs[2], next_dt[2];
        auto fetch_steps = [&](int i) {
            UNROLL for (int k = 0; k < 2; k++) {
                next_cs[k] = cs[steps + i * (size_t)chunks * FQ + me + 64 * k];
                next_dt[k] = dts[steps + i * (size_t)chunks * FQ + me + 64 * k];
            }
        };
        auto put_steps = [&](int i) {
            UNROLL for (int k = 0; k < 2; k++) {
                int t = me + 64 * k, now = sm.doc[t];
                float a = __shfl_sync(~0u, next_cs[k], 0), z = __shfl_sync(~0u, next_cs[k], 31);
                sm.cs[i % 3][t] = next_cs[k];
                sm.dt[i % 3][t] = next_dt[k];
                sm.s_decay[i % 3][t] = decay(z - next_cs[k], now == sm.doc[t | 31]);
                sm.l_decay[i % 3][t] = decay(next_cs[k] - a, now == sm.doc[t & ~31]);
            }
        };
        UNROLL for (int k = 0; k < 2; k++) {
            int t = me + 64 * k;
            sm.doc[t] = doc ? doc[token + min(t, rows - 1)] : 0;
        }
        __syncwarp();                              // a warp reads the documents of its own steps
        const bf16 *from = xBC + token * d.S + d.E + blockIdx.y * d.N;
        load_tile<FQ, N, 0, 64>(sm.xy[2], from, d.S, rows, d.N, me);
        load_tile<FQ, N, 0, 64>(sm.xy[1], from + d.G * d.N, d.S, rows, d.N, me);
        load_xy(0);
        cp_async_commit();
        fetch_steps(0);
        put_steps(0);
        cp_async_wait<0>();
        all_meet();                                // B, C and head 0 are here
        all_meet();                                // the others are done with C
        for (int i = 0; i < heads; i++) {
            const bf16 *gS = g_states + (number * d.H + first + i) * d.N * P;
            bool zero = c + 1 == (int)gridDim.x && !has_g_final;   // and then not in memory
            load_tile<N, FP, 0, 64>(sm.gS[i % 2], gS, P, zero ? 0 : d.N, P, me);
            if (i + 1 < heads) {
                load_xy(i + 1);
                fetch_steps(i + 1);
            }
            cp_async_commit();
            if (i + 1 < heads) put_steps(i + 1);
            cp_async_wait<0>();
            all_meet();
        }
    } else if (warp >= 8) {                        // ---- blocks ----
        int role = warp - 8, I = 0x3221101000 >> 4 * role & 3, J = 0x3233102321 >> 4 * role & 3;
        bool on_diagonal = I == J;
        all_meet();
        UNROLL for (int ii = 0; ii < 2; ii++) {
            UNROLL for (int jj = 0; jj < 2; jj++) {
                float v[2][4] = {};
                UNROLL for (int k = 0; k < N; k += 16) {
                    uint32_t a[4], b[4];
                    load_a<N, 0>(a, B, 32 * I + 16 * ii, k, lane);
                    load_b<N, 0>(b, C, 32 * J + 16 * jj, k, lane);
                    mma(v[0], a, b);
                    mma(v[1], a, b + 2);
                }
                UNROLL for (int n = 0; n < 2; n++) {
                    sm.CB[role][ii][jj][n][lane] = make_float4(v[n][0], v[n][1], v[n][2], v[n][3]);
                }
            }
        }
        float g_cb[2][2][2][4] = {};               // ii, jj, n: the sum over heads
        all_meet();
        #pragma unroll 1
        for (int i = 0; i < heads; i++) {
            fresh();
            const bf16 *x = sm.xy[i % 3], *gy = x + FQ * FP;
            const float *my_cs = sm.cs[i % 3], *my_dt = sm.dt[i % 3] + 32 * I;
            const float *s_decay = sm.s_decay[i % 3] + 32 * I,
                        *l_decay = sm.l_decay[i % 3] + 32 * J;
            float sum[8] = {}, trace = 0.0f;
            bool joined = !on_diagonal && sm.doc[32 * J] == sm.doc[32 * I + 31];
            float between = decay(my_cs[32 * J] - my_cs[32 * I + 31], joined);
            UNROLL for (int ii = 0; ii < 2; ii++) {
                float v[2][2][4] = {};
                UNROLL for (int k = 0; k < FP; k += 16) {
                    uint32_t a[4], b[4];
                    load_a<FP, 0>(a, x, 32 * I + 16 * ii, k, lane);
                    UNROLL for (int jj = 0; jj < 2; jj++) {
                        load_b<FP, 0>(b, gy, 32 * J + 16 * jj, k, lane);
                        mma(v[jj][0], a, b);
                        mma(v[jj][1], a, b + 2);
                    }
                }
                int s = 16 * ii + g;               // in the block; the lane's other row is s + 8
                float dt0 = my_dt[s], dt1 = my_dt[s + 8];
                float f0 = between * s_decay[s], f1 = between * s_decay[s + 8];
                UNROLL for (int jj = 0; jj < 2; jj++) {
                    if (on_diagonal && ii > jj) continue;
                    uint32_t w[4];
                    UNROLL for (int n = 0; n < 2; n++) {
                        float L[4], *V = v[jj][n], *to = g_cb[ii][jj][n],
                                    *sums = &sum[4 * jj + 2 * n];
                        int l = 16 * jj + 8 * n + 2 * t4;
                        if (on_diagonal) {
                            UNROLL for (int e = 0; e < 4; e++) {
                                int le = 32 * I + l + e % 2, se = 32 * I + s + e / 2 * 8;
                                bool sees = le >= se && sm.doc[le] == sm.doc[se];
                                L[e] = decay(my_cs[le] - my_cs[se], sees);
                                if (le == se) trace += V[e];
                            }
                        } else {
                            float2 f = *(const float2 *)&l_decay[l];
                            L[0] = f0 * f.x;
                            L[1] = f0 * f.y;
                            L[2] = f1 * f.x;
                            L[3] = f1 * f.y;
                        }
                        float4 cb = sm.CB[role][ii][jj][n][lane];
                        w[2 * n] = pack(cb.x * L[0], cb.y * L[1]);
                        w[2 * n + 1] = pack(cb.z * L[2], cb.w * L[3]);
                        float v0 = V[0] * dt0, v1 = V[1] * dt0, v2 = V[2] * dt1, v3 = V[3] * dt1;
                        to[0] += v0 * L[0];
                        to[1] += v1 * L[1];
                        to[2] += v2 * L[2];
                        to[3] += v3 * L[3];
                        sums[0] += v0 * low(w[2 * n]) + v2 * low(w[2 * n + 1]);
                        sums[1] += v1 * high(w[2 * n]) + v3 * high(w[2 * n + 1]);
                    }
                    sm.W[i % 2][tile_number(2 * I + ii, 2 * J + jj)][lane] =
                        make_uint4(w[0], w[1], w[2], w[3]);
                }
            }
            // 8 columns a thread, 8 threads a column: halve until each has the sum of column number
            // g
            UNROLL for (int half = 4; half; half /= 2) {
                bool up = g & half;
                UNROLL for (int k = 0; k < half; k++) {
                    float give = up ? sum[k] : sum[k + half], keep = up ? sum[k + half] : sum[k];
                    sum[k] = keep + __shfl_xor_sync(~0u, give, 4 * half);
                }
            }
            sm.rowsum[i % 2][I][32 * J + g / 2 * 8 + 2 * t4 + g % 2] = sum[0];
            if (on_diagonal) {
                trace = warp_sum(trace);           // of x g_y^T: for g_D
                if (lane == 0) sm.diagonal[i % 2][I] = trace;
            }
            all_meet();                       // W of this head is there, and the next head's x, g_y
        }
        uint32_t *out = (uint32_t *)(g_CB + (number * d.G + blockIdx.y) * FQ * FQ);        // (s,l)
        UNROLL for (int m = 0; m < 8; m++) {
            int ii = m / 4, jj = m / 2 % 2, n = m % 2, column = (16 * jj + 8 * n) / 2 + t4;
            UNROLL for (int e = 0; e < 2; e++) {
                float *v = &g_cb[ii][jj][n][2 * e];
                int row = 16 * ii + g + 8 * e;
                uint32_t pair = on_diagonal && ii > jj ? 0u : pack(v[0], v[1]);
                out[(32 * I + row) * (FQ / 2) + 16 * J + column] = pair;
                if (!on_diagonal) out[(32 * J + row) * (FQ / 2) + 16 * I + column] = 0u;
            }
        }
    } else {                                       // ---- rows ----
        // warps w and w + 4 share a scheduler: long and short rows together
        int tile = warp < 4 ? warp : 11 - warp, s0 = 16 * tile;
        all_meet();
        uint32_t b_rows[N / 16][4];                // B, 16 rows, as operands A
        UNROLL for (int k = 0; k < N / 16; k++) {
            load_a<N, 0>(b_rows[k], B, s0, 16 * k, lane);
        }
        all_meet();
        #pragma unroll 1
        for (int i = 0; i < heads; i++) {
            all_meet();                            // W and gS of this head are here
            fresh();
            bf16 *x = sm.xy[i % 3];
            const bf16 *gy = x + FQ * FP, *gS = sm.gS[i % 2];
            const float *my_cs = sm.cs[i % 3];
            int h = first + i;
            float R[8][4] = {}, dt[2], Rx[2] = {}, skip = D[h];
            UNROLL for (int k = 0; k < N; k += 16) {
                UNROLL for (int j = 0; j < 8; j += 2) {
                    uint32_t b[4];
                    load_b_t<FP, 0>(b, gS, k, 8 * j, lane);
                    mma(R[j], b_rows[k / 16], b);
                    mma(R[j + 1], b_rows[k / 16], b + 2);
                }
            }
            UNROLL for (int e = 0; e < 2; e++) {
                int s = s0 + g + 8 * e;
                dt[e] = sm.dt[i % 3][s];
                float to_end = decay(my_cs[FQ - 1] - my_cs[s], sm.doc[s] == sm.doc[FQ - 1]);
                UNROLL for (int j = 0; j < 8; j++) {
                    R[j][2 * e] *= to_end;
                    R[j][2 * e + 1] *= to_end;
                }
            }
            fresh();
            const uint4 *W = &sm.W[i % 2][tile_number(tile, tile)][lane];
            uint4 next = *W;
            #pragma unroll 1
            for (int l = s0; l < FQ; l += 16) {
                uint32_t a[4] = {next.x, next.y, next.z, next.w}, b[4];
                if (l + 16 < FQ) next = *(W += 32);
                UNROLL for (int j = 0; j < 8; j += 2) {
                    load_b_t<FP, 0>(b, gy, l, 8 * j, lane);
                    mma(R[j], a, b);
                    mma(R[j + 1], a, b + 2);
                }
            }
            fresh();
            UNROLL for (int k = 0; k < 4; k++) {   // R . x, and g_x through this warp's rows of x
                uint32_t xa[4], ya[4];
                load_a<FP, 0>(xa, x, s0, 16 * k, lane);
                load_a<FP, 0>(ya, gy, s0, 16 * k, lane);
                __syncwarp();                      // every lane has read these columns
                UNROLL for (int m = 0; m < 4; m++) {
                    int j = 2 * k + m / 2, e = m % 2;
                    float *v = &R[j][2 * e];
                    Rx[e] += v[0] * low(xa[m]) + v[1] * high(xa[m]);
                    *(uint32_t *)&x[at<FP, 0>(s0 + 8 * e, 8 * j, g, 2 * t4)] =
                        pack(dt[e] * v[0] + skip * low(ya[m]), dt[e] * v[1] + skip * high(ya[m]));
                }
            }
            UNROLL for (int e = 0; e < 2; e++) {
                int s = s0 + g + 8 * e;
                float dot = quad_sum(Rx[e]);
                float sum = quad_sum(t4 <= tile / 2 ? sm.rowsum[i % 2][t4][s] : 0.0f);
                if (t4 == 0) {
                    g_dts[steps + i * (size_t)chunks * FQ + s] = dot;
                    rowsum[steps + i * (size_t)chunks * FQ + s] = sum;
                }
            }
            __syncwarp();
            bf16 *to = g_xBC + (token + s0) * d.S + h * P;
            store_tile<16, FP, 0, 32>(to, x + s0 * FP, d.S, rows - s0, P, lane);
            if (threadIdx.x == 0) {
                const float *part = sm.diagonal[i % 2];
                g_D_part[number * d.H + h] = part[0] + part[1] + (part[2] + part[3]);
            }
        }
    }
}

// ---- backward 3 and 4: g_C with pi, and g_B -----------------------------------------------------
// A block (8 warps of 32 rows x N/2) per chunk and group: the product with g_CB in two steps, then
// a step for every head, all in one accumulator, so that two blocks fit on a multiprocessor. Rows
// are scaled in the operand A. C . (a head's part) is the growth of C . accumulator.
// Of a first chunk without an initial state, S is zero, and gS of a last one without g_final; they
// are not in memory.
template<int N, bool OF_C> struct GbcShared {
    static constexpr int PADDED = OF_C && N > 64 ? PAD : 0;        // permuting takes registers
    static constexpr int A = FQ * (HALF + PADDED);                 // (Q,64), or of g_CB (64,Q)
    static constexpr int B = N * (HALF + PAD);                     // (64,N), or of a state (N,64)
    bf16 a[2][A], b[2][B], C[OF_C ? FQ * (N + PADDED) : 8];
    float scale[2][FQ], dots[3][2][FQ];            // dots: C . accumulator, by half of the columns;
};                                            // three, as a difference is read while one is written

template<int N, bool OF_C>
__global__ void __launch_bounds__(256, 2)
ssd_g_BC_fast_kernel(bf16 *g_xBC, float *pi, const bf16 *g_CB, const bf16 *states, const bf16 *g_y,
                     const bf16 *xBC, const float *cs, const float *dts, const int *doc, Dims d,
                     bool has_end) {
    extern __shared__ __align__(128) unsigned char shared[];
    next_may_start();
    wait_for_last();
    typedef GbcShared<N, OF_C> Shared;
    Shared &sm = *(Shared *)shared;
    constexpr int J = N / 16, PADDED = Shared::PADDED;
    int me = threadIdx.x, lane = me % 32, warp = me / 32, g = lane / 4, t4 = lane % 4;
    int m0 = warp / 2 * 32, n0 = warp % 2 * (N / 2);
    int c = blockIdx.x, chunks = d.chunks, heads = d.H / d.G, first = blockIdx.y * heads, P = d.P;
    int rows = min(FQ, (int)d.T - c * FQ), steps = 2 + heads;
    size_t r = blockIdx.z, token = r * d.T + c * FQ, number = r * chunks + c;
    const bf16 *B = xBC + token * d.S + d.E + blockIdx.y * d.N, *C = B + d.G * d.N;
    g_CB += (number * d.G + blockIdx.y) * FQ * FQ; // (s,l)
    const bf16 *in = OF_C ? g_y + token * d.E + first * P : xBC + token * d.S + first * P;
    states += (number * d.H + first) * d.N * P;
    cs += ((r * d.H + first) * chunks + c) * FQ + me;
    dts += ((r * d.H + first) * chunks + c) * FQ + me;
    pi += ((r * d.H + first) * chunks + c) * FQ + me;
    auto load = [&](int i) {                       // the operands of step i
        bf16 *a = sm.a[i % 2], *b = sm.b[i % 2];
        if (i < 2) {                              // g_C = g_CB B, stored transposed; g_B = g_CB^T C
            const bf16 *other = (OF_C ? B : C) + i * HALF * d.S;
            if (OF_C) load_tile<HALF, FQ, PADDED, 256>(a, g_CB + i * HALF * FQ, FQ, HALF, FQ, me);
            else load_tile<FQ, HALF, PADDED, 256>(a, g_CB + i * HALF, FQ, FQ, HALF, me);
            load_tile<HALF, N, PADDED, 256>(b, other, d.S, rows - i * HALF, d.N, me);
        } else {                                   // g_C += g_y S^T; g_B += x gS^T
            load_tile<FQ, FP, PADDED, 256>(a, in + (i - 2) * P, OF_C ? d.E : d.S, rows, P, me);
            bool zero = !has_end && (OF_C ? c == 0 : c + 1 == chunks);
            load_tile<N, FP, PADDED, 256>(b, states + (i - 2) * d.N * P, P, zero ? 0 : d.N, P, me);
        }
        cp_async_commit();
    };
    bool reached = true;                           // from this block's other end: the same document
    if (doc && me < FQ) {
        const int *docs = doc + token;
        int other = OF_C ? (c > 0 ? docs[-1] : 0) : docs[rows - 1];
        reached = docs[min(me, rows - 1)] == other;
    }
    float mine = 0.0f, last = 0.0f, dt = 0.0f;     // what the scale of the next step is made of
    auto fetch = [&](int i) {
        if (i < 2 || me >= FQ) return;
        size_t at = (i - 2) * (size_t)chunks * FQ;
        mine = cs[at];
        if (OF_C) return;
        last = cs[at + FQ - 1 - me];
        dt = dts[at];
    };
    auto put = [&](int i) {
        if (me >= FQ) return;
        sm.scale[i % 2][me] = OF_C ? decay(mine, reached) : dt * decay(last - mine, reached);
    };
    auto finish = [&](int i) {
        if (!OF_C || i < 2 || me >= FQ) return;
        float (*now)[FQ] = sm.dots[i % 3], (*before)[FQ] = sm.dots[(i - 1) % 3];
        pi[(i - 2) * (size_t)chunks * FQ] =
            now[0][me] - before[0][me] + (now[1][me] - before[1][me]);
    };
    if (OF_C) load_tile<FQ, N, PADDED, 256>(sm.C, C, d.S, rows, d.N, me);
    load(0);
    put(0);
    float acc[2][J][4] = {};
    for (int i = 0; i < steps; i++) {
        cp_async_wait<0>();
        __syncthreads();                         // step i is here; everyone is done with step i - 1
        if (i > 0) finish(i - 1);
        if (i + 1 < steps) {
            load(i + 1);
            fetch(i + 1);
        }
        const bf16 *sa = sm.a[i % 2], *sb = sm.b[i % 2];
        float f[2][2];
        UNROLL for (int m = 0; m < 4; m++) {
            f[m / 2][m % 2] = i < 2 ? 1.0f : sm.scale[i % 2][m0 + 8 * m + g];
        }
        _Pragma("unroll 2") for (int k = 0; k < HALF; k += 16) {
            uint32_t a[2][4], b[4];
            UNROLL for (int m = 0; m < 2; m++) {
                if (OF_C && i < 2) {
                    load_a_t<FQ, PADDED>(a[m], sa, k, m0 + 16 * m, lane);
                    continue;
                }
                load_a<HALF, PADDED>(a[m], sa, m0 + 16 * m, k, lane);
                UNROLL for (int e = 0; e < 4; e++) {
                    a[m][e] = pack(low(a[m][e]) * f[m][e % 2], high(a[m][e]) * f[m][e % 2]);
                }
            }
            UNROLL for (int j = 0; j < J; j += 2) {
                if (i < 2) load_b_t<N, PADDED>(b, sb, k, n0 + 8 * j, lane);
                else load_b<FP, PADDED>(b, sb, n0 + 8 * j, k, lane);
                UNROLL for (int m = 0; m < 2; m++) {
                    mma(acc[m][j], a[m], b);
                    mma(acc[m][j + 1], a[m], b + 2);
                }
            }
        }
        if (OF_C) {
            UNROLL for (int m = 0; m < 4; m++) {
                float dot = 0.0f;
                UNROLL for (int j = 0; j < J; j++) {
                    int place = at<N, PADDED>(m0 + 8 * m, n0 + 8 * j, g, 2 * t4);
                    uint32_t pair = *(const uint32_t *)&sm.C[place];
                    const float *v = &acc[m / 2][j][m % 2 * 2];
                    dot += v[0] * low(pair) + v[1] * high(pair);
                }
                dot = quad_sum(dot);
                if (t4 == 0) sm.dots[i % 3][warp % 2][m0 + 8 * m + g] = dot;
            }
        }
        if (i + 1 < steps) put(i + 1);
    }
    __syncthreads();
    finish(steps - 1);
    bf16 *out = (bf16 *)shared;                   // (Q,N) through shared memory, for 16-byte stores
    UNROLL for (int m = 0; m < 4; m++) {
        UNROLL for (int j = 0; j < J; j++) {
            const float *v = &acc[m / 2][j][m % 2 * 2];
            int place = at<N, PADDED>(m0 + 8 * m, n0 + 8 * j, g, 2 * t4);
            *(uint32_t *)&out[place] = pack(v[0], v[1]);
        }
    }
    __syncthreads();
    bf16 *to = g_xBC + token * d.S + d.E + ((OF_C ? d.G : 0) + blockIdx.y) * d.N;
    store_tile<FQ, N, PADDED, 256>(to, out, d.S, rows, d.N, me);
}

// ---- backward 5: the sums over the steps of a chunk ---------------------------------------------
// A warp per head, 4 steps a lane: da_t = kappa + the sum of q before t + that of pi from t on,
// with q = dt g_dt(direct) - rowsum; from it g_dt (n,H), through shared memory, and this chunk's
// part of g_A, g_A_part (R,chunks,H).
__global__ void __launch_bounds__(256)
ssd_finish_fast_kernel(float *g_dt, float *g_A_part, const float *g_dts, const float *rowsum,
                       const float *pi, const float *kappa, const float *dts, const float *A_log,
                       Dims d) {
    __shared__ float tile[FQ][9];
    next_may_start();
    wait_for_last();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t c = blockIdx.x, h0 = blockIdx.y * 8, h = h0 + warp, r = blockIdx.z;
    if (h < d.H) {
        size_t at = ((r * d.H + h) * d.chunks + c) * FQ + 4 * lane, number = r * d.chunks + c;
        float4 dt = *(const float4 *)(dts + at), direct = *(const float4 *)(g_dts + at);
        float4 sum = *(const float4 *)(rowsum + at), p = *(const float4 *)(pi + at);
        float q0 = dt.x * direct.x - sum.x, q1 = dt.y * direct.y - sum.y,
              q2 = dt.z * direct.z - sum.z, q3 = dt.w * direct.w - sum.w;
        float own = q0 + q1 + q2 + q3, from_own = p.x + p.y + p.z + p.w;
        float before = __shfl_up_sync(~0u, warp_scan(own), 1), upto = warp_scan(from_own);
        if (lane == 0) before = 0.0f;
        float beyond = __shfl_sync(~0u, upto, 31) - upto;
        float base = kappa[number * d.H + h] + before + beyond, a = -expf(A_log[h]);
        float da0 = base + p.x + p.y + p.z + p.w, da1 = base + q0 + p.y + p.z + p.w;
        float da2 = base + q0 + q1 + p.z + p.w, da3 = base + q0 + q1 + q2 + p.w;
        float *to = &tile[4 * lane][warp];
        to[0] = direct.x + a * da0;
        to[9] = direct.y + a * da1;
        to[18] = direct.z + a * da2;
        to[27] = direct.w + a * da3;
        float part = warp_sum(dt.x * da0 + dt.y * da1 + dt.z * da2 + dt.w * da3);
        if (lane == 0) g_A_part[number * d.H + h] = part;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * FQ; i += 256) {
        size_t t = c * FQ + i / 8, k = h0 + i % 8;
        if (t < d.T && k < d.H) g_dt[(r * d.T + t) * d.H + k] = tile[i / 8][i % 8];
    }
}
