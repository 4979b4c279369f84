#!/usr/bin/env bash
# Set everything up and run the tests, on a CPU without a network:
#   ./test.sh -k name                some of them
#   ./test.sh --fake-cuda            also compile the whole train step for a Hopper GPU, and the kernels for three
#                                    more kinds of GPU: minutes, but no GPU
#   TEST_PROCESSES=8 ./test.sh       on a machine with more cores
#   TORCH=2.11.0 ./test.sh           the tests of trainers, GPU path, kernels and benchmarks with another torch
#                                    (setup_env.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup_env.sh
setup_env  # sets python
tests=tests
if [ -n "${TORCH:-}" ]; then
  tests=$(printf 'tests/test_%s.py ' arms benchmarks cards checkpoints compile_cache every_setting fast_forms first_hour \
    fullgraph gpu_path kernels_setting manifold model moe ranks runs sample schedule_data simple triton_compile \
    triton_interpreter update_rules)
fi
$python data/embedded_corpus.py
$python -m ruff check .
$python -m ruff format --check .
# four test files at a time on two cores, because the tests of faults wait more than they compute; in order of their
# names, because xdist's own order (files with many tests first) leaves the few long ones to the end. A test that ends
# its process ends the whole run: a replacement process would run into it again, and hang.
$python -m pytest -q $tests -n "${TEST_PROCESSES:-4}" --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0 "$@"
