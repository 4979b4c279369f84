"""Score a trained model on tasks of EleutherAI's lm_eval, an optional library.

    python evaluate_model.py MODEL --tasks hellaswag
    python evaluate_model.py MODEL --tasks hellaswag,arc_easy --limit 200
    python evaluate_model.py MODEL --tasks small_words --include-path tests/lm_eval_tasks

MODEL is a logs/RUN_ID/model.safetensors. The scores go to evaluation.json beside it, an entry for each task;
a second evaluation of a task takes the place of the first. Tasks that compare log-likelihoods work
(hellaswag, arc_easy, piqa, lambada_openai, wikitext, ...), those that generate text do not. Each text begins
with the document mark, as in training.

lm_eval downloads the data of a task from the Hugging Face hub, once. Without a network, copy the folder
~/.cache/huggingface from a machine that has run the same command, and set HF_HUB_OFFLINE=1
HF_DATASETS_OFFLINE=1; or give tasks of your own, whose data are files: tests/lm_eval_tasks has one.

(Its name is not evaluate.py because some tasks of lm_eval import a package `evaluate`, and would get this.)
"""

import argparse
import contextlib
import difflib
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH=1

import torch
from rich.console import Console
from rich.progress import track

from analysis import command_line
from analysis.command_line import import_optional
from analysis.files import write_atomically
from analysis.manifest import now
from analysis.tables import as_json, format_number, format_table
from runtime.trained import TrainedModel, check_device, load_model, text_codec

RESULTS = "evaluation.json"
LIBRARY = "lm_eval>=0.4.13"
MAX_TOKENS = 2048  # of an input, as the larger presets cut documents in training
BATCH_TOKENS = 16_384  # of a forward pass, padding included
OFFLINE = (
    "lm_eval downloads a task's data once. Without a network: copy ~/.cache/huggingface from a machine that "
    "has run the same command, and set HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1; or give --include-path and a "
    "task of your own, as in tests/lm_eval_tasks"
)
Pair = tuple[Sequence[int], Sequence[int]]  # the tokens of a context, and those of its continuation


# ------------------------------------------------------------------------------------------------
# Log-likelihoods
# ------------------------------------------------------------------------------------------------


class Scorer:
    """Log-probabilities of texts by a trained model."""

    def __init__(self, trained: TrainedModel, max_tokens: int = MAX_TOKENS, batch_tokens: int = BATCH_TOKENS):
        """max_tokens: most tokens of an input; earlier ones are dropped."""
        self.trained, self.batch_tokens = trained, batch_tokens
        self.max_tokens = min(max_tokens, trained.max_tokens or max_tokens)
        self.encode, _ = text_codec(trained.vocab_size)

    def pair(self, context: str, continuation: str) -> Pair:
        """Tokens of a text in two parts. Spaces at the end of the context belong to the continuation."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        head, whole = self.encode(stripped), self.encode(stripped + continuation)
        return [self.trained.mark, *head], whole[len(head) :]

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log p(continuation | context) in nats, and whether each of its tokens is the likeliest; by pair."""
        found: list = [None] * len(pairs)
        batches = list(self.batches(pairs))
        console = Console(stderr=True)
        for batch in track(batches, "scoring", console=console, disable=not console.is_terminal):
            inputs = [self.whole(*pairs[i])[:-1] for i in batch]
            longest = max(map(len, inputs))  # padding comes after the tokens that are asked for: no effect
            padded = [[*tokens, *[self.trained.mark] * (longest - len(tokens))] for tokens in inputs]
            x_BTC = self.trained.hidden(torch.tensor(padded))
            for i, tokens, x_TC in zip(batch, inputs, x_BTC, strict=True):
                continuation = torch.tensor(pairs[i][1], device=x_TC.device)
                logits = self.trained.logits(x_TC[len(tokens) - len(continuation) : len(tokens)])
                log_p = logits.log_softmax(-1).gather(-1, continuation[:, None])
                found[i] = float(log_p.double().sum()), bool((logits.argmax(-1) == continuation).all())
        return found

    def whole(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """The last max_tokens + 1 tokens of a pair; ValueError if the continuation does not fit."""
        if len(continuation) > self.max_tokens:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than the {self.max_tokens} of an "
                "input; --max-tokens sets them"
            )
        return [*context, *continuation][-self.max_tokens - 1 :]

    def batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Indices of the pairs of each pass, those of similar length together, the longest first."""
        lengths = [len(self.whole(*pair)) - 1 for pair in pairs]
        batch: list[int] = []
        for i in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
            if batch and lengths[batch[0]] * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch


def make_adapter(scorer: Scorer):
    """Return the model as lm_eval wants it."""
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(LM):
        """Scorer behind lm_eval's interface."""

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.score([scorer.pair(*request.args) for request in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            """Log-probability of each whole text; windows of a long one do not overlap."""
            totals = []
            for request in requests:
                tokens = scorer.encode(request.args[0])
                windows = get_rolling_token_windows(tokens, scorer.trained.mark, scorer.max_tokens, 1)
                found = scorer.score([make_disjoint_window(window) for window in windows])
                totals.append(math.fsum(log_p for log_p, _ in found))
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False):
            raise ValueError("this task generates text; the models here are scored by log-likelihoods")

    return Adapter()


# ------------------------------------------------------------------------------------------------
# Tasks
# ------------------------------------------------------------------------------------------------


def load_tasks(names: Sequence[str], include_path: Path | None):
    """Return lm_eval's TaskManager; ValueError if it cannot load a task, or if a task generates text."""
    manager = import_optional("lm_eval.tasks", LIBRARY).TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none with a similar name"
            raise ValueError(f"lm_eval has no task {name!r}; it has {near}. All: lm_eval ls tasks")
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # its network libraries raise many kinds
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the data of {name} could not be loaded ({type(error).__name__}: {reason}). {OFFLINE}"
            ) from None
        generating = [task for task, loaded in tasks.items() if loaded.OUTPUT_TYPE == "generate_until"]
        if generating:
            raise ValueError(f"{generating[0]} generates text; only tasks that compare log-likelihoods work")
    return manager


def scores_of(found: dict, library_version: str) -> dict[str, dict]:
    """Reduce lm_eval's results to what is kept: by task, its metrics and how they were taken."""
    kept = {}
    for task, metrics in found["results"].items():
        scores = {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, float) and math.isfinite(value)
        }
        kept[task] = {
            **scores,
            "items": found["n-samples"].get(task, {}).get("effective"),
            "fewshot": found["n-shot"].get(task),
            "version": found["versions"].get(task),
            "lm_eval": library_version,
            "time": now(),
        }
    return kept


def evaluate_model(args: argparse.Namespace) -> None:
    """Score the model, print the scores and write them beside it."""
    names = [name for name in args.tasks.split(",") if name]
    if not names or args.max_tokens < 2 or (args.limit is not None and args.limit < 1):
        raise ValueError("wanted --tasks NAME,NAME, --limit of at least 1, and 2 or more tokens")
    check_device(args.device)
    library = import_optional("lm_eval", LIBRARY)
    scorer = Scorer(load_model(args.model, args.device), args.max_tokens)
    with contextlib.redirect_stderr(sys.__stderr__):  # the libraries' bars move their cursor
        found = library.simple_evaluate(
            make_adapter(scorer),
            tasks=names,
            task_manager=load_tasks(names, args.include_path),
            num_fewshot=args.fewshot,
            limit=args.limit,
            log_samples=False,
        )
    scores = scores_of(found, importlib.metadata.version("lm_eval"))
    print(format_table(["task", "metric", "value", "standard error", "items"], rows_of(scores)))
    path = args.model.with_name(RESULTS)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, as_json(before | scores))
    print(f"written to {path}")


def rows_of(scores: dict[str, dict]) -> list[list[str]]:
    rows = []
    for task, values in scores.items():
        for metric, value in values.items():
            if isinstance(value, float) and "_stderr" not in metric:
                name, _, kind = metric.partition(",")
                error = values.get(",".join([f"{name}_stderr", *([kind] if kind else [])]), math.nan)
                rows.append([task, metric, f"{value:.4f}", format_number(error, ".4f"), values["items"]])
    return rows


def main(argv: list[str]) -> int:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("model", type=Path, help="a model.safetensors that a trainer wrote")
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks of lm_eval, or your own")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder of tasks of your own")
    parser.add_argument("--fewshot", type=int, help="examples before each item (the task's own number)")
    parser.add_argument("--limit", type=int, help="items of each task (all)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=f"of an input ({MAX_TOKENS})")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    return command_line.run(evaluate_model, parser, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
