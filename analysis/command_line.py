"""Command-line code that all commands share: arguments, output, errors."""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.shown import clean, console


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints the command's docstring verbatim."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def make_sweep_parser(description: str | None, out: str, paths: str = "+") -> argparse.ArgumentParser:
    """Return a parser for a command that reads a sweep or logs.

    `out` explains --out; `paths` is argparse's nargs of the sweep or logs.
    """
    parser = make_parser(description)
    parser.add_argument("paths", nargs=paths, type=Path, metavar="SWEEP.toml|LOG", help="a sweep, or logs")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of logs and manifests")
    parser.add_argument("--pool-sources", action="store_true", help="pool runs of different source code")
    parser.add_argument(
        "--stopped-early",
        action="store_true",
        help="public logs that end in a validation are complete, also before their last step",
    )
    parser.add_argument("--out", type=Path, help=out)
    return parser


def run(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
) -> int:
    """Call a command with its parsed arguments.

    Return its exit code (None means 0), or 2 if the user's input is wrong.
    """
    options = parser.parse_args(arguments)
    with console():
        try:
            return command(options) or 0
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            return complain(error)


def import_optional(module: str, package: str):
    """Import a module that requirements.txt leaves out; ValueError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"this needs the package {package}, which requirements.txt leaves out ({error}); install it: "
            f"{sys.executable} -m pip install {shlex.quote(package)}"
        ) from None


def say(text: str) -> None:
    """Print a line unless the reader is gone: at Ctrl-C, `| tee` ends before a launcher with runs to stop."""
    try:
        print(clean(text), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: Exception | str) -> int:
    """Print what is wrong with the user's input; return its exit code."""
    print(clean(f"{Path(sys.argv[0]).name}: {error}"), file=sys.stderr)
    return 2
