"""Checks of the twins' settings against each other, the machine and the data.

Each check raises SettingsError, or DataError for data: what was found, what was wanted, what to do.
resolve_machine fills in what the settings leave to the machine.
"""

import dataclasses
import importlib.util

from data.shards import DataError
from runtime.log_writer import has_begun
from runtime.ranks import capability, is_amd
from runtime.settings import SettingsError, as_text, knobs

OF_EXPERTS = ("NUM_EXPERTS", "MOE_TOP_K", "MOE_BALANCE_WEIGHT", "ROUTER_NOISE", "ROUTER_LR")


def refuse(wrong, text: str):
    """Raise SettingsError with this text if `wrong` is true."""
    if wrong:
        raise SettingsError(text)


def check_settings(s, env, by_stage: tuple[str, ...], num_stages: int, val_slices: int):
    """Check a trainer's settings against each other and the machine.

    by_stage: the settings with one value per stage. val_slices: slices of a batch of validation.
    """
    for name in by_stage:
        found = len(getattr(s, name))
        refuse(
            found != num_stages,
            f"{name.upper()} has {found} values, wanted {num_stages - 1} or {num_stages}: one "
            "for each scheduled stage, and one for the extension unless its default is meant",
        )
    refuse(
        s.long_docs == "split" and len(set(s.max_doc_tokens)) > 1,
        f"MAX_DOC_TOKENS={as_text(s.max_doc_tokens)} changes with the stage, and LONG_DOCS=split would then "
        "renumber the documents in mid-run; use one value, or LONG_DOCS=cut",
    )
    check_batches(s, s.slices)
    val_unit = val_slices * 16
    refuse(
        s.val_batch_tokens % val_unit or s.val_tokens % s.val_batch_tokens,
        f"VAL_TOKENS={s.val_tokens} must be a multiple of VAL_BATCH_TOKENS={s.val_batch_tokens}, which must "
        f"be a multiple of {val_unit}, {val_slices} slices x 16 tokens",
    )
    refuse(
        s.train_tokens and "NUM_SCHEDULED_ITERATIONS" in env,
        "TRAIN_TOKENS and NUM_SCHEDULED_ITERATIONS both set the run's length; unset one",
    )
    # older runs may have what a new one is refused; RESUME=auto also begins a new one, as the launcher's do
    is_resumed = s.resume and (s.resume != "auto" or has_begun(s.log))
    is_constant = s.lr_decay_type == "constant" and not s.lr_decay_second_type
    for name, harmless in (("COOLDOWN_FRAC", 0), ("LR_DECAY_FINAL", 1)):
        value = getattr(s, name.lower())
        refuse(
            is_constant and name in env and value != harmless and not is_resumed,
            f"{name}={value} does nothing with LR_DECAY_TYPE=constant and no second decay; unset it, or "
            "choose another decay",
        )
    check_machine(s)


def check_batches(s, num_slices: int, why: str = ""):
    """Check that each of num_slices slices has a multiple of 16 tokens, as float8 products need."""
    unit = num_slices * 16
    for stage, tokens in enumerate(s.batch_sizes, 1):
        near = max(unit, tokens // unit * unit)
        refuse(
            tokens % unit,
            f"BATCH_SIZES stage {stage} = {tokens} is not a multiple of {num_slices} slices x 16 tokens{why};"
            f" {near} or {near + unit} are",
        )


def check_decays(s):
    """Check the learning rate's one or two decays. s: settings that know the run's length."""
    second_final = s.lr_decay_final if s.lr_decay_second_final is None else s.lr_decay_second_final
    for which, shape, final in (
        ("", s.lr_decay_type, s.lr_decay_final),
        ("SECOND_", s.lr_decay_second_type, second_final),
    ):
        refuse(
            shape == "exp" and not final,
            f"LR_DECAY_{which}TYPE=exp to LR_DECAY_{which}FINAL=0 would be 0 from its first step on; use a "
            "final value above 0, or linear",
        )
    start, end = s.cooldown_start, s.num_scheduled_iterations
    refuse(
        s.lr_decay_second_type and not start < s.lr_decay_switch_step < end,
        f"LR_DECAY_SWITCH_STEP={s.lr_decay_switch_step}: wanted a step between {start}, where the first "
        f"decay starts, and {end}, where it ends; or leave LR_DECAY_SECOND_TYPE empty",
    )


def check_slices(s, train: list, num_slices: int, val_slices: int, world_size: int):
    """Check that the ranks share the slices of batches evenly, and that training shards fill the largest.

    Raises SettingsError or DataError. num_slices, val_slices: slices of a training and a validation batch.
    """
    fitting = [str(n) for n in (1, 2, 4, 8) if s.slices % n == 0]
    refuse(
        num_slices % world_size or val_slices % world_size,
        f"{world_size} ranks do not divide {num_slices} slices of training, or {val_slices} of validation; "
        f"use {' or '.join(fitting)} ranks",
    )
    check_batches(s, num_slices, f" with {world_size} ranks")
    refuse(
        s.val_batch_tokens % val_slices,  # no float8 there
        f"VAL_BATCH_TOKENS={s.val_batch_tokens} is not a multiple of {val_slices} slices with {world_size} "
        "ranks; use fewer, or another batch",
    )
    shortest, largest = min(s.max_doc_tokens), max(s.batch_sizes) // num_slices
    lengths = (shard.documents(shard.tokens, shortest, s.long_docs == "split")[1] for shard in train)
    readable = max(int(x.sum()) for x in lengths)  # tokens that training reads of a shard
    if largest > readable:
        raise DataError(
            f"BATCH_SIZES={as_text(s.batch_sizes)}: the largest has slices of {largest} tokens, but no "
            f"training shard has more than {readable} in documents up to MAX_DOC_TOKENS={shortest}; use "
            "larger shards or smaller batches"
        )


def check_machine(s):
    """Check that this machine has what the settings name."""
    refuse(
        s.device == "cpu" and s.attn_backend in ("varlen", "flex"),
        f"ATTN_BACKEND={s.attn_backend} trains on CUDA only; elsewhere use sdpa or auto",
    )
    no_gpu = s.device == "cpu" or is_amd()
    lacks = "no NVIDIA GPU is used" if no_gpu else "triton is not installed"
    refuse(
        s.kernels == "triton" and (no_gpu or not importlib.util.find_spec("triton")),
        f"KERNELS=triton, but {lacks} here; use KERNELS=torch or auto",
    )
    refuse(
        s.kernels == "cpu" and (s.device == "cuda" or s.compile == "1"),
        "KERNELS=cpu is for DEVICE=cpu and COMPILE=0; use KERNELS=torch or auto",
    )


def resolve_machine(s):
    """Replace 'auto' in the back ends by what this machine has; without sm_89 there is no float8."""
    cuda = s.device == "cuda"
    changes = {}
    if s.attn_backend == "auto":
        changes["attn_backend"] = "varlen" if cuda and capability() >= (8, 0) else "sdpa"
    if not cuda or capability() < (8, 9):
        changes["disable_fp8"] = True
    if s.kernels == "auto" and cuda:
        has_triton = capability() >= (8, 0) and importlib.util.find_spec("triton")
        changes["kernels"] = "triton" if has_triton else "torch"
    elif s.kernels == "auto":
        changes["kernels"] = "torch" if s.compile == "1" else "cpu"  # compiled, plain torch is faster
    return dataclasses.replace(s, **changes)


def check_decay(o):
    """Refuse a decay that is meant for another MUON_DECAY_MODE. o: the optimizer's settings."""
    refuse(
        o.muon_decay_mode in ("param", "update", "both") and abs(o.muon_weight_decay) > 1,
        f"MUON_WEIGHT_DECAY={o.muon_weight_decay:g}, but MUON_DECAY_MODE={o.muon_decay_mode} takes it as "
        "it is (the default is for cautious); set it between -1 and 1",
    )


def check_model(s, o, c, presets: dict[str, tuple]):
    """Check the settings that change a preset's model.

    o: the optimizer's settings. c: the preset's ModelConfig. presets: {name: (ModelConfig, _)}.
    """
    rows = c.ngram_rows if s.ngram_rows is None else s.ngram_rows
    refuse(
        s.ngrams is not None and not rows,
        f"NGRAMS={as_text(s.ngrams)} does nothing without rows to hash into; set NGRAM_ROWS, for example to "
        "4096",
    )
    refuse(rows == 1, "NGRAM_ROWS=1, but one row is kept for the beginning; wanted 0, or 2 and more")
    refuse(
        s.without and getattr(c, s.without) == getattr(type(c), s.without),
        f"WITHOUT={s.without} does nothing with MODEL={s.model}, which has no such part",
    )
    refuse(
        c.num_experts and not 2 <= s.moe_top_k <= s.num_experts,
        f"MOE_TOP_K={s.moe_top_k} of NUM_EXPERTS={s.num_experts}; MODEL={s.model} wants at least 2 experts, "
        "and from 2 up to all of them for a token",
    )
    mixtures = " and ".join(name for name, (preset, _) in presets.items() if preset.num_experts)
    fields, values = knobs((type(s), type(o))), {**vars(s), **vars(o)}
    for name in OF_EXPERTS:
        value = values[name.lower()]
        refuse(
            not c.num_experts and value != fields[name].default,
            f"{name}={value} does nothing with MODEL={s.model}, which has no experts; it is for {mixtures}",
        )
