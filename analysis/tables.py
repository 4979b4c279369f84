"""Tables and numbers as text, Markdown, CSV and JSON; unknown numbers are `-`, empty or null."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format text in columns, the first one left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a table in Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [[in_markdown(str(cell)) for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def in_markdown(text: str) -> str:
    """Escape text so that it stays in its cell and is not HTML."""
    return re.sub(r"<(?=[A-Za-z/!])", "&lt;", text.replace("|", "\\|").replace("\n", " "))


def as_csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a table as CSV, with numbers in full precision, unknown ones empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in without_nan(rows):
        writer.writerow(["" if value is None else value for value in row])
    return out.getvalue()


def as_json(value: object) -> str:
    """Format standard JSON, with null for NaN and infinities."""
    return json.dumps(without_nan(value), indent=1, ensure_ascii=False) + "\n"


def without_nan(value: object) -> object:
    """Replace each NaN and infinity in a value by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_count(number: int, noun: str) -> str:
    """Format 1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_number(value: float, form: str) -> str:
    """Format a number by a Python format; - if unknown."""
    return format(value, form) if math.isfinite(value) else "-"


def format_loss(loss: float) -> str:
    return format_number(loss, ".4f")


def format_difference(value: float) -> str:
    return format_number(value, "+.4f")


def format_interval(low: float, high: float, signed: bool = True) -> str:
    """Format an interval: [-0.0057, -0.0021]; - if unknown."""
    if not math.isfinite(low + high):
        return "-"
    return f"[{low:+.4f}, {high:+.4f}]" if signed else f"[{low:.4f}, {high:.4f}]"


def format_p(p: float) -> str:
    """Format a p value: 0.034, 0.00012, < 0.0001; - if nothing was tested."""
    if math.isnan(p):
        return "-"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def state_p(p: float) -> str:
    """State a p value in a sentence: p = 0.034, p < 0.0001."""
    text = format_p(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def join_words(words: Sequence[str]) -> str:
    """Join words in a sentence: a, b and c."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
