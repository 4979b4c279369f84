"""Make tests import the scripts, plain files at the repository's root, from there and nowhere else."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    text = "also compile the whole train step for sm_90 (needs a C++ compiler and minutes, no GPU)"
    parser.addoption("--fake-cuda", action="store_true", help=text)


def pytest_configure(config):
    config.addinivalue_line("markers", "fake_cuda: runs only with --fake-cuda")
    os.environ["OMP_NUM_THREADS"] = "1"  # small tensors are slower on two threads, and files run side by side


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--fake-cuda"):
        for item in items:
            if item.get_closest_marker("fake_cuda"):
                item.add_marker(pytest.mark.skip(reason="takes long; ./test.sh --fake-cuda runs it"))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Folder with made-up shards for whole runs."""
    from helpers import make_chain, write_shard

    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "made_train_000000.bin", make_chain(120_000, 1))
    write_shard(folder / "made_val_000000.bin", make_chain(20_000, 2))
    return folder


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Function that imports a trainer's source beside this repository's packages."""

    def load(text: str):
        path = tmp_path / "edited_gpt.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        monkeypatch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def on_gpu(monkeypatch):
    """Function that makes torch claim a GPU of some capability and memory."""
    import torch

    from kernels import attention

    def pretend(*capability, gib=80.0):
        properties = SimpleNamespace(total_memory=int(gib * 2**30))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)

    attention.activate.cache_clear()
    yield pretend
    attention.activate.cache_clear()


@pytest.fixture
def trainers_here(monkeypatch):
    """Let the root's trainers answer the launcher in this process, which has imported torch."""
    from helpers import ROOT, call

    from analysis import trainers
    from runtime import supervise

    def answer(command, input, env, **options):
        _, script, question = command
        if Path(script).resolve().parent != ROOT:
            return subprocess.run(command, input=input, env=env, **options)
        module = importlib.import_module(Path(script).stem)
        with mock.patch.dict(os.environ, env, clear=True):
            done = call(lambda words: supervise.main(module, words), [question], given=input.encode())
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    monkeypatch.setattr(trainers, "subprocess", SimpleNamespace(run=answer))
    trainers.read_trainer.cache_clear()
    yield
    trainers.read_trainer.cache_clear()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folder with two stand-ins that differ like the twins, and a clean environment."""
    from launches import STAND_IN, alive

    from analysis.trainers import read_trainer

    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in ("SEED", "RUN_ID", "MODEL", "DEVICE", "DATA_PATH", "COMPILE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "base.py").write_text(STAND_IN)
    (tmp_path / "ord.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))  # for the stand-ins
    read_trainer.cache_clear()
    yield tmp_path
    left = alive(tmp_path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    read_trainer.cache_clear()
    assert not left, "processes of the sweep are still there"


@pytest.fixture
def launch(place, monkeypatch, capsys):
    """Function that runs the launcher's main in this process; returns its exit code and output."""
    import launch_lr_sweep as launcher
    from analysis.processes import processes_of

    # at exit the launcher stops all descendants of this process, but must spare those from before
    before = processes_of(set(), [os.getpid()])
    monkeypatch.setattr(launcher, "processes_of", lambda *wanted: processes_of(*wanted) - before)
    # else this process adopts the orphans of later tests and nobody reaps them
    monkeypatch.setattr(launcher, "adopt_orphans", lambda: None)
    monkeypatch.setattr(launcher, "POLL_S", 0.02)

    def call(*args):
        capsys.readouterr()
        code = launcher.main(list(args))
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return call
