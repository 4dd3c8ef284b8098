#!/usr/bin/env bash
# Start a Ray cluster of three nodes on this host: a head and two workers, token authentication on. A cluster that is up is left as it is,
# and nodes of it that are down are named.
#
#   RAY_DS_CLUSTER_DIR     where its state is kept (process ids, token, logs, environment): .cluster; down.sh ends exactly what was started
#   RAY_DS_LOCAL_FLAVOUR   loopback: nodes at 127.0.0.2 and up; netns: each in its own network namespace at 10.77.N.2 and up (root only;
#                          a driver runs in a node: by `ray job submit`, or `node.sh exec head COMMAND`)
#   RAY_DS_GCS_STORE       memory: a lost head ends the cluster; redis (its own server, or RAY_REDIS_ADDRESS and RAY_REDIS_PASSWORD)
#                          or rocksdb: a head started again (`node.sh restart-head`) finds its nodes, actors and jobs
#   RAY_DS_GCS_PORT, RAY_DS_DASHBOARD_PORT, RAY_DS_WORKER_CPUS, RAY_DS_NODE_MEMORY, RAY_DS_STORE_MEMORY   as their names say; bytes
#
# Nodes are added, killed, drained, cut off and started again with node.sh.
set -euo pipefail
umask 077

here=$(dirname "${BASH_SOURCE[0]}")
state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
flavour=${RAY_DS_LOCAL_FLAVOUR:-loopback}
store=${RAY_DS_GCS_STORE:-memory}
gcs_port=${RAY_DS_GCS_PORT:-6399}
dashboard_port=${RAY_DS_DASHBOARD_PORT:-8299}
worker_cpus=${RAY_DS_WORKER_CPUS:-2}
node_memory=${RAY_DS_NODE_MEMORY:-4000000000}
store_memory=${RAY_DS_STORE_MEMORY:-200000000}
ray=$(command -v ray) || { echo "up.sh: ray is not on PATH; run 'make setup' and activate .venv" >&2; exit 2; }
python=$(dirname "$ray")/python
for part in processes nodes store network; do . "$here/$part.sh"; done

if [ -f "$state/env" ] && all_alive "$state/processes"; then
  echo "the local cluster is up; its environment is in $state/env"
  while read -r name _; do
    [ -n "$(group_of "$name")" ] || echo "its node $name is down; start it again with: $here/node.sh start $name"
  done <"$state/nodes"
  exit 0
fi
"$here/down.sh"

mkdir -p "$state"
case "$flavour" in
  loopback) network='' subnet=127.0.0 dashboard_host=127.0.0.1 ;;
  netns) check_network; make_network; subnet=10.77.$network dashboard_host=$subnet.2 ;;
  *) echo "up.sh: RAY_DS_LOCAL_FLAVOUR ($flavour) must be loopback or netns; unset it for loopback." >&2; exit 2 ;;
esac
head_address=$subnet.2
for port in "$gcs_port" "$dashboard_port"; do
  if [ "$flavour" = loopback ] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "up.sh: port $port (in use) must be free; stop what listens there, or set RAY_DS_GCS_PORT and RAY_DS_DASHBOARD_PORT." >&2
    exit 2
  fi
done
temp=$(mktemp -d "${TMPDIR:-/tmp}/ray_ds.XXXXXX")   # Ray's sockets need a short path
write_settings flavour store network subnet gcs_port dashboard_host dashboard_port head_address worker_cpus node_memory store_memory \
  ray python temp >"$state/settings"
: >"$state/processes"
printf '%s\n' "head $head_address" "worker-1 $subnet.3" "worker-2 $subnet.4" >"$state/nodes"
trap 'if [ "$?" != 0 ]; then echo "up.sh: the cluster did not come up; see $state/*.log" >&2; "$here/down.sh"; fi' EXIT

"$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$state/token"
cat >"$state/env" <<ENV
export RAY_ADDRESS=$head_address:$gcs_port
export RAY_API_SERVER_ADDRESS=http://$dashboard_host:$dashboard_port
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/token
ENV
. "$state/env"
PATH="$(dirname "$ray"):$PATH"

prepare_store "$store" "$subnet.1"
. "$state/store_env"
if [ "$flavour" = netns ]; then for name in head worker-1 worker-2; do plug_in "$name"; done; fi
start_head
for name in worker-1 worker-2; do start_worker "$name"; done
wait_for_port "$dashboard_host" "$dashboard_port" 150 "$state/head.log" "$(recorded_group head)"
for name in head worker-1 worker-2; do wait_until_joined "$name" 150; done
echo "the local cluster is up: 3 nodes, dashboard http://$dashboard_host:$dashboard_port; use it from a shell with: . $state/env"
