#!/bin/sh
# run.sh SUITE...: runs test suites, each a command whose last line is "N passed, N failed", and
# prints the sum as its own last line. A suite that ends without that line counts as one failure.
# JOBS=2: two at a time; what a suite says is printed when it ends.
logs=$(mktemp -d) n=0
trap 'rm -rf "$logs"' EXIT
for suite; do
    n=$((n + 1))
    printf '%s\0' "{ echo '== $suite'; $suite; echo \"exit \$?\"; } >$logs/$n 2>&1; cat $logs/$n"
done | xargs -0 -n 1 -P "${JOBS:-1}" env -u JOBS sh -c
passed=0 failed=0 n=0
for suite; do
    n=$((n + 1))
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$logs/$n" | tail -n 1)
    status=$(tail -n 1 "$logs/$n") status=${status#exit }
    if [ -n "$line" ]; then
        passed=$((passed + ${line%% passed*})) fails=${line#*, }
        failed=$((failed + ${fails%% failed}))
        case "$status:$fails" in 0:*|*:[1-9]*) ;; *) failed=$((failed + 1)) ;; esac
    else
        echo "== $suite: no result (exit status $status)"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
