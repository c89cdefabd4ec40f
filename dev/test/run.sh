#!/bin/sh
# run.sh SUITE...: runs test suites, each a command whose last line is "N passed, N failed", and
# prints the sum as its own last line. A suite that ends without that line counts as one failure.
passed=0 failed=0 log=$(mktemp)
trap 'rm -f "$log"' EXIT
for suite; do
    echo "== $suite"
    # shellcheck disable=SC2086  # a suite is a command with its arguments
    { $suite 2>&1; echo "exit $?"; } | tee "$log"
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$log" | tail -n 1)
    status=$(tail -n 1 "$log") status=${status#exit }
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
