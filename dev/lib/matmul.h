// matmul.h: matrix products as fast as the machine allows, in C with vector types.
//
// C[M,N] (+)= A[M,K] B[K,N]. A and B come with a row and a column stride, one of which is 1: this
// covers products with either operand transposed, without flags. Three levels, from the inside:
//   tile   MR rows by NV vectors of C, in registers. Each k takes NV vectors of B and MR numbers of
//          A for MR*NV FMAs: enough of them to hide their latency, and half as many loads.
//   block  BLOCK panels of B (0.6 MB) stay in L2 while rows of A pass over them; each panel of A
//          (MR rows, 24 KB) meets them all from L1. Blocks are the threads' tasks.
//   slab   KC values of k, MB rows of A and NB columns of B are packed by all threads for all, in
//          L3, into panels that a tile reads straight on: (k,MR) of A and (k,NR) of B.
// An element of C is a sum over slabs, in order, of a chain of FMAs each. KC depends on K alone: no
// bit of it depends on the number of threads, nor on which other rows and columns there are.

#if defined __AVX512F__             // reals in a vector, and as many rows in a tile as 32 registers
#define LANES_float 16              // can take: rows*vectors sums, the vectors of B and one of A
#define LANES_double 8
#define MR 8
#define SMALL_NV 4
#elif defined __AVX__               // 16 registers from here on
#define LANES_float 8
#define LANES_double 4
#define MR 4
#define SMALL_NV 2
#else
#define LANES_float 4
#define LANES_double 2
#define MR 4
#define SMALL_NV 2
#endif
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define VL PASTE(LANES_, REAL)

#if defined __clang__               // which else halves vectors of 64 bytes for some processors
#define INLINE static inline __attribute__((always_inline, min_vector_width(512)))
#define UNROLL _Pragma("unroll")
#else
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#endif
#ifdef __CUDACC__                   // does not know it, and gcc after it unrolls all the same
#undef UNROLL
#define UNROLL
#endif
#if defined BF16_EMULATE            // bf16 values of k in a place of a panel: 0 when not built in
#define BF16 1
#elif defined __AVX512BF16__
#define BF16 2
#else
#define BF16 0
#endif

enum {
    NV = 3, NR = NV*VL, BLOCK = 4, KC = 3072/sizeof(real), MB = 2048, NB = 24*NR,
    GROUP = 96,                     // rows of A packed at a time
    EDGE = 64,                      // values of k packed at a time at the edges of a small product
    PITCH = KC + 2,                 // + 2, or panels of 2^n bytes would compete for one cache set
    SMALL_MR = 6, SMALL_END = 4,    // rows of a tile of SMALL_NV vectors, whose B lies in L1
    FEW = 4,                        // rows that are not worth packing B for
    STRIDED = 0, PACKED, PAIRS      // operands of a tile: in place; in panels; of pairs of bf16
};
typedef real vec __attribute__((vector_size(VL*sizeof(real))));
typedef real vec_at __attribute__((vector_size(VL*sizeof(real)), aligned(sizeof(real)), may_alias));

static int matmul_bf16;             // round A and B to bf16; the sums stay in fp32
static real *packed_A[2], *packed_B[2];         // MB*PITCH, NB*PITCH; one is packed while the other
                                                // is in use

static int bf16_available(void) { return BF16 && sizeof(real) == sizeof(float); }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t parts(size_t n, size_t size) { return (n + size-1)/size; }

// The size of n's parts when they are even, at most `most`, and multiples of `unit`
static size_t even(size_t n, size_t most, size_t unit) {
    return parts(parts(n, parts(n, most)), unit)*unit;
}

// n columns of B make this many panels, and panel q starts here: NV vectors each, or fewer, evenly
static size_t panels(size_t n) { return parts(parts(n, VL), NV); }
static size_t panel_start(size_t q, size_t n) { return least(n, q*parts(n, VL)/panels(n)*VL); }

// sum + a b in every lane; of pairs of bf16, sum + a.low b.low + a.high b.high
INLINE vec multiply_add(vec sum, const real *a, vec b, const int kind) {
#if BF16 == 2
    if (kind == PAIRS) {
        int a2;
        memcpy(&a2, a, sizeof a2);
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a2), (__m512bh)b);
    }
#endif
    (void)kind;
    return sum + *a*b;
}

// C = beta from + A B for mr rows and nv vectors. Panels are prefetched, B from L2 and A from L3;
// and C, row by row during the sums, for all its rows at once would keep those waiting.
INLINE void tile(real *C, const real *from, size_t ldc, const real *A, size_t a_row, size_t a_col,
                 const real *B, size_t ldb, size_t K, real beta, const int mr, const int nv,
                 const int kind) {
    vec sum[8][4] = {{{0}}}, b[4];                          // mr by nv of them
    const int turns = kind == STRIDED ? 1 : mr;
    size_t k = 0;
    for (int turn = 0; turn < turns; turn++) {
        if (kind != STRIDED)
            UNROLL for (int j = 0; j <= nv; j++)
                __builtin_prefetch(C + turn*ldc + j*VL - (j == nv), 1);
        for (size_t end = K*(turn + 1)/turns; k < end; k++, A += a_col, B += ldb) {
            UNROLL for (int j = 0; j < nv; j++)
                b[j] = *(const vec_at *)(B + j*VL);
            if (kind != STRIDED) {
                __builtin_prefetch(A + 64*a_col);
                UNROLL for (int j = 0; j < nv; j++)
                    __builtin_prefetch(B + 8*ldb + j*VL);
            }
            UNROLL for (int i = 0; i < mr; i++)
                UNROLL for (int j = 0; j < nv; j++)
                    sum[i][j] = multiply_add(sum[i][j], A + i*a_row, b[j], kind);
        }
    }
    UNROLL for (int i = 0; i < mr; i++, C += ldc, from += ldc)
        UNROLL for (int j = 0; j < nv; j++) {
            if (beta != 0)
                sum[i][j] += beta * *(const vec_at *)(from + j*VL);
            *(vec_at *)(C + j*VL) = sum[i][j];
        }
}

// The same for n columns: the compiler makes a tile for each number of vectors
INLINE void full_tile(real *C, const real *from, size_t ldc, const real *A, size_t a_row,
                      size_t a_col, const real *B, size_t ldb, size_t n, size_t K, real beta,
                      const int mr, const int kind) {
#define TILE(nv) tile(C, from, ldc, A, a_row, a_col, B, ldb, K, beta, mr, nv, kind)
    if (SMALL_NV > 3 && n > 3*VL) TILE(SMALL_NV);
    else if (NV > 2 && n > 2*VL)  TILE(3);
    else if (n > VL)              TILE(2);
    else                          TILE(1);
#undef TILE
}

// The same on panels a (K,MR) and b (K,NR). At the edges of C a whole tile is computed beside it.
static void packed_tile(real *C, size_t ldc, const real *a, const real *b, size_t m, size_t n,
                        size_t K, real beta, int pairs) {
    if (m < MR || n % VL) {
        real edge[MR*NR] = {0};
        for (size_t i = 0; beta != 0 && i < m; i++)
            memcpy(edge + i*NR, C + i*ldc, n*sizeof(real));
        packed_tile(edge, NR, a, b, MR, parts(n, VL)*VL, K, beta, pairs);
        for (size_t i = 0; i < m; i++)
            memcpy(C + i*ldc, edge + i*NR, n*sizeof(real));
        return;
    }
    if (BF16 == 2 && pairs)
        full_tile(C, C, ldc, a, 1, MR, b, NR, n, parts(K, 2), beta, MR, PAIRS);
    else
        full_tile(C, C, ldc, a, 1, MR, b, NR, n, K, beta, MR, PACKED);
}

// The same where nothing is packed; not inline, for its strides need all the registers
static __attribute__((noinline)) void strided_tile(real *C, const real *from, size_t ldc,
    const real *A, size_t a_row, size_t a_col, const real *B, size_t ldb, size_t m, size_t n,
    size_t K, real beta) {
    if (m == SMALL_MR)
        full_tile(C, from, ldc, A, a_row, a_col, B, ldb, n, K, beta, SMALL_MR, STRIDED);
    else
        full_tile(C, from, ldc, A, a_row, a_col, B, ldb, n, K, beta, SMALL_END, STRIDED);
}

// The indices of two vectors' elements taken in turn, from `first` on: a zip
#define ZIP_2(first)  (first), (first) + VL
#define ZIP_4(first)  ZIP_2(first), ZIP_2((first) + 1)
#define ZIP_8(first)  ZIP_4(first), ZIP_4((first) + 2)
#define ZIP_16(first) ZIP_8(first), ZIP_8((first) + 4)
#define ZIP(first)    PASTE(ZIP_, VL)(first)

// to[k*w + r] = from[r*line + k] for VL values of k and R <= VL lines, in registers. To zip
// the first half of the lines with the second rotates the bits of every element's place, line:k, by
// one: after log2 R times they read k:line. Lines from `lines` on repeat the last.
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

// out (cols,rows) = the transpose of in (rows,cols)
static void transpose(real *out, size_t ldo, const real *in, size_t ldi, size_t rows, size_t cols) {
    size_t i = 0;
    for (; i + VL <= rows; i += VL) {
        size_t j = 0;
        for (; j + VL <= cols; j += VL)
            transpose_tile(out + j*ldo + i, ldo, VL, in + i*ldi + j, ldi, VL);
        for (; j < cols; j++)
            for (size_t k = i; k < i + VL; k++) out[j*ldo + k] = in[k*ldi + j];
    }
    for (; i < rows; i++)
        for (size_t j = 0; j < cols; j++) out[j*ldo + i] = in[i*ldi + j];
}

static unsigned bf16_bits(real x)   // the nearest bf16, ties to even; NaN stays NaN
{
    float f = (float)x;
    unsigned u;
    memcpy(&u, &f, sizeof u);
    return (u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// Round a panel (K,w) to bf16 in place; for the instruction, values 2k and 2k+1 share a place
INLINE void round_panel(real *panel, size_t K, const int w) {
    memset(panel + K*w, 0, w*sizeof(real));                 // in case K is odd
    for (size_t k = 0; k < K; k += 2) {
        OMP(simd)
        for (int r = 0; r < w; r++) {
            real *first = panel + k*w + r, *second = first + w;
            unsigned low = bf16_bits(*first), high = bf16_bits(*second) << 16;
            if (BF16 == 2)
                low |= high, first = panel + k/2*w + r;
            else
                low <<= 16, memcpy(second, &high, sizeof high);
            memcpy(first, &low, sizeof low);
        }
    }
}

// Pack n lines of K values, rows of A or columns of B, into panels (K,w) that start `size` apart
INLINE void pack(real *panel, size_t size, const real *from, size_t line, size_t step,
                 size_t n, size_t K, const int w, int round) {
    for (size_t k = 0; line == 1 && k < K; k++)             // contiguous in the lines: copy
        for (size_t r = 0; r < n; r += w)
            if (n - r >= (size_t)w)
                memcpy(panel + r/w*size + k*w, from + k*step + r, w*sizeof(real));
            else
                memcpy(panel + r/w*size + k*w, from + k*step + r, (n - r)*sizeof(real));
    const int R = w < VL ? w : VL;
    for (size_t r = 0, k; line != 1 && r < n; r += (size_t)R) {     // contiguous in k: transpose
        real *to = panel + r/w*size + r % w;
        for (k = 0; step == 1 && k + VL <= K; k += VL)
            transpose_tile(to + k*w, w, R, from + r*line + k, line, n - r);
        for (; k < K; k++)
            for (size_t i = r; i < least(r + (size_t)R, n); i++)
                to[k*w + i - r] = from[i*line + k*step];
    }
    for (size_t r = 0; round && r < n; r += w)
        round_panel(panel + r/w*size, K, w);
}

// C[i] (+)= A[i] . b for M <= FEW rows of A at once, so that b is read once: decoding, where the
// speed of memory is the limit. Rows from M on repeat the last.
INLINE void dots(real *C, size_t ldc, const real *A, size_t lda, const real *b,
                 size_t M, size_t K, int add) {
    vec sum[FEW] = {{0}};
    size_t k = 0;
    for (; k + VL <= K; k += VL) {
        __builtin_prefetch(b + k + 32*VL);
        UNROLL for (int i = 0; i < FEW; i++)
            sum[i] += *(const vec_at *)(A + least(i, M - 1)*lda + k) * *(const vec_at *)(b + k);
    }
    for (size_t i = 0; i < M; i++) {
        real total = 0;
        for (int lane = 0; lane < VL; lane++)
            total += sum[i][lane];
        for (size_t rest = k; rest < K; rest++)
            total += A[i*lda + rest]*b[rest];
        C[i*ldc] = add ? C[i*ldc] + total : total;
    }
}

// Called outside parallel regions. Slabs are packed into one pair of buffers while
// slow threads may still be busy with the other.
static void matmul(real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                   const real *B, size_t b_row, size_t b_col, size_t M, size_t N, size_t K,
                   int add) {
    for (size_t i = 0; !K && !add && i < M; i++) memset(C + i*ldc, 0, N*sizeof(real));
    if (!M || !N || !K) return;
    if (M <= FEW && a_col == 1 && b_row == 1 && !matmul_bf16) {
        OMP(parallel for schedule(static))
        for (size_t j = 0; j < N; j++)
            dots(C + j, ldc, A, a_row, B + j*b_col, M, K, add);
        return;
    }
    const size_t kc = even(K, KC, 2*VL), mb = even(M, MB, MR), nb = even(N, NB, NR), pitch = kc + 2;
    const size_t blocks = parts(panels(nb), BLOCK), tasks = 8*(size_t)omp_get_max_threads();
    size_t rows = mb;                                       // of a block: many, yet enough tasks
    while (rows > 8*MR && parts(mb, rows)*blocks < tasks)
        rows = even(rows, rows/2, MR);
    for (int turn = 0; turn < 2 && !packed_B[turn]; turn++) {
        packed_A[turn] = (real *)alloc_work(MB*PITCH, sizeof(real));
        packed_B[turn] = (real *)alloc_work(NB*PITCH, sizeof(real));
    }
    OMP(parallel)
    for (size_t p = 0, a_turn = 0, b_turn = 0; p < K; p += kc)
    for (size_t i = 0; i < M; i += mb)
    for (size_t j = 0; j < N; j += nb) {
        const size_t m = least(mb, M - i), n = least(nb, N - j), k = least(kc, K - p);
        const size_t new_A = j == 0, new_B = i == 0 || nb < N;
        real *a = packed_A[a_turn ^= new_A], *b = packed_B[b_turn ^= new_B];
        OMP(for schedule(dynamic) nowait)
        for (size_t r = 0; r < m*new_A; r += GROUP)
            pack(a + r*pitch, MR*pitch, A + (i + r)*a_row + p*a_col, a_row, a_col,
                 least(GROUP, m - r), k, MR, matmul_bf16);
        OMP(for schedule(dynamic))
        for (size_t q = 0; q < panels(n)*new_B; q++) {
            size_t left = panel_start(q, n), right = panel_start(q + 1, n);
            pack(b + q*NR*pitch, NR*pitch, B + p*b_row + (j + left)*b_col, b_col, b_row,
                 right - left, k, NR, matmul_bf16);
        }
        OMP(for schedule(dynamic) collapse(2) nowait)
        for (size_t q0 = 0; q0 < panels(n); q0 += BLOCK)
        for (size_t r0 = 0; r0 < m; r0 += rows)
            for (size_t r = r0; r < least(r0 + rows, m); r += MR)
            for (size_t q = q0; q < least(q0 + BLOCK, panels(n)); q++) {
                size_t left = panel_start(q, n), right = panel_start(q + 1, n);
                packed_tile(C + (i + r)*ldc + j + left, ldc, a + r*pitch, b + q*NR*pitch,
                            least(MR, m - r), right - left, k, add || p, matmul_bf16);
            }
    }
}

// The same for fewer rows, or fewer columns than a vector: packed, to read inside A and B
static void edge_tile(real *C, const real *from, size_t ldc, const real *A, size_t a_row,
                      size_t a_col, const real *B, size_t ldb, size_t m, size_t columns, size_t K,
                      real beta) {
    real a[EDGE*MR], b[EDGE*NR];
    for (size_t i = 0; from != C && beta != 0 && i < m; i++)
        memcpy(C + i*ldc, from + i*ldc, columns*sizeof(real));
    for (size_t p = 0, k; p < K; p += k) {
        k = least(EDGE, K - p);
        pack(a, 0, A + p*a_col, a_row, a_col, m, k, MR, 0);
        for (size_t j = 0, n; j < columns; j += n) {
            n = least(NR, columns - j);
            pack(b, 0, B + p*ldb + j, 1, ldb, n, k, NR, 0);
            packed_tile(C + j, ldc, a, b, m, n, k, p ? 1 : beta, 0);
        }
    }
}

// Rows of the next tile, when m are left: 6, at the end 4; fewer are an edge
static size_t small_rows(size_t m) {
    if (m == 2*SMALL_END) return SMALL_END;
    return least(m, m >= SMALL_MR || m < SMALL_END ? SMALL_MR : SMALL_END);
}

// C = beta from + A B, serial and from L1 and L2, for sizes that are not worth packing; C, `from`
// and B have contiguous rows, A any strides. `from` has C's pitch, and is C or lies elsewhere; with
// beta = 0 it is not read.
static void matmul_small(real *C, size_t ldc, const real *A, size_t a_row, size_t a_col,
                         const real *B, size_t ldb, size_t M, size_t N, size_t K, real beta,
                         const real *from) {
    for (size_t i = 0; !K && i < M; i++)
        for (size_t j = 0; j < N; j++) C[i*ldc + j] = beta == 0 ? 0 : beta*from[i*ldc + j];
    for (size_t j = 0, n; K && j < N; j += n) {
        n = N - j < VL ? N - j : least(SMALL_NV, (N - j)/VL)*VL;
        for (size_t i = 0, m; i < M; i += m) {
            m = n < VL ? least(M - i, MR) : small_rows(M - i);
            (n < VL || m < SMALL_END ? edge_tile : strided_tile)(C + i*ldc + j, from + i*ldc + j,
                ldc, A + i*a_row, a_row, a_col, B + j, ldb, m, n, K, beta);
        }
    }
}

INLINE double fma_rate(void) {
    const int chains = 12;                          // two FMAs a cycle, each taking 4 or 5
    static volatile real hidden = (real)0.999;      // from the compiler
    vec sum[12], factor = (vec){0} + hidden;
    for (int i = 0; i < chains; i++)
        sum[i] = factor*(real)i;
    double start = now(), seconds, steps = 0;
    do {
        for (int step = 0; step < 20000; step++)
            UNROLL for (int i = 0; i < chains; i++)
                sum[i] = sum[i]*factor + factor;
        steps += 20000;
        seconds = now() - start;
    } while (seconds < 0.02);
    for (int i = 1; i < chains; i++)
        sum[0] += sum[i];
    return 2.0*VL*chains*steps/seconds + 0*(double)sum[0][0];      // so that the sums are needed
}

// FLOP/s of all threads at FMAs in registers, for 20 ms: what no matmul can exceed
static double fma_sample(void) {
    double rate = 0;
    OMP(parallel reduction(+:rate))
    rate += fma_rate();
    return rate;
}

// The best of five samples, for the machine may be busy
static double fma_peak(void) {
    double best = 0;
    for (int i = 0; i < 5; i++) best = fmax(best, fma_sample());
    return best;
}
