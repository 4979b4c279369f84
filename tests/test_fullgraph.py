"""torch.compile on gpt2-small as on a GPU, without one: a pretended CUDA device under fake tensors, in its
own process (tests/offgpu/pretend_cuda.py). Slow tests (--fake-cuda) use all layers, the others a few."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import WAYS_OF_ORD

TRACE = Path(__file__).parent / "offgpu" / "trace_step.py"
NO_COMPILER = 77


def trace(modes: str, tmp_path, timeout_s: int) -> dict[str, int]:
    """Trace parts of the step: {part: graphs made up to its end}."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "CXX")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    command = [sys.executable, str(TRACE), *modes.split()]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode == NO_COMPILER:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return {name: int(n) for name, n in re.findall(r"^(.*): (\d+) graphs", done.stdout, re.M)}


def new_graphs(so_far: dict[str, int]) -> dict[str, int]:
    """Return {part of the step: graphs that it made itself}."""
    counts = list(so_far.values())
    return dict(zip(so_far, (b - a for a, b in zip([0, *counts], counts))))


def test_the_step_is_one_graph_forward_and_backward_and_takes_the_kernels(tmp_path):
    """Fails if a graph break, a tensor on the wrong device or a host read would stop a GPU run, or another
    number of documents would recompile the model. The process itself asserts that sm_90's default uses the
    Triton forms, in the graphs and for both twins' matrix step. Also traces the first stage of
    gpt2-small-2026-08, whose networks, masks and sign tables could break the graph: a pass, and Muon's step
    for three shapes of matrices."""
    graphs = trace("stage later-start", tmp_path, 900)
    assert new_graphs(graphs) == {
        "triton step": 3,  # a pass with its backward, and Muon's step for two shapes of matrices
        "train_gpt optimizer": 4,  # Adam's
        "torch step": 3,
        "train_gpt_muon_ord optimizer": 6,  # and without statistics
        "first stage": 4,
    }


TRACED = {
    "experts": {  # a training pass, a validation pass, and Muon's step for two shapes of matrices
        "train_gpt experts": 4,
        "train_gpt optimizer": 2,  # Adam's, of the head and of everything small
        "train_gpt_muon_ord experts": 4,
        "train_gpt_muon_ord optimizer": 4,
    },
    "later": {"first stage": 4, "last stage": 1, "validation": 1},
}


@pytest.mark.fake_cuda
@pytest.mark.parametrize("mode", TRACED)
def test_no_part_breaks_its_graph(mode, tmp_path):
    """Fails if a run on a GPU would stop. experts: at routing-dependent shapes, host reads, or operands that
    torch's grouped products refuse, in moe-79m. later: at a graph break in a network, mask or sign table of
    gpt2-small-2026-08; the process asserts which passes use the Triton forms. Only with
    --fake-cuda: test_moe.py, the first test and test_gpu_path.py have less of each."""
    assert new_graphs(trace(mode, tmp_path, 900)) == TRACED[mode]


@pytest.mark.fake_cuda
def test_the_step_compiles_for_hopper(tmp_path):
    """Fails if inductor's templates, or the Triton operations among them, do not compile for sm_90. Only with
    --fake-cuda: machine code for the whole step takes minutes."""
    graphs = new_graphs(trace("inductor", tmp_path, 3600))
    assert graphs == {"inductor step": 3, "inductor optimizer": 6, "inductor validation": 1}
    assert len(list(tmp_path.rglob("*.cubin"))) > 50
    assert all(".target sm_90" in ptx.read_text() for ptx in tmp_path.rglob("*.ptx"))


@pytest.mark.fake_cuda
def test_every_way_of_ord_compiles_for_hopper(tmp_path):
    """Fails if an ORD setting other than the default does not compile. Only with --fake-cuda."""
    graphs = new_graphs(trace("ord", tmp_path, 3600))
    assert graphs == dict.fromkeys(WAYS_OF_ORD, 2)  # two shapes of matrices
    assert len(list(tmp_path.rglob("*.cubin"))) > 50
