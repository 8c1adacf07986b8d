#!/usr/bin/env bash
# Submits a run to SLURM, on GPUs: one process per GPU. Requeued after a preemption, a lost node, or its time.
#
#   launch/slurm.sh --name=phi35 --nodes=2 --gpus=8 --time=24:00:00 --sbatch=--partition=gpu [--dry_run] \
#       -- --config=configs/phi35.py --workdir=/shared/runs/phi35 --config.policy.path=...
#
#   --name=NAME           of the job; the same name again while it is queued or runs only says so
#   --nodes=N             default 1
#   --gpus=N              per node; default 8
#   --cpus=N              per GPU; default 8
#   --time=LIMIT          of one stretch, as sbatch reads it; the run may be longer, it is requeued
#   --sbatch=FLAG         a further flag of sbatch (--partition=..., --account=..., --qos=...); repeatable
#   --env=NAME=VALUE      environment variable of the run; repeatable (launch/README.md explains them)
#   --max_restarts=N      requeues in all; default 100
#   --dry_run             print the command and do nothing
#
# The job takes this shell's environment along: activate the Python environment first (PYTHON names another
# python). That environment, this checkout and --workdir are on storage that every node sees. The log is
# NAME-<job id>.log in the current folder. To stop: scancel NUMBER.

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
    --in_job) in_job=1 ;;  # written by this script itself
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
  # SLURM sends SIGTERM to the tasks two minutes before the time is over; saving takes seconds
  run env MSTAR_ROOT="$root" sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --cpus-per-task="$cpus" ${time:+--time="$time"} --requeue --open-mode=append \
    --signal=TERM@120 --output="$name-%j.log" --export=ALL "${sbatch[@]}" \
    "$root/launch/slurm.sh" --in_job "${options[@]}" -- "$@"
  exit
fi

# ---- in the job, on its first node -------------------------------------------------------------------

inherit JAX_PLATFORMS cuda,cpu
inherit TOKENIZERS_PARALLELISM false
inherit PYTHONUNBUFFERED 1
inherit JAX_COMPILATION_CACHE_DIR "$workdir.compiled"
inherit XLA_PYTHON_CLIENT_MEM_FRACTION 0.9
inherit XLA_FLAGS --xla_gpu_enable_latency_hiding_scheduler=true
inherit NCCL_DEBUG WARN

trap : TERM  # the tasks answer it; this shell has to see how they end
cd "$root"
code=0
# Not --kill-on-bad-exit: it would hide the exit code 2 of one task behind the 137 of those it kills. Each
# task sees all GPUs of its node, since JAX gives task i the i-th of them.
srun --wait=120 --cpus-per-task="$cpus" \
  env "${env[@]}" "${PYTHON:-python}" -m mstar_jax.main --distributed "$@" || code=$?

again "$code" "$SECONDS" || exit "$code"
if ((${SLURM_RESTART_COUNT:-0} >= max_restarts)); then
  say "exit code $code after $SLURM_RESTART_COUNT requeues: no more. The same command goes on from here"
  exit "$code"
fi
# A job that SLURM preempts or that scancel ends is not RUNNING any more: the one is requeued by SLURM, the
# other has to stay away
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
if [ "$state" = RUNNING ]; then
  say "exit code $code after $SECONDS s: requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
