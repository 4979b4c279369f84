"""Continue a prompt with a trained model: python sample.py logs/RUN_ID/model.safetensors --prompt "import os"

    python sample.py logs/RUN_ID/model.safetensors --tokens 300 --temperature 0.8 --seed 1
    echo "def main" | python sample.py logs/RUN_ID/model.safetensors --prompt -

Runs on a CPU, or on CUDA with --device cuda. Each new token takes a forward pass over the whole text so far,
without a key cache: simple, and fast enough to see what a model has learnt. The trainer writes the file at
the end of a run (SAVE_MODEL=1, the default).
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH=1

import torch

from analysis import command_line
from runtime.trained import TrainedModel, check_device, load_model, text_codec

LEAST_TEMPERATURE = 1e-6  # below it, fp32 knows only the likeliest token


def sample(
    trained: TrainedModel, tokens: list[int], count: int, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    """Yield up to `count` new tokens, until the model ends the document. temperature 0: the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [trained.mark, *tokens]
    for _ in range(count):
        logits = trained.next_logits(tokens).float().cpu()
        if temperature > LEAST_TEMPERATURE:
            logits = (logits - logits.max()) / temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            token = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == trained.mark:
            return
        tokens.append(token)
        yield token


def read_prompt(given: str) -> str:
    """The prompt as given, or from standard input for "-"; ValueError if it is not UTF-8.

    Read as bytes, so that the console's encoding does not matter.
    """
    raw = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8 (found byte {raw[error.start]:#04x} at position {error.start}); use "
            "iconv"
        ) from None


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers out of range, or a device that is not here."""
    if args.tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise ValueError("--tokens must be at least 1, --temperature and --top-k at least 0")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: wanted a whole number from 0 to {2**63 - 1}")
    check_device(args.device)


def write_sample(args: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it."""
    check_arguments(args)
    trained = load_model(args.model, args.device)
    encode, decode = text_codec(trained.vocab_size)
    prompt = read_prompt(args.prompt)
    new, shown = [], ""
    print(prompt, end="", flush=True)
    for token in sample(trained, encode(prompt), args.tokens, args.temperature, args.top_k, args.seed):
        new.append(token)
        whole = decode(new)
        if not whole.endswith("\ufffd"):  # wait for the rest of a multi-byte character
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
    print()


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for unusable input, 130 after Ctrl-C."""
    parser = command_line.make_parser(__doc__)
    parser.add_argument("model", type=Path, help="a model.safetensors that a trainer wrote")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    try:
        return command_line.run(write_sample, parser, argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
