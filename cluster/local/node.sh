#!/usr/bin/env bash
# Change the nodes of the cluster that up.sh started (in $RAY_DS_CLUSTER_DIR, by default .cluster) while it runs:
#
#   node.sh list                  a line a node: NAME ADDRESS up|changing|down RAY-NODE-ID or -; changing: it starts or ends now
#   node.sh add [NAME]            start one more worker at the next free address; prints its name once it has joined
#   node.sh kill NAME             SIGKILL all its processes at once, those of its jobs too; its network still refuses who asks
#   node.sh start NAME            start a killed node again, at its old address
#   node.sh drain NAME [SECONDS]  a spot notice: Ray starts nothing there any more, and the node is killed after SECONDS (30)
#   node.sh cut NAME              pull its network cable (flavour netns): nothing arrives, nothing is refused, as when the power is gone;
#                                 `heal` plugs it in again
#   node.sh heal NAME
#   node.sh exec NAME COMMAND...  run a command where the node's network is
#   node.sh pids NAME             ids of its processes
#   node.sh restart-head [gcs]    SIGKILL the head (or only its GCS: Ray then ends the rest) and start it again; needs RAY_DS_GCS_STORE
set -euo pipefail
umask 077

here=$(dirname "${BASH_SOURCE[0]}")
state=$(realpath -m "${RAY_DS_CLUSTER_DIR:-.cluster}")
for part in processes nodes network; do . "$here/$part.sh"; done

refuse() {
  echo "node.sh: $1" >&2
  exit 2
}

need_known() {   # NAME
  [ -n "$(address_of "$1")" ] || refuse "the node ${1:-''} must be one of $(awk '{printf "%s ", $1}' "$state/nodes"); see node.sh list."
}

need_running() {   # NAME
  need_known "$1"
  [ -n "$(group_of "$1")" ] || refuse "the node $1 (down) must run; start it with: node.sh start $1"
}

list() {
  local name address group id
  while read -r name address; do
    group=$(group_of "$name") id=
    if [ -n "$group" ]; then id=$(node_id_of "$group"); fi
    if [ -n "$id" ]; then echo "$name $address up $id"
    elif [ -n "$group" ]; then echo "$name $address changing -"
    else echo "$name $address down -"; fi
  done <"$state/nodes"
}

need_cable() {   # NAME
  need_known "$1"
  [ "$flavour" = netns ] || refuse "RAY_DS_LOCAL_FLAVOUR ($flavour) must be netns for a node to have a network of its own; set it for up.sh."
}

start() {   # NAME
  need_known "$1"
  [ -z "$(group_of "$1")" ] || refuse "the node $1 (up) must be down to be started; kill it with: node.sh kill $1"
  [ "$1" != head ] || refuse "the head is started again with: node.sh restart-head"
  kill_node "$1"   # what outlived its `ray start`
  start_worker "$1"
}

add() {   # [NAME]: print the name of the new node
  local count name
  count=$(wc -l <"$state/nodes")
  name=${1:-worker-$count}
  [ -z "$(address_of "$name")" ] || refuse "the node $name (known) must have a new name; start it again with: node.sh start $name"
  echo "$name $subnet.$((count + 2))" >>"$state/nodes"
  if [ "$flavour" = netns ]; then plug_in "$name"; fi
  start_worker "$name"
  echo "$name"
}

drain() {   # NAME SECONDS
  local group
  need_running "$1"
  group=$(group_of "$1")
  in_network head "$ray" drain-node --address "$RAY_ADDRESS" --node-id "$(node_id_of "$group")" \
    --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "spot notice: node.sh drain $1 $2" --deadline-remaining-seconds "$2"
  # At the deadline the machine is gone, unless this run of the node has ended by then.
  setsid "$here/node.sh" kill-after "$2" "$1" "$group" </dev/null >/dev/null 2>&1 9>&- &
  record "$!" "deadline-$1" >>"$state/processes"
}

kill_after() {   # SECONDS NAME GROUP: what drain leaves running
  sleep "$1"
  flock 9
  if [ "$(recorded_group "$2")" = "$3" ]; then kill_node "$2"; fi
  forget "$state/processes" "deadline-$2"
}

restart_head() {   # WHAT: gcs or node
  local group
  [ "$store" != memory ] || refuse "RAY_DS_GCS_STORE (memory) must be redis or rocksdb for a head that is started again; set it for up.sh."
  group=$(group_of head)
  if [ "$1" = gcs ] && [ -n "$group" ]; then
    kill -KILL "$(ps -eo pid=,pgid=,args= | awk -v group="$group" '$2 == group && $3 ~ /gcs_server$/ {print $1}')"
    for _ in $(seq 100); do [ -n "$(group_of head)" ] || break; sleep 0.1; done   # `ray start --block` ends the rest of the head
  fi
  kill_node head
  start_head
}

[ -f "$state/settings" ] || refuse "RAY_DS_CLUSTER_DIR ($state) must be that of a running cluster; start one with: cluster/local/up.sh"
. "$state/settings"
. "$state/env"
. "$state/store_env"
PATH="$(dirname "$ray"):$PATH"
exec 9>"$state/lock"
command=${1:-help} name=${2:-}
case "$command" in list | pids | exec | kill-after | help) ;; *) flock 9 ;; esac
case "$command" in
  list) list ;;
  add)
    name=$(add "$name")
    flock -u 9
    wait_until_joined "$name" 150
    echo "$name"
    ;;
  start)
    start "$name"
    flock -u 9
    wait_until_joined "$name" 150
    ;;
  kill) need_known "$name"; kill_node "$name" ;;
  drain) drain "$name" "${3:-30}" ;;
  kill-after) kill_after "$2" "$3" "$4" ;;
  cut) need_cable "$name"; on_host link set "$(link_of "$name")" down ;;
  heal) need_cable "$name"; on_host link set "$(link_of "$name")" up ;;
  exec) need_known "$name"; exec 9>&-; in_network "$name" "${@:3}" ;;
  pids) need_running "$name"; tree "$(group_of "$name")" "$(mark_of "$name")" ;;
  restart-head)
    case "${name:=node}" in node | gcs) ;; *) refuse "what to restart ($name) must be gcs or left out for the whole head" ;; esac
    restart_head "$name"
    flock -u 9
    wait_until_joined head 90
    ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
