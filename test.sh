#!/usr/bin/env bash
# Set everything up and run the tests: CPU only, no network. ./test.sh -k name runs some of them;
# ./test.sh --fake-cuda also compiles the whole train step for a Hopper GPU, which takes minutes and no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup_env.sh
setup_env
.venv/bin/python data/embedded_corpus.py
.venv/bin/python sync_twins.py --check
.venv/bin/ruff check .
.venv/bin/python -m pytest -q tests "$@"
