// CUDA on a CPU, part 4: the instructions that need PTX, by the fragment layouts of the PTX manual.
// dev/cuda/ptx.cuh has the same functions for a GPU, and includes this file for a CPU.
#pragma once
#include "types.h"

namespace emu {
EMU_ENGINE void need_whole_warp(unsigned lanes) {
    if (lanes != EMU_ALL) EMU_FAULT("needs all 32 lanes; it has %08x", lanes);
}

// ---- mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d = a b + d ---------------------------
// Lane l, with g = l/4 and t = l%4, holds two elements, low and high half, in each a[r] and b[r]:
//   a[r] = A[g + 8(r%2)][2t + 8(r/2) + {0,1}]      b[r] = B[2t + 8r + {0,1}][g]
//   d[r] = D[g + 8(r/2)][2t + r%2]
typedef float Row8 __attribute__((vector_size(32)));
struct Mma { float *d; const uint32_t *a, *b; };
EMU_ENGINE void mma_all(void **slots, unsigned lanes) {
    need_whole_warp(lanes);
    float A[16][16];
    Row8 B[16], D[16];
    auto low = [](uint32_t pair) { return std::bit_cast<float>(pair << 16); };
    auto high = [](uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000); };
    for (unsigned g = 0; g < 8; g++)
        for (unsigned t = 0; t < 4; t++) {
            auto *s = (Mma *)slots[4 * g + t];
            for (unsigned r = 0; r < 4; r++) {
                float *two = &A[g + r % 2 * 8][2 * t + r / 2 * 8];
                two[0] = low(s->a[r]), two[1] = high(s->a[r]);
            }
            for (unsigned r = 0; r < 2; r++) {
                Row8 *two = &B[2 * t + 8 * r];
                two[0][g] = low(s->b[r]), two[1][g] = high(s->b[r]);
            }
        }
    for (int i = 0; i < 16; i++) {
        Row8 sum = {};
        for (int k = 0; k < 16; k++) sum += A[i][k] * B[k];
        D[i] = sum;
    }
    for (unsigned g = 0; g < 8; g++)
        for (unsigned t = 0; t < 4; t++) {
            float *d = ((Mma *)slots[4 * g + t])->d;
            for (unsigned r = 0; r < 4; r++) d[r] += D[g + r / 2 * 8][2 * t + r % 2];
        }
}
}  // namespace emu
EMU_ENGINE void mma(float *d, const uint32_t *a, const uint32_t *b, EMU_HERE) {
    emu::Mma s{d, a, b};
    emu::warp_call("mma.sync", at, EMU_ALL, &s, emu::mma_all);
}

// ---- ldmatrix.sync.aligned.m8n8.x4{.trans}.shared.b16 -------------------------------------------
// Lane l names row l%8 of 8x8 matrix l/8. In r[i] lane l gets elements 2(l%4) + {0,1} of row l/4 of
// matrix i; of column l/4 with .trans.
namespace emu {
struct LoadMatrix { uint32_t *r; bool trans; const void *at; uint16_t row[8]; };

// The rows of a matrix are read at once unless two of them lie in the same 16 bytes of the 128 that
// the banks span: then it takes as many turns as the fullest of these places has rows.
EMU_ENGINE void count_conflicts(LoadMatrix **slots) {
    for (LoadMatrix **m = slots; m < slots + 32; m += 8) {
        unsigned turns = 1, rows[8] = {};
        for (int i = 0; i < 8; i++) {
            bool again = false;
            for (int j = 0; j < i; j++) again |= m[j]->at == m[i]->at;
            if (!again) turns = std::max(turns, ++rows[(uintptr_t)m[i]->at / 16 % 8]);
        }
        grid.kernel->wavefronts++;
        grid.kernel->conflicts += turns - 1;
    }
}
EMU_ENGINE void ldmatrix_all(void **slots, unsigned lanes) {
    need_whole_warp(lanes);
    auto **s = (LoadMatrix **)slots;
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            int g = l / 4, t = 2 * (l % 4);
            LoadMatrix **m = s + 8 * i;
            uint32_t low = s[0]->trans ? m[t]->row[g] : m[g]->row[t];
            uint32_t high = s[0]->trans ? m[t + 1]->row[g] : m[g]->row[t + 1];
            s[l]->r[i] = low | high << 16;
        }
    count_conflicts(s);
}
inline void ldmatrix(uint32_t *r, bool trans, const void *row, Place at) {
    enter("ldmatrix", at);
    if ((uintptr_t)row % 16) EMU_FAULT("the row is not aligned to 16 bytes");
    LoadMatrix s{r, trans, row, {}};
    memcpy(s.row, row, sizeof s.row);           // by the lane that names the row: races show
    warp_call("ldmatrix", at, EMU_ALL, &s, ldmatrix_all);
}
}  // namespace emu
inline void ldmatrix(uint32_t *r, const void *row, EMU_HERE) {
    emu::ldmatrix(r, false, row, at);
}
inline void ldmatrix_trans(uint32_t *r, const void *row, EMU_HERE) {
    emu::ldmatrix(r, true, row, at);
}

// ---- stmatrix.sync.aligned.m8n8.x4.shared.b16: the way back of ldmatrix -------------------------
namespace emu {
struct StoreMatrix { const uint32_t *r; uint16_t row[8]; };
EMU_ENGINE void stmatrix_all(void **slots, unsigned lanes) {
    need_whole_warp(lanes);
    auto **s = (StoreMatrix **)slots;
    for (int l = 0; l < 32; l++)
        for (int k = 0; k < 8; k++)
            s[l]->row[k] = (uint16_t)(s[l % 8 * 4 + k / 2]->r[l / 8] >> k % 2 * 16);
}
}  // namespace emu
inline void stmatrix(void *row, const uint32_t *r, EMU_HERE) {
    emu::enter("stmatrix", at);
    if ((uintptr_t)row % 16) EMU_FAULT("the row is not aligned to 16 bytes");
    emu::StoreMatrix s{r, {}};
    emu::warp_call("stmatrix", at, EMU_ALL, &s, emu::stmatrix_all);
    memcpy(row, s.row, sizeof s.row);           // by the lane that names the row: races show
}

// ---- cp.async -----------------------------------------------------------------------------------
// The copy is done as late as allowed, at the wait for its group. Until then its target holds NaNs,
// so that a kernel that reads too early shows it.
template<int BYTES> EMU_ENGINE void cp_async(void *to, const void *from, bool valid, EMU_HERE) {
    emu::Thread *me = emu::enter("cp.async", at);
    if (((uintptr_t)to | (uintptr_t)from) % BYTES)
        EMU_FAULT("an address is not aligned to %d bytes", BYTES);
    if (me->copies_n == emu::MAX_COPIES) EMU_FAULT("more than %d not waited for", emu::MAX_COPIES);
    me->copies[me->copies_n++] = {to, valid ? from : nullptr, BYTES, me->group};
    memset(to, 0xff, BYTES);
}
EMU_ENGINE void cp_async_commit() { emu::block->current->group++; }
template<int LEFT> EMU_ENGINE void cp_async_wait() {
    emu::Thread *me = emu::block->current;
    int left = 0;
    for (int i = 0; i < me->copies_n; i++) {
        emu::AsyncCopy c = me->copies[i];
        if (c.group >= me->group - LEFT) me->copies[left++] = c;
        else if (c.from) memcpy(c.to, c.from, c.bytes);
        else memset(c.to, 0, c.bytes);
    }
    me->copies_n = left;
}

// ---- other barriers, early launches, numbers ----------------------------------------------------
inline void barrier_wait(int id, int n, EMU_HERE) {
    emu::barrier("bar.sync", at, id, n);
}
inline void send(float *to, float x, unsigned round) {
    uint32_t bits = (__float_as_uint(x) & ~1u) | (round & 1);
    __atomic_store_n((uint32_t *)to, bits, __ATOMIC_RELAXED);
}
inline float receive(const float *from, unsigned round, EMU_HERE) {
    return __uint_as_float(emu::receive((const uint32_t *)from, round, at));
}
inline float4 receive4(const float *from, unsigned round, EMU_HERE) {
    if ((uintptr_t)from % 16) EMU_FAULT("receive4: not aligned to 16 bytes");
    float x[4];
    for (int i = 0; i < 4; i++) x[i] = receive(from + i, round, at);
    return {x[0], x[1], x[2], x[3]};
}
inline void prefetch_line(const void *) {}
inline void next_may_start() {}         // a launch begins when the one before it has ended
inline void wait_for_last() {}
inline float exp2_fast(float x) { return exp2f(x); }
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    auto product = [=](int half) {
        auto of = [=](uint32_t pair) { return emu::from_bf16((uint16_t)(pair >> half)); };
        return (uint32_t)emu::to_bf16(of(a) * of(b));
    };
    return product(0) | product(16) << 16;
}
template<typename X> inline X opaque(X x) { return x; }
