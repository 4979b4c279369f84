"""Every kernel launch of the trainers for gpt2-small, compiled without a GPU by offgpu/launches.py: each fits
in registers and shared memory and uses the fast instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes per block
REGISTERS = 65_536  # per multiprocessor
PRODUCTS = {"mlp_kernel", "mlp_hopper_kernel"}
# sm_80 and sm_89 use sm_120's kernels, sm_100 sm_90's with its own instructions; together a minute
ARCHITECTURES = [90, 120, *(pytest.param(arch, marks=pytest.mark.fake_cuda) for arch in (80, 89, 100))]
ONLY_ON = {
    "mlp_kernel": {80, 89, 120},
    "mlp_hopper_kernel": {90, 100},
    "quantize_kernel": {89, 90, 100, 120},
}
MULTIPLIES = {
    80: "mma",
    89: "mma",
    90: "wgmma",
    100: "tcgen05",
    120: "mma",
}  # consumer Blackwell has Ampere's


def compile_launches(arch: int, *more: str):
    """Compile: (names of all kernels, their compiled launches)."""
    pytest.importorskip("triton", reason="triton is not installed, so KERNELS=torch is what runs here")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "tests/offgpu/launches.py", str(arch), *more],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    return found["names"], found["launches"]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def built(request):
    """Compile for an architecture: (it, names of all kernels, their compiled launches)."""
    return request.param, *compile_launches(request.param)


def test_every_kernel_is_launched_by_the_trainers(built):
    """Fails if no training step launches some kernel."""
    arch, names, launches = built
    elsewhere = {name for name, archs in ONLY_ON.items() if arch not in archs}
    assert {x["kernel"] for x in launches} == set(names) - elsewhere


def ways(launches: list[dict], kernel: str, constant: str) -> set:
    return {x["constants"].get(constant) for x in launches if x["kernel"] == kernel}


def test_other_shapes_and_settings_are_among_them(built):
    """Fails if the tests below do not cover wide matrices, other decays or Muon without variance."""
    arch, _, launches = built
    other = arch == 90
    decays = {"cautious", *(("none", "param", "update", "both") if other else ())}
    assert ways(launches, "apply_kernel", "MODE") == decays
    for kernel in ("loss_kernel", "loss_backward_kernel"):
        assert ways(launches, kernel, "PREFIX") == {True, False}
    assert ways(launches, "apply_kernel", "TALL") == {True, *((False,) if other else ())}
    assert ways(launches, "apply_kernel", "SCALED") == {True, *((False,) if other else ())}
    assert ways(launches, "apply_kernel", "COLS") == {768, *((512,) if other else ())}
    lines = {name for x in launches if x["kernel"] == "row_scales_kernel" for name in x["constants"]}
    assert lines == {"u_k", *(("u_r",) if other else ())}, "rows of tall matrices, columns of wide ones"


def test_nothing_spills(built):
    """Fails if a kernel runs out of registers, and silently spills them to memory at many times the cost."""
    check_spills(built[2])


def check_spills(launches):
    assert [x for x in launches if x["spilled"] or x["stack"]] == []


def test_no_arithmetic_reads_the_stack_pointer(built):
    """ptxas 12.8 lost single bytes of casts to e5m2. On an H100 the head's gradient was garbage and NaN,
    though the PTX was right, without a warning. Kernels without float8 are not looked at."""
    assert built[0] < 89 or {"quantize_kernel"} < {x["kernel"] for x in built[2] if x["float8"]}
    assert [x for x in built[2] if x["stack_pointer_reads"]] == []


def test_resources_fit(built):
    """Fails if a launch needs more shared memory or registers than a block may have."""
    check_resources(built[0], built[2])


def check_resources(arch, launches):
    assert [x for x in launches if x["shared"] > SHARED_LIMIT[arch]] == []
    assert [x for x in launches if x["registers"] * x["warps"] * 32 > REGISTERS] == []


def test_several_blocks_of_the_loss_run_at_a_time(built):
    """Fails if a tile of the loss's gradient is computed twice, once per layout, as triton 3.6 does if it
    can; that takes up to 255 registers, and one block fills a multiprocessor."""
    arch, _, launches = built
    loss = [x for x in launches if x["kernel"] == "loss_backward_kernel"]
    assert len(loss) >= 3
    blocks = 3 if arch == 90 else 2
    assert [x for x in loss if blocks * x["registers"] * x["warps"] * 32 > REGISTERS] == []


def test_products_run_on_tensor_cores(built):
    """Fails if a product does not use the architecture's own instructions (wgmma on Hopper, tcgen05 on data
    center Blackwell) with overlapping copies, or another kernel multiplies matrices."""
    check_products(built[0], built[2])


def check_products(arch, launches):
    for x in launches:
        if x["kernel"] in PRODUCTS:
            assert x[MULTIPLIES[arch]] > 0, x
            assert x["async_copies"] + x["bulk_copies"] > 0, x
        else:
            assert x["wgmma"] == x["tcgen05"] == x["mma"] == 0, x


@pytest.mark.fake_cuda
def test_every_preset_and_setting():
    """Else a preset or a setting that gpt2-small's defaults lack ends on a GPU: every shape of matrices of
    every preset, every decay with and without variance reduction and ORD, steps of gpt2-medium and
    dense-88m. Only with --fake-cuda: it takes minutes."""
    _, launches = compile_launches(90, "everything")
    assert len(launches) > 100
    applied = [x["constants"] for x in launches if x["kernel"] == "apply_kernel"]
    shapes = {(x["COLS"], x["TALL"]) for x in applied}
    wide = {(128, False), (512, False), (768, False)}  # grouped q and k (2026-08), and fewer keys (dense-88m)
    assert shapes == {(n, True) for n in (128, 256, 384, 512, 768, 1024, 2048)} | wide
    check_spills(launches)
    check_resources(90, launches)
    check_products(90, launches)
