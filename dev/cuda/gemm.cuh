// gemm.cuh: matrix products by cuBLASLt, or by a plain kernel, for train_mamba2.cu.
//
// For a shape, cuBLASLt takes the one of its heuristic's proposals that this file prefers, and keeps
// it: an algorithm chosen by timing would change the bits from run to run.
constexpr size_t CUBLAS_WORKSPACE = 32 << 20;

template<typename X> constexpr cudaDataType_t data_type() {
    return sizeof(X) == 4 ? CUDA_R_32F : CUDA_R_16BF;
}

// One product: out (m,n) row by row, out = beta out + a b, where a is (m,k) or, a_trans, stored
// (k,m), b is (k,n) or, b_trans, stored (n,k); pitches are of the stored rows.
struct Product {
    size_t m, n, k, pitch_a, pitch_b, pitch_out;
    int a_trans, b_trans;
    cudaDataType_t in = CUDA_R_16BF, out = CUDA_R_16BF;
};
struct ProductPlan {
    Product product;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, out;
    cublasLtMatmulAlgo_t algo;
};

static cublasLtHandle_t cublas;

// Training holds a GPU at its limit of power, where its clock depends on what kernels ask of it.
// There the first proposal for a product takes up to 1.5 times as long as some later one. These
// kinds did best, in this order, for the products of all models from 130m to 2.7b, under a steady
// load (H200, cuBLAS 13.1). Numbers are cuBLASLt's; its custom options have no names.
struct Kind {
    int tile, cluster, custom;
};
constexpr Kind PREFERRED[] = {
    {197, 5, 2},                           // tiles of 168x128, clusters of 1x2
    {20, 3, 1},                            // 128x128, 2x1
    {29, 3, 1},                            // 128x160, 2x1
    {29, 5, 3},                            // 128x160, 1x2
    {201, 5, 2},                           // 176x128, 1x2
    {20, 5, 3},                            // 128x128, 1x2
    {24, 5, 7},                            // 256x128, 1x2
};

template<typename X>
static int attribute(const cublasLtMatmulAlgo_t &algo, cublasLtMatmulAlgoConfigAttributes_t which) {
    X value = 0;
    size_t size;
    CUBLAS(cublasLtMatmulAlgoConfigGetAttribute(&algo, which, &value, sizeof value, &size));
    return (int)value;
}
static int rank(const cublasLtMatmulAlgo_t &algo) {        // in PREFERRED, or past its end
    int rank = 0;
    for (const Kind &kind : PREFERRED) {
        if (attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_TILE_ID) == kind.tile &&
            attribute<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID) == kind.cluster &&
            attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION) == kind.custom) break;
        rank++;
    }
    return rank;
}

static cublasLtMatrixLayout_t layout(cudaDataType_t type, size_t rows, size_t columns,
                                     size_t pitch) {
    cublasLtMatrixLayout_t layout;                         // cuBLAS counts by columns: transposed
    CUBLAS(cublasLtMatrixLayoutCreate(&layout, type, columns, rows, (int64_t)pitch));
    return layout;
}

static ProductPlan plan_product(const Product &p) {
    ProductPlan plan = {};
    plan.product = p;
    cublasComputeType_t compute =
        p.in == CUDA_R_32F ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
    cublasOperation_t a = p.a_trans ? CUBLAS_OP_T : CUBLAS_OP_N,
                      b = p.b_trans ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS(cublasLtMatmulDescCreate(&plan.desc, compute, CUDA_R_32F));
    CUBLAS(cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_TRANSA, &b, sizeof b));
    CUBLAS(cublasLtMatmulDescSetAttribute(plan.desc, CUBLASLT_MATMUL_DESC_TRANSB, &a, sizeof a));
    plan.a = p.a_trans ? layout(p.in, p.k, p.m, p.pitch_a) : layout(p.in, p.m, p.k, p.pitch_a);
    plan.b = p.b_trans ? layout(p.in, p.n, p.k, p.pitch_b) : layout(p.in, p.k, p.n, p.pitch_b);
    plan.out = layout(p.out, p.m, p.n, p.pitch_out);
    cublasLtMatmulPreference_t wish;
    size_t room = CUBLAS_WORKSPACE;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    CUBLAS(cublasLtMatmulPreferenceCreate(&wish));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof room));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(
        wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction));
    cublasLtMatmulHeuristicResult_t proposed[16];
    int found = 0;
    CUBLAS(cublasLtMatmulAlgoGetHeuristic(cublas, plan.desc, plan.b, plan.a, plan.out, plan.out,
                                          wish, 16, proposed, &found));
    CHECK(found, "cuBLAS has no algorithm for a product of %zu x %zu x %zu", p.m, p.n, p.k);
    plan.algo = proposed[0].algo;
    bool large = min(p.m, min(p.n, p.k)) >= 512;           // not the few rows of generation
    for (int i = 1; i < found && p.in == CUDA_R_16BF && large; i++) {
        if (rank(proposed[i].algo) < rank(plan.algo)) plan.algo = proposed[i].algo;
    }
    CUBLAS(cublasLtMatmulPreferenceDestroy(wish));
    return plan;
}

// Shapes whose rows do not begin on 16 bytes (d_model 20, say) are not for cuBLAS.
template<int A_TRANS, int B_TRANS, typename In, typename Out>
__global__ void __launch_bounds__(128, 3)
gemm_kernel(Out *out, const In *a, const In *b, const Out *from, int add, Product p) {
    __shared__ Tiles<In> tiles;
    size_t i0 = blockIdx.x * (size_t)TILE, j0 = blockIdx.y * (size_t)TILE;
    float acc[8][4] = {};
    multiply<A_TRANS ? ACROSS_K : ALONG_K, B_TRANS ? ALONG_K : ACROSS_K>(
        acc, tiles, 0, p.k,
        [&](size_t i, size_t k) {
            return i0 + i < p.m
                       ? (float)a[A_TRANS ? k * p.pitch_a + i0 + i : (i0 + i) * p.pitch_a + k]
                       : 0.0f;
        },
        [&](size_t k, size_t j) {
            return j0 + j < p.n
                       ? (float)b[B_TRANS ? (j0 + j) * p.pitch_b + k : k * p.pitch_b + j0 + j]
                       : 0.0f;
        });
    each(acc, [&](float v, int i, int j) {
        if (i0 + i >= p.m || j0 + j >= p.n) return;
        size_t at = (i0 + i) * p.pitch_out + j0 + j;
        out[at] = (Out)(add ? v + (float)from[at] : v);
    });
}

template<typename In, typename Out>
static void gemm_any_shape(Out *out, const In *a, const In *b, const Out *from, int add,
                           Product p) {
    dim3 grid(pieces(p.m, TILE), pieces(p.n, TILE));
    if (p.a_trans) gemm_kernel<1, 0, In, Out><<<grid, 128, 0, stream>>>(out, a, b, from, add, p);
    else if (p.b_trans)
        gemm_kernel<0, 1, In, Out><<<grid, 128, 0, stream>>>(out, a, b, from, add, p);
    else gemm_kernel<0, 0, In, Out><<<grid, 128, 0, stream>>>(out, a, b, from, add, p);
    LAUNCHED();
}

// out = a b + (add ? from : 0); from may be out
template<typename In, typename Out>
static void gemm(Out *out, const In *a, const In *b, const Out *from, int add, Product p) {
    static ProductPlan plans[64];
    static int planned;
    static char *room;
    size_t bits = (p.pitch_a | p.pitch_b) * sizeof(In) | p.pitch_out * sizeof(Out);
    bits |= (uintptr_t)a | (uintptr_t)b | (uintptr_t)out | (uintptr_t)from;
    if (bits % 16) return gemm_any_shape(out, a, b, from, add, p);
    if (!cublas) CUBLAS(cublasLtCreate(&cublas));
    if (!room) room = device_alloc<char>(CUBLAS_WORKSPACE);
    p.in = data_type<In>();
    p.out = data_type<Out>();
    int i = 0;
    while (i < planned && memcmp(&plans[i].product, &p, sizeof p)) i++;
    if (i == planned) {
        CHECK(planned < 64, "more kinds of matrix products than the %d planned for", 64);
        plans[planned++] = plan_product(p);
    }
    const ProductPlan &plan = plans[i];
    float one = 1.0f, beta = add ? 1.0f : 0.0f;
    CUBLAS(cublasLtMatmul(cublas, plan.desc, &one, b, plan.b, a, plan.a, &beta, from, plan.out, out,
                          plan.out, &plan.algo, room, CUBLAS_WORKSPACE, stream));
}
