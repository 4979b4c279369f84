"""KERNELS: who gets the Triton kernels, and that nobody else touches them. (What they compute:
test_triton_interpreter.py; how they compile: test_triton_compile.py.)"""

import importlib.util
import sys

import helpers
import pytest
import torch
from helpers import TRAINERS, lone_ranks, make_optimizer, optimizer_settings, read, small_model


def settings_on_cuda(trainer, monkeypatch, capability, installed=True, **env):
    """What a machine with one such GPU would resolve to; nothing is put on a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    return trainer.read_settings({"MODEL": "tiny", **env})[0]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_auto_is_triton_where_it_runs(trainer, monkeypatch):
    assert read(trainer)[0].kernels == "torch"  # no CUDA
    assert settings_on_cuda(trainer, monkeypatch, (9, 0)).kernels == "triton"
    assert settings_on_cuda(trainer, monkeypatch, (8, 0)).kernels == "triton"
    assert settings_on_cuda(trainer, monkeypatch, (7, 5)).kernels == "torch"
    assert settings_on_cuda(trainer, monkeypatch, (9, 0), installed=False).kernels == "torch"
    assert settings_on_cuda(trainer, monkeypatch, (9, 0), KERNELS="torch").kernels == "torch"


def test_triton_asked_for_and_not_to_be_had_is_refused(monkeypatch):
    """No silent fallback: who asks for the kernels and does not get them would report wrong timings."""
    with pytest.raises(ValueError, match="KERNELS=triton, but no CUDA device"):
        read(TRAINERS[0], KERNELS="triton")
    with pytest.raises(ValueError, match="KERNELS=triton, but triton is not installed"):
        settings_on_cuda(TRAINERS[0], monkeypatch, (9, 0), installed=False, KERNELS="triton")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_without_cuda_the_kernels_are_not_even_imported(trainer, monkeypatch):
    """A whole step in plain torch: forward, backward, update. CPU machines need no triton."""
    monkeypatch.setitem(sys.modules, "triton_kernels", None)  # an import would raise
    model = small_model(trainer)
    assert not any(getattr(m, "kernels", False) for m in model.modules())
    tokens = torch.randint(0, 100, (1, 33))
    batch = trainer.Batch(tokens[:, :-1].int(), tokens[:, 1:], torch.tensor([0, 32], dtype=torch.int32), 32)
    optimizer = make_optimizer(trainer, model, optimizer_settings(trainer), ranks=lone_ranks(trainer))
    before = model.blocks[0].mlp.up.detach().clone()
    model(batch, (8, 16), torch.ones(1), True)[0].backward()
    optimizer.step(0, 1.0, 32, measure=True)
    assert not torch.equal(before, model.blocks[0].mlp.up)


def test_presets_fit_the_kernels():
    """Every preset's MLP is a multiple of the kernels' blocks, so that no run dies of it on a GPU."""
    kernels = pytest.importorskip("triton_kernels", reason="triton is not installed")
    for config, _ in helpers.train_gpt.PRESETS.values():
        assert config.width % kernels.MLP_BLOCKS["BLOCK_K"] == 0
        assert 4 * config.width % kernels.MLP_BLOCKS["BLOCK_N"] == 0
