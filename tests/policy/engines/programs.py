"""Programs of this folder, each in an interpreter of its own: an engine's modules and their stand-ins stay there."""

import json
import os
import subprocess
import sys
from typing import Any


def start(program: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A program of this folder in an interpreter of its own."""
    command = [sys.executable, "-m", f"tests.policy.engines.{program}", *map(str, arguments)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*programs: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What they found; fails with the first error that any of them wrote."""
    try:
        ends = [(*program.communicate(timeout=350), program.returncode) for program in programs]
    finally:
        for program in programs:
            program.kill()
    for _, said, code in ends:
        assert code == 0, said[-4000:]
    return [json.loads(wrote.splitlines()[-1]) for wrote, _, _ in ends]
