"""The command line that all commands share: arguments, output, errors."""

import argparse
import os
import sys
from pathlib import Path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints the command's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def say(text: str) -> None:
    """Print a line, if anybody reads: `| tee` ends at Ctrl-C before a launcher that has runs to stop."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: Exception | str) -> int:
    """Print what is wrong with what the user gave; return the exit code for it."""
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return 2
