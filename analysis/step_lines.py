"""Step lines of a training log: text -> numbers, and lines -> columns of numbers.

    line = parse_step("step:50/1600 val_loss:4.12 train_time:3100ms")
    line.step, line.num_steps, line.values["train_time"]
    StepColumns([line, ...])["val_loss"].value

A step line is read as a whole or not at all.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[nN][aA][nN]|[iI][nN][fF])"
_HEAD = re.compile(
    r"step:(\d{1,12})/(\d{1,12})(?= )"
    r"|s:(\d{1,12})(?= (?:tel|trl|eval):)",  # llm.c's, which gives no number of steps
    re.ASCII,
)
_FIELD = re.compile(
    r" +([A-Za-z_][\w./-]*):(?:"
    rf"({_NUMBER})(ms|s|%|)(?=\s|$)"
    rf"|\[( *{_NUMBER}(?: *, *{_NUMBER})* *)\]"
    r"|([^\s\[\]]\S*))"  # a word
    r"|(.+)",  # the rest of the line, if it does not begin with a field
    re.ASCII,
)
_TORN = re.compile(r"step:\d+/\d+ |event:", re.ASCII)  # start of a line that was appended to a torn one
_LLMC_NAMES = {"tel": "val_loss", "trl": "train_loss"}


@dataclass(frozen=True)
class Column:
    """Logged quantity: `value[i]` (a row for a list) was logged at `step[i]`; steps strictly increase."""

    step: np.ndarray
    value: np.ndarray

    @property
    def is_numeric(self) -> bool:
        """True if there is one number per step, not a list or a word."""
        return self.value.ndim == 1 and self.value.dtype != object


@dataclass(frozen=True)
class Curve:
    """Losses over steps, which strictly increase. All arrays have the same length; NaN means not logged."""

    step: np.ndarray
    loss: np.ndarray
    time_ms: np.ndarray
    tokens: np.ndarray
    acc: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @staticmethod
    def empty() -> "Curve":
        none = np.zeros(0)
        return Curve(none.astype(np.int64), none, none, none, none)


class StepLine(NamedTuple):
    step: int
    num_steps: int  # -1 if the line does not give it
    values: dict[str, float | list[float] | str]  # by key; times in milliseconds


def parse_step(line: str) -> StepLine | None:
    """Parse a step line; None if a part of it cannot be read, or another line seems to begin within it."""
    head = _HEAD.match(line)
    if head is None:
        return None
    values, has_words = {}, False
    for key, number, unit, items, word, rest in _FIELD.findall(line.rstrip(), head.end()):
        if rest:
            return None
        if number:
            value = float(number) * 1000.0 if unit == "s" else float(number)
        elif items:
            value = [float(item) for item in items.split(",")]
        else:
            value, has_words = word, True
        values[sys.intern(_LLMC_NAMES.get(key, key))] = value  # intern: one copy of a key for all its lines
    if not values or (has_words and _TORN.search(line, 1)):
        return None
    step, num_steps, llmc_step = head.groups()
    return StepLine(int(step or llmc_step), int(num_steps or -1), values)


class StepColumns(Mapping):
    """Key -> Column, made on demand. Of several lines of one step, the last counts."""

    def __init__(self, lines: Sequence[StepLine]):
        self._lines = list(lines)
        self._known: dict[str, Column] = {}
        self._keys = list(dict.fromkeys(chain.from_iterable(line.values for line in self._lines)))

    def __getitem__(self, key: str) -> Column:
        if key not in self._known:
            found = {line.step: line.values[key] for line in self._lines if key in line.values}
            if not found:
                raise KeyError(key)
            steps = sorted(found)
            self._known[key] = Column(np.array(steps), _as_array([found[step] for step in steps]))
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def curve(self, loss: str) -> Curve:
        """Return the lines that give `loss` as a number, with their time, tokens and accuracy."""
        lines = {line.step: line.values for line in self._lines if isinstance(line.values.get(loss), float)}
        steps = sorted(lines)

        def numbers(key: str) -> np.ndarray:
            return np.array([_number(lines[step].get(key)) for step in steps])

        step = np.array(steps, dtype=np.int64)
        return Curve(step, numbers(loss), numbers("train_time"), numbers("tokens"), numbers("val_acc"))


def _number(value: object) -> float:
    """Return a number as it is; NaN for a list, a word or None."""
    return value if isinstance(value, float) else math.nan


def _as_array(values: list) -> np.ndarray:
    """Stack a column's values. Short lists are padded with NaN; a word among numbers becomes NaN."""
    if all(isinstance(value, str) for value in values):
        return np.array(values, dtype=object)
    if not any(isinstance(value, list) for value in values):
        return np.array([_number(value) for value in values])
    rows = [value if isinstance(value, list) else [_number(value)] for value in values]
    width = max(map(len, rows))
    return np.array([row + [math.nan] * (width - len(row)) for row in rows])
