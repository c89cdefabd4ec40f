// CUDA on a CPU, part 5: cublasLtMatmul by plain loops, as far as it is used. It takes only what
// a GPU's fast kernels take for certain, and says what it does not like: bf16 x bf16 -> bf16 or
// float, or all float; accumulated and scaled in float; pointers and pitches of 16 bytes.
#pragma once
#include "runtime.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
typedef enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69 };
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
typedef struct cublasLtContext {} *cublasLtHandle_t;
typedef struct { cublasComputeType_t compute; cudaDataType scale; int trans[2]; } EmuDesc;
typedef struct { cudaDataType type; long rows, cols, pitch; } EmuLayout;
typedef struct { size_t workspace; } EmuPreference;
typedef EmuDesc *cublasLtMatmulDesc_t;
typedef EmuLayout *cublasLtMatrixLayout_t;
typedef EmuPreference *cublasLtMatmulPreference_t;
typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;      // data[0]: bytes of workspace
typedef struct { cublasLtMatmulAlgo_t algo; size_t workspaceSize; } cublasLtMatmulHeuristicResult_t;

// ---- handles and descriptors --------------------------------------------------------------------
inline cublasStatus_t emu_set(void *field, size_t room, const void *value, size_t size) {
    if (size != room) return CUBLAS_STATUS_INVALID_VALUE;
    return memcpy(field, value, size), CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    return *h = new cublasLtContext, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute,
                                               cudaDataType scale) {
    return *d = new EmuDesc{compute, scale, {}}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(
        cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *value, size_t size) {
    return emu_set(&d->trans[a - CUBLASLT_MATMUL_DESC_TRANSA], sizeof *d->trans, value, size);
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t pitch) {
    return *l = new EmuLayout{type, (long)rows, (long)cols, (long)pitch}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return *p = new EmuPreference{0}, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
        cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a, const void *value,
        size_t size) {
    uint32_t scheme;                                // sums here are of one part
    if (a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
        return emu_set(&p->workspace, sizeof p->workspace, value, size);
    return emu_set(&scheme, sizeof scheme, value, size);
}

// ---- D = alpha op(A) op(B) + beta C -------------------------------------------------------------
namespace emu {
constexpr size_t WORKSPACE = 64 * KiB;  // what the algorithm takes when it is allowed to

inline size_t width(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }
struct Matmul {                         // (m, k) x (k, n); C is laid out as D is
    EmuDesc desc;
    EmuLayout A, B, D;
    bool trans_a() const { return desc.trans[0]; }
    bool trans_b() const { return desc.trans[1]; }
    long k() const { return trans_a() ? A.rows : A.cols; }

    const char *refusal() const {       // the first reason why not, or nullptr
        bool pedantic = desc.compute == CUBLAS_COMPUTE_32F_PEDANTIC;
        bool bf16 = A.type == CUDA_R_16BF && !pedantic;
        bool fp32 = A.type == CUDA_R_32F && D.type == CUDA_R_32F;
        if (B.type != A.type || desc.scale != CUDA_R_32F || (!bf16 && !fp32))
            return "types other than bf16 x bf16 -> bf16 or float (COMPUTE_32F), or all float";
        if ((trans_a() ? A.cols : A.rows) != D.rows || (trans_b() ? B.rows : B.cols) != D.cols
            || (trans_b() ? B.cols : B.rows) != k())
            return "shapes that do not fit";
        for (const EmuLayout *l : {&A, &B, &D}) {
            if (l->rows < 1 || l->cols < 1) return "an empty matrix";
            if (l->pitch < l->rows) return "a pitch shorter than a column";
            if (l->pitch * width(l->type) % 16) return "a pitch that is not a multiple of 16 bytes";
        }
        return nullptr;
    }
};
inline cublasStatus_t refuse(const char *why, cublasStatus_t s = CUBLAS_STATUS_NOT_SUPPORTED) {
    fprintf(stderr, "emulate: cublasLtMatmul: %s\n", why);
    return s;
}

inline float get(const void *x, cudaDataType t, long i) {
    return t == CUDA_R_32F ? ((const float *)x)[i] : from_bf16(((const uint16_t *)x)[i]);
}
inline long padded(long k) { return (k + 7) / 8 * 8; }
// The columns of x (rows, if by_row) as floats, each padded with zeros
inline std::vector<float> unpack(const void *x, const EmuLayout &l, bool by_row) {
    long count = by_row ? l.rows : l.cols, k = by_row ? l.cols : l.rows;
    std::vector<float> out((size_t)(count * padded(k)));
    for (long i = 0; i < count; i++)
        for (long j = 0; j < k; j++)
            out[i * padded(k) + j] = get(x, l.type, by_row ? i + j * l.pitch : i * l.pitch + j);
    return out;
}
inline float dot(const float *a, const float *b, long n) {
    typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
    Eight sum = {};
    for (long i = 0; i < n; i += 8) sum += *(const Eight *)(a + i) * *(const Eight *)(b + i);
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
inline void matmul(const Matmul &p, float alpha, const void *A, const void *B, float beta,
                   const void *C, void *D) {
    long room = padded(p.k());
    std::vector<float> a = unpack(A, p.A, !p.trans_a()), b = unpack(B, p.B, p.trans_b());
    for (long j = 0; j < p.D.cols; j++)
        for (long i = 0; i < p.D.rows; i++) {
            long at = i + j * p.D.pitch;
            float d = alpha * dot(&a[i * room], &b[j * room], room);
            if (beta && p.D.type == CUDA_R_16BF) d = from_bf16(to_bf16(d));   // as seen on an H200
            if (beta) d += beta * get(C, p.D.type, at);
            if (p.D.type == CUDA_R_32F) ((float *)D)[at] = d;
            else ((uint16_t *)D)[at] = to_bf16(d);
        }
}
}  // namespace emu

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
        cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t A,
        cublasLtMatrixLayout_t B, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t D,
        cublasLtMatmulPreference_t preference, int,
        cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = 0;
    if (const char *why = emu::Matmul{*d, *A, *B, *D}.refusal()) return emu::refuse(why);
    size_t need = preference->workspace >= emu::WORKSPACE ? emu::WORKSPACE : 0;
    results[0] = {{{need}}, need};
    return *found = 1, CUBLAS_STATUS_SUCCESS;
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
    emu::Matmul p = {*desc, *lA, *lB, *lD};
    float a = *(const float *)alpha, b = *(const float *)beta;
    if (const char *why = p.refusal()) return emu::refuse(why);
    if (lC != lD) return emu::refuse("C and D with layouts of their own");
    auto lies_badly = [](const void *x, const EmuLayout &l) {
        size_t bytes = ((l.cols - 1) * l.pitch + l.rows) * emu::width(l.type);
        return (uintptr_t)x % 16 || !emu::on_device(x, bytes);
    };
    if (lies_badly(A, p.A) || lies_badly(B, p.B) || (b && lies_badly(C, p.D)) || lies_badly(D, p.D))
        return emu::refuse("a pointer not aligned to 16 bytes, or not wholly device memory",
                           CUBLAS_STATUS_INVALID_VALUE);
    size_t need = algo->data[0];
    if (need > room || (need && !emu::on_device(workspace, need)))
        return emu::refuse("less workspace than the algorithm needs", CUBLAS_STATUS_INVALID_VALUE);
    emu::enqueue(stream, [=] {
        emu::DeviceOpen open;
        if (need) memset(workspace, 0xff, need);        // whoever keeps something there will see
        emu::matmul(p, a, A, B, b, C, D);
    });
    return CUBLAS_STATUS_SUCCESS;
}
