"""sample.py and a run's model file: the sampled model is the trained one."""

import numpy as np
import pytest
import torch
from helpers import BASELINE, base_env, losses, make_tokens, save_model, small_model, train

import sample
import train_gpt
from runtime import checkpoints
from runtime.ranks import Ranks
from runtime.trained import load_model


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    """Folder of a finished run, `short`."""
    cwd = tmp_path_factory.mktemp("sampled")
    train(cwd, shards, "short", BASELINE)
    return cwd


def test_the_file_holds_what_was_validated(trained, shards):
    """Fails if the file alone does not reproduce the run's last validation loss."""
    path = trained / "logs" / "short" / "model.safetensors"
    trained_model = load_model(path, "cpu")
    model, metadata = trained_model.model, trained_model.metadata
    settings = train_gpt.read_settings(base_env(shards))[0]
    _, val = train_gpt.open_data(settings, 1)
    model.rotary.make_tables(settings.val_batch_tokens)
    batches = list(train_gpt.val_batches(val, settings, Ranks("cpu")))
    windows, tied = tuple(metadata["windows"]), metadata["tied"]
    with torch.no_grad():
        total = sum(model.val_loss(batch, windows, tied)[0].item() for batch in batches)
    assert total / settings.val_tokens == pytest.approx(losses(trained, "short")[-1], abs=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_next_logits_are_the_models(tied, tmp_path):
    """Fails if sampling, which bypasses GPT.val_loss, has other probabilities; every feature is on."""
    model = small_model(train_gpt, vocab_size=100)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    path = tmp_path / "model.safetensors"
    save_model(path, model, tied=tied)
    tokens = make_tokens([24], vocab_size=100).tolist()
    ends = torch.tensor([0, 24], dtype=torch.int32)
    inputs = torch.tensor([tokens], dtype=torch.int32)

    @torch.no_grad()
    def nats_of(targets) -> float:
        return model.val_loss(train_gpt.Batch(inputs, targets, ends, 24), (8, 16), tied)[0].item()

    nats = []
    for target in range(100):  # the loss of each possible last target is minus its log probability
        targets = torch.full((1, 24), target)
        other = torch.cat((targets[:, :-1], targets[:, :1] * 0), 1)
        nats.append(nats_of(targets) - nats_of(other))
    logits = load_model(path, "cpu").next_logits(tokens)
    assert np.allclose((logits[0] - logits).numpy(), nats, atol=2e-4)


def test_a_model_whose_trainer_is_gone_names_it(tmp_path):
    """Fails if a user's deleted trainer is mistaken for another, or a file can make us import any module."""
    path = tmp_path / "model.safetensors"
    for script in ("my_trainer.py", "../x.py"):
        checkpoints.save_model(path, small_model(train_gpt), {"config": {}, "script": script})
        with pytest.raises(ValueError, match=f"was written by '{script}', which is not in"):
            load_model(path, "cpu")


def test_the_same_seed_gives_the_same_text(trained, capsys):
    """Fails if sampling is not reproducible, or every seed gives the same text."""
    path = str(trained / "logs" / "short" / "model.safetensors")

    def ask(seed) -> str:
        assert sample.main([path, "--prompt", "import", "--tokens", "20", "--seed", seed]) == 0
        return capsys.readouterr().out

    first = ask("3")
    assert first == ask("3") and first.startswith("import") and first != ask("4")


def test_temperature_and_top_k_choose_among_the_tokens(trained, capsys):
    """Fails if --temperature 0 or --top-k 1 depends on the seed, or larger ones do nothing."""
    path = str(trained / "logs" / "short" / "model.safetensors")

    def ask(*how) -> str:
        assert sample.main([path, "--prompt", "import", "--tokens", "20", *how]) == 0
        return capsys.readouterr().out

    likeliest = {
        ask("--seed", seed, *how) for seed in "34" for how in (("--temperature", "0"), ("--top-k", "1"))
    }
    assert len(likeliest) == 1 and ask("--seed", "3") not in likeliest
    assert ask("--seed", "3", "--temperature", "3") != ask("--seed", "3")
    assert ask("--seed", "3", "--top-k", "5") != ask("--seed", "3")


def test_tokens_that_end_within_a_character_lose_nothing(trained, capsys, monkeypatch):
    """Fails if text before a character that needs two tokens, such as GPT-2's space before a quotation mark,
    is not printed."""
    parts = [b"He said", b" \xe2\x80", b"\x9cyes", b" ", b"\xe6\x97", b"\xa5"]

    def decode(tokens):
        return b"".join(parts[token] for token in tokens).decode(errors="replace")

    monkeypatch.setattr(sample, "text_codec", lambda vocab_size: (lambda text: [], decode))
    monkeypatch.setattr(sample, "sample", lambda *args: iter(range(len(parts))))
    assert sample.main([str(trained / "logs" / "short" / "model.safetensors")]) == 0
    assert capsys.readouterr().out == "He said \u201cyes \u65e5\n"


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_what_is_no_model_is_refused(tmp_path, capsys, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert sample.main([str(path)]) == 2
    assert "wanted a model.safetensors" in capsys.readouterr().err
