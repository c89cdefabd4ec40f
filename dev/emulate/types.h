// CUDA on a CPU, part 2: bf16 as in cuda_bf16.h. It stores, converts (to nearest, ties to even) and
// computes by way of float, rounding each result.
#pragma once
#include "emulate.h"

namespace emu {
inline uint16_t to_bf16(float f) {
    uint32_t u = bits<uint32_t>(f);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;       // NaN, as NVIDIA's conversion gives it
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t h) { return bits<float>((uint32_t)h << 16); }
}  // namespace emu

struct __nv_bfloat16_raw { unsigned short x; };
struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(__nv_bfloat16_raw r) : __x(r.x) {}
    template<class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    __nv_bfloat16(T v) : __x(emu::to_bf16((float)v)) {}
    operator float() const { return emu::from_bf16(__x); }
    operator __nv_bfloat16_raw() const { return {__x}; }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

#define EMU_BF16_OP(op)                                                                      \
    inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) {                     \
        return (float)a op (float)b;                                                         \
    }                                                                                        \
    inline __nv_bfloat16 &operator op##=(__nv_bfloat16 &a, __nv_bfloat16 b) {                \
        return a = a op b;                                                                   \
    }                                                                                        \
    inline __nv_bfloat162 operator op(__nv_bfloat162 a, __nv_bfloat162 b) {                  \
        return {a.x op b.x, a.y op b.y};                                                     \
    }
EMU_BF16_OP(+)
EMU_BF16_OP(-)
EMU_BF16_OP(*)
EMU_BF16_OP(/)
inline __nv_bfloat16 operator-(__nv_bfloat16 a) { return -(float)a; }
inline bool operator<(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a < (float)b; }
inline bool operator>(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a > (float)b; }
inline bool operator==(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a == (float)b; }

inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16_raw{u}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.__x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {f, f}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return a * b; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return a + b; }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}
