// ptx.cuh: the instructions that CUDA C++ has no name for, one function each. On a CPU their
// places are taken by the functions of the same names in dev/emulate/mma.h; selftest.cu there holds
// both against plain code.
#ifdef __CUDACC__
__device__ inline unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
// d (16,8) += a (16,16) b (16,8), by a warp; which lane holds what: see the PTX manual, or mma.h
__device__ inline void mma(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8x8 matrices from shared memory: lane l names row l % 8 of matrix l / 8
__device__ inline void ldmatrix(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_trans(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)) : "memory");
}
// and back, of plain ones
__device__ inline void stmatrix(void *row, const uint32_t r[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    __trap();                                      // a GPU without it has no room for what asks it
#endif
}

// Copies to shared memory that go on while the thread does: zeros when not valid
template<int BYTES>                                // 4 or 16
__device__ inline void cp_async(void *to, const void *from, bool valid) {
    if (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                     :: "r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
    }
}
__device__ inline void prefetch_line(const void *p) {      // 128 bytes, into the L2 cache
    asm volatile("prefetch.global.L2 [%0];" :: "l"(p));
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template<int LEFT> __device__ inline void cp_async_wait() {    // until so many groups are left
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

// __syncthreads() for warps that meet it at different lines, which CUDA C++ does not allow and PTX,
// with a count, does. bar.sync would be the same instruction, but compute-sanitizer wants all of a
// block to meet that at one line.
__device__ inline void barrier_wait(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// Numbers from block to block while both run, without a barrier. The last bit of each says whether
// its round is odd, so the number is its own announcement: a reader waits until it is of the round
// that it wants. Each is sent once in every round, from round 1 on, in memory that was 0; before
// the next round all must have read it.
__device__ inline void send(float *to, float x, unsigned round) {
    uint32_t bits = (__float_as_uint(x) & ~1u) | (round & 1);
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(bits) : "memory");
}
__device__ inline float receive(const float *from, unsigned round) {
    uint32_t bits;
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    } while ((bits ^ round) & 1);
    return __uint_as_float(bits);
}
__device__ inline float4 receive4(const float *from, unsigned round) {
    uint32_t a, b, c, d;
    do {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(from) : "memory");
    } while (((a ^ round) | (b ^ round) | (c ^ round) | (d ^ round)) & 1);
    return {__uint_as_float(a), __uint_as_float(b), __uint_as_float(c), __uint_as_float(d)};
}

// Kernels launched early (sm_90): from here on the next one may start; it waits for the end of this
// one where it says so. Until then it may read only what no kernel before it writes: weights.
__device__ inline void next_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));     // + -0
    return y;
}
// What is computed from an opaque value, a float or a 32-bit integer, is computed again at each
// use, not kept in registers; and it is computed here itself, not further down.
template<typename X> __device__ inline X opaque(X x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ inline float opaque(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
#else
#include "mma.h"
#endif
