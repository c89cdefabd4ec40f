#!/bin/sh
# sanitize.sh: the tests and a short life of the program under AddressSanitizer and
# UndefinedBehaviorSanitizer. Ends with "N passed, N failed".
passed=0 failed=0 out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=gnu11 -O1 -g -march=native -ffp-contract=fast -fno-math-errno -fopenmp \
-fsanitize=address,undefined -fno-sanitize-recover=all"
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive

try() {
    name=$1; shift
    if said=$("$@" 2>&1); then passed=$((passed + 1)); echo "ok   $name"
    else failed=$((failed + 1)); echo "FAIL $name: $*"; echo "$said" | tail -n 25; fi
}
# shellcheck disable=SC2086
try "compiles" gcc $flags train_mamba2.c -o "$out/program" -lz -lm
for real in float double; do
    # shellcheck disable=SC2086
    try "tests compile, $real" gcc $flags -DREAL=$real test_mamba2.c -o "$out/test" -lz -lm
    try "tests, $real" "$out/test"
done
# narrower vectors have tiles of other sizes
for march in x86-64 x86-64-v3; do
    [ "$(uname -m)" = x86_64 ] || continue
    # shellcheck disable=SC2086
    try "tests compile, $march" gcc $flags -march=$march test_mamba2.c -o "$out/test" -lz -lm
    if [ $march = x86-64 ] || grep -q avx2 /proc/cpuinfo; then
        for part in matmul ssd; do try "tests of $part, $march" "$out/test" $part; done
    fi
done
tiny="--d-model 16 --headdim 4 --d-state 6 --n-layer 2 --batch 2 --seq-len 33 --save-every 2 \
--eval-every 2 --eval-batches 2 --sample-every 4 --warmup 1"
for more in "" "--packed --eot 10" "--carry --accum 2" "--recompute --d-intermediate 12 --tie 0" \
            "--ngroups 2 --d-conv 3 --dt-limit 0.01,0.2"; do
    rm -rf "$out/run"
    # shellcheck disable=SC2086
    try "train $more" "$out/program" $tiny $more --out "$out/run" --steps 4
    # shellcheck disable=SC2086
    try "resume $more" "$out/program" --out "$out/run" --steps 6 --resume
    try "generate $more" "$out/program" --out "$out/run" --generate 20 --prompt "to be" --top-k 5
    try "dump $more" "$out/program" --init "$out/run/last" --batch 2 --seq-len 33 --dump "$out/dump"
    try "compare $more" "$out/program" --init "$out/run/last" --batch 2 --seq-len 33 \
        --compare "$out/dump"
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
