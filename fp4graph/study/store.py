"""Results that outlive the process: one sqlite row a trial, written when the trial ends."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fp4graph.errors import StudyError
from fp4graph.study.trial import Row

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.study.evaluate import Floats

_LARGEST_HALF = 65504.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    key TEXT PRIMARY KEY,       -- hash of `identity`
    identity TEXT NOT NULL,     -- JSON: everything that the result depends on
    result TEXT NOT NULL        -- JSON
);
CREATE TABLE IF NOT EXISTS runs (
    run INTEGER PRIMARY KEY,
    facts TEXT NOT NULL         -- JSON: date, command, machine, names of model and text
);
CREATE TABLE IF NOT EXISTS origins (
    key TEXT PRIMARY KEY,       -- of a trial
    run INTEGER NOT NULL        -- that measured it
);
CREATE TABLE IF NOT EXISTS names (
    key TEXT PRIMARY KEY,       -- of a trial
    name TEXT NOT NULL          -- what the user calls it
);
"""


_PASSAGES = (
    """
CREATE TABLE IF NOT EXISTS passages (
    key TEXT PRIMARY KEY,       -- of a trial
    text TEXT NOT NULL,         -- hash of the text
    kl BLOB NOT NULL            -- float16, nats, of the passage's tokens
)""",
    """
CREATE TABLE IF NOT EXISTS tokens (
    text TEXT PRIMARY KEY,      -- hash of the text
    tokens TEXT NOT NULL        -- JSON: what the passage's tokens say
)""",
)


class Passage(NamedTuple):
    """What each of the first tokens of a text cost in a trial, nats, and what they say."""

    kl: Floats
    tokens: list[str]


@dataclass(frozen=True)
class Stored:
    """A trial as the store has it.

    Attributes:
        key: what it goes by.
        identity: everything that the result depends on.
        result: a row as JSON has it, of whatever protocol.
        name: what the user calls it; empty without a name.
        run: what is known of the run that measured it: date, command, machine, names; may be empty.
    """

    key: str
    identity: dict[str, Any]
    result: dict[str, Any]
    name: str
    run: dict[str, Any]

    @property
    def row(self) -> Row:
        """The result, by today's protocol."""
        return Row(**self.result, name=self.name)


class Store:
    """Trials by identity. Safe against kill -9 (WAL journal) and for several processes at once.

    Args:
        path: the sqlite file, made if it is not there; None for memory.

    Raises:
        StudyError: the file cannot be opened or written, or is no sqlite file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StudyError(f"cannot open the results in {path}: {error}") from None

    def get(self, identity: dict[str, Any]) -> Row | None:
        """Return a trial's row, or None if it has not been run."""
        query = (
            "SELECT result, name FROM trials LEFT JOIN names ON names.key = trials.key "
            "WHERE trials.key = ?"
        )
        found = self._execute(query, (_key(identity),)).fetchone()
        return None if found is None else Row(**json.loads(found[0]), name=found[1] or "")

    def begin(self, facts: dict[str, Any]) -> int:
        """Write down that a run begins, and return its number."""
        done = self._execute("INSERT INTO runs (facts) VALUES (?)", (json.dumps(facts),))
        assert done.lastrowid is not None
        return done.lastrowid

    def put(
        self,
        identity: dict[str, Any],
        row: Row,
        run: int | None = None,
        passage: Passage | None = None,
    ) -> None:
        """Keep a trial's row, of a run that has begun; the first one to arrive stays."""
        key, result = _key(identity), asdict(row)
        del result["name"]
        if passage is not None:
            self._put_passage(key, identity["text"], passage)
        self._execute(
            "INSERT OR IGNORE INTO trials VALUES (?, ?, ?)",
            (key, _canonical(identity), json.dumps(result)),
        )
        if run is not None:
            self._execute("INSERT OR IGNORE INTO origins VALUES (?, ?)", (key, run))
        if row.name:
            self.name(identity, row.name)

    def name(self, identity: dict[str, Any], name: str) -> None:
        """Call a trial by a name, instead of what it was called before."""
        self._execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (_key(identity), name))

    def all(self) -> list[Stored]:
        """Return every trial in the order in which they ended."""
        query = (
            "SELECT trials.key, identity, result, name, facts FROM trials "
            "LEFT JOIN names ON names.key = trials.key "
            "LEFT JOIN origins ON origins.key = trials.key "
            "LEFT JOIN runs ON runs.run = origins.run ORDER BY trials.rowid"
        )
        return [
            Stored(
                key, json.loads(identity), json.loads(result), name or "", json.loads(facts or "{}")
            )
            for key, identity, result, name, facts in self._execute(query, ()).fetchall()
        ]

    def _put_passage(self, key: str, text: str, passage: Passage) -> None:
        for table in _PASSAGES:  # which a store that is only read does not get
            self._execute(table, ())
        content = passage.kl.clip(0, _LARGEST_HALF).astype("<f2").tobytes()
        tokens = json.dumps(passage.tokens)
        self._execute("INSERT OR IGNORE INTO passages VALUES (?, ?, ?)", (key, text, content))
        self._execute("INSERT OR IGNORE INTO tokens VALUES (?, ?)", (text, tokens))

    def passages(self, text: str) -> dict[str, bytes]:
        """Return the KL of a text's passage by key of trial, float16 of each token."""
        if not self._has("passages"):
            return {}
        found = self._execute("SELECT key, kl FROM passages WHERE text = ?", (text,))
        return dict(found.fetchall())

    def tokens(self, text: str) -> list[str]:
        """Return what a passage's tokens say; none where no passage was kept."""
        query = "SELECT tokens FROM tokens WHERE text = ?"
        found = self._execute(query, (text,)).fetchone() if self._has("tokens") else None
        tokens: list[str] = [] if found is None else json.loads(found[0])
        return tokens

    def _has(self, table: str) -> bool:
        query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        return self._execute(query, (table,)).fetchone() is not None

    def runs(self) -> list[dict[str, Any]]:
        """Return the facts of every run, in the order in which they began."""
        query = "SELECT run, facts FROM runs ORDER BY run"
        found = self._execute(query, ()).fetchall()
        return [{"run": run, **json.loads(facts)} for run, facts in found]

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
