#!/usr/bin/env bash
# Start a Ray cluster of three nodes on loopback: a head and two workers, token authentication on.
# State (process ids, token, logs, environment) is kept in $RAY_DS_CLUSTER_DIR, by default .cluster; down.sh ends exactly
# what was started here. A cluster that is up already is left as it is.
set -euo pipefail
umask 077

state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
gcs_port=${RAY_DS_GCS_PORT:-6399}
dashboard_port=${RAY_DS_DASHBOARD_PORT:-8299}
worker_cpus=${RAY_DS_WORKER_CPUS:-2}
node_memory=${RAY_DS_NODE_MEMORY:-4000000000}
store_memory=${RAY_DS_STORE_MEMORY:-200000000}
ray=$(command -v ray) || { echo "up.sh: ray is not on PATH; run 'make setup' and activate .venv" >&2; exit 2; }
python=$(dirname "$ray")/python

. "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

if [ -f "$state/env" ] && all_alive "$state/processes"; then
  echo "the local cluster is up; its environment is in $state/env"
  exit 0
fi
"$(dirname "${BASH_SOURCE[0]}")/down.sh"
for port in "$gcs_port" "$dashboard_port"; do
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "up.sh: port $port (in use) must be free; stop what listens there, or set RAY_DS_GCS_PORT and RAY_DS_DASHBOARD_PORT." >&2
    exit 2
  fi
done

mkdir -p "$state"
temp=$(mktemp -d "${TMPDIR:-/tmp}/ray_ds.XXXXXX")   # Ray's sockets need a short path
echo "$temp" >"$state/temp"
"$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
cat >"$state/env" <<ENV
export RAY_ADDRESS=127.0.0.2:$gcs_port
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard_port
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
ENV
. "$state/env"
# A head that is told to end waits 30 s for its node to drain, unless told otherwise.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=1
export PATH="$(dirname "$ray"):$PATH" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0

start_node() {   # NAME ARGUMENT...: run one node in its own process group and record it
  local name=$1; shift
  setsid env -u RAY_ADDRESS "$ray" start --block --disable-usage-stats --dashboard-agent-listen-port=0 \
    --object-store-memory="$store_memory" --memory="$node_memory" "$@" >"$state/$name.log" 2>&1 </dev/null &
  record "$!" "$name" >>"$state/processes"
}

: >"$state/processes"
start_node head --head --node-ip-address=127.0.0.2 --port="$gcs_port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" \
  --num-cpus=1 --temp-dir="$temp" --include-dashboard=true
wait_for_port 127.0.0.2 "$gcs_port" 60 "$state/head.log"
for number in 1 2; do   # folders of their own, as on machines of their own: a node that joins unpacks a job's files anew
  start_node "worker-$number" --node-ip-address="127.0.0.$((number + 2))" --address="127.0.0.2:$gcs_port" \
    --num-cpus="$worker_cpus" --temp-dir="$temp/$number"
done
wait_for_port 127.0.0.1 "$dashboard_port" 90 "$state/head.log"
"$python" -m ray_ds.on_ray.session --wait-for-nodes 3 --timeout-s 90 || {
  echo "up.sh: the cluster did not come up; see $state/*.log" >&2
  "$(dirname "${BASH_SOURCE[0]}")/down.sh"
  exit 1
}
echo "the local cluster is up: 3 nodes, dashboard http://127.0.0.1:$dashboard_port; use it from a shell with: . $state/env"
