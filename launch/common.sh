# Sourced by the launchers: their common options, quoting, and when a run is started again. Bash 4.4 or newer.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: needs bash 4.4 or newer, this is $BASH_VERSION" >&2
  exit 2
fi

dry_run=""
max_restarts=20
env=()  # NAME=VALUE, for the process that trains
backoff=${MSTAR_BACKOFF:-10}  # seconds before the first restart; doubled for each further one, up to 300

say() { echo "${0##*/}: $*" >&2; }
die() { say "$*"; exit 2; }

# The comment at the head of the launcher is its --help.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# Text that any shell reads back as exactly these words.
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

# What every launcher understands; a launcher's own options come first.
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
    --*=*) die "unknown option ${1%%=*}; see --help. Flags of mstar_jax.main stand behind a --" ;;
    *) die "unknown option $1; options are written --name=value, see --help. Flags of mstar_jax.main stand behind a --" ;;
  esac
}

# need NAME...: each of these options has to have been given.
need() {
  local option
  for option; do
    [ -n "${!option}" ] || die "--$option=... is missing; see --help"
  done
}

need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || die "$1 is not on the PATH: $2"
}

# Names of machines and jobs, as the stricter of them want it.
check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$1: expected at most 40 small letters, digits and hyphens, with a letter in front"
}

# check_flags FLAG...: what stands behind -- needs a config.
check_flags() {
  [[ " $* " == *" --config="* || " $* " == *" --config "* ]] ||
    die "no --config behind --; for example: ${0##*/} ... -- --config=configs/tiny.py"
}

# find_workdir FLAG...: sets `workdir` to the run's --workdir. Where several hosts work, or another one may go
# on, the default (runs/<config> in the current folder) would be a folder of one host.
find_workdir() {
  workdir=""
  while (($#)); do
    case $1 in
      --workdir=*) workdir=${1#*=} ;;
      --workdir) workdir=${2-} ;;
    esac
    shift
  done
  [ -n "$workdir" ] || die "no --workdir behind --: give a folder on storage that every host sees"
  [[ $workdir == /* ]] || die "--workdir=$workdir: expected an absolute path, on storage that every host sees"
  workdir=${workdir%/}
}

# default NAME VALUE: an environment variable, unless --env gave another value.
default() {
  local given
  for given in "${env[@]}"; do
    if [[ $given == "$1="* ]]; then return; fi
  done
  env+=("$1=$2")
}

# inherit NAME VALUE: the same for a process on this machine, where the caller's own environment counts too.
inherit() { if [ -z "${!1+set}" ]; then default "$1" "$2"; fi; }

# again CODE SECONDS: whether a run that ended so is started again. 143: it was told to go and has saved.
# Above 128: killed, its machine perhaps with it. 75: the launcher found no machine. 1: an error, or on
# several hosts the loss of another one; what ends so within two minutes is an error.
again() {
  case $1 in
    0) return 1 ;;
    2) say "the run cannot be (exit code 2): see its message above"; return 1 ;;
    1) if (($2 < 120)); then say "an error after $2 s (exit code 1); MSTAR_TRACEBACK=1 shows where"; return 1; fi ;;
    75) ;;
    *) if (($1 < 128)); then say "exit code $1"; return 1; fi ;;
  esac
}

# keep_going COMMAND...: runs it until it is done, is impossible, or was restarted --max_restarts times
# without half an hour of work in between. Returns its last exit code.
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
      say "exit code $code after $restarts restarts: no more. The same command goes on from here"
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
