"""Training documents in a random order, cut into slices; its whole state is one position."""

import numpy as np

from data.shards import Ahead, DataError, Shard

SHARD_STREAM, DOC_STREAM = 1, 2  # random streams of the seed; train_gpt.py lists all of them


class DocumentStream:
    """Endless documents: each epoch has a random order of shards, and of documents within each shard.

    A thread reads and indexes the next shard while this one is in use. `position`, (epoch, place in its order
    of shards, document in that shard's order), is all the state there is.
    """

    def __init__(self, shards: list[Shard], seed: int, longest: int, split: bool):
        """longest: tokens at which a document is cut. split: keep the rest as further documents."""
        self.shards, self.seed, self.longest, self.split = shards, seed, longest, split
        self.shard_index = None  # index of the shard whose documents are being read
        self.next_shard = Ahead()
        self.seek((0, 0, 0))

    @property
    def position(self) -> tuple[int, int, int]:
        return self.epoch, self.place, self.cursor

    def seek(self, position: tuple[int, int, int]):
        """Go to a position."""
        self.epoch, self.place, self.cursor = position
        self.load_shard()

    def set_longest(self, longest: int):
        """Cut the same documents at another length from now on."""
        if self.longest != longest:
            self.longest = longest
            self.load_shard()

    def load_shard(self):
        """Go to the documents of the current shard, and begin to index those of the next one."""
        here = self.epoch, self.place
        shard = self.next_shard.take(self.index_shard, *here, self.longest)
        self.shard_index, self.tokens, self.starts, self.lengths = shard
        self.mark = self.shards[self.shard_index].mark
        self.ends = np.cumsum(self.lengths)  # where the documents end, in tokens of this shard
        self.next_shard.start(self.index_shard, *self.place_after(*here), self.longest)

    def index_shard(self, epoch: int, place: int, longest: int) -> tuple:
        """(number of the shard at this place, its tokens, starts and lengths of its documents in order)."""
        order = np.random.default_rng([self.seed, SHARD_STREAM, epoch]).permutation(len(self.shards))
        index = int(order[place])
        shard = self.shards[index]
        tokens = self.tokens if index == self.shard_index else shard.read()
        starts, lengths = shard.documents(tokens, longest, self.split)
        perm = np.random.default_rng([self.seed, DOC_STREAM, epoch, index]).permutation(len(starts))
        return index, tokens, starts[perm], lengths[perm]

    def place_after(self, epoch: int, place: int) -> tuple[int, int]:
        """The next shard's place: in this epoch's order, or first in the next one's."""
        return (epoch, place + 1) if place + 1 < len(self.shards) else (epoch + 1, 0)

    def plan_slice(self, num_tokens: int) -> tuple:
        """(tokens, starts, lengths) of the next slice: whole documents, the last one cut to fill it.

        The rest of a shard that fills no slice is skipped.
        """
        for _ in range(2 * len(self.shards) + 1):  # the rest of this epoch, and all of the next
            taken = self.ends[self.cursor - 1] if self.cursor else 0  # tokens of this shard so far
            last = int(np.searchsorted(self.ends, taken + num_tokens))
            if last < len(self.ends):
                starts = self.starts[self.cursor : last + 1]
                lengths = self.lengths[self.cursor : last + 1].copy()
                too_far = self.ends[last] - taken - num_tokens
                lengths[-1] -= too_far
                self.cursor = last + 1
                return self.tokens, starts, lengths
            self.epoch, self.place = self.place_after(self.epoch, self.place)
            self.cursor = 0
            self.load_shard()
        raise DataError(
            f"no training shard fills a slice of {num_tokens} tokens now, as one did when the run began; "
            "put the old files back, then RESUME=auto goes on"
        )

    def read_slice(self, tokens, starts, lengths) -> tuple:
        """(inputs, the tokens that follow them, lengths); past the end of a shard follows a document mark."""
        inputs = np.concatenate([tokens[s : s + n] for s, n in zip(starts, lengths)])
        follows = [tokens[s + 1 : s + n + 1] for s, n in zip(starts, lengths)]
        follows = [np.append(f, self.mark) if len(f) < n else f for f, n in zip(follows, lengths)]
        return inputs, np.concatenate(follows), lengths
