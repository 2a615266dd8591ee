"""A process that forks members: `python -m moeplace.runtime.service.member.fork_server COORDINATOR SOCKET [MODEL]`.

It imports once what every member imports: seconds of processor time for each that would start as a program of its own,
and hundreds of megabytes that forks share. See `moeplace.runtime.service.forks`, which asks.

imports -> {"ready": true} -> for each request, with two open files: fork -> {"pid": ...}

A fork is sound only where nothing else runs: this process has one thread, computes nothing, and never touches a GPU.
What it forks is no child of its own: the process between ends at once, and the coordinator, which adopts orphans at
that moment, is the parent. So a member lives as long as it wants to, whatever becomes of this process.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

from moeplace.runtime.service.member.start import be_member, end_with_parent, leave, name_process, read_line


def main(coordinator: int, channel: int, checkpoint: str | None = None) -> int:
    """Fork until the coordinator closes its end; the exit code. Without a checkpoint forks import for themselves."""
    end_with_parent(coordinator)
    connection = socket.socket(fileno=channel)
    if checkpoint is not None:
        import_for(checkpoint)
    name_process("fork-server")
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        _answer(connection, {"error": f"its imports have left {threads} threads, and a fork has but one"})
        return 1
    _answer(connection, {"ready": True})
    while True:
        request, files, _, _ = socket.recv_fds(connection, 1, 2)
        if not request:
            return 0
        _answer(connection, fork_member(coordinator, connection, *files))
        for file in files:
            os.close(file)


def import_for(checkpoint: str) -> None:
    """Import what serving a checkpoint takes."""
    import gc

    from moeplace.runtime.models.family import import_code
    from moeplace.runtime.service.member import loop  # noqa: F401

    with suppress(Exception):  # members say what is wrong with it
        import_code(checkpoint)
    gc.collect()
    gc.freeze()  # collections in a fork do not write to what is shared


def fork_member(coordinator: int, connection: socket.socket, words: int, job: int) -> dict[str, int | str]:
    """The answer to a request, once the member is the coordinator's child and sure to end with it.

    Args:
        coordinator: process id of who is to be the parent.
        connection: which the fork closes.
        words: file for what the member prints.
        job: file from which it reads its job.
    """
    (told, tell), (heard, go_on) = os.pipe(), os.pipe()
    try:
        between = os.fork()
    except OSError as error:
        for file in (told, tell, heard, go_on):
            os.close(file)
        return {"error": str(error)}
    if between == 0:
        foreign = (connection.fileno(), told, go_on)
        _fork_again(coordinator, foreign, tell=tell, heard=heard, words=words, job=job)
    for file in (tell, heard):
        os.close(file)
    content = os.read(told, 64)
    os.waitpid(between, 0)  # now the coordinator is the parent of the member
    with suppress(BrokenPipeError):
        os.write(go_on, b"!")
    os.close(go_on)
    while os.read(told, 1):  # closed by the member when it will end with its parent
        pass
    os.close(told)
    return json.loads(content or b'{"error": "the process between ended early"}')  # type: ignore[no-any-return]


def _fork_again(coordinator: int, foreign: tuple[int, ...], *, tell: int, heard: int, words: int, job: int) -> NoReturn:
    """In the process between: fork the member, say which it is, end."""
    try:
        member = os.fork()
        if member:
            os.write(tell, json.dumps({"pid": member}).encode())
            os._exit(0)
    except OSError as error:
        os.write(tell, json.dumps({"error": str(error)[:40]}).encode())
        os._exit(1)
    code = 1
    try:
        for file in foreign:
            os.close(file)
        if os.read(heard, 1):  # else the fork server is gone
            end_with_parent(coordinator)
            for file in (heard, tell):
                os.close(file)
            code = _become_member(words, job)
    except BaseException:
        traceback.print_exc()
    leave(code)


def _become_member(words: int, job: int) -> int:
    """Be a process like one that runs a program; its exit code."""
    os.setsid()  # Ctrl-C is for the coordinator, which ends its members in order
    for file, place in ((job, 0), (words, 1), (words, 2)):
        os.dup2(file, place)
    for file in (job, words):
        os.close(file)
    return be_member(read_line())


def _answer(connection: socket.socket, content: Mapping[str, object]) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # what follows finds that nobody asks any more
        connection.sendall(json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os._exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
