# Functions for the place where the head keeps its tables (GCS): memory, or one that a head started again reads: redis or rocksdb.

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_redis() {   # ADDRESS: run a redis-server of this cluster's own, with a password, and record it
  local server port password
  server=$(command -v redis-server) || {
    echo "up.sh: RAY_DS_GCS_STORE (redis) needs redis-server on PATH; install Debian's redis-server, or set RAY_REDIS_ADDRESS to one that runs." >&2
    exit 2
  }
  port=$(free_port)
  password=$("$python" -c 'import secrets; print(secrets.token_hex(32), end="")')
  mkdir -p "$state/redis"
  cat >"$state/redis/redis.conf" <<CONF
bind $1
port $port
requirepass $password
dir $state/redis
appendonly yes
save ""
CONF
  setsid env -u RAY_ADDRESS "$(mark_of redis)" "$server" "$state/redis/redis.conf" >"$state/redis.log" 2>&1 </dev/null 9>&- &
  record "$!" redis >>"$state/processes"
  wait_for_port "$1" "$port" 20 "$state/redis.log" "$(recorded_group redis)"
  RAY_REDIS_ADDRESS=$1:$port
  RAY_REDIS_PASSWORD=$password
}

prepare_store() {   # KIND ADDRESS: write $state/store_env, which starting a node needs, for a store that listens at ADDRESS if it must
  local namespace
  store_arguments=()
  case "$1" in
    memory) : >"$state/store_env" ;;
    redis)
      [ -n "${RAY_REDIS_ADDRESS:-}" ] || start_redis "$2"
      namespace=$("$python" -c 'import secrets; print("ray_ds_" + secrets.token_hex(8), end="")')   # a given server may hold others'
      store_arguments=(--redis-password="${RAY_REDIS_PASSWORD:-}")
      write_settings RAY_REDIS_ADDRESS >"$state/store_env"
      echo "export RAY_REDIS_ADDRESS RAY_external_storage_namespace=$namespace" >>"$state/store_env"
      ;;
    rocksdb)
      mkdir -p "$state/rocksdb"
      printf 'export RAY_gcs_storage=rocksdb RAY_gcs_storage_path=%q\n' "$state/rocksdb" >"$state/store_env"
      ;;
    *)
      echo "up.sh: RAY_DS_GCS_STORE ($1) must be memory, redis or rocksdb; unset it for memory." >&2
      exit 2
      ;;
  esac
  echo "store_arguments=(${store_arguments[*]@Q})" >>"$state/store_env"
  if [ "$1" != memory ]; then   # nodes and drivers wait this long for the head; Ray's own 60 s are few for a machine that boots
    echo "export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-300}" | tee -a "$state/env" >>"$state/store_env"
  fi
}
