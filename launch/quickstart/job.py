"""What the quickstart tells its ranks, as files in one folder: a job in, one result or one sentence per rank out.

job.json  reference.npy  placement files        written by the command before it starts the ranks
rank-0.json ... rank-3.json                     written by ranks that are done
rank-2.failed                                   one sentence of a rank that could not go on
progress                                        share done, by rank 0
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeplace.profiling.files import read_json, write_json

JOB, REFERENCE, PROGRESS = "job.json", "reference.npy", "progress"


@dataclass(frozen=True)
class RunSpec:
    """One column of the comparison.

    Attributes:
        placement: its name, "index order" or "solved".
        file: its placement file.
        mode: execution mode.
    """

    placement: str
    file: str
    mode: str


@dataclass(frozen=True)
class Job:
    """What every rank does.

    Attributes:
        model: checkpoint folder.
        runs: what to compare; the first is the baseline.
        prompts: token ids of every request, all of one length.
        completions: what the plain model adds to each, greedily.
        checked: how many of the requests have their logits compared with `reference.npy`.
        rounds: how often each run serves all requests; runs alternate.
        calibration: a run that is none of `runs`, served before them: predictions rest on its time, not on theirs.
        calibration_prompts: token ids of its requests, none of which is in `prompts`.
        timeout: seconds to wait for another rank.
    """

    model: str
    runs: Sequence[RunSpec]
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    checked: int
    rounds: int
    calibration: RunSpec
    calibration_prompts: Sequence[Sequence[int]]
    timeout: float

    @property
    def new_tokens(self) -> int:
        """Tokens that every request adds."""
        return len(self.completions[0])

    def save(self, folder: Path) -> None:
        """Write the job file."""
        write_json(folder / JOB, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """Read the job file."""
        document: dict[str, Any] = read_json(folder / JOB)
        runs = [RunSpec(**run) for run in document.pop("runs")]
        return cls(runs=runs, calibration=RunSpec(**document.pop("calibration")), **document)


def result_path(folder: Path, rank: int) -> Path:
    """Where a rank writes what it measured."""
    return folder / f"rank-{rank}.json"


def failure_path(folder: Path, rank: int) -> Path:
    """Where a rank says why it could not go on."""
    return folder / f"rank-{rank}.failed"
