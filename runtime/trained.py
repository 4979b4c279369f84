"""Trained models: the file that a run leaves, read for use.

    trained = load_model(Path("logs/RUN_ID/model.safetensors"), "cpu")
    tokens_BT = torch.tensor([[trained.mark, *text_codec(trained.vocab_size)[0]("import os")]])
    logits = trained.logits(trained.hidden(tokens_BT)[:, -1])     # (B, vocab_size), of the next token

B documents, T tokens, C width
"""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.shards import BYTE_VOCABULARY, GPT2_VOCABULARY
from data.tokenizing import encode_bytes, load_gpt2
from kernels.attention import Documents

ROOT = Path(__file__).resolve().parent.parent
WANTED = "wanted a model.safetensors that a trainer wrote, logs/RUN_ID/model.safetensors"


class TrainedModel:
    """A GPT in fp32, with what its forward pass needs beside weights.

    vocab_size: number of tokens. mark: the token that begins each document. max_tokens: of the longest input,
    None without a limit.
    """

    def __init__(self, trainer, model: torch.nn.Module, metadata: dict):
        """trainer: the module whose GPT the model is. metadata: Session.model_metadata."""
        self.trainer, self.model, self.metadata = trainer, model, metadata
        self.vocab_size, self.mark = metadata["vocab_size"], metadata["mark"]
        self.max_tokens = metadata.get("row_tokens")

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """The model's output before its head, (B, T, C). Each row is one document."""
        tokens_BT = tokens_BT.to(self.model.head.device, torch.int32)
        B, T = tokens_BT.shape
        rotary, positions = self.model.rotary, T * (2 if self.model.config.paired_layers else 1)
        if len(rotary.cos) < positions:
            rotary.make_tables(1 << (positions - 1).bit_length())
        begins = torch.arange(B + 1, dtype=torch.int32, device=tokens_BT.device) * T
        docs = Documents(self.trainer.Batch(tokens_BT, tokens_BT, begins, T), "sdpa")
        return self.model.trunk(tokens_BT, docs, tuple(self.metadata["windows"]), self.metadata["tied"])

    @torch.no_grad()
    def logits(self, x_MC: Tensor) -> Tensor:
        """Logits (M, vocab_size) of the next token. ValueError if a weight is not a finite number."""
        logits_MV = self.head(x_MC)[..., : self.vocab_size]
        if not logits_MV.isfinite().all():
            raise ValueError("the model's logits are not finite numbers: its weights are broken, train again")
        return logits_MV

    def head(self, x_MC: Tensor) -> Tensor:
        return self.trainer.softcap(F.linear(x_MC, self.model.head))

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (vocab_size,) of the token after these; of a longer input only the end counts."""
        tokens = tokens[-(self.max_tokens or len(tokens)) :]
        return self.logits(self.hidden(torch.tensor([tokens]))[0, -1])


class TrackModel(TrainedModel):
    """A GPT of train_gpt_simple.py: rows of max_tokens tokens, whatever documents they hold."""

    @torch.no_grad()
    def hidden(self, tokens_BT: Tensor) -> Tensor:
        return self.model.hidden(tokens_BT.to(self.model.head.device))

    def head(self, x_MC: Tensor) -> Tensor:
        return self.model.logits(x_MC)


def load_model(path: Path, device: str) -> TrainedModel:
    """Load a model onto the device; ValueError if no trainer that is here wrote the file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, no dict
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a model ({error}); {WANTED}") from None
    if "config" not in metadata:
        raise ValueError(f"{path} has no configuration in its metadata; {WANTED}")
    trainer = find_trainer(path, metadata.get("script", "train_gpt.py"))
    try:
        model = build(trainer, tensors, metadata)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not fit its own configuration ({type(error).__name__}: {error}); wanted a file "
            f"that this version of {trainer.SCRIPT.name} wrote"
        ) from None
    kind = TrackModel if "row_tokens" in metadata else TrainedModel
    return kind(trainer, model.to(device).eval(), metadata)


def find_trainer(path: Path, script: str):
    """Import the trainer that wrote the file; importing one does nothing."""
    if not re.fullmatch(r"\w+\.py", script) or not (ROOT / script).is_file():
        raise ValueError(f"{path} was written by {script!r}, which is not in {ROOT}; put that trainer there")
    return importlib.import_module(script.removesuffix(".py"))


def to_tuples(x):
    """JSON's lists as the tuples that they were, at any depth."""
    return tuple(map(to_tuples, x)) if isinstance(x, list) else x


def build(trainer, tensors: dict, metadata: dict) -> torch.nn.Module:
    """Build the model of this configuration with these weights."""
    config = trainer.ModelConfig(**{key: to_tuples(value) for key, value in metadata["config"].items()})
    if "row_tokens" in metadata:
        model = trainer.GPT(config, metadata["vocab_size"], metadata["row_tokens"])
    else:
        model = trainer.GPT(config, metadata["vocab_size"], "sdpa", metadata["residual_scale"])
        model.rotary.freqs.copy_(tensors.pop("rotary.freqs"))
        model.rotary.scale = metadata["rotary_scale"]
    mismatch = model.load_state_dict(tensors, strict=False)
    if mismatch.unexpected_keys or set(mismatch.missing_keys) - {"rotary.freqs"}:
        raise ValueError(str(mismatch))
    return model


def text_codec(vocab_size: int) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """Return (text -> tokens, tokens -> text) of a vocabulary: bytes or GPT-2's.

    ValueError if it is neither, or if GPT-2's cannot be had here.
    """
    if vocab_size == BYTE_VOCABULARY:
        return lambda text: list(encode_bytes(text)), lambda tokens: bytes(tokens).decode(errors="replace")
    if vocab_size != GPT2_VOCABULARY:
        raise ValueError(
            f"the model has {vocab_size} tokens; only bytes ({BYTE_VOCABULARY}) and GPT-2's "
            f"({GPT2_VOCABULARY}) can be turned into text"
        )
    gpt2 = load_gpt2()
    return gpt2.encode_ordinary, gpt2.decode


def check_device(name: str) -> None:
    """Raise ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no CUDA device here; leave it out")
