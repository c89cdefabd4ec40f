// tiles.cuh: products of tiles, for train_mamba2.cu's plain kernels of any shape.
//
// Warp w has rows 16 w .. 16 w + 15 of the result, in the fragments of mma.m16n8k16: acc[j][r] of a
// lane is at row acc_row(r) and column acc_col(j, r). float has the same layout, without mma.
constexpr int TILE = 64, DEPTH = 32;

template<typename floatX>
struct Tiles {
    floatX a[TILE][DEPTH + 8], b[DEPTH][TILE + 8];         // + 8: no bank conflicts in ldmatrix
};

__device__ inline int acc_row(int r) {
    return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + r / 2 * 8;
}
__device__ inline int acc_col(int j, int r) { return 8 * j + threadIdx.x % 4 * 2 + r % 2; }

template<class F>
__device__ inline void each(float acc[8][4], F f) {        // f(element, row, column)
    UNROLL for (int j = 0; j < 8; j++) {
        UNROLL for (int r = 0; r < 4; r++) {
            f(acc[j][r], acc_row(r), acc_col(j, r));
        }
    }
}

__device__ inline void warp_product(float acc[8][4], const Tiles<bf16> &s) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    UNROLL for (int k = 0; k < DEPTH; k += 16) {
        uint32_t a[4], b[4];
        ldmatrix(a, &s.a[row + lane % 16][k + lane / 16 * 8]);
        UNROLL for (int j = 0; j < 8; j += 2) {
            ldmatrix_trans(b, &s.b[k + lane % 16][8 * j + lane / 16 * 8]);
            mma(acc[j], a, b);
            mma(acc[j + 1], a, b + 2);
        }
    }
}
__device__ inline void warp_product(float acc[8][4], const Tiles<float> &s) {
    for (int k = 0; k < DEPTH; k++) {
        float a[2] = {s.a[acc_row(0)][k], s.a[acc_row(2)][k]};
        UNROLL for (int j = 0; j < 8; j++) {
            float2 b = *(const float2 *)&s.b[k][acc_col(j, 0)];
            acc[j][0] += a[0] * b.x;
            acc[j][1] += a[0] * b.y;
            acc[j][2] += a[1] * b.x;
            acc[j][3] += a[1] * b.y;
        }
    }
}

// acc += sum over first <= k < last of a(row, k) b(k, column). a and b give elements as float,
// rounded to floatX here; ALONG_K: neighbours in memory are neighbours in k.
enum Order { ALONG_K, ACROSS_K };
template<Order ORDER_A, Order ORDER_B, typename floatX, class A, class B>
__device__ inline void multiply(float acc[8][4], Tiles<floatX> &s, int first, int last, A a, B b) {
    for (int k0 = first; k0 < last; k0 += DEPTH) {
        __syncthreads();                                   // the tiles are no longer read
        for (int i = threadIdx.x; i < TILE * DEPTH; i += 128) {
            int k = ORDER_A == ALONG_K ? i % DEPTH : i / TILE;
            int row = ORDER_A == ALONG_K ? i / DEPTH : i % TILE;
            s.a[row][k] = (floatX)(k0 + k < last ? a(row, k0 + k) : 0.0f);
        }
        for (int i = threadIdx.x; i < TILE * DEPTH; i += 128) {
            int k = ORDER_B == ALONG_K ? i % DEPTH : i / TILE;
            int col = ORDER_B == ALONG_K ? i / DEPTH : i % TILE;
            s.b[k][col] = (floatX)(k0 + k < last ? b(k0 + k, col) : 0.0f);
        }
        __syncthreads();
        warp_product(acc, s);
    }
}

__device__ inline void scale_rows(float acc[8][4], float at_row_0, float at_row_2) {
    UNROLL for (int j = 0; j < 8; j++) {
        UNROLL for (int r = 0; r < 4; r++) {
            acc[j][r] *= r < 2 ? at_row_0 : at_row_2;
        }
    }
}

// Sums of f(element, row, column) along the two rows of a lane, acc_row(0) and acc_row(2).
template<class F>
__device__ inline void row_sums(float sum[2], float acc[8][4], F f) {
    sum[0] = sum[1] = 0.0f;
    UNROLL for (int j = 0; j < 8; j++) {
        UNROLL for (int r = 0; r < 4; r++) {
            sum[r / 2] += f(acc[j][r], acc_row(r), acc_col(j, r));
        }
    }
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
}
