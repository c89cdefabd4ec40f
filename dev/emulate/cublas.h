// CUDA on a CPU, part 5: cublasLtMatmul by plain loops. It takes only what the fast kernels of a GPU
// take for certain and says what it does not like: column-major bf16 x bf16 -> bf16 or float, or all
// float; float accumulation and scaling; no epilogue; pointers and pitches of multiples of 16 bytes.
#pragma once
#include "runtime.h"

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;
typedef enum cudaDataType_t {
    CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14
} cudaDataType;
typedef enum {
    CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_16BF = 75, CUBLAS_COMPUTE_32F_FAST_TF32 = 77
} cublasComputeType_t;
typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_BGRADB = 512
} cublasLtEpilogue_t;
typedef enum { CUBLASLT_ORDER_COL = 0, CUBLASLT_ORDER_ROW = 1 } cublasLtOrder_t;
typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0, CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1,
    CUBLASLT_MATMUL_DESC_POINTER_MODE = 2, CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_EPILOGUE = 7
} cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATRIX_LAYOUT_ORDER = 1, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
} cublasLtMatrixLayoutAttribute_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
} cublasLtMatmulPreferenceAttributes_t;

typedef struct cublasLtContext *cublasLtHandle_t;
struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType scale;
    int transA, transB, epilogue, pointer_mode;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType type;
    long rows, cols, pitch;
    int batch, order;
    long long stride;
};
struct cublasLtMatmulPreferenceOpaque_t { size_t workspace; };
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;      // data[0]: bytes of workspace
typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

inline const char *cublasGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS ? "success" : s == CUBLAS_STATUS_INVALID_VALUE ? "invalid value"
        : s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "not initialized";
}
inline const char *cublasLtGetStatusString(cublasStatus_t s) { return cublasGetStatusString(s); }
inline size_t cublasLtGetVersion() { return 130000; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    return *h = (cublasLtHandle_t)malloc(1), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    return free(h), CUBLAS_STATUS_SUCCESS;
}

// ---- descriptors --------------------------------------------------------------------------------
namespace emu {
template<class T> cublasStatus_t set(T *field, const void *value, size_t size) {
    if (size != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(field, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
}  // namespace emu
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType scale) {
    return *d = new cublasLtMatmulDescOpaque_t{compute, scale, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, 0}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    return delete d, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(
        cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *value, size_t size) {
    switch (a) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return emu::set(&d->compute, value, size);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return emu::set(&d->scale, value, size);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return emu::set(&d->pointer_mode, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSA: return emu::set(&d->transA, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return emu::set(&d->transB, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return emu::set(&d->epilogue, value, size);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t pitch) {
    return *l = new cublasLtMatrixLayoutOpaque_t{type, (long)rows, (long)cols, (long)pitch, 1, 0, 0}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    return delete l, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(
        cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void *value, size_t size) {
    switch (a) {
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return emu::set(&l->order, value, size);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return emu::set(&l->batch, value, size);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return emu::set(&l->stride, value, size);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return *p = new cublasLtMatmulPreferenceOpaque_t{0}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
        cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *value, size_t size) {
    if (a != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return CUBLAS_STATUS_SUCCESS;
    return emu::set(&p->workspace, value, size);
}

// ---- D = alpha op(A) op(B) + beta C -------------------------------------------------------------
namespace emu {
typedef cublasLtMatrixLayoutOpaque_t Layout;
struct Operand { const void *data; Layout at; };
struct Matmul {                         // (m, k) x (k, n)
    cublasLtMatmulDescOpaque_t desc;
    Layout A, B, C, D;
    long m() const { return D.rows; }
    long n() const { return D.cols; }
    long k() const { return desc.transA ? A.rows : A.cols; }
};
inline size_t width(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }
inline size_t bytes(const Layout &l) {
    return ((l.batch - 1) * l.stride + (l.cols - 1) * l.pitch + l.rows) * width(l.type);
}
// The first reason why not, or nullptr.
inline const char *refusal(const Matmul &p) {
    cudaDataType in = p.A.type, out = p.D.type;
    auto compute = p.desc.compute;
    bool bf16 = in == CUDA_R_16BF && compute == CUBLAS_COMPUTE_32F;
    bool fp32 = in == CUDA_R_32F && out == CUDA_R_32F
        && (compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC);
    if (p.B.type != in || p.C.type != out || (out != CUDA_R_32F && out != CUDA_R_16BF) || (!bf16 && !fp32))
        return "types other than bf16 x bf16 -> bf16 or float (COMPUTE_32F), or all float";
    if (p.desc.scale != CUDA_R_32F || p.desc.pointer_mode) return "alpha and beta not host floats";
    if (p.desc.epilogue != CUBLASLT_EPILOGUE_DEFAULT) return "an epilogue";
    bool ta = p.desc.transA, tb = p.desc.transB;
    if ((ta ? p.A.cols : p.A.rows) != p.m() || (tb ? p.B.rows : p.B.cols) != p.n()
        || (tb ? p.B.cols : p.B.rows) != p.k() || p.C.rows != p.m() || p.C.cols != p.n())
        return "shapes that do not fit";
    for (const Layout *l : {&p.A, &p.B, &p.C, &p.D}) {
        if (l->rows < 1 || l->cols < 1 || l->pitch < l->rows) return "an empty matrix or a short pitch";
        if (l->order != CUBLASLT_ORDER_COL) return "an order other than columns";
        if (l->pitch * width(l->type) % 16) return "a pitch that is not a multiple of 16 bytes";
        if (l->stride * width(l->type) % 16) return "a stride that is not a multiple of 16 bytes";
        if (l->batch != p.D.batch) return "batches of different counts";
    }
    return nullptr;
}
inline cublasStatus_t refuse(const char *call, const char *why, cublasStatus_t s) {
    fprintf(stderr, "emulate: %s: %s\n", call, why);
    return s;
}

// Rows of op(X)^T, each of k floats padded with zeros to a multiple of 8.
inline std::vector<float> unpack(const char *x, const Layout &l, bool by_column, long count, long k, long room) {
    std::vector<float> rows((size_t)(count * room));
    long step_row = by_column ? l.pitch : 1, step_k = by_column ? 1 : l.pitch;
    for (long i = 0; i < count; i++)
        for (long j = 0; j < k; j++) {
            long at = i * step_row + j * step_k;
            rows[i * room + j] = l.type == CUDA_R_32F ? ((const float *)x)[at]
                                                      : from_bf16(((const uint16_t *)x)[at]);
        }
    return rows;
}
inline float dot(const float *a, const float *b, long n) {      // n a multiple of 8
    typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
    Eight sum = {};
    for (long i = 0; i < n; i += 8) sum += *(const Eight *)(a + i) * *(const Eight *)(b + i);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
inline void matmul(const Matmul &p, float alpha, const char *A, const char *B, float beta, const char *C,
                   char *D) {
    long m = p.m(), n = p.n(), k = p.k(), room = (k + 7) / 8 * 8;
    std::vector<float> a = unpack(A, p.A, p.desc.transA, m, k, room);
    std::vector<float> b = unpack(B, p.B, !p.desc.transB, n, k, room);
    bool fp32 = p.D.type == CUDA_R_32F;
    for (long j = 0; j < n; j++)
        for (long i = 0; i < m; i++) {
            float d = alpha * dot(&a[i * room], &b[j * room], room);
            long c = i + j * p.C.pitch, at = i + j * p.D.pitch;
            if (beta) d += beta * (fp32 ? ((const float *)C)[c] : from_bf16(((const uint16_t *)C)[c]));
            if (fp32) ((float *)D)[at] = d;
            else ((uint16_t *)D)[at] = to_bf16(d);
        }
}
constexpr size_t WORKSPACE = 64 * KiB;  // what the algorithm takes when it is allowed to
}  // namespace emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
        cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
        cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D, cublasLtMatmulPreference_t preference,
        int wanted, cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = 0;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    if (const char *why = emu::refusal({*d, *A, *B, *C, *D}))
        return emu::refuse("cublasLtMatmulAlgoGetHeuristic", why, CUBLAS_STATUS_NOT_SUPPORTED);
    results[0] = {};
    size_t need = preference->workspace >= emu::WORKSPACE ? emu::WORKSPACE : 0;
    results[0].workspaceSize = results[0].algo.data[0] = need;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(
        cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *A, cublasLtMatrixLayout_t lA,
        const void *B, cublasLtMatrixLayout_t lB, const void *beta, const void *C, cublasLtMatrixLayout_t lC,
        void *D, cublasLtMatrixLayout_t lD, const cublasLtMatmulAlgo_t *algo, void *workspace,
        size_t workspace_size, cudaStream_t stream) {
    const char *call = "cublasLtMatmul";
    emu::Matmul p = {*d, *lA, *lB, *lC, *lD};
    if (const char *why = emu::refusal(p)) return emu::refuse(call, why, CUBLAS_STATUS_NOT_SUPPORTED);
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    size_t need = algo ? algo->data[0] : 0;
    if (!keep && !C) C = D;
    emu::Operand all[] = {{A, p.A}, {B, p.B}, {C, p.C}, {D, p.D}};
    for (emu::Operand &o : all) {
        if ((uintptr_t)o.data % 16)
            return emu::refuse(call, "a pointer not aligned to 16 bytes", CUBLAS_STATUS_NOT_SUPPORTED);
        if (!emu::on_device(o.data, emu::bytes(o.at)))
            return emu::refuse(call, "a matrix not in device memory, or not wholly", CUBLAS_STATUS_INVALID_VALUE);
    }
    if (need > workspace_size || (need && !emu::on_device(workspace, need)))
        return emu::refuse(call, "less workspace than the algorithm needs", CUBLAS_STATUS_INVALID_VALUE);
    emu::enqueue(stream, [=] {
        emu::DeviceOpen open;
        if (need) memset(workspace, 0xff, need);        // whoever keeps something there will see
        for (int i = 0; i < p.D.batch; i++)
            emu::matmul(p, scale, (const char *)A + i * p.A.stride * emu::width(p.A.type),
                        (const char *)B + i * p.B.stride * emu::width(p.B.type), keep,
                        (const char *)C + i * p.C.stride * emu::width(p.C.type),
                        (char *)D + i * p.D.stride * emu::width(p.D.type));
    });
    return CUBLAS_STATUS_SUCCESS;
}
