"""The process of a member: `python -m moeplace.runtime.service.member.start`, with the job as a line on standard input.

It ends when its parent does, whatever either of them is doing: the system kills it with its parent (Linux), and
standard input is a pipe that the parent never closes. Both are arranged before anything that takes time is imported.
"""

import ctypes
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def end_with_parent(parent: int) -> None:
    """Be killed when the thread that started this process ends, or its process; it may have ended already."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def name_process(name: str) -> None:
    """What `top` and `ps -o comm` show of this process, up to 15 bytes (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def watch_input() -> None:
    """End this process when standard input ends."""

    def wait() -> None:
        while os.read(0, 1):  # not through a buffer, whose lock would be held at the end
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def read_line() -> bytes:
    """The first line of standard input, and nothing of what follows it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        content = os.read(0, 1 << 16)
        if not content:
            os._exit(1)
        line += content
    return bytes(line)


def be_member(content: bytes) -> int:
    """Do the job of a line; the exit code."""
    watch_input()
    import json
    import logging

    from moeplace.runtime.service.member.loop import run_member
    from moeplace.runtime.service.options import MemberJob

    logging.basicConfig(level=logging.WARNING)
    job = MemberJob.from_json(json.loads(content))
    name_process(f"member-{job.member_id}")
    return run_member(job)


def leave(code: int) -> NoReturn:
    """End this process now.

    Threads of groups that never connected may still wait for their timeout; an ordinary exit would wait for them, or
    be aborted by them.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(parent: int) -> int:
    """Be a member of a program of its own; its exit code."""
    end_with_parent(parent)
    return be_member(read_line())


if __name__ == "__main__":
    leave(main(int(sys.argv[1])))
