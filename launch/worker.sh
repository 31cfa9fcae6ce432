#!/usr/bin/env bash
# Runs on every machine of a job; launch/workers.py calls it by ssh.
#   worker.sh install NAME
#   worker.sh start NAME PROCESSES COMMIT ARGUMENT...
#   worker.sh status|stop NAME
#   worker.sh log NAME FIRST_BYTE
# Everything lies in ~/fm4m-jobs/NAME: source/, venv/, log.txt, pid, exit (the code), stopped (if a user stopped it).
set -eu
verb=$1 name=$2
shift 2
root=${FM4M_ROOT:-$HOME/fm4m-jobs}/$name
python=${FM4M_PYTHON:-$root/venv/bin/python}
stop_seconds=${FM4M_STOP_SECONDS:-600}

worker() {
  # The number of this machine in its slice, as JAX itself finds it.
  echo "${FM4M_WORKER:-$(curl --silent --fail --max-time 10 --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)}"
}

# Whether the trainer runs; after a reboot its number may be another process's, which has not its environment.
running() {
  [ -s "$root/pid" ] && [ ! -s "$root/exit" ] &&
    cat "/proc/$(cat "$root/pid")/environ" 2>/dev/null | grep -qzx "FM4M_RUN_NAME=$name"
}

case $verb in
install)
  cd "$root/source"
  wanted=$(cat setup.py constraints.txt | sha256sum | cut -d' ' -f1)
  if [ "$(cat "$root/installed" 2>/dev/null)" != "$wanted" ]; then
    # The runtime images have Python 3.10; fm4m needs 3.11. uv brings one without touching the system.
    python3 -m pip install --user --quiet --disable-pip-version-check uv==0.13.9
    rm -rf "$root/venv"
    python3 -m uv venv --quiet --python 3.11 "$root/venv"
    python3 -m uv pip install --quiet --python "$python" --constraint constraints.txt --editable '.[tpu,data]'
    echo "$wanted" >"$root/installed"
  fi
  echo "fm4m-installed $(worker)"
  ;;
start)
  if running; then
    echo "fm4m-refused $(worker) the job is running already, as process $(cat "$root/pid")"
    exit 0
  fi
  processes=$1 commit=$2
  shift 2
  number=$(worker)
  mkdir -p "$root"
  rm -f "$root/pid" "$root/exit" "$root/stopped"
  cd "${FM4M_SOURCE:-$root/source}"
  export FM4M_RUN_NAME=$name FM4M_GIT_COMMIT=$commit PYTHONUNBUFFERED=1
  # JAX finds the other machines by itself, and numbers them as their chips are; the trainer checks that they are so many
  # (fm4m/processes.py).
  export JAX_NUM_PROCESSES=$processes
  # In a session of its own, so that it outlives the connection. The inner shell writes the code when the trainer ends;
  # a machine that shuts down sends SIGTERM to both, and the shell must outlive the trainer's last checkpoint.
  setsid nohup bash -c '
    root=$1; shift
    trap : TERM
    "$@" & pid=$!
    echo $pid >"$root/pid.new"; mv "$root/pid.new" "$root/pid"
    while kill -0 $pid 2>/dev/null; do wait $pid; done
    code=0; wait $pid || code=$?
    echo $code >"$root/exit.new"; mv "$root/exit.new" "$root/exit"
  ' start "$root" "$python" "$@" >>"$root/log.txt" 2>&1 </dev/null &
  for _ in $(seq 50); do [ -s "$root/pid" ] && break; sleep 0.1; done
  echo "fm4m-started $number"
  ;;
status)
  state=none code=-1
  if [ -s "$root/exit" ]; then
    state=exited code=$(cat "$root/exit")
    if [ -e "$root/stopped" ]; then state=stopped; fi
  elif running; then
    state=running
  elif [ -s "$root/pid" ]; then
    sleep 0.2 # between the end of the trainer and the writing of its code
    state=lost
    if [ -s "$root/exit" ]; then state=exited code=$(cat "$root/exit"); fi
  fi
  echo "fm4m-status $(worker) $state $code"
  ;;
stop)
  if running; then
    touch "$root/stopped"
    kill -TERM "$(cat "$root/pid")"
    for _ in $(seq $((stop_seconds * 5))); do running || break; sleep 0.2; done
    if running; then kill -KILL "$(cat "$root/pid")"; fi
    for _ in $(seq 50); do [ -s "$root/exit" ] && break; sleep 0.1; done
  fi
  echo "fm4m-stopped $(worker) $(cat "$root/exit" 2>/dev/null || echo -1)"
  ;;
log)
  if [ -e "$root/log.txt" ]; then tail -c "+$1" "$root/log.txt" | head -c 1000000; fi
  ;;
*)
  echo "worker.sh: $verb is not install, start, status, stop or log" >&2
  exit 2
  ;;
esac
