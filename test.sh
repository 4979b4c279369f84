#!/usr/bin/env bash
# Set everything up and run the tests: CPU only, no network. ./test.sh -k name runs some of them;
# ./test.sh --fake-cuda also compiles the whole train step for a Hopper GPU, which takes minutes and no GPU.
# TEST_PROCESSES=4 ./test.sh where there are more cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup_env.sh
setup_env
.venv/bin/python data/embedded_corpus.py
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# three files of tests at a time on two cores: those of faults wait more than they compute. In the order of their
# names, because xdist's own (many tests first) leaves the few long ones to the end
.venv/bin/python -m pytest -q tests -n "${TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder "$@"
