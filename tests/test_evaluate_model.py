"""evaluate_model.py: log-likelihoods are the model's own, batched or not; lm_eval, if it is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import BASELINE, ROOT, base_env, run

import evaluate_model
import train_gpt
from runtime.trained import load_model

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
TEXTS = [
    ("import os\nimport ", "sys"),
    ("", "a text without a context"),
    ("x = ", "1"),
    ("for i in range(10):\n    print(", "i)\n"),
    ("two spaces  ", "and more"),
    ("é and ü, ", "ö"),
]


@pytest.fixture(scope="module")
def model_path(shards, tmp_path_factory) -> Path:
    """Model of a run of a few steps."""
    cwd = tmp_path_factory.mktemp("evaluated")
    env = base_env(shards, RUN_ID="m", NUM_SCHEDULED_ITERATIONS=8, VAL_LOSS_EVERY=0)
    assert run(cwd, BASELINE, env, ranks=0).returncode == 0
    return cwd / "logs/m/model.safetensors"


@pytest.fixture(scope="module")
def trained(model_path):
    return load_model(model_path, "cpu")


def test_scores_are_the_models_own_whatever_stands_beside_them(trained):
    """Fails if padding, sorting, batching or the split into context and continuation changes a number."""
    scorer = evaluate_model.Scorer(trained, batch_tokens=64)
    pairs = [scorer.pair(*text) for text in TEXTS]
    assert all(context[0] == trained.mark for context, _ in pairs)
    assert bytes(pairs[4][0][1:]) == b"two spaces" and bytes(pairs[4][1]) == b"  and more"
    together = scorer.score(pairs)
    for pair, (log_p, _) in zip(pairs, together, strict=True):
        assert scorer.score([pair])[0][0] == pytest.approx(log_p, abs=1e-4)
        context, continuation = pair
        logits = [trained.next_logits([*context, *continuation[:i]]) for i in range(len(continuation))]
        sums = sum(float(x.log_softmax(-1)[t]) for x, t in zip(logits, continuation, strict=True))
        assert log_p == pytest.approx(sums, abs=1e-4)


def test_scores_agree_with_the_trainers_loss(trained):
    """Fails if the evaluated model is not the validated one: the same texts by GPT.val_loss."""
    scorer = evaluate_model.Scorer(trained)
    context, continuation = scorer.pair(*TEXTS[0])
    tokens = [*context, *continuation]
    inputs, targets = torch.tensor([tokens[:-1]], dtype=torch.int32), torch.tensor([tokens[1:]])
    ends = torch.tensor([0, inputs.shape[1]], dtype=torch.int32)
    batch = train_gpt.Batch(inputs, targets, ends, inputs.shape[1])
    with torch.no_grad():
        windows, tied = tuple(trained.metadata["windows"]), trained.metadata["tied"]
        whole = trained.model.val_loss(batch, windows, tied)[0].item()
    ((log_p, _),) = scorer.score([(tokens[:1], tokens[1:])])
    assert -log_p == pytest.approx(whole, rel=1e-5)


def test_the_likeliest_continuation_is_told(trained):
    """Fails if "greedy", from which lambada's accuracy is computed, is not token by token."""
    scorer = evaluate_model.Scorer(trained)
    context = [trained.mark, *b"import "]
    likeliest = []
    for _ in range(3):
        likeliest.append(int(trained.next_logits([*context, *likeliest]).argmax()))
    other = [*likeliest[:2], (likeliest[2] + 1) % 256]
    assert [greedy for _, greedy in scorer.score([(context, likeliest), (context, other)])] == [True, False]


def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused(trained):
    scorer = evaluate_model.Scorer(trained, max_tokens=16)
    continuation = [*b"end"]
    pairs = [([trained.mark, *context], continuation) for context in (b"a" * 40, b"b" * 26 + b"a" * 14)]
    first, second = scorer.score(pairs)
    assert first == second
    with pytest.raises(ValueError, match="--max-tokens"):
        scorer.score([([trained.mark], [*b"x" * 17])])


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm_eval is installed")
def test_a_missing_library_is_named_with_the_line_that_installs_it(model_path, capsys):
    assert evaluate_model.main([str(model_path), "--tasks", "hellaswag"]) == 2
    said = capsys.readouterr().err
    assert (
        f"{sys.executable} -m pip install 'lm_eval>=" in said
        and not (model_path.parent / evaluate_model.RESULTS).exists()
    )


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm_eval is optional; pip install lm_eval")
class TestWithTheLibrary:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
        monkeypatch.chdir(ROOT)

    def test_a_task_of_a_dozen_items(self, model_path, trained, capsys):
        """Fails if lm_eval's accuracy is not that of direct sums, or the file beside the model lacks it."""
        place = ROOT / "tests/lm_eval_tasks"
        code = evaluate_model.main([str(model_path), "--tasks", "small_words", "--include-path", str(place)])
        said = capsys.readouterr()
        assert code == 0, said.err
        items = [json.loads(line) for line in (place / "small_words.jsonl").read_text().splitlines()]
        scorer, right = evaluate_model.Scorer(trained), 0
        for item in items:
            found = scorer.score([scorer.pair(item["context"], choice) for choice in item["choices"]])
            right += max(range(2), key=lambda i: found[i][0]) == item["answer"]
        kept = json.loads((model_path.parent / evaluate_model.RESULTS).read_text())["small_words"]
        assert kept["acc"] == pytest.approx(right / len(items)) and kept["items"] == len(items) == 12
        assert f"{kept['acc']:.4f}" in said.out and "acc_norm" in kept and kept["fewshot"] == 0

    def test_whole_texts_are_scored_in_windows(self, trained):
        """Fails if a token of a long text is scored twice, or not at all."""
        from types import SimpleNamespace

        scorer = evaluate_model.Scorer(trained, max_tokens=16)
        text = "def f(x):\n    return x + 1\n" * 2
        request = SimpleNamespace(args=(text,))
        (found,) = evaluate_model.make_adapter(scorer).loglikelihood_rolling([request])
        tokens, total = [trained.mark, *text.encode()], 0.0
        for begin in range(0, len(tokens) - 1, 16):
            window = tokens[begin : begin + 17]
            if len(window) < 17:  # the last window is filled up with what precedes it
                before = tokens[-17:]
                ((log_p, _),) = scorer.score([(before[: 18 - len(window)], before[18 - len(window) :])])
            else:
                ((log_p, _),) = scorer.score([(window[:1], window[1:])])
            total += log_p
        assert found == pytest.approx(total, abs=1e-3)

    def test_what_cannot_be_had_is_said(self, model_path, tmp_path, capsys):
        """Fails if a wrong name, or data that cannot be fetched, ends in a traceback or without advice."""
        task = (ROOT / "tests/lm_eval_tasks/small_words.yaml").read_text()
        task = task.replace("small_words", "elsewhere").replace("tests/lm_eval_tasks", "no/such/folder")
        (tmp_path / "elsewhere.yaml").write_text(task)
        for name, wanted in (("hellaswga", "it has hellaswag"), ("elsewhere", "HF_DATASETS_OFFLINE=1")):
            arguments = [str(model_path), "--tasks", name, "--include-path", str(tmp_path)]
            assert evaluate_model.main(arguments) == 2
            assert wanted in capsys.readouterr().err
