# Functions for up.sh and down.sh: a process is known by its id and its start time, so that an id used again is not ours.

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

wait_for_port() {   # HOST PORT SECONDS LOG
  local end=$((SECONDS + $3))
  until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
    if [ "$SECONDS" -ge "$end" ]; then
      echo "up.sh: nothing listens on port $2 after $3 s; the end of $4:" >&2
      tail -n 20 "$4" >&2
      exit 1
    fi
    sleep 0.2
  done
}
