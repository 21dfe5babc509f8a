"""Tables in pages of docs/."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Put parts of a page between its lines `<!-- NAME -->` and `<!-- /NAME -->`."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not begin or not end:
            raise SystemExit(f"{page} has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"{before}{begin}{part}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
