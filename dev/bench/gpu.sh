#!/bin/bash
# gpu.sh: builds, checks and times the CUDA program on a machine with a GPU, in a few minutes; a short
# table comes last.    dev/bench/gpu.sh [OUT]      OUT: a directory for the full logs
set -u
cd "$(dirname "$0")/../.." || exit 1
out=${1:-build/gpu}; mkdir -p "$out" build
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
nv="nvcc -std=c++20 -O3 -gencode arch=compute_$arch,code=sm_$arch"
table=""
row() { echo "$1"; table="$table$1
"; }
check() {                               # check NAME COMMAND...: runs it, remembers the verdict
    name=$1; shift
    start=$(date +%s)
    if timeout 170 "$@" >"$out/$name.log" 2>&1; then verdict=ok; else verdict="FAIL ($?)"; fi
    row "$(printf '%-26s %-10s %4d s  %s' "$name" "$verdict" $(($(date +%s) - start)) \
        "$(tail -n 1 "$out/$name.log" | cut -c1-90)")"
}
$nv dev/emulate/selftest.cu -lcublasLt -o build/selftest >"$out/build1.log" 2>&1 &
make -j3 train_mamba2 train_mamba2cu test_mamba2cu >"$out/build2.log" 2>&1
wait
tiny="--d-model 64 --n-layer 2 --headdim 16 --d-state 24 --batch 3 --seq-len 150"
check selftest build/selftest
check test_mamba2cu ./test_mamba2cu -v
check compare-tiny-f32 ./train_mamba2cu $tiny --dtype f32 --compare
check compare-tiny-bf16 ./train_mamba2cu $tiny --dtype bf16 --compare
check compare-130m-bf16 ./train_mamba2cu --model mamba2-130m --n-layer 2 --batch 2 --seq-len 512 --compare
for tool in memcheck racecheck initcheck synccheck; do
    check "$tool" compute-sanitizer --tool $tool --error-exitcode 9 ./train_mamba2cu $tiny --steps 2 \
        --out "$out/$tool" --eval-every 0 --sample-every 0 --save-every 0 --plot 0
done
same() { ./train_mamba2cu $tiny --steps 5 --out "$1" --eval-every 0 --sample-every 0 --plot 0; }
same "$out/a" >/dev/null 2>&1; same "$out/b" >/dev/null 2>&1
check two-runs-equal cmp "$out/a/last/model.safetensors" "$out/b/last/model.safetensors"
./train_mamba2cu $tiny --steps 5 --out "$out/c" --eval-every 0 --sample-every 0 --plot 0 --graph 0 >/dev/null 2>&1
check graph-changes-no-bit cmp "$out/a/last/model.safetensors" "$out/c/last/model.safetensors"
check resume-on-cpu ./train_mamba2 --out "$out/a" --resume --dtype f32 --steps 8 --sample-every 0
check resume-on-gpu ./train_mamba2cu --out "$out/a" --resume --steps 11 --sample-every 0
# speed MODEL ROWS TOKENS STEPS [FLAG...]: the median of the second half of the steps, several seconds
# in all, since a GPU is slower once it is at its limit of power; memory planned and seen
speed() {
    model=$1 rows=$2 tokens=$3 steps=$4; shift 4
    rm -rf "$out/s"
    (while sleep 0.3; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done) \
        >"$out/memory" & watcher=$!
    timeout 170 ./train_mamba2cu --model "$model" --batch "$rows" --seq-len "$tokens" --steps "$steps" \
        "$@" --out "$out/s" --eval-every 0 --sample-every 0 --save-every 0 --plot 0 >"$out/speed.log" 2>&1
    kill $watcher
    found=$(tail -n $((steps/2)) "$out/s/log.jsonl" | sed 's/.*"tokens_per_s":\([^,]*\),"mfu":\([^,]*\),.*/\1 \2/' |
        sort -g | sed -n $((steps/4 + 1))p)
    plan=$(sed -n 's/^memory *\([0-9.]*\) GiB.*/\1/p' "$out/speed.log")
    row "$(echo "$found" $(sort -g "$out/memory" | tail -n 1) "$plan" | awk -v name="$model" -v at="$rows x $tokens $*" '{
        printf "%-12s %-14s %9.0f tokens/s  MFU %4.1f%%  %6.1f GiB, planned %s", name, at, $1, 100*$2, $3/1024, $4 }')"
    rm -rf "$out/s"
}
decode() {                              # decode MODEL ROWS: the last of three times 300 tokens a row
    rate=$(./train_mamba2cu --model "$1" --batch 1 --seq-len 128 --steps 4 --profile 1 --sample-every 1 \
        --num-samples "$2" --out "$out/s" --eval-every 0 --save-every 0 --plot 0 2>&1 >/dev/null |
        grep 'tokens/s' | tail -n 1)
    row "$(printf '%-12s decode %4s rows %15s' "$1" "$2" "$rate")"
    rm -rf "$out/s"
}
speed mamba2-130m 16 2048 60; speed mamba2-130m 16 2048 60 --residual-in-fp32 0
speed mamba2-370m 16 2048 30; speed mamba2-780m 16 2048 16
speed mamba2-1.3b 16 2048 12; speed mamba2-2.7b 8 2048 10
for rows in 32 8 4 2 1; do speed mamba2-130m $rows $((32768/rows)) 40; done
speed mamba2-130m 1 131072 12
decode mamba2-130m 1; decode mamba2-130m 64; decode mamba2-2.7b 1; decode mamba2-2.7b 64
./train_mamba2cu --model mamba2-130m --batch 32 --seq-len 1024 --profile 6 --out "$out/p" --steps 20 \
    --eval-every 0 --sample-every 0 --save-every 0 --plot 0 >"$out/profile.log" 2>&1
tail -n 22 "$out/profile.log"
printf '\n%s' "$table"
rm -rf "$out"/a "$out"/b "$out"/c "$out"/*check
