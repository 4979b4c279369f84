"""Text files: read as UTF-8, written atomically."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save it as UTF-8") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` on success, delete it on failure.

    A reader sees the old file or the new one, never half of one. The suffix stays, because matplotlib picks
    the format from it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, making its folder. After a crash of the machine it is whole, old or new."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
