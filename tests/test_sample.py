"""sample.py and the model file that a run leaves: what comes out of it is what was trained."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import BASELINE, ROOT, base_env, losses, make_tokens, run, small_config, small_model, train

import sample
import train_gpt


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("sampled")
    train(cwd, shards, "short", BASELINE)
    return cwd


def test_the_file_holds_what_was_validated(trained, shards):
    """The last validation loss comes out again, token by token, from nothing but the file."""
    path = trained / "logs" / "short" / "model.safetensors"
    model, metadata = sample.load_model(path, "cpu")
    settings = train_gpt.read_settings(base_env(shards))[0]
    _, val = train_gpt.open_data(settings, 1)
    model.rotary.make_tables(settings.val_batch_tokens)
    batches = list(train_gpt.val_batches(val, settings, train_gpt.Ranks("cpu")))
    total = sum(model(b, tuple(metadata["windows"]), None, metadata["tied"])[0].item() for b in batches)
    assert total / settings.val_tokens == pytest.approx(losses(trained, "short")[-1], abs=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_next_logits_are_the_models(tied, tmp_path):
    """Sampling goes around GPT.forward, so its probabilities must be checked against it; every feature on."""
    model = small_model(train_gpt, vocab_size=100)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    config = {
        "model_config": train_gpt.dataclasses.asdict(small_config(train_gpt)),
        "vocab_size": 100,
        "mark": 0,
        "residual_scale": 1.0,
    }
    path = tmp_path / "model.safetensors"
    train_gpt.save_model(path, model, config, (8, 16), tied)
    loaded, metadata = sample.load_model(path, "cpu")
    loaded.rotary.make_tables(64)
    tokens = make_tokens([24], vocab_size=100).tolist()
    ends = torch.tensor([0, 24], dtype=torch.int32)
    inputs = torch.tensor([tokens], dtype=torch.int32)
    nats = []
    for target in range(100):  # the loss of each possible last target is minus its log probability
        targets = torch.full((1, 24), target)
        batch = train_gpt.Batch(inputs, targets, ends, 24)
        other = train_gpt.Batch(inputs, torch.cat((targets[:, :-1], targets[:, :1] * 0), 1), ends, 24)
        nats.append((model(batch, (8, 16), None, tied)[0] - model(other, (8, 16), None, tied)[0]).item())
    logits = sample.next_logits(loaded, tokens, metadata)
    assert np.allclose((logits[0] - logits).numpy(), nats, atol=2e-4)


def test_the_same_seed_gives_the_same_text(trained):
    def ask(*args):
        argv = [sys.executable, str(ROOT / "sample.py"), "logs/short/model.safetensors", *args]
        return subprocess.run(argv, cwd=trained, capture_output=True, text=True)

    first, again = (ask("--prompt", "import", "--tokens", "20", "--seed", "3") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout and first.stdout.startswith("import")
    assert ask("--prompt", "import", "--tokens", "20", "--seed", "4").stdout != first.stdout
    assert ask("--tokens", "0").returncode == 2


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_what_is_no_model_is_refused(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert sample.main([str(path)]) == 2
    assert "wanted a model.safetensors" in capsys.readouterr().err


def test_no_model_is_written_where_none_is_wanted(shards, tmp_path):
    env = base_env(shards, RUN_ID="none", SAVE_MODEL=0, NUM_SCHEDULED_ITERATIONS=1)
    assert run(tmp_path, BASELINE, env, ranks=0).returncode == 0
    assert not (tmp_path / "logs" / "none").exists()
