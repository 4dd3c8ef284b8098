#!/usr/bin/env bash
# End the processes that up.sh and node.sh started, and no others.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
for part in processes nodes network; do . "$here/$part.sh"; done
[ -f "$state/processes" ] || exit 0

ours=()   # an id that was used again since is another's
while read -r pid started name; do
  if is_ours "$pid" "$started"; then ours+=("$pid $name"); fi
done < <(tac "$state/processes")
for one in "${ours[@]}"; do kill -TERM -- "-${one% *}" 2>/dev/null || true; done
end=$((SECONDS + 20))
for one in "${ours[@]}"; do
  while [ -n "$(living "${one% *}")" ] && [ "$SECONDS" -lt "$end" ]; do sleep 0.2; done
  kill_tree "${one% *}" "$(mark_of "${one#* }")"   # what did not listen, and what jobs started in groups of their own
done
if [ -f "$state/settings" ]; then
  . "$state/settings"
  rm -rf "$temp"
  if [ "$flavour" = netns ]; then remove_network; fi
fi
rm -rf "$state"/{processes,nodes,settings,store_env,env,token,lock,redis,rocksdb}
echo "the local cluster is down"
