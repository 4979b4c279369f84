"""Flat buffers that hold an optimizer's parameters, each rank updating its own part.

A step is: reduce the gradients, update, gather the new weights. The update itself is the trainer's. Masters
are fp32: the weight itself, or a bfloat16 weight (the high half) with an int16 mantissa (the low half).
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.vectors import adam
from runtime.ranks import Done, Ranks

SMALL = 2**16  # parameters of fewer numbers are all-reduced together and updated on every rank


def read_master(weight: Tensor, mantissa: Tensor | None) -> Tensor:
    """The fp32 master, to be changed in place and written back."""
    if mantissa is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) | (mantissa.int() & 0xFFFF)).view(torch.float32)


def write_master(weight: Tensor, mantissa: Tensor | None, value: Tensor):
    """Store an fp32 master."""
    if mantissa is None:
        weight.copy_(value)
    else:
        bits = value.view(torch.int32)
        mantissa.copy_(bits.short())
        weight.view(torch.int16).copy_((bits >> 16).short())


class Bucket:
    """Parameters in one flat buffer; they and their gradients become views of it.

    A sharded buffer is padded so that every rank owns an equal part: gradients arrive by reduce(), new
    weights leave by gather(). Derived classes fill `state` and update `mine` from `grad`, this rank's parts.
    """

    def __init__(self, params: dict[str, nn.Parameter], ranks: Ranks, unit: int, every: int):
        """unit: numbers that must stay together on one rank (a matrix's). every: steps per update."""
        self.params, self.ranks, self.every = params, ranks, every
        self.count, self.work = 0, Done()
        like = next(iter(params.values()))
        self.size = sum(p.numel() for p in params.values())
        self.sharded = unit > 1 or (len(params) == 1 and self.size >= SMALL)
        multiple = unit * ranks.world_size if self.sharded else 1
        padded = -(-self.size // multiple) * multiple
        self.weights, self.grads = like.new_zeros(padded), like.new_zeros(padded)
        start = 0
        for p in params.values():
            end = start + p.numel()
            self.weights[start:end] = p.data.flatten()
            p.data, p.grad = self.weights[start:end].view(p.shape), self.grads[start:end].view(p.shape)
            p.grad = p.grad.data  # no view in autograd's sense: torch.compile traces those slowly
            start = end
        self.mine, self.grad = self.part(self.weights), self.part(self.grads)
        self.mantissa = torch.zeros_like(self.mine, dtype=torch.int16) if like.dtype.itemsize == 2 else None
        # this rank's part of what updates depend on, besides weights and count
        self.state: dict[str, Tensor] = {}

    def part(self, full: Tensor) -> Tensor:
        """The part of a full-size tensor that this rank updates."""
        return self.ranks.shard(full) if self.sharded else full

    def reduce(self):
        """Begin to sum the gradients over the ranks; wait on self.work before reading self.grad."""
        if self.sharded:
            self.work = self.ranks.reduce_scatter(self.grads)
        else:
            self.work = self.ranks.all_reduce(self.grads)

    def square_norm(self) -> Tensor:
        """Square norm of this rank's part of the gradient, averaged over the `every` steps that it sums.

        An unsharded gradient, which all ranks have, counts on rank 0 alone.
        """
        self.work.wait()
        if self.sharded or self.ranks.rank == 0:
            return self.grad.float().square().sum() / self.every**2
        return self.grad.new_zeros((), dtype=torch.float32)

    def gather(self):
        """Begin to send the new weights to all ranks."""
        self.work = self.ranks.all_gather(self.weights) if self.sharded else Done()

    def finish(self):
        """Wait for the new weights and clear the gradients."""
        self.work.wait()
        self.grads.zero_()

    def split_sizes(self, numel: int) -> list[int]:
        """Split a state's numbers by parameter, in order; the last size is the padding's.

        A state may have fewer numbers than the weights, such as one per row; the shares are the same.
        """
        sizes = [p.numel() * numel // len(self.weights) for p in self.params.values()]
        return [*sizes, numel - sum(sizes)]

    def full_numel(self, mine: Tensor) -> int:
        """Numbers of a state over all ranks."""
        return mine.numel() * (self.ranks.world_size if self.sharded else 1)

    def export(self) -> dict[str, dict[str, Tensor]]:
        """{parameter: {state: flat tensor on the CPU}}, fp32 masters included, on any number of ranks alike.

        A collective. The other ranks get {}.
        """
        self.work.wait()
        out = {}
        for key, mine in {"master": read_master(self.mine, self.mantissa), **self.state}.items():
            full = self.ranks.gather_shards(mine.flatten()) if self.sharded else mine.flatten()
            if self.ranks.rank == 0:
                for name, values in zip(self.params, full.split(self.split_sizes(len(full)))):
                    out.setdefault(name, {})[key] = values.to("cpu", copy=True)
        return out

    def check(self, saved: dict[str, dict[str, Tensor]]):
        """Raise ValueError if these states of a checkpoint cannot be restored."""
        for key, mine in {"master": self.mine, **self.state}.items():
            for name, wanted in zip(self.params, self.split_sizes(self.full_numel(mine))):
                found = saved[name].get(key)
                if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.numel() != wanted:
                    raise ValueError(f"the checkpoint has no {key} of {wanted} fp32 numbers for {name}")

    def restore(self, saved: dict[str, dict[str, Tensor]] | None):
        """Restore what export() gave. saved: on rank 0, which sends the others their parts."""
        for key, mine in {"master": self.mine, **self.state}.items():
            full = torch.zeros(self.full_numel(mine), device=mine.device)
            if saved is not None:
                found = torch.cat([saved[name][key].flatten() for name in self.params])
                full[: len(found)] = found
            self.ranks.broadcast(full)
            part = self.part(full).view(mine.shape)
            if key == "master":
                write_master(self.mine, self.mantissa, part)
            else:
                mine.copy_(part)
        self.gather()
        self.finish()

    def copy_from(self, other: "Bucket"):
        """Take over the weights and state of a bucket of the same shape."""
        pairs = [(self.weights, other.weights), *zip(self.state.values(), other.state.values())]
        if self.mantissa is not None:
            pairs.append((self.mantissa, other.mantissa))
        for mine, theirs in pairs:
            mine.copy_(theirs)
        self.count = other.count


def gradient_norm(buckets: list[Bucket], ranks: Ranks) -> Tensor:
    """Norm of these buckets' reduced gradients together, means over their steps; 0-d. A collective."""
    total = torch.stack([b.square_norm() for b in buckets]).sum()
    ranks.all_reduce(total).wait()
    return total.sqrt()


def step_adamw(weight, mantissa, grad, state: dict, count, lr, decay: float, betas: tuple, eps: float):
    """One AdamW step (arXiv 1711.05101) on a shard, in place."""
    W = read_master(weight, mantissa)
    U = adam(grad.float(), state["m"], state["v"], count, betas, eps)
    write_master(weight, mantissa, W - lr * (U + decay * W))


class MatrixStack(Bucket):
    """All matrices of one shape, so that one batched product serves them all.

    `mine` and `grad` are (N, R, K). A parameter of three dimensions holds one matrix per expert or per group
    of heads.
    """

    def __init__(self, params: dict[str, nn.Parameter], ranks: Ranks):
        R, K = next(iter(params.values())).shape[-2:]
        super().__init__(params, ranks, unit=R * K, every=1)
        self.mine, self.grad = self.mine.view(-1, R, K), self.grad.view(-1, R, K)
        if self.mantissa is not None:
            self.mantissa = self.mantissa.view(-1, R, K)
        self.stats = None  # statistics that the log wants: a row for each of `names`
        self.all_names = [part for name, p in params.items() for part in matrix_names(name, p)]
        first = ranks.rank * len(self.mine)
        self.names = self.all_names[first : first + len(self.mine)]  # padding, at the end, has no name


def matrix_names(name: str, p: Tensor) -> list[str]:
    """Names of a parameter's matrices: its own, or NAME.0, NAME.1, ... of experts or groups of heads."""
    name = name.removesuffix(".weight")
    return [name] if p.ndim == 2 else [f"{name}.{i}" for i in range(len(p))]


# ---------------------------------------------------------------------------------------------------
# All buckets of an optimizer
# ---------------------------------------------------------------------------------------------------


def export_all(buckets: list[Bucket]) -> tuple[dict, dict]:
    """({parameter: its states}, {parameter: number of its updates}). A collective; states on rank 0 only."""
    states, counts = {}, {}
    for bucket in buckets:
        states.update(bucket.export())
        counts.update(dict.fromkeys(bucket.params, bucket.count))
    return states, counts


def check_all(buckets: list[Bucket], states: dict):
    """Raise ValueError if these states of a checkpoint cannot be restored."""
    ours = {name for bucket in buckets for name in bucket.params}
    wrong = sorted(ours ^ set(states))
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model: only one of them has {', '.join(wrong[:5])}"
        )
    for bucket in buckets:
        bucket.check(states)


def restore_all(buckets: list[Bucket], states: dict | None, counts: dict[str, int]):
    """Restore what export_all() gave. states: on rank 0, which sends the others theirs."""
    for bucket in buckets:
        bucket.restore(states)
        bucket.count = counts[next(iter(bucket.params))]


def masters(stacks: list[MatrixStack]):
    """Yield (names, fp32 masters, gradients) of the matrices this rank owns, a shape at a time.

    A shape of which it owns none, padding alone, is left out.
    """
    for stack in stacks:
        if stack.names:
            stack.work.wait()
            num = len(stack.names)
            yield stack.names, read_master(stack.mine, stack.mantissa)[:num], stack.grad[:num]


def stats_by_layer(keys: Sequence[str], stacks: list[MatrixStack], ranks: Ranks) -> dict[str, str]:
    """Fields {key_part: "[layer 0, ...]"}, means over the matrices of a layer's part. A collective.

    keys: the columns of a stack's `stats`, which has a row for each of its `names`, the matrices that this
    rank owns, or is None on all ranks if the last step did not measure. all_names: the matrices of all ranks,
    blocks.LAYER.PART.REST.
    """
    stacks = [b for b in stacks if b.stats is not None]
    names = [name for b in stacks for name in b.all_names]
    table = torch.zeros(len(names), len(keys), device=ranks.device)
    for b in stacks:
        for name, row in zip(b.names, b.stats):
            table[names.index(name)] = row
    ranks.all_reduce(table).wait()
    rows = {}  # rows[part][layer]: those of its matrices
    for name, row in zip(names, table.tolist()):
        _, layer, part, *_ = name.split(".")
        rows.setdefault(part, {}).setdefault(int(layer), []).append(row)
    fields = {}
    for i, key in enumerate(keys):
        for part, by_layer in sorted(rows.items()):
            means = [sum(row[i] for row in layer) / len(layer) for _, layer in sorted(by_layer.items())]
            fields[f"{key}_{part}"] = "[" + ",".join(f"{mean:.5g}" for mean in means) + "]"
    return fields


def find_role(name: str, roles: dict[str, str]) -> str:
    """The one role of a parameter. roles: {role: pattern of its parameters' names}."""
    found = [role for role, pattern in roles.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"parameter {name} matches {len(found)} roles: {found}"
    return found[0]


class ShardedOptimizer:
    """The order of a step over all buckets; derived classes say how one bucket moves.

    One bucket for each role, and for each shape of the role "matrix".
    """

    def __init__(self, model: nn.Module, roles: dict[str, str], ranks: Ranks):
        """roles: {role: pattern of its parameters' names}."""
        groups = {}
        for name, p in model.named_parameters():
            role = find_role(name, roles)
            groups.setdefault((role, p.shape if role == "matrix" else None), {})[name] = p
        self.by_role = []  # (role, bucket)
        for (role, _), params in groups.items():
            stacked = role == "matrix"
            bucket = MatrixStack(params, ranks) if stacked else Bucket(params, ranks, unit=1, every=1)
            self.by_role.append((role, bucket))
        self.buckets = [b for _, b in self.by_role]
        self.ranks, self.stacks = ranks, [b for b in self.buckets if isinstance(b, MatrixStack)]
        self.before_update = None  # called when all gradients are reduced and none has been used
        self.measure = False  # whether the next step takes its gradient's norm
        self.grad_norm = None

    def update(self, bucket: Bucket, *rates):
        """Move this rank's part of a bucket."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, *rates):
        """Reduce, update, gather."""
        for bucket in self.buckets:
            bucket.reduce()
        if self.before_update:
            self.before_update()
        if self.measure:
            self.grad_norm = gradient_norm(self.buckets, self.ranks)
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.count += 1
            self.update(bucket, *rates)
            bucket.gather()
        for bucket in self.buckets:
            bucket.finish()

    def is_pending(self, step: int) -> bool:
        """Return whether gradients wait for their update after `step` steps: never."""
        return False
