#!/usr/bin/env bash
# Trains on a TPU slice: requests it as a queued resource, starts the image on every host, follows the log, and
# requests another slice when this one is preempted.
#
#   launch/tpu_pod.sh --name=phi35 --type=v5litepod-16 --zone=us-west4-a --spot --image=IMAGE \
#       --prepare='sudo mkdir -p /mnt/runs && (mountpoint -q /mnt/runs || sudo mount -t nfs HOST:/runs /mnt/runs)' \
#       --volume=/mnt/runs [--dry_run] \
#       -- --config=configs/phi35.py --workdir=/mnt/runs/phi35 --config.policy.path=/mnt/runs/Phi-3.5-vision-instruct
#
#   --name=NAME           of the queued resource, of its TPU and of the container
#   --type=TYPE           accelerator type: v5litepod-16, v5p-32, v6e-16, ...
#   --zone=ZONE           of the TPU
#   --project=PROJECT     default: gcloud's
#   --spot, --reserved    kind of capacity; default on demand
#   --runtime=VERSION     of the TPU VM's software; default by the type
#   --image=IMAGE         built from launch/Dockerfile with BACKEND=tpu, in a registry that the TPU's service
#                         account can pull from; use a new tag for every build
#   --prepare=COMMAND     run on every host before every start, to mount the storage; must be idempotent
#   --volume=PATH         folder of the hosts, mounted in the container at the same path; repeatable. --workdir
#                         is in one of them, on storage that every host sees
#   --docker=FLAG         a further flag of docker run; repeatable
#   --gcloud=FLAG         a further flag of the request (--network=..., --service-account=...); repeatable
#   --env=NAME=VALUE      environment variable of the run; repeatable (launch/README.md explains them)
#   --max_restarts=N      restarts without half an hour of work in between; default 20
#   --delete              delete the slice when the run has finished
#   --stop                make a running job save and exit (SIGTERM), and do nothing else
#   --dry_run             print the commands and do nothing
#
# Start it where it can keep running, for example under tmux on a small VM: it has to be alive to request the next
# slice. The run itself does not depend on it: the same command again follows what is running.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
. "$root/launch/common.sh"

name="" type="" zone="" project="" capacity="" runtime="" image="" prepare=: delete="" stop=""
volumes=() docker=() request=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --spot | --reserved) capacity=$1 ;;
    --runtime=*) runtime=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --prepare=*) prepare=${1#*=} ;;
    --volume=*) volumes+=("${1#*=}") ;;
    --docker=*) docker+=("${1#*=}") ;;
    --gcloud=*) request+=("${1#*=}") ;;
    --delete) delete=1 ;;
    --stop) stop=1 ;;
    --) shift; break ;;
    *) common_option "$1" ;;
  esac
  shift
done
need name zone
check_name "$name"
need_program gcloud "install the Google Cloud CLI"

tpus=(gcloud compute tpus)
where=("--zone=$zone")
if [ -n "$project" ]; then where+=("--project=$project"); fi

# on_all COMMAND: runs it in a shell on every host. Returns the first exit code that is not 0, or 255 when a host
# cannot be reached.
on_all() { run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

if [ -n "$stop" ]; then
  on_all "sudo docker stop -t 60 $name"
  exit
fi

need type image
check_flags "$@"
find_workdir "$@"
inside=""
for volume in "${volumes[@]}"; do
  [[ $volume == /* && $volume != *[,:]* ]] || die "--volume=$volume: expected an absolute path without , and :"
  if [[ $workdir/ == "${volume%/}/"* ]]; then inside=1; fi
done
[ -n "$inside" ] || die "--workdir=$workdir lies in no --volume: it would be lost with the container"
if [ -z "$runtime" ]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi

default JAX_PLATFORMS tpu,cpu
default PYTHONUNBUFFERED 1
default JAX_COMPILATION_CACHE_DIR "$workdir.compiled"

create=("${tpus[@]}" queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
  --runtime-version="$runtime" "${where[@]}" ${capacity:+"$capacity"} "${request[@]}" --quiet)
remove=("${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet)
describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}" --format='value(state.state)')

# What every host runs. A container that is already running is left alone, so this command, and gcloud's own
# retries, can come at any time. Root in the container: libtpu opens the host's devices.
container=(sudo docker run --detach --name "$name" --privileged --net=host --user=0:0 --ulimit=memlock=-1:-1 \
  --stop-timeout=60 --pull=always)
for volume in "${volumes[@]}"; do container+=(--mount "type=bind,source=$volume,target=$volume"); done
for setting in "${env[@]}"; do container+=(--env "$setting"); done
container+=("${docker[@]}" "$image" --distributed "$@")

start="set -e; $prepare
case \$(sudo docker inspect --format '{{.State.Status}}' $name 2>/dev/null || true) in
  running) echo \"$name runs already on \$(hostname)\"; exit 0 ;;
  ?*) sudo docker rm --force $name >/dev/null ;;
esac
for path in $(quote "${volumes[@]}"); do
  if [ \"\$(findmnt --noheadings --output TARGET --target \"\$path\")\" = / ]; then
    echo \"\$path on \$(hostname) is on its own disk: --prepare has to mount shared storage there\" >&2; exit 1
  fi
done
"
registry=${image%%/*}
if [[ $image == */* && $registry == *.* ]]; then
  start+="sudo gcloud auth configure-docker $(quote "$registry") --quiet >/dev/null 2>&1 || true
"
fi
start+="$(quote "${container[@]}") >/dev/null"
follow="sudo docker logs --follow --tail=100 $name; exit \$(sudo docker wait $name)"

# Prints the state of the queued resource, ABSENT when there is none.
state() {
  local answer try
  for try in 1 2 3 4 5; do
    if answer=$("${describe[@]}" 2>&1); then
      echo "${answer##*$'\n'}"  # gcloud may print remarks before it
      return
    elif [[ $answer == *NOT_FOUND* ]]; then
      echo ABSENT
      return
    elif ((try < 5)); then
      sleep "$backoff"
    fi
  done
  echo "$answer" >&2
  return 1
}

# Waits for the slice; requests one if there is none or it was taken away.
ensure() {
  local now before="" asked=""
  while true; do
    now=$(state) || return 1
    if [ "$now" != "$before" ]; then say "queued resource $name: $now"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      ABSENT) "${create[@]}" || return 1; asked=1; continue ;;
      FAILED)
        if [ -n "$asked" ]; then
          say "the request failed; to see why: $(quote "${describe[@]::${#describe[@]}-1}")"
          return 1
        fi
        "${remove[@]}" || return 1 ;;
      SUSPENDED) "${remove[@]}" || return 1 ;;
    esac
    sleep "$((backoff * 3))"
  done
}

# One attempt at the run, on the present slice or a new one; called by keep_going.
# shellcheck disable=SC2329
attempt() {
  local code=0
  ensure || return 75
  on_all "$start" || code=$?
  if ((code == 0)); then on_all "$follow" || code=$?; fi
  if ((code == 0 || code == 2)); then return "$code"; fi
  # gcloud itself exits with 1 when the slice is gone
  if ((code == 255)) || [ "$(state)" != ACTIVE ]; then return 75; fi
  return "$code"
}

if [ -n "$dry_run" ]; then
  note "unless it exists; one that is SUSPENDED or FAILED is deleted first"
  run "${create[@]}"
  note "until it is ACTIVE"
  run "${describe[@]}"
  note "on every host"
  on_all "$start"
  note "returns the exit code of the run; after a preemption all of this is repeated, up to $max_restarts times"
  on_all "$follow"
  if [ -n "$delete" ]; then
    note "when the run has finished"
    run "${remove[@]}"
  else
    note "the slice is billed until it is deleted: $(quote "${remove[@]}")"
  fi
  exit
fi

ensure || die "no slice: see gcloud's message above"
code=0
keep_going attempt || code=$?
if ((code == 0)) && [ -n "$delete" ]; then
  "${remove[@]}"
else
  say "the slice is still there, and costs; to delete it: $(quote "${remove[@]}")"
fi
exit "$code"
