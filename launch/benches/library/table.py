"""The table of a library: for each instance the best known value, the best proven bound, and what found them.

`best_known.json` holds the figures, `solutions/NAME.json` a placement that has the value, `certificates/NAME.json` what
proves the bound beside closed forms, where it needs that. A figure without its placement is no entry; what `checker`
does not confirm is not written.

Shape letters: L MoE layers, S slots.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import read_json, write_json

FORMAT = "moeplace.best-known/1"
LEAST_GAIN = 1e-9
"""A value or bound replaces another one only if it is better by more than that, relatively."""


@dataclass(frozen=True)
class Entry:
    """What is known of an instance.

    Attributes:
        objective: "traffic", "imbalance" or "seconds".
        value: of the best known placement, as `checker` computes it.
        value_by: version, solver, seed, time limit and date.
        bound: best proven bound.
        bound_by: likewise.
        tokens_digest: of the tokens or loads that the recipe made; another one means another instance.
        caps: (L,) imbalance that layers are held to, None = any.
    """

    objective: str
    value: float
    value_by: str
    bound: float
    bound_by: str
    tokens_digest: str
    caps: tuple[float, ...] | None

    def better(self, value: float, value_by: str) -> Self:
        return replace(self, value=value, value_by=value_by)

    def tighter(self, bound: float, bound_by: str) -> Self:
        return replace(self, bound=bound, bound_by=bound_by)


@dataclass
class Table:
    """The entries of a library by the names of instances; `save` writes them in that order."""

    library: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def load(cls, library: Path) -> Self:
        """Read the table; an absent one is empty.

        Raises:
            FormatError: it is not such a table.
        """
        path = library / "best_known.json"
        if not path.exists():
            return cls(library)
        document = read_json(path)
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"the tag is not {FORMAT!r}")
            return cls(library, {name: _entry(row) for name, row in document["instances"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is not a table of best known values: {error}") from error

    def save(self) -> None:
        """Write the table, atomically."""
        rows = {name: asdict(self.entries[name]) for name in sorted(self.entries)}
        write_json(self.library / "best_known.json", {"format": FORMAT, "instances": rows})

    def solution(self, name: str) -> Any:
        """The document of the placement that has an instance's value."""
        return read_json(self.solution_path(name))

    def solution_path(self, name: str) -> Path:
        return self.library / "solutions" / f"{name}.json"

    def proofs(self, name: str) -> Any:
        """The certificate of an instance's bound; an empty one where closed forms are enough."""
        path = self._certificate_path(name)
        return read_json(path) if path.exists() else {"by_search": False, "proofs": []}

    def keep_bound(self, name: str, certificate: dict[str, Any], entry: Entry) -> None:
        """Write a bound and what proves it."""
        path = self._certificate_path(name)
        if certificate.get("proofs") or certificate.get("by_search"):
            path.parent.mkdir(exist_ok=True)
            write_json(path, certificate)
        else:
            path.unlink(missing_ok=True)
        self.entries[name] = entry
        self.save()

    def _certificate_path(self, name: str) -> Path:
        return self.library / "certificates" / f"{name}.json"

    def keep(self, name: str, placement: Placement, entry: Entry) -> None:
        """Write a placement and its figures."""
        self.solution_path(name).parent.mkdir(exist_ok=True)
        save_placement(self.solution_path(name), placement)
        self.entries[name] = entry
        self.save()


def is_less(value: float, than: float) -> bool:
    """Whether a value is an improvement, beyond rounding."""
    return value < than - LEAST_GAIN * max(abs(than), abs(value))


def as_caps(caps_L: np.ndarray | None) -> tuple[float, ...] | None:
    return None if caps_L is None else tuple(float(cap) for cap in caps_L)


def _entry(row: dict[str, Any]) -> Entry:
    caps = row["caps"]
    return Entry(**{**row, "caps": None if caps is None else tuple(float(cap) for cap in caps)})
