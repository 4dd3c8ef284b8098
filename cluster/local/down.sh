#!/usr/bin/env bash
# End the processes that up.sh started, and no others.
set -euo pipefail

state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
. "$(dirname "${BASH_SOURCE[0]}")/processes.sh"
[ -f "$state/processes" ] || exit 0

ours=()   # an id that was used again since is another's
while read -r pid started name; do
  if is_ours "$pid" "$started"; then ours+=("$pid"); fi
done < <(tac "$state/processes")
for pid in "${ours[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
end=$((SECONDS + 20))
for pid in "${ours[@]}"; do
  while kill -0 -- "-$pid" 2>/dev/null && [ -n "$(living "$pid")" ] && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  kill -KILL -- "-$pid" 2>/dev/null || true
  for _ in $(seq 50); do [ -n "$(living "$pid")" ] || break; sleep 0.1; done
done
if [ -f "$state/temp" ]; then rm -rf "$(cat "$state/temp")"; fi
rm -f "$state/processes" "$state/env" "$state/token" "$state/temp"
echo "the local cluster is down"
