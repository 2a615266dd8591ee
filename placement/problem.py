"""Problem: what a solver is asked. Validated once, canonical afterwards.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, R ranks, S slots per layer.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np

from moeplace.placement.cluster import INTER_NODE, INTRA_NODE, Cluster
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import Evaluation, evaluate
from moeplace.placement.cost.prices import LinkPrices
from moeplace.placement.cost.replica_rule import MOEPLACE, ReplicaRule
from moeplace.placement.cost.steps import StepShape, default_shape
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InfeasibleError, InputError
from moeplace.profiling.traces.kernels import count_load, count_transitions
from moeplace.profiling.traces.trace import RoutingTrace

Objective = Literal["seconds", "traffic"]
ReplicaBudget = Literal["per-layer", "global"]
CAP_ROUNDING = 1e-6
"""Imbalance by which a cap may be exceeded: what sums of floating-point numbers differ by."""
_MOST_GROWTH = 2
"""A layer may have so many times its own redundant slots on top of them when the budget is global."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A trace (or loads), a cluster, an execution mode and constraints.

    Attributes:
        cluster: where experts may sit.
        experts_per_layer: (L,) int64.
        load_LE: (L, E) float64 assignments per expert, 0 beyond a layer's experts.
        trace: the tokens to fit to (the train side); None when only loads are known, then balance is all that can be
            optimised.
        mode: execution mode.
        objective: "seconds" (predicted, by the cost model) or "traffic" (the mode's traffic; balance when there is no
            trace or the mode's traffic does not depend on the placement).
        max_imbalance: hard cap on every layer's imbalance, or None. A layer that cannot meet it is held to the least
            imbalance that packing reaches for it.
        previous: placement now in force, to stay near; same model, any cluster shape.
        max_moves: most experts that may be fetched per layer relative to `previous`, or None.
        move_price: objective units per fetched byte.
        survive: ranks that may be lost at once without losing an expert: every expert is on survive + 1 ranks, on as
            many nodes where there are so many.
        replica_budget: "per-layer" gives each layer the cluster's slots; "global" shares the redundant slots of the
            whole model out to layers, so that each rank holds as many experts over all layers as before. The
            placement then has the slots of `layout`, empty (-1) in layers that use fewer.
        leave_empty: redundant slots may stay empty; by default each gets a replica, because engines need one in each.
        expert_bytes: (L, E) bytes of each expert (1 where unknown).
        layer_ids, num_hidden_layers: passed through to the placement.
        shape: sizes of a step in the cost model.
        calibration: its times; by default nominal ones with the cluster's own links.
        replica_rule: who serves an expert with several slots where the placement will run. Searches may have another
            rule in mind; placements are judged, and chosen among, by this one.

    Raises:
        InputError: a value breaks a rule.
        InfeasibleError: the constraints cannot hold together; says which, and by how much.
    """

    cluster: Cluster
    experts_per_layer: np.ndarray
    load_LE: np.ndarray
    trace: RoutingTrace | None = None
    mode: Mode = "dispatch-combine"
    objective: Objective = "seconds"
    max_imbalance: float | None = None
    previous: Placement | None = None
    max_moves: int | None = None
    move_price: float = 0.0
    survive: int = 0
    replica_budget: ReplicaBudget = "per-layer"
    leave_empty: bool = False
    expert_bytes: np.ndarray = None  # type: ignore[assignment]  # given or not, an array after __post_init__
    layer_ids: np.ndarray | None = None
    num_hidden_layers: int = 0
    shape: StepShape = field(default_factory=StepShape)
    calibration: Calibration = None  # type: ignore[assignment]  # given or not, one after __post_init__
    replica_rule: ReplicaRule = MOEPLACE

    @classmethod
    def from_trace(cls, trace: RoutingTrace, cluster: Cluster, **options: Any) -> Self:
        """The problem of fitting a placement to `trace` (pass the train side)."""
        if not trace.num_tokens:
            raise InputError("the trace has no tokens to fit a placement to")
        load_LE = np.zeros((trace.num_layers, trace.num_experts), np.int64)
        count_load(trace.topk_ids, trace.experts_per_layer, load_LE)
        options.setdefault("shape", default_shape(trace))
        if trace.expert_bytes is not None:
            options.setdefault("expert_bytes", trace.expert_bytes)
        return cls(
            cluster=cluster,
            experts_per_layer=trace.experts_per_layer,
            load_LE=load_LE,
            trace=trace,
            layer_ids=trace.layer_ids,
            num_hidden_layers=trace.num_hidden_layers,
            **options,
        )

    @classmethod
    def from_load(
        cls, load_LE: np.ndarray, cluster: Cluster, *, experts_per_layer: np.ndarray | None = None, **options: Any
    ) -> Self:
        """The load-only problem: no tokens are known, so only balance can be optimised."""
        load_LE = np.atleast_2d(np.asarray(load_LE, dtype=np.float64))
        experts = np.full(load_LE.shape[0], load_LE.shape[1]) if experts_per_layer is None else experts_per_layer
        return cls(cluster=cluster, experts_per_layer=np.asarray(experts), load_LE=load_LE, **options)

    def __post_init__(self) -> None:
        experts = np.asarray(self.experts_per_layer, dtype=np.int64)
        load = np.asarray(self.load_LE, dtype=np.float64)
        if load.shape != (len(experts), int(experts.max(initial=0))):
            raise InputError(f"loads of shape {load.shape} must be (layers, experts) {(len(experts), experts.max())}")
        if not np.isfinite(load).all() or (load < 0).any():
            raise InputError("loads must be finite and not negative")
        for name, value, choices in (
            ("mode", self.mode, MODES),
            ("objective", self.objective, get_args(Objective)),
            ("replica budget", self.replica_budget, get_args(ReplicaBudget)),
        ):
            if value not in choices:
                raise InputError(f"{name} {value!r} must be one of {', '.join(choices)}")
        if self.max_imbalance is not None and not self.max_imbalance >= 1:
            raise InputError(f"max imbalance ({self.max_imbalance}) must be at least 1: it is maximum over mean")
        if self.max_moves is not None and self.max_moves < 0:
            raise InputError(f"max moves ({self.max_moves}) must not be negative")
        if self.max_moves is not None and self.previous is None:
            raise InputError(f"max moves ({self.max_moves}) needs the previous placement to count from")
        if not self.move_price >= 0:
            raise InputError(f"move price ({self.move_price}) must not be negative")
        if self.survive < 0:
            raise InputError(f"survive ({self.survive}) must not be negative")
        size = np.ones(load.shape, np.int64) if self.expert_bytes is None else np.asarray(self.expert_bytes)
        for name, array in (("experts_per_layer", experts), ("load_LE", load), ("expert_bytes", size)):
            object.__setattr__(self, name, array)
        if self.calibration is None:
            object.__setattr__(self, "calibration", Calibration(self.cluster.intra, self.cluster.inter))
        self._check_capacity()
        self._check_previous()

    def _check_capacity(self) -> None:
        slots, ranks = self.cluster.num_slots, self.cluster.num_ranks
        if (self.cluster.slots_of_rank < 1).any():
            raise InputError(f"every rank must have slots to be placed on, not {self.cluster.slots_of_rank.tolist()}")
        copies = self.survive + 1
        layer = int(self.experts_per_layer.argmax())
        need = int(self.experts_per_layer[layer]) * copies
        if copies > ranks:
            raise InfeasibleError(f"surviving {self.survive} lost ranks needs {copies} ranks, there are {ranks}")
        if need > slots:
            raise InfeasibleError(
                f"MoE layer {layer} needs {need} slots for {self.experts_per_layer[layer]} experts"
                + (f" on {copies} ranks each" if copies > 1 else "")
                + f", but {ranks} ranks have {slots} slots: {need - slots} are missing "
                f"(--slots-per-rank {-(-need // ranks)} is enough)"
            )
        usable = int(np.minimum(self.cluster.slots_of_rank, self.experts_per_layer[layer]).sum())
        if need > usable:
            raise InfeasibleError(
                f"MoE layer {layer} needs {need} slots, but no rank can hold an expert twice, "
                f"so only {usable} of {slots} can be used: {need - usable} are missing"
            )

    def _check_previous(self) -> None:
        previous = self.previous
        if previous is None:
            return
        if not np.array_equal(previous.experts_per_layer, self.experts_per_layer):
            raise InputError("the previous placement is for another model: its experts per layer differ")

    @property
    def num_layers(self) -> int:
        return len(self.experts_per_layer)

    @property
    def num_experts(self) -> int:
        """E: the most experts any layer has."""
        return int(self.experts_per_layer.max())

    @property
    def num_ranks(self) -> int:
        return self.cluster.num_ranks

    @property
    def top_k(self) -> int:
        """K; 1 when only loads are known."""
        return 1 if self.trace is None else self.trace.top_k

    @cached_property
    def redundant_slots(self) -> np.ndarray:
        """(L,) slots of each layer beyond one per expert."""
        return self.cluster.num_slots - self.experts_per_layer

    @cached_property
    def spare_per_rank(self) -> int:
        """Slots per rank that every layer can do without, each expert and its surviving copies served."""
        needed = int(self.experts_per_layer.max()) * (self.survive + 1)
        spare = (self.cluster.num_slots - needed) // self.num_ranks
        return max(min(spare, int(self.cluster.slots_of_rank.min()) - 1 - self.survive), 0)

    @cached_property
    def layout(self) -> Cluster:
        """The cluster with the slots of the largest layer that the replica budget allows."""
        if self.replica_budget == "per-layer":
            return self.cluster
        slots_R = self.cluster.slots_of_rank
        growth = min(_MOST_GROWTH * self.spare_per_rank, max(self.num_experts - int(slots_R.max()), 0))
        return self.cluster.replace(slots_of_rank=slots_R + growth)

    @cached_property
    def transitions_LEE(self) -> np.ndarray:
        """(L-1, E, E) int64 tokens whose primary expert is i in layer l and j in layer l+1; needs a trace."""
        experts = self.num_experts
        counts = np.zeros((max(self.num_layers - 1, 0), experts, experts), np.int64)
        if self.trace is not None:
            count_transitions(self.trace.topk_ids, self.experts_per_layer, counts)
        return counts

    @property
    def links_assumed(self) -> bool:
        """Whether neither cluster nor calibration says how fast links are."""
        nominal = (self.calibration.intra, self.calibration.inter) == (INTRA_NODE, INTER_NODE)
        return nominal and self.cluster.distance_RR is None

    @cached_property
    def prices(self) -> LinkPrices:
        """What ranks, nodes and copies cost in the traffic objective."""
        return LinkPrices.of(self.cluster)

    @cached_property
    def node_weight(self) -> float:
        """What one more node costs beside one more rank, mean over nodes."""
        return float(self.prices.node_N.mean())

    def placement(self, slot_to_expert: np.ndarray) -> Placement:
        """A validated placement of this problem's shape, or of its layout's."""
        wide = np.shape(slot_to_expert)[-1] == self.layout.num_slots
        return Placement(
            slot_to_expert,
            (self.layout if wide else self.cluster).slots_of_rank,
            self.cluster.node_of_rank,
            self.experts_per_layer,
            self.layer_ids,
            self.num_hidden_layers,
            self.mode,
        )

    def evaluate(self, placement: Placement, trace: RoutingTrace | None = None) -> Evaluation:
        """`evaluate` under this problem's cluster, mode and cost model, on `trace` or the problem's own.

        Raises:
            InputError: the problem has loads only.
        """
        trace = trace or self.trace
        if trace is None:
            raise InputError("a problem of loads alone has no tokens to replay")
        return evaluate(
            trace,
            placement,
            mode=self.mode,
            cluster=self.cluster,
            shape=self.shape,
            calibration=self.calibration,
            rule=self.replica_rule,
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)
