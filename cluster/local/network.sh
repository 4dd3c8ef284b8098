# Functions for the flavour "netns": each node in a network namespace with an address of its own, all on one bridge. What they make is
# named after the network's number N: bridge rdsN, namespaces ray-ds-N-NAME, for the K-th node the link rdsN-K on the host's side, and
# ray-ds-N as a name of the host's own namespace, so that a process in a node can change the cluster too.

namespace_of() {   # NAME
  echo "ray-ds-$network-$1"
}

on_host() {   # ARGUMENT...: `ip` where the bridge is
  ip -n "ray-ds-$network" "$@"
}

link_of() {   # NAME: this host's end of a node's cable
  echo "rds$network-$(awk -v name="$1" '$1 == name {print NR}' "$state/nodes")"
}

check_network() {
  if [ "$(id -u)" != 0 ] || ! command -v ip >/dev/null || ! unshare --net true 2>/dev/null; then
    echo "up.sh: RAY_DS_LOCAL_FLAVOUR (netns) needs root that may make network namespaces, and ip of iproute2; unset it for nodes on loopback." >&2
    exit 2
  fi
}

make_network() {   # set $network to a free number, and make its bridge with the address 10.77.N.1
  for network in $(seq 1 254); do
    [ -z "$(ip -4 route list "10.77.$network.0/24")" ] || continue
    if ip link add "rds$network" type bridge 2>/dev/null; then
      ip netns attach "ray-ds-$network" "$$"
      ip address add "10.77.$network.1/24" dev "rds$network"
      ip link set "rds$network" up
      return
    fi
  done
  echo "up.sh: no free network among 10.77.1.0/24 to 10.77.254.0/24; remove bridges that are left (ip link delete rdsN)." >&2
  exit 2
}

plug_in() {   # NAME: give a node its namespace and cable, unless it has them
  local space link
  space=$(namespace_of "$1")
  link=$(link_of "$1")
  if [ -e "/run/netns/$space" ]; then return; fi
  ip netns add "$space"
  on_host link add "$link" type veth peer name eth0 netns "$space"
  on_host link set "$link" master "rds$network" up
  ip -n "$space" address add "$(address_of "$1")/24" dev eth0
  ip -n "$space" link set eth0 up
  ip -n "$space" link set lo up
}

remove_network() {   # unmake exactly what was made for this cluster
  local name address
  while read -r name address; do
    on_host link delete "$(link_of "$name")" 2>/dev/null || true
    ip netns delete "$(namespace_of "$name")" 2>/dev/null || true
  done <"$state/nodes"
  on_host link delete "rds$network" 2>/dev/null || true
  ip netns delete "ray-ds-$network" 2>/dev/null || true
}
