"""Step lines of a training log: text -> columns of numbers.

    form = form_of(b"step:50/1600 val_loss:4.12 train_time:3100ms")
    form.pattern.fullmatch(line).groups()    # step, number of steps, then the text of each value
    StepColumns({form: [StepLine(...), ...]})["val_loss"].value

A log has thousands of lines with the same keys in the same order. They share a Form, whose pattern parses a
line in one match. Only the texts are kept; they become numbers when their column is read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

_NUMBER = rb"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[nN][aA][nN]|[iI][nN][fF])"
_HEADS = (
    rb"step:(\d{1,12})/(\d{1,12})(?= )",
    rb"s:(\d{1,12})()(?= (?:tel|trl|eval):)",  # llm.c's, which gives no number of steps
)
_HEAD = re.compile(b"|".join(_HEADS))
_FIELD = re.compile(  # " key:" and a number with its unit, a list of numbers in brackets, or a word
    rb" +([A-Za-z_][\w./-]*):(?:(%b)(ms|s|%%|)(?=\s|$)|\[( *%b(?: *, *%b)* *)\]|([^\s\[\]]\S*))"
    % (_NUMBER, _NUMBER, _NUMBER)
)
NUMERALS = b"0123456789.-+eE"  # a line without these is its skeleton; e as in 2.3e-05
TORN = re.compile(rb"step:\d+/\d+ |event:")  # start of a line that was appended to a torn one
_LLMC_NAMES = {b"tel": "val_loss", b"trl": "train_loss"}


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


# ------------------------------------------------------------------------------------------------
# Forms
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Form:
    """Reader of step lines with the same keys, units and list lengths in the same order.

    `columns` maps a key to its place among a line's texts, and to the function that reads such texts.
    """

    pattern: re.Pattern
    columns: dict[str, tuple[int, Callable]]

    @property
    def is_val(self) -> bool:
        return "val_loss" in self.columns

    def has_number(self, key: str) -> bool:
        """True if lines of this form give `key` as a single number."""
        return key in self.columns and self.columns[key][1] not in (_read_lists, _read_words)


_FORMS: dict[re.Pattern, Form] = {}  # every form met so far, shared by all logs: there are only a few
_LAST_FORM: dict[bytes, Form] = {}  # by skeleton


def form_of(line: bytes) -> Form | None:
    """Return the form of a step line; None if any part of the line cannot be read."""
    skeleton = line.translate(None, NUMERALS)
    form = _LAST_FORM.get(skeleton)
    if form is None or not form.pattern.fullmatch(line):
        form = _work_out_form(line)
        if form:
            _LAST_FORM[skeleton] = form
    return form


def _work_out_form(line: bytes) -> Form | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    pattern, columns, place = b"", {}, 0
    position, end = head.end(), len(line.rstrip())
    while position < end:
        match = _FIELD.match(line, position)
        if match is None:
            return None
        key, number, unit, items, _ = match.groups()
        if number is not None:
            value, read = rb"(%b)%b" % (_NUMBER, unit), _READ_NUMBERS[unit]
        elif items is not None:
            value = rb"\[( *%b(?: *, *%b){%d} *)\]" % (_NUMBER, _NUMBER, items.count(b","))
            read = _read_lists
        else:
            value, read = rb"(?!%b(?:ms|s|%%|)(?:\s|$))([^\s\[\]]\S*)" % _NUMBER, _read_words
        pattern += rb" +%b:%b" % (re.escape(key), value)
        columns[_LLMC_NAMES.get(key) or key.decode(errors="replace")] = place, read
        place, position = place + 1, match.end()
    if not columns:
        return None
    pattern = (_HEADS[0] if line.startswith(b"step") else _HEADS[1]) + pattern
    if any(read is _read_words for _, read in columns.values()):  # a word could hide the start of a line
        pattern = rb"(?!.+(?:%b))" % TORN.pattern + pattern
    pattern = re.compile(pattern + rb"\s*")
    return _FORMS.setdefault(pattern, Form(pattern, columns))


def _read_numbers(texts: list[bytes], factor: float = 1.0) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(list(map(float, texts))) * factor


def _read_lists(texts: list[bytes]) -> np.ndarray:
    return np.array([list(map(float, text.split(b","))) for text in texts])


def _read_words(texts: list[bytes]) -> np.ndarray:
    return np.array([text.decode(errors="replace") for text in texts], dtype=object)


_READ_NUMBERS = {  # by unit; times become milliseconds
    b"": _read_numbers,
    b"ms": _read_numbers,
    b"%": _read_numbers,
    b"s": partial(_read_numbers, factor=1000.0),
}


# ------------------------------------------------------------------------------------------------
# Columns
# ------------------------------------------------------------------------------------------------


class StepLine(NamedTuple):
    number: int  # line number in the file
    step: int
    texts: tuple[bytes, ...]


class StepColumns(Mapping):
    """Key -> Column, read on demand: a plot needs only a few of a log's thirty columns."""

    def __init__(self, lines: Mapping[Form, list[StepLine]]):
        self._lines = {form: list(found) for form, found in lines.items() if found}
        self._known: dict[str, Column] = {}
        self._keys = list(dict.fromkeys(key for form in self._lines for key in form.columns))

    def __getitem__(self, key: str) -> Column:
        if key not in self._known:
            forms = [form for form in self._lines if key in form.columns]
            if not forms:
                raise KeyError(key)
            step, chosen = self._sorted_steps(forms)
            self._known[key] = Column(step, _join([self._read(form, key) for form in forms])[chosen])
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def curve(self, loss: str) -> Curve:
        """Return the lines that give `loss` as a number, with their time, tokens and accuracy."""
        forms = [form for form in self._lines if form.has_number(loss)]
        step, chosen = self._sorted_steps(forms)

        def gather(key: str) -> np.ndarray:
            parts = [np.zeros(0)]
            for form in forms:
                missing = np.full(len(self._lines[form]), np.nan)
                parts.append(self._read(form, key) if form.has_number(key) else missing)
            return np.concatenate(parts)[chosen]

        return Curve(step, gather(loss), gather("train_time"), gather("tokens"), gather("val_acc"))

    def _read(self, form: Form, key: str) -> np.ndarray:
        place, read = form.columns[key]
        return read([line.texts[place] for line in self._lines[form]])

    def _sorted_steps(self, forms: list[Form]) -> tuple[np.ndarray, np.ndarray]:
        """Distinct steps in increasing order, and the index of the last line written for each."""
        lines = [line for form in forms for line in self._lines[form]]
        step = np.array([line.step for line in lines], dtype=np.int64)
        if (step[1:] > step[:-1]).all():
            return step, np.arange(len(step))
        order = np.lexsort(([line.number for line in lines], step))
        step = step[order]
        last = np.append(step[1:] != step[:-1], True)
        return step[last], order[last]


def _join(values: list[np.ndarray]) -> np.ndarray:
    """Join a column's parts. Short lists are padded with NaN; a word among numbers becomes NaN."""
    words = [value.dtype == object for value in values]
    if all(words):
        return np.concatenate(values)
    values = [np.full(len(v), np.nan) if is_word else v for v, is_word in zip(values, words, strict=True)]
    if len({value.shape[1:] for value in values}) > 1:
        values = [value if value.ndim == 2 else value[:, None] for value in values]
        width = max(value.shape[1] for value in values)
        missing = [((0, 0), (0, width - value.shape[1])) for value in values]
        values = [np.pad(v, m, constant_values=np.nan) for v, m in zip(values, missing, strict=True)]
    return np.concatenate(values)
