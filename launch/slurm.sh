#!/usr/bin/env bash
# Submits a run to SLURM, on GPUs: one process per GPU. It is requeued after a preemption, a node failure
# or its time limit.
#
#   launch/slurm.sh --name=phi35 --nodes=2 --gpus=8 --time=24:00:00 --sbatch=--partition=gpu [--dry_run] \
#       -- --config=configs/phi35.py --workdir=/shared/runs/phi35 --config.policy.path=...
#
#   --name=NAME           of the job; submitting the name again while it is queued or running only reports that
#   --nodes=N             default 1
#   --gpus=N              per node; default 8
#   --cpus=N              per GPU; default 8
#   --time=LIMIT          time limit in the format of sbatch; a longer run is requeued
#   --sbatch=FLAG         a further flag of sbatch (--partition=..., --account=..., --qos=...); repeatable
#   --env=NAME=VALUE      environment variable of the run; repeatable (launch/README.md explains them)
#   --max_restarts=N      requeues in all; default 100
#   --dry_run             print the command and do nothing
#
# The job inherits this shell's environment: activate the Python environment first (PYTHON names another
# interpreter). That environment, this checkout and --workdir must be on storage that every node sees. The log is
# NAME-<job id>.log in the current folder. To stop the run: scancel <job id>.

set -euo pipefail
root=${MSTAR_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}  # SLURM runs a copy of this file
# shellcheck source=common.sh
. "$root/launch/common.sh"

name="" nodes=1 gpus=8 cpus=8 time="" sbatch=() in_job="" max_restarts=100
options=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --sbatch=*) sbatch+=("${1#*=}") ;;
    --in_job) in_job=1 ;;  # passed by this script itself
    --) shift; break ;;
    *) common_option "$1" ;;
  esac
  if [ "$1" != --dry_run ]; then options+=("$1"); fi
  shift
done
need name
check_name "$name"
for number in nodes gpus cpus; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || die "--$number=${!number}: expected a number"
done
check_flags "$@"
find_workdir "$@"

# ---- on the login node -------------------------------------------------------------------------------

if [ -z "$in_job" ]; then
  need_program sbatch "start this on a login node"
  if [ -z "$dry_run" ]; then
    queued=$(squeue --noheader --user="$(id -un)" --name="$name" --format='%i %T') || die "squeue failed"
    if [ -n "$queued" ]; then
      say "$name is there already: $queued. scancel ${queued%% *} stops it"
      exit 0
    fi
  fi
  # SLURM sends SIGTERM to the tasks two minutes before the time limit; saving takes seconds
  run env MSTAR_ROOT="$root" sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --cpus-per-task="$cpus" ${time:+--time="$time"} --requeue --open-mode=append \
    --signal=TERM@120 --output="$name-%j.log" --export=ALL "${sbatch[@]}" \
    "$root/launch/slurm.sh" --in_job "${options[@]}" -- "$@"
  exit
fi

# ---- in the job, on its first node -------------------------------------------------------------------

inherit JAX_PLATFORMS cuda,cpu
inherit PYTHONUNBUFFERED 1
inherit JAX_COMPILATION_CACHE_DIR "$workdir.compiled"
inherit XLA_PYTHON_CLIENT_MEM_FRACTION 0.9
inherit XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
inherit NCCL_DEBUG WARN

trap : TERM  # the tasks handle it; this shell has to see how they exit
cd "$root"
code=0
# No --kill-on-bad-exit: the 137 of the tasks that it kills would hide the exit code 2 of the first. Each task
# sees all GPUs of its node; JAX gives the i-th GPU to task i.
srun --wait=120 --cpus-per-task="$cpus" \
  env "${env[@]}" "${PYTHON:-python}" -m mstar_jax.main --distributed "$@" || code=$?

again "$code" "$SECONDS" || exit "$code"
if ((${SLURM_RESTART_COUNT:-0} >= max_restarts)); then
  say "exit code $code after $SLURM_RESTART_COUNT requeues: giving up. The same command continues from here"
  exit "$code"
fi
# A job that was preempted or cancelled is no longer RUNNING: SLURM requeues the former itself, and the latter
# must not be requeued
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
if [ "$state" = RUNNING ]; then
  say "exit code $code after $SECONDS s: requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
