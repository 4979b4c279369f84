"""Presets of train_gpt.py and its twin as data: which fields of ModelConfig and settings each changes.

gpt2-small changes none: it is the model of the public speedrun's record of 2026-01-19. gpt2-small-2026-08 is
that of August 2026 (docs/differences.md).
"""

from runtime.settings import EMBEDDED

PLAIN = dict(  # none of the speedrun's additions but the learned factors on stream and branches
    windows=((4, 4),) * 4,
    final_windows=(4, 4),
    long_layers=(),
    paired_layers=(),
    value_embed_layers=(),
    skip=None,
    no_attention=(),
    backout=None,
    ngram_rows=0,
    smear=False,
    attn_gate=False,
    predict=(((1, 1),),) * 4,
    untie_frac=1.0,
)
PLAIN_SETTINGS = dict(
    lr_muls=(1.0,) * 4, num_extension_iterations=0, max_doc_tokens=(512,) * 4, long_docs="split"
)
TINY = dict(
    PLAIN,
    num_layers=4,
    head_dim=64,
    window_block=64,
    windows=((1, 4),) * 4,
    final_windows=(1, 4),
    long_layers=(1, 3),
    value_embed_layers=(0, 3),
    ngram_rows=8192,
    ngrams=(2, 3, 4),
    ngram_signs=8192,
    smear=True,
    attn_gate=True,
)
TINY_SETTINGS = dict(
    {**PLAIN_SETTINGS, **EMBEDDED},
    batch_sizes=(2048,) * 4,
    num_scheduled_iterations=1000,
    max_doc_tokens=(256,) * 4,
    val_batch_tokens=65_536,
    adam_lr=0.016,
)

LATER = dict(  # parts of the records of 2026-02 to 2026-07
    backout=None,
    qk_group=2,
    value_std=0.01,
    value_gate_reads_table=True,
    ngram_signs=8192,
    branch_factors=True,
    prefix_weights=((0.25, 0.25), (0.25, 0), (0, 0), (0, 0)),
)
TINY_LATER = dict(  # the parts of gpt2-small-2026-08 in six layers
    {**TINY, **LATER},
    num_layers=6,
    head_dim=32,  # of four heads: two groups of q and k
    long_layers=(1, 5),
    paired_layers=(0, 4),
    value_embed_layers=(1, 4, 5),
    skip=(1, 2),
    no_attention=(2,),
    attn_source=3,
    mudd=(1, 3),
    xsa_layers=(1, 3),
    gate_layers=(0, 2),
    compose_tokens=32,
)
del TINY_LATER["predict"], TINY_LATER["untie_frac"]  # ModelConfig's own, as gpt2-small
LATER_SETTINGS = dict(cooldown_frac=0.6, lr_decay_final=0.15, muon_beta2=0.9)


def heads(num_heads: int, num_kv_heads: int | None = None) -> dict:
    """Fields of ModelConfig; as many key/value heads as query heads unless given."""
    return dict(num_heads=num_heads, num_kv_heads=num_kv_heads or num_heads)


# MODEL -> (fields of ModelConfig, defaults of settings) that the preset changes
PRESET_CHANGES = {
    "gpt2-small": ({}, {}),
    "gpt2-small-2026-08": (
        dict(
            value_embed_layers=(1, 2, 8, 9, 10),
            ngram_rows=50304 * 15 // 2,
            attn_source=7,
            mudd=(3, 7),
            xsa_layers=(1, 3, 4, 7),
            gate_layers=(0, 4),
            compose_tokens=112,
            **LATER,
        ),
        dict(
            LATER_SETTINGS,
            num_scheduled_iterations=1270,
            num_extension_iterations=15,
            max_doc_tokens=(896, 2048, 2048, 2048),
        ),
    ),
    "gpt2-medium": (
        dict(
            num_layers=16,
            width=1024,
            **heads(8),
            long_layers=(3, 7, 11, 15),
            paired_layers=(0, 2, 5, 9, 13),
            value_embed_layers=(0, 1, 13, 14, 15),
            skip=(5, 9),
            no_attention=(9,),
            backout=11,
        ),
        dict(target_loss=2.92, num_scheduled_iterations=4800),
    ),
    "gpt2-1b": (
        dict(
            num_layers=20,
            width=2048,
            **heads(16),
            long_layers=(4, 9, 14, 19),
            paired_layers=(0, 2, 6, 12, 17),
            value_embed_layers=(0, 1, 17, 18, 19),
            skip=(6, 11),
            no_attention=(11,),
            backout=14,
        ),
        dict(target_loss=2.7, num_scheduled_iterations=12000),
    ),
    "dense-88m": (
        dict(num_layers=22, width=512, head_dim=64, **heads(8, 4), **PLAIN),
        dict(
            PLAIN_SETTINGS,
            batch_sizes=(65_536,) * 4,
            num_scheduled_iterations=25_940,
            cooldown_frac=0.0,
            lr_decay_type="constant",
            val_loss_every=250,
        ),
    ),
    "moe-79m": (
        dict(
            num_layers=6,
            width=384,
            head_dim=48,
            **heads(8),
            num_experts=8,
            expert_hidden=1536,
            **PLAIN,
        ),
        dict(
            PLAIN_SETTINGS,
            num_experts=8,
            batch_sizes=(32_768,) * 4,
            num_scheduled_iterations=2000,
            warmup_steps=100,
            cooldown_frac=1.0,
            lr_decay_type="cosine",
            lr_decay_final=0.0,
            val_loss_every=100,
            val_loss_last_steps=0,
            target_loss=4.5,
        ),
    ),
    "tiny": (dict(width=128, **heads(2), **TINY), TINY_SETTINGS),
    "tiny-wide": (dict(width=256, **heads(4), **TINY), TINY_SETTINGS),
    "tiny-2026-08": (
        dict(width=128, **heads(4), **TINY_LATER),
        {**TINY_SETTINGS, **LATER_SETTINGS},
    ),
    "moe-tiny": (
        dict(width=128, **heads(2), num_experts=8, expert_hidden=128, **TINY),
        dict(TINY_SETTINGS, num_experts=8),
    ),
}
