# shellcheck shell=bash
# The job scripts beside this file share this and source it. It expects `root`, the clone.
# shellcheck disable=SC2154 # the scripts set root
# shellcheck disable=SC2034 # and read code and began

# shellcheck source=launch/words.sh
. "$root/launch/words.sh"

# Counts how often Slurm asked for a stop. From here on, such a request does not end this shell.
signals=0
trap 'signals=$((signals + 1))' USR1

job=${SLURM_JOB_NAME:-lockstep}

say() { printf '%s: %s\n' "$job" "$*" >&2; }
die() {
  say "$@"
  exit 2
}

# The smallest number in one of Slurm's per-node lists, such as 2(x3),1; the largest; and the sum of all.
smallest() { tr ',' '\n' <<<"$1" | sed 's/(.*//' | sort -n | head -n 1; }
largest() { tr ',' '\n' <<<"$1" | sed 's/(.*//' | sort -n | tail -n 1; }
total() { tr ',' '\n' <<<"$1" | awk -F '[(x)]+' '{ n += $1 * ($2 ? $2 : 1) } END { print n + 0 }'; }

# Prints Slurm's record of this job in one line, or nothing if Slurm does not answer. The last element of an array has
# the array's own number, under which Slurm shows all elements.
record() {
  scontrol --details show --oneliner job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID " || true
}

# sbatch passes on every variable that it finds and sets only those of its own options. So a job that is submitted from
# inside another allocation inherits that one's options. This forgets them: the job's record shows what sbatch was told.
forget_other_allocations() {
  local record name pattern told forgotten=()
  for name in "${!SLURM_STEP@}" "${!PMIX_@}" "${!PMI_@}" "${!OMPI_COMM_WORLD_@}"; do
    [[ $name == PMIX_MCA_* ]] || unset "$name"
  done
  # A step gets the job's memory unless srun is told otherwise. srun refuses two of these at once.
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
  # With --ntasks-per-node, sbatch counts the tasks itself. If it was told of no tasks, Slurm lists one for each CPU.
  if [[ -n ${SLURM_NTASKS:-} && $record == *' NtasksPerN:B:S:C=0:'* ]]; then
    if [[ $record != *" NumTasks=$SLURM_NTASKS "* || $(total "$SLURM_TASKS_PER_NODE") != "$SLURM_NTASKS" ]]; then
      forget SLURM_NTASKS
      unset SLURM_NPROCS
    fi
  fi
  ((${#forgotten[@]})) || return 0
  # The record does not have these, or has them for every job.
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
  # Module files are not written for `set -eu`.
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
# reads it. If the program cannot use them, it prints why, and this function returns its exit code.
setting() { "$root/launch/rank" config --print "$1" --config "${@:2}"; }

# Prints how many GPUs the job has on its first node, however it asked for them.
gpus_on_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS:-0}}}
  printf '%s\n' "${gpus##*:}" # a type may precede the number
}

# Sets nodes, ranks, per_node (ranks on a node, at most) and cpus (for each rank): as the sbatch command asked,
# else one rank for each of the job's GPUs, else one for each node.
lay_out() {
  local gpus total=${SLURM_GPUS:-}
  gpus=$(gpus_on_node)
  total=${total##*:}
  nodes=$SLURM_JOB_NUM_NODES
  # sbatch --gpus counts the GPUs of all nodes, and Slurm distributes them as it likes. The job's steps get no others.
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

# Uses up step numbers until it reaches one during which no node of this job died. A requeued job counts its steps from
# 0 again. A node that died during a step keeps the socket of Slurm's PMIx, and some Slurms (22.05) then refuse to start
# ranks there under that step's number.
skip_dead_steps() {
  local spool said next
  ((${SLURM_RESTART_COUNT:-0})) || return 0
  spool=$(scontrol show config | sed -n 's/^SlurmdSpoolDir *= *//p') || return 0
  # Each node prints the number of this step, and of each step whose socket it has. A node that does not answer is
  # noticed when the ranks are started.
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

# Sets launcher to the command that starts $1 ranks: srun, or mpirun if srun cannot connect MPI's ranks with each
# other.
choose_launcher() {
  local ranks=$1 on_nodes pmi mpirun=mpirun
  on_nodes=$(((ranks + per_node - 1) / per_node))
  # The sbatch command may spread the ranks over more nodes.
  if ((ranks == ${SLURM_NTASKS:-0})); then on_nodes=$nodes; fi
  # Newer Slurms no longer pass the job's CPUs per task on to its steps, hence the explicit number.
  launcher=(srun --nodes="$on_nodes" --ntasks="$ranks" --cpus-per-task="$cpus"
    --cpu-bind=cores --kill-on-bad-exit=1 --export=ALL)
  # Every rank sees all of its node's GPUs and takes the one with its own number: GPUs that do not see each other cannot
  # use each other's memory. In a job that asks with --gpus-per-task, each rank would see only its own.
  if (($(gpus_on_node) > 0)); then launcher+=(--gpu-bind=none); fi
  # Slurm's name for PMIx may include a version: pmix_v4.
  pmi=$(srun --mpi=list 2>&1 | grep -oE '\bpmix(_v[0-9]+)?\b' | sort | head -n 1 || true)
  # A site that needs something else sets SLURM_MPI_TYPE, which srun reads.
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

# Passes a request to stop on to the ranks, again and again until they end: they ignore it until they listen for it.
# shellcheck disable=SC2154 # start sets pid and repeater
ask() {
  kill -USR1 "$pid" 2>/dev/null || true
  if [[ -n $repeater ]]; then return; fi
  while sleep 1 && kill -USR1 "$pid" 2>/dev/null; do :; done &
  repeater=$!
}

# start RANKS ARGUMENT...: runs `lockstep ARGUMENT...` as RANKS ranks. Sets code to their exit code, and began to
# whether any rank started. Slurm sends USR1 to this shell before the time is up; srun and mpirun pass it on to the
# ranks.
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
    # A signal interrupts `wait`, which then returns a code that is not the ranks'.
    if ((signals == seen)); then break; fi
  done
  trap 'signals=$((signals + 1))' USR1
  if [[ -n $repeater ]]; then kill "$repeater" 2>/dev/null || true; fi
  end_of_words "$filter"
  if [[ -s $folder/began ]]; then began=1; fi
  rm -rf -- "$folder"
  # srun exits with 0 if it cannot start the ranks, for example because a node has just died.
  if ((!began && code == 0)); then code=6; fi
}
