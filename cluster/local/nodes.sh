# Functions that start and end nodes of a cluster whose settings up.sh wrote down. One line a node in $state/nodes, "NAME ADDRESS",
# stays when the node is killed; one line a process group in $state/processes, "PID START-TIME NAME", goes with it.

# How the head finds a dead node: it asks each every half second. A dead process refuses at once (found after 4 questions, 2 s), one that
# is cut off or stopped lets each question run out (4 * 3.5 s), one that stalls for a few seconds answers the next.
export RAY_health_check_initial_delay_ms=${RAY_health_check_initial_delay_ms:-1000}
export RAY_health_check_period_ms=${RAY_health_check_period_ms:-500}
export RAY_health_check_timeout_ms=${RAY_health_check_timeout_ms:-3000}
export RAY_health_check_failure_threshold=${RAY_health_check_failure_threshold:-4}
# `ray job stop` gives a job this long from SIGTERM to SIGKILL; a checkpoint takes longer than Ray's 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60}
# A head that is told to end waits 30 s for its node to drain, unless told otherwise.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-1}
export RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_UV_RUN_RUNTIME_ENV=0

write_settings() {   # NAME...: print shell variables so that node.sh reads them as they are now
  local name
  for name in "$@"; do printf '%s=%q\n' "$name" "${!name}"; done
}

address_of() {   # NAME: its address; nothing when there is no such node
  awk -v name="$1" '$1 == name {print $2}' "$state/nodes"
}

group_of() {   # NAME: the id of the node's process group; nothing when it does not run
  local pid started name
  while read -r pid started name; do
    if [ "$name" = "$1" ] && is_ours "$pid" "$started"; then echo "$pid"; fi
  done <"$state/processes"
}

recorded_group() {   # NAME: the id that was written down, whether or not it runs
  awk -v name="$1" '$3 == name {print $1}' "$state/processes"
}

mark_of() {   # NAME: what each process of a node has in its environment
  echo "RAY_DS_LOCAL_NODE=$state/$1"
}

node_id_of() {   # GROUP: Ray's id of a node, from the arguments of its raylet
  local pid
  for pid in $(living "$1"); do
    tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | sed -n 's/^--node_id=//p'
  done | head -n 1
}

in_network() {   # NAME COMMAND...: run a command where a node's network is
  if [ "$flavour" = netns ]; then nsenter --net="/run/netns/$(namespace_of "$1")" "${@:2}"; else "${@:2}"; fi
}

start_node() {   # NAME ARGUMENT...: run one node in its own process group and record it
  local name=$1; shift
  local place=(env -u RAY_ADDRESS)
  if [ "$flavour" = netns ]; then   # gloo would take the host's name for the node's address
    place=(nsenter --net="/run/netns/$(namespace_of "$name")" "${place[@]}" GLOO_SOCKET_IFNAME=eth0)
  fi
  setsid "${place[@]}" "$(mark_of "$name")" "$ray" start --block --disable-usage-stats --dashboard-agent-listen-port=0 \
    --object-store-memory="$store_memory" --memory="$node_memory" --node-ip-address="$(address_of "$name")" "$@" \
    >"$state/$name.log" 2>&1 </dev/null 9>&- &
  record "$!" "$name" >>"$state/processes"
}

start_head() {   # run the head; started again it takes over what the store of its tables holds
  rm -f "$temp/ray_current_cluster"   # with it Ray takes a raylet of another node on this host for a head that runs already
  start_node head --head --port="$gcs_port" --dashboard-host="$dashboard_host" --dashboard-port="$dashboard_port" \
    --num-cpus=1 --temp-dir="$temp" --include-dashboard=true "${store_arguments[@]}"
  wait_for_port "$head_address" "$gcs_port" 60 "$state/head.log" "$(recorded_group head)"
}

start_worker() {   # NAME: run a worker; folders of its own, as on a machine of its own: a node that joins unpacks a job's files anew
  start_node "$1" --address="$head_address:$gcs_port" --num-cpus="${RAY_DS_WORKER_CPUS:-$worker_cpus}" --temp-dir="$temp/$1"
}

wait_until_joined() {   # NAME SECONDS: a worker that gives up (Ray has a fixed 30 s, few for a host at full load) is started again
  local end=$((SECONDS + $2)) name=$1
  until grep -q "Ray runtime started" "$state/$name.log"; do
    if [ -z "$(group_of "$name")" ] && [ "$name" != head ] && [ "$SECONDS" -lt "$end" ] && grep -q "timed out during startup" "$state/$name.log"; then
      kill_node "$name"
      start_worker "$name"
    elif [ "$SECONDS" -ge "$end" ] || [ -z "$(group_of "$name")" ]; then
      echo "the node $name did not come up (it had $2 s); the end of $state/$name.log:" >&2
      tail -n 20 "$state/$name.log" >&2
      return 1
    fi
    sleep 0.1
  done
}

kill_node() {   # NAME: SIGKILL everything of a node at once, workers and what jobs started included
  local group
  group=$(group_of "$1")
  kill_tree "${group:-none}" "$(mark_of "$1")"
  forget "$state/processes" "$1"
}
