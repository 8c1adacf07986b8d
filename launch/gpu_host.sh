#!/usr/bin/env bash
# Trains on this machine, with all of its GPUs (or on its CPU), and restarts after a preemption.
#
#   launch/gpu_host.sh -- --config=configs/phi35.py --workdir=/data/runs/phi35 --config.policy.path=...
#
#   --env=NAME=VALUE      environment variable of the run; repeatable (launch/README.md explains them)
#   --max_restarts=N      restarts without half an hour of work in between; default 20
#   --cpu                 run on the CPU
#   --dry_run             print the command and do nothing
#
# SIGTERM and Ctrl-C are forwarded: the run saves and exits, and is not restarted. PYTHON is the interpreter to
# use; default python. For several hosts without SLURM, start this on each of them, with
#   -- --coordinator=HOST0:8476 --num_processes=2 --process_id=0 ...      (1 on the second host)

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
. "$root/launch/common.sh"

platforms=cuda,cpu
while (($#)); do
  case $1 in
    --cpu) platforms=cpu ;;
    --) shift; break ;;
    *) common_option "$1" ;;
  esac
  shift
done
check_flags "$@"

inherit JAX_PLATFORMS "$platforms"
inherit PYTHONUNBUFFERED 1
if [ "$platforms" != cpu ]; then
  inherit XLA_PYTHON_CLIENT_MEM_FRACTION 0.9
  inherit XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
fi
command=(env "${env[@]}" "${PYTHON:-python}" -m mstar_jax.main "$@")

run cd "$root"
if [ -n "$dry_run" ]; then
  run "${command[@]}"
  exit
fi
need_program "${PYTHON:-python}" "activate the environment that mstar_jax is installed in"

stopping="" child=""
trap 'stopping=1; kill -TERM $child 2>/dev/null || true' TERM INT

# In the background: bash runs a trap only between commands, and a signal interrupts `wait`.
attempt() {
  local code=0
  "${command[@]}" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=""
  return "$code"
}

keep_going attempt
