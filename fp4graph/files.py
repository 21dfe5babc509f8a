"""All text is read and written in one way: UTF-8, lines that end at a newline, files whole.

A byte order mark, as editors on Windows write it, is no part of the text. Lines are cut at newlines
alone: JSON may hold U+2028 and other characters at which `str.splitlines` cuts as well.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_text(path: Path, characters: int | None = None) -> str:
    """Return a text file's content, or its first characters.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file:
        return file.read(characters)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return a text file's lines that are not blank, with their numbers from 1 on.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a draft to write to, which becomes the file at the end, or is removed at an error.

    Each process has its own: several may write one file at once, and the last to end wins.

    Raises:
        OSError: the folder cannot be made, or the draft not be moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield draft
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
