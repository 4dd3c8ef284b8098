# Functions that find and end processes: one is known by its id and its start time, so that an id used again is not ours.

start_time() {   # PID: clock ticks since boot at which it started; empty when it is gone
  awk '{sub(/^.*\) /, ""); print $20}' "/proc/$1/stat" 2>/dev/null || true
}

record() {   # PID NAME: print the line that names a process for good
  echo "$1 $(start_time "$1") $2"
}

is_ours() {   # PID START-TIME
  [ -n "$2" ] && [ "$(start_time "$1")" = "$2" ]
}

living() {   # GROUP: ids of the processes of a group that have not ended (a zombie has)
  ps -eo pgid=,pid=,stat= | awk -v group="$1" '$1 == group && $3 !~ /^Z/ {print $2}'
}

all_alive() {   # FILE: whether there are processes in it and all of them run
  [ -s "$1" ] || return 1
  local pid started name
  while read -r pid started name; do
    is_ours "$pid" "$started" || return 1
  done <"$1"
}

forget() {   # FILE NAME: drop the lines of a process from a file
  local left
  left=$(awk -v name="$2" '$3 != name' "$1")
  printf '%s' "${left:+$left$'\n'}" >"$1"
}

tree() {   # GROUP MARK: ids of what runs in a group or has MARK in its environment, and of all their descendants
  local marked
  marked=$(grep -lszxF -- "$2" /proc/[0-9]*/environ | awk -F/ '{printf "%s ", $3}' || true)
  ps -eo pid=,ppid=,pgid=,stat= | awk -v group="$1" -v marked="$marked" '
    BEGIN {split(marked, ids, " "); for (i in ids) ours[ids[i]] = 1}
    $4 !~ /^Z/ {parent[$1] = $2; if ($3 == group) ours[$1] = 1}
    END {
      do {more = 0; for (id in parent) if (!(id in ours) && parent[id] in ours) {ours[id] = 1; more = 1}} while (more)
      for (id in ours) if (id in parent) print id
    }'
}

kill_tree() {   # GROUP MARK: end at once all that belongs together
  local pid stopped=" " more=1
  while [ "$more" = 1 ]; do   # stopped first, so that nothing new is started meanwhile and nobody says goodbye
    more=0
    for pid in $(tree "$1" "$2"); do
      case "$stopped" in *" $pid "*) continue ;; esac
      kill -STOP "$pid" 2>/dev/null || true
      stopped="$stopped$pid "
      more=1
    done
  done
  # shellcheck disable=SC2086
  kill -KILL $stopped 2>/dev/null || true
  for pid in $stopped; do
    for _ in $(seq 100); do [ -n "$(ps -o stat= -p "$pid" | grep -v '^Z')" ] || break; sleep 0.05; done
  done
}

wait_for_port() {   # HOST PORT SECONDS LOG GROUP: wait until something listens, as long as a group of processes runs that should
  local end=$((SECONDS + $3))
  until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
    if [ "$SECONDS" -ge "$end" ] || ! kill -0 "$5" 2>/dev/null; then
      echo "nothing listens on port $2 of $1 (it had $3 s); the end of $4:" >&2
      tail -n 20 "$4" >&2
      return 1
    fi
    sleep 0.2
  done
}
