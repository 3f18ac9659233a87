#!/usr/bin/env bash
# launch.sh: set up, start, stop, resume and watch every job of this project.
#
#   ./launch.sh setup                   make .venv and install requirements.txt (uv where it can, else pip)
#   ./launch.sh demo                    speech in, 48 kHz voice out, on the embedded speech; minutes on a CPU
#   ./launch.sh test [pytest args]      ruff, shellcheck, tests
#   ./launch.sh precompute GPUS [args]  48 kHz targets of both splits (precompute_48k.py, one process a GPU)
#   ./launch.sh cache      GPUS [args]  codes of both splits          (cache_codes.py, one process a GPU)
#   ./launch.sh train      GPUS [args]  dual-head training       (train_dual_head.py, several GPUs: torchrun)
#   ./launch.sh rvq        GPUS [args]  language model of tokens (train_rvq.py, several GPUs: torchrun)
#   ./launch.sh workflow   GPUS [--input_dir DIR] [args]   prepare, precompute, cache, train: one job, restartable
#   ./launch.sh status                  every job: RUNNING, FINISHED, STOPPED, DEAD(exit code) or STALE_PID
#   ./launch.sh stop NAME               TERM to that job's process group, KILL after STOP_GRACE (60) seconds
#   ./launch.sh resume NAME             start a stopped or dead job again, from its newest checkpoint
#   ./launch.sh logs NAME               follow its log
#   ./launch.sh monitor [args]          the terminal UI
#
# GPUS is 3, 0,1,2,3 or cpu (cpu,cpu: a training in two processes); where a scheduler has set CUDA_VISIBLE_DEVICES,
# the numbers are places in it. A training on two machines: on each of them
#   NNODES=2 NODE_RANK=0|1 MASTER=FIRST_HOST:29500 ./launch.sh train 0,1,2,3 [the same args]
# or srun ./launch.sh train 0,1,2,3 in a Slurm job, where what is started is waited for (elsewhere: FOREGROUND=1).
#
# Recordings, targets and codes lie in corpus/, targets/ and codes/ below this folder or DATA_ROOT (--data_root),
# unless flags name others. A training goes on where its folder holds a checkpoint. Jobs are named by what they do,
# train_phase12_gpu3, cache_train_gpu0, precompute_cpu …; train_gpu3 is enough where only one is meant. LOG_DIR
# (logs) holds NAME.log, NAME.pid (pid, kernel start time, command) and NAME.json. Jobs run in their own session:
# closing the terminal does not end them. Extra arguments go to the script as they are.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LOG_DIR=${LOG_DIR:-$ROOT/logs}
VENV=${VENV:-$ROOT/.venv}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID} # GPU numbers as nvidia-smi shows them

abort() {
  printf 'launch.sh: %s\n' "$*" >&2
  exit 1
}

usage() { sed -n '2,/^set -euo/{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# ---- setup ----

find_python() {
  local p
  for p in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    command -v "$p" >/dev/null || continue
    "$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { printf '%s' "$p"; return; }
  done
  abort "no Python 3.11 to 3.13 found; install one, or name it: PYTHON=/path/to/python ./launch.sh setup"
}

ready() { # whether the venv holds what requirements.txt names; also one that `uv pip install -r` filled
  [ -x "$VENV/bin/python" ] || return 1
  cmp -s "$ROOT/requirements.txt" "$VENV/.installed" && return
  "$VENV/bin/python" - "$ROOT/requirements.txt" <<'PY' && cp "$ROOT/requirements.txt" "$VENV/.installed"
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    for line in open(sys.argv[1]):
        name, _, wanted = line.partition("#")[0].strip().partition("==")
        if name and version(name).partition("+")[0] != wanted:
            sys.exit(1)
except PackageNotFoundError:
    sys.exit(1)
PY
}

setup() {
  if ready; then
    echo "setup: $VENV is up to date with requirements.txt"
    return
  fi
  local python
  python=$(find_python)
  echo "setup: $("$python" --version), installing requirements.txt into $VENV (a few minutes the first time)"
  # uv ignores pip's configuration: where that names other package sources (an air-gapped mirror, a folder of
  # wheels), pip finds what uv would not.
  if command -v uv >/dev/null && [ -z "${PIP_FIND_LINKS:-}${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ] \
    && ! "$python" -m pip config list 2>/dev/null | grep -qE 'find-links|index-url'; then
    uv venv --quiet --allow-existing --python "$python" "$VENV"
    uv pip install --quiet --python "$VENV/bin/python" -r "$ROOT/requirements.txt"
  else
    "$python" -m venv "$VENV" || abort "could not make $VENV; on Debian or Ubuntu: apt install python3-venv"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" \
      || abort "pip could not install requirements.txt (see above)"
  fi
  cp "$ROOT/requirements.txt" "$VENV/.installed"
  echo "setup: done; torch $("$VENV/bin/python" -c 'import torch; print(torch.__version__, "with CUDA" if torch.cuda.is_available() else "on CPU")')"
}

need_setup() { ready || abort "not set up yet (or requirements.txt changed): run ./launch.sh setup"; }

run_tests() {
  setup
  cd "$ROOT"
  "$VENV/bin/ruff" check .
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/shellcheck" launch.sh .ci/run
  "$VENV/bin/python" -m pytest -q -rs -n auto --dist loadfile "$@"
}

# ---- process truth ----

ask() { # CODE ARGS...: run a bit of Python beside snac48/process.py, whose word on processes is the monitor's too
  local code=$1 python=$VENV/bin/python
  shift
  [ -x "$python" ] || python=$(find_python)
  # -S: the standard library is enough, and without the rest it answers within 20 ms
  "$python" -S -c "import sys; sys.path.insert(0, sys.argv.pop(1)); from snac48 import jobs; from snac48.process import descendants, start_time
$code" "$ROOT" "$@"
}

alive() { # is the job that NAME.pid describes alive? Sets PID and STATE: RUNNING, DEAD, STALE_PID or None
  local told
  told=$(ask 'print(*jobs.job_state(sys.argv[1]))' "$LOG_DIR/$1.pid") || abort "nobody can tell whether $1 runs"
  read -r STATE PID <<<"$told"
  [ "$STATE" = RUNNING ]
}

state_of() { ask 'print(jobs.job_word(*sys.argv[1:]))' "$LOG_DIR" "$1"; } # what `status` calls it

# ---- start ----

option() { # value of --NAME in the remaining arguments, or nothing
  local want=$1 previous='' arg
  shift
  for arg in "$@"; do
    case $arg in "$want="*) printf '%s' "${arg#*=}"; return ;; esac
    [ "$previous" = "$want" ] && { printf '%s' "$arg"; return; }
    previous=$arg
  done
}

visible() { # the GPUs that are ours, one a line: those of CUDA_VISIBLE_DEVICES, else all
  if [ -n "${CUDA_VISIBLE_DEVICES+x}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^$/d'
  else
    nvidia-smi --query-gpu=index --format=csv,noheader
  fi
}

take_gpus() { # GPUS: several of them become CUDA_VISIBLE_DEVICES, of which torchrun's processes take one each
  local gpu chosen=''
  local -a ours
  [[ $1 == *,* ]] || return 0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what torchrun sets, too, with five lines about it
  [[ $1 != cpu* ]] || return 0
  mapfile -t ours < <(visible)
  for gpu in ${1//,/ }; do chosen+=,${ours[gpu]}; done
  export CUDA_VISIBLE_DEVICES=${chosen#,}
}

find_nodes() { # sets NNODES, NODE_RANK and MASTER of a training: as given, else as srun says, else one machine
  local first
  if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
    [ "${SLURM_LOCALID:-0}" = 0 ] || abort "start one task a machine (srun --ntasks-per-node=1): torchrun starts a process a GPU"
    first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" 2>/dev/null | head -n 1) || first=
    first=${first:-${SLURM_LAUNCH_NODE_IPADDR:-}}
    NNODES=$SLURM_STEP_NUM_NODES NODE_RANK=$SLURM_NODEID MASTER=${MASTER:-$first:$((20000 + SLURM_JOB_ID % 20000))}
  elif [ -z "${NNODES:-}${SLURM_STEP_ID:-}" ] && [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    abort "this Slurm job has $SLURM_NNODES machines, and only this one would work: srun ./launch.sh …, or NNODES=1"
  fi
  NNODES=${NNODES:-1}
  [ "$NNODES" != 1 ] || return 0
  [[ $NNODES =~ ^[0-9]+$ && ${NODE_RANK:-} =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] \
    || abort "NNODES=$NNODES needs NODE_RANK, the number of this machine from 0 to $((NNODES - 1)), not '${NODE_RANK:-}'"
  [[ ${MASTER:-} =~ .:[0-9]+$ ]] || abort "NNODES=$NNODES needs MASTER=HOST:PORT, the machine of NODE_RANK 0 and a free port of it, not '${MASTER:-}'"
}

training_command() { # SCRIPT GPUS: sets COMMAND, by torchrun where there are several processes
  local processes
  processes=$(tr ',' '\n' <<<"$2" | wc -l)
  COMMAND=("$VENV/bin/python" -u "$ROOT/$1" --device "$2")
  [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ] || return 0
  # a stop comes to each process, and after it the time that a checkpoint may take; a hangup comes to none
  COMMAND=("$VENV/bin/python" -m snac48.torchrun --nproc_per_node "$processes"
    --shutdown_timeout "${SHUTDOWN_TIMEOUT:-600}" --signals_to_handle "SIGTERM,SIGINT,SIGUSR1")
  if [ "${NNODES:-1}" -gt 1 ]; then
    COMMAND+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
  else
    COMMAND+=(--standalone)
  fi
  COMMAND+=("$ROOT/$1")
  [[ $2 == *,* && $2 != cpu* ]] || COMMAND+=(--device "${2%%,*}") # else each process takes one of its own
}

preflight() { # KIND GPUS ARGS...
  local kind=$1 gpus=$2 gpu flag value count folder
  shift 2
  [[ $gpus =~ ^cpu(,cpu)*$ || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || abort "GPUS must be 3, 0,1,2,3 or cpu, not '$gpus'"
  if [[ $gpus != cpu* ]]; then
    command -v nvidia-smi >/dev/null || abort "no nvidia-smi here: this machine has no NVIDIA driver; use cpu instead of $gpus"
    count=$(visible | wc -l)
    for gpu in ${gpus//,/ }; do
      [ "$gpu" -lt "$count" ] || abort "GPU $gpu isn't there: $([ -z "${CUDA_VISIBLE_DEVICES+x}" ] && echo "nvidia-smi lists" || echo "CUDA_VISIBLE_DEVICES names") $count"
    done
    [ -z "$(tr ',' '\n' <<<"$gpus" | sort | uniq -d)" ] || abort "GPUS names a GPU twice: $gpus"
  fi
  for flag in --data_dir --input_dir; do
    value=$(option "$flag" "$@")
    [ "$kind" = train ] || [ -z "$value" ] || [ -d "$value" ] \
      || abort "$flag $value does not exist; give the folder of your recordings"
  done
  folder=$(option --output_dir "$@")
  [ -n "$folder" ] || folder=$(option --save_dir "$@")
  folder=${folder:-$ROOT}
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  [ "$(df -Pk "$folder" | awk 'NR==2 {print $4}')" -gt "${MIN_FREE_KB:-1048576}" ] \
    || abort "less than 1 GiB is free in $folder; free some, or choose another --output_dir"
}

start_job() { # NAME KIND GPUS RUN_DIR COMMAND...
  local name=$1 kind=$2 gpus=$3 run_dir=$4 log tmp launched code tries
  shift 4
  mkdir -p "$LOG_DIR"
  for log in "$LOG_DIR/$name".{log.old,pid,json,exit,lock,log}; do # a pipe would hold us up for ever
    [ ! -e "$log" ] || [ -f "$log" ] || abort "$log is not a regular file: move it away"
  done
  exec 9>"$LOG_DIR/$name.lock"
  flock -w 30 9 || abort "another start of $name holds $LOG_DIR/$name.lock"
  alive "$name" && abort "$name already runs (pid $PID): ./launch.sh stop $name first, or wait for its end with tail --pid=$PID -f /dev/null"
  # a new job begins a new log: the end of an older job's would be taken for its own
  [ -n "${KEEP_LOG:-}" ] || [ ! -s "$log" ] || mv -f "$log" "$log.old"
  printf '=== %s %s\n' "$(date '+%F %T')" "$*" >>"$log"
  tmp=$LOG_DIR/.$name.pid.$$
  rm -f "$LOG_DIR/$name.exit"
  # setsid: a session and process group of its own, so that it outlives the terminal and `stop` meets nothing else
  # shellcheck disable=SC2016
  JOB_EXIT_FILE=$LOG_DIR/$name.exit setsid nohup bash -c 'echo $$ >"$1.new" && mv "$1.new" "$1"; shift; exec "$@"' _ "$tmp" "$@" \
    </dev/null >>"$log" 2>&1 9>&- &
  launched=$!
  for tries in $(seq 100); do
    [ -s "$tmp" ] && break
    sleep 0.05
  done
  PID=$(cat "$tmp" 2>/dev/null) || abort "$name could not be started; see $log"
  rm -f "$tmp"
  ask 'import json, os, time
base, pid, kind, gpus, run_dir, *command = sys.argv[1:]
job = {"name": os.path.basename(base), "kind": kind, "gpus": gpus, "command": command, "cwd": os.getcwd(),
       "host": os.uname().nodename, "started": time.time(), "run_dir": os.path.abspath(run_dir) if run_dir else None}
began = start_time(int(pid)) or 0
for path, text in ((base + ".pid", " ".join((pid, str(began), *command)) + "\n"), (base + ".json", json.dumps(job, indent=1))):
    with open(path + ".new", "w") as f:
        os.fchmod(f.fileno(), 0o644)  # whoever can write it, says what resume runs
        f.write(text)
    os.replace(path + ".new", path)' "$LOG_DIR/$name" "$PID" "$kind" "$gpus" "$run_dir" "$@"
  exec 9>&-
  for tries in $(seq $((${START_WATCH:-4} * 5))); do # most mistakes show in the first seconds
    if ! alive "$name"; then
      code=0
      wait "$launched" 2>/dev/null || code=$?
      if [ "$code" -eq 0 ]; then
        echo "$name has already finished:"
        tail -n 5 "$log"
        return 0
      fi
      printf '%s died with exit code %s; the end of %s:\n' "$name" "$code" "$log" >&2
      tail -n 15 "$log" >&2
      exit "$code"
    fi
    sleep 0.2
  done
  : "$tries"
  STARTED+=("$name")
  cat <<EOF
started $name (pid $PID), log $log
  follow it:   ./launch.sh logs $name
  all jobs:    ./launch.sh status       (or ./launch.sh monitor)
  stop it:     ./launch.sh stop $name
EOF
}

job_name() { # WHAT GPUS -> train_phase12_gpu3, cache_gpu0_1, precompute_cpu, on several machines with _node0 behind it
  local name=$1_gpu${2//,/_} node=${NODE_RANK:-}
  if [[ $2 == cpu* ]]; then name=$1_cpu; fi
  [ -n "$node" ] || [ "${SLURM_STEP_NUM_NODES:-1}" = 1 ] || node=$SLURM_NODEID
  printf '%s' "$name${node:+_node$node}"
}

start_train() {
  local gpus=${1:-} config recipe run_dir name other n resume=()
  [ -n "$gpus" ] || abort "say on which GPUS: ./launch.sh train 3"
  shift
  need_setup
  find_nodes
  preflight train "$gpus" "$@"
  # flags, config and folders name recipe, data and run directory: ask the trainer (it answers without torch)
  config=$("$VENV/bin/python" "$ROOT/train_dual_head.py" "$@" --print_config json) || exit $?
  { read -r recipe && read -r run_dir; } < <(ask 'import glob, json
from argparse import Namespace
from snac48.cli import UserError
from snac48.places import check_training
values = {k: v["value"] for k, v in json.loads(sys.argv[1]).items()}
try:
    goes_on = values["resume"] or glob.glob(glob.escape(values["output_dir"]) + "/checkpoint_*.pt")
    goes_on or check_training(Namespace(**values), True)
except UserError as e:
    sys.exit("launch.sh: " + str(e).replace("GPUS", sys.argv[2]))
print(values["recipe"], values["output_dir"], sep="\n")' "$config" "$gpus") || exit 1
  [ -n "$(option --resume "$@")" ] || resume=(--resume auto)
  take_gpus "$gpus"
  training_command train_dual_head.py "$gpus"
  name=$(job_name "train_$recipe" "$gpus") n=1
  while other=$name$([ $n = 1 ] || echo "_$n"); alive "$other" && ! runs_in "$other" "$run_dir"; do
    n=$((n + 1)) # another training of this recipe on this device, in a folder of its own
  done
  start_job "$other" train "$gpus" "$run_dir" "${COMMAND[@]}" "${resume[@]}" "$@"
}

runs_in() { # NAME DIR: is that the job's run directory?
  ask 'import json, os
sys.exit(json.load(open(sys.argv[1]))["run_dir"] != os.path.abspath(sys.argv[2]))' "$LOG_DIR/$1.json" "$2"
}

start_rvq() {
  local gpus=${1:-} run_dir
  [ -n "$gpus" ] || abort "say on which GPUS: ./launch.sh rvq 3 --data CACHE_DIR …"
  shift
  need_setup
  find_nodes
  preflight rvq "$gpus" "$@"
  run_dir=$(option --save_dir "$@")
  take_gpus "$gpus"
  training_command train_rvq.py "$gpus"
  start_job "$(job_name rvq "$gpus")" rvq "$gpus" "${run_dir:-rvq_ckpts}" "${COMMAND[@]}" "$@"
}

start_many() { # KIND SCRIPT GPUS ARGS...: one process a GPU, all on the same folders
  local kind=$1 script=$2 gpus=${3:-} gpu what output
  [ -n "$gpus" ] || abort "say on which GPUS: ./launch.sh $kind 0,1 …, or cpu"
  [[ $gpus != cpu,* ]] || abort "several processes of $kind on the CPU: say cpu, and --num_workers N"
  shift 3
  need_setup
  preflight "$kind" "$gpus" "$@"
  output=$(option --output_dir "$@") what=$kind
  case /$output/ in # of one split: its name tells
    //) ;;
    */train/*) what=${kind}_train ;;
    */val*/*) what=${kind}_val ;;
    *) what=${kind}_$(basename "$output") ;;
  esac
  for gpu in ${gpus//,/ }; do
    start_job "$(job_name "$what" "$gpu")" "$kind" "$gpu" "$output" "$VENV/bin/python" -u "$ROOT/$script" --device "$gpu" "$@"
  done
}

# ---- workflow: one job of four stages, each of which goes on where it was ----

start_workflow() {
  local gpus=${1:-} config run_dir input root
  local -a prepare precompute cache train
  [ -n "$gpus" ] || abort "say on which GPUS: ./launch.sh workflow 0,1 --input_dir RECORDINGS, or cpu"
  shift
  [ "${NNODES:-1}" = 1 ] && [ "${SLURM_STEP_NUM_NODES:-1}" = 1 ] \
    || abort "workflow runs on one machine; on several: precompute, cache, train"
  need_setup
  preflight workflow "$gpus" "$@"
  split_flags "$@"
  [ -n "$input" ] || [ -d "$root/corpus" ] || [ -d "$root/combine" ] || abort "there is no corpus/ in $root: give --input_dir RECORDINGS"
  # the trainer's flags are checked now, not days later in its stage
  config=$("$VENV/bin/python" "$ROOT/train_dual_head.py" "${train[@]}" --print_config json) || exit $?
  run_dir=$(ask 'import json; print(json.loads(sys.argv[1])["output_dir"]["value"])' "$config")
  start_job "$(job_name workflow "$gpus")" workflow "$gpus" "$run_dir" \
    bash "$ROOT/launch.sh" run_workflow "$gpus" "$@"
}

split_flags() { # ARGS... -> input root prepare precompute cache train; what is not listed here is the trainer's
  local flag
  local -a value
  input='' root=${DATA_ROOT:-.} prepare=() precompute=() cache=() train=()
  while [ $# -gt 0 ]; do
    flag=${1%%=*} value=("$1")
    shift
    [[ ${value[0]} == *=* || $# -eq 0 || $1 == --* ]] || { value+=("$1"); shift; }
    case $flag in
      --input_dir) input=${value[1]:-${value[0]#*=}} ;;
      --data_root) root=${value[1]:-${value[0]#*=}} ;;
      --group_by | --train_ratio | --copy) prepare+=("${value[@]}") ;;
      --native_rate | --upsampler | --sidon_*) precompute+=("${value[@]}") ;;
      --min_seconds | --rows_per_file) cache+=("${value[@]}") ;;
      --pretrained_model) cache+=("${value[@]}") train+=("${value[@]}") ;;
      --num_workers | --max_bad_fraction) precompute+=("${value[@]}") cache+=("${value[@]}") train+=("${value[@]}") ;;
      *) train+=("${value[@]}") ;;
    esac
  done
  export DATA_ROOT=$root
}

run_workflow() { # GPUS ARGS...: in the foreground, as the job does
  local gpus=$1 gpu py=$VENV/bin/python exit_file=${JOB_EXIT_FILE:-} input root
  local -a prepare precompute cache train
  unset JOB_EXIT_FILE # the stages' codes are not the workflow's
  shift
  split_flags "$@"
  stage() { # N WHAT DEVICES COMMAND...: one process a device (-: one that knows its own); ends where one fails
    local n=$1 what=$2 devices=$3 pids=() pid code before failed=0
    shift 3
    printf '=== stage %s/4: %s\n' "$n" "$what"
    for gpu in ${devices//,/ }; do
      if [ "$gpu" = - ]; then "$@" & else "$@" --device "$gpu" & fi # a stop signals the whole group
      pids+=($!)
    done
    for pid in "${pids[@]}"; do
      code=0
      wait "$pid" || code=$?
      while [ "$code" -gt 128 ]; do # a signal interrupts wait: the child's own code comes with the next one
        before=$code code=0
        wait "$pid" || code=$?
        [ "$code" != 127 ] || { code=$before && break; }
      done
      [ "$code" = 0 ] || failed=$code
    done
    [ "$failed" = 0 ] || workflow_ends "$failed"
  }
  workflow_ends() {
    [ -z "$exit_file" ] || echo "$1" >"$exit_file"
    exit "$1"
  }
  trap : TERM INT
  if [ -e "$root/corpus/manifest.json" ]; then
    printf '=== stage 1/4: %s holds a split, which stays as it is\n' "$root/corpus"
  elif [ -n "$input" ]; then
    printf '=== stage 1/4: prepare\n'
    "$py" "$ROOT/prepare_dataset.py" --input_dir "$input" --output_dir "$root/corpus" "${prepare[@]}" || workflow_ends $?
  fi
  stage 2 "48 kHz targets" "$gpus" "$py" -u "$ROOT/precompute_48k.py" "${precompute[@]}"
  stage 3 codes "$gpus" "$py" -u "$ROOT/cache_codes.py" "${cache[@]}"
  take_gpus "$gpus"
  training_command train_dual_head.py "$gpus"
  stage 4 training - "${COMMAND[@]}" --resume auto "${train[@]}"
  workflow_ends 0
}

# ---- stop, resume, look ----

known() { # NAME -> JOB, the job that is meant: train_gpu3 is train_phase12_gpu3 where that is the only one
  local jobs found
  jobs=$(jobs_list | tr '\n' ' ')
  [ -n "${1:-}" ] || abort "say which job: ${jobs:-there is none in $LOG_DIR}"
  JOB=$1
  [ -s "$LOG_DIR/$1.json" ] && return
  found=$(jobs_list | grep -E "^(${1%%_*}_([^_]+_)?${1#*_}(_[0-9]+)?|$1.*)$" | tr '\n' ' ') || true
  [ "$(wc -w <<<"$found")" -lt 2 ] || abort "$1 may be any of: $found"
  JOB=${found% }
  [ -n "$JOB" ] || abort "no job $1 in $LOG_DIR; there are: ${jobs:-none}"
}

jobs_list() {
  local f
  for f in "$LOG_DIR"/*.json; do
    [ -e "$f" ] && basename "$f" .json
  done
  return 0
}

here() { # NAME: it can be stopped and resumed where it was started alone
  local where
  where=$(state_of "$1")
  [[ $where != ON_* ]] || abort "$1 runs on ${where#ON_}: give this command there"
}

stop_job() {
  known "${1:-}"
  local name=$JOB waited=0 killed=
  here "$name"
  alive "$name" || abort "$name does not run ($(state_of "$name")); nothing was signalled"
  echo "stopping $name (process group $PID); it finishes its step and writes a checkpoint"
  kill -TERM -- "-$PID"
  kill -CONT -- "-$PID" # one that was paused (SIGSTOP) could not answer
  while alive "$name"; do
    if [ "$waited" -ge $((${STOP_GRACE:-60} * 5)) ]; then
      echo "still alive after ${STOP_GRACE:-60} s: KILL"
      killed=", from the checkpoint before (STOP_GRACE=SECONDS gives it longer to write one)"
      # shellcheck disable=SC2046
      kill -KILL -- "-$PID" $(ask 'print(*descendants(int(sys.argv[1])))' "$PID") 2>/dev/null || true
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
  echo "$name has stopped; go on with: ./launch.sh resume $name$killed"
}

resume_job() {
  known "${1:-}"
  local name=$JOB kind gpus run_dir cwd
  local -a command
  here "$name"
  alive "$name" && abort "$name already runs (pid $PID)"
  [ "$(state_of "$name")" != FINISHED ] || abort "$name has finished: there is nothing to resume"
  need_setup
  mapfile -d '' -t command < <(ask 'try:
    print("\0".join(jobs.resumed(sys.argv[1])), end="\0")
except ValueError as e:
    sys.exit(f"launch.sh: {e}")' "$LOG_DIR/$name.json")
  [ "${#command[@]}" -gt 4 ] || exit 1
  kind=${command[0]} gpus=${command[1]} run_dir=${command[2]} cwd=${command[3]}
  cd "$cwd"
  preflight "$kind" "$gpus" "${command[@]:4}"
  [[ $kind != train && $kind != rvq ]] || take_gpus "$gpus"
  KEEP_LOG=1 start_job "$name" "$kind" "$gpus" "$run_dir" "${command[@]:4}"
}

status() { ask 'print(*jobs.status(sys.argv[1]), sep="\n")' "$LOG_DIR"; }

monitor() { # the window; where it dies without a word (kill -9), the terminal gets back what it was
  local saved child code=0
  saved=$(stty -g 2>/dev/null) || saved=
  "$VENV/bin/python" "$ROOT/monitor.py" --log_dir "$LOG_DIR" "$@" <&0 &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null' TERM HUP INT
  until wait "$child" || ! kill -0 "$child" 2>/dev/null; do :; done # a signal to us interrupts the wait
  wait "$child" || code=$?
  case $code in
    0 | 1 | 2 | 129 | 130 | 143) ;;
    *) # out of the alternate screen, mouse and paste reports off, cursor on, colours as before
      [ -z "$saved" ] || { stty "$saved"; printf '\033[<u\033[?1000;1003;1006;1015;1004;2004;2048;1049l\033[?7;25h\033[0m'; }
      ;;
  esac
  return "$code"
}

pass_on() { # TERM to the jobs of this call: they stop with a checkpoint
  local job
  for job in "${STARTED[@]}"; do ! alive "$job" || kill -TERM -- "-$PID"; done
}

attend() { # in the foreground: show the logs of the jobs of this call, pass signals on, exit with the worst code
  local name code=0 own
  trap pass_on TERM INT USR1
  for name in "${STARTED[@]}"; do
    alive "$name" && tail -n +1 --pid="$PID" -F "$LOG_DIR/$name.log" 2>/dev/null &
  done
  for name in "${STARTED[@]}"; do
    while alive "$name"; do
      sleep 1 &
      wait $! || true # a signal interrupts it, and the job may take its time to end
    done
    own=$(cat "$LOG_DIR/$name.exit" 2>/dev/null || echo 1)
    [ "$own" = 0 ] || code=$own
  done
  sleep 1 # tail shows the last lines
  exit "$code"
}

# ---- demo ----

demo() {
  setup
  local d=${DEMO_DIR:-$ROOT/demo} py=$VENV/bin/python began=$SECONDS device=cpu split model=$ROOT/assets/codec
  if [ -e "$d" ]; then
    [ -e "$d/.demo" ] || abort "$d exists and was not made by demo; move it away"
    rm -r "$d"
  fi
  # a second thread saves a minute on an idle machine and costs three where another process is busy
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  mkdir -p "$d"
  touch "$d/.demo"
  cd "$ROOT"
  say() { printf '\n[%3d s] %s\n' $((SECONDS - began)) "$*"; }
  say "1/5 prepare: split the embedded speech into training and held-out speakers"
  "$py" prepare_dataset.py --input_dir assets/speech --output_dir "$d/data" --train_ratio 0.7 --group_by parent --seed 11
  say "2/5 targets: 48 kHz wavs of the recordings (44.1 kHz and more are kept, nothing is restored)"
  for split in train valid; do
    "$py" precompute_48k.py --input_dir "$d/data/$split/audio" --output_dir "$d/targets/$split" \
      --native_rate 44100 --device $device --num_workers 2
  done
  say "3/5 cache: SNAC codes of every file, once"
  for split in train valid; do
    "$py" cache_codes.py --data_dir "$d/data/$split/audio" --output_dir "$d/codes/$split" --device $device \
      --pretrained_model "$model" --min_seconds 0.5 --num_workers 2
  done
  say "4/5 train: warmup (48 kHz head only), then everything; segments grow"
  "$py" train_dual_head.py --config configs/demo.json --device $device --pretrained_model "$model" \
    --cache_dir "$d/codes/train" --val_cache_dir "$d/codes/valid" --output_dir "$d/run" \
    --audio_48k_dir "$d/targets/train" --val_audio_48k_dir "$d/targets/valid"
  say "5/5 evaluate on held-out speakers"
  "$py" evaluate.py --checkpoint "$d/run/best_model.pt" --data_dirs "$d/data/valid/audio" --device $device \
    --pretrained_model "$model" --output "$d/evaluation_results.json" --samples_dir "$d/comparison_samples"
  say "done; everything lies in $d"
}

STARTED=() # jobs of this call

main() {
  local action=${1:-help}
  [ $# -gt 0 ] && shift
  case $action in
    setup) setup ;;
    demo) demo ;;
    test) run_tests "$@" ;;
    train) start_train "$@" ;;
    rvq) start_rvq "$@" ;;
    cache) start_many cache cache_codes.py "$@" ;;
    precompute) start_many precompute precompute_48k.py "$@" ;;
    workflow) start_workflow "$@" ;;
    run_workflow) run_workflow "$@" ;;
    status) status ;;
    stop) stop_job "$@" ;;
    resume) resume_job "$@" ;;
    logs)
      known "${1:-}"
      exec tail -n 50 -F "$LOG_DIR/$JOB.log"
      ;;
    monitor) need_setup && monitor "$@" ;;
    help | -h | --help) usage ;;
    *)
      usage >&2
      abort "unknown command '$action'"
      ;;
  esac
  if [ "${#STARTED[@]}" -gt 0 ] && [ "${FOREGROUND:-${SLURM_JOB_ID:+1}}" = 1 ]; then attend; fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  main "$@"
fi
