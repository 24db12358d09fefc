#!/bin/sh
# Runs tests with the given options and paths of pytest. The files in which tests fail run once more, in one
# process: beside other test processes a test may fail because the machine is too busy. The names of what
# failed first are printed last. Such a test is flaky, and has a bug, or Pomelo has one.
noted=.pytest_cache/v/cache/lastfailed
rm -f $noted # not the whole cache, which has packages that tests have downloaded
pytest -rsfE "$@"
status=$?
[ $status -eq 1 ] || exit $status
failed=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1])), sep="\n")' $noted)
# shellcheck disable=SC2046 # one argument for each file
pytest -rfE $(echo "$failed" | sed 's/::.*//' | sort -u)
status=$?
printf 'Failed in the first run:\n%s\n' "$failed"
exit $status
