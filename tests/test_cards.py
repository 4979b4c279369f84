"""Users' GPUs: whether a run fits their memory, what it uses on AMD's, and which compilers it needs."""

import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import base_env, lone_ranks, make_optimizer, read, train
from jobs import events, lines, run_here

import train_gpt
import train_gpt_simple
from runtime import checking, memory, supervise, toolchain
from runtime.memory import Memory, OutOfMemory
from runtime.settings import SettingsError
from runtime.supervise import StopRequest

VOCAB = 50257
CARDS = {"RTX 4090": 23.5, "H100": 79.1, "H200": 139.8}  # GiB, as torch reports them


def forecast(world_size=1, **env) -> Memory:
    """Forecast a run with these settings on the GPU that torch claims to have."""
    s, o, config = train_gpt.read_settings({name: str(value) for name, value in env.items()})
    ranks = SimpleNamespace(world_size=world_size, device=torch.device("cuda"))
    return Memory(s, o, config, VOCAB, train_gpt.count_slices(s, world_size), 8, ranks)


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("gib", [CARDS["H100"], CARDS["H200"]])
@pytest.mark.parametrize("world_size", [1, 8])
def test_passes_of_gpt2_small_stay_as_they_are_on_large_cards(on_gpu, gib, world_size):
    """Fails if a card with room for passes of 65,536 tokens gets smaller ones, which cost time."""
    on_gpu(9, 0, gib=gib)
    found = forecast(world_size)
    assert found.pass_tokens == 65_536
    assert found.largest_pass() == {1: 65_536, 8: 49_152}[world_size]  # eight ranks have one slice each
    assert found.wanted(found.largest_pass()) < found.usable


def test_gpt2_small_on_24_gigabytes(on_gpu):
    """Fails if the default's longest slice, 49,152 tokens, counts as fitting, no SLICES is found, or a run
    with that SLICES makes passes that do not fit."""
    on_gpu(8, 9, gib=CARDS["RTX 4090"])
    found = forecast()
    assert found.largest_pass() == 49_152 and found.wanted(49_152) > found.usable
    slices = found.fitting_slices()
    assert slices in (16, 32)
    assert f"SLICES={slices}" in found.advice()
    fits = forecast(SLICES=slices)
    assert fits.wanted(fits.largest_pass()) <= fits.usable
    assert 393_216 // slices <= fits.largest_pass() <= fits.pass_tokens
    assert forecast(SLICES=64).fitting_slices() is None


def test_the_forecast_counts_slices_of_validation_that_are_stacked(on_gpu):
    """Fails if short slices of validation count one by one, although one pass takes several."""
    on_gpu(9, 0, gib=CARDS["H100"])
    assert [forecast(VAL_BATCH_TOKENS=8 * n).val_tokens for n in (8192, 32_768, 262_144)] == [
        65_536,
        65_536,
        262_144,
    ]


def test_a_forecast_that_does_not_fit_is_a_warning_with_the_value_that_does(on_gpu):
    """Fails if a run that will not fit says so only at its end, or does not report its forecast."""
    said = []
    log = SimpleNamespace(event=lambda name, **fields: said.append((name, fields)), warn=said.append)
    on_gpu(8, 9, gib=CARDS["RTX 4090"])
    forecast().announce(log)
    (name, fields), warning = said
    assert name == "memory" and fields["device_gib"] == "23.5" and float(fields["forecast_gib"]) > 23.5
    assert "SLICES=" in warning and "49,152 tokens" in warning
    said.clear()
    on_gpu(9, 0, gib=CARDS["H100"])
    forecast().announce(log)
    assert len(said) == 1 and said[0][1]["pass_tokens"] == 65_536  # four slices of stage 1


def test_out_of_memory_names_the_setting_that_helps(on_gpu):
    """Fails if running out of memory ends a run without advice: change SLICES if a pass is one slice, or
    PASS_TOKENS if slices are stacked, which trains the same."""
    on_gpu(8, 9, gib=CARDS["RTX 4090"])
    for settings, wanted in (
        ({}, "SLICES=16|SLICES=32"),
        ({"SLICES": 64, "PASS_TOKENS": 65_536}, "PASS_TOKENS=32768"),
        ({"SLICES": 64, "PASS_TOKENS": 1}, "smaller BATCH_SIZES"),
    ):
        found = forecast(**settings)
        with pytest.raises(OutOfMemory, match=wanted), found.explained():
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ZeroDivisionError), forecast().explained():
        raise ZeroDivisionError


@pytest.mark.parametrize("part", ["rehearsal", "run"])
def test_a_run_that_ends_for_want_of_memory_says_what_helps(part, on_gpu, shards, tmp_path, monkeypatch):
    """Fails if rehearsal or loop pass on the allocator's bare error."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.chdir(tmp_path)

        def step(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(train_gpt.Trainer, "step", step)
        with run_here(train_gpt, base_env(shards, RUN_ID="large", VAL_LOSS_EVERY=0)) as start:
            on_gpu(8, 9, gib=CARDS["RTX 4090"])
            card = forecast()
            monkeypatch.setattr(train_gpt, "Memory", lambda *args: card)
            with pytest.raises(OutOfMemory, match="49,152 tokens.*SLICES=16"):
                if part == "run":
                    train_gpt.Run(start, StopRequest()).train()
                else:
                    train_gpt.Run(start, StopRequest()).rehearse()
    assert len(events(tmp_path / "logs/large.txt", "memory")) == (1 if part == "rehearsal" else 0)


@pytest.mark.parametrize("optimizer", ["normuon", "adamw"])
def test_held_memory_is_that_of_the_buckets(optimizer):
    """Fails if the forecast omits a parameter or state of the trainer's own optimizer, whose weights are fp32
    here, without separate low halves."""
    s, o, config = read(train_gpt, OPTIMIZER=optimizer)
    model = train_gpt.build_model(s, config, 256, torch.device("cpu"))
    buckets = make_optimizer(train_gpt, model, o).buckets
    held = sum(x.numel() for b in buckets for x in (b.weights, b.grads, *b.state.values()))
    weights = sum(p.numel() for p in model.parameters())
    counted = (
        memory.held_bytes(config, 256, 1, optimizer == "adamw") / 2
    )  # weight 2, gradient 2, low half 2, states 4 or 8 bytes
    # in fp32: weight 4, gradient 4, states 4 or 8
    assert 4 * held == pytest.approx(2 * counted + 2 * weights, rel=0.02)


# ------------------------------------------------------------------------------------------------- slices


def test_slices_do_not_decide_what_is_validated(shards):
    """Fails if, of too few tokens for VAL_TOKENS, an arm with more SLICES validates on fewer."""
    env = dict(
        DATA_PATH=str(shards), TRAIN_FILES="made_train_*.bin", VAL_FILES="made_val_*.bin", MODEL="tiny"
    )
    found = {checking.read_run(train_gpt, {**env, "SLICES": n})[0].val_tokens for n in ("8", "16", "64")}
    assert len(found) == 1


def test_slices_cut_the_same_number_of_tokens(shards):
    """Fails if SLICES changes how many tokens a step has, or does not reach the data."""
    s, _, _ = read(train_gpt, SLICES=16, DATA_PATH=shards, TRAIN_FILES="made_train_*.bin")
    train, _ = train_gpt.open_pair(shards, "made_train_*.bin", "made_val_*.bin")
    batches = train_gpt.TrainData(train, s, lone_ranks(0, 2)).make(2048)
    assert [b.inputs_BT.shape for b in batches] == [(8, 128)]


def test_ranks_train_the_same_slices(shards, tmp_path):
    """Fails if SLICES=16 does nothing or changes what is validated (with equal initial weights, the first
    validation is equal in every digit); or if the number of ranks changes what it trains on, or the logged
    gradient norm."""
    eight, _ = train(tmp_path, shards, "eight")
    one, _ = train(tmp_path, shards, "one", SLICES=16)
    assert one[0] == eight[0] and one[-1] != eight[-1] and one[-1] == pytest.approx(eight[-1], abs=0.3)
    two, _ = train(tmp_path, shards, "two", ranks=2, SLICES=16, PASS_TOKENS=256)
    assert two == pytest.approx(one, abs=2e-4)
    norms = [
        [
            float(text.partition("grad_norm:")[2].split()[0])
            for step in steps.values()
            for text in step
            if "grad_norm:" in text
        ]
        for steps in (lines(tmp_path / "logs" / f"{run_id}.txt") for run_id in ("one", "two"))
    ]
    assert len(norms[0]) == 3 and norms[1] == pytest.approx(norms[0], rel=0.01)


# ---------------------------------------------------------------------------------------------------- AMD


def test_an_amd_gpu_takes_plain_torch_and_says_so(on_gpu, monkeypatch):
    """Fails if an MI300, whose capability reads 9.4, counts as a Hopper: its float8 format differs, and the
    kernels are for NVIDIA GPUs."""
    on_gpu(9, 4)
    env = {"MODEL": "gpt2-small", "COMPILE": "0"}
    s, _, _, notes = checking.read_run(train_gpt, env)
    assert (s.kernels, s.attn_backend, s.disable_fp8, notes) == ("triton", "varlen", False, ())
    monkeypatch.setattr(torch.version, "hip", "6.4.43484")
    s, _, _, notes = checking.read_run(train_gpt, env)
    assert (s.kernels, s.attn_backend, s.disable_fp8) == ("torch", "sdpa", True)
    assert notes == (checking.AMD_NOTE,)
    with pytest.raises(SettingsError, match="KERNELS=triton, but no NVIDIA GPU"):
        train_gpt.read_settings({**env, "KERNELS": "triton"})


def test_cards_before_ampere_take_attention_by_sdpa(on_gpu):
    """Fails if a T4 would crash in its first pass: FlashAttention-2 needs sm_80."""
    for capability, backend in (((7, 5), "sdpa"), ((8, 0), "varlen"), ((12, 0), "varlen")):
        on_gpu(*capability)
        assert train_gpt.read_settings({"MODEL": "tiny"})[0].attn_backend == backend


# ---------------------------------------------------------------------------------------------- compilers


@pytest.fixture
def asked_anew():
    """Forget the compilers' check, which is made once per process."""
    toolchain.fault.cache_clear()
    yield
    toolchain.fault.cache_clear()


def fake_compiler(folder: Path, text: str) -> Path:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("language, variable", [("c", "CC"), ("c++", "CXX")])
def test_every_fault_of_a_compiler_is_named(language, variable, tmp_path, monkeypatch, asked_anew):
    """Fails if a machine without gcc or Python.h learns so from a traceback of Triton's, after the data are
    read and eight ranks have started."""
    if not shutil.which("gcc") or not (toolchain.python_headers() / "Python.h").is_file():
        pytest.skip("no compiler here")
    broken = fake_compiler(tmp_path, "echo 'cannot find cc1' >&2; exit 1")
    for env, wanted in (
        ({}, ""),
        ({variable: str(broken)}, "fails on a program of one line (cannot find cc1)"),
        ({variable: str(tmp_path / "nothing")}, "cannot be run (No such file or directory)"),
        ({"PATH": str(tmp_path / "empty")}, f"name it in {variable}"),
    ):
        toolchain.fault.cache_clear()
        with monkeypatch.context() as patch:
            patch.delenv(variable, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            found = toolchain.fault(language)
        assert wanted in found and bool(found) == bool(wanted)
    toolchain.fault.cache_clear()
    monkeypatch.setattr(toolchain, "python_headers", lambda: tmp_path)
    assert f"no Python.h in {tmp_path}" in toolchain.fault(language)


def test_only_what_compiles_needs_compilers(monkeypatch):
    """Fails if a plain CPU run needs a compiler, or a GPU run without one is accepted."""
    monkeypatch.setattr(toolchain, "fault", lambda language: f"found no {language}")
    check = lambda **s: toolchain.check_compilers(SimpleNamespace(**s))
    check(device="cpu", compile="0", kernels="cpu")
    check(device="cuda", compile="0", kernels="torch")
    for settings, language in (
        (dict(device="cuda", compile="0", kernels="triton"), "C compiler: found no c; COMPILE=0 and KERNELS"),
        (dict(device="cuda", compile="1", kernels="torch"), "C compiler: found no c; COMPILE=0 and KERNELS"),
        (dict(device="cpu", compile="1", kernels="torch"), r"C\+\+ compiler: found no c\+\+; COMPILE=0 does"),
    ):
        with pytest.raises(SettingsError, match=language):
            check(**settings)


@pytest.mark.parametrize("trainer", [train_gpt, train_gpt_simple])
def test_check_settings_names_a_missing_compiler(trainer, shards, tmp_path, monkeypatch, capsys, asked_anew):
    """Fails if ./run.sh starts ranks that cannot compile, or a run ends in torch's own error."""
    env = base_env(shards, COMPILE=1) if trainer is train_gpt else {"MODEL": "tiny", "COMPILE": "1"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    for arguments in (["--check-settings"], []):
        assert supervise.main(trainer, arguments, {**env, "DEVICE": "cpu"}) == 2
        assert "compiling takes a C++ compiler: found no g++ on PATH" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
