#!/bin/sh
# A cluster of two "machines" on one: network namespaces joined by a cable. Needs root, `ip` and ray.
#   two_nodes.sh up            the head at 10.77.0.1:6379 in namespace ncrl-a, a second node in ncrl-b; one CPU each
#   two_nodes.sh run COMMAND   a command on the head's machine
#   two_nodes.sh kill          end every process of the second node (SIGKILL)
#   two_nodes.sh start         start the second node (again)
#   two_nodes.sh down          end everything
set -eu
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
head=10.77.0.1:6379
store=--object-store-memory=200000000
on() { ns=$1; shift; ip netns exec "$ns" "$@"; }
pids() { ip netns pids "$1" 2>/dev/null || true; }
second() { on ncrl-b ray start --address=$head --node-ip-address=10.77.0.2 --num-cpus=1 $store; }
case ${1:-} in
up)
    ray get-auth-token --generate > /dev/null
    chmod 600 "$HOME/.ray/auth_token"
    ip netns add ncrl-a
    ip netns add ncrl-b
    ip link add eth1 netns ncrl-a type veth peer name eth1 netns ncrl-b
    on ncrl-a ip addr add 10.77.0.1/24 dev eth1
    on ncrl-b ip addr add 10.77.0.2/24 dev eth1
    for ns in ncrl-a ncrl-b; do
        on $ns ip link set eth1 up
        on $ns ip link set lo up
    done
    on ncrl-a ray start --head --node-ip-address=10.77.0.1 --port=6379 --num-cpus=1 $store \
        --include-dashboard=false --disable-usage-stats
    second
    ;;
run) shift; exec ip netns exec ncrl-a "$@" ;; # signals arrive at the command
kill) for pid in $(pids ncrl-b); do kill -9 "$pid" 2>/dev/null || true; done ;;
start) second ;;
down)
    for ns in ncrl-a ncrl-b; do
        for pid in $(pids $ns); do kill -9 "$pid" 2>/dev/null || true; done
        ip netns del $ns 2>/dev/null || true
    done
    ;;
*) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
