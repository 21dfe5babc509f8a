"""Prints sentences of the documentation and of docstrings that are too long to read at once.

    python tests/prose.py [--most 40] [FILE ...]

A sentence ends with a full stop, a colon at a line's end, a table, a list item or a blank line.
Tables, code and what a program generated are no sentences. Exits with 1 if it printed any.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
MOST = 40
_GENERATED = re.compile(r"<!-- ([\w -]+) -->.*?<!-- /\1 -->", re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"`[^`]*`")
_END = re.compile(r"(?<=[.!?])[)*\"']*\s+(?=[\"'(*\0A-Z0-9\[])|:\s*$", re.MULTILINE)
_ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+")
_NEW = re.compile(r"^(\s*([-*]|\d+\.)\s|#|\||>>>|\s*$)")
_SECTION = re.compile(r"^\s*(Args|Returns|Raises|Attributes|Given|Result|Yields)\b.*:$")
_FIELD = re.compile(r"^\s*\*{0,2}\w+: ")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs and list items of Markdown, without code and tables."""
    text = re.sub(r"```.*?```", "", _GENERATED.sub("", text), flags=re.DOTALL)
    part: list[str] = []
    in_list = False
    for line in text.splitlines():
        indented = line.startswith("    ") and not (in_list and part)
        if _NEW.match(line) or indented or line.lstrip().startswith(("|", "<!--", "![")):
            yield " ".join(part)
            part = []
        in_list = bool(_ITEM.match(line)) or (in_list and line.startswith("  "))
        prose = not indented and not line.lstrip().startswith(("|", "#", ">>>", "<!--", "!["))
        if prose and line.strip():
            part.append(_ITEM.sub("", line).strip())
    yield " ".join(part)


def docstring_parts(text: str) -> Iterator[str]:
    """Yield the paragraphs and fields of a docstring, without examples."""
    part: list[str] = []
    shown = False
    for line in text.splitlines():
        if not line.strip() or _SECTION.match(line) or _FIELD.match(line):
            yield " ".join(part)
            part = []
        shown = shown and bool(line.strip()) and not _FIELD.match(line)
        shown = shown or bool(re.match(r"^\s*(Given|Result)\b.*:$", line)) or ">>>" in line
        is_table = "|" in line or "  " in line.strip() or bool(re.search(r"[*/%]\d", line))
        if line.strip() and not shown and not is_table and not _SECTION.match(line):
            part.append(_ITEM.sub("", line).strip())
    yield " ".join(part)


def sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentences of a paragraph."""
    plain = _LINK.sub(r"\1", paragraph)
    kept: list[str] = []
    plain = _CODE.sub(lambda m: kept.append(m[0]) or f"\0{len(kept) - 1}\0", plain)
    for sentence in _END.split(plain):
        yield re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])], sentence or "").strip()


def words(sentence: str) -> int:
    """Count words; code in backticks is one."""
    return len([word for word in _CODE.sub("x", sentence).split() if re.search(r"\w", word)])


def parts_of(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a page, or of all docstrings of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from paragraphs(text)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from docstring_parts(ast.get_docstring(node) or "")


def every_page() -> list[Path]:
    """Return all pages and all modules of the package."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return [*sorted(pages), *sorted(ROOT.glob("fp4graph/**/*.py"))]


def main() -> int:
    """Print what is too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--most", type=int, default=MOST, help="words")
    options = parser.parse_args()
    found = 0
    for path in options.files or every_page():
        for part in parts_of(path):
            for sentence in sentences(part):
                if words(sentence) > options.most:
                    found += 1
                    place = path.relative_to(ROOT) if path.is_absolute() else path
                    sys.stdout.write(f"{place}: {words(sentence)} words: {sentence}\n\n")
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
