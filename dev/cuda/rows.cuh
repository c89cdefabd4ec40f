// rows.cuh: sums over lanes and blocks, and kernels that go over rows, for train_mamba2.cu.

__device__ inline float quad_sum(float v) {       // over the 4 lanes that share a row of a fragment
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}
template<typename X> __device__ inline X warp_sum(X v) {
    for (int lanes = 16; lanes; lanes /= 2) {
        v += __shfl_xor_sync(~0u, v, lanes);
    }
    return v;
}
// Inclusive sum over the lanes up to this one.
template<typename X> __device__ inline X warp_scan(X v) {
    int lane = threadIdx.x % 32;
    for (int step = 1; step < 32; step *= 2) {
        X other = __shfl_up_sync(~0u, v, step);
        v += lane >= step ? other : (X)0;
    }
    return v;
}

// exp and sigmoid as exact as the type that the result goes to: the fast ones err by 2^-21 or so.
template<typename floatX> __device__ inline float exp_of(float x) {
    return sizeof(floatX) == sizeof(float) ? expf(x) : exp2_fast(x * 1.44269504f);
}
template<typename floatX> __device__ inline float sigmoid(float x) {
    float e = 1.0f + exp_of<floatX>(-x);
    return sizeof(floatX) == sizeof(float) ? 1.0f / e : __fdividef(1.0f, e);
}

// ---- rows: 8 neighbouring columns a thread ------------------------------------------------------
// Kernels that go over rows give each thread K vectors of 8 columns, a block's width apart; what
// lies past the last column reads as zeros. K is a template argument, so that all stays in
// registers, and so is WIDE: columns and pitches are multiples of 8, and a vector is one or two
// instructions without a branch, so that many loads are on their way at once.
template<int COUNT> struct VecOf {
    float v[COUNT];
};
typedef VecOf<8> Vec;

template<int BYTES> struct WordOf;                         // what one instruction moves
template<> struct WordOf<4> { typedef uint32_t type; };
template<> struct WordOf<8> { typedef uint2 type; };
template<> struct WordOf<16> { typedef uint4 type; };

// COUNT neighbours as they are in memory: half the registers while they are on their way
template<typename X, int SIZE> struct Packed {
    static constexpr int COUNT = SIZE, BYTES = COUNT * sizeof(X) < 16 ? COUNT * sizeof(X) : 16,
                         PIECE = BYTES / sizeof(X), WORDS = COUNT / PIECE;
    typedef typename WordOf<BYTES>::type Word;
    Word words[WORDS];

    __device__ VecOf<COUNT> unpacked() const {
        X element[COUNT];
        VecOf<COUNT> x;
        memcpy(element, words, sizeof element);
        UNROLL for (int i = 0; i < COUNT; i++) {
            x.v[i] = (float)element[i];
        }
        return x;
    }
};

template<bool WIDE, int COUNT = 8, typename X>
__device__ inline Packed<X, COUNT> fetch(const X *from, size_t column, size_t columns) {
    typedef Packed<X, COUNT> Pack;
    Pack pack = {};
    if (WIDE) {
        UNROLL for (int i = 0; i < Pack::WORDS; i++) {
            if (column < columns) {
                pack.words[i] = ((const typename Pack::Word *)(from + column))[i];
            }
        }
    } else {
        X element[COUNT];
        UNROLL for (int i = 0; i < COUNT; i++) {
            element[i] = column + i < columns ? from[column + i] : (X)0.0f;
        }
        memcpy(pack.words, element, sizeof element);
    }
    return pack;
}
template<bool WIDE, int COUNT = 8, typename X>
__device__ inline VecOf<COUNT> load(const X *from, size_t column, size_t columns) {
    return fetch<WIDE, COUNT>(from, column, columns).unpacked();
}

template<bool WIDE, int COUNT, typename X>
__device__ inline void store(X *to, size_t column, size_t columns, const VecOf<COUNT> &x) {
    typedef Packed<X, COUNT> Pack;
    X element[COUNT];
    UNROLL for (int i = 0; i < COUNT; i++) {
        element[i] = (X)x.v[i];
    }
    if (WIDE) {
        Pack pack;
        memcpy(pack.words, element, sizeof element);
        UNROLL for (int i = 0; i < Pack::WORDS; i++) {
            if (column < columns) ((typename Pack::Word *)(to + column))[i] = pack.words[i];
        }
    } else {
        UNROLL for (int i = 0; i < COUNT; i++) {
            if (column + i < columns) to[column + i] = element[i];
        }
    }
}

// The sum over a block; part must not be in use by the sum before: callers alternate between two.
__device__ inline float block_sum(float v, float part[32]) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
        sum += part[w];
    }
    return sum;
}
__device__ inline float block_max(float v, float part[32]) {
    for (int lanes = 16; lanes; lanes /= 2) {
        v = max(v, __shfl_xor_sync(~0u, v, lanes));
    }
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
        v = max(v, part[w]);
    }
    return v;
}

// Calls f(K, WIDE, threads): 1, 2 or 4 vectors a thread.
constexpr int MOST_COLUMNS = 4 * 256 * 8;
template<class F>
static void by_columns(size_t columns, bool wide, F f) {
    unsigned vectors = pieces(columns, 8), K = vectors <= 256 ? 1 : vectors <= 640 ? 2 : 4;
    unsigned threads = (unsigned)round_up(pieces(vectors, K), 32);
    auto with = [&](auto K) {
        wide ? f(K, std::true_type(), threads) : f(K, std::false_type(), threads);
    };
    if (K == 1) with(std::integral_constant<int, 1>());
    else if (K == 2) with(std::integral_constant<int, 2>());
    else with(std::integral_constant<int, 4>());
}
// Launch bounds of kernels that work on a row while the next one is on its way. They set the
// registers: 80 and 128 for bf16 with one and two vectors of each tensor, more for the slow rest.
template<bool WIDE, typename floatX> constexpr bool LEAN = WIDE && sizeof(floatX) == 2;
template<int K, bool WIDE, typename floatX>
constexpr int THREADS = K != 2 ? 256 : LEAN<WIDE, floatX> ? 512 : 320;
template<int K, bool WIDE, typename floatX>
constexpr int BLOCKS = K == 1 && LEAN<WIDE, floatX> ? 3 : 1;
template<int K, typename floatX> constexpr bool NEXT_ROW = K * sizeof(floatX) <= 4;

// Sums over rows go in two stages: each of at most PARTS blocks adds up its span of rows, then
// to[c] += the parts of column c in order. PARTS is four blocks for each of Hopper's 132 SMs; where
// registers are for three, that many, so that the last ones are not left to run alone.
constexpr size_t PARTS = 4 * 132;
static size_t rows_of_block(size_t n, int K, unsigned threads) {
    return pieces(n, 65536 / (threads * (K == 1 ? 80 : 128)) == 3 ? PARTS / 4 * 3 : PARTS);
}
__global__ void __launch_bounds__(1024)
add_parts_kernel(float *to, const float *parts, size_t count, size_t columns, size_t pitch) {
    __shared__ float sums[32][33];
    size_t lane = threadIdx.x % 32, slice = threadIdx.x / 32, c = blockIdx.x * (size_t)32 + lane;
    float sum = 0.0f;
    for (size_t first = slice; first < count; first += 32 * 8) {
        float next[8];                                     // on their way together
        UNROLL for (int k = 0; k < 8; k++) {
            size_t i = first + 32 * k;
            next[k] = i < count && c < columns ? parts[i * pitch + c] : 0.0f;
        }
        UNROLL for (int k = 0; k < 8; k++) {
            sum += next[k];
        }
    }
    sums[lane][slice] = sum;
    __syncthreads();
    sum = warp_sum(sums[slice][lane]);                     // now a column to each warp
    c = blockIdx.x * (size_t)32 + slice;
    if (lane == 0 && c < columns) to[c] += sum;
}
static void add_parts(float *to, const float *parts, size_t count, size_t columns, size_t pitch) {
    add_parts_kernel<<<pieces(columns, 32), 1024, 0, stream>>>(to, parts, count, columns, pitch);
    LAUNCHED();
}
