"""Runs commands of moeplace as if some packages were not installed; `python -m tests.launch.hidden_packages JOBS`.

JOBS is a JSON list of {"hidden": [package, ...], "commands": [[word, ...], ...]}; the answer is a JSON list with, for
each job, [exit code, standard error] of each command. Each job runs in a fork, so that what is large is imported once.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from moeplace.launch.cli import main
from moeplace.profiling.extras import EXTRA_OF

SHARED = ("numpy", "scipy.optimize", "numba", "networkx")
"""Imported before the forks: no job hides them."""


class Blocker:
    """A finder of modules that finds no module of the hidden packages."""

    def __init__(self, hidden: Sequence[str]) -> None:
        self._hidden = set(hidden)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Nothing, or the error that Python raises where there is no such module."""
        if name.split(".")[0] in self._hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run_job(hidden: Sequence[str], commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """[(exit code, standard error)] of commands without the hidden packages."""
    sys.meta_path.insert(0, Blocker(hidden))  # type: ignore[arg-type]
    results = []
    for words in commands:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
            results.append((main(list(words)), error.getvalue()))
    assert not {name.split(".")[0] for name in sys.modules} & set(hidden)
    return results


def run_jobs(jobs: Sequence[dict[str, list]]) -> list[list[tuple[int, str]]]:
    """The results of all jobs, each in a fork of this process."""
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for number, job in enumerate(jobs):
            answer = Path(folder) / str(number)
            child = os.fork()
            if child == 0:
                try:
                    answer.write_text(json.dumps(run_job(**job)))
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            answers.append(json.loads(answer.read_text()))
    return answers


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    for module in SHARED:
        importlib.import_module(module)
    light = [job for job in wanted if "torch" in job["hidden"]]
    answered = run_jobs(light)
    assert not set(EXTRA_OF) & set(sys.modules)
    importlib.import_module("torch")
    answered += run_jobs([job for job in wanted if "torch" not in job["hidden"]])
    print(json.dumps(answered))
