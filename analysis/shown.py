"""Make text from files, names and other people's messages safe to show.

A stranger may have written a log. Its text must reach a terminal, a plot or a page as characters, never as a
command: `clean` is applied where such text is read, `console` guards what is printed.
"""

import contextlib
import os
import re
import sys
import unicodedata
from collections.abc import Iterator

# Control characters, bidirectional marks, lone surrogates, line and paragraph separators.
NOT_SHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
SUSPECT = re.compile(r"[^\x20-\x7e\n\t]")


def clean(value):
    """Replace each unsafe character by a mark; also inside lists and tables."""
    if isinstance(value, str):
        if value.isascii() and value.isprintable():  # nearly all text, and much faster than the pattern
            return value
        return SUSPECT.sub(lambda found: _shown(found[0]), value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value


def _shown(character: str) -> str:
    return "\ufffd" if unicodedata.category(character) in NOT_SHOWN else character


class Console:
    """Stream that shows text and obeys nothing in it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(clean(text))
        return len(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Print any text on any console, and end quietly when the reader has gone, as with `| head`."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # characters that the console lacks
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = map(Console, before)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python complains when it closes the stream
            os.dup2(os.open(os.devnull, os.O_WRONLY), before[0].fileno())
    finally:
        sys.stdout, sys.stderr = before
