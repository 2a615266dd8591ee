"""What an importer notices about a source: each sentence is a warning now and a note in the file that is written."""

import warnings
from pathlib import Path

import numpy as np

from moeplace.profiling.errors import FormatError, MoeplaceWarning

_SHOWN = 6


class Findings:
    """Collects the sentences on one source.

    Args:
        source: the file, named in every refusal.
        strict: refuse at the first finding.
    """

    def __init__(self, source: str | Path, *, strict: bool = False) -> None:
        self.source = source
        self.notes: list[str] = []
        self.dropped: list[str] = []
        self.remarks: list[str] = []
        self._strict = strict

    def note(self, text: str) -> None:
        """A remark that the file carries; nobody is warned."""
        self.notes.append(text)

    def warn(self, text: str) -> None:
        """Something that looks wrong.

        Raises:
            FormatError: findings are refused (`strict`).
        """
        if self._strict:
            raise FormatError(f"{self.source}: {text}")
        self.notes.append(text)
        warnings.warn(text, MoeplaceWarning, stacklevel=3)

    def remark(self, text: str) -> None:
        """A note that the summary shows too; nobody is warned."""
        self.notes.append(text)
        self.remarks.append(text)

    def remark_dense(self, layers: np.ndarray) -> None:
        """Layers without any choice: dense ones, unless a recorder cannot see their routers."""
        count = f"{len(layers)} layers" if len(layers) > 1 else "1 layer"
        self.remark(
            f"{count} without any expert chosen ({ranges(layers)}) taken for dense: if they are MoE layers that the "
            "recorder does not see (routed by a hash, say), `moeplace export --add-layers` adds them"
        )

    def drop(self, count: int, total: int, what: str, why: str, *, kind: str) -> None:
        """`count` of `total` were left out: a warning, and `count kind` in the summary."""
        self.warn(f"{share(count, total)} of the {what} ({count} of {total}) {why}")
        self.dropped.append(f"{count} {kind}")


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent, never rounded to nothing."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f} %" if percent >= 0.1 or not percent else "less than 0.1 %"


def ranges(numbers: np.ndarray) -> str:
    """Rising numbers as `3-8, 11`, shortened after a few ranges."""
    parts: list[str] = []
    if not len(numbers):
        return "none"
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts) if len(parts) <= _SHOWN else f"{', '.join(parts[: _SHOWN - 1])}, ..., {parts[-1]}"
