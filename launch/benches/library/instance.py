"""Instance: a named problem of the library, made from its description when it is asked for.

A library is a folder: `<suite>.toml` lists instances, `best_known.json` is the table, `solutions/` holds placements.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeplace.launch.benches.library.recipes import drifted, make_loads, make_trace
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.problem import Problem
from moeplace.placement.solvers import get_solver
from moeplace.profiling.errors import FormatError, InputError, MoeplaceError
from moeplace.profiling.files import require_file

SUITES = ("small", "large")
_KEYS = {"name", "about", "trace", "loads", "cluster", "problem", "previous"}


@dataclass(frozen=True)
class Instance:
    """One entry of a suite.

    Attributes:
        name: unique in the library.
        about: one line for people.
        recipe: of its tokens, or of its loads.
        of_loads: whether only loads are known.
        cluster: `ranks`, `slots_per_rank`, `ranks_per_node`, `speed`, `inter_bandwidth`.
        options: keyword arguments of `Problem`.
        previous: how the placement in force is made, {} = there is none.
    """

    name: str
    about: str
    recipe: Mapping[str, Any]
    of_loads: bool
    cluster: Mapping[str, Any]
    options: Mapping[str, Any]
    previous: Mapping[str, Any]

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of a suite.

        Raises:
            FormatError: a key is unknown or missing.
        """
        unknown = set(entry) - _KEYS
        if unknown or ("trace" in entry) == ("loads" in entry):
            wrong = f"unknown key {sorted(unknown)[0]!r}" if unknown else "it needs either trace or loads"
            raise FormatError(f"instance {entry.get('name')!r}: {wrong}")
        try:
            recipe = entry.get("trace", entry.get("loads"))
            return cls(str(entry["name"]), str(entry["about"]), dict(recipe), "loads" in entry, dict(entry["cluster"]),
                       dict(entry.get("problem", {})), dict(entry.get("previous", {})))  # fmt: skip
        except (KeyError, TypeError) as error:
            raise FormatError(f"instance {entry.get('name')!r} lacks {error}") from error

    def problem(self, traces: Path | None = None) -> Problem:
        """The problem itself.

        Raises:
            AbsentTraceError: it needs a recorded trace that is not here.
            FormatError, InputError: the description is wrong.
        """
        options = {"objective": "traffic", **self.options}
        cluster = self._cluster()
        if self.of_loads:
            load_LE = make_loads(self.recipe)
            return self._with_previous(Problem.from_load(load_LE, cluster, **options))
        return self._with_previous(Problem.from_trace(make_trace(self.recipe, traces), cluster, **options))

    def _cluster(self) -> Cluster:
        told = dict(self.cluster)
        try:
            cluster = Cluster.uniform(
                int(told.pop("ranks")),
                slots_per_rank=told.pop("slots_per_rank"),
                ranks_per_node=told.pop("ranks_per_node", None),
            )
        except KeyError as error:
            raise FormatError(f"instance {self.name}: the cluster lacks {error}") from error
        changes: dict[str, Any] = {}
        if "speed" in told:
            changes["speed_of_rank"] = np.asarray(told.pop("speed"), dtype=float)
        if "inter_bandwidth" in told:
            changes["inter"] = Link(latency=cluster.inter.latency, bandwidth=float(told.pop("inter_bandwidth")))
        if told:
            raise FormatError(f"instance {self.name}: the cluster has the unknown key {sorted(told)[0]!r}")
        return cluster.replace(**changes)

    def _with_previous(self, problem: Problem) -> Problem:
        """The problem with the placement in force: index order, or EPLB's for loads as they were some time ago."""
        if not self.previous:
            return problem
        placement = self._old_placement(problem)
        limits = {key: self.previous[key] for key in ("max_moves", "move_price") if key in self.previous}
        return problem.replace(previous=placement, **limits)

    def _old_placement(self, problem: Problem) -> Placement:
        ranks = int(self.previous.get("ranks", problem.num_ranks))
        cluster = problem.cluster if ranks == problem.num_ranks else Cluster.uniform(
            ranks, slots_per_rank=int(self.previous["slots_per_rank"]))  # fmt: skip
        kind = self.previous.get("by", "index-order")
        if kind == "index-order":
            return index_order(problem.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank,
                               mode=problem.mode)  # fmt: skip
        if kind != "eplb":
            raise FormatError(f"instance {self.name}: the previous placement is by index-order or eplb, not {kind!r}")
        old_LE = drifted(problem.load_LE, float(self.previous["drift"]), int(self.previous.get("seed", 0)))
        old = Problem.from_load(old_LE, cluster, experts_per_layer=problem.experts_per_layer, mode=problem.mode)
        return old.placement(get_solver("eplb")(old, Budget(1.0)).slot_to_expert)


def load_suite(library: Path, suite: str) -> list[Instance]:
    """The instances of a suite, in the order of its file.

    Raises:
        InputError: there is no such suite, or a name is there twice.
        FormatError: its file is not as described.
    """
    if suite not in SUITES:
        raise InputError(f"suite {suite!r} must be one of {', '.join(SUITES)}")
    path = library / f"{suite}.toml"
    try:
        document = tomllib.loads(require_file(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not TOML: {error}") from error
    try:
        instances = [Instance.from_entry(entry) for entry in document.get("instance", [])]
    except MoeplaceError as error:
        raise FormatError(f"{path}: {error}") from error
    names = [instance.name for instance in instances]
    double = {name for name in names if names.count(name) > 1}
    if double or not names:
        raise FormatError(f"{path}: " + (f"{sorted(double)[0]!r} is there twice" if double else "no instance"))
    return instances


def find_library(folder: str | None) -> Path:
    """The folder named, else `benchmarks/instances` of the present folder or of this checkout.

    Raises:
        InputError: there is none.
    """
    here = Path(__file__).resolve()
    places = [Path(folder)] if folder else [Path("benchmarks/instances"), *(
        parent / "benchmarks" / "instances" for parent in here.parents[2:4])]  # fmt: skip
    for place in places:
        if place.is_dir():
            return place
    raise InputError(
        f"no library of instances at {places[0]}: it comes with the source, in benchmarks/instances (--library DIR)"
    )
