# shellcheck shell=bash
# What the job scripts beside this file share; they source it. It expects `root`, the clone.
# shellcheck disable=SC2154 # the scripts set root
# shellcheck disable=SC2034 # and read code and began

# shellcheck source=launch/words.sh
. "$root/launch/words.sh"

# How often Slurm asked for a stop. From now on that does not end this shell.
signals=0
trap 'signals=$((signals + 1))' USR1

job=${SLURM_JOB_NAME:-lockstep}

say() { printf '%s: %s\n' "$job" "$*" >&2; }
die() {
  say "$@"
  exit 2
}

# The smallest and the largest number in one of Slurm's lists for each node, such as 2(x3),1, and the sum of all.
smallest() { tr ',' '\n' <<<"$1" | sed 's/(.*//' | sort -n | head -n 1; }
largest() { tr ',' '\n' <<<"$1" | sed 's/(.*//' | sort -n | tail -n 1; }
total() { tr ',' '\n' <<<"$1" | awk -F '[(x)]+' '{ n += $1 * ($2 ? $2 : 1) } END { print n + 0 }'; }

# Prints what Slurm knows of this job, in one line; nothing if Slurm does not answer. The last element of an array has
# the array's own number, under which Slurm shows all of them.
record() {
  scontrol --details show --oneliner job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID " || true
}

# sbatch hands on every variable that it finds and sets only those of its own options. So a job that is submitted inside
# another allocation inherits that one's wishes. This forgets them: the job's record says what sbatch was told.
forget_other_allocations() {
  local record name pattern told forgotten=()
  for name in "${!SLURM_STEP@}" "${!PMIX_@}" "${!PMI_@}" "${!OMPI_COMM_WORLD_@}"; do
    [[ $name == PMIX_MCA_* ]] || unset "$name"
  done
  # A step gets the job's memory unless srun is told otherwise, and srun refuses two of these.
  unset SLURM_MEM_PER_CPU SLURM_MEM_PER_NODE SLURM_MEM_PER_GPU
  record=$(record)
  [[ -n $record ]] || return 0

  forget() {
    [[ -n ${!1:-} ]] || return 0
    forgotten+=("$1=${!1}")
    unset "$1"
  }
  while read -r name pattern; do
    told=''
    if [[ $record =~ [[:space:]]$pattern ]]; then told=${BASH_REMATCH[1]}; fi
    if [[ -n ${!name:-} && ${!name##*:} != "$told" ]]; then forget "$name"; fi
  done <<'END'
SLURM_NTASKS_PER_NODE NtasksPerN:B:S:C=([0-9]+)
SLURM_CPUS_PER_TASK CPUs/Task=([0-9]+)
SLURM_GPUS TresPerJob=[^[:space:]]*gpu[^,[:space:]]*[:=]([0-9]+)
SLURM_GPUS_PER_NODE TresPerNode=[^[:space:]]*gpu[^,[:space:]]*[:=]([0-9]+)
SLURM_GPUS_PER_TASK TresPerTask=[^[:space:]]*gpu[^,[:space:]]*[:=]([0-9]+)
SLURM_ARRAY_TASK_ID ArrayTaskId=([0-9]+)
SLURM_RESTART_COUNT Restarts=([0-9]+)
END
  if [[ $record != *gpu* ]]; then forget SLURM_GPUS_ON_NODE; fi
  # With --ntasks-per-node, sbatch counts the tasks itself. Told of no tasks, Slurm lists as many as there are CPUs.
  if [[ -n ${SLURM_NTASKS:-} && $record == *' NtasksPerN:B:S:C=0:'* ]]; then
    if [[ $record != *" NumTasks=$SLURM_NTASKS "* || $(total "$SLURM_TASKS_PER_NODE") != "$SLURM_NTASKS" ]]; then
      forget SLURM_NTASKS
      unset SLURM_NPROCS
    fi
  fi
  ((${#forgotten[@]})) || return 0
  # What the record does not tell, or tells of every job.
  if [[ ${SLURM_CPUS_PER_TASK:-} == 1 ]]; then forget SLURM_CPUS_PER_TASK; fi
  for name in SLURM_{CPUS_PER_GPU,DISTRIBUTION,HINT,NTASKS_PER_CORE,NTASKS_PER_GPU,NTASKS_PER_SOCKET} \
    SLURM_{OVERCOMMIT,THREADS_PER_CORE,TRES_PER_TASK}; do
    forget "$name"
  done
  say "left over from another allocation, so without effect: ${forgotten[*]}"
}
if [[ -n ${SLURM_JOB_ID:-} ]]; then forget_other_allocations; fi

# Sets up the job's environment: the site's modules and variables, then Lockstep's libraries.
prepare() {
  # Modules were not written for `set -eu`.
  set +eu
  # shellcheck disable=SC1091 # the site's own, if it has one
  if [[ -f $root/slurm/site.sh ]]; then . "$root/slurm/site.sh"; fi
  set -eu
  binary=${LOCKSTEP_BIN:-$root/target/release/lockstep}
  [[ -f $root/.venv/lockstep.env ]] ||
    die "$root/.venv/lockstep.env is not there; run launch/quickstart, or launch/setup, in $root on a login node"
  [[ -x $binary ]] || die "$binary is not there; build it: launch/quickstart, or cargo build --release, in $root"
  # shellcheck disable=SC1091 # written by launch/setup
  . "$root/.venv/lockstep.env"
}

need_config() {
  [[ -f $1 ]] || die "no configuration $1 in $PWD, from where this job was submitted"
}

# setting KEY CONFIG [ARGUMENT of lockstep train]...: prints a value of the configuration, or run_dir, as the program
# reads it. If the program cannot use them, it says why, and its code is this function's.
setting() { "$root/launch/rank" config --print "$1" --config "${@:2}"; }

# Prints how many GPUs the job has on its first node, in whichever way it asked for them.
gpus_on_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS:-0}}}
  printf '%s\n' "${gpus##*:}" # a type may precede the number
}

# Sets nodes, ranks, per_node (ranks on a node, at most) and cpus (for each rank): as the sbatch command said,
# else one rank for each GPU that the job has, else one for each node.
lay_out() {
  local gpus total=${SLURM_GPUS:-}
  gpus=$(gpus_on_node)
  total=${total##*:}
  nodes=$SLURM_JOB_NUM_NODES
  # sbatch --gpus counts those of all nodes, and Slurm shares them out as it likes. The job's steps get no others.
  if [[ -n $total && -z ${SLURM_NTASKS:-} ]]; then
    if ((nodes == 1)); then gpus=$total; fi
    ((total == nodes * gpus)) ||
      die "the job's $total GPUs are not the same number on each of its $nodes nodes (here $gpus), so" \
        "the ranks cannot be shared out; submit with --gpus-per-node in place of --gpus"
  fi
  if [[ -n ${SLURM_NTASKS:-} ]]; then
    ranks=$SLURM_NTASKS
    per_node=$(largest "$SLURM_TASKS_PER_NODE")
  else
    per_node=$((gpus > 0 ? gpus : 1))
    ranks=$((nodes * per_node))
  fi
  cpus=${SLURM_CPUS_PER_TASK:-$(($(smallest "$SLURM_JOB_CPUS_PER_NODE") / per_node))}
  cpus=$((cpus > 0 ? cpus : 1))
  if [[ -n ${SLURM_NTASKS:-} ]] && ((ranks < nodes || ranks > $(total "$SLURM_TASKS_PER_NODE"))); then
    die "SLURM_NTASKS=$ranks contradicts $nodes nodes with $SLURM_TASKS_PER_NODE tasks; unset it before sbatch," \
      "or say --ntasks"
  fi
}

# Uses up step numbers until the next is one under which no node of this job has died. A job that was queued again
# counts its steps from 0 again; a node that died amid a step keeps the socket of Slurm's PMIx, and some Slurms (22.05)
# then refuse to start ranks there under the step's number.
skip_dead_steps() {
  local spool said next
  ((${SLURM_RESTART_COUNT:-0})) || return 0
  spool=$(scontrol show config | sed -n 's/^SlurmdSpoolDir *= *//p') || return 0
  # Each node says the number of this step, and of each whose socket it has. One that does not answer is found out when
  # the ranks are started.
  # shellcheck disable=SC2016 # for the nodes' shells
  said=$(timeout -k 5 20 srun --overlap --mpi=none --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 bash -c '
    host=$(uname -n)
    spool=${1//%n/$SLURMD_NODENAME}
    spool=${spool//%h/${host%%.*}}
    printf "step %s\n" "$SLURM_STEP_ID"
    for socket in "$spool/stepd.slurm.pmix.$SLURM_JOB_ID".*; do printf "dead %s\n" "${socket##*.}"; done
  ' bash "$spool") || return 0
  next=$(($(awk '$1 == "step" { print $2; exit }' <<<"$said") + 1))
  while grep -qx "dead $next" <<<"$said"; do
    timeout -k 5 20 srun --overlap --mpi=none --nodes=1 --ntasks=1 true || return 0
    next=$((next + 1))
  done
}

# Sets launcher to the command that starts $1 ranks: srun, or mpirun if srun does not know how MPI's ranks find each
# other.
choose_launcher() {
  local ranks=$1 on_nodes pmi mpirun=mpirun
  on_nodes=$(((ranks + per_node - 1) / per_node))
  # The sbatch command may spread them over more nodes.
  if ((ranks == ${SLURM_NTASKS:-0})); then on_nodes=$nodes; fi
  # Newer Slurms no longer hand the job's cpus per task on to its steps, hence the explicit number.
  launcher=(srun --nodes="$on_nodes" --ntasks="$ranks" --cpus-per-task="$cpus"
    --cpu-bind=cores --kill-on-bad-exit=1 --export=ALL)
  # Every rank sees all of its node's GPUs and takes the one of its own number: GPUs that do not see each other cannot
  # use each other's memory. Jobs that ask with --gpus-per-task would have each rank see its own only.
  if (($(gpus_on_node) > 0)); then launcher+=(--gpu-bind=none); fi
  # Its name for PMIx may bear a version: pmix_v4.
  pmi=$(srun --mpi=list 2>&1 | grep -oE '\bpmix(_v[0-9]+)?\b' | sort | head -n 1 || true)
  # If the site knows better, it has set SLURM_MPI_TYPE, which srun reads.
  if [[ -z ${SLURM_MPI_TYPE:-} && -n $pmi ]]; then launcher+=(--mpi="$pmi"); fi
  if [[ -n ${SLURM_MPI_TYPE:-$pmi} ]]; then
    if [[ ${SLURM_MPI_TYPE:-$pmi} == pmix* ]]; then skip_dead_steps; fi
    return
  fi
  if [[ -n ${MPICC:-} ]]; then mpirun=$(dirname -- "$MPICC")/mpirun; fi
  command -v "$mpirun" >/dev/null ||
    die "srun has no PMIx here (srun --mpi=list), and there is no $mpirun; load an MPI in slurm/site.sh"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
  # mpirun starts its ranks from one task on each node, which must have all of the node's GPUs.
  unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
  if (($(gpus_on_node) > 0)); then export SLURM_GPU_BIND=none; fi
  launcher=("$mpirun" -n "$ranks")
  if [[ $("$mpirun" --version 2>&1) == *"Open MPI"* ]]; then
    launcher+=(--map-by "ppr:$per_node:node" --bind-to none --oversubscribe)
    if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
  else
    launcher+=(-ppn "$per_node")
  fi
}

# Hands a request to stop on to the ranks, again and again until they end: they ignore it until they listen.
# shellcheck disable=SC2154 # start sets pid and repeater
ask() {
  kill -USR1 "$pid" 2>/dev/null || true
  if [[ -n $repeater ]]; then return; fi
  while sleep 1 && kill -USR1 "$pid" 2>/dev/null; do :; done &
  repeater=$!
}

# start RANKS ARGUMENT...: runs `lockstep ARGUMENT...` as so many ranks. Sets code to their exit code, and began to
# whether there was a rank at all. USR1, which Slurm sends to this shell before the time is up, goes to the ranks: srun
# and mpirun hand it on.
start() {
  local ranks=$1 pid seen folder filter repeater=''
  shift
  choose_launcher "$ranks"
  code=75 began=0
  if ((signals)); then return; fi
  say "${launcher[0]##*/} starts $ranks x lockstep $1, at most $per_node on a node, CPUs for each: $cpus"
  folder=$(mktemp -d)
  touch "$folder/began"
  mkfifo "$folder/words"
  words <"$folder/words" >&2 &
  filter=$!
  LOCKSTEP_BEGAN=$folder/began "${launcher[@]}" "$root/launch/rank" "$@" </dev/null 2>"$folder/words" &
  pid=$!
  trap 'signals=$((signals + 1)); ask' USR1
  while true; do
    seen=$signals code=0
    wait "$pid" || code=$?
    # A signal interrupts the waiting, and gives a code that is not the ranks'.
    if ((signals == seen)); then break; fi
  done
  trap 'signals=$((signals + 1))' USR1
  if [[ -n $repeater ]]; then kill "$repeater" 2>/dev/null || true; fi
  end_of_words "$filter"
  if [[ -s $folder/began ]]; then began=1; fi
  rm -rf -- "$folder"
  # srun ends with 0 if it cannot start the ranks, for example since a node has just died.
  if ((!began && code == 0)); then code=6; fi
}
