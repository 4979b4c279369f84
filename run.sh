#!/usr/bin/env bash
# Set everything up and train. All settings are environment variables (README.md, or --help of the script):
#   ./run.sh                                 two or three minutes on a laptop; all GPUs where there are some
#   SCRIPT=train_gpt.py SEED=1 ./run.sh      the baseline instead of Muon + ORD
#   NPROC_PER_NODE=4 ./run.sh                so many ranks
#   SAVE_EVERY=100 MAX_RESTARTS=3 ./run.sh   checkpoints, from which torchrun restarts the run if it dies
#   RUN_ID=mine RESUME=auto ./run.sh         go on with a run that was stopped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -n "${RESUME:-}" ] && [ -z "${RUN_ID:-}" ]; then
  echo "RESUME=$RESUME without RUN_ID: which run? Set RUN_ID to the name of its log in logs/, without .txt" >&2
  exit 2
fi
source setup_env.sh
setup_env
source .venv/bin/activate

script=${SCRIPT:-train_gpt_muon_ord.py}
[ -f "$script" ] || { echo "SCRIPT=$script: no such file; train_gpt_muon_ord.py and train_gpt.py are" >&2; exit 2; }

num_gpus=0
if [ "${DEVICE:-auto}" != cpu ]; then
  num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
# the largest of 1, 2, 4, 8 that fits the GPUs, or the cores: these divide the 8 slices of a batch
fit() { local n=1; while [ $((n * 2)) -le "$1" ] && [ $n -lt 8 ]; do n=$((n * 2)); done; echo $n; }
if [ -z "${NPROC_PER_NODE:-}" ] || [ "$NPROC_PER_NODE" = 0 ]; then
  if [ "$num_gpus" -gt 0 ]; then NPROC_PER_NODE=$(fit "$num_gpus"); else NPROC_PER_NODE=$(fit "$(nproc)"); fi
fi

model=${MODEL:-auto}
[ "$model" = auto ] && { [ "$num_gpus" -gt 0 ] && model=gpt2-small || model=tiny; }
if [ "$model" = tiny ] && [ -z "${TRAIN_FILES:-}" ]; then
  python data/embedded_corpus.py
elif [ -z "${TRAIN_FILES:-}" ] && ! compgen -G "${DATA_PATH:-.}/data/fineweb10B/fineweb_train_*.bin" >/dev/null; then
  echo "no FineWeb shards in ${DATA_PATH:-.}/data/fineweb10B; this fetches 900M tokens (1.8 GB):" >&2
  echo "    .venv/bin/python data/cached_fineweb10B.py 9" >&2
  echo "or train the small model on text that is here already:  MODEL=tiny ./run.sh" >&2
  exit 2
fi

export RUN_ID=${RUN_ID:-$(date +%Y%m%d-%H%M%S)-$(basename "$script" .py)-$model-seed${SEED:-0}}
export MODEL=$model NPROC_PER_NODE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ "$NPROC_PER_NODE" = 1 ] && unset OMP_NUM_THREADS
# time to finish the step and save before torchrun kills; its own default is 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
torchrun --standalone --nproc-per-node="$NPROC_PER_NODE" --max-restarts="${MAX_RESTARTS:-0}" "$script"
python plot_loss.py "logs/$RUN_ID.txt" --out "logs/$RUN_ID.png"
echo "log    logs/$RUN_ID.txt"
echo "curves logs/$RUN_ID.png"
