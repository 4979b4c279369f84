"""The console, which may be a closed terminal or a pipe that nobody reads any more."""

import os
import sys


def say(text: str) -> None:
    """Print a line, if anybody reads: `| tee` ends at Ctrl-C before a launcher that has runs to stop."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
