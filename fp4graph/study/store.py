"""Results that outlive the process: one sqlite row a trial, written when the trial ends."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fp4graph.errors import StudyError
from fp4graph.study.trial import Row

if TYPE_CHECKING:
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    key TEXT PRIMARY KEY,       -- hash of `identity`
    identity TEXT NOT NULL,     -- JSON: everything that the result depends on
    result TEXT NOT NULL        -- JSON
)
"""


class Store:
    """Trials by identity. Safe against kill -9 (WAL journal) and for several processes at once.

    Args:
        path: the sqlite file; made if it is not there.

    Raises:
        StudyError: the file cannot be opened or written, or is no sqlite file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StudyError(f"cannot open the results in {path}: {error}") from None

    def get(self, identity: dict[str, Any]) -> Row | None:
        """Return a trial's row, or None if it has not been run."""
        query = "SELECT result FROM trials WHERE key = ?"
        found = self._execute(query, (_key(identity),)).fetchone()
        return None if found is None else Row.of(json.loads(found[0]))

    def put(self, identity: dict[str, Any], row: Row) -> None:
        """Keep a trial's row; the first one to arrive stays."""
        self._execute(
            "INSERT OR IGNORE INTO trials VALUES (?, ?, ?)",
            (_key(identity), _canonical(identity), json.dumps(asdict(row))),
        )

    def all(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return every trial, its identity and its result, in the order in which they ended."""
        query = "SELECT identity, result FROM trials ORDER BY rowid"
        found = self._execute(query, ()).fetchall()
        return [(json.loads(identity), json.loads(result)) for identity, result in found]

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _execute(self, query: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except sqlite3.Error as error:
            raise StudyError(f"cannot read or write the results in {self._path}: {error}") from None


def _canonical(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()
