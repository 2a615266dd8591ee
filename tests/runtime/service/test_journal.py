"""The journal: what was asked and delivered outlives the process that wrote it."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.service.api import FinishReason, RequestRecord, TokenEvent
from moeplace.runtime.service.coordinator import journal as journal_module
from moeplace.runtime.service.coordinator.actions import Accept, Tell
from moeplace.runtime.service.coordinator.journal import Journal


def request(name: str) -> Request:
    return Request(name, (1, 2), 9, SamplingParameters(0.5, seed=3), (4,))


def tell(ticket: str, first: int, *tokens: int, end: FinishReason | None = None, final: bool = True) -> Tell:
    return Tell(ticket, first, TokenEvent(ticket.partition(":")[2], tokens, end), final)


def fill(journal: Journal) -> None:
    """Three requests under two names: one has ended, one was ended with its service, one goes on."""
    with journal.writing():
        for ticket in ("1:a", "2:b", "3:a"):
            journal.accept(Accept(ticket, request(ticket[2:])))
        journal.tell(tell("1:a", 0, 7, 8))
        journal.tell(tell("1:a", 2, 9, end="stop"))
        journal.tell(tell("2:b", 0, 5))
    with journal.writing():
        journal.tell(tell("2:b", 1, end="failed", final=False))
        journal.tell(tell("3:a", 0, 6))


def check(journal: Journal) -> None:
    expected = [RequestRecord("2:b", request("b"), (5,)), RequestRecord("3:a", request("a"), (6,))]
    assert journal.in_flight() == expected
    assert journal.find("a") == expected[1]
    assert journal.find("c") is None
    assert journal.taken == 3


def test_another_process_goes_on(tmp_path: Path) -> None:
    """Killed right after it wrote: everything is there, and the folder is free; while it lived, it was not."""
    script = (
        "import sys, time\nfrom moeplace.runtime.service.coordinator.journal import Journal\n"
        "from tests.runtime.service.test_journal import fill\njournal = Journal(sys.argv[1])\nfill(journal)\n"
        "print('written', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(InputError, match="in use by another coordinator"):
            Journal(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
    journal = Journal(tmp_path)
    check(journal)
    journal.close()
    check(Journal(tmp_path))


def test_what_belongs_to_a_request_is_kept_with_it(tmp_path: Path) -> None:
    """Its note and its log-probabilities, those that are not known among them; an older journal has neither table nor
    note."""
    first, second = TokenLogprob(-0.25, ((3, -0.25), (4, -1.5))), TokenLogprob(-2.0)
    asked = Request("a", (1, 2), 9, logprobs=2, note="of mine")
    journal = Journal(tmp_path)
    with journal.writing():
        journal.accept(Accept("1:a", asked))
        journal.tell(Tell("1:a", 0, TokenEvent("a", (7,), None, None, (first,))))
        journal.tell(Tell("1:a", 1, TokenEvent("a", (8, 9), None, None, (None, second))))
    record = RequestRecord("1:a", asked, (7, 8, 9), logprobs=(first, None, second))
    assert journal.in_flight() == [record]
    journal.close()
    with closing(sqlite3.connect(tmp_path / "service.sqlite")) as database:
        database.execute("DROP TABLE logprobs")
        database.execute("""UPDATE requests SET request = json_remove(request, '$.note', '$.logprobs')""")
        database.commit()
    journal = Journal(tmp_path)
    assert journal.find("a") == replace(record, request=replace(asked, note="", logprobs=None), logprobs=())


def accept_twice(journal: Journal) -> None:
    with journal.writing():
        for _ in range(2):
            journal.accept(Accept("4:c", request("c")))


def test_what_is_not_written_whole_is_not_written(tmp_path: Path) -> None:
    """An error in the middle takes all of it back."""
    journal = Journal(tmp_path)
    fill(journal)
    with pytest.raises(MoeplaceError, match="could not be written"):
        accept_twice(journal)
    assert journal.find("c") is None


def test_old_requests_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest that have ended are kept, and all that have not; nothing of the others is left."""
    monkeypatch.setattr(journal_module, "KEPT", 50)
    journal = Journal()
    with journal.writing():
        journal.accept(Accept("1:first", request("first")))
        journal.tell(tell("1:first", 0, 3))
        for number in range(2, 301):
            journal.accept(Accept(f"{number}:r{number}", request(f"r{number}")))
            event = TokenEvent(f"r{number}", (1,), "stop", None, (None,))
            journal.tell(Tell(f"{number}:r{number}", 0, event))
    assert journal.find("r250") is None
    assert journal.find("r251") == RequestRecord("251:r251", request("r251"), (1,), "stop")
    assert journal.in_flight() == [RequestRecord("1:first", request("first"), (3,))]
    kept = {*range(251, 301)}
    for table, numbers in (("requests", {1, *kept}), ("tokens", {1, *kept}), ("logprobs", kept)):
        found = journal._database.execute(f"SELECT number FROM {table}").fetchall()
        assert {number for (number,) in found} == numbers


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """One sentence, and nothing stays locked."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        Journal(tmp_path / "file")
    (tmp_path / "service.sqlite").write_text("no database" * 100)
    with pytest.raises(InputError, match="cannot be used"):
        Journal(tmp_path)
    (tmp_path / "service.sqlite").unlink()
    Journal(tmp_path).close()
