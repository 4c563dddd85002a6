#!/usr/bin/env bash
# Several Ray nodes on this machine, and jobs submitted to them as to any other cluster, one after the other:
#
#   cluster/local.sh pipelines/label_images.py --lake "$PWD/images" --output "$PWD/masks"
#   cluster/local.sh pipelines/cache_teacher.py … -- pipelines/distill.py …
#
# Paths are absolute or URLs, as jobs run in a copy of this folder. There is a head without CPUs and NODES workers (2) of
# CPUS (1) each; GCS_PORT (6399) and DASHBOARD_PORT (8299) are free to choose. All nodes end with the last job, or with
# the first that fails; the exit code is that of `ray job submit`: 0, or 1 where the job failed.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $# -gt 0 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[[ ! -x .venv/bin/ray ]] || PATH="$PWD/.venv/bin:$PATH"

nodes=${NODES:-2} cpus=${CPUS:-1} port=${GCS_PORT:-6399} dashboard=${DASHBOARD_PORT:-8299}
folder=$(mktemp -d /tmp/ray-local-XXXXXX) # a short path: sockets below it may have 107 characters
pids=()

# Like on a real cluster, nobody without the token can submit a job.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(16))')
export RAY_DISABLE_IMPORT_WARNING=1 RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS

stop() {
  trap - EXIT INT TERM
  # A node that was killed already is no error.
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait || true
  rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start_node() { # name, flags of `ray start`…
  setsid ray start --block --disable-usage-stats --node-ip-address 127.0.0.1 --object-store-memory 150000000 \
    --min-worker-port 0 --max-worker-port 0 "${@:2}" >"$folder/$1.log" 2>&1 &
  pids+=($!)
  echo "$1: pid $!"
}

wait_for() { # name, its place in pids
  until grep -q "Ray runtime started" "$folder/$1.log"; do
    if ! kill -0 "${pids[$2]}" 2>/dev/null; then
      cat "$folder/$1.log" >&2
      echo "$1 did not start" >&2
      exit 1
    fi
    sleep 0.5
  done
}

start_node head --head --port "$port" --num-cpus 0 --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" \
  --temp-dir "$folder/ray"
wait_for head 0
# One after the other: Ray gives a node 30 seconds, which several at once exceed on a busy machine.
for number in $(seq "$nodes"); do
  start_node "node-$number" --address "127.0.0.1:$port" --num-cpus "$cpus"
  wait_for "node-$number" "$number"
done

submit() { # script, its flags…
  local code
  for _ in 1 2 3; do
    code=0
    ray job submit --address "http://127.0.0.1:$dashboard" --working-dir . -- python "$@" 2> >(tee "$folder/refused" >&2) &
    pids+=($!)
    wait $! || code=$? # unlike a command in the foreground, it lets a signal through
    # Ray waits 10 seconds for its agent to start, which a busy machine exceeds; nothing has run then.
    if [[ $code -eq 0 ]] || ! grep -q "No available agent to submit job" "$folder/refused"; then break; fi
  done
  return "$code"
}

job=()
for word in "$@" --; do
  if [[ $word != -- ]]; then
    job+=("$word")
  elif [[ ${#job[@]} -gt 0 ]]; then
    submit "${job[@]}"
    job=()
  fi
done
