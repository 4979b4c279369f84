"""Runs offgpu/numerics.py, every GPU kernel against its reference, in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "offgpu" / "numerics.py"


def test_kernels_equal_their_references():
    pytest.importorskip("triton", reason="triton is not installed, so KERNELS=torch is what runs here")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
                          env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=CHECKS.parents[2],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
