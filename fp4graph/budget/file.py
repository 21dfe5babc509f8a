"""A plan as a file that `--policy` and `--mix` take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fp4graph import StudyError
from fp4graph.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph import Policy


def write_policy(policy: Policy, path: Path, name: str, about: str) -> None:
    """Write a policy as TOML.

    Args:
        policy: what runs how.
        path: the file.
        name: what tables call it.
        about: lines for whoever reads the file.

    Raises:
        StudyError: it cannot be written.
    """
    lines = [f"# {line}".rstrip() for line in about.splitlines()]
    lines += [f"name = {json.dumps(name)}", "", "[select]"]
    for selector, scheme in policy.entries:
        value = "dense" if scheme is None else scheme.options
        lines.append(f"{json.dumps(str(selector))} = {_value(value)}")
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error}") from None


def _value(value: str | dict[str, str]) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return f"{{ {', '.join(f'{key} = {json.dumps(text)}' for key, text in value.items())} }}"
