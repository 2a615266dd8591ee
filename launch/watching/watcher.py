"""Watcher: looks at a running engine's routing again and again, and says whether another placement pays.

    gather -> drift and loss? -> search -> does it pay? -> next placement file, engine's file, plan -> hook

The rules are those of a service that re-places itself (`placement.replacement.review`). The engine is not changed: what
is in force is what the placement file says, which is read again before every look; a hook may apply the next one and
put it there.
"""

import logging
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.launch.watching.client import EngineUnreachableError
from moeplace.launch.watching.sources import RoutingSource
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import cluster_of, evaluate
from moeplace.placement.engines import write_engine_placement
from moeplace.placement.objective import load_imbalance
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.replacement.review import Review, ReviewSettings, ReviewTask, review
from moeplace.placement.replacement.rule import ServiceHistory
from moeplace.placement.solve import solve
from moeplace.profiling.errors import FormatError, MoeplaceError
from moeplace.profiling.imports.canonical import Imported
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.loads import load_load
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.event_log import EventLog

logger = logging.getLogger(__name__)
HOOK_TIMEOUT = 600.0


@dataclass(frozen=True)
class WatchOptions:
    """What a watcher does.

    Attributes:
        placement: file of the placement in force, read before every look.
        out: placement file to write when another placement pays.
        engine: whose form is written beside it, as `<out>.<engine>.json`.
        every: seconds from one look to the next.
        looks: how many; 0 = until it is stopped.
        steps_per_look: steps that the engine takes meanwhile, over which a loss adds up.
        hook: command that is run with the engine's file as its last word; () = none.
        calibrated: the cluster with measured links; None = nominal ones.
    """

    placement: Path
    out: Path
    engine: str
    every: float
    looks: int
    steps_per_look: int
    hook: tuple[str, ...] = ()
    calibrated: Callable[[Cluster], Cluster] | None = None


@dataclass
class Watcher:
    """Looks, judges, writes.

    Attributes:
        source: of routing.
        options: what to do.
        settings: how to search and what to demand.
        log: of every look.
        reference: routing that the placement in force was planned on; None = unknown.
    """

    source: RoutingSource
    options: WatchOptions
    settings: ReviewSettings
    log: EventLog
    reference: RoutingTrace | None = None
    _placement: Placement | None = None
    _history: ServiceHistory | None = None
    _candidate: Placement | None = None
    _looks: int = field(default=0)

    def run(self, folder: Path, stop: threading.Event) -> None:
        """Look until `stop` is set, or as often as the options say.

        Args:
            folder: for files of the moment.
            stop: ends it between two looks, and cuts a recording short.
        """
        while not stop.is_set():
            started = time.monotonic()
            self._looks += 1
            self._look(folder, stop)
            if self.options.looks and self._looks >= self.options.looks:
                return
            stop.wait(max(self.options.every - (time.monotonic() - started), 0.0))

    def _look(self, folder: Path, stop: threading.Event) -> None:
        """One look; an engine that does not answer is tried again at the next."""
        placement = load_placement(self.options.placement)
        if self._placement is None or placement.digest != self._placement.digest:
            self._in_force(placement)
        try:
            gathered = self.source.gather(folder, stop)
        except (EngineUnreachableError, FormatError) as error:
            self._tell("no-routing", str(error), {})
            return
        if gathered.kind == "load":
            self._weigh_loads(placement, gathered)
        else:
            self._review(placement, load_trace(gathered.path))

    def _in_force(self, placement: Placement) -> None:
        """A placement is there that was not there before: its promise is what it costs on the routing known."""
        if self._placement is not None:
            self._tell("placement-changed", f"{self.options.placement} has another placement", {})
            self.reference = None
        self._placement, self._history, self._candidate = placement, None, None

    def _review(self, placement: Placement, routing: RoutingTrace) -> None:
        cluster = cluster_of(placement)
        if self.options.calibrated is not None:
            cluster = self.options.calibrated(cluster)
        steps = self.options.steps_per_look
        if self._history is None and self.reference is not None:
            self._history = _promise(placement, self.reference, cluster, self.settings)
        task = ReviewTask(
            placement, routing, steps, cluster, self.settings, self._history, self.reference, self._candidate
        )
        found = review(task)
        self._history, self.reference, self._candidate = found.history, found.reference, found.candidate
        self._tell(found.decision.action, found.decision.reason, found.figures)
        if found.decision.action == "move":
            self._write(found)

    def _weigh_loads(self, placement: Placement, gathered: Imported) -> None:
        """Loads without tokens: balance is all that can be weighed."""
        loads = load_load(gathered.path)
        problem = Problem.from_load(
            loads.load, cluster_of(placement), experts_per_layer=loads.experts_per_layer, previous=placement,
            max_moves=self.settings.max_moves, mode=placement.mode,
            layer_ids=placement.layer_ids, num_hidden_layers=placement.num_hidden_layers,
        )  # fmt: skip
        result = solve(problem, time_limit=self.settings.time_limit, seed=self.settings.seed)
        now, then = (float(np.mean(load_imbalance(problem, p))) for p in (placement, result.placement))
        gain = 1 - then / now
        figures = {"imbalance": now, "candidate_imbalance": then, "gain": gain}
        if gain < self.settings.rule.least_gain:
            self._tell("keep", f"imbalance {now:.4f}; a search finds {then:.4f}, {gain:.1%} less", figures)
            return
        self._tell("move", f"imbalance {now:.4f} -> {then:.4f}, {gain:.1%} less", figures)
        self._save(result.placement, {"decision": "move", **figures})

    def _write(self, found: Review) -> None:
        assert found.candidate is not None
        self._save(found.candidate, {"decision": found.decision.reason, **found.figures})

    def _save(self, placement: Placement, evidence: dict[str, Any]) -> None:
        """The placement file, the engine's file, and the hook."""
        options = self.options
        save_placement(options.out, placement, evidence=evidence)
        engine_file = options.out.with_name(f"{options.out.stem}.{options.engine}.json")
        try:
            export = write_engine_placement(engine_file, placement, options.engine)
        except MoeplaceError as error:
            self._tell("not-exported", str(error), {})
            return
        self._tell("written", f"{engine_file}; start {options.engine} with: {export.start}", {})
        if options.hook:
            self._hand_over(engine_file)

    def _hand_over(self, file: Path) -> None:
        command = [*self.options.hook, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=HOOK_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            self._tell("hook-failed", f"{command[0]}: {error}", {})
            return
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
        kind, words = ("handed-over", "done") if done.returncode == 0 else ("hook-failed", f"exit {done.returncode}")
        self._tell(kind, f"{command[0]}: {words} {said[0]}".strip(), {})

    def _tell(self, kind: str, sentence: str, figures: dict[str, float]) -> None:
        self.log.add(kind, sentence, step=self._looks * self.options.steps_per_look, **figures)
        print(f"look {self._looks}: {kind}: {sentence}{_words(figures)}", flush=True)


def _promise(
    placement: Placement, reference: RoutingTrace, cluster: Cluster, settings: ReviewSettings
) -> ServiceHistory:
    judged = evaluate(reference, placement, cluster=cluster, shape=settings.shape, calibration=settings.calibration)
    return ServiceHistory(judged.predicted_seconds)


def _words(figures: dict[str, float]) -> str:
    """What decided, in figures a person reads."""
    parts = []
    if "seconds_per_step" in figures:
        parts.append(f"{figures['seconds_per_step'] * 1e3:.4g} ms/step predicted")
    if "drift" in figures:
        parts.append(f"drift {figures['drift']:.3f} (chance {figures['drift_threshold']:.3f})")
    if "gain" in figures:
        parts.append(f"gain {figures['gain']:.1%}")
    if "tokens" in figures:
        parts.append(f"{figures['tokens']:,.0f} tokens")
    return f" ({', '.join(parts)})" if parts else ""
