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
constexpr int HALF = FQ / 2;                       // what a walk does at once
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
    return same_document ? exp2_fast(exponent) : 0.0f;
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

// Two accumulators that lie side by side, as bf16 into the part of a tile that begins at (row, col)
template<int COLS, int PADDED>
__device__ inline void store_d(bf16 *tile, const float d[2][4], int row, int col, unsigned lane) {
    uint32_t r[4] = {pack(d[0][0], d[0][1]), pack(d[0][2], d[0][3]),
                     pack(d[1][0], d[1][1]), pack(d[1][2], d[1][3])};
    stmatrix(tile + at<COLS, PADDED>(row, col, lane % 16, lane / 16 * 8), r);
}

// A lane's part of the diagonal of a 16x16 tile, in the accumulators of its left and right half
__device__ inline float diagonal_part(const float v[2][4], int g, int t4) {
    if (g / 2 != t4) return 0.0f;
    return g % 2 ? v[0][1] + v[1][3] : v[0][0] + v[1][2];
}

// Threads 0 <= me < THREADS start copying ROWS x COLS elements; zeros from `rows` and `cols` on.
template<int ROWS, int COLS, int PADDED, int THREADS>
__device__ inline void load_tile(bf16 *to, const bf16 *from, int pitch, int rows, int cols,
                                 int me) {
    constexpr int STEP = THREADS / (COLS / 8);             // rows at once
    static_assert(PADDED || STEP % 8 == 0, "all rows of a thread are permuted alike");
    int row = me / (COLS / 8), col = me % (COLS / 8) * 8;
    bool inside = col < cols;
    from += row * pitch + col;
    to += at<COLS, PADDED>(row, col);
    UNROLL for (int i = 0; i < ROWS / STEP; i++, from += STEP * pitch) {
        bool valid = inside && row + i * STEP < rows;
        cp_async<16>(to + i * STEP * (COLS + PADDED), from, valid);
    }
}
template<int ROWS, int COLS, int PADDED, int THREADS> // and back
__device__ inline void store_tile(bf16 *to, const bf16 *from, int pitch, int rows, int cols,
                                  int me) {
    constexpr int STEP = THREADS / (COLS / 8);
    int row = me / (COLS / 8), col = me % (COLS / 8) * 8;
    to += row * pitch + col;
    if (col >= cols) rows = 0;
    UNROLL for (int i = 0; i < ROWS / STEP; i++, to += STEP * pitch) {
        uint4 eight = *(const uint4 *)(from + at<COLS, PADDED>(row + i * STEP, col));
        if (row + i * STEP < rows) *(uint4 *)to = eight;
    }
}

// ---- forwards, and back -------------------------------------------------------------------------
// g_x and gS follow from g_y as y and S do from x: by the same walk over the chunks, from the end
// of the row to its beginning. With steps counted as the walk comes by them,
//   forward   y   = (M diag(dt) + D) x   + diag(exp(e)) C S        M_ij = C_i . B_j exp(e_i - e_j)
//             next S  = exp(total) S  + B^T diag(dt exp(total - e)) x
//   BACK      g_x = (diag(dt) M + D) g_y + diag(dt exp(e)) B gS    M_ij = B_i . C_j exp(e_i - e_j)
//             next gS = exp(total) gS + C^T diag(exp(total - e)) g_y
// where total is the sum of dt A over the chunk, and e_i over its steps up to i, BACK without i
// itself. The kernels below have the names of the forward walk: BACK, read g_y for x, C for B, B
// for C, gS for S and g_x for y.

// Chunk i on the walk along a row, from its step `first` on, of which `rows` are left; step k after
// that is token at + k of the row or, BACK, token at - k.
template<bool BACK> struct Steps {
    int c, at, rows;
    __device__ Steps(const Dims &d, int i, int first = 0) {
        int chunks = d.chunks, T = d.T;
        c = BACK ? chunks - 1 - i : i;
        int all = min(FQ, T - c * FQ), there = min(first, all - 1);
        at = c * FQ + (BACK ? all - 1 - there : there);
        rows = max(all - first, 0);
    }
    static __device__ int by(size_t steps) { return BACK ? -(int)steps : (int)steps; }
    // Of a whole chunk, doc being that of the row: the documents of the states before and after it
    // are those of the earlier of two tokens; NULL: document 0.
    __device__ const int *enters(const int *doc) const {
        return BACK ? doc + at : c > 0 ? doc + at - 1 : NULL;
    }
    __device__ const int *leaves(const int *doc) const {
        return !BACK ? doc + at + rows - 1 : c > 0 ? doc + at - rows : NULL;
    }
};

// ---- sums of dt A, and CB -----------------------------------------------------------------------
// Blocks of two kinds for each chunk:
//   eight heads   cs, dts (R,H,chunks,Q) from dt (n,H), through shared memory; a warp a head. cs is
//                 the sum up to and with each step; walk_cs and walk_dts are e and dt of the walk
//                 (BACK only; forward they are the same)
//   a group       CB of each half of the chunk, as bf16 operands A: 16x16 tile (i,j), j <= i < 4,
//                 lies at i (i+1)/2 + j, lane by lane; a warp has a row of the tiles
constexpr int HALF_TILES = 10;                     // of half a chunk
template<int N> constexpr size_t CB_SHARED = 2 * FQ * (N + PAD) * sizeof(bf16);

template<int N, bool BACK>
__device__ inline void make_CB(bf16 *B, uint4 *CB, const bf16 *xBC, size_t g, const Dims &d) {
    bf16 *C = B + FQ * (N + PAD);
    Steps<BACK> steps(d, blockIdx.x);
    int me = threadIdx.x, lane = me % 32, warp = me / 32;
    size_t r = blockIdx.z, number = r * d.chunks + steps.c;
    const bf16 *from = xBC + (r * d.T + steps.at) * d.S + d.E + g * d.N;
    int pitch = steps.by(d.S);
    load_tile<FQ, N, PAD, 256>(BACK ? C : B, from, pitch, steps.rows, d.N, me);
    load_tile<FQ, N, PAD, 256>(BACK ? B : C, from + d.G * d.N, pitch, steps.rows, d.N, me);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t a[N / 16][4], b[4];
    UNROLL for (int k = 0; k < N / 16; k++) {
        load_a<N, PAD>(a[k], C, 16 * warp, 16 * k, lane);
    }
    int half = warp / 4, i = warp % 4;
    CB += (((number * d.G + g) * 2 + half) * HALF_TILES + i * (i + 1) / 2) * 32 + lane;
    for (int j = 0; j <= i; j++) {
        float v[2][4] = {};
        UNROLL for (int k = 0; k < N / 16; k++) {
            load_b<N, PAD>(b, B, HALF * half + 16 * j, 16 * k, lane);
            mma(v[0], a[k], b);
            mma(v[1], a[k], b + 2);
        }
        CB[j * 32] = make_uint4(pack(v[0][0], v[0][1]), pack(v[0][2], v[0][3]),
                                pack(v[1][0], v[1][1]), pack(v[1][2], v[1][3]));
    }
}

template<int N, bool BACK>
__global__ void __launch_bounds__(256, 2)
ssd_prepare_fast_kernel(float *cs, float *dts, float *walk_cs, float *walk_dts, uint4 *CB,
                        const float *dt, const float *A_log, const bf16 *xBC, Dims d) {
    extern __shared__ __align__(128) unsigned char shared[];
    next_may_start();
    int groups_of_8 = (int)pieces(d.H, 8), h0 = blockIdx.y * 8;
    if ((int)blockIdx.y >= groups_of_8) {
        make_CB<N, BACK>((bf16 *)shared, CB, xBC, blockIdx.y - groups_of_8, d);
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
    float upto = warp_scan(sum.w), before = __shfl_up_sync(~0u, upto, 1);
    if (lane == 0) before = 0.0f;
    size_t to = ((r * d.H + h) * d.chunks + c) * FQ;
    sum = make_float4(before + sum.x, before + sum.y, before + sum.z, before + sum.w);
    *(float4 *)(cs + to + 4 * lane) = sum;
    *(float4 *)(dts + to + 4 * lane) = step;
    if (BACK) {
        float total = __shfl_sync(~0u, upto, 31);
        int rows = min(FQ, (int)(d.T - c * FQ));
        const float *sums = &sum.x, *dt_of = &step.x;
        UNROLL for (int k = 0; k < 4; k++) {       // past the row's end: total, and dt is 0
            int t = 4 * lane + k, i = t < rows ? rows - 1 - t : t;
            walk_cs[to + i] = t < rows ? total - sums[k] : total;
            walk_dts[to + i] = dt_of[k];
        }
    }
}

// ---- a walk -------------------------------------------------------------------------------------
// All chunks, row after row, are a line; an item of work is a part of it, `length` chunks, for a
// pair of heads of one group. All pairs of a part come one after the other, so that blocks at work
// at the same time share its B and C in L2. A block takes item blockIdx.x, then the one
// gridDim.x after it. Where an item begins inside a row, the state there is not known:
// ssd_local_kernel finds beforehand what the last row of each item adds to it.
struct Walk {
    int item, from, to;                            // on the line
    int group, first;                              // heads `first` and `first` + 1 of the group
    int r, begin, end;                             // the part of row r that lies there

    __device__ static int pairs(const Dims &d) { return d.G * pieces(d.H / d.G, 2); }
    __device__ void start(int number, int length, const Dims &d) {
        int of_group = pieces(d.H / d.G, 2);
        item = number;
        from = item / pairs(d) * length;
        to = min(from + length, (int)(d.R * d.chunks));
        group = item % pairs(d) / of_group;
        first = item % of_group * 2;
        enter(from / (int)d.chunks, d);
    }
    __device__ void enter(int row, const Dims &d) {
        r = row;
        begin = max(from - r * (int)d.chunks, 0);
        end = min(to - r * (int)d.chunks, (int)d.chunks);
    }
    __device__ bool there() const { return begin < end; }  // else the line has ended
    __device__ void set_next(const Walk &w, int length, const Dims &d) {
        *this = w;
        if ((r + 1) * (int)d.chunks < to) enter(r + 1, d);
        else start(item + gridDim.x, length, d);
    }
    __device__ int head(int slot, const Dims &d) const {   // the last one twice if odd
        int heads = d.H / d.G;
        return group * heads + min(first + slot, heads - 1);
    }
};

// What all warps need to know of a chunk of two heads. There are states before it (number 0), in
// its middle (1) and after it (2).
struct HeadSteps {
    float cs[2][FQ], dt[2][FQ];                    // e and dt
    int doc[FQ + 4];                               // and from FQ on those of states 0 and 2

    template<bool BACK> __device__ float e_of(int state, int slot, float a) const {
        if (state == 0) return 0.0f;
        if (state == 1) return cs[slot][HALF - !BACK];
        return cs[slot][FQ - 1] + (BACK ? a * dt[slot][FQ - 1] : 0.0f);
    }
    template<bool BACK> __device__ int doc_of(int state) const {
        return state == 1 ? doc[HALF - !BACK] : doc[FQ + state / 2];
    }
};

// Where the tensors of a walk begin: its row, of its two heads and their group
struct Places {
    const bf16 *x, *BC[2];
    const uint4 *CB;
    size_t states[2];                              // of two heads
    const float *tables[4];                        // e, dt of the first head, and of the second
    const int *doc;
    int second;                                    // columns of the second head

    template<bool BACK>
    __device__ void set(const Walk &w, const bf16 *in, size_t in_pitch, const bf16 *xBC,
                        const float *cs, const float *dts, const int *docs, const Dims &d) {
        int heads = d.H / d.G;
        size_t token = w.r * d.T;
        const bf16 *B = xBC + token * d.S + d.E + w.group * d.N, *C = B + d.G * d.N;
        x = in + token * in_pitch + (w.group * heads + w.first) * d.P;
        BC[0] = BACK ? C : B;
        BC[1] = BACK ? B : C;
        for (int i = 0; i < 4; i++) {
            tables[i] = (i % 2 ? dts : cs) + (w.r * d.H + w.head(i / 2, d)) * d.chunks * FQ;
        }
        doc = docs ? docs + token : NULL;
        second = w.first + 1 < heads ? (int)d.P : 0;
    }
    __device__ void set(const Walk &w, const uint4 *tiles, const Dims &d) {
        size_t number = w.r * d.chunks;
        CB = tiles + (number * d.G + w.group) * 2 * HALF_TILES * 32;
        for (int i = 0; i < 2; i++) {
            states[i] = (number * d.H + w.head(i, d)) * d.N * d.P;
        }
    }
};

// Copies by THREADS threads, 0 <= me, of a half of a chunk: x of two heads, B (0) or C (1)
template<bool BACK, int THREADS>
__device__ inline void load_x(bf16 (*x)[HALF * FP], const Places &row, int chunk,
                              int half, int in_pitch, const Dims &d, int me) {
    Steps<BACK> steps(d, chunk, half * HALF);
    const bf16 *from = row.x + (int64_t)steps.at * in_pitch;
    int P = d.P, pitch = steps.by(in_pitch);
    load_tile<HALF, FP, 0, THREADS>(x[0], from, pitch, steps.rows, P, me);
    load_tile<HALF, FP, 0, THREADS>(x[1], from + P, pitch, steps.rows, row.second, me);
}
template<int N, bool BACK, int THREADS>
__device__ inline void load_BC(bf16 *to, int which, const Places &row, int chunk, int half,
                               const Dims &d, int me) {
    Steps<BACK> steps(d, chunk, half * HALF);
    int S = d.S;
    const bf16 *from = row.BC[which] + (int64_t)steps.at * S;
    load_tile<HALF, N, 0, THREADS>(to, from, steps.by(S), steps.rows, d.N, me);
}
// Of a whole chunk: e, dt and documents
template<bool BACK, bool DOCS, int THREADS>
__device__ inline void load_steps(HeadSteps &to, const Places &row, int chunk, const Dims &d,
                                  int me) {
    Steps<BACK> steps(d, chunk);
    UNROLL for (int j = me; j < 128; j += THREADS) {
        float *table = j / 32 % 2 ? to.dt[j / 64] : to.cs[j / 64];
        int i = j % 32 * 4;
        cp_async<16>(table + i, row.tables[j / 32] + steps.c * FQ + i, true);
    }
    if (!DOCS) return;
    const int *doc = row.doc;
    UNROLL for (int i = me; i < FQ; i += THREADS) {
        cp_async<4>(&to.doc[i], doc + steps.at + steps.by(min(i, steps.rows - 1)), true);
    }
    if (me >= 2) return;
    const int *other = me ? steps.leaves(doc) : steps.enters(doc);
    cp_async<4>(&to.doc[FQ + me], other ? other : doc, other != NULL);
}

// to[j] = exp2(from - e_j) where step j of this half is of the document `key`, times dt_j if
// forward; by one warp for itself
template<bool BACK, bool DOCS>
__device__ inline void decays(bf16 *to, const HeadSteps &steps, int slot, int half, float from,
                              int key) {
    int j = threadIdx.x % 32 * 2, step = half * HALF + j;
    float2 e = *(const float2 *)(steps.cs[slot] + step), dt = make_float2(1.0f, 1.0f);
    if (!BACK) dt = *(const float2 *)(steps.dt[slot] + step);
    int2 k = DOCS ? *(const int2 *)(steps.doc + step) : make_int2(key, key);
    *(uint32_t *)(to + j) = pack(dt.x * decay(from - e.x, k.x == key),
                                 dt.y * decay(from - e.y, k.y == key));
    __syncwarp();
}

// acc (16 MT rows from n0 on, 64) = through acc + B^T diag(weight) x of a half of a chunk
template<int N, int MT>
__device__ inline void add_steps(float acc[MT][8][4], const bf16 *B, const bf16 *x,
                                 const bf16 *weight, int n0, float through, int lane) {
    int t4 = lane % 4;
    UNROLL for (int i = 0; i < MT; i++) {
        UNROLL for (int j = 0; j < 8; j++) {
            UNROLL for (int e = 0; e < 4; e++) {
                acc[i][j][e] *= through;
            }
        }
    }
    UNROLL for (int k = 0; k < HALF; k += 16) {
        uint32_t a[MT][4], b[4];
        uint32_t w0 = *(const uint32_t *)(weight + k + 2 * t4);
        uint32_t w1 = *(const uint32_t *)(weight + k + 8 + 2 * t4);
        UNROLL for (int i = 0; i < MT; i++) {
            load_a_t<N, 0>(a[i], B, k, n0 + 16 * i, lane);
            UNROLL for (int e = 0; e < 4; e++) {
                a[i][e] = mul_bf16x2(a[i][e], e < 2 ? w0 : w1);
            }
        }
        UNROLL for (int j = 0; j < 8; j += 2) {
            load_b_t<FP, 0>(b, x, k, 8 * j, lane);
            UNROLL for (int i = 0; i < MT; i++) {
                mma(acc[i][j], a[i], b);
                mma(acc[i][j + 1], a[i], b + 2);
            }
        }
    }
}
// f(two accumulators of these rows, their n and p)
template<int MT, class F>
__device__ inline void each_pair(float acc[MT][8][4], int n0, int lane, F f) {
    int g = lane / 4, t4 = lane % 4;
    UNROLL for (int i = 0; i < MT; i++) {
        UNROLL for (int j = 0; j < 8; j++) {
            UNROLL for (int e = 0; e < 4; e += 2) {
                f(acc[i][j][e], acc[i][j][e + 1], n0 + g + 16 * i + 4 * e, 8 * j + 2 * t4);
            }
        }
    }
}

// ---- what the end of an item adds to the state --------------------------------------------------
// A block for each item, but for those of the last part of the line: of the row that goes on in the
// next part its chunks here, from a zero state: local (items,2,N,P) padded, and how they decay what
// comes in, local_decay (items,2). 16 warps: two heads, two halves of each chunk, and N/4 rows
// each; the halves are added at the end. Here is the seam for splitting a sequence over GPUs.
constexpr int STAGES = 3;                          // chunks on their way, or at work
template<int N> struct LocalShared {
    bf16 B[STAGES][2][HALF * N];                   // of 2 halves
    bf16 x[STAGES][2][2][HALF * FP];               // of 2 halves, 2 heads
    HeadSteps steps[STAGES];
    bf16 weight[16][HALF];
    Walk walk;
    Places row;
};

template<int N, bool BACK, bool DOCS>
__global__ void __launch_bounds__(512, 1)
ssd_local_kernel(float *local, float *local_decay, const bf16 *in, size_t in_pitch,
                 const bf16 *xBC, const float *cs, const float *dts, const float *A_log,
                 const int *doc, Dims d, int length) {
    extern __shared__ __align__(128) unsigned char shared[];
    LocalShared<N> &sm = *(LocalShared<N> *)shared;
    wait_for_last();                               // no next_may_start: a walk so begun is slower
    int me = threadIdx.x, lane = me % 32, warp = me / 32, half = warp / 8, slot = warp / 4 % 2;
    constexpr int MT = N / 64;
    int n0 = warp % 4 * (N / 4);
    if (me == 0) {
        sm.walk.start(blockIdx.x, length, d);
        sm.walk.enter(sm.walk.to / (int)d.chunks, d);
    }
    __syncthreads();
    if (!sm.walk.there()) return;                  // the item ends with its last row
    const Walk &w = sm.walk;
    Places &row = sm.row;
    if (me == 0) row.set<BACK>(w, in, in_pitch, xBC, cs, dts, doc, d);
    __syncthreads();
    float a = -expf(A_log[w.head(slot, d)]) * 1.44269504f, total_decay = 1.0f, acc[MT][8][4] = {};
    auto load = [&](int chunk) {
        int stage = chunk % STAGES, me = threadIdx.x % 256;
        if (chunk < w.end) {
            load_x<BACK, 256>(sm.x[stage][half], row, chunk, half, in_pitch, d, me);
            load_BC<N, BACK, 256>(sm.B[stage][half], 0, row, chunk, half, d, me);
            if (threadIdx.x < 128) {
                load_steps<BACK, DOCS, 128>(sm.steps[stage], row, chunk, d, me);
            }
        }
        cp_async_commit();
    };
    load(w.begin);
    load(w.begin + 1);
    #pragma unroll 1
    for (int chunk = w.begin; chunk < w.end; chunk++) {
        cp_async_wait<1>();
        __syncthreads();                           // it is here, and nobody needs the one before
        load(chunk + 2);
        int stage = chunk % STAGES;
        const HeadSteps &steps = sm.steps[stage];
        float total = steps.e_of<BACK>(2, slot, a);
        int before = DOCS ? steps.doc_of<BACK>(0) : 0, after = DOCS ? steps.doc_of<BACK>(2) : 0;
        float through = decay(total, before == after);
        decays<BACK, DOCS>(sm.weight[warp], steps, slot, half, total, after);
        add_steps<N, MT>(acc, sm.B[stage][half], sm.x[stage][half][slot], sm.weight[warp], n0,
                         through, lane);
        total_decay *= through;
    }
    __syncthreads();
    float2 *other = (float2 *)shared;              // what the second half adds
    int at = warp % 8 * 32 + lane;
    each_pair<MT>(acc, n0, lane, [&](float &u, float &v, int, int) {
        if (half == 1) other[at] = make_float2(u, v);
        at += 256;
    });
    __syncthreads();
    if (half == 1) return;
    at = warp % 8 * 32 + lane;
    size_t number = blockIdx.x * 2 + slot;
    each_pair<MT>(acc, n0, lane, [&](float &u, float &v, int n, int p) {
        float2 more = other[at];
        *(float2 *)(local + (number * N + n) * FP + p) = make_float2(u + more.x, v + more.y);
        at += 256;
    });
    if (warp % 4 == 0 && lane == 0) local_decay[number] = total_decay;
}

// ---- the walk: states and y, or gS and g_x, in one kernel ---------------------------------------
// Copies run ahead, over the end of a row too, so that only a block's first half chunk waits for
// them.
//   state warps   S = through S + (dt exp(total - e) B)^T x, in float accumulators; they fetch B, C
//                 and CB, and write the states before each chunk
//   y warps       y = M x + diag(exp(e)) C S, M = (CB o L) diag(dt) with D added on its diagonal
//                 (BACK dt scales the rows in place of the columns); they fetch x, e, dt
// A state warp has half of the state (N,P) of a head, a y warp a half chunk of a head: few warps of
// 64 rows and columns need few bytes of shared memory, which is what binds. In row tile i of M, but
// for its diagonal tile, L_ls dt_s is exp2(e_l - e_a) ratio_s with a = 16 i: one exponential for a
// column instead of one an element.
// All warps meet once a half. Between two meetings, of half h and of half h + 1,
//   the state warps add half h to S (of which half h's y warps have a copy in shared memory)
//   the y warps of half h do C S and M below its diagonal tiles
//   the other y warps do the diagonal tiles of half h - 1, and write its y
// so that what waits for tensor cores, for shared memory and for other instructions runs at once.
template<int N> struct WalkShared {
    bf16 x[3][2][HALF * FP];                       // of 3 halves, 2 heads
    bf16 B[2][HALF * N], C[2][HALF * N];           // of 2 halves
    bf16 S[2][2][N * (FP + PAD)];                  // before 2 halves, of 2 heads
    uint4 CB[2][2][HALF_TILES * 32];               // of 2 chunks, 2 halves
    uint4 D[4][32];                                // of each y warp: D I as an operand A
    HeadSteps steps[2];                            // of 2 chunks
    bf16 weight[4][HALF], ratio[4][4][HALF];       // of each state warp; of each y warp
    Walk walk[3];                                  // one ends, one is on, one is being fetched
    Places row[3];
};

template<int N, bool BACK, bool DOCS>
__global__ void __launch_bounds__(256, 1)
ssd_walk_kernel(bf16 *out, size_t out_pitch, bf16 *states, float *final, const float *local,
                const float *local_decay, const bf16 *in, size_t in_pitch, const bf16 *xBC,
                const uint4 *CB, const float *cs, const float *dts, const float *A_log,
                const float *D, const float *initial, const int *doc, Dims d, int length) {
    extern __shared__ __align__(128) unsigned char shared[];
    WalkShared<N> &sm = *(WalkShared<N> *)shared;
    next_may_start();
    wait_for_last();
    int lane, g, t4;
    auto fresh = [&] {                             // addresses made of these are worked out again
        lane = opaque(threadIdx.x) & 31;
        g = lane / 4;
        t4 = lane % 4;
    };
    fresh();
    int all_warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    int heads = d.H / d.G, chunks = d.chunks, P = d.P;
    auto meet = [&] {                              // with all copies of before it there
        cp_async_commit();
        cp_async_wait<0>();
        barrier_wait(1, 256);
    };
    auto next3 = [](int i) { return i < 2 ? i + 1 : 0; };
    // load(turn, chunk, half, buffer) of the half after this one, be it of the next walk; `buffer`
    // is that of its chunk
    auto load_next = [&](auto load, int turn, int chunk, int half, int buffer) {
        bool ends = half == 1 && chunk + 1 == sm.walk[turn].end;
        if (ends) turn = next3(turn);
        const Walk &w = sm.walk[turn];
        if (w.there()) load(turn, ends ? w.begin : chunk + half, half ^ 1, buffer ^ half);
    };
    auto place = [&](int turn) {                   // by one thread
        const Walk &w = sm.walk[turn];
        Places &row = sm.row[turn];
        if (!w.there()) return;
        row.set<BACK>(w, in, in_pitch, xBC, cs, dts, doc, d);
        row.set(w, CB, d);
    };
    float acc[4][8][4];                            // S or y: 16-row tiles, 8-column tiles
    // Which of three walks is on; in which of two buffers its chunk lies, and in which of three x
    int turn = 0, buffer = 0, third = 0;
    if (threadIdx.x == 0) {
        sm.walk[0].start(blockIdx.x, length, d);
        place(0);
    }
    __syncthreads();

    if (all_warp < 4) {                            // ---- state warps ----
        constexpr int MT = N / 32;
        int slot = all_warp / 2, n0 = all_warp % 2 * (N / 2);
        auto inside = [&](size_t n, int p) { return n < d.N && p < P; };
        auto load = [&](int turn, int chunk, int half, int buffer) {
            int me = opaque(threadIdx.x) & 127;
            load_BC<N, BACK, 128>(sm.B[half], 0, sm.row[turn], chunk, half, d, me);
            load_BC<N, BACK, 128>(sm.C[half], 1, sm.row[turn], chunk, half, d, me);
            if (half == 1) return;
            int c = Steps<BACK>(d, chunk).c;
            const uint4 *tiles = sm.row[turn].CB + (int64_t)c * ((int)d.G * 2 * HALF_TILES * 32);
            UNROLL for (int i = me; i < 2 * HALF_TILES * 32; i += 128) {
                cp_async<16>(sm.CB[buffer][0] + i, tiles + i, true);
            }
        };
        load(0, sm.walk[0].begin, 0, 0);
        for (; sm.walk[turn].there(); turn = next3(turn)) {
            const Walk &w = sm.walk[turn];
            if (threadIdx.x == 0) {
                sm.walk[next3(turn)].set_next(w, length, d);
                place(next3(turn));
            }
            int h = w.head(slot, d);
            bool mine = w.first + slot < heads;
            float a = BACK ? -expf(A_log[h]) * 1.44269504f : 0.0f;
            size_t state = (w.r * d.H + h) * d.N * P;      // in initial and final
            each_pair<MT>(acc, n0, lane, [&](float &u, float &v, int n, int p) {
                float2 s = initial && inside(n, p) ? *(const float2 *)(initial + state + n * P + p)
                                                   : make_float2(0.0f, 0.0f);
                u = s.x;
                v = s.y;
            });
            // What the parts of this row in the items before leave
            int before_it = (w.from / length - w.r * chunks / length) * Walk::pairs(d);
            for (int i = w.item - (w.begin > 0 ? before_it : 0); i < w.item; i += Walk::pairs(d)) {
                int number = i * 2 + slot;
                float through = local_decay[number];
                each_pair<MT>(acc, n0, lane, [&](float &u, float &v, int n, int p) {
                    float2 s = *(const float2 *)(local + ((size_t)number * N + n) * FP + p);
                    u = u * through + s.x;
                    v = v * through + s.y;
                });
            }
            #pragma unroll 1
            for (int chunk = w.begin; chunk < w.end; chunk++, buffer ^= 1) {
                const HeadSteps &steps = sm.steps[buffer];
                UNROLL for (int half = 0; half < 2; half++, third = next3(third)) {
                    bool update = half == 0 || chunk + 1 < w.end || (final && w.end == chunks);
                    bool empty = half == 0 && chunk == 0 && !initial;
                    if (!empty) {
                        UNROLL for (int i = 0; i < MT; i++) {
                            UNROLL for (int j = 0; j < 8; j += 2) {
                                store_d<FP, PAD>(sm.S[half][slot], &acc[i][j], n0 + 16 * i, 8 * j,
                                                 lane);
                            }
                        }
                    }
                    meet();
                    fresh();
                    load_next(load, turn, chunk, half, buffer);
                    if (half == 0 && mine && !empty) {
                        int c = Steps<BACK>(d, chunk).c;
                        bf16 *to = states + sm.row[turn].states[slot] +
                                   (int64_t)c * ((int)(d.H * d.N) * P);
                        store_tile<N, FP, PAD, 64>(to, sm.S[0][slot], P, d.N, P,
                                                   opaque(threadIdx.x) & 63);
                    }
                    if (update) {
                        float end = steps.e_of<BACK>(half + 1, slot, a);
                        int before = DOCS ? steps.doc_of<BACK>(half) : 0;
                        int after = DOCS ? steps.doc_of<BACK>(half + 1) : 0;
                        float through = end - steps.e_of<BACK>(half, slot, a);
                        bf16 *weight = sm.weight[all_warp];
                        decays<BACK, DOCS>(weight, steps, slot, half, end, after);
                        add_steps<N, MT>(acc, sm.B[half], sm.x[third][slot], weight, n0,
                                         decay(through, before == after), lane);
                    }
                }
            }
            if (mine && final && w.end == chunks) {
                each_pair<MT>(acc, n0, lane, [&](float &u, float &v, int n, int p) {
                    if (inside(n, p)) *(float2 *)(final + state + n * P + p) = make_float2(u, v);
                });
            }
        }
        meet();
    } else {                                       // ---- y warps ----
        int half = all_warp / 2 % 2, slot = all_warp % 2;
        bf16 (*ratio)[HALF] = sm.ratio[all_warp - 4];
        auto scale = [&](int i, float upper, float lower) {
            UNROLL for (int j = 0; j < 8; j++) {
                acc[i][j][0] *= upper;
                acc[i][j][1] *= upper;
                acc[i][j][2] *= lower;
                acc[i][j][3] *= lower;
            }
        };
        // Those of a first half fetch the second one of the chunk, those of that one the next first
        auto load = [&](int turn, int chunk, int half, int buffer) {
            const Places &row = sm.row[turn];
            int me = opaque(threadIdx.x) & 63;
            load_x<BACK, 64>(sm.x[third], row, chunk, half, in_pitch, d, me);
            if (half == 0) load_steps<BACK, DOCS, 64>(sm.steps[buffer], row, chunk, d, me);
        };
        if (half == 1) {
            load(0, sm.walk[0].begin, 0, 0);
            meet();
            third = 1;
        }
        for (; sm.walk[turn].there(); turn = next3(turn)) {
            const Walk &w = sm.walk[turn];
            int h = w.head(slot, d);
            bool mine = w.first + slot < heads;
            bf16 *y = out + w.r * d.T * out_pitch + h * P;
            // D is often all that counts: to 16 bits. Its first 8 are an operand of their own.
            float skip = D[h];
            uint32_t own = pack(g == 2 * t4 ? skip : 0.0f, g == 2 * t4 + 1 ? skip : 0.0f);
            sm.D[all_warp - 4][lane] = make_uint4(own, 0, 0, own);
            skip -= low(pack(skip, 0.0f));
            #pragma unroll 1
            for (int chunk = w.begin; chunk < w.end; chunk++, buffer ^= 1) {
                const HeadSteps &steps = sm.steps[buffer];
                const float *my_cs = steps.cs[slot] + half * HALF;
                const float *my_dt = steps.dt[slot] + half * HALF;
                bf16 *x = sm.x[third][slot];
                auto doc_of = [&](int l) { return DOCS ? steps.doc[half * HALF + l] : 0; };
                auto row = [&](int i) {            // of the tiles of CB
                    return sm.CB[buffer][half] + i * (i + 1) / 2 * 32 + lane;
                };
                auto add = [&](int i, const uint32_t m[4], const uint32_t b[4][4]) {
                    UNROLL for (int p = 0; p < 8; p++) {
                        mma(acc[i][p], m, &b[p / 2][p % 2 * 2]);
                    }
                };
                auto load_x_tile = [&](uint32_t b[4][4], int j) {
                    UNROLL for (int p = 0; p < 4; p++) {
                        load_b_t<FP, 0>(b[p], x, 16 * j, 16 * p, lane);
                    }
                };
                auto clear = [&](float zero) {
                    UNROLL for (int i = 0; i < 4; i++) {
                        UNROLL for (int j = 0; j < 8; j++) {
                            UNROLL for (int e = 0; e < 4; e++) {
                                acc[i][j][e] = zero;
                            }
                        }
                    }
                };
                meet();
                fresh();
                third = next3(third);              // of the half after this one
                load_next(load, turn, chunk, half, buffer);
                third = next3(third);
                UNROLL for (int i = 0; i < 4; i++) {
                    int a = 16 * i;
                    if (i > 0) decays<BACK, DOCS>(ratio[i], steps, slot, half, my_cs[a], doc_of(a));
                }
                if (half == 0 && chunk == 0 && !initial) {
                    clear(opaque(0.0f));           // else this is hoisted, where zeros cost nothing
                } else {                           // C S
                    clear(0.0f);
                    UNROLL for (int k = 0; k < N; k += 16) {
                        uint32_t a[4][4], b[4];
                        UNROLL for (int i = 0; i < 4; i++) {
                            load_a<N, 0>(a[i], sm.C[half], 16 * i, k, lane);
                        }
                        UNROLL for (int j = 0; j < 8; j += 2) {
                            load_b_t<FP, PAD>(b, sm.S[half][slot], k, 8 * j, lane);
                            UNROLL for (int i = 0; i < 4; i++) {
                                mma(acc[i][j], a[i], b);
                                mma(acc[i][j + 1], a[i], b + 2);
                            }
                        }
                    }
                    float start = steps.e_of<BACK>(half, slot, 0.0f);
                    int before = DOCS ? steps.doc_of<BACK>(half) : 0;
                    UNROLL for (int i = 0; i < 4; i++) {
                        int a = 16 * i;
                        float e = decay(my_cs[a] - start, doc_of(a) == before);
                        scale(i, e, e);
                    }
                }
                auto below = [&](int i, int j, const uint32_t b[4][4]) {  // tile (i,j) of M, j < i
                    uint4 v = row(i)[j * 32];
                    uint32_t f0 = *(const uint32_t *)(ratio[i] + 16 * j + 2 * t4);
                    uint32_t f1 = *(const uint32_t *)(ratio[i] + 16 * j + 2 * t4 + 8);
                    uint32_t m[4] = {mul_bf16x2(v.x, f0), mul_bf16x2(v.y, f0),
                                     mul_bf16x2(v.z, f1), mul_bf16x2(v.w, f1)};
                    add(i, m, b);
                };
                UNROLL for (int j = 0; j < 3; j++) {
                    uint32_t b[4][4];
                    load_x_tile(b, j);
                    UNROLL for (int i = j + 1; i < 4; i++) {
                        below(i, j, b);
                    }
                }
                meet();                            // only this warp still needs its x
                fresh();
                uint4 own = sm.D[all_warp - 4][lane];
                uint32_t diagonal[4] = {own.x, own.y, own.z, own.w};
                UNROLL for (int i = 0; i < 4; i++) {               // the diagonal tile
                    int a = 16 * i;
                    float l_cs[2] = {my_cs[a + g], my_cs[a + g + 8]};
                    float l_dt[2] = {BACK ? my_dt[a + g] : 1.0f, BACK ? my_dt[a + g + 8] : 1.0f};
                    int l_doc[2] = {doc_of(a + g), doc_of(a + g + 8)};
                    scale(i, l_dt[0] * decay(l_cs[0] - my_cs[a], doc_of(a) == l_doc[0]),
                          l_dt[1] * decay(l_cs[1] - my_cs[a], doc_of(a) == l_doc[1]));
                    uint4 v = row(i)[i * 32];
                    uint32_t m[4] = {v.x, v.y, v.z, v.w}, b[4][4];
                    UNROLL for (int e = 0; e < 4; e++) {
                        int s = 8 * (e / 2) + 2 * t4, past = s - 8 * (e % 2) - g;  // s - l
                        float2 c = *(const float2 *)(my_cs + a + s);
                        float2 dt = make_float2(l_dt[e % 2], l_dt[e % 2]);
                        if (!BACK) dt = *(const float2 *)(my_dt + a + s);
                        float l = l_cs[e % 2];
                        bool same = doc_of(a + s) == l_doc[e % 2],
                             same_next = doc_of(a + s + 1) == l_doc[e % 2];
                        float u = low(m[e]) * decay(l - c.x, same) * dt.x;
                        float v = high(m[e]) * decay(l - c.y, same_next) * dt.y;
                        u = past > 0 ? 0.0f : past == 0 ? u + skip : u;
                        v = past >= 0 ? 0.0f : past == -1 ? v + skip : v;
                        m[e] = pack(u, v);
                    }
                    load_x_tile(b, i);
                    add(i, m, b);
                    add(i, diagonal, b);
                }
                // y takes the place of x
                __syncwarp();
                UNROLL for (int i = 0; i < 4; i++) {
                    UNROLL for (int j = 0; j < 8; j += 2) {
                        store_d<FP, 0>(x, &acc[i][j], 16 * i, 8 * j, lane);
                    }
                }
                __syncwarp();
                Steps<BACK> at(d, chunk, half * HALF);
                int pitch = at.by(out_pitch);
                bf16 *to = y + (int64_t)at.at * (int)out_pitch;
                store_tile<HALF, FP, 0, 32>(to, x, pitch, mine ? at.rows : 0, P, lane);
            }
        }
        if (half == 0) meet();
    }
}

// ---- how many chunks to make an item ------------------------------------------------------------
// WALKERS blocks walk at once, so that `turns` of items take as long as turns * length chunks. An
// item that is not made of whole rows needs the local sums, which cost 0.4 of a chunk for each one,
// and 2 to start and to be added up. A constant, not the number of multiprocessors of the GPU at
// hand: the bits depend on it.
constexpr int WALKERS = 132;

static int walk_items(const Dims *d, int length) {
    return (int)(d->G * pieces(d->H / d->G, 2) * pieces(d->R * d->chunks, length));
}
static int walk_length(const Dims *d) {
    int line = (int)(d->R * d->chunks), chunks = (int)d->chunks, best = line;
    auto cost = [&](int length) {
        int turns = (int)pieces(walk_items(d, length), WALKERS), longest = 0;      // local sum
        for (int at = length; at < line; at += length) {
            longest = max(longest, min(length, at % chunks));
        }
        return turns * (length + 0.4f * longest) + (longest ? 2.0f : 0.0f);
    };
    int pairs = walk_items(d, line), least = (int)pieces(pairs, WALKERS);
    for (int turns = least; turns < least + 8; turns++) {
        int even = (int)pieces(line, max(turns * WALKERS / pairs, 1));
        int whole = (int)pieces(even, chunks) * chunks;
        if (cost(whole) < cost(best)) best = whole;
        if (cost(even) < cost(best)) best = even;
    }
    return best;
}

// ---- backward 3: g_CB, and the sums of G --------------------------------------------------------
// A block per chunk and group loops over the heads of the group:
//   V = x g_y^T;  g_CB^T += V o L dt;  G = V o CB^T o L dt: its sums over s, and over l without dt
// in tiles (i,j) of 16x16, i <= j. Strip j is those of one j; its factor of L, with a = 16 j, is
// exp2(cs_a - cs_s) exp2(cs_l - cs_a). Strips w and 7 - w, w < 4, have 9 tiles together, in the
// order (w,w), (0,w) .. (w-1,w), (0,7-w) .. (7-w,7-w). Warp w has the first five, warp w + 4 the
// others; it also copies, and adds up the sums. CB, here in float, lies in shared memory, a lane's
// part of each tile together.
constexpr int G_CB_THREADS = 256;
template<int N> struct GcbShared {
    bf16 xy[2][2 * FQ * FP];                       // x, g_y of two heads; at first B and C
    float4 CB[4][9][2][32];                        // w; tile; its left and right half; lane
    float2 steps[2][FQ];                           // cs, dt
    float over_l[2][8][FQ], over_s[2][2][FQ];      // sums of G, by strip; by warps w and w + 4
    float trace[2][64];                            // V's, in parts
    int doc[FQ];
};

template<int N, bool DOCS>
__global__ void __launch_bounds__(G_CB_THREADS, 2)
ssd_g_CB_fast_kernel(bf16 *g_CB, float *g_dts, float *rowsum, float *g_D_part, const bf16 *g_y,
                     const bf16 *xBC, const float *cs, const float *dts, const int *doc, Dims d) {
    extern __shared__ __align__(128) unsigned char shared[];
    GcbShared<N> &sm = *(GcbShared<N> *)shared;
    next_may_start();
    wait_for_last();
    int me = threadIdx.x % 128, lane = me % 32, g = lane / 4, t4 = lane % 4;
    int w = __shfl_sync(~0u, me / 32, 0), second = __shfl_sync(~0u, threadIdx.x / 128, 0);
    int c = blockIdx.x, chunks = d.chunks, heads = d.H / d.G, first = blockIdx.y * heads;
    int rows = min(FQ, (int)d.T - c * FQ), P = d.P;
    size_t r = blockIdx.z, token = r * d.T + c * FQ, number = r * chunks + c;
    const bf16 *x_from = xBC + token * d.S + first * P, *gy_from = g_y + token * d.E + first * P;
    size_t by_head = (size_t)chunks * FQ;
    size_t steps = ((r * d.H + first) * chunks + c) * FQ - by_head;        // a head before
    auto load = [&](int i) {                       // head after head
        auto copy = [&](int rows) {
            bf16 *to = sm.xy[i % 2];
            load_tile<FQ, FP, 0, 128>(to, x_from, d.S, rows, P, me);
            load_tile<FQ, FP, 0, 128>(to + FQ * FP, gy_from, d.E, rows, P, me);
        };
        if (rows == FQ) copy(FQ);                  // with fewer comparisons
        else copy(rows);
        cp_async<4>(&sm.steps[i % 2][me].x, cs + steps + by_head + me, true);
        cp_async<4>(&sm.steps[i % 2][me].y, dts + steps + by_head + me, true);
        cp_async_commit();
        x_from += P;
        gy_from += P;
    };
    auto finish = [&](int i) {                     // add up what the warps have
        float sum = 0.0f;
        UNROLL for (int j = 0; j < 8; j++) {
            sum += sm.over_l[i % 2][j][me];
        }
        g_dts[steps + me] = sum;
        rowsum[steps + me] = sm.over_s[i % 2][0][me] + sm.over_s[i % 2][1][me];
        if (w != 0) return;
        float trace = warp_sum(sm.trace[i % 2][lane] + sm.trace[i % 2][lane + 32]);
        if (lane == 0) g_D_part[number * d.H + first + i] = trace;         // x g_y^T's
    };
    auto same = [&](int l, int s) { return !DOCS || sm.doc[l] == sm.doc[s]; };
    auto strip_of = [&](int k) { return k <= w ? w : 7 - w; };
    auto row_of = [&](int k) { return k == 0 ? w : k <= w ? k - 1 : k - 1 - w; };

    if (DOCS && second) sm.doc[me] = doc[token + min(me, rows - 1)];
    UNROLL for (int j = 0; j < 8; j++) {           // what no warp has stays so
        sm.over_l[second][j][me] = 0.0f;
    }
    sm.over_s[second][1][me] = 0.0f;
    const bf16 *B = xBC + token * d.S + d.E + blockIdx.y * d.N;
    load_tile<FQ, N, 0, 128>(sm.xy[second], B + second * d.G * d.N, d.S, rows, d.N, me);
    cp_async_commit();
    bf16 *out = g_CB + (number * d.G + blockIdx.y) * FQ * FQ;      // (s,l), 0 below the diagonal
    for (int i = threadIdx.x; i < FQ * FQ / 8; i += G_CB_THREADS) {
        int s = i / (FQ / 8), l = i % (FQ / 8) * 8;
        if (l / 16 < s / 16) *(uint4 *)(out + s * FQ + l) = make_uint4(0, 0, 0, 0);
    }
    cp_async_wait<0>();
    __syncthreads();
    #pragma unroll 1
    for (int k = 5 * second; k < 5 + 4 * second; k++) {
        float v[2][4] = {};
        UNROLL for (int n = 0; n < N; n += 16) {
            uint32_t a[4], b[4];
            load_a<N, 0>(a, sm.xy[0], 16 * row_of(k), n, lane);
            load_b<N, 0>(b, sm.xy[1], 16 * strip_of(k), n, lane);
            mma(v[0], a, b);
            mma(v[1], a, b + 2);
        }
        UNROLL for (int n = 0; n < 2; n++) {
            sm.CB[w][k][n][lane] = make_float4(v[n][0], v[n][1], v[n][2], v[n][3]);
        }
    }
    __syncthreads();
    if (second) load(0);
    float g_cb[5][2][4] = {};                      // the sum over heads
    #pragma unroll 1
    for (int i = 0; i < heads; i++) {
        cp_async_wait<0>();
        __syncthreads();                         // head i is here; everyone is done with head i - 1
        if (second && i > 0) finish(i - 1);
        steps += by_head;
        if (second && i + 1 < heads) load(i + 1);
        unsigned same_lane = opaque(lane);         // for addresses, worked out again
        const bf16 *x = sm.xy[i % 2], *gy = x + FQ * FP;
        const float2 *step = sm.steps[i % 2];
        uint32_t b[4][4];                          // g_y of a strip
        float v[2][2][4];                          // V of two tiles
        const bf16 *rows_of_x = x + 16 * FP * w;   // tile k's begin 16 k after that
        auto product = [&](int k) {                // V of tile k, while tile k - 1 is added
            if (k == 1) rows_of_x = x - 16 * FP;
            if (k < 6) if (k == 0 || k == 5 || k == w + 1) {
                UNROLL for (int p = 0; p < 4; p++) {
                    load_b<FP, 0>(b[p], gy + 16 * FP * (k ? 7 - w : w), 0, 16 * p, same_lane);
                }
                if (k) rows_of_x = x - 16 * FP * (1 + w);
            }
            UNROLL for (int e = 0; e < 8; e++) {
                v[k % 2][e / 4][e % 4] = 0.0f;
            }
            UNROLL for (int p = 0; p < 4; p++) {
                uint32_t a[4];
                load_a<FP, 0>(a, rows_of_x, 16 * k, 16 * p, same_lane);
                mma(v[k % 2][0], a, b[p]);
                mma(v[k % 2][1], a, b[p] + 2);
            }
        };
        // What a strip has of columns 8 (m/2) + 2 t4 + m%2. Tile k's s is at 16 k after step_s, and
        // its sums go to 16 k after to_l.
        float cs_a, cs_l[4], after_a[4], over_s[4], *to_l = NULL;
        const float2 *step_s = NULL;
        auto shift = [&](int j, int by) {
            step_s = step + 16 * by + g;
            to_l = sm.over_l[i % 2][j] + 16 * by + g + t4 % 2 * 8;
        };
        auto enter = [&](int j) {
            const float2 *a = step + 16 * j;
            cs_a = a->x;
            UNROLL for (int m = 0; m < 4; m++) {
                int l = m / 2 * 8 + 2 * t4 + m % 2;
                cs_l[m] = a[l].x;
                after_a[m] = decay(cs_l[m] - cs_a, same(16 * j + l, 16 * j));
                over_s[m] = 0.0f;
            }
        };
        auto leave = [&](int j) {  // 4 columns a thread, 8 threads a column: halve, halve, and add
            bool right = g & 4, odd = g & 2;
            float sum[2];
            UNROLL for (int m = 0; m < 2; m++) {
                sum[m] = (right ? over_s[2 + m] : over_s[m]) +
                         __shfl_xor_sync(~0u, right ? over_s[m] : over_s[2 + m], 16);
            }
            float one = (odd ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 8);
            one += __shfl_xor_sync(~0u, one, 4);
            int l = 16 * j + 2 * (g & 4) + 2 * t4 + (g & 2) / 2;
            if (g % 2 == 0) sm.over_s[i % 2][second][l] = one;
        };
        auto add = [&](int k) {                    // tile k, in a strip that was entered
            bool on_diagonal = k % 8 == 0;
            int s0 = 16 * row_of(k), a = 16 * strip_of(k);
            float before_a[2] = {1.0f, 1.0f}, over_l[2] = {};
            float2 of_s[2] = {step_s[16 * k], step_s[16 * k + 8]};         // rows g and g + 8
            if (on_diagonal && g / 2 == t4) {
                sm.trace[i % 2][32 * second + 8 * w + g] = diagonal_part(v[k % 2], g, t4);
            }
            UNROLL for (int e = 0; e < 8; e++) {
                int m = e / 4 * 2 + e % 2, l = m / 2 * 8 + 2 * t4 + m % 2, s = g + e / 2 % 2 * 8;
                float &V = v[k % 2][e / 4][e % 4];
                if (!on_diagonal) V *= after_a[m];
                else V *= decay(cs_l[m] - of_s[e / 2 % 2].x, l >= s && same(a + l, s0 + s));
            }
            if (!on_diagonal) {
                before_a[0] = decay(cs_a - of_s[0].x, same(a, s0 + g));
                before_a[1] = decay(cs_a - of_s[1].x, same(a, s0 + g + 8));
            }
            float scale[2] = {before_a[0] * of_s[0].y, before_a[1] * of_s[1].y};
            UNROLL for (int n = 0; n < 2; n++) {
                float4 tile = sm.CB[w][k][n][lane];
                float cb[4] = {tile.x, tile.y, tile.z, tile.w};
                UNROLL for (int e = 0; e < 4; e++) {
                    float V = v[k % 2][n][e], G = V * cb[e];
                    g_cb[k % 5][n][e] = opaque(g_cb[k % 5][n][e] + V * scale[e / 2]);
                    over_s[2 * n + e % 2] += G * scale[e / 2];
                    over_l[e / 2] += G;
                }
            }
            bool lower = t4 % 2;                   // lanes 0, 2 of four: row g, lanes 1, 3: g + 8
            float sum = lower ? over_l[1] : over_l[0];
            sum += __shfl_xor_sync(~0u, lower ? over_l[0] : over_l[1], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            sum *= lower ? before_a[1] : before_a[0];
            if (t4 < 2) to_l[16 * k] = sum;
        };
        if (second) {
            product(5);
            enter(7 - w);
            shift(7 - w, -1 - w);
            UNROLL for (int k = 5; k < 9; k++) {
                if (k < 8) product(k + 1);
                add(k);
            }
        } else {
            product(0);
            enter(w);
            shift(w, w);
            UNROLL for (int k = 0; k < 5; k++) {
                if (k < 4) product(k + 1);
                if (k == 1) shift(w, -1);
                if (k > 0) if (k == w + 1) {
                    leave(w);
                    enter(7 - w);
                    shift(7 - w, -1 - w);
                }
                add(k);
            }
        }
        leave(7 - w);
    }
    __syncthreads();
    if (second) finish(heads - 1);
    UNROLL for (int q = 0; q < 5; q++) {
        int k = q + 5 * second;
        if (k == 9) break;
        UNROLL for (int m = 0; m < 4; m++) {
            int s = 16 * row_of(k) + g + m % 2 * 8, l = 16 * strip_of(k) + m / 2 * 8 + 2 * t4;
            const float *v = &g_cb[q][m / 2][m % 2 * 2];
            *(uint32_t *)(out + s * FQ + l) = pack(v[0], v[1]);
        }
    }
}

// ---- backward 4: g_C with pi, g_B with rho, and kappa -------------------------------------------
// A block per chunk and group: 4 warps for g_C, 4 for g_B, 32 rows each, of all columns. First the
// product with g_CB, then one for every head, in the same accumulators, with the rows scaled in
// operand A:
//   g_C = g_CB^T B (g_CB being stored (s,l)) + sum over heads of diag(exp(cs)) g_y S^T
//   g_B = g_CB C                             + sum over heads of diag(dt exp(cs_last - cs)) x gS^T
// pi = C . (a head's part of g_C) is the growth of C . accumulator; rho, with B and g_B, likewise.
// kappa = exp(cs_last) <S, gS>, as both are here.
// Of a first chunk without an initial state, S is zero, and gS of a last one without g_final; they
// are not in memory. The last head comes first: what ssd_g_CB_fast_kernel has read of it may still
// be in the L2 cache.
constexpr int G_BC_THREADS = 256;
template<int N> constexpr int G_BC_RING = N > 64 ? 3 : 4;
template<int N> struct GbcHead {
    bf16 in[2][FQ * FP], states[2][N * FP];        // g_y, x; S, gS
};
template<int N> struct GbcShared {
    union {
        GbcHead<N> ring[G_BC_RING<N>];
        struct {
            GbcHead<N> head;                       // comes meanwhile
            bf16 CB[2][FQ * N], g_CB[FQ * FQ];     // C, B
        } first;
        bf16 out[2][FQ * N];                       // g_C, g_B
    };
    float kappa[2][64];                            // of two heads, in parts
};

// Lane t4 of each four gets the sum of v[t4] over the four.
__device__ inline float quad_sums(const float v[4], int t4) {
    bool odd = t4 & 1, upper = t4 & 2;
    float two[2];
    UNROLL for (int m = 0; m < 2; m++) {
        two[m] = (odd ? v[2 * m + 1] : v[2 * m]) +
                 __shfl_xor_sync(~0u, odd ? v[2 * m] : v[2 * m + 1], 1);
    }
    return (upper ? two[1] : two[0]) + __shfl_xor_sync(~0u, upper ? two[0] : two[1], 2);
}

template<int N>
__global__ void __launch_bounds__(G_BC_THREADS)
ssd_g_BC_fast_kernel(bf16 *g_xBC, float *pi, float *rho, float *kappa, const bf16 *g_CB,
                     const bf16 *states, const bf16 *g_states, const bf16 *g_y, const bf16 *xBC,
                     const float *cs, const float *dts, const int *doc, Dims d, bool has_initial,
                     bool has_g_final) {
    extern __shared__ __align__(128) unsigned char shared[];
    GbcShared<N> &sm = *(GbcShared<N> *)shared;
    next_may_start();
    wait_for_last();
    constexpr int RING = G_BC_RING<N>;
    int me = threadIdx.x, lane = me % 32, warp = __shfl_sync(~0u, me / 32, 0), g = lane / 4,
        t4 = lane % 4;
    int of_B = warp / 4, m0 = warp % 4 * 32;
    int c = blockIdx.x, chunks = d.chunks, heads = d.H / d.G, first = blockIdx.y * heads, P = d.P;
    int rows = min(FQ, (int)d.T - c * FQ);
    size_t r = blockIdx.z, token = r * d.T + c * FQ, number = r * chunks + c;

    // Half of the threads copies g_y and S, half x and gS.
    int pitch = of_B ? d.S : d.E;
    bool zero = of_B ? c + 1 == chunks && !has_g_final : c == 0 && !has_initial;
    const bf16 *from = (of_B ? xBC : g_y) + token * pitch + (first + heads) * P;
    const bf16 *state_from = (of_B ? g_states : states) + (number * d.H + first + heads) * d.N * P;
    auto load = [&](int i) {
        bf16 *in = sm.ring[i % RING].in[of_B], *state = sm.ring[i % RING].states[of_B];
        auto copy = [&](int rows, int state_rows) {
            load_tile<FQ, FP, 0, 128>(in, from, pitch, rows, P, me % 128);
            load_tile<N, FP, 0, 128>(state, state_from, P, state_rows, P, me % 128);
        };
        if (i < heads) {
            from -= P;
            state_from -= d.N * P;
            if (rows == FQ && d.N == N && !zero) copy(FQ, N);      // with fewer comparisons
            else copy(opaque(rows), opaque(zero ? 0 : (int)d.N));
        }
        cp_async_commit();
    };
    // Step m0 + 8 t4 + g is this lane's: the scale of its row, pi or rho
    int step = m0 + 8 * t4 + g;
    bool reached = true, passed = true;            // from the other end of the chunk; all of it
    if (doc) {
        const int *docs = doc + token;
        int before = c > 0 ? docs[-1] : 0, last = docs[rows - 1];
        reached = docs[min(step, rows - 1)] == (of_B ? last : before);
        passed = before == last;
    }
    size_t steps = ((r * d.H + first + heads - 1) * chunks + c) * FQ + step;
    size_t by_head = (size_t)chunks * FQ;
    float mine = 0.0f, last = 0.0f, dt = 0.0f;     // cs of the next head: of the step, the last one
    auto fetch = [&] {
        mine = cs[steps];
        last = cs[steps - step + FQ - 1];
        if (of_B) dt = dts[steps];
    };
    auto finish = [&](int i) {                     // add up kappa's parts
        if (warp != 0) return;
        float sum = warp_sum(sm.kappa[i % 2][lane] + sm.kappa[i % 2][lane + 32]);
        if (lane == 0) kappa[number * d.H + first + heads - 1 - i] = sum;
    };
    float acc[2][N / 8][4] = {};

    const bf16 *B = xBC + token * d.S + d.E + blockIdx.y * d.N, *C = B + d.G * d.N;
    load_tile<FQ, N, 0, G_BC_THREADS>(sm.first.CB[0], C, d.S, rows, d.N, me);
    load_tile<FQ, N, 0, G_BC_THREADS>(sm.first.CB[1], B, d.S, rows, d.N, me);
    load_tile<FQ, FQ, 0, G_BC_THREADS>(sm.first.g_CB,
                                       g_CB + (number * d.G + blockIdx.y) * FQ * FQ, FQ, FQ, FQ,
                                       me);
    cp_async_commit();
    load(0);
    fetch();
    cp_async_wait<1>();
    __syncthreads();
    #pragma unroll 1
    for (int k = of_B ? m0 : 0, end = of_B ? FQ : m0 + 32; k < end; k += 16) {
        uint32_t a[2][4], b[4];
        UNROLL for (int m = 0; m < 2; m++) {
            if (of_B) load_a<FQ, 0>(a[m], sm.first.g_CB, m0 + 16 * m, k, lane);
            else load_a_t<FQ, 0>(a[m], sm.first.g_CB, k, m0 + 16 * m, lane);
        }
        UNROLL for (int j = 0; j < N / 8; j += 2) {
            load_b_t<N, 0>(b, sm.first.CB[!of_B], k, 8 * j, lane);
            UNROLL for (int m = 0; m < 2; m++) {
                mma(acc[m][j], a[m], b);
                mma(acc[m][j + 1], a[m], b + 2);
            }
        }
    }
    uint32_t own[2][N / 16][4];                    // C or B, as the accumulators lie
    UNROLL for (int m = 0; m < 2; m++) {
        UNROLL for (int j = 0; j < N / 16; j++) {
            load_a<N, 0>(own[m][j], sm.first.CB[of_B], m0 + 16 * m, 16 * j, lane);
        }
    }
    auto dot = [&] {                               // own . accumulator, of this lane's step
        float sum[4] = {};
        UNROLL for (int j = 0; j < N / 8; j++) {
            UNROLL for (int m = 0; m < 4; m++) {
                uint32_t pair = opaque(own[m / 2][j / 2][m % 2 + j % 2 * 2]);
                const float *v = &acc[m / 2][j][m % 2 * 2];
                sum[m] += v[0] * low(pair);
                sum[m] += v[1] * high(pair);
            }
        }
        return quad_sums(sum, t4);
    };
    float dot_before = dot();
    auto put_dot = [&](size_t steps) {             // how much it has grown by a head
        float sum = dot();
        (of_B ? rho : pi)[steps] = sum - dot_before;
        dot_before = sum;
    };
    __syncthreads();                               // C, B and g_CB are no longer needed
    UNROLL for (int i = 1; i + 1 < RING; i++) {
        load(i);
    }
    // While the warps of g_C multiply, those of g_B do the rest, and the other way round.
    #pragma unroll 1
    for (int i = 0; i < heads; i++) {
        cp_async_wait<RING - 2>();
        __syncthreads();                         // head i is here; everyone is done with head i - 1
        float f = of_B ? dt * decay(last - mine, reached) : decay(mine, reached);
        float through = decay(last, passed);
        uint32_t twice = pack(f, f), scale[4];
        UNROLL for (int m = 0; m < 4; m++) {
            scale[m] = __shfl_sync(~0u, twice, (lane & ~3) + m);
        }
        steps -= by_head;
        if (i + 1 < heads) fetch();
        const GbcHead<N> &head = sm.ring[i % RING];
        unsigned same_lane = opaque(lane);         // for addresses, worked out again
        auto product = [&] {                       // operands are loaded a step ahead
            uint32_t a[2][4], next_a[2][4], b[2][4];
            auto load_rows = [&](int k) {
                load_a<FP, 0>(next_a[0], head.in[of_B], m0, k, same_lane);
                load_a<FP, 0>(next_a[1], head.in[of_B], m0 + 16, k, same_lane);
            };
            auto load_columns = [&](int k, int j) {
                load_b<FP, 0>(b[j / 2 % 2], head.states[of_B], 8 * j, k, same_lane);
            };
            load_rows(0);
            load_columns(0, 0);
            UNROLL for (int k = 0; k < FP; k += 16) {
                UNROLL for (int e = 0; e < 8; e++) {
                    a[e / 4][e % 4] = mul_bf16x2(next_a[e / 4][e % 4], scale[e / 4 * 2 + e % 2]);
                }
                UNROLL for (int j = 0; j < N / 8; j += 2) {
                    if (j + 2 < N / 8) load_columns(k, j + 2);
                    else if (k + 16 < FP) load_columns(k + 16, 0);
                    if (j + 4 == N / 8 && k + 16 < FP) load_rows(k + 16);
                    UNROLL for (int m = 0; m < 2; m++) {
                        mma(acc[m][j], a[m], b[j / 2 % 2]);
                        mma(acc[m][j + 1], a[m], b[j / 2 % 2] + 2);
                    }
                }
            }
        };
        auto rest = [&] {
            load(i + RING - 1);
            if (i > 0) finish(i - 1);
            // <S, gS> is the trace of S gS^T: a warp has 16 of its rows, N/2 columns of S and gS
            float v[2][4] = {};
            int n = warp % (N / 16) * 16, k0 = warp / (N / 16) * (N / 2);
            UNROLL for (int k = 0; k < N / 2; k += 16) {
                uint32_t a[4], b[4];
                load_a<FP, 0>(a, head.states[0], n, k0 + k, same_lane);
                load_b<FP, 0>(b, head.states[1], n, k0 + k, same_lane);
                mma(v[0], a, b);
                mma(v[1], a, b + 2);
            }
            float part = through * diagonal_part(v, g, t4);
            if (g / 2 == t4) sm.kappa[i % 2][8 * warp + g] = part;
        };
        if (of_B) {
            if (i > 0) put_dot(steps + 2 * by_head);
            rest();
        }
        product();
        if (!of_B) {
            rest();
            put_dot(steps + by_head);
        }
    }
    if (of_B) put_dot(steps + by_head);
    __syncthreads();
    finish(heads - 1);
    bf16 *out = sm.out[of_B];                      // through shared memory, for 16-byte stores
    UNROLL for (int m = 0; m < 4; m++) {
        UNROLL for (int j = 0; j < N / 8; j++) {
            const float *v = &acc[m / 2][j][m % 2 * 2];
            int place = at<N, 0>(m0 + 8 * m, 8 * j, g, 2 * t4);
            *(uint32_t *)&out[place] = pack(v[0], v[1]);
        }
    }
    __syncthreads();
    bf16 *to = g_xBC + token * d.S + d.E + ((of_B ? 0 : d.G) + blockIdx.y) * d.N;
    store_tile<FQ, N, 0, 128>(to, out, d.S, rows, d.N, me % 128);
}

// ---- backward 5: the sums over the steps of a chunk ---------------------------------------------
// A warp per head, 4 steps a lane: da_t = kappa + the sum of q before t + that of pi from t on,
// with q = dt g_dts + rho - rowsum (g_dts being the sum of G over l, without dt); from it g_dt
// (n,H), through shared memory, and this chunk's part of g_A, g_A_part (R,chunks,H).
__global__ void __launch_bounds__(256)
ssd_finish_fast_kernel(float *g_dt, float *g_A_part, const float *g_dts, const float *rowsum,
                       const float *pi, const float *rho, const float *kappa, const float *dts,
                       const float *A_log, Dims d) {
    __shared__ float tile[FQ][9];
    next_may_start();
    wait_for_last();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t c = blockIdx.x, h0 = blockIdx.y * 8, h = h0 + warp, r = blockIdx.z;
    if (h < d.H) {
        size_t at = ((r * d.H + h) * d.chunks + c) * FQ + 4 * lane, number = r * d.chunks + c;
        auto four = [&](const float *v) { return *(const float4 *)(v + at); };
        float4 dt = four(dts), own = four(g_dts), sum = four(rowsum), p = four(pi), end = four(rho);
        float q0 = dt.x * own.x + end.x - sum.x, q1 = dt.y * own.y + end.y - sum.y,
              q2 = dt.z * own.z + end.z - sum.z, q3 = dt.w * own.w + end.w - sum.w;
        float of_lane = q0 + q1 + q2 + q3, from_lane = p.x + p.y + p.z + p.w;
        float before = __shfl_up_sync(~0u, warp_scan(of_lane), 1), upto = warp_scan(from_lane);
        if (lane == 0) before = 0.0f;
        float beyond = __shfl_sync(~0u, upto, 31) - upto;
        float base = kappa[number * d.H + h] + before + beyond, a = -expf(A_log[h]);
        float da0 = base + p.x + p.y + p.z + p.w, da1 = base + q0 + p.y + p.z + p.w;
        float da2 = base + q0 + q1 + p.z + p.w, da3 = base + q0 + q1 + q2 + p.w;
        // x . R: rho was multiplied by dt. Where dt is 0 it has underflowed, and so will the
        // derivative of softplus that g_dt meets.
        auto direct = [](float own, float end, float dt) {
            return own + (dt > 0.0f ? end / dt : 0.0f);
        };
        float *to = &tile[4 * lane][warp];
        to[0] = direct(own.x, end.x, dt.x) + a * da0;
        to[9] = direct(own.y, end.y, dt.y) + a * da1;
        to[18] = direct(own.z, end.z, dt.z) + a * da2;
        to[27] = direct(own.w, end.w, dt.w) + a * da3;
        float part = warp_sum(dt.x * da0 + dt.y * da1 + dt.z * da2 + dt.w * da3);
        if (lane == 0) g_A_part[number * d.H + h] = part;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * FQ; i += 256) {
        size_t t = c * FQ + i / 8, k = h0 + i % 8;
        if (t < d.T && k < d.H) g_dt[(r * d.T + t) * d.H + k] = tile[i / 8][i % 8];
    }
}
