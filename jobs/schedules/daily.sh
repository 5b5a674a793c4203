#!/usr/bin/env bash
# One day of a job, for cron or by hand:  LAKE=s3://lake jobs/schedules/daily.sh jobs/classify.yaml [2026-01-31]
# The day is yesterday (UTC) by default. Running it again for the same day is safe: it goes on, or does nothing.
set -uo pipefail

job=${1:?usage: daily.sh JOB.yaml [DAY]}
day=${2:-$(date -u -d yesterday +%F)}
lake=${LAKE:?set LAKE to where the data lies, e.g. LAKE=s3://lake}
tries=${TRIES:-5}
pause=${PAUSE:-600}

child=
stopped=
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT

for ((try = 1; try <= tries; try++)); do
  batchrun run "$job" --set "input.path=$lake/reviews/day=$day/" --set "output.path=$lake/answers/day=$day/" &
  child=$!
  wait "$child"
  code=$?
  [[ -z $stopped ]] || { wait "$child"; code=$?; } # the signal ended `wait`, not yet the run
  child=
  case $code in
    0) exit 0 ;;
    3) echo "$day: complete, some rows failed: see the error column" >&2; exit 0 ;;
    4 | 137) [[ -z $stopped ]] || exit 4 ;; # interrupted, or killed; told to stop: whoever did so starts it again
    *) exit "$code" ;;                      # 1 and 2 want a person; trying again would not help
  esac
  ((try < tries)) || break
  sleep "$pause" & child=$!
  wait "$child"
  [[ -z $stopped ]] || exit 4
done
exit 4
