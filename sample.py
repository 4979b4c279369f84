"""Continue a prompt with a trained model: python sample.py logs/RUN_ID/model.safetensors --prompt "import os"

    python sample.py logs/RUN_ID/model.safetensors --tokens 300 --temperature 0.8 --seed 1
    echo "def main" | python sample.py logs/RUN_ID/model.safetensors --prompt -

Runs on a CPU, or on CUDA with --device cuda. Each new token takes a forward pass over the whole text so far,
without a key cache: simple, and fast enough to see what a model has learnt. The trainer writes the file at
the end of a run (SAVE_MODEL=1, the default).
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH=1

import torch
from safetensors import SafetensorError, safe_open

from analysis.shown import console
from kernels.attention import Documents
from train_gpt import GPT, SOFTCAP, Batch, ModelConfig

LEAST_TEMPERATURE = 1e-6  # below it, fp32 knows only the likeliest token


class SampleError(ValueError):
    """Unusable input; the message says what was found and what to do. Exit code 2."""


def load_model(path: Path, device: str) -> tuple[GPT, dict]:
    """Load (model in fp32 on the device, metadata); SampleError if no trainer wrote the file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, no dict
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise SampleError(
            f"{path} cannot be read as a model ({error}); wanted a model.safetensors that a "
            "trainer wrote, logs/RUN_ID/model.safetensors"
        ) from None
    if "config" not in metadata:
        raise SampleError(f"{path} has no configuration in its metadata; wanted a file that a trainer wrote")
    try:
        model = build(tensors, metadata)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SampleError(
            f"{path} does not fit its own configuration ({type(error).__name__}: {error}); "
            "wanted a file that this version's trainers wrote"
        ) from None
    return model.to(device).eval(), metadata


def build(tensors: dict, metadata: dict) -> GPT:
    """Build the model of this configuration with these weights."""
    to_tuples = lambda x: tuple(map(to_tuples, x)) if isinstance(x, list) else x
    config = ModelConfig(**{key: to_tuples(value) for key, value in metadata["config"].items()})
    model = GPT(config, metadata["vocab_size"], "sdpa", metadata["residual_scale"])
    model.rotary.freqs.copy_(tensors.pop("rotary.freqs"))
    model.rotary.scale = metadata["rotary_scale"]
    missing = model.load_state_dict(tensors, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"rotary.freqs"}:
        raise ValueError(str(missing))
    return model


def text_codec(vocab_size: int):
    """Return (text -> tokens, tokens -> text): bytes for a vocabulary of 256, else GPT-2's."""
    if vocab_size == 256:
        return lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace")
    import tiktoken

    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests raises many kinds when offline
        raise SampleError(
            f"tiktoken cannot get its gpt2 vocabulary ({error}); with a copy of it, set "
            "TIKTOKEN_CACHE_DIR (docs/data.md)"
        ) from None
    return gpt2.encode_ordinary, gpt2.decode


@torch.no_grad()
def next_logits(model: GPT, tokens: list[int], metadata: dict) -> torch.Tensor:
    """Logits (vocab_size,) of the next token; `tokens` are one document."""
    device, (gain, shift, width) = model.head.device, SOFTCAP
    inputs = torch.tensor([tokens], dtype=torch.int32, device=device)
    ends = torch.tensor([0, len(tokens)], dtype=torch.int32, device=device)
    docs = Documents(Batch(inputs, inputs.long(), ends, len(tokens)), "sdpa")
    x_C = model.trunk(inputs, docs, tuple(metadata["windows"]), metadata["tied"])[0, -1]
    return gain * torch.sigmoid((model.head[: metadata["vocab_size"]] @ x_C + shift) / width)


def sample(
    model: GPT, metadata: dict, tokens: list[int], count: int, temperature: float, top_k: int, seed: int
):
    """Yield up to `count` new tokens, until the model ends the document. temperature 0: the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [metadata["mark"], *tokens]
    model.rotary.make_tables((len(tokens) + count) * (2 if model.config.paired_layers else 1))
    for _ in range(count):
        logits = next_logits(model, tokens, metadata).float().cpu()
        if not logits.isfinite().all():
            raise SampleError(
                "the model's logits are not finite numbers: its weights are broken, train again"
            )
        if temperature > LEAST_TEMPERATURE:
            logits = (logits - logits.max()) / temperature
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            token = int(torch.multinomial(logits.softmax(0), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == metadata["mark"]:
            return
        tokens.append(token)
        yield token


def read_prompt(given: str) -> str:
    """The prompt as given, or from standard input for "-"; SampleError if it is not UTF-8.

    Read as bytes, so that the console's encoding does not matter.
    """
    raw = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the prompt is not UTF-8 (found byte {raw[error.start]:#04x} at position {error.start}); use "
            "iconv"
        ) from None


def check_arguments(args: argparse.Namespace) -> None:
    """Raise SampleError for numbers out of range, or a device that is not here."""
    if args.tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise SampleError("--tokens must be at least 1, --temperature and --top-k at least 0")
    if not 0 <= args.seed < 2**63:
        raise SampleError(f"--seed {args.seed}: wanted a whole number from 0 to {2**63 - 1}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SampleError("--device cuda, but torch finds no CUDA device here; leave it out")


def main(argv: list[str]) -> int:
    """Exit code: 0, or 2 for unusable input, 130 after Ctrl-C."""
    with console():
        try:
            write_sample(parse_args(argv))
        except SampleError as error:
            print(f"sample.py: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model.safetensors that a trainer wrote")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input")
    parser.add_argument("--tokens", type=int, default=200, help="maximum number of new tokens (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    return parser.parse_args(argv)


def write_sample(args: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it."""
    check_arguments(args)
    model, metadata = load_model(args.model, args.device)
    encode, decode = text_codec(metadata["vocab_size"])
    prompt = read_prompt(args.prompt)
    given = encode(prompt)
    if metadata["mark"] in given:
        raise SampleError(f"the prompt contains the document mark (token {metadata['mark']}); remove it")
    new = []
    print(prompt, end="", flush=True)
    for token in sample(model, metadata, given, args.tokens, args.temperature, args.top_k, args.seed):
        shown, new = decode(new), [*new, token]
        whole = decode(new)
        if not whole.endswith("\ufffd"):  # wait for the rest of a multi-byte character
            print(whole[len(shown.rstrip("\ufffd")) :], end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
