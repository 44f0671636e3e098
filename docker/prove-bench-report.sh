#!/bin/sh
# What `docker compose run report` does: prove and time the suite, prove, plant, train and write the report. Neither keeps the other from
# running; the exit code is the report's if that failed, else the benchmark's.
mkdir -p runs/bench
triptych bench "${TRIPTYCH_SUITE:-quick}" --work runs/bench
bench=$?
triptych report
report=$?
[ "$report" -ne 0 ] && exit "$report"
exit "$bench"
