#!/bin/sh
# faults.sh PROGRAM...: builds of faults.cu. Each fault must make one of them say what is expected;
# the first, which is no fault, must leave all of them silent.
export TSAN_OPTIONS="atexit_sleep_ms=0:$TSAN_OPTIONS"
silent='emulate:|Sanitizer|runtime error'
passed=0 failed=0
list=$(mktemp) said=$(mktemp)
trap 'rm -f "$list" "$said"' EXIT
"$1" > "$list"
while IFS='	' read -r number message name; do
    for program; do
        timeout 60 "$program" "$number"
        echo "status $?"
    done > "$said" 2>&1
    found=$(grep -cE "$message" "$said")
    if [ "$number" = 0 ]; then
        grep -qE "$silent" "$said" && found=0
        [ "$found" = $# ] || found=0
    fi
    if [ "$found" -gt 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "not reported: $name"
    fi
done < "$list"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
