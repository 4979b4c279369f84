"""Show what differs between two runs: settings, versions, data, losses, source code.

    python diff_runs.py logs/A.txt logs/B.txt
    python diff_runs.py logs/A.txt logs/B.txt | less     # the source code comes last, and can be long

Everything is read from the logs, so it also works for logs from another machine and for the packed logs in
records/. Settings that do not change the training are marked. Losses are compared at the validations that
both runs have; negative means that B is better. The source code is what the logs embed, as a unified diff.
"""

import difflib
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from analysis import command_line
from analysis.arms import DATA
from analysis.run_log import (
    SEPARATOR_WIDTH,
    RunLog,
    embedded_sources,
    format_value,
    read_log,
    read_with_sources,
)
from analysis.tables import format_difference, format_loss, format_table

OWN = ("run_id", "time", "launch")  # differ between any two runs, and do not matter
MAX_STEPS = 12  # validations shown


# ------------------------------------------------------------------------------------------------
# What differs
# ------------------------------------------------------------------------------------------------


def differing(a: Mapping[str, object], b: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Name and both values of each entry that differs; - where a run has none."""
    rows = []
    for name in sorted({*a, *b}):
        if name not in a or name not in b or a[name] != b[name]:
            rows.append((name, *(format_value(run[name]) if name in run else "-" for run in (a, b))))
    return rows


def compared_settings(run: RunLog) -> dict[str, object]:
    """The configuration without what names the run."""
    return {name: value for name, value in run.flat_config.items() if name not in OWN}


def kind_of(name: str, run: RunLog) -> str:
    """Return recording or machine for a setting that affects only that; else an empty text."""
    return next((kind for kind, names in run.affects.items() if name in names), "")


def sources_of(path: Path) -> dict[str, bytes]:
    """The source files that a log embeds; an older log's source code is all in one piece."""
    try:
        return embedded_sources(path)
    except ValueError:
        head, line, _ = read_with_sources(path).partition(b"\n" + b"=" * SEPARATOR_WIDTH)
        return {"source": head + b"\n"} if line else {}


def code_diff(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> dict[str, list[str]]:
    """The unified diff of each source file that differs; a file that one run lacks counts as empty."""
    diffs = {}
    for name in sorted({*a, *b}):
        texts = [files.get(name, b"").decode(errors="replace").splitlines() for files in (a, b)]
        lines = list(difflib.unified_diff(*texts, f"A/{name}", f"B/{name}", lineterm=""))
        if lines:
            diffs[name] = lines
    return diffs


def loss_rows(a: RunLog, b: RunLog) -> list[list[str]]:
    """Step, both losses and B - A at validations that both runs have: MAX_STEPS of them, evenly spread."""
    common, at_a, at_b = np.intersect1d(a.val.step, b.val.step, return_indices=True)
    if not len(common):
        return []
    shown = np.unique(np.linspace(0, len(common) - 1, min(len(common), MAX_STEPS)).round().astype(int))
    losses = zip(common[shown], a.val.loss[at_a[shown]], b.val.loss[at_b[shown]], strict=True)
    return [[str(step), format_loss(x), format_loss(y), format_difference(y - x)] for step, x, y in losses]


# ------------------------------------------------------------------------------------------------
# The text
# ------------------------------------------------------------------------------------------------


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> str:
    return f"{title}\n{format_table(header, rows)}" if rows else f"{title}: {nothing}"


def heading(word: str, run: RunLog) -> str:
    final = f"last validation loss {format_loss(run.final_val_loss)}"
    return f"{word}: {run.path} ({run.script or 'unknown script'}, {run.state}, {final})"


def loss_section(a: RunLog, b: RunLog) -> str:
    """The losses at common steps, with a note if equal steps are not equal numbers of tokens."""
    rows = loss_rows(a, b)
    text = section("validation loss", ["step", "A", "B", "B - A"], rows, "no validation at a common step")
    if not rows:
        return text
    tokens = [run.val.tokens[np.searchsorted(run.val.step, int(rows[-1][0]))] for run in (a, b)]
    if np.isfinite(tokens).all() and tokens[0] != tokens[1]:
        text += f"\nat step {rows[-1][0]} A had trained on {tokens[0]:,.0f} tokens, B on {tokens[1]:,.0f}"
    return text


def code_section(a: RunLog, b: RunLog) -> Iterable[str]:
    """Changes in each source file, then the diff."""
    sources = [sources_of(run.path) for run in (a, b)]
    if not all(sources):
        word = "the same" if a.source_hash == b.source_hash else "different"
        hashes = f"source hashes are {word}: {a.source_hash or 'none'}, {b.source_hash or 'none'}"
        yield f"source code: not in both logs; {hashes}"
        return
    if sources[0].keys() != sources[1].keys() and any("source" in files for files in sources):
        sources = [{"source": b"".join(files.values())} for files in sources]
    if a.script != b.script and all(run.script in files for run, files in zip((a, b), sources)):
        for run, files in zip((a, b), sources):  # two trainers: their difference is the method
            files[f"{a.script}, {b.script}"] = files.pop(run.script)
    diffs = code_diff(*sources)
    rows = []
    for name, lines in diffs.items():
        body = lines[2:]
        rows.append((name, *(str(sum(line.startswith(sign) for line in body)) for sign in "-+")))
    yield section("source code", ["file", "lines out", "lines in"], rows, "the same")
    for lines in diffs.values():
        yield "\n".join(lines)


def compare(a: RunLog, b: RunLog) -> Iterable[str]:
    """The sections of the comparison."""
    yield f"{heading('A', a)}\n{heading('B', b)}"
    settings = [compared_settings(run) for run in (a, b)]
    rows = [(*row, kind_of(row[0], a) or kind_of(row[0], b)) for row in differing(*settings)]
    same = f"the same ({len(settings[0])})" if a.config else "none in these logs"
    yield section("settings", ["name", "A", "B", "affects"], rows, same)
    started = [a.started, b.started]
    of_data = [{name: fields[name] for name in DATA if name in fields} for fields in started]
    others = [{k: v for k, v in fields.items() if k not in (*OWN, *DATA)} for fields in started]
    known = "the same" if all(started) else "not in these logs"
    yield section("versions and machine", ["name", "A", "B"], differing(*others), known)
    yield section("data", ["name", "A", "B"], differing(*of_data), known)
    yield loss_section(a, b)
    yield from code_section(a, b)


def diff_runs(options: Namespace) -> None:
    runs, notes = [], []
    for path in (options.a, options.b):
        trials = read_log(path)
        runs.append(trials[-1])
        if len(trials) > 1:
            notes.append(f"note: {path} holds {len(trials)} trials; the last one is compared")
    print("\n\n".join([*compare(*runs), *notes]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a run's log, logs/RUN_ID.txt")
    parser.add_argument("b", type=Path, metavar="B", help="another run's log")
    return command_line.run(diff_runs, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
