#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: an XPK workload, that is, a JobSet with one pod per host. Kubernetes
# restarts it after a preemption; nothing has to keep running on this machine.
#
#   launch/gke.sh --name=phi35 --cluster=my-cluster --zone=us-west4-a --type=v5litepod-16 --image=IMAGE \
#       --storage=runs [--dry_run] \
#       -- --config=configs/phi35.py --workdir=/runs/phi35 --config.policy.path=/runs/Phi-3.5-vision-instruct
#
#   --name=NAME           of the workload; the same name again reports its state and restarts it if it failed
#   --cluster=CLUSTER     created by `xpk cluster create` or `xpk cluster adapt`
#   --zone=ZONE           of the cluster
#   --project=PROJECT     default: gcloud's
#   --type=TYPE           TPU type: v5litepod-16, v5p-32, v6e-16, ...
#   --slices=N            default 1
#   --image=IMAGE         built from launch/Dockerfile with BACKEND=tpu USER_ID=0, in a registry that the cluster can pull from
#   --storage=NAME        attached by `xpk storage attach` at a path that contains --workdir; repeatable
#   --xpk=FLAG            a further flag of xpk workload create (--spot, --priority=high); repeatable
#   --env=NAME=VALUE      environment variable of the run; repeatable (launch/README.md explains them)
#   --max_restarts=N      restarts in all; default 20
#   --stop                delete the workload (its pods receive SIGTERM, save and exit) and do nothing else
#   --dry_run             print the commands and do nothing

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
. "$root/launch/common.sh"

name="" cluster="" zone="" project="" type="" slices=1 image="" stop=""
storage=() more=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --storage=*) storage+=("$1") ;;
    --xpk=*) more+=("${1#*=}") ;;
    --stop) stop=1 ;;
    --) shift; break ;;
    *) common_option "$1" ;;
  esac
  shift
done
need name cluster zone
check_name "$name"
need_program xpk "install XPK"
need_program kubectl "install it with the Google Cloud CLI"

where=(--cluster="$cluster" --zone="$zone")
if [ -n "$project" ]; then where+=("--project=$project"); fi
remove=(xpk workload delete --workload="$name" "${where[@]}" --force)

if [ -n "$stop" ]; then
  run "${remove[@]}"
  exit
fi

need type image
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices=$slices: expected a number"
check_flags "$@"
find_workdir "$@"

default JAX_PLATFORMS tpu,cpu
default PYTHONUNBUFFERED 1
default JAX_COMPILATION_CACHE_DIR "$workdir.compiled"

# XPK passes its command to `bash -c` in the pod; `exec` makes SIGTERM reach Python instead of the shell.
# Kubernetes expands $(NAME) and $$ in a pod's command, so each $ is doubled. It would expand them in environment
# variables too, so these are part of the command.
command="exec $(quote env "${env[@]}" python -m mstar_jax.main --distributed "$@")"
command=${command//\$/\$\$}
[[ $command != *$'\n'* ]] || die "a flag or --env with a line break does not survive XPK's manifest"

# XPK retries exit codes 42 and 127 to 255 by itself, which includes 143; a process that lost another host exits
# with 1. 2 is not retried. On a spot VM a pod has 15 s: XPK forwards SIGTERM within 5 s, and the run exits
# within 8 s after that.
create=(xpk workload create --workload="$name" "${where[@]}" --tpu-type="$type" --num-slices="$slices" \
  --docker-image="$image" --command="$command" --max-restarts="$max_restarts" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=60 "${storage[@]}" "${more[@]}")
look=(xpk workload list "${where[@]}" --filter-by-job="$name")  # also points kubectl at the cluster
ask=(kubectl get jobset "$name" --ignore-not-found --output='jsonpath={.metadata.name}:{.status.terminalState}')
logs=(kubectl logs --follow --container=jax-tpu \
  --selector="xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=0")

if [ -n "$dry_run" ]; then
  run "${look[@]}"
  note "empty: create it. NAME:Failed: delete it first. NAME:Completed, or only NAME:, leave it alone"
  run "${ask[@]}"
  run "${create[@]}"
  note "to follow the log"
  run "${logs[@]}"
  exit
fi

"${look[@]}" || die "xpk cannot see the cluster $cluster"
found=$("${ask[@]}") || die "kubectl cannot read JobSets of the cluster $cluster"
case $found in
  "" | :) ;;
  *:Completed) say "$name is done; see $workdir"; exit 0 ;;
  *:Failed) say "$name has failed: deleting it and starting again"; "${remove[@]}" ;;
  *) say "$name is there already; to follow its log: $(quote "${logs[@]}")"; exit 0 ;;
esac
"${create[@]}"
say "to follow its log: $(quote "${logs[@]}")"
