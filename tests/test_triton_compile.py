"""Every kernel launch that the trainers make for gpt2-small, compiled for GPUs that are not here: within
their registers and shared memory, and with the instructions that make them fast; by offgpu/launches.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes a block may have
REGISTERS = 65_536                             # of a multiprocessor, for all threads of its blocks
PRODUCTS = {"gram_kernel", "mlp_kernel", "mlp_hopper_kernel"}
ONLY_ON = {"mlp_kernel": {80, 89}, "mlp_hopper_kernel": {90}, "quantize_kernel": {89, 90}}


@pytest.fixture(scope="module", params=[90, 80, 89], ids=lambda arch: f"sm_{arch}")
def built(request):
    """(architecture, names of all kernels, their compiled launches)"""
    pytest.importorskip("triton", reason="triton is not installed, so KERNELS=torch is what runs here")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "tests/offgpu/launches.py", str(request.param)], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return request.param, found["names"], found["launches"]


def test_every_kernel_is_launched_by_the_trainers(built):
    """Fails if a kernel exists that no training step reaches, or is not wired."""
    arch, names, launches = built
    elsewhere = {name for name, archs in ONLY_ON.items() if arch not in archs}
    assert {x["kernel"] for x in launches} == set(names) - elsewhere


def test_nothing_spills(built):
    """Registers that do not suffice are kept in memory, silently, at many times the cost."""
    _, _, launches = built
    assert [x for x in launches if x["spilled"] or x["stack"]] == []


def test_resources_fit(built):
    arch, _, launches = built
    assert [x for x in launches if x["shared"] > SHARED_LIMIT[arch]] == []
    assert [x for x in launches if x["registers"] * x["warps"] * 32 > REGISTERS] == []


def test_products_run_on_tensor_cores(built):
    """Hopper's own (wgmma), fed by copies that overlap with them; elsewhere no kernel multiplies matrices."""
    arch, _, launches = built
    for x in launches:
        if x["kernel"] in PRODUCTS:
            assert x["wgmma" if arch >= 90 else "mma"] > 0, x
            assert x["async_copies"] + x["bulk_copies"] > 0, x
        else:
            assert x["wgmma"] == x["mma"] == 0, x
