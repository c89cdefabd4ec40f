// matmul.h: matrix products as fast as the machine allows, in C with vector types.
//
// C[M,N] (+)= A[M,K] B[K,N].  A and B come with a row and a column stride, one of which is 1: that
// covers products with either operand transposed, without flags.  Three levels, from the inside:
//   tile    MR x NR of C in registers. For each k: NV vectors of B, MR numbers of A, MR*NV FMAs.
//   block   TN columns of B (KC x TN reals) stay in L2 while TM rows of A pass over them, MR rows
//           (KC x MR reals, in L1) at a time.
//   slab    A (MB rows) and B (NB columns) are copied, KC values of k at a time, into panels in
//           which every tile reads straight on; all threads pack for all threads, in L3.
// An element of C is the sum of one chain of FMAs for each KC values of k, in order. KC depends on K
// alone, so its bits depend neither on the number of threads nor on the other rows and columns.

#if defined __AVX512F__
#define VECTOR_BYTES 64
#define MR 8                        // 8 x 3 sums, 3 of B and 1 of A in 32 registers
#elif defined __AVX__
#define VECTOR_BYTES 32
#define MR 4                        // 4 x 3 sums, 3 of B and 1 of A in 16 registers
#elif defined __aarch64__
#define VECTOR_BYTES 16
#define MR 8
#else
#define VECTOR_BYTES 16
#define MR 4
#endif

#if defined __CUDACC__
#define UNROLL
#elif defined __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

#define BYTES_float 4
#define BYTES_double 8
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define VL (VECTOR_BYTES/PASTE(BYTES_, REAL))       // reals in a vector

enum {
    NV = 3, NR = NV*VL,                             // columns of a tile
    KC = 3072/(VECTOR_BYTES/VL), TM = 128, TN = 2*NR, MB = 2048, NB = 12*TN, EDGE = 64
};
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real vec_at __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

static int matmul_bf16;             // round A and B to bf16 (the sums stay in fp32)
static real packed_A[2][MB*KC] __attribute__((aligned(64)));     // two of each: one is being packed
static real packed_B[2][NB*KC] __attribute__((aligned(64)));     // while the other is still in use

INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

static int bf16_available(void) {
#if defined __AVX512BF16__ || defined BF16_EMULATE
    return sizeof(real) == 4;
#else
    return 0;
#endif
}

// sum + a*b in every lane; of bf16 pairs: sum + a.lo*b.lo + a.hi*b.hi
INLINE vec fma_step(vec sum, const real *a, vec b, const int pairs) {
#ifdef __AVX512BF16__
    if (pairs) {
        int both;
        memcpy(&both, a, sizeof both);
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b);
    }
#endif
    (void)pairs;
    return sum + *a*b;
}

// C = beta*C + A B for a tile of MR rows and nv vectors
INLINE void tile(real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                 const real *B, size_t ldb, size_t K, real beta, const int nv, const int pairs) {
    vec sum[MR][NV];
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int j = 0; j < nv; j++) {
            sum[i][j] = (vec){0};
            __builtin_prefetch(C + i*ldc + j*VL, 1);
        }
    for (size_t k = 0; k < K; k++, A += a_col, B += ldb) {
        vec b[NV];
        UNROLL for (int j = 0; j < nv; j++)
            b[j] = *(const vec_at *)(B + j*VL);
        UNROLL for (int i = 0; i < MR; i++)
            UNROLL for (int j = 0; j < nv; j++)
                sum[i][j] = fma_step(sum[i][j], A + i*a_row, b[j], pairs);
    }
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int j = 0; j < nv; j++) {
            vec_at *c = (vec_at *)(C + i*ldc + j*VL);
            if (beta != 0)
                sum[i][j] += beta * *c;
            *c = sum[i][j];
        }
}

// The tile with its number of vectors as a constant
INLINE void tile_of(int nv, real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                    const real *B, size_t ldb, size_t K, real beta, const int pairs) {
    if (nv == 3)      tile(C, ldc, A, a_row, a_col, B, ldb, K, beta, 3, pairs);
    else if (nv == 2) tile(C, ldc, A, a_row, a_col, B, ldb, K, beta, 2, pairs);
    else              tile(C, ldc, A, a_row, a_col, B, ldb, K, beta, 1, pairs);
}

// Packed panels: a (K, MR), b (K, NR).  At C's edge (m < MR or a part of a vector) the tile is
// computed beside C, by the same operations.
INLINE void packed_tile(real *C, size_t ldc, const real *a, const real *b, size_t m, size_t n,
                        size_t K, int add, const int pairs) {
    int nv = (int)((n + VL-1)/VL);
    if (m == MR && n == (size_t)nv*VL) {
        tile_of(nv, C, ldc, a, 1, MR, b, NR, K, add, pairs);
        return;
    }
    real edge[MR*NR] = {0};
    for (size_t i = 0; add && i < m; i++)
        memcpy(edge + i*NR, C + i*ldc, n*sizeof(real));
    tile_of(nv, edge, NR, a, 1, MR, b, NR, K, add, pairs);
    for (size_t i = 0; i < m; i++)
        memcpy(C + i*ldc, edge + i*NR, n*sizeof(real));
}

// Indices that take the elements of two vectors in turn, from `first` on: to zip them
#define ZIP2(first)  (first), (first) + VL
#define ZIP4(first)  ZIP2(first), ZIP2((first) + 1)
#define ZIP8(first)  ZIP4(first), ZIP4((first) + 2)
#define ZIP16(first) ZIP8(first), ZIP8((first) + 4)
#undef ZIP
#if VL == 16
#define ZIP ZIP16
#elif VL == 8
#define ZIP ZIP8
#elif VL == 4
#define ZIP ZIP4
#else
#define ZIP ZIP2
#endif

// to[k*w + r] = from[r*line + k] for VL values of k and R <= VL lines, in registers. To zip the
// first half of the lines with the second half rotates the bits of every element's place, line:k,
// by one; after log2 R times the place is k:line. Lines from `lines` on repeat the last.
INLINE void transpose_tile(real *to, size_t w, const int R, const real *from, size_t line,
                           size_t lines) {
    vec v[VL], zipped[VL];
    UNROLL for (int r = 0; r < R; r++)
        v[r] = *(const vec_at *)(from + least(r, lines - 1)*line);
    UNROLL for (int bit = 1; bit < R; bit *= 2) {
        UNROLL for (int r = 0; r < R/2; r++) {
            zipped[2*r] = __builtin_shufflevector(v[r], v[r + R/2], ZIP(0));
            zipped[2*r+1] = __builtin_shufflevector(v[r], v[r + R/2], ZIP(VL/2));
        }
        UNROLL for (int r = 0; r < R; r++)
            v[r] = zipped[r];
    }
    UNROLL for (int r = 0; r < R; r++)
        *(vec_at *)(to + r*VL/R*w) = v[r];
}

static unsigned bf16_bits(real x)    // the nearest bf16, ties to even; NaN stays NaN
{
    float f = (float)x;
    unsigned u;
    memcpy(&u, &f, sizeof u);
    return (u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// Round a panel (K,w) to bf16, in place: two values of k in 32 bits
static void round_panel(real *panel, size_t K, size_t w) {
    for (size_t r = 0; K % 2 && r < w; r++)
        panel[K*w + r] = 0;
    for (size_t k = 0; k < K; k += 2)
        for (size_t r = 0; r < w; r++) {
            unsigned low = bf16_bits(panel[k*w + r]), high = bf16_bits(panel[(k+1)*w + r]);
#ifdef __AVX512BF16__
            unsigned both = low | high << 16;
            memcpy(panel + k/2*w + r, &both, sizeof both);
#else
            low <<= 16, high <<= 16;
            memcpy(panel + k*w + r, &low, sizeof low);
            memcpy(panel + (k+1)*w + r, &high, sizeof high);
#endif
        }
}

// Pack n <= w lines (rows of A, columns of B) of K values into a panel (K,w)
INLINE void pack_panel(real *panel, const real *from, size_t line, size_t step,
                       size_t n, size_t K, const int w) {
    size_t k = 0;
    if (line == 1 && n == (size_t)w)
        for (; k < K; k++)
            memcpy(panel + k*w, from + k*step, w*sizeof(real));
    else if (step == 1)
        for (; k + VL <= K; k += VL)
            for (size_t r = 0; r < (size_t)w; r += least(w, VL)) {
                size_t first = least(r, n - 1);
                transpose_tile(panel + k*w + r, w, w < VL ? w : VL, from + first*line + k, line, n - first);
            }
    for (; k < K; k++)
        for (size_t r = 0; r < (size_t)w; r++)
            panel[k*w + r] = from[least(r, n - 1)*line + k*step];
    if (matmul_bf16)
        round_panel(panel, K, w);
}

static real dot(const real *a, const real *b, size_t n) {
    vec sum[4] = {{0}};
    size_t i = 0;
    for (; i + 4*VL <= n; i += 4*VL)
        UNROLL for (int j = 0; j < 4; j++)
            sum[j] += *(const vec_at *)(a + i + j*VL) * *(const vec_at *)(b + i + j*VL);
    vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    real result = 0;
    for (int lane = 0; lane < VL; lane++)
        result += all[lane];
    for (; i < n; i++)
        result += a[i]*b[i];
    return result;
}

// The length of n's equal blocks: at most `most`, a multiple of `unit`
static size_t even(size_t n, size_t most, size_t unit) {
    size_t blocks = (n + most-1)/most;
    return ((n + blocks-1)/blocks + unit-1)/unit*unit;
}

// C (m,n) (+)= packed A (m,K) times packed B (K,n)
INLINE void block(real *C, size_t ldc, const real *a, const real *b, size_t a_panel, size_t b_panel, size_t m, size_t n, size_t K,
                  int add, const int pairs) {
    for (size_t i = 0; i < m; i += MR)
        for (size_t j = 0; j < n; j += NR)
            packed_tile(C + i*ldc + j, ldc, a + i/MR*a_panel, b + j/NR*b_panel, least(MR, m - i),
                        least(NR, n - j), K, add, pairs);
}

static void matmul(real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                   const real *B, size_t b_row, size_t b_col, size_t M, size_t N, size_t K, int add) {
    if (!M || !N)
        return;
    if (!K) {
        for (size_t i = 0; !add && i < M; i++)
            memset(C + i*ldc, 0, N*sizeof(real));
        return;
    }
    if (M <= 4 && a_col == 1 && b_row == 1 && !matmul_bf16) {
        #pragma omp parallel for schedule(static)
        for (size_t j = 0; j < N; j++)
            for (size_t i = 0; i < M; i++)
                C[i*ldc + j] = (add ? C[i*ldc + j] : 0) + dot(A + i*a_row, B + j*b_col, K);
        return;
    }
    size_t kc = even(K, KC, 2*VL), mb = even(M, MB, MR), nb = even(N, NB, NR);
    #pragma omp parallel
    {
        int a_turn = 0, b_turn = 0;
        for (size_t p = 0; p < K; p += kc)
        for (size_t i = 0; i < M; i += mb)
        for (size_t j = 0; j < N; j += nb) {
            size_t k = least(kc, K - p), m = least(mb, M - i), n = least(nb, N - j), k2 = (k + 1)/2*2;
            int new_A = j == 0, new_B = i == 0 || N > nb;
            a_turn ^= new_A, b_turn ^= new_B;
            real *pa = packed_A[a_turn], *pb = packed_B[b_turn];
            size_t a_panels = new_A ? (m + MR-1)/MR : 0, b_panels = new_B ? (n + NR-1)/NR : 0;
            #pragma omp for schedule(dynamic, 4)
            for (size_t t = 0; t < a_panels + b_panels; t++)
                if (t < a_panels)
                    pack_panel(pa + t*MR*k2, A + (i + t*MR)*a_row + p*a_col, a_row, a_col,
                               least(MR, m - t*MR), k, MR);
                else {
                    size_t u = t - a_panels;
                    pack_panel(pb + u*NR*k2, B + p*b_row + (j + u*NR)*b_col, b_col, b_row,
                               least(NR, n - u*NR), k, NR);
                }
            size_t m_tasks = (m + TM-1)/TM, n_tasks = (n + TN-1)/TN;
            #pragma omp for schedule(dynamic) nowait
            for (size_t t = 0; t < m_tasks*n_tasks; t++) {
                size_t ii = t % m_tasks*TM, jj = t/m_tasks*TN;
                real *c = C + (i + ii)*ldc + j + jj;
                size_t mm = least(TM, m - ii), nn = least(TN, n - jj);
#ifdef __AVX512BF16__
                if (matmul_bf16)
                    block(c, ldc, pa + ii*k2, pb + jj*k2, MR*k2, NR*k2, mm, nn, k2/2, add || p, 1);
                else
#endif
                block(c, ldc, pa + ii*k2, pb + jj*k2, MR*k2, NR*k2, mm, nn, k, add || p, 0);
            }
        }
    }
}

// C = beta*C + A B where B and C have contiguous rows: serial, nothing packed, for small sizes
static void matmul_small(real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                         const real *B, size_t ldb, size_t M, size_t N, size_t K, real beta) {
    for (size_t j = 0, n; j < N; j += n) {
        n = N - j == 4*VL ? 2*VL : least(NR, N - j);
        if (n > VL)
            n -= n % VL;
        for (size_t i = 0; i < M; i += MR) {
            size_t m = least(MR, M - i), p = 0, k;
            const real *a = A + i*a_row, *b = B + j;
            real *c = C + i*ldc + j;
            if (m == MR && n >= VL) {
                tile_of((int)(n/VL), c, ldc, a, a_row, a_col, b, ldb, K, beta, 0);
                continue;
            }
            real a_edge[MR*EDGE], b_edge[EDGE*NR] = {0}, c_edge[MR*NR] = {0};
            for (size_t r = 0; beta != 0 && r < m; r++)
                memcpy(c_edge + r*NR, c + r*ldc, n*sizeof(real));
            do {
                k = least(EDGE, K - p);
                for (size_t q = 0; q < k; q++) {
                    for (size_t r = 0; r < MR; r++)
                        a_edge[q*MR + r] = r < m ? a[r*a_row + (p + q)*a_col] : 0;
                    memcpy(b_edge + q*NR, b + (p + q)*ldb, n*sizeof(real));
                }
                tile_of((int)((n + VL-1)/VL), c_edge, NR, a_edge, 1, MR, b_edge, NR, k, p ? 1 : beta, 0);
            } while ((p += k) < K);
            for (size_t r = 0; r < m; r++)
                memcpy(c + r*ldc, c_edge + r*NR, n*sizeof(real));
        }
    }
}

// FLOP/s of all threads at FMAs on registers alone, for 20 ms: what a matmul could reach at most
static double fma_peak(void) {
    const int chains = 12, steps = 20000;           // 12 chains: latency of 4-5, two FMAs a cycle
    double rate = 0;
    #pragma omp parallel reduction(+:rate)
    {
        static volatile real hidden = (real)0.999;  // from the compiler
        vec sum[12], factor = (vec){0} + hidden;
        for (int i = 0; i < chains; i++)
            sum[i] = factor*(real)i;
        double start = now(), seconds, flops = 0;
        do {
            for (int step = 0; step < steps; step++)
                UNROLL for (int i = 0; i < chains; i++)
                    sum[i] = sum[i]*factor + factor;
            flops += 2.0*VL*chains*steps;
            seconds = now() - start;
        } while (seconds < 0.02);
        for (int i = 1; i < chains; i++)
            sum[0] += sum[i];
        rate += flops/seconds + 0*(double)sum[0][0];    // so that the sums are needed
    }
    return rate;
}
