# shellcheck shell=bash
# How launch/local and the job scripts handle their ranks' stderr; they source it.

# words: passes on the ranks' and their launcher's stderr, with two exceptions. A reason that several ranks give for
# ending is printed once, at the end, for all of them. mpirun's blocks about ranks that ended themselves are dropped if a
# rank said why.
words() {
  local line block='' rest='' ranks reason reasons=() LC_ALL=C
  local -A said=() ranks_of=()
  trap '' INT TERM HUP USR1 PIPE
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ -n $block ]]; then
      block+=$'\n'$line
      [[ $line == ------------* ]] || continue
      case ${block//$'\n'/ } in
        *'MPI_ABORT was invoked'* | *'calling "abort"'* | *'exited with non-zero status'*) rest+=$block$'\n' ;;
        *) printf '%s\n' "$block" ;;
      esac
      block=''
    elif [[ $line == ------------* ]]; then
      block=$line
    elif [[ $line =~ ^lockstep:\ rank\ ([0-9]+):\ (.*) ]]; then
      reason=${BASH_REMATCH[2]}
      [[ -n ${ranks_of[$reason]:-} ]] || reasons+=("$reason")
      ranks_of[$reason]+=" ${BASH_REMATCH[1]}"
    elif [[ $line == 'lockstep: '* || $line == '{'*'"exit_code":'* ]]; then
      [[ -n ${said[$line]:-} ]] || printf '%s\n' "$line"
      said[$line]=yes
    elif [[ $line == *[![:space:]]* ]]; then
      printf '%s\n' "$line"
    fi
  done
  if [[ -n $block ]]; then printf '%s\n' "$block"; fi
  if ((${#said[@]} + ${#reasons[@]} == 0)); then printf '%s' "$rest"; fi
  for reason in ${reasons[@]+"${reasons[@]}"}; do
    ranks=$(tr ' ' '\n' <<<"${ranks_of[$reason]# }" | sort -n | paste -sd, | sed 's/,/, /g')
    if [[ $ranks == *,* ]]; then ranks="ranks $ranks"; else ranks="rank $ranks"; fi
    printf 'lockstep: %s: %s\n' "$ranks" "$reason"
  done
} 2>/dev/null # the reader may be gone

# end_of_words FILTER: waits until the process that runs `words` has passed everything on. It waits at most five
# seconds: the reader may be gone, or a process that outlives its rank may keep the pipe open.
end_of_words() {
  timeout 5 tail --pid="$1" --sleep-interval=0.1 -f /dev/null || kill -KILL "$1" || true
  wait "$1" || true
} 2>/dev/null
