#!/usr/bin/env bash
# End the processes that up.sh started, and no others.
set -euo pipefail

state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
. "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
[ -f "$state/processes" ] || exit 0

tac "$state/processes" | while read -r pid started name; do
  is_ours "$pid" "$started" && kill -TERM -- "-$pid" 2>/dev/null || true
done
end=$((SECONDS + 20))
while read -r pid started name; do
  while is_ours "$pid" "$started" && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  kill -KILL -- "-$pid" 2>/dev/null || true
  while kill -0 -- "-$pid" 2>/dev/null && [ "$SECONDS" -lt "$((end + 5))" ]; do sleep 0.1; done
done <"$state/processes"
if [ -f "$state/temp" ]; then rm -rf "$(cat "$state/temp")"; fi
rm -f "$state/processes" "$state/env" "$state/token" "$state/temp"
echo "the local cluster is down"
