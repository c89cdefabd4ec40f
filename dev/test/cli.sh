#!/bin/bash
# cli.sh PROGRAM [DOUBLE]: the command line as users meet it. Every flag with bad values, damaged
# files of every kind, resuming, signals, kills and full disks, the log, generating, dumps.
# No network, no Python. Prints each failure, then `N passed, N failed`; the exit status tells.
#
#     dev/test/cli.sh ./train_mamba2 ./train_mamba2_double
#     ONLY=resume dev/test/cli.sh ./train_mamba2         one section: a function test_NAME below
set -u
export LC_ALL=C OMP_NUM_THREADS=1
[ $# -ge 1 ] || { echo "usage: cli.sh PROGRAM [DOUBLE]" >&2; exit 2; }
program=$(realpath "$1")
double=${2:+$(realpath "$2")}
here=$(cd "$(dirname "$0")/../.." && pwd)

memory=/dev/shm                                  # fsync costs nothing there
[ -w $memory ] || memory=${TMPDIR:-/tmp}
dir=$(mktemp -d "$memory/cli.XXXXXX")
cleanup() {
    jobs -p | xargs -r kill 2>/dev/null
    wait 2>/dev/null
    grep -q "$dir" /proc/mounts 2>/dev/null && umount "$dir"/*/full
    rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir" || exit 1

# ---- helpers -------------------------------------------------------------------------------------
passed=0 failed=0
good() { passed=$((passed + 1)); }
bad() {                                          # bad NAME [DETAIL...]
    failed=$((failed + 1))
    echo "FAILED: $1"
    shift
    [ $# = 0 ] || printf '    %s\n' "$@"
}
check() {                                        # check NAME COMMAND...: the command succeeds
    local name=$1
    shift
    if "$@"; then good; else bad "$name" "false: $*"; fi
}
check_not() { local name=$1; shift; if "$@"; then bad "$name" "true: $*"; else good; fi; }

# run FLAGS...: stdout and stderr to files, exit status to $status; a hang becomes status 124.
run() {
    timeout -k 1 60 "$program" "$@" </dev/null >stdout 2>stderr
    status=$?
}
# expect STATUS PATTERN FLAGS...: the status, and for 1 and 2 a single line of error with PATTERN.
expect() {
    local want=$1 pattern=$2
    shift 2
    run "$@"
    local errors
    errors=$(grep -vc '^\(warning\|notice\):' stderr)
    # shellcheck disable=SC2053  # STATUS is a pattern
    if [[ $status != $want ]]; then
        bad "$(quote "$@")" "status $status, expected $want; $(head -c 300 stderr | head -2)"
    elif [ "$want" != 0 ] && [ "$errors" != 1 ]; then
        bad "$(quote "$@")" "$errors lines of error, expected 1: $(head -3 stderr)"
    elif ! grep -qE -e "$pattern" stderr stdout; then
        bad "$(quote "$@")" "no /$pattern/ in: $(head -c 300 stderr | head -2)"
    else
        good
    fi
}
quote() { local line="$*"; line=${line/"$tiny"/TINY}; echo "${line/"$quiet"/QUIET}"; }

# A model that trains in milliseconds, on a text of 6000 bytes
tiny="--d-model 16 --n-layer 1 --headdim 4 --d-state 4 --batch 2 --seq-len 16"
quiet="--warmup 2 --eval-every 0 --sample-every 0 --plot 0 --log-every 1000"
small="--data a.txt $tiny $quiet"
train() { run $small "$@"; }                     # train FLAGS...
trains() { expect 0 '' $small "$@"; }            # and it must succeed
losses() {                                       # a log without its times
    sed 's/,"tokens_per_s":[^}]*"time":[0-9.]*//' "$1/log.jsonl" | grep -v '"config"'
}
same_model() { cmp -s "$1/last/model.safetensors" "$2/last/model.safetensors"; }
same_run() {                                     # two runs have the same bits
    same_model "$1" "$2" &&
        cmp -s "$1/last/optimizer.safetensors" "$2/last/optimizer.safetensors" &&
        [ "$(losses "$1")" = "$(losses "$2")" ]
}
snapshot() { (cd "$1" && find . -type f -exec cksum {} + -o -type l -exec readlink {} + | sort); }
untouched() { [ "$(snapshot "$1" | grep -v /lock)" = "$(grep -v /lock <<<"$2")" ]; }
header_size() { echo $(($(od -An -tu8 -N 8 "$1" | tr -d ' ') + 8)); }
tensor_at() {                                    # tensor_at FILE NAME: where its bytes begin
    local start
    start=$(header_size "$1")
    head -c "$start" "$1" | grep -aoE "\"$2\":[^}]*" | sed 's/.*\[\([0-9]*\),.*/\1/' |
        awk -v start="$start" '{ print start + $1 }'
}
poke() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }   # FILE OFFSET BYTES
flip() {                                         # flip FILE OFFSET: one bit of one byte
    local byte
    byte=$(od -An -tu1 -j "$2" -N 1 "$1" | tr -d ' ')
    poke "$1" "$2" "\\x$(printf %02x $((byte ^ 4)))"
}
size_of() { stat -c %s "$1"; }
le32() {                                         # a number as printf writes 4 bytes
    printf '\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255))
}
header() {                                       # header MAGIC VERSION COUNT: of a shard
    printf "$(le32 "$1")$(le32 "$2")$(le32 "$3")"
    head -c 1012 /dev/zero
}
# Bytes of a text as the tokens of a shard, 16 or 32 bits wide
shard() {                                        # shard TEXT WIDTH
    local zeros=Z
    if [ "$2" = 2 ]; then header 20240520 1 "$(size_of "$1")"
    else header 20240801 7 "$(size_of "$1")"; zeros=ZZZ; fi
    printf %b "$(od -An -v -tx1 -w1 "$1" | sed "s| |\\\\x|; s|\$|$zeros|" | tr -d "\n" |
        sed "s|Z|\\\\x00|g")"
}
wait_for() {                                     # wait_for COMMAND...: up to 20 seconds
    local i
    for i in $(seq 1000); do "$@" && return 0; sleep 0.02; done
    return 1
}
log_has() { [ -f "$1/log.jsonl" ] && [ "$(wc -l <"$1/log.jsonl")" -ge "$2" ]; }
json_line='^\{("[a-z_0-9]+":(-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?|true|false|null|"[^"]*"),?)+\}$'

gzip -dc "$here/data/tinyshakespeare.txt.gz" >all.txt || exit 1
head -c 6000 all.txt >a.txt
tail -c 3000 all.txt >b.txt
head -c 3000 a.txt >p1.txt                       # two halves, and nine tenths with the rest
tail -c 3000 a.txt >p2.txt
head -c 5400 a.txt >first.txt
tail -c 600 a.txt >last.txt
trains --out base --steps 6 --save-every 2
[ -e base/last/model.safetensors ] || { cat stderr; echo "cannot train at all"; exit 1; }

# ---- flags ---------------------------------------------------------------------------------------
# The list comes from --help: N whole number, X number, S text, nothing: a switch.
test_flags() {
    run --help
    cp stdout help
    check '--help exits 0' [ $status = 0 ]
    check '--help begins with an example' grep -q -e '--data' <(head -6 help)
    local flag kind value
    for flag in data val-data val-frac model d-model n-layer d-state headdim expand ngroups d-conv \
        vocab-size d-intermediate tie dt-limit chunk-size init tokenizer eot out resume steps \
        batch seq-len accum lr min-lr warmup schedule decay-frac weight-decay beta1 beta2 eps clip \
        skip-loss skip-norm seed shuffle packed carry recompute dtype threads save-every \
        eval-every sample-every plot keep eval-batches log-every generate prompt num-samples temperature \
        top-k top-p eval dump compare device graph profile help version dry-run; do
        check "--help has --$flag" grep -qE -e "^ +--$flag( |\$)" help
    done
    while read -r flag kind; do
        local values=()
        case $kind in
            N) values=('' abc 1e99 nan inf -1 1.5 99999999999999999999 ' 1' '1 ' 0x10 1e2) ;;
            X) values=('' abc 1e99 nan inf -1 1x ' 1' '1 ') ;;
            S) values=('') ;;
            -) values=(abc 2 -1 '') ;;
        esac
        [ "$flag" != --prompt ] || values=()
        [ "$flag" != --eot ] || values=('' abc 1e99 nan -2)     # -1: the tokenizer's
        for value in "${values[@]}"; do
            expect 2 "error: .*$flag" $small --dry-run "$flag=$value"
            [ "$kind$value" = -abc ] || [ "$value" != abc ] ||
                expect 2 "error: .*$flag" $small --dry-run "$flag" "$value"
        done
        [ "$kind" = - ] || [ "$flag" = --compare ] || expect 2 "error: .*$flag" --dry-run "$flag"
    done < <(sed -nE 's/^  (--[a-z0-9-]+) +(N|X|S)? .*/\1 \2/p' help |
             awk '{ print $1, (NF > 1 ? $2 : "-") }')
    # above the range, where there is one
    for value in val-frac=0.95 shuffle=2 tie=2 plot=2 beta1=1 beta2=1.5 decay-frac=1.1 top-p=1.01 \
        d-model=0 n-layer=0 d-state=0 headdim=0 expand=0 ngroups=0 d-conv=0 vocab-size=0 batch=0 \
        seq-len=0 accum=0 threads=0 threads=1000000 lr=1e30 seed=99999999999999999; do
        expect 2 "error: .*--${value%%=*}" $small --dry-run "--$value"
    done
    for value in schedule=foo schedule=cos 'schedule=linear cosine' dtype=f16 model=mamba \
        dt-limit=abc dt-limit=1 'dt-limit=1,' dt-limit=,1 dt-limit=0,x dt-limit=0.1,0.01 \
        dt-limit=-1,1 dt-limit=nan,1 \
        dt-limit=0,nan dt-limit=0,1,2 dt-limit=0,1x; do
        expect 2 "error: .*--${value%%=*}" $small --dry-run "--$value"
    done
    expect 2 'unknown flag --nope' --nope
    expect 2 'unknown flag --nope' --nope=3
    expect 2 'unknown flag foo' foo
    expect 2 'unknown flag -h' -h
    expect 2 'did you mean --batch' --batchsize 4
    expect 2 'did you mean --seq-len' --seq_len 4
    expect 2 'unknown flag' ''
    expect 2 'unknown flag' --
    (cd / && timeout 9 "$program" --compare >/dev/null 2>&1)
    check 'the CPU program refuses --compare without a file' [ $? = 2 ]
    expect '[12]' 'headdim' $small --dry-run --headdim 5
    expect '[12]' 'ngroups' $small --dry-run --ngroups 3
    expect 0 '' $small --dry-run --d-model=16 --batch=2
    run --version
    check '--version' [ $status = 0 -a "$(wc -l <stdout)" = 1 ]
    run $small --dry-run --out dry
    check '--dry-run says shape, parameters, memory, batch, tokens and steps' \
        [ $status = 0 -a "$(grep -ciE 'parameters|memory|batch|tokens|steps' stdout)" -ge 4 ]
    check_not '--dry-run makes no directory' [ -e dry ]
    local before
    before=$(snapshot base)
    expect 0 '' $small --dry-run --out base
    check '--dry-run leaves a run alone' [ "$(snapshot base)" = "$before" ]
}

# ---- files of tokens -----------------------------------------------------------------------------
refuse_data() {                                  # refuse_data PATTERN FLAGS...: exit 1, no --out
    local pattern=$1
    shift
    expect 1 "$pattern" $tiny $quiet --steps 2 --out refused "$@"
    check_not "no checkpoint after $(quote "$@")" compgen -G 'refused/step_*' >/dev/null
}
test_data() {
    refuse_data 'none\.txt' --data none.txt
    refuse_data 'none\*' --data 'none*'
    refuse_data 'none\.txt' --data a.txt,none.txt
    refuse_data '--data' --data ,
    : >empty.txt
    printf x >one.txt
    refuse_data 'empty\.txt' --data empty.txt
    refuse_data 'one\.txt.*token' --data one.txt
    refuse_data 'empty\.txt' --data a.txt,empty.txt
    mkdir -p directory directory.bin
    refuse_data 'directory' --data directory
    refuse_data 'directory' --data directory.bin
    head -c 4000 a.txt >raw.bin
    refuse_data 'raw\.bin.*(headerless|nanoGPT)' --data raw.bin
    : >empty.bin
    refuse_data 'empty\.bin' --data empty.bin
    head -c 900 /dev/zero >short.bin
    refuse_data 'short\.bin' --data short.bin
    shard a.txt 2 >v1.bin
    shard a.txt 4 >v7.bin
    check 'shards have their sizes' [ "$(size_of v1.bin)" = 13024 -a "$(size_of v7.bin)" = 25024 ]
    { header 20240520 2 6000; tail -c 12000 v1.bin; } >version.bin
    { header 20240521 1 6000; tail -c 12000 v1.bin; } >magic.bin
    { header 20240520 1 5999; tail -c 12000 v1.bin; } >less.bin
    { header 20240520 1 6001; tail -c 12000 v1.bin; } >more.bin
    { header 20240520 1 4294967295; tail -c 12000 v1.bin; } >negative.bin
    { header 20240520 1 2147483647; tail -c 12000 v1.bin; } >huge.bin
    head -c 13023 v1.bin >odd.bin
    local name
    for name in version magic less more negative huge odd; do
        refuse_data "$name\.bin.*" --data $name.bin
    done
    refuse_data '13023.*13024|13024.*13023' --data odd.bin
    refuse_data 'version' --data v1.bin,v7.bin
    refuse_data '(shard|text)' --data a.txt,v1.bin
    { head -c 1224 v1.bin; printf '\x39\x30'; tail -c +1227 v1.bin; } >beyond.bin
    refuse_data 'beyond\.bin.*12345.*100|beyond\.bin.*100.*12345' --data beyond.bin --vocab-size 257
    refuse_data 'v1\.bin.*token' --data v1.bin --vocab-size 64
    refuse_data 'a\.txt.*105.*position 1[^0-9]' --data a.txt --vocab-size 96
    { printf 'aaaa%.0s' {1..100}; } >low.txt
    cp a.txt z.txt
    refuse_data 'z\.txt.*position' --data low.txt,z.txt --vocab-size 98 --eot 97
    gzip -c a.txt >a.txt.gz
    gzip -c v1.bin >v1.bin.gz
    head -c 2000 a.txt.gz >cut.gz
    head -c 2000 v1.bin.gz >cut.bin.gz
    { head -c 10 a.txt.gz; head -c 3000 b.txt; } >garbage.gz
    { head -c 1500 a.txt.gz; printf 'xxxxxxxx'; tail -c +1509 a.txt.gz; } >damaged.gz
    { cat v1.bin.gz | head -c 60; printf 'xxxxxxxx'; } >damaged.bin.gz
    for name in cut.gz cut.bin.gz garbage.gz damaged.gz damaged.bin.gz; do
        refuse_data "$name" --data $name
    done
    refuse_data '6000.*10001|10001.*6000' --data v1.bin --batch 10 --seq-len 1000
    refuse_data 'none' --data a.txt --val-data none.txt
    refuse_data 'raw\.bin' --data a.txt --val-data raw.bin
    # what is right: packed or not, the same tokens; globs, lists and duplicates
    local vocab="--vocab-size 257 --eot 256 --val-frac 0 --steps 3 --out"
    expect 0 '' $tiny $quiet --data a.txt $vocab text
    for name in a.txt.gz v1.bin v1.bin.gz v7.bin; do
        expect 0 '' $tiny $quiet --data $name $vocab data-$name
        check "$name trains as a.txt does" same_model text data-$name
    done
    expect 0 '' $tiny $quiet --data 'p?.txt' $vocab glob
    expect 0 '' $tiny $quiet --data 'p2.txt,p1.txt' $vocab list
    expect 0 '' $tiny $quiet --data 'p*.txt,p2.txt,p1.txt' $vocab twice
    check 'a list is a glob' same_model glob list
    check 'duplicates are removed' same_model glob twice
    check_not 'two texts are not one' same_model glob text
    { header 20240520 1 6002; printf '\x00\x01'; tail -c 12000 v1.bin | head -c 6000
      printf '\x00\x01'; tail -c 6000 v1.bin; } >joined.bin
    expect 0 '' $tiny $quiet --data joined.bin $vocab joined
    check 'several texts: each behind an end-of-text' same_model glob joined
    shard p1.txt 2 >s1.bin
    shard p2.txt 2 | gzip >s2.bin.gz
    expect 0 '' $tiny $quiet --data 's?.bin*' $vocab shards
    head -c 20 p1.txt >tiny.txt
    shard tiny.txt 2 >s0.bin
    expect 0 'warning: s0.bin.*20 tokens' $tiny $quiet --data 's?.bin*' $vocab skipped --shuffle 0
    # the split
    trains --out split --steps 4 --eval-every 2 --save-every 4
    expect 0 '' $tiny $quiet --data first.txt --val-data last.txt --out split2 \
        --steps 4 --eval-every 2 --save-every 4
    check 'the last tenth of one text validates' [ "$(losses split)" = "$(losses split2)" ]
    check 'validation is in the log' [ "$(grep -c val_loss split/log.jsonl)" = 2 ]
    expect 0 '' $tiny $quiet --data first.txt --val-frac 0 --out split3 --steps 4
    trains --out base4 --steps 4
    check 'even when nothing is evaluated' same_model split3 base4
}

# ---- model directories ---------------------------------------------------------------------------
broken() { rm -rf broken; cp -rL base/last broken; }       # a copy to break
refuse_model() {
    expect 1 "$1" --data a.txt --batch 2 --seq-len 16 $quiet --init broken --steps 1 --out refused
}
edit() { sed -i "$1" broken/$2; }
test_models() {
    expect 1 'nowhere' $small --init nowhere --steps 1 --out refused
    expect 1 'a\.txt' $small --init a.txt --steps 1 --out refused
    broken; rm broken/config.json;                      refuse_model 'config\.json'
    broken; : >broken/config.json;                      refuse_model 'config\.json'
    broken; printf '{"a":' >broken/config.json;         refuse_model 'config\.json'
    broken; printf '[]' >broken/config.json;            refuse_model 'config\.json'
    broken; head -c 99 /dev/urandom >broken/config.json; refuse_model 'config\.json'
    broken; edit 's/"model_type": "[a-z0-9]*"/"model_type": "llama"/' config.json
    refuse_model 'config\.json.*llama.*mamba2'
    broken; edit 's/silu/gelu/' config.json;            refuse_model 'gelu.*silu'
    broken; edit 's/"use_bias": false/"use_bias": true/' config.json; refuse_model 'use_bias'
    broken; edit 's/"use_conv_bias": true/"use_conv_bias": false/' config.json
    refuse_model 'use_conv_bias'
    broken; edit 's/"hidden_size": 16/"hidden_size": 24/' config.json
    refuse_model 'config\.json|shape'
    broken; edit 's/"hidden_size": 16/"hidden_size": 0/' config.json;  refuse_model 'hidden_size'
    broken; edit 's/"hidden_size": 16/"hidden_size": -16/' config.json; refuse_model 'hidden_size'
    broken; edit 's/"hidden_size": 16/"hidden_size": 1.5/' config.json; refuse_model 'hidden_size'
    broken; edit 's/"hidden_size": 16/"hidden_size": "x"/' config.json; refuse_model 'hidden_size'
    broken; edit 's/"state_size": 4/"state_size": 8/' config.json;     refuse_model 'shape'
    broken; edit 's/"n_groups": 1/"n_groups": 3/' config.json;         refuse_model 'group|shape'
    broken; edit 's/"num_hidden_layers": 1/"num_hidden_layers": 2/' config.json
    refuse_model 'layers\.1.*missing|missing.*layers\.1'
    broken; edit 's/"tie_word_embeddings": true/"tie_word_embeddings": false/' config.json
    refuse_model 'lm_head\.weight.*missing|missing.*lm_head'
    # a safetensors file
    local f=broken/model.safetensors size n header
    size=$(size_of base/last/model.safetensors)
    header=$(header_size base/last/model.safetensors)
    broken; rm $f;                                      refuse_model 'model\.safetensors'
    for n in 0 1 7 8 9 100 $header $((size - 1)); do
        broken; truncate -s $n $f;                      refuse_model 'model\.safetensors'
    done
    broken; printf x >>$f;                              refuse_model 'model\.safetensors'
    broken; poke $f 0 '\xff\xff\xff\xff\xff\xff\xff\xff'
    refuse_model 'model\.safetensors'
    broken; poke $f 20 '\xff'
    refuse_model 'model\.safetensors'
    broken; head -c $size /dev/urandom >$f;             refuse_model 'model\.safetensors'
    broken; edit 's/norm_f\.weight/norm_g.weight/' model.safetensors; refuse_model 'norm_g'
    broken; edit 's/"shape":\[272,16\]/"shape":[16,272]/' model.safetensors
    refuse_model 'embeddings.*16 272.*272 16|embeddings.*272.16.*16.272'
    broken; edit 's/"shape":\[272,16\]/"shape":[272,15]/' model.safetensors
    refuse_model 'embeddings'
    broken; edit 's/"shape":\[272,16\]/"shape":[27216]/;s/}$/}  /' model.safetensors
    refuse_model 'safetensors'
    broken; edit 's/"dtype":"F32"/"dtype":"I32"/' model.safetensors; refuse_model 'I32|F32'
    broken; edit 's/"dtype":"F32"/"dtype":"F64"/' model.safetensors; refuse_model 'bytes|F64'
    broken; edit 's/\[0,17408\]/[0,17404]/' model.safetensors;  refuse_model 'model\.safetensors'
    broken; edit 's/\[17408,/[17400,/' model.safetensors;       refuse_model 'model\.safetensors'
    broken; edit 's/\[17408,/[97408,/' model.safetensors;       refuse_model 'model\.safetensors'
    broken; edit 's/\[0,17408\]/[9,-7408]/' model.safetensors;  refuse_model 'model\.safetensors'
    # sharded: an index that names files
    local names
    names=$(head -c $header base/last/model.safetensors |
            grep -aoE '"[a-zA-Z_0-9.]+":\{"dtype"' | cut -d'"' -f2)
    index() {                                    # index FILE: all tensors are in FILE
        local name comma=
        printf '{"metadata":{"total_size":1},"weight_map":{'
        for name in $names; do printf '%s"%s":"%s"' "$comma" "$name" "$1"; comma=,; done
        printf '}}'
    }
    broken; mv $f broken/part.safetensors
    index part.safetensors >broken/model.safetensors.index.json
    expect 0 '' $small --init broken --steps 1 --out sharded
    expect 0 '' $small --init base/last --steps 1 --out whole
    check 'sharded weights are the same' same_model sharded whole
    index gone.safetensors >broken/model.safetensors.index.json; refuse_model 'gone\.safetensors'
    index ../base/last/model.safetensors >broken/model.safetensors.index.json
    refuse_model 'index\.json'
    printf '{}' >broken/model.safetensors.index.json;          refuse_model 'index\.json'
    printf '{"weight_map":{}}' >broken/model.safetensors.index.json; refuse_model 'missing'
    # a tokenizer
    local text
    for text in '' '{' '{}' '[]' '{"model":{}}' '{"model":{"type":"WordPiece","vocab":{}}}' \
        '{"model":{"type":"BPE","vocab":{"a":0},"merges":["a"]}}' \
        '{"model":{"type":"BPE","vocab":[]}}'; do
        printf '%s' "$text" >tokenizer.json
        expect 1 'tokenizer\.json' $small --tokenizer tokenizer.json --steps 1 --out refused
    done
    expect 1 'none\.json' $small --tokenizer none.json --steps 1 --out refused
    broken; printf '{' >broken/tokenizer.json;          refuse_model 'tokenizer\.json'
    check_not 'none of these made a checkpoint' compgen -G 'refused/step_*' >/dev/null
}

# ---- resuming ------------------------------------------------------------------------------------
until_step() {                                   # until_step FROM TO K: TO is FROM up to step K
    rm -rf "$2"
    mkdir "$2"
    cp "$1/log.jsonl" "$2"
    cp -r "$1/step_0000000$3" "$2"
    ln -s "step_0000000$3" "$2/last"
}
# The flags in the first line of a log; what is empty or off was not said
config_flags() {
    head -1 "$1/log.jsonl" | grep -oE '"[a-z_0-9]+":("[^"]*"|[^",{}]+)' |
        grep -vE ':(""|false|null)$|"(out|resume|generate)":' |
        sed -E 's/"([a-z_0-9]+)":"?([^"]*)"?/\1 \2/' |
        while read -r name value; do echo "--${name//_/-}=${value/true/1}"; done
}
test_resume() {
    head -c 2000 a.txt >r1.txt
    head -c 4000 a.txt | tail -c 2000 >r2.txt
    tail -c 2000 a.txt >r3.txt
    local n
    for n in 1 2 3; do shard r$n.txt 2 >r$n.bin; done
    { tr '\n' '\0' <a.txt; } >docs.txt           # a "document" at every zero byte
    local name flags k
    while read -r name k flags; do
        flags="$tiny $quiet $flags --steps 8 --save-every 1 --keep 0"
        set -f                                   # a glob is for the program
        expect 0 '' $flags --out r-$name
        for k in ${k//,/ }; do
            until_step r-$name part $k
            expect 0 '' $flags --out part --resume
            check "$name: resumed at step $k, the same bits" same_run r-$name part
        done
        set +f
    done <<'RUNS'
plain   1,4,7   --data a.txt
order   3       --data a.txt --shuffle 0 --seed 7
packed  2,5     --data docs.txt --packed --eot 0
carry   2,5     --data a.txt --carry --accum 2
pcarry  3       --data docs.txt --carry --packed --eot 0 --shuffle 0
shards  1,3,6   --data r?.bin --vocab-size 257 --seq-len 250 --eot 10
scarry  2,5     --data r?.bin --vocab-size 257 --seq-len 125 --carry --accum 2
eval    4       --data a.txt --eval-every 2
mlp     3       --data a.txt --d-intermediate 24 --tie 0 --ngroups 2 --recompute
RUNS
    # without any other flag: the checkpoint knows them
    until_step r-plain part 4
    expect 0 '' --resume --out part
    check 'a run resumes from --out alone' same_run r-plain part
    # accumulated losses of lines after the resumed step are gone
    check 'the log has every step once' [ "$(grep -c '"step"' part/log.jsonl)" = 8 ]
    # refused, and untouched
    local before
    until_step r-plain part 4
    before=$(snapshot part)
    for flags in '--batch 3' '--seq-len 15' '--seed 5' '--accum 2' '--data b.txt' '--d-model 32' \
        '--shuffle 0' '--packed' '--carry' '--n-layer 2' '--vocab-size 260' '--dt-limit 0,1'; do
        expect 1 "part/step_00000004.*trained with.*${flags%% *}" \
            $small --steps 8 --out part --resume $flags
    done
    check 'a refused --resume writes nothing' untouched part "$before"
    expect 1 'checkpoint.*--resume|--resume.*checkpoint' $small --steps 8 --out part
    check 'without --resume: refused untouched' untouched part "$before"
    expect 0 'lr' $small --steps 8 --out part --resume --lr 1e-3
    check 'another lr: a notice' grep -q notice stdout stderr
    until_step r-plain part 4
    expect 0 'steps' $small --steps 6 --out part --resume --schedule linear
    check 'another steps: a notice' grep -q notice stdout stderr
    before=$(snapshot part)
    expect 0 '' $small --steps 6 --out part --resume
    check 'already at --steps: nothing written' untouched part "$before"
    expect 0 '' $small --steps 3 --out part --resume
    check 'beyond --steps: nothing written' untouched part "$before"
    # the data changed behind its name
    cp a.txt moving.txt
    expect 0 '' $tiny $quiet --data moving.txt --out moving --steps 2
    cp b.txt moving.txt
    expect 1 'moving\.txt|data' $tiny $quiet --data moving.txt --out moving --steps 4 --resume
    # the same command, again
    flags="$small --steps 4 --save-every 2 --dt-limit 1e-3,1e-1 --min-lr 1e-9 --vocab-size 300"
    expect 0 '' $flags --out again
    expect 0 '' $flags --out again --resume
    expect 1 '--resume' $flags --out again
    # --resume in an empty place starts afresh; --init is for the first start
    expect 0 '' $small --steps 4 --out fresh --resume
    expect 0 '' $small --steps 4 --out fresh2
    check '--resume without checkpoints starts afresh' same_run fresh fresh2
    expect 0 '' $small --steps 4 --out inited --init base/last --save-every 2
    expect 0 '' $small --steps 6 --out inited --init base/last --resume
    check '--resume wins over --init' grep -q '"step":5' inited/log.jsonl
    # what is not part of the training does not change it
    expect 0 '' $small --steps 4 --out plainly
    expect 0 '' $small --steps 4 --out watched --eval-every 1 --sample-every 2 \
        --save-every 1 --plot 1
    check 'watching does not change a run' same_model plainly watched
    for k in 2 3; do
        expect 0 '' $small --steps 4 --out threads$k --threads $k
        check "$k threads, the same bits" same_run plainly threads$k
    done
    expect 0 '' $small --steps 4 --out tokenizer --tokenizer plainly/last/tokenizer.json
    check 'our tokenizer.json is what bytes are' same_model plainly tokenizer
    # a minimum of 0 is not "no minimum"
    expect 0 '' $small --steps 8 --save-every 1 --keep 0 --min-lr 0 --out zero
    until_step zero part 4
    expect 0 '' --resume --out part
    check '--min-lr 0 is remembered' same_run zero part
    # the first line of the log repeats the run
    flags=$(config_flags plainly)
    expect 0 '' $flags --out repeated
    check 'the config in the log repeats the run' same_run plainly repeated
    # stopped again and again
    flags="$small --val-frac 0 --accum 2 --carry --steps 600 --save-every 100"
    expect 0 '' $flags --out once
    for n in $(seq 12); do
        timeout 0.$((RANDOM % 150 + 100)) "$program" $flags --out often --resume \
            >stdout 2>stderr && break
    done
    expect 0 '' $flags --out often --resume
    check 'many stops, the same bits' same_run once often

    # a torn log
    until_step r-plain part 4
    printf '{"step":9,"lo' >>part/log.jsonl
    expect 0 '' $small --steps 8 --out part --resume
    check 'a torn last line of the log goes' same_run r-plain part
    until_step r-plain part 4
    sed -i '3s/.*/{"step":2,"lo\x01/' part/log.jsonl
    expect 0 '' $small --steps 8 --out part --resume
    check 'a damaged line of the log does not stop a resume' same_model r-plain part
    until_step r-plain part 4
    rm part/log.jsonl
    expect 0 '' $small --steps 8 --out part --resume
    check 'nor does a missing log' same_model r-plain part
    # moved, and seen from elsewhere
    mkdir -p far/away
    until_step r-plain 'far/away/new name' 4
    until_step r-plain far/moved 4
    expect 0 '' --resume --out far/moved
    check 'a moved OUT resumes' same_run r-plain far/moved
}

# ---- damaged checkpoints -------------------------------------------------------------------------
two_steps() { rm -rf hurt; cp -r base hurt; }    # checkpoints of steps 4 and 6
test_damage() {
    check 'base has steps 4 and 6' [ -d base/step_00000004 -a -d base/step_00000006 ]
    local name damage size
    for name in base/step_00000006/*; do
        name=${name##*/}
        for damage in missing cut empty longer flip0 flipmid flipend; do
            two_steps
            local f=hurt/step_00000006/$name
            size=$(size_of $f)
            case $damage in
                missing) rm $f ;;
                cut) truncate -s $((size - 1)) $f ;;
                empty) : >$f ;;
                longer) printf ' ' >>$f ;;
                flip0) flip $f 0 ;;
                flipmid) flip $f $((size / 2)) ;;
                flipend) flip $f $((size - 1)) ;;
            esac
            expect 0 "step_00000006.*(${name%.*}|damaged|missing)" \
                $small --steps 7 --out hurt --resume
            grep -q '^{"step":7' hurt/log.jsonl &&
                [ "$(grep -c '^{"step":5' hurt/log.jsonl)" = 1 ] ||
                bad "$name $damage: not resumed from step 4"
        done
    done
    two_steps
    flip hurt/step_00000006/model.safetensors 9999
    flip hurt/step_00000004/model.safetensors 9999
    local before
    before=$(snapshot hurt)
    expect 1 'damaged' $small --steps 7 --out hurt --resume
    check 'all damaged: refused untouched' untouched hurt "$before"
    expect 1 '--resume' $small --steps 7 --out hurt
    # a directory without anything, and names that only look like checkpoints
    two_steps
    mkdir hurt/step_00000009 hurt/step_00000008.bak
    touch hurt/step_x
    expect 0 'step_00000009' $small --steps 7 --out hurt --resume
    # newer damaged ones do not count for --keep: what was just saved stays
    two_steps
    flip hurt/step_00000006/model.safetensors 9999
    expect 0 'step_00000006' $small --steps 5 --save-every 1 --keep 1 --out hurt --resume
    check 'the checkpoint just saved stays' [ -e hurt/last/model.safetensors ]
    # a step directory in the way is moved aside, whatever is in it
    two_steps
    flip hurt/step_00000006/model.safetensors 9999
    mkdir hurt/step_00000006/notes
    touch hurt/step_00000006/notes/x
    expect 0 '' $small --steps 8 --save-every 1 --out hurt --resume
    check 'a step directory in the way' [ -e hurt/last/model.safetensors ]
    two_steps
    rm -r hurt/step_00000006
    touch hurt/step_00000006
    expect 0 '' $small --steps 8 --save-every 1 --out hurt --resume
    check 'a file in the way' [ -e hurt/last/model.safetensors ]
}

# ---- signals, kills, locks -----------------------------------------------------------------------
test_signals() {
    local sig number k long="$small --val-frac 0 --steps 400 --batch 8 --seq-len 64"
    for sig in INT TERM; do
        number=$([ $sig = INT ] && echo 130 || echo 143)
        rm -rf stopped
        "$program" $long --out stopped >stdout 2>stderr &
        wait_for log_has stopped 5
        kill -$sig $!
        wait $!
        check "SIG$sig: status" [ $? = $number ]
        check "SIG$sig: saved" [ -e stopped/last/model.safetensors ]
        k=$(tail -1 stopped/log.jsonl | sed 's/.*"step":\([0-9]*\).*/\1/')
        check "SIG$sig: saved the step that it finished" \
            [ "$(readlink stopped/last)" = "$(printf 'step_%08d' "$k")" ]
        check "SIG$sig: before the end" [ "$k" -lt 400 ]
    done
    expect 0 '' $long --out stopped --resume
    expect 0 '' $long --out notstopped
    check 'stopped and resumed, the same bits' same_run stopped notstopped
    rm -rf stopped
    "$program" $small --steps 100000 --save-every 0 --out stopped >stdout 2>stderr &
    wait_for log_has stopped 5
    kill -TERM $!
    wait $!
    check 'save-every 0: status' [ $? = 143 ]
    check_not 'save-every 0: a signal saves nothing' compgen -G 'stopped/step_*' >/dev/null
    # the second signal does not wait for the step
    rm -rf stopped
    "$program" --data all.txt --d-model 256 --n-layer 4 --seq-len 1024 --batch 4 --steps 9 \
        --plot 0 --out stopped >stdout 2>stderr &
    wait_for [ -f stopped/log.jsonl ]
    sleep 0.1
    kill -INT $!
    sleep 0.1
    kill -INT $!
    wait $!
    check 'a second signal: status' [ $? = 130 ]
    check_not 'a second signal: nothing saved' compgen -G 'stopped/step_*' >/dev/null
    # one trainer for one directory
    rm -rf locked
    "$program" $small --steps 100000 --save-every 0 --out locked >stdout2 2>stderr2 &
    k=$!
    wait_for log_has locked 3
    expect 1 "locked.*$k" $small --steps 9 --out locked
    expect 1 "locked.*$k" $small --steps 9 --out locked --resume
    kill -9 $k
    wait $k 2>/dev/null
    expect 0 '' $small --steps 2 --save-every 1 --out locked   # the lock went with its holder
}

# After any death OUT/last is whole, and --resume goes on.
survived() {                                     # survived NAME OUT
    [ ! -L "$2/last" ] || [ -e "$2/last/model.safetensors" ] || { bad "$1: last dangles"; return; }
    timeout 20 "$program" $small --steps 1 --save-every 1 --out "$2" --resume >stdout 2>stderr ||
        { bad "$1: cannot resume" "$(head -2 stderr)"; return; }
    if ! grep -q warning stderr; then good; else bad "$1: a damaged checkpoint" "$(<stderr)"; fi
}
test_kills() {
    local i steps=0
    rm -rf killed
    for i in $(seq 15); do
        steps=$((steps + 1000))
        "$program" $small --steps $steps --save-every 1 --out killed --resume >stdout 2>stderr &
        sleep 0.0$((RANDOM % 80 + 10))
        kill -9 $!
        wait $! 2>/dev/null
        survived "kill -9 number $i" killed
    done
    if ! strace -o /dev/null true 2>/dev/null; then
        echo "note: no strace: skipped the exact kills"
        return
    fi
    local call n
    inject() {                                   # inject EXPRESSION: three steps in `injected`
        rm -rf injected
        (timeout 30 strace -f -o trace -e trace="${1%%:*}" -e inject="$1" "$program" $small \
            --steps 3 --save-every 1 --out injected >stdout 2>stderr
        exit $?) 2>/dev/null                    # the shell would say "Killed"
        status=$?
    }
    for call in rename symlink unlink rmdir mkdir fsync; do
        for n in 1 2 3 4 5 8 12 17; do
            inject "$call:signal=KILL:when=$n"
            [ $status = 0 ] || survived "killed at $call $n" injected
        done
    done
    for n in 3 7 11 14 16 20 23 25 29 33 36 40; do
        inject "write:signal=KILL:when=$n"
        [ $status = 0 ] || survived "killed at write $n" injected
        inject "write:error=ENOSPC:when=$n+"
        [ $status = 1 ] || bad "disk full from write $n on: status $status" "$(head -2 stderr)"
        survived "disk full at write $n" injected
    done
    for n in 1 2 3 6 11; do
        inject "fsync:error=EIO:when=$n"
        [ $status = 1 ] || bad "fsync fails at $n: status $status"
        grep -q 'error: .*injected' stderr || bad "fsync fails at $n: no message"
        survived "fsync fails at $n" injected
        inject "write:error=EINTR:when=$n"
        [ $status = 0 ] || bad "interrupted write $n: status $status" "$(head -2 stderr)"
    done
    inject "rename:error=EIO:when=2"
    [ $status = 1 ] || bad "rename fails: status $status"
    survived "rename fails" injected
}

test_disk() {
    run --data a.txt --init base/last --generate 20
    timeout 9 "$program" --help >/dev/full 2>stderr
    check "--help to a full disk exits 1" [ $? = 1 ]
    timeout 9 "$program" --init base/last --generate 20 >/dev/full 2>stderr
    check '--generate to a full disk exits 1' [ $? = 1 ]
    timeout 9 "$program" $small --init base/last --eval b.txt >/dev/full 2>stderr
    check '--eval to a full disk exits 1' [ $? = 1 ]
    timeout 9 "$program" $small --steps 3 --out fullout >/dev/full 2>stderr
    check 'training survives a full stdout' [ -e fullout/last/model.safetensors ]
    timeout 9 "$program" $small --steps 200 --out pipeout 2>stderr | head -1 >/dev/null
    check 'training survives a closed pipe' [ -e pipeout/last/model.safetensors ]
    expect 1 'none/deep' $small --steps 1 --out none/deep
    expect 1 'a\.txt' $small --steps 1 --out a.txt
    expect 1 'none/x' $small --dump none/x
    mkdir -p full
    if [ "$(id -u)" != 0 ] || ! mount -t tmpfs -o size=1600k tmpfs full 2>/dev/null; then
        echo "note: cannot mount: skipped the full disk"
        return
    fi
    expect 1 'full/out' $small --steps 50 --save-every 1 --keep 0 --out full/out
    check 'disk full: the last checkpoint is whole' [ -e full/out/last/model.safetensors ]
    expect 0 '' $small --init full/out/last --eval b.txt
    check 'disk full: nothing half written' [ ! -e full/out/.writing ]
    mount -o remount,ro full
    expect 1 'full/' $small --steps 50 --out full/other
    expect 1 'full/' $small --steps 50 --out full/out --resume
    expect 0 '' --out full/out --generate 3
    umount full
}

# ---- the log -------------------------------------------------------------------------------------
test_log() {
    trains --out logged --steps 6 --eval-every 3 --save-every 3 --accum 2
    local log=logged/log.jsonl
    check 'the first line is the config' grep -q '^{"config":{' <(head -1 $log)
    check 'the config has every flag' [ "$(head -1 $log | grep -oE '"[a-z_0-9]+":' | wc -l)" -gt \
        "$("$program" --help | grep -c '^  --')" ]
    check 'it is JSON' [ "$(tail -n +2 $log | grep -vcE "$json_line")" = 0 ]
    local keys='"loss":N,"grad_norm":N,"lr":N,"tokens":[0-9]+,"tokens_per_s":N,"mfu":N,"time":N'
    check 'each step has its keys' \
        [ "$(grep -cE "^\{\"step\":[0-9]+,${keys//N/[^,]+}\}\$" $log)" = 6 ]
    check 'validation has its keys' \
        [ "$(grep -cE '^\{"step":[0-9]+,"val_loss":[^,]+,"val_bpb":[^,]+\}$' $log)" = 2 ]
    check 'tokens so far' grep -q '"step":6,.*"tokens":384,' $log
    check '9 digits' grep -qE '"loss":[0-9.]{9,11},' $log
    check 'mfu is a fraction or null' grep -qE '"mfu":(0(\.[0-9]+)?|[0-9.]+e-[0-9]+|null)' $log
    # the formulas of the learning rate
    local schedule
    for schedule in constant linear cosine wsd; do
        trains --out lr-$schedule --steps 10 --warmup 3 --lr 1e-2 --min-lr 1e-3 \
            --schedule $schedule --decay-frac 0.4 --save-every 0
        sed -n 's/.*"step":\([0-9]*\),.*"lr":\([^,]*\),.*/\1 \2/p' lr-$schedule/log.jsonl |
            awk -v s=$schedule 'function abs(x) { return x < 0 ? -x : x }
            { t = $1; lr = 1e-2; low = 1e-3; W = 3; S = 10; D = 4; part = (t - W)/(S - W)
              if (t <= W) want = lr*t/W
              else if (s == "constant") want = lr
              else if (s == "linear") want = low + (lr - low)*(1 - part)
              else if (s == "cosine") want = low + (lr - low)/2*(1 + cos(3.141592653589793*part))
              else want = t <= S - D ? lr : low + (lr - low)*(S - t)/D
              if (!(abs($2 - want) <= 1e-12)) { print "step", t, "lr", $2, "not", want; bad = 1 }
              n++ } END { exit bad || n != 10 }'
        check "lr of $schedule" [ $? = 0 ]
    done
    trains --out lr-default --steps 10 --lr 1e-2 --save-every 0
    check 'min-lr is lr/10' grep -qE '"step":10,.*"lr":0.001(0{16}[0-9]*)?,' lr-default/log.jsonl
    trains --out lr-warm --steps 3 --warmup 100 --save-every 0
    check 'steps fewer than warmup' grep -q '"step":3,.*"lr":0.00012' lr-warm/log.jsonl
    # outliers: a text that turns into noise
    { for n in $(seq 300); do printf 'abcdefgh%.0s' {1..8}; done; head -c 4000 a.txt; } >jump.txt
    expect 0 '' $tiny $quiet --data jump.txt --val-frac 0 --shuffle 0 --steps 620 --lr 1e-2 \
        --save-every 0 --skip-loss 6 --out skip
    check 'an outlier is skipped and logged' grep -q '"skipped":true' skip/log.jsonl
    check 'the first steps are not' [ "$(head -100 skip/log.jsonl | grep -c skipped)" = 0 ]
    check 'skipped lines are JSON' [ "$(tail -n +2 skip/log.jsonl | grep -vcE "$json_line")" = 0 ]
    # the double build writes 17 digits
    if [ -n "$double" ]; then
        timeout 20 "$double" $small --steps 2 --out logged64 >stdout 2>stderr
        check '17 digits in double' grep -qE '"loss":[0-9.]{17,19},' logged64/log.jsonl
        check 'the double build stores F64' grep -qa '"dtype":"F64"' logged64/last/model.safetensors
        expect 0 'F64|float64|double' $small --steps 1 --init logged64/last --out from64
        timeout 20 "$double" $small --steps 2 --init base/last --out from32 >stdout 2>stderr
        check 'the double build reads F32' [ $? = 0 ]
    fi
}

test_keep() {
    local k
    count() { compgen -G "$1/step_*" | wc -l; }
    for k in 0 1 2 3; do
        trains --out keep$k --steps 6 --save-every 1 --keep $k
        check "--keep $k" [ "$(count keep$k)" = $((k ? k : 6)) ]
    done
    trains --out default --steps 6 --save-every 1
    check '--keep is 2' [ "$(count default)" = 2 ]
    # the better it knows the text, the worse it guesses noise: the best is an early one
    gzip -c all.txt | tail -c 3000 >noise.dat
    trains --val-data noise.dat --out best --steps 8 --save-every 1 --eval-every 1 --lr 0.03
    local first
    first=$(sed -n 's/.*"step":\([0-9]*\),"val_loss":\([^,]*\),.*/\2 \1/p' best/log.jsonl |
            sort -g | head -1 | cut -d' ' -f2)
    check "the best is not among the newest" [ "$first" -lt 7 ]
    check 'best is the lowest validation loss' \
        [ "$(readlink best/best)" = "$(printf 'step_%08d' "$first")" ]
    check 'best is not pruned' [ -e best/best/model.safetensors ]
    check 'links are relative' [ "$(readlink best/last)" = step_00000008 ]
    mv best moved
    check 'and survive a move' [ -e moved/last/config.json -a -e moved/best/config.json ]
    local name
    for name in config.json generation_config.json model.safetensors optimizer.safetensors; do
        check "a checkpoint has $name" [ -s moved/last/$name ]
    done
    trains --out never --steps 3 --save-every 0
    check '--save-every 0: never' [ "$(count never)" = 0 ]
    trains --out end --steps 3 --save-every 100
    check 'at the end' [ "$(readlink end/last)" = step_00000003 ]
    trains --out plot --steps 3 --plot 1 --eval-every 2
    check 'loss.png is a PNG' [ "$(head -c 4 plot/loss.png | tail -c 3)" = PNG ]
    check_not '--plot 0' [ -e end/loss.png ]
}

# ---- generating ----------------------------------------------------------------------------------
gen() { timeout 20 "$program" --init base/last --generate "$@" 2>stderr; }
test_generate() {
    run --init base/last --generate 20 --temperature 0 --prompt abc
    check 'generate: status' [ $status = 0 ]
    check 'generate: nothing on stderr' [ ! -s stderr ]
    check 'one byte a token, no more' [ "$(size_of stdout)" = 20 ]
    check 'greedy is deterministic' cmp -s stdout <(gen 20 --temperature 0 --prompt abc)
    check 'greedy is top-k 1' cmp -s stdout <(gen 20 --top-k 1 --prompt abc --seed 5)
    check 'a prompt from stdin' cmp -s stdout <(printf abc | gen 20 --temperature 0 --prompt -)
    check '--out is --init OUT/last' \
        cmp -s stdout <(timeout 9 "$program" --out base --generate 20 --temperature 0 --prompt abc)
    check 'any number of threads' cmp -s stdout <(gen 20 --temperature 0 --prompt abc --threads 1)
    check 'more tokens begin with fewer' \
        cmp -s stdout <(gen 40 --temperature 0 --prompt abc | head -c 20)
    check 'an empty prompt is a newline' cmp -s <(gen 9 --temperature 0 --prompt '') \
        <(printf '\n' | gen 9 --temperature 0 --prompt -)
    check 'no prompt is an empty one' \
        cmp -s <(gen 9 --temperature 0) <(gen 9 --temperature 0 --prompt '')
    check 'empty stdin too' \
        cmp -s <(gen 9 --temperature 0) <(gen 9 --temperature 0 --prompt - </dev/null)
    check 'a seed gives the same text' cmp -s <(gen 50 --seed 3) <(gen 50 --seed 3)
    check_not 'another seed another' cmp -s <(gen 50 --seed 3) <(gen 50 --seed 4)
    check_not 'a temperature matters' cmp -s <(gen 50 --temperature 0.1) <(gen 50 --temperature 2)
    check 'top-p next to 0 is greedy' cmp -s <(gen 20 --top-p 1e-9) <(gen 20 --temperature 0)
    check '--generate 0' [ -z "$(gen 0)" ]
    # several samples: a line of 15 dashes between two; each as if it were alone
    local line='\n---------------\n'
    gen 40 --temperature 1.2 >one
    gen 40 --temperature 1.2 --num-samples 2 >two
    gen 40 --temperature 1.2 --num-samples 3 >three
    check 'two samples begin with the one' cmp -s <(cat one; printf %b "$line") \
        <(head -c $(($(size_of one) + 17)) two)
    check 'three with the two' cmp -s <(cat two; printf %b "$line") \
        <(head -c $(($(size_of two) + 17)) three)
    check_not 'they differ' cmp -s <(head -c 20 two) <(tail -c +$(($(size_of one) + 18)) two | head -c 20)
    gen 20 --temperature 0 >one
    check 'greedy samples are all equal' cmp -s <(gen 20 --temperature 0 --num-samples 3) \
        <(cat one; printf %b "$line"; cat one; printf %b "$line"; cat one)
    gen 9 --num-samples 3 --top-k 3 >/dev/full
    check '--num-samples to a full disk exits 1' [ $? = 1 ]
    expect 2 'num-samples' --init base/last --generate 5 --num-samples 0
    expect 2 'num-samples' --init base/last --generate 5 --num-samples 10001
    trains --steps 2 --sample-every 2 --num-samples 2 --out several
    check 'training prints as many' [ "$(grep -ac '^---------------$' stdout)" = 1 ]
    check 'bytes that are not ASCII' \
        [ "$(printf '\xc3\xa4\x00\xff' | gen 5 --prompt - | wc -c)" = 5 ]
    gen 100000 | head -c 1 >/dev/null
    local codes=("${PIPESTATUS[@]}")
    check 'head -c 1 stops it without a complaint' [ ! -s stderr ]
    check 'and with status 0 or that of SIGPIPE' [ "${codes[0]}" = 0 -o "${codes[0]}" = 141 ]
    expect 1 'nothing' --out nothing --generate 5
    check_not 'generate makes no directory' [ -e nothing ]
    local before
    before=$(snapshot base)
    expect 0 '' --out base --generate 5
    check 'generate writes nothing' [ "$(snapshot base)" = "$before" ]
    (cd / && timeout 9 "$program" --out "$OLDPWD/base" --generate 5 >/dev/null 2>&1)
    check 'generate needs no data' [ $? = 0 ]
    # 288 rows: not bytes any more
    trains --steps 1 --vocab-size 288 --out wide
    rm -f wide/last/tokenizer.json
    expect 1 'tokenizer' --out wide --generate 5
}

test_inspect() {
    local before
    before=$(snapshot base)
    expect 0 '' $small --init base/last --dump d1
    expect 0 '' $small --init base/last --compare d1
    check 'a dump equals itself' [ "$(grep -c FAIL stdout)" = 0 ]
    local name
    for name in loss losses logits grad.backbone.embeddings.weight backbone.norm_f.weight; do
        check "a dump has $name" grep -qaF "\"$name\":" d1
    done
    # one number of the convolution's output is wrong
    local begin
    begin=$(tensor_at d1 act.layers.0.xBC)
    cp d1 d2
    poke d2 $((begin + 43)) '\x7f'
    run $small --init base/last --compare d2
    check 'a tampered dump fails' [ $status = 1 ]
    check 'at the tensor' grep -q 'act.layers.0.xBC .*first divergence' stdout
    check 'and only there' [ "$(grep -c FAIL stdout)" = 1 ]
    cp d1 d3
    poke d3 $((begin + 40)) '\x00\x00\xc0\x7f'
    run $small --init base/last --compare d3
    check 'a NaN fails' [ $status = 1 ]
    expect 1 'none' $small --compare none
    expect 1 'a\.txt' $small --compare a.txt
    expect 1 'shape|tensor' $small --n-layer 2 --compare d1
    head -c 5000 d1 >d4
    expect 1 'd4' $small --init base/last --compare d4
    if [ -n "$double" ]; then
        local more
        for more in '' '--packed --eot 10' '--ngroups 2 --tie 0 --d-intermediate 24 --recompute'; do
            timeout 20 "$double" $small $more --dump ref >stdout 2>stderr
            expect 0 '' $small $more --dump float
            expect 0 '' $small $more --compare ref
            expect 0 'ratio' $small $more --compare ref,float
        done
    fi
    check '--dump and --compare leave OUT alone' [ "$(snapshot base)" = "$before" ]
    # --eval FILE is the validation loss of that file
    local a b
    trains --out eval --steps 4 --eval-every 4
    expect 0 'nats' $small --out eval --eval last.txt
    a=$(sed -n 's/.*loss \([0-9.]*\) nats.*/\1/p' stdout)
    b=$(sed -n 's/.*"val_loss":\([0-9.]*\),.*/\1/p' eval/log.jsonl)
    check '--eval is the validation loss' [ -n "$a" -a "$a" = "$b" ]
    run --init eval/last --eval last.txt --batch 2 --seq-len 16
    check '--eval with --init' [ "$(sed -n 's/.*loss \([0-9.]*\) nats.*/\1/p' stdout)" = "$b" ]
    expect 1 'nothing' $small --out nothing --eval b.txt
    expect 1 'none\.txt' $small --out eval --eval none.txt
    expect 0 'ms|share' $small --profile 3 --out profiled
    check_not '--profile saves nothing' compgen -G 'profiled/step_*' >/dev/null
}

# ---- numerics ------------------------------------------------------------------------------------
test_nan() {
    local at name begin
    for at in embeddings.weight layers.0.mixer.in_proj.weight layers.0.mixer.A_log norm_f.weight; do
        rm -rf poison
        cp -rL base/last poison
        begin=$(tensor_at poison/model.safetensors "backbone.$at")
        [ $at != embeddings.weight ] || begin=$((begin + 101*16*4))       # of the letter e
        poke poison/model.safetensors "$begin" '\x00\x00\xc0\x7f'
        name=${at%.weight}
        name=${name##*.}
        expect 1 "step 1: .*${name%s}" \
            $small --init poison --steps 3 --save-every 1 --out nan
        check_not "NaN in $at: nothing saved" compgen -G 'nan/step_*' >/dev/null
    done
    expect 1 'step [0-9]' $small --lr 1000 --weight-decay 1000 --warmup 0 --steps 50 \
        --save-every 1 --eval-every 1 --clip 0 --out nan2
    check 'all lines of its log are JSON' \
        [ "$(tail -n +2 nan2/log.jsonl | grep -vcE "$json_line")" = 0 ]
    if [ -e nan2/last ]; then
        expect 0 '' $small --init nan2/last --dump nd
        run $small --init nan2/last --compare nd
        check_not 'no NaN was saved' grep -qiE 'backbone.*(nan|inf)' stdout
    fi
}

# ---- careless users ------------------------------------------------------------------------------
test_users() {
    local name
    for name in 'my run' "it's" 'a"b' 'päth' '日本' 'x$y' 'back\slash' '[1]' 'a,b' \
        '*' "$(printf 'long%.0s' {1..60})"; do
        mkdir -p "u/$name"
        cp a.txt "u/$name/text of mine.txt"
        expect 0 '' $tiny $quiet --steps 2 --save-every 1 --data "u/$name/text of mine.txt" \
            --out "u/$name/out"
        check "path $name: trained" [ -e "u/$name/out/last/model.safetensors" ]
        check "path $name: log" \
            [ "$(head -1 "u/$name/out/log.jsonl" | grep -c '^{"config":{.*}}$')" = 1 ]
        expect 0 '' $quiet --steps 3 --out "u/$name/out" --resume
        expect 0 '' --out "u/$name/out" --generate 3
    done
    sed 's/$/\r/' a.txt >crlf.txt
    expect 0 '' $tiny $quiet --steps 2 --data crlf.txt --out crlf
    tr '\n' '\0' <a.txt >zero.txt
    expect 0 '' $tiny $quiet --steps 2 --data zero.txt --out zero
    head -c 6000 /dev/urandom >noise.dat
    expect 0 '' $tiny $quiet --steps 2 --data noise.dat --out noise
    expect 0 '' $small --steps 2 --out threads --threads 64
    expect 0 '' $small --steps 2 --out steps0 --steps 0
    cp a.txt $'caf\xe9.txt'                       # Latin-1: a log in JSON could not hold it
    expect "[12]" "UTF-8" $small --data $'caf\xe9.txt' --steps 1 --out latin
    expect 1 "--eot" $small --eot 400 --steps 1 --out eot
    head -c 300 a.txt >few.txt                   # its last tenth is too small to validate on
    expect 0 '' $tiny $quiet --steps 2 --data few.txt --out few
    expect 0 '' $tiny $quiet --steps 2 --data 'p?.txt' --eval-every 1 --out noval
    expect 1 'd.model|hidden_size|shape' $small --init base/last --d-model 32 --steps 1 --out shape
    expect 1 'memory|overflow|GiB' $small --d-model 1000000 --n-layer 100000 --steps 1 --out big
    mkdir elsewhere
    (cd elsewhere && timeout 9 "$program" >../stdout 2>../stderr)
    check "without the default text: a clear error" [ $? = 1 -a "$(wc -l <stderr)" = 1 ]
    check_not "and no directory" [ -e elsewhere/out ]
}

# ---- all of them, two at a time, each in a directory with its own copy of the files above --------
section() {
    local began=$SECONDS
    passed=0 failed=0
    mkdir "$1"
    cp -r ./*.txt base "$1"
    cd "$1" || exit 1
    "test_$1"
    [ -z "${TIMES:-}" ] || echo "$1: $passed passed, $((SECONDS - began)) s"
    echo "$passed $failed" >../"$1".count
}
all="kills damage flags signals resume data models users generate disk log keep inspect nan"
for name in ${ONLY:-$all}; do
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
    (section "$name") &
done
wait
for name in *.count; do
    read -r p f <"$name"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
