"""What every command line has in common."""

import argparse
import os
import sys


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help begins with the module's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def say(text: str) -> None:
    """Print a line, if anybody reads: `| tee` ends at Ctrl-C before a launcher that has runs to stop."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
