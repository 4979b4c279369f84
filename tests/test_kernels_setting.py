"""KERNELS: which runs use the Triton kernels, and that no other imports them. (Results:
test_triton_interpreter.py; compilation: test_triton_compile.py.)"""

import importlib.util
import sys

import pytest
import torch
from helpers import FORMS, TRAINERS, make_optimizer, optimizer_settings, read, small_model

import kernels
import train_gpt
from runtime.settings import SettingsError


@pytest.fixture
def settings_on(on_gpu, monkeypatch):
    """Function that resolves the settings as on a machine with one such GPU, with triton or without."""

    def resolve(*capability, installed=True, **env):
        on_gpu(*capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
        return train_gpt.read_settings({"MODEL": "tiny", **env})[0]

    return resolve


def test_auto_is_the_devices_own(settings_on):
    """Fails if a device with fast forms trains without them, or another device tries them."""
    assert read(train_gpt)[0].kernels == "cpu"
    assert read(train_gpt, COMPILE=1)[0].kernels == read(train_gpt, KERNELS="torch")[0].kernels == "torch"
    assert settings_on(9, 0).kernels == "triton"
    assert settings_on(8, 0).kernels == "triton"
    assert settings_on(7, 5).kernels == "torch"
    assert settings_on(9, 0, installed=False).kernels == "torch"
    assert settings_on(9, 0, KERNELS="torch").kernels == "torch"


def test_kernels_asked_for_and_not_to_be_had_are_refused(settings_on):
    """Fails if there is a silent fallback: users who set KERNELS=triton would report wrong timings."""
    with pytest.raises(SettingsError, match="KERNELS=triton, but no NVIDIA GPU"):
        read(train_gpt, KERNELS="triton")
    with pytest.raises(SettingsError, match="KERNELS=triton, but triton is not installed"):
        settings_on(9, 0, installed=False, KERNELS="triton")
    with pytest.raises(SettingsError, match="KERNELS=cpu is for DEVICE=cpu and COMPILE=0"):
        settings_on(9, 0, KERNELS="cpu")
    with pytest.raises(SettingsError, match="KERNELS=cpu is for DEVICE=cpu and COMPILE=0"):
        read(train_gpt, KERNELS="cpu", COMPILE=1)


@pytest.mark.parametrize("forms", FORMS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_without_cuda_the_kernels_are_not_even_imported(trainer, forms, monkeypatch):
    """Fails if a step on a CPU (forward, backward, update) imports triton."""
    monkeypatch.setitem(sys.modules, "kernels.cuda", None)  # an import would raise
    monkeypatch.delattr(kernels, "cuda", raising=False)
    tokens = torch.randint(0, 100, (1, 33))
    batch = trainer.Batch(tokens[:, :-1].int(), tokens[:, 1:], torch.tensor([0, 32], dtype=torch.int32), 32)
    with FORMS[forms](trainer):
        model = small_model(trainer)
        optimizer = make_optimizer(trainer, model, optimizer_settings(trainer))
        before = model.blocks[0].mlp.up.detach().clone()
        model.train_loss(batch, (8, 16), True, torch.ones(1))[0].backward()
        optimizer.step(0, 1.0, 32, measure=True)
    assert not torch.equal(before, model.blocks[0].mlp.up)


def test_presets_fit_the_kernels():
    """Fails if a preset's MLP is not a multiple of the kernels' blocks: its runs would crash on a GPU."""
    cuda = pytest.importorskip("kernels.cuda", reason="triton is not installed")
    for config, _ in train_gpt.PRESETS.values():
        assert config.width % cuda.MLP_BLOCKS["BLOCK_K"] == 0
        assert 4 * config.width % cuda.MLP_BLOCKS["BLOCK_N"] == 0
