#!/bin/sh
# mirror.sh: the ops that a layer or the model calls in one of the two programs and not in the other.
# Prints nothing, and exits with 0, when they mirror each other.
ops() {                                 # ops FILE...: what the bodies of layer_* and model_* call
    awk '/^static .*[ *](layer|model)_[a-z_]*\(/ { inside = 1 }
         inside { print }
         /^}/ { inside = 0 }' "$@" |
        grep -oE '\<([a-z0-9_]+_(forward|backward)|classifier|conv1d_past|add_branch|after)\(' | sort -u
}
cpu=$(mktemp) gpu=$(mktemp)
trap 'rm -f "$cpu" "$gpu"' EXIT
ops train_mamba2.c >"$cpu"
ops train_mamba2.cu >"$gpu"
[ -s "$cpu" ] || { echo "train_mamba2.c: no ops were found"; exit 1; }
comm -23 "$cpu" "$gpu" | sed 's/(.*/: only in train_mamba2.c/'
comm -13 "$cpu" "$gpu" | sed 's/(.*/: only in train_mamba2.cu/'
cmp -s "$cpu" "$gpu"
