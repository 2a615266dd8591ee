"""Journal: what was asked of a service and what was delivered, in a database that outlives the coordinator.

    state/service.sqlite    requests (number, ticket, name, what was asked, how it ended); tokens (number, first, ids);
                            logprobs (number, first, found), of requests that want them
    state/lock              held by the coordinator that uses the folder

What is written before it is told to anybody cannot be taken back: a coordinator that starts with the folder of one that
was killed takes up the requests that had not ended, with the tokens that were delivered, and can still say what came of
the others. Without a folder it is kept in memory. SQLite writes ahead (WAL) and leaves the last transactions to the
operating system: they survive the end of the process, though perhaps not that of the machine.
"""

import fcntl
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import RequestRecord
from moeplace.runtime.service.coordinator.actions import Accept, Tell

KEPT = 10_000
"""Requests that have ended and can still be asked for."""
_TABLES = """
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, ticket TEXT UNIQUE NOT NULL, name TEXT NOT NULL, request TEXT NOT NULL,
    reason TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS by_name ON requests (name);
CREATE TABLE IF NOT EXISTS tokens (
    number INTEGER NOT NULL, first INTEGER NOT NULL, ids TEXT NOT NULL, PRIMARY KEY (number, first)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS logprobs (
    number INTEGER NOT NULL, first INTEGER NOT NULL, found TEXT NOT NULL, PRIMARY KEY (number, first)) WITHOUT ROWID;
"""
_FIELDS = "number, ticket, request, reason, error"


class Journal:
    """See the module. Calls must not overlap."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """Open the journal of a state folder, which is made where there is none.

        Raises:
            InputError: it cannot be used, or another coordinator uses it.
        """
        self._lock = None if folder is None else _take_folder(Path(folder))
        path = ":memory:" if folder is None else str(Path(folder) / "service.sqlite")
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_TABLES)
            [[self.taken]] = self._database.execute("SELECT coalesce(max(number), 0) FROM requests")
        except sqlite3.Error as error:
            self._release()
            raise InputError(f"the state in {folder} cannot be used: {error}") from error

    def in_flight(self) -> list[RequestRecord]:
        """Requests that have not ended, in the order in which they were taken."""
        query = f"SELECT {_FIELDS} FROM requests WHERE reason IS NULL ORDER BY number"
        return [self._record(*row) for row in self._database.execute(query).fetchall()]

    def find(self, name: str) -> RequestRecord | None:
        """The newest request under a name."""
        query = f"SELECT {_FIELDS} FROM requests WHERE name = ? ORDER BY number DESC LIMIT 1"
        rows = self._database.execute(query, (name,)).fetchall()
        return self._record(*rows[0]) if rows else None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside is written as a whole.

        Raises:
            MoeplaceError: it could not be.
        """
        try:
            self._database.execute("BEGIN")
            yield
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise MoeplaceError(f"the state could not be written: {error}") from error
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def accept(self, action: Accept) -> None:
        """A request was taken."""
        number = _number(action.ticket)
        self.taken = max(self.taken, number)
        request = json.dumps(action.request.to_json())
        row = (number, action.ticket, action.request.request_id, request)
        self._database.execute("INSERT INTO requests (number, ticket, name, request) VALUES (?, ?, ?, ?)", row)

    def tell(self, action: Tell) -> None:
        """A request has got tokens, or has ended."""
        number, event = _number(action.ticket), action.event
        if event.token_ids:
            row = (number, action.first, json.dumps(event.token_ids))
            self._database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", row)
        if event.logprobs:
            found = json.dumps([None if one is None else one.to_json() for one in event.logprobs])
            self._database.execute("INSERT OR REPLACE INTO logprobs VALUES (?, ?, ?)", (number, action.first, found))
        if event.finish_reason is not None and action.is_final:
            change = (event.finish_reason, event.error, number)
            self._database.execute("UPDATE requests SET reason = ?, error = ? WHERE number = ?", change)
            self._forget_old(number)

    def close(self) -> None:
        """Let another coordinator have the folder."""
        self._database.close()
        self._release()

    def _record(self, number: int, ticket: str, request: str, reason: str | None, error: str | None) -> RequestRecord:
        tokens = self._joined("SELECT ids FROM tokens WHERE number = ? ORDER BY first", number)
        asked = Request.from_json(json.loads(request))
        logprobs: list[TokenLogprob | None] = []
        if asked.logprobs is not None:
            found = self._joined("SELECT found FROM logprobs WHERE number = ? ORDER BY first", number)
            logprobs = [None if one is None else TokenLogprob.from_json(one) for one in found]
        return RequestRecord(ticket, asked, tuple(tokens), reason, error, tuple(logprobs))  # type: ignore[arg-type]

    def _joined(self, query: str, number: int) -> list[Any]:
        """The lists that a query finds for a request, as one."""
        with closing(self._database.execute(query, (number,))) as rows:
            return [item for (content,) in rows for item in json.loads(content)]

    def _forget_old(self, number: int) -> None:
        if number % 100:
            return
        old = (self.taken - KEPT,)
        chosen = "SELECT number FROM requests WHERE number <= ? AND reason IS NOT NULL"
        for table in ("tokens", "logprobs"):
            self._database.execute(f"DELETE FROM {table} WHERE number IN ({chosen})", old)
        self._database.execute("DELETE FROM requests WHERE number <= ? AND reason IS NOT NULL", old)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _take_folder(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"the state folder {folder} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
    except OSError as error:
        lock.close()
        raise InputError(f"the state folder {folder} is in use by another coordinator") from error
    return lock


def _number(ticket: str) -> int:
    return int(ticket.partition(":")[0])
