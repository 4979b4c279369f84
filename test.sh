#!/usr/bin/env bash
# Set everything up and run the tests: CPU only, no network. ./test.sh -k name runs some of them;
# ./test.sh --fake-cuda also compiles the whole train step for a Hopper GPU, which takes minutes and no GPU.
# TEST_PROCESSES=4 ./test.sh where there are more cores. TORCH=2.11.0 ./test.sh: the tests of trainers, GPU path and
# kernels with another torch, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup_env.sh
setup_env  # sets python
tests=tests
if [ -n "${TORCH:-}" ]; then
  tests=$(printf 'tests/test_%s.py ' arms checkpoints compile_cache fast_forms fullgraph gpu_path kernels_setting \
    manifold model moe ranks runs sample schedule_data simple triton_compile triton_interpreter update_rules)
fi
$python data/embedded_corpus.py
$python -m ruff check .
$python -m ruff format --check .
# three files of tests at a time on two cores: those of faults wait more than they compute. In the order of their
# names, because xdist's own (many tests first) leaves the few long ones to the end
$python -m pytest -q $tests -n "${TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder "$@"
