#!/bin/sh
# compilers.sh: every way in which the program must compile without a warning, and give the same
# results. Ends with "N passed, N failed".
passed=0 failed=0 out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
float="-ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror -Wno-pass-failed"

try() {                                 # try NAME COMMAND...: succeeds, and prints nothing
    name=$1; shift
    if said=$("$@" 2>&1) && [ -z "$said" ]; then passed=$((passed + 1)); echo "ok   $name"
    else failed=$((failed + 1)); echo "FAIL $name: $*"; echo "$said" | head -n 20; fi
}
train() {                               # train PROGRAM: a few steps of a tiny model
    OMP_NUM_THREADS=2 "$1" --out "$out/run" --d-model 32 --headdim 8 --d-state 8 --n-layer 2 --batch 2 \
        --seq-len 50 --steps 5 --eval-every 0 --save-every 0 --sample-every 0 --plot 0 --warmup 1 \
        --lr 1e-3 >/dev/null && awk -F'[:,]' '/"step":5/ { printf "%.4f\n", $4 }' "$out/run/log.jsonl"
}
same() {                                # same NAME PROGRAM: the loss of the first program
    loss=$(train "$2")
    [ -n "$first" ] || first=$loss
    try "$1: loss $loss" test "$loss" = "$first"
}
first=

for cc in gcc clang; do
    omp=-fopenmp
    echo 'int main(void) { return 0; }' >"$out/t.c"
    $cc -fopenmp "$out/t.c" -o "$out/t" 2>/dev/null || { omp=-fopenmp-simd; echo "note: $cc has no OpenMP here"; }
    for march in native x86-64 x86-64-v3; do
        [ "$(uname -m)" = x86_64 ] || [ $march = native ] || continue
        # shellcheck disable=SC2086
        try "$cc -march=$march" $cc -std=gnu11 -O2 -march=$march $float $omp train_mamba2.c \
            -o "$out/p" -lz -lm
        # shellcheck disable=SC2016
        if [ $march != x86-64-v3 ] || grep -q avx2 /proc/cpuinfo; then same "$cc -march=$march" "$out/p"; fi
    done
    # shellcheck disable=SC2086
    try "$cc without OpenMP" $cc -std=gnu11 -O1 -march=native $float -fopenmp-simd \
        train_mamba2.c -o "$out/p" -lz -lm
    same "$cc without OpenMP" "$out/p"
    # shellcheck disable=SC2086
    try "$cc float64" $cc -std=gnu11 -O1 -march=native $float $omp -DREAL=double train_mamba2.c \
        -o "$out/p" -lz -lm
    same "$cc float64" "$out/p"
done
# shellcheck disable=SC2086
try "gcc, emulated bf16" gcc -std=gnu11 -O2 -march=native $float -fopenmp -DBF16_EMULATE \
    train_mamba2.c -o "$out/p" -lz -lm
# shellcheck disable=SC2086
try "gcc, bf16 instructions" gcc -std=gnu11 -O2 -march=sapphirerapids $float -fopenmp -c \
    train_mamba2.c -o "$out/p.o"
for cxx in g++ clang++; do
    # shellcheck disable=SC2086
    try "$cxx -std=c++20, twice in namespaces" $cxx -std=c++20 -O1 -march=native $float -fopenmp-simd -I. \
        dev/test/twice.cc -o "$out/p" -lz
    same "$cxx -std=c++20" "$out/p"
done
# the program for the GPU, where there is a CUDA toolkit
if make -n -B all | grep -q -- -lcublasLt; then
    try "nvcc for sm_90" make -s -B ARCH=90 train_mamba2cu
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
