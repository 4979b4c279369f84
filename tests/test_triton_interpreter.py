"""Every Triton kernel against its reference: runs offgpu/numerics.py in Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).parent / "offgpu" / "numerics.py"


def test_kernels_equal_their_references():
    """Fails if a kernel differs from its plain-torch reference, or a check was skipped."""
    pytest.importorskip("triton", reason="triton is not installed, so KERNELS=torch is what runs here")
    done = check("cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


def check(device: str):
    """Run offgpu/numerics.py on a device."""
    return subprocess.run(
        [sys.executable, str(CHECKS), "--device", device],
        cwd=CHECKS.parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_asking_for_a_gpu_that_is_not_there_is_refused():
    """Fails if an interpreted comparison could be reported as one on a GPU."""
    pytest.importorskip("triton")
    done = check("cuda")
    assert done.returncode != 0 and "torch finds no CUDA device" in done.stdout + done.stderr
    assert "passed" not in done.stdout
