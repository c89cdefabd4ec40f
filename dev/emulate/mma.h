// CUDA on a CPU, part 4: the instructions that need PTX, by the fragment layouts of the PTX manual.
// A kernel's wrapper has inline PTX under __CUDACC__ and one of these calls otherwise.
#pragma once
#include "types.h"

namespace emu {
EMU_ENGINE void need_whole_warp(const char *what, unsigned lanes) {
    if (lanes != EMU_ALL) EMU_FAULT("%s needs all 32 lanes; it has %08x", what, lanes);
}

// ---- mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d = a b + d ---------------------------
// Lane l, with g = l/4 and t = l%4, holds two elements, low and high half, in each a[r] and b[r]:
//   a[r] = A[g + 8(r%2)][2t + 8(r/2) + {0,1}]      b[r] = B[2t + 8r + {0,1}][g]
//   d[r] = D[g + 8(r/2)][2t + r%2]
typedef float Row8 __attribute__((vector_size(32)));
struct Mma { float *d; const uint32_t *a, *b; };
EMU_ENGINE void mma_all(void **slots, unsigned lanes) {
    need_whole_warp("mma.sync", lanes);
    float A[16][16];
    Row8 B[16];
    for (int l = 0; l < 32; l++) {
        auto *s = (Mma *)slots[l];
        int g = l / 4, t = l % 4;
        for (int h = 0; h < 2; h++) {
            for (int r = 0; r < 4; r++)
                A[g + r % 2 * 8][2 * t + r / 2 * 8 + h] = from_bf16((uint16_t)(s->a[r] >> 16 * h));
            for (int r = 0; r < 2; r++)
                B[2 * t + 8 * r + h][g] = from_bf16((uint16_t)(s->b[r] >> 16 * h));
        }
    }
    for (int i = 0; i < 16; i++) {
        Row8 sum = {};
        for (int k = 0; k < 16; k++) sum += A[i][k] * B[k];
        for (int j = 0; j < 8; j++)
            ((Mma *)slots[i % 8 * 4 + j / 2])->d[i / 8 * 2 + j % 2] += sum[j];
    }
}
EMU_ENGINE void mma_m16n8k16_bf16(float *d, const uint32_t *a, const uint32_t *b, EMU_HERE) {
    Mma s{d, a, b};
    warp_call("mma.sync.m16n8k16", EMU_ALL, &s, mma_all, file, line);
}

// ---- ldmatrix.sync.aligned.m8n8.xN{.trans}.shared.b16 -------------------------------------------
// Lane l names row l%8 of 8x8 matrix l/8, for l < 8N. In r[i] lane l gets elements 2(l%4) + {0,1}
// of row l/4 of matrix i; of column l/4 with .trans.
struct LoadMatrix { uint32_t *r; int n; bool trans; const void *at; uint16_t row[8]; };

// The rows of a matrix are read at once unless two of them lie in the same 16 bytes of the 128 that
// the banks span: then it takes as many turns as the fullest of these places has rows.
EMU_ENGINE void count_conflicts(void **slots, int n) {
    Kernel *k = block->kernel;
    for (int i = 0; i < n; i++) {
        int turns = 1;
        for (uintptr_t place = 0; place < 8; place++) {
            uintptr_t rows[8];
            int different = 0;
            for (int l = 8 * i; l < 8 * i + 8; l++) {
                uintptr_t at = (uintptr_t)((LoadMatrix *)slots[l])->at;
                bool known = at / 16 % 8 != place;
                for (int j = 0; j < different; j++) known |= rows[j] == at;
                if (!known) rows[different++] = at;
            }
            turns = std::max(turns, different);
        }
        __atomic_fetch_add(&k->wavefronts, 1ull, __ATOMIC_RELAXED);
        __atomic_fetch_add(&k->conflicts, turns - 1ull, __ATOMIC_RELAXED);
    }
}
EMU_ENGINE void ldmatrix_all(void **slots, unsigned lanes) {
    need_whole_warp("ldmatrix", lanes);
    auto *s = (LoadMatrix **)slots;
    int n = s[0]->n;
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < n; i++) {
            int g = l / 4, t = 2 * (l % 4);
            LoadMatrix **m = s + 8 * i;
            uint32_t low = s[0]->trans ? m[t]->row[g] : m[g]->row[t];
            uint32_t high = s[0]->trans ? m[t + 1]->row[g] : m[g]->row[t + 1];
            s[l]->r[i] = low | high << 16;
        }
    count_conflicts(slots, n);
}
inline void ldmatrix(int n, bool trans, uint32_t *r, const void *row, EMU_HERE) {
    LoadMatrix s{r, n, trans, row, {}};
    if (current("ldmatrix")->lane < 8 * n) {    // each lane reads the row that it names: races show
        if ((uintptr_t)row % 16)
            EMU_FAULT("ldmatrix at %s:%d: the row is not aligned to 16 bytes", file, line);
        for (int i = 0; i < 8; i++) s.row[i] = ((const uint16_t *)row)[i];
    }
    warp_call("ldmatrix", EMU_ALL, &s, ldmatrix_all, file, line);
}

// ---- cp.async -----------------------------------------------------------------------------------
// The copy is done as late as allowed, at the wait for its group. Until then its target holds NaNs,
// so that a kernel that reads too early shows it.
EMU_ENGINE void cp_async(void *to, const void *from, int bytes, bool zeros = false, EMU_HERE) {
    Thread *me = current("cp.async");
    if (((uintptr_t)to | (uintptr_t)from) % bytes)
        EMU_FAULT("cp.async at %s:%d: an address is not aligned to %d bytes", file, line, bytes);
    if (me->copies_n == me->copies_room) {
        me->copies_room = me->copies_room ? 2 * me->copies_room : 16;
        me->copies = (AsyncCopy *)realloc(me->copies, me->copies_room * sizeof(AsyncCopy));
    }
    me->copies[me->copies_n++] = {to, zeros ? nullptr : from, bytes, me->group};
    memset(to, 0xff, bytes);
}
EMU_ENGINE void cp_async_commit() { current("cp.async")->group++; }
EMU_ENGINE void finish_copies(Thread *me, int last_group) {
    int left = 0;
    for (int i = 0; i < me->copies_n; i++) {
        AsyncCopy c = me->copies[i];
        if (c.group > last_group) me->copies[left++] = c;
        else if (c.from) memcpy(c.to, c.from, c.bytes);
        else memset(c.to, 0, c.bytes);
    }
    me->copies_n = left;
}
EMU_ENGINE void cp_async_wait_group(int pending) {      // until at most so many groups are pending
    Thread *me = current("cp.async");
    finish_copies(me, me->group - pending - 1);
}
EMU_ENGINE void cp_async_wait_all() { finish_copies(current("cp.async"), INT_MAX); }
}  // namespace emu
