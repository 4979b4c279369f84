#!/usr/bin/env bash
# Set everything up and train. All settings are environment variables (README.md, or --help of the script):
#   ./run.sh                                 on the GPUs; without one, a small model in two or three minutes
#   ./run.sh my_text.txt                     on your own text (.txt .md .rst .jsonl .parquet)
#   SCRIPT=train_gpt.py SEED=1 ./run.sh      the baseline instead of Muon + ORD
#   NPROC_PER_NODE=4 ./run.sh                with four ranks
#   SAVE_EVERY=100 MAX_RESTARTS=3 ./run.sh   checkpoints, from which torchrun restarts the run if it dies
#   RUN_ID=mine RESUME=auto ./run.sh         resume a run that was stopped
#   VENV=0 ./run.sh                          with the `python` on PATH, where nothing can be installed
set -euo pipefail
unset CDPATH  # with it, cd prints where it went
texts=()
for text in "$@"; do
  [ -f "$text" ] || {
    echo "$text: no such file; run.sh takes text files, settings are variables: MODEL=tiny ./run.sh" >&2
    exit 2
  }
  texts+=("$(cd -- "$(dirname -- "$text")" && pwd)/$(basename -- "$text")")
done
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ "${RESUME:-}" = auto ] && [ -z "${RUN_ID:-}" ]; then
  echo "RESUME=auto without RUN_ID: which run? Set RUN_ID to the name of its log in logs/, without .txt" >&2
  exit 2
fi
source setup_env.sh
setup_env  # sets python

script=${SCRIPT:-train_gpt_muon_ord.py}
[ -f "$script" ] || { echo "SCRIPT=$script: no such file; try train_gpt_muon_ord.py or train_gpt.py" >&2; exit 2; }

if [ ${#texts[@]} -gt 0 ]; then
  if [ -z "${RESUME:-}" ] && grep -aqs '^event:started ' "logs/${RUN_ID:-}.txt"; then  # before its data are replaced
    echo "logs/$RUN_ID.txt exists already; choose another RUN_ID, or RESUME=auto to go on with that run" >&2
    exit 2
  fi
  # a small model on bytes, unless MODEL names another
  [ "${MODEL:-auto}" != auto ] || MODEL=tiny
  export MODEL DATA_PATH=${DATA_PATH:-data/own}
  # long documents are split, not cut; but gpt2-small-2026-08 limits them by stage, and a trainer like train_gpt_simple.py,
  # which never cuts any, has no such setting
  if [[ $MODEL != gpt2-small-2026-08* ]] && grep -q 'long_docs:' -- "$script"; then
    export LONG_DOCS=${LONG_DOCS:-split}
  fi
  vocabulary=()
  case $MODEL in tiny* | moe-tiny) vocabulary=(--bytes) ;; esac
  $python data/tokenize_text.py "${texts[@]}" --out "$DATA_PATH" --force ${vocabulary[@]+"${vocabulary[@]}"}
fi

# the trainer refuses here, once, what it would later refuse on every rank; else it prints what it will use
checked=$($python "$script" --check-settings) || exit
eval "$checked"  # exports MODEL, RUN_ID and NPROC_PER_NODE

# time to finish the step and save before torchrun kills; its own default is 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# several ranks share the cores, one thread each; waiting threads sleep, because spinning ones stall a busy machine:
# 20 steps of tiny in one process on two cores with a load of 11 took 8 s, with threads that spin 15 s per step
[ "$NPROC_PER_NODE" = 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# a signal goes to torchrun alone, from here: it passes it on to the ranks, and restarts none that dies of it
torchrun='
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as stopped:  # the ranks have ended; no traceback
    raise SystemExit(128 + stopped.sigval)
'
set -m  # in a process group of its own, which Ctrl-C does not reach
# by address, because this machine's name may not resolve to one
$python -c "$torchrun" --standalone --local-addr=127.0.0.1 \
  --nproc-per-node="$NPROC_PER_NODE" --max-restarts="${MAX_RESTARTS:-0}" "$script" &
pid=$! stopped='' code=0
set +m
trap 'stopped=1; kill -TERM $pid 2>/dev/null || true' INT TERM HUP
wait $pid || code=$?
while kill -0 $pid 2>/dev/null; do  # a signal ends the wait, not torchrun
  code=0
  wait $pid || code=$?
done
if [ -n "$stopped" ]; then  # the log's last events tell, unlike torchrun's code, whether the ranks saved
  case $(grep -as '^event:' "logs/$RUN_ID.txt" | tail -n 2) in
    *event:save_failed*) exit 1 ;;
    *event:stopped*) code=0 ;;
  esac
  echo "stopped; the same settings with RUN_ID=$RUN_ID RESUME=auto resume the run" || true  # the terminal may be gone
  exit $code
fi
[ $code = 0 ] || exit $code
$python plot_loss.py "logs/$RUN_ID.txt" --out "logs/$RUN_ID.png" ||
  echo "the run is finished; its curves could not be drawn" >&2
echo "log    logs/$RUN_ID.txt"
echo "curves logs/$RUN_ID.png"
model=logs/$RUN_ID/model.safetensors
[ -f "$model" ] || exit 0
echo "model  $model"
# a sample may be impossible, for example without GPT-2's vocabulary; the run has not failed then
if sample=$($python sample.py "$model" --tokens 60 | tr -s '\n\t ' ' '); then
  echo "sample ${sample:0:100}"
  echo "more   $python sample.py $model --prompt \"...\""
else
  echo "the run is finished; its model could not be sampled" >&2
fi
