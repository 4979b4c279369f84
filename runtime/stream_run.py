"""A run of a plain trainer: one model, one batch size, the shards read straight on.

A trainer derives its Run from StreamRun and writes the step. Everything else about the order of a run, from
cutting batches to the validations, is here.
"""

import numpy as np
import torch
from torch import Tensor

from data.shards import Shard, TokenStream, check_stream, first_batches, open_pair
from runtime.flops import plain_flop_per_token
from runtime.prefetch import to_device
from runtime.ranks import Ranks
from runtime.session import Session
from runtime.settings import SettingsError

Passes = list[tuple[Tensor, Tensor]]  # inputs and targets, each (rows, row_tokens)


def count_slices(s, world_size: int) -> int:
    """Number of slices in a global batch: always 1, because ranks cut it by rows."""
    return 1


def open_data(s, world_size: int) -> tuple[list[Shard], list[Shard]]:
    """Training and validation shards, checked against what the run needs."""
    num_rows = s.batch_tokens // s.row_tokens
    if s.batch_tokens % s.row_tokens or s.val_tokens % s.batch_tokens or num_rows % world_size:
        raise SettingsError(
            f"VAL_TOKENS={s.val_tokens} must be a multiple of BATCH_TOKENS={s.batch_tokens}, that of "
            f"ROW_TOKENS={s.row_tokens}, and {world_size} ranks must divide the batch's {num_rows} rows"
        )
    train, val = open_pair(s.data_path, s.train_files, s.val_files)
    check_stream(train, val, s.batch_tokens, s.val_tokens)
    return train, val


def cut_passes(tokens: np.ndarray, row_tokens: int, pass_rows: int, ranks: Ranks) -> Passes:
    """This rank's equal part of a batch, in passes of at most pass_rows rows.

    tokens: the batch's, and the one after it.
    """
    part = (len(tokens) - 1) // ranks.world_size
    mine = tokens[ranks.rank * part : (ranks.rank + 1) * part + 1].astype(np.int64)
    mine = to_device(torch.from_numpy(mine), ranks.device)
    inputs, targets = (x.view(-1, row_tokens).split(pass_rows) for x in (mine[:-1], mine[1:]))
    return list(zip(inputs, targets))


class StreamRun:
    """One run. Derived classes have `pass_rows` and step(step, passes), one update.

    model, optimizer and schedule: as Session wants them; loss(inputs, targets): the cross-entropy summed over
    the tokens, and the number of tokens guessed right; maybe compiled.
    """

    def __init__(self, start, stop, model, loss, optimizer, schedule):
        """start: supervise.Start. stop: supervise.StopRequest."""
        self.start, self.s, self.ranks = start, start.s, start.ranks
        self.model, self.loss, self.optimizer, self.schedule = model, loss, optimizer, schedule
        self.data = TokenStream(start.train_shards, self.s.batch_tokens)
        self.session = Session(start, stop, self, self.data)

    def step(self, step: int, passes: Passes) -> Tensor:
        """Make one update; returns the cross-entropy summed over this rank's tokens."""
        raise NotImplementedError

    def train(self) -> int:
        """Train from the session's first step. Returns the step that it reached: the last, or a stop's."""
        session, step = self.session, self.session.first_step
        for step in session.begin():
            if session.should_validate(step):
                with session.off_the_clock():
                    session.note_validation(step, *self.validate())
            if session.should_leave(step):
                break
            session.expect_update(step + 1)
            self.optimizer.measure = self.s.validates(step + 1, self.schedule.num_steps)
            loss_sum = self.step(step, self.cut(self.data.next()))
            session.note_update(step + 1, loss_sum, self.s.batch_tokens)
        return step

    def cut(self, tokens: np.ndarray) -> Passes:
        """This rank's passes of a batch."""
        return cut_passes(tokens, self.s.row_tokens, self.pass_rows, self.ranks)

    @torch.no_grad()
    def validate(self, num_batches: int | None = None) -> tuple[float, float]:
        """(mean cross-entropy in nats per token, share of tokens guessed right) over all ranks."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        batches = first_batches(self.start.val_shards, self.s.val_tokens, self.s.batch_tokens)[:num_batches]
        for tokens in batches:
            self.ranks.beat()
            for inputs, targets in self.cut(tokens):
                sums += torch.stack([x.double() for x in self.loss(inputs, targets)])
        self.ranks.all_reduce(sums).wait()
        loss, right = (sums / (len(batches) * self.s.batch_tokens)).tolist()
        return loss, right

    def rehearse(self):
        """Compile everything that a run will need; call it on a run that is then thrown away."""
        self.step(0, self.cut(self.data.next()))
        self.validate(num_batches=1)

    def log_fields(self, step: int, full: bool) -> dict:
        """Fields of the line about the update of `step`, in the log's order. A collective if full."""
        fields = {"lr_mul": f"{self.schedule.lr_mul(step):.4f}", **self.optimizer.log_fields(full)}
        if full and self.optimizer.grad_norm is not None:
            fields["grad_norm"] = f"{float(self.optimizer.grad_norm) / self.s.batch_tokens:.6g}"
        return {**fields, "batch_size": self.s.batch_tokens}

    def flop_per_token(self, step: int) -> float:
        """FLOP of a token's forward and backward pass."""
        c, row_tokens = self.start.model_config, self.s.row_tokens
        return plain_flop_per_token(c, row_tokens, self.start.config["vocab_size"])

    def validation_fields(self) -> dict:
        return {}

    def go_to(self, step: int):
        """Restore what follows from `step`, beside the optimizer's state: nothing."""

    def model_metadata(self) -> dict:
        return {}
