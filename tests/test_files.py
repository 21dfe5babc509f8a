"""Text as it is found: byte order marks, odd line ends, separators within a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.models import byte_tokenizer

from fp4graph import CorpusError, OptionError, models
from fp4graph.files import read_lines, write_text
from fp4graph.study.plan import read_plan
from fp4graph.study.probe import read_probe

if TYPE_CHECKING:
    from pathlib import Path

MARK = b"\xef\xbb\xbf"
ODD = "a line\u2028and\u0085another\x0bof\x0cit\x1c"


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(tmp_path: Path, mark: bytes, end: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(mark + f"{ODD}{end}{end} b{end}c".encode())
    assert read_lines(file) == [(1, ODD), (3, " b"), (4, "c")]


@pytest.mark.parametrize("mark", [b"", MARK])
def test_a_probe_a_plan_and_a_corpus(tmp_path: Path, mark: bytes) -> None:
    question = {"context": ODD, "choices": [" a", " b"], "answer": 0}
    text = "".join(json.dumps(question, ensure_ascii=False) + "\r\n" for _ in range(2))
    (tmp_path / "p.jsonl").write_bytes(mark + text.encode())
    assert len(read_probe(tmp_path / "p.jsonl", byte_tokenizer(), 64).answers) == 2
    (tmp_path / "p.toml").write_bytes(mark + b'[[trials]]\nselect = "attn"\n')
    assert read_plan(str(tmp_path / "p.toml"), {})[0].select == ("attn",)
    (tmp_path / "c.txt").write_bytes(mark + b"text")
    assert models.corpus(str(tmp_path / "c.txt")) == "text"


def test_an_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n\nno question\n")
    with pytest.raises(CorpusError, match="line 3"):
        read_probe(tmp_path / "p.jsonl", byte_tokenizer(), 64)


def test_utf_16_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[[trials]]", encoding="utf-16")
    with pytest.raises(OptionError, match="cannot read the plan"):
        read_plan(str(tmp_path / "p.toml"), {})


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "one\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"one\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "deep" / "a.txt", "\ud800")
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["a.txt"]
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"one\n"
