# Sourced by the launchers: common options, quoting, and restarts. Needs bash 4.4 or newer.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: needs bash 4.4 or newer, this is $BASH_VERSION" >&2
  exit 2
fi

dry_run=""
max_restarts=20
env=()  # NAME=VALUE, for the process that trains
backoff=${MSTAR_BACKOFF:-10}  # seconds before the first restart; doubles with each restart, up to 300

say() { echo "${0##*/}: $*" >&2; }
die() { say "$*"; exit 2; }

# Prints the comment at the top of the launcher, which is its --help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Quotes words so that any shell reads them back unchanged.
quote() {
  local word line="" quoted="'\\''"
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word="'${word//\'/$quoted}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command; with --dry_run prints it instead.
run() {
  if [ -n "$dry_run" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Prints a comment between the commands of --dry_run.
note() { if [ -n "$dry_run" ]; then echo "# $*"; fi; }

# Options that every launcher has. A launcher parses its own options first and passes on the rest.
common_option() {
  case $1 in
    --dry_run) dry_run=1 ;;
    --env=[A-Za-z_]*=*) env+=("${1#--env=}") ;;
    --env | --env=*) die "$1: expected --env=NAME=VALUE" ;;
    --max_restarts=*)
      max_restarts=${1#*=}
      [[ $max_restarts =~ ^[0-9]+$ ]] || die "$1: expected a number"
      ;;
    --help | -h) usage; exit 0 ;;
    --*=*) die "unknown option ${1%%=*}; see --help. Flags of mstar_jax.main go after a --" ;;
    *) die "unknown option $1; options are written --name=value, see --help. Flags of mstar_jax.main go after a --" ;;
  esac
}

# need NAME...: fails unless each of these options was given.
need() {
  local option
  for option; do
    [ -n "${!option}" ] || die "--$option=... is missing; see --help"
  done
}

need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || die "$1 is not on the PATH: $2"
}

# Names of machines and jobs: what the strictest of the systems accepts.
check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$1: expected at most 40 lower-case letters, digits and hyphens, starting with a letter"
}

# check_flags FLAG...: the flags after -- must include a config.
check_flags() {
  [[ " $* " == *" --config="* || " $* " == *" --config "* ]] ||
    die "no --config after --; for example: ${0##*/} ... -- --config=configs/tiny.py"
}

# find_workdir FLAG...: sets `workdir` to the run's --workdir, which is required where there are several hosts or
# a restart may land on another one: the default (runs/<config> in the current folder) is local to one host.
find_workdir() {
  workdir=""
  while (($#)); do
    case $1 in
      --workdir=*) workdir=${1#*=} ;;
      --workdir) workdir=${2-} ;;
    esac
    shift
  done
  [ -n "$workdir" ] || die "no --workdir after --: give a folder on storage that every host sees"
  [[ $workdir == /* ]] || die "--workdir=$workdir: expected an absolute path, on storage that every host sees"
  workdir=${workdir%/}
}

# default NAME VALUE: sets an environment variable unless --env has set it.
default() {
  local given
  for given in "${env[@]}"; do
    if [[ $given == "$1="* ]]; then return; fi
  done
  env+=("$1=$2")
}

# inherit NAME VALUE: the same for a process on this machine, which also keeps the caller's own value.
inherit() { if [ -z "${!1+set}" ]; then default "$1" "$2"; fi; }

# again CODE SECONDS: whether to restart a run that ended with this exit code after this time. 143: it received
# SIGTERM and has saved. Above 128: killed, perhaps along with its machine. 75: the launcher found no machine.
# 1: an error or, on several hosts, the loss of another host; within two minutes it is taken for an error.
again() {
  case $1 in
    0) return 1 ;;
    2) say "the config is not possible (exit code 2): see the message above"; return 1 ;;
    1) if (($2 < 120)); then say "an error after $2 s (exit code 1); MSTAR_TRACEBACK=1 shows where"; return 1; fi ;;
    75) ;;
    *) if (($1 < 128)); then say "exit code $1"; return 1; fi ;;
  esac
}

# keep_going COMMAND...: runs it until it succeeds, cannot succeed, or has been restarted --max_restarts times
# without half an hour of work in between. Returns the last exit code.
keep_going() {
  local restarts=0 wait=$backoff code begun spent
  while true; do
    begun=$SECONDS
    code=0
    "$@" || code=$?
    spent=$((SECONDS - begun))
    if [ -n "${stopping-}" ] || ! again "$code" "$spent"; then return "$code"; fi
    if ((spent >= 1800)); then
      restarts=0
      wait=$backoff
    fi
    if ((restarts >= max_restarts)); then
      say "exit code $code after $restarts restarts: giving up. The same command continues from here"
      return "$code"
    fi
    restarts=$((restarts + 1))
    say "exit code $code after $spent s: restart $restarts of $max_restarts in $wait s"
    sleep "$wait" &
    wait $! || kill $! 2>/dev/null || true
    if [ -n "${stopping-}" ]; then return "$code"; fi
    wait=$((wait * 2 > 300 ? 300 : wait * 2))
  done
}
