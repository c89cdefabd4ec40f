#!/bin/sh
# emulate.sh: the CUDA program on the CPU: every op against the C one, whole models, and a run that
# moves between the two programs. Ends with "N passed, N failed".
passed=0 failed=0 out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
export OMP_WAIT_POLICY=passive
try() {
    name=$1; shift
    if said=$("$@" 2>&1); then passed=$((passed + 1)); echo "ok   $name"
    else failed=$((failed + 1)); echo "FAIL $name: $*"; echo "$said" | tail -n 25; fi
}
try "the two programs mirror each other" dev/test/mirror.sh
for order in reverse 1; do
    EMU_ORDER=$order try "ops, order $order" build/emu/test_mamba2
done
EMU_MULTIPROCESSORS=16 try "tokens by 16 blocks" build/emu/test_mamba2 "tokens one"
tiny="--d-model 32 --n-layer 2 --headdim 8 --d-state 12 --batch 2 --seq-len 45"
quiet="--eval-every 0 --sample-every 0 --plot 0 --log-every 100"
for more in "" "--packed --eot 10" "--ngroups 2 --d-conv 3 --tie 0" "--d-intermediate 24 --recompute"; do
    for dtype in f32 bf16; do
        # shellcheck disable=SC2086
        try "compare $dtype $more" ./train_mamba2emu $tiny $more --dtype $dtype --compare
    done
done
# shellcheck disable=SC2086
try "compare bf16 residual" ./train_mamba2emu $tiny --residual-in-fp32 0 --compare
# shellcheck disable=SC2086
try "ten steps" ./train_mamba2emu $tiny $quiet --dtype f32 --steps 10 --warmup 2 --out "$out/emu"
# shellcheck disable=SC2086
try "ten steps on the CPU" ./train_mamba2 $tiny $quiet --steps 10 --warmup 2 --out "$out/cpu"
losses() { sed -n 's/.*"loss":\([0-9.]*\),.*/\1/p' "$1/log.jsonl"; }
losses "$out/emu" >"$out/a"; losses "$out/cpu" >"$out/b"
# shellcheck disable=SC2016
try "their losses agree to 1e-5" awk 'NR == FNR { a[FNR] = $1; n = FNR; next }
    { d = ($1 - a[FNR])/$1; if (!(d < 1e-5 && d > -1e-5)) bad = 1 } END { exit bad || n != 10 || FNR != 10 }' \
    "$out/a" "$out/b"
try "on to the CPU" ./train_mamba2 --out "$out/emu" --resume --dtype f32 --steps 12
try "and back" ./train_mamba2emu --out "$out/emu" --resume --dtype f32 --steps 14
try "generates" ./train_mamba2emu --out "$out/emu" --generate 12 --prompt "to be"
same() {                                 # same FLAGS: do both programs write the same text?
    ./train_mamba2 --out "$out/emu" --generate 30 --prompt "to be or" "$@" >"$out/a"
    ./train_mamba2emu --out "$out/emu" --dtype f32 --generate 30 --prompt "to be or" "$@" >"$out/b"
    [ -s "$out/a" ] && cmp "$out/a" "$out/b"
}
try "greedy text is the CPU's" same --temperature 0
try "sampled text is the CPU's" same --temperature 0.9
try "and so with --top-k" same --temperature 0.9 --top-k 5
try "and with --top-p" same --temperature 1.2 --top-p 0.8
try "several samples at once" same --num-samples 5
try "several, greedy" same --num-samples 3 --temperature 0
try "several, cut" same --num-samples 3 --top-k 40 --top-p 0.9
shapes() {                               # rows of a batch, of models of odd sizes
    for shape in "--ngroups 2 --headdim 10 --d-conv 3 --tie 0" \
        "--d-model 24 --headdim 96 --expand 4 --d-state 200 --d-conv 6" \
        "--headdim 8 --d-intermediate 24 --d-conv 1" "--headdim 64 --d-model 64 --d-state 128"; do
        rm -rf "$out/shape"
        # shellcheck disable=SC2086
        ./train_mamba2 --d-model 20 --d-state 7 --n-layer 2 --batch 2 --seq-len 45 $quiet $shape --steps 3 \
            --warmup 1 --out "$out/shape" >"$out/said" || return 1
        for dtype in f32 bf16; do
            ./train_mamba2emu --out "$out/shape" --dtype $dtype --generate 20 --prompt "to be or" \
                --num-samples 3 >"$out/$dtype" || return 1
        done
        ./train_mamba2 --out "$out/shape" --generate 20 --prompt "to be or" --num-samples 3 >"$out/a"
        [ -s "$out/bf16" ] && cmp "$out/a" "$out/f32" || return 1
    done
}
try "several, of odd shapes" shapes
tasks() {                                # 24 examples of multiple choice, of random bytes
    perl -e 'srand 1; sub bytes { map { int rand 256 } 1 .. $_[0] }
        print pack "l256", 20240522, 1, 24;
        for my $i (1 .. 24) {
            my @words = map { my $n = 2 + int rand 5; $n, bytes($n) } 0 .. 4;   # context, choices
            print pack "S*", 65535, 0, $i, $i % 4, 4, @words }' >"$out/tasks"
    ./train_mamba2 --out "$out/emu" --eval "$out/tasks" >"$out/a"
    ./train_mamba2emu --out "$out/emu" --dtype f32 --eval "$out/tasks" >"$out/b"
    grep "24 examples, acc 0[.][1-9]" "$out/a" && cmp "$out/a" "$out/b"
}
try "tasks score as on the CPU" tasks
graphs() {                               # graphs FLAGS: does a CUDA graph change a bit?
    for graph in 0 1; do
        rm -rf "$out/$graph"
        # shellcheck disable=SC2086
        ./train_mamba2emu $tiny $quiet --steps 5 --accum 2 --warmup 1 --graph $graph \
            --out "$out/$graph" "$@" || return 1
    done
    cmp "$out/0/last/model.safetensors" "$out/1/last/model.safetensors"
}
try "a CUDA graph gives the same bits" graphs
try "with carried states too" graphs --carry --packed --eot 10
# checkpoints are written while training goes on
# shellcheck disable=SC2086
try "saves at every step" ./train_mamba2emu $tiny $quiet --steps 5 --accum 2 --warmup 1 --save-every 1 \
    --packed --eot 10 --carry --out "$out/often"
try "the last one is whole" cmp "$out/often/last/model.safetensors" "$out/1/last/model.safetensors"
full() {                                 # the disk is full for the second checkpoint
    # shellcheck disable=SC2086
    (trap '' XFSZ; ulimit -f 200; ./train_mamba2emu $tiny $quiet --d-model 96 --steps 20 --save-every 2 \
        --out "$out/full") >"$out/said" 2>&1
    [ $? = 1 ] && grep "error: .*could not write" "$out/said" && [ ! -e "$out/full/last" ]
}
try "an error of the writer ends the run" full
echo "$passed passed, $failed failed"
[ $failed = 0 ]
