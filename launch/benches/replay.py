"""The replay benchmark: several runs of one trace in alternation, each with its prediction.

Every rank calls `replay_bench` with the same options. Inputs are read by all ranks and compared by digest before the
first collective.
"""

import os
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import require_same_model
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace, Split
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import TIERS
from moeplace.runtime.kv.stream import default_pieces
from moeplace.runtime.measure.calibration import calibrate
from moeplace.runtime.measure.replay import RecordedSteps, Replay, ReplayShape, ReplayTensors
from moeplace.runtime.measure.traffic import count_traffic, predict_seconds

INDEX_ORDER = "index-order"
FORMS = ("plain", "node-aware")


@dataclass(frozen=True)
class RunName:
    """One entry of `--runs`.

    Attributes:
        placement: a file, or "index-order".
        mode: execution mode.
        form: of dispatch-combine, "" = not fixed.
    """

    placement: str
    mode: Mode
    form: str

    @classmethod
    def parse(cls, text: str) -> "RunName":
        """`PLACEMENT:MODE` or `PLACEMENT:MODE/FORM`.

        Raises:
            InputError: it is neither.
        """
        placement, colon, rest = text.strip().rpartition(":")
        mode, _, form = rest.partition("/")
        if not colon or not placement or mode not in MODES:
            raise InputError(f"run {text!r} must be PLACEMENT:MODE with a mode of {', '.join(MODES)}")
        if form and (form not in FORMS or mode != "dispatch-combine"):
            raise InputError(f"run {text!r}: only dispatch-combine has forms, {' and '.join(FORMS)}")
        return cls(placement, mode, form)


@dataclass(frozen=True)
class ReplayOptions:
    """What to run; see `moeplace bench replay --help`."""

    trace: str
    runs: str
    shape: ReplayShape
    split: Split = "test"
    top_k: int | None = None
    calibration: str | None = None
    steps: int = 24
    block: int = 3
    kv_pieces: int | None = None
    seed: int = 0
    timeout: float = 120.0
    replica_rule: str = "moeplace"

    def __post_init__(self) -> None:
        for name in ("steps", "block", "kv_pieces"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} ({value}) must be at least 1")
        if self.timeout <= 0:
            raise InputError(f"timeout ({self.timeout} s) must be positive")


def one_thread() -> None:
    """One thread per rank: ranks share the processors of their host."""
    torch.set_num_threads(1)


def nodes_of_launcher(num_ranks: int) -> np.ndarray:
    """(R,) node of each rank as torchrun started them: LOCAL_WORLD_SIZE ranks a node.

    Raises:
        InputError: the ranks do not divide into such nodes.
    """
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if num_ranks % per_node:
        raise InputError(f"ranks ({num_ranks}) must be a multiple of LOCAL_WORLD_SIZE ({per_node})")
    return np.arange(num_ranks) // per_node


def calibrate_here(
    shape: ReplayShape, *, num_experts: int, top_k: int, seed: int, timeout: float
) -> Calibration | None:
    """Calibrate the ranks that the launcher started; the result on rank 0, None on others."""
    everyone = RankGroup.from_environment(timeout=timeout)
    group = everyone.with_nodes(nodes_of_launcher(everyone.size))
    calibration = calibrate(group, shape, num_experts=num_experts, top_k=top_k, seed=seed)
    _leave(group, everyone)
    return calibration if group.rank == 0 else None


def replay_bench(options: ReplayOptions) -> dict[str, Any] | None:
    """Run the benchmark; the report on rank 0, None on others.

    Raises:
        InputError: the options do not fit the trace, the placements or the number of ranks.
        DisagreementError: ranks were given different things.
        PeerLostError: a rank is gone.
    """
    one_thread()
    everyone = group = RankGroup.from_environment(timeout=options.timeout)
    try:
        names = [RunName.parse(text) for text in options.runs.split(",")]
        trace = _load(options)
        placements = [_placement(name, trace, group.size) for name in names]
        group = group.with_nodes(placements[0].node_of_rank)
        calibration = Calibration.load(options.calibration) if options.calibration else None
        steps = RecordedSteps.from_trace(trace, options.shape.batch)
    except MoeplaceError as error:
        group.give_up(str(error))
        raise
    group.agree(_digests(options, placements, steps))
    if calibration is None:
        calibration = calibrate(
            group, options.shape, num_experts=steps.num_experts, top_k=steps.top_k, seed=options.seed
        )
    bench = _Bench(options, names, placements, steps, group, calibration)
    report = {"runs": bench.measure(), "conditions": bench.conditions()}
    _leave(group, everyone)
    return report if group.rank == 0 else None


def _leave(*groups: RankGroup) -> None:
    """End all groups, once all ranks have done their last exchange."""
    groups[0].agree({"benchmark": "done"})
    for group in groups:
        group.close()


def _load(options: ReplayOptions) -> RoutingTrace:
    trace = load_trace(options.trace)
    if options.top_k is not None:
        trace = trace.truncate(options.top_k)
    return trace.split(options.split)


def _placement(name: RunName, trace: RoutingTrace, num_ranks: int) -> Placement:
    """The placement of a run.

    Raises:
        InputError: it is for another model or another number of ranks or nodes.
    """
    node = nodes_of_launcher(num_ranks)
    if name.placement == INDEX_ORDER:
        slots = even_slots(trace.num_experts, num_ranks)
        return index_order(trace.experts_per_layer, slots, node, layer_ids=trace.layer_ids)
    placement = load_placement(name.placement)
    if placement.num_ranks != num_ranks:
        raise InputError(f"{name.placement} is for {placement.num_ranks} ranks, but {num_ranks} are running")
    if not np.array_equal(placement.node_of_rank, node):
        raise InputError(
            f"{name.placement} is for nodes of {np.bincount(placement.node_of_rank).tolist()} ranks, but the launcher "
            f"started {np.bincount(node).tolist()}"
        )
    require_same_model(trace, placement)
    return placement


def _digests(options: ReplayOptions, placements: list[Placement], steps: RecordedSteps) -> dict[str, str]:
    return {
        "placements": " ".join(placement.digest for placement in placements),
        "steps": f"{steps.ids_SLBK.shape}, sum {int(steps.ids_SLBK.sum())}",
        "sizes": str(options.shape),
        "runs": f"{options.runs} x {options.steps} in blocks of {options.block}, {options.kv_pieces} pieces",
    }


class _Bench:
    """The runs of a benchmark on one rank."""

    def __init__(
        self,
        options: ReplayOptions,
        names: list[RunName],
        placements: list[Placement],
        steps: RecordedSteps,
        group: RankGroup,
        calibration: Calibration,
    ) -> None:
        self.options, self.names, self.steps, self.group = options, names, steps, group
        self.calibration = calibration
        self._timed = [
            range(first, min(first + options.block, options.steps + 1))
            for first in range(1, options.steps + 1, options.block)
        ]
        self._tensors = ReplayTensors.random(options.shape, steps.num_experts, seed=options.seed, device=group.device)
        self.runs = [self._make(name, placement) for name, placement in zip(names, placements, strict=True)]

    def _make(self, name: RunName, placement: Placement) -> Replay:
        return Replay(
            self.steps,
            placement,
            name.mode,
            shape=self.options.shape,
            tensors=self._tensors,
            group=self.group,
            node_aware=self._is_node_aware(name),
            kv_pieces=self._kv_pieces,
            replica_rule=self.options.replica_rule,
        )

    @property
    def _kv_pieces(self) -> int:
        return self.options.kv_pieces or default_pieces(self.steps.num_layers, self.group.num_nodes)

    def _is_node_aware(self, name: RunName) -> bool:
        """Where the form is not fixed: index order sends one copy per rank, which is what dispatch-combine means; a
        solved placement one per node, if tokens have several experts."""
        return name.form == "node-aware" if name.form else name.placement != INDEX_ORDER and self.steps.top_k > 1

    def measure(self) -> list[dict[str, Any]]:
        """Figures of all runs, the same on every rank."""
        difference = self._compare_outputs()
        seconds: list[list[float]] = [[] for _ in self.runs]
        counted: list[dict[str, float]] = [{} for _ in self.runs]
        for turn, block in enumerate(self._timed):
            order = range(len(self.runs)) if turn % 2 == 0 else range(len(self.runs) - 1, -1, -1)
            for index in order:
                self.group.counters.reset()
                seconds[index] += self.runs[index].time_steps(block.start, len(block))
                _add(counted[index], self._count(len(block) + 1))
        figures = [self._figures(i, seconds[i], counted[i]) for i in range(len(self.runs))]
        for figure, differs in zip(figures, difference, strict=True):
            figure["speedup"] = figures[0]["seconds_per_step"] / figure["seconds_per_step"]
            figure["output_difference"] = differs
        return figures

    def _compare_outputs(self) -> list[float]:
        """Greatest difference of each run's outputs from the first run's, relative to the greatest of these."""
        outputs = [run.outputs(0) for run in self.runs]
        scale = float(outputs[0].abs().max())
        return [float((each - outputs[0]).abs().max()) / scale for each in outputs]

    def _count(self, steps: int) -> dict[str, float]:
        """This rank's counters of the last block."""
        counters = self.group.counters
        counts = {tier: float(counters.bytes_sent[tier]) for tier in TIERS}
        counts |= {"collectives": counters.collectives_of_mode.total()}
        counts |= {"overflows": counters.overflows, "tokens": counters.tokens.total(), "steps": steps}
        return counts

    def _figures(self, index: int, seconds: list[float], counted: dict[str, float]) -> dict[str, Any]:
        run, name = self.runs[index], self.names[index]
        steps = counted["steps"]
        names = ("inter_node", "intra_node", "tokens", "collectives", "overflows")
        totals_R = self._gather([statistics.median(seconds), *(counted[key] / steps for key in names)])
        measured = float(totals_R[:, 0].max())
        predicted = self._predict(run)
        busiest = int(totals_R[:, 1].argmax() if totals_R[:, 1].any() else totals_R[:, 3].argmax())
        quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [measured] * 3
        return {
            "placement": name.placement,
            "mode": name.mode,
            "form": ("node-aware" if run.node_aware else "plain") if name.mode == "dispatch-combine" else "",
            "seconds_per_step": measured,
            "tokens_per_second": self.options.shape.batch / measured,
            "collectives_per_layer": float(totals_R[:, 4].max()) / self.steps.num_layers,
            "bytes_inter_node": float(totals_R[:, 1].sum()),
            "bytes_intra_node": float(totals_R[:, 2].sum()),
            "predicted_seconds": predicted,
            "prediction_error": predicted / measured - 1,
            "quartiles": [quarters[0], quarters[2]],
            "overflows_per_step": float(totals_R[:, 5].max()),
            "busiest_rank": {
                "rank": busiest,
                "bytes_inter_node": float(totals_R[busiest, 1]),
                "bytes_intra_node": float(totals_R[busiest, 2]),
                "tokens_per_layer": float(totals_R[busiest, 3]) / self.steps.num_layers,
            },
        }

    def _predict(self, run: Replay) -> float:
        """Predicted seconds of the timed steps, their median as that of the measured ones."""
        timed = np.concatenate([np.arange(block.start, block.stop) for block in self._timed]) % self.steps.num_steps
        traffic = count_traffic(
            self.steps.ids_SLBK[timed],
            run.placement,
            run.mode,
            self.options.shape.wire_sizes(self.steps.top_k),
            node_aware=run.node_aware,
            kv_pieces=run.kv_pieces,
            replica_rule=run.replica_rule,
        )
        cluster = Cluster(run.placement.node_of_rank, run.placement.slots_of_rank, np.ones(run.placement.num_ranks))
        return float(np.median(predict_seconds(traffic, cluster, self.calibration)))

    def _gather(self, values: list[float]) -> np.ndarray:
        """(R, n) the values of every rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.group.device)
        if self.group.size == 1:
            return mine[None].cpu().numpy()
        everyone = mine.new_empty(self.group.size, len(values))
        self.group.all_gather(everyone, mine, kind="figures")
        return everyone.cpu().numpy()

    def conditions(self) -> dict[str, Any]:
        """What the figures depend on."""
        shape, options = self.options.shape, self.options
        return {
            "benchmark": "replay",
            "trace": options.trace,
            "split": options.split,
            "layers": self.steps.num_layers,
            "experts": self.steps.num_experts,
            "top_k": self.steps.top_k,
            "replica_rule": options.replica_rule,
            "ranks": self.group.size,
            "nodes": self.group.num_nodes,
            "batch": shape.batch,
            "hidden": shape.hidden,
            "expert_hidden": shape.expert_hidden,
            "kv_dim": shape.kv_dim,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "timed_steps": options.steps,
            "block": options.block,
            "kv_pieces": self._kv_pieces,
            "seed": options.seed,
            "device": self.group.device.type,
            "torch": torch.__version__,
            "load_average": list(os.getloadavg()),
            "calibration": self.calibration.to_json(),
        }


def _add(total: dict[str, float], values: dict[str, float]) -> None:
    for key, value in values.items():
        total[key] = total.get(key, 0.0) + value
