// CUDA on a CPU, part 5: cublasLtMatmul by plain loops, as far as it is used. It takes only what
// a GPU's fast kernels take for certain, and says what it does not like: bf16 x bf16 -> bf16 or
// float, or all float; accumulated and scaled in float; pointers and pitches of 16 bytes.
#pragma once
#include "runtime.h"

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69 } cublasComputeType_t;
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
};
enum { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

enum cublasLtMatmulAlgoConfigAttributes_t {
    CUBLASLT_ALGO_CONFIG_TILE_ID = 1, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION = 5,
    CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID = 8
};
struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType scale;
    cublasOperation_t transA, transB;
};
struct cublasLtMatrixLayoutOpaque_t { cudaDataType type; long rows, cols, pitch; };
struct cublasLtMatmulPreferenceOpaque_t { size_t workspace; };
typedef struct cublasLtContext *cublasLtHandle_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;      // data[0]: bytes of workspace
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; } cublasLtMatmulHeuristicResult_t;

inline const char *cublasGetStatusString(cublasStatus_t s) {
    return s == CUBLAS_STATUS_SUCCESS ? "success"
         : s == CUBLAS_STATUS_INVALID_VALUE ? "invalid value" : "not supported";
}
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    return *h = (cublasLtHandle_t)malloc(1), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    return free(h), CUBLAS_STATUS_SUCCESS;
}

// ---- descriptors --------------------------------------------------------------------------------
#define EMU_DESTROY(name)                                                                    \
    inline cublasStatus_t cublasLt##name##Destroy(cublasLt##name##Opaque_t *p) {             \
        return delete p, CUBLAS_STATUS_SUCCESS;                                              \
    }
EMU_DESTROY(MatmulDesc)
EMU_DESTROY(MatrixLayout)
EMU_DESTROY(MatmulPreference)
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType scale) {
    *d = new cublasLtMatmulDescOpaque_t{compute, scale, CUBLAS_OP_N, CUBLAS_OP_N};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(
        cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *value, size_t size) {
    auto *field = a == CUBLASLT_MATMUL_DESC_TRANSA ? &d->transA : &d->transB;
    if (size != sizeof *field) return CUBLAS_STATUS_INVALID_VALUE;
    return memcpy(field, value, size), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t pitch) {
    *l = new cublasLtMatrixLayoutOpaque_t{type, (long)rows, (long)cols, (long)pitch};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return *p = new cublasLtMatmulPreferenceOpaque_t{0}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
        cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *value,
        size_t size) {
    bool room = a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    if (size != (room ? sizeof(size_t) : sizeof(uint32_t))) return CUBLAS_STATUS_INVALID_VALUE;
    if (room) memcpy(&p->workspace, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

// ---- D = alpha op(A) op(B) + beta C -------------------------------------------------------------
namespace emu {
typedef cublasLtMatrixLayoutOpaque_t Layout;
struct Matmul {                         // (m, k) x (k, n)
    cublasLtMatmulDescOpaque_t desc;
    Layout A, B, C, D;
    long m() const { return D.rows; }
    long n() const { return D.cols; }
    long k() const { return desc.transA ? A.rows : A.cols; }
};
inline size_t width(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }
inline size_t bytes(const Layout &l) {
    return (size_t)((l.cols - 1) * l.pitch + l.rows) * width(l.type);
}
// The first reason why not, or nullptr.
inline const char *refusal(const Matmul &p) {
    cudaDataType in = p.A.type, out = p.D.type;
    bool pedantic = p.desc.compute == CUBLAS_COMPUTE_32F_PEDANTIC;
    bool bf16 = in == CUDA_R_16BF && !pedantic, fp32 = in == CUDA_R_32F && out == CUDA_R_32F;
    if (p.B.type != in || p.C.type != out || p.desc.scale != CUDA_R_32F || (!bf16 && !fp32))
        return "types other than bf16 x bf16 -> bf16 or float (COMPUTE_32F), or all float";
    bool ta = p.desc.transA, tb = p.desc.transB;
    if ((ta ? p.A.cols : p.A.rows) != p.m() || (tb ? p.B.rows : p.B.cols) != p.n()
        || (tb ? p.B.cols : p.B.rows) != p.k() || p.C.rows != p.m() || p.C.cols != p.n())
        return "shapes that do not fit";
    for (const Layout *l : {&p.A, &p.B, &p.C, &p.D}) {
        if (l->rows < 1 || l->cols < 1) return "an empty matrix";
        if (l->pitch < l->rows) return "a pitch shorter than a column";
        if ((size_t)l->pitch * width(l->type) % 16)
            return "a pitch that is not a multiple of 16 bytes";
    }
    return nullptr;
}
inline cublasStatus_t refuse(const char *why, cublasStatus_t s = CUBLAS_STATUS_NOT_SUPPORTED) {
    fprintf(stderr, "emulate: cublasLtMatmul: %s\n", why);
    return s;
}

inline float get(const void *x, cudaDataType t, long i) {
    return t == CUDA_R_32F ? ((const float *)x)[i] : from_bf16(((const uint16_t *)x)[i]);
}
inline void put(void *x, cudaDataType t, long i, float v) {
    if (t == CUDA_R_32F) ((float *)x)[i] = v;
    else ((uint16_t *)x)[i] = to_bf16(v);
}
inline long padded(long k) { return (k + 7) / 8 * 8; }
// Rows (columns if by_column) of x as floats, each padded with zeros.
inline std::vector<float> unpack(const char *x, const Layout &l, bool by_column, long count,
                                 long k) {
    long room = padded(k);
    std::vector<float> rows((size_t)(count * room));
    long step_row = by_column ? l.pitch : 1, step_k = by_column ? 1 : l.pitch;
    for (long i = 0; i < count; i++)
        for (long j = 0; j < k; j++) rows[i * room + j] = get(x, l.type, i * step_row + j * step_k);
    return rows;
}
inline float dot(const float *a, const float *b, long n) {
    typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
    Eight sum = {};
    for (long i = 0; i < n; i += 8) sum += *(const Eight *)(a + i) * *(const Eight *)(b + i);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
inline void matmul(const Matmul &p, float alpha, const char *A, const char *B, float beta,
                   const char *C, char *D) {
    long room = padded(p.k());
    std::vector<float> a = unpack(A, p.A, p.desc.transA, p.m(), p.k());
    std::vector<float> b = unpack(B, p.B, !p.desc.transB, p.n(), p.k());
    for (long j = 0; j < p.n(); j++)
        for (long i = 0; i < p.m(); i++) {
            float d = alpha * dot(&a[i * room], &b[j * room], room);
            if (beta && p.D.type == CUDA_R_16BF) d = from_bf16(to_bf16(d));   // as seen on an H200
            if (beta) d += beta * get(C, p.C.type, i + j * p.C.pitch);
            put(D, p.D.type, i + j * p.D.pitch, d);
        }
}
constexpr size_t WORKSPACE = 64 * KiB;  // what the algorithm takes when it is allowed to
}  // namespace emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
        cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t A,
        cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D,
        cublasLtMatmulPreference_t preference, int wanted,
        cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = 0;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    if (const char *why = emu::refusal({*d, *A, *B, *C, *D})) return emu::refuse(why);
    size_t need = preference->workspace >= emu::WORKSPACE ? emu::WORKSPACE : 0;
    results[0] = {{{need}}, need};
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(
        const cublasLtMatmulAlgo_t *, cublasLtMatmulAlgoConfigAttributes_t, void *value,
        size_t room, size_t *size) {
    memset(value, 0, *size = room);                 // the one algorithm has no tiles
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmul(
        cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *alpha, const void *A,
        cublasLtMatrixLayout_t lA, const void *B, cublasLtMatrixLayout_t lB, const void *beta,
        const void *C, cublasLtMatrixLayout_t lC, void *D, cublasLtMatrixLayout_t lD,
        const cublasLtMatmulAlgo_t *algo, void *workspace, size_t room, cudaStream_t stream) {
    emu::Matmul p = {*desc, *lA, *lB, *lC, *lD};
    if (const char *why = emu::refusal(p)) return emu::refuse(why);
    float a = *(const float *)alpha, b = *(const float *)beta;
    if (!b && !C) C = D;
    for (auto [x, l] : {std::pair(A, p.A), std::pair(B, p.B), std::pair(C, p.C),
                        std::pair((const void *)D, p.D)}) {
        if ((uintptr_t)x % 16) return emu::refuse("a pointer not aligned to 16 bytes");
        if (!emu::on_device(x, emu::bytes(l)))
            return emu::refuse("a matrix not wholly in device memory", CUBLAS_STATUS_INVALID_VALUE);
    }
    size_t need = algo ? algo->data[0] : 0;
    if (need > room || (need && !emu::on_device(workspace, need)))
        return emu::refuse("less workspace than the algorithm needs", CUBLAS_STATUS_INVALID_VALUE);
    emu::enqueue(stream, [=] {
        emu::DeviceOpen open;
        if (need) memset(workspace, 0xff, need);        // whoever keeps something there will see
        emu::matmul(p, a, (const char *)A, (const char *)B, b, (const char *)C, (char *)D);
    });
    return CUBLAS_STATUS_SUCCESS;
}
