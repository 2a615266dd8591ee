"""Verdict: what placement, replicas and execution modes would gain on a cluster, and whether to leave things alone.

Every mode is solved twice on the train side, each expert once and with redundant slots, and the mode is chosen there.
Gains are held-out, against experts in index order in the mode that suits them best: that costs nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.replica_rule import MOEPLACE, ReplicaRule
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement, index_order, with_slots
from moeplace.placement.problem import Problem
from moeplace.placement.result import Status
from moeplace.placement.solve import solve
from moeplace.placement.studies.held_out import Gain, HeldOut
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace

WORTH_HAVING = 0.02
"""Gain below which nothing is worth its trouble."""
_SEARCH_WEIGHTS = {"dispatch-combine": 2, "coherent": 2, "allgather": 1}  # balance alone is found quickly


@dataclass(frozen=True, eq=False)
class Option:
    """One way to serve.

    Attributes:
        mode: execution mode.
        slots_per_rank: most slots of a rank, per layer.
        has_replicas: whether the ranks have more slots than experts.
        index_order_seconds: predicted per step with experts in index order, each expert once.
        fitted_seconds: predicted per step of the solved placement on the train side.
        seconds: of it on the held-out side.
        gain: over index order in this mode.
        over_baseline: over index order in its best mode.
        over_plain: over the solved placement of this mode without replicas; None where this is that one.
        ranks_per_token, imbalance: of the solved placement, held-out.
        move_seconds: predicted for the migration from index order; None = bytes per expert are not known.
        payback_steps: steps after which the move is paid; None = never, or not known.
        extra_bytes: memory of a rank beyond each expert once; None = bytes per expert are not known.
        status: of the search; "time_limit" = the clock cut it short, more time may find more.
        placement: the solved one.
    """

    mode: Mode
    slots_per_rank: int
    has_replicas: bool
    index_order_seconds: float
    fitted_seconds: float
    seconds: float
    gain: Gain
    over_baseline: Gain
    over_plain: Gain | None
    ranks_per_token: float
    imbalance: float
    move_seconds: float | None
    payback_steps: float | None
    extra_bytes: int | None
    status: Status
    placement: Placement


@dataclass(frozen=True, eq=False)
class Verdict:
    """What to do.

    Attributes:
        options: all that were tried.
        baseline: best mode with experts in index order.
        chosen: what was chosen on the train side.
        is_worth_it: whether its gain is beyond noise and `WORTH_HAVING`.
        sentence: the verdict for people.
    """

    options: tuple[Option, ...]
    baseline: Mode
    chosen: Option
    is_worth_it: bool
    sentence: str


@dataclass(frozen=True, eq=False)
class Terms:
    """What a verdict and its companions share.

    Attributes:
        cluster: ranks, slots and links; slots beyond one per expert are used for replicas.
        shape, calibration: of the cost model.
        seed: of solvers and samples.
        rule: who serves an expert with several slots.
    """

    cluster: Cluster
    shape: StepShape
    calibration: Calibration
    seed: int
    rule: ReplicaRule = MOEPLACE

    def problem(self, train: RoutingTrace, mode: Mode, cluster: Cluster | None = None) -> Problem:
        """The problem of fitting to `train`."""
        return Problem.from_trace(
            train,
            cluster or self.cluster,
            mode=mode,
            shape=self.shape,
            calibration=self.calibration,
            replica_rule=self.rule,
        )

    def index_order(self, problem: Problem) -> Placement:
        """The baseline of a problem."""
        return index_order(
            problem.experts_per_layer,
            problem.cluster.slots_of_rank,
            problem.cluster.node_of_rank,
            layer_ids=problem.layer_ids,
            num_hidden_layers=problem.num_hidden_layers,
            mode=problem.mode,
        )

    def plain_cluster(self, num_experts: int) -> Cluster | None:
        """The cluster with each expert once; None where some rank would have no slot."""
        slots = even_slots(num_experts, self.cluster.num_ranks)
        return self.cluster.replace(slots_of_rank=slots) if slots.all() else None

    def wide_cluster(self, num_experts: int) -> Cluster:
        """The cluster itself if it has redundant slots, else with one more slot per rank."""
        if self.cluster.num_slots > num_experts:
            return self.cluster
        return self.cluster.replace(slots_of_rank=self.cluster.slots_of_rank + 1)


def judge(
    train: RoutingTrace,
    held_out: HeldOut,
    terms: Terms,
    *,
    time_limit: float,
    report: Callable[[float], None] = lambda share: None,
) -> Verdict:
    """Solve, replay, compare.

    Args:
        train: tokens to fit to.
        held_out: tokens that judge.
        terms: cluster and cost model.
        time_limit: seconds of all searches together; replays come on top.
        report: called with the share of the work done (0..1).

    Raises:
        InputError: the slots do not hold the experts.
    """
    if terms.cluster.num_slots < train.num_experts:
        raise InputError(f"{terms.cluster.num_slots} slots per layer do not hold {train.num_experts} experts")
    plain = terms.plain_cluster(train.num_experts)
    clusters = [cluster for cluster in (plain, terms.wide_cluster(train.num_experts)) if cluster is not None]
    ground = _Ground.of(train, held_out, terms, clusters[0])
    work = [(mode, cluster) for mode in MODES for cluster in clusters]
    weights = [_SEARCH_WEIGHTS[mode] * (1 + (cluster is not plain)) for mode, cluster in work]
    options: list[Option] = []
    without: _Judged | None = None
    for (mode, cluster), weight in zip(work, weights, strict=True):
        problem = terms.problem(train, mode, cluster)
        result = solve(problem, time_limit=time_limit * weight / sum(weights), seed=terms.seed)
        if cluster is clusters[0]:
            without = None
        without = ground.judge(problem, result.placement, without)
        options.append(ground.option(problem, result.status, without))
        report(len(options) / len(work))
    chosen = _choose(options)
    worth = chosen.over_baseline.is_beyond_noise and chosen.over_baseline.share >= WORTH_HAVING
    sentences = [*_sentences(options, chosen, ground.baseline, worth), held_out.note]
    return Verdict(tuple(options), ground.baseline, chosen, worth, " ".join(filter(None, sentences)))


@dataclass(frozen=True, eq=False)
class _Judged:
    """A placement, its (1 + samples,) held-out seconds, and those of the one without replicas (None = it is that)."""

    placement: Placement
    seconds: np.ndarray
    plain_seconds: np.ndarray | None


@dataclass(frozen=True, eq=False)
class _Ground:
    """What options are measured against.

    Attributes:
        train, held_out, terms: as `judge`.
        plain: the cluster with each expert once.
        before: (1 + samples,) seconds of index order on it, by mode.
    """

    train: RoutingTrace
    held_out: HeldOut
    terms: Terms
    plain: Cluster
    before: dict[Mode, np.ndarray]

    @classmethod
    def of(cls, train: RoutingTrace, held_out: HeldOut, terms: Terms, plain: Cluster) -> "_Ground":
        """Replay index order in every mode."""
        problems = {mode: terms.problem(train, mode, plain) for mode in MODES}
        before = {mode: held_out.seconds(each, terms.index_order(each)) for mode, each in problems.items()}
        return cls(train, held_out, terms, plain, before)

    @property
    def baseline(self) -> Mode:
        """The mode that suits index order best."""
        return min(MODES, key=lambda mode: float(self.before[mode][0]))

    def judge(self, problem: Problem, placement: Placement, without: _Judged | None) -> _Judged:
        """Replay a placement, or the one of this mode without replicas if that is better on the fitted tokens."""
        if without is not None:
            placement = _better(problem, placement, without.placement)
        seconds = self.held_out.seconds(problem, placement)
        return _Judged(placement, seconds, None if without is None else without.seconds)

    def option(self, problem: Problem, status: Status, judged: _Judged) -> Option:
        """The figures of a placement."""
        before, placement, after = self.before[problem.mode], judged.placement, judged.seconds
        figures = self.held_out.evaluate(problem, placement)
        saved = float(self.before[self.baseline][0] - after[0])
        move = _move_seconds(self.terms, self.train, problem, placement, self.plain)
        return Option(
            mode=problem.mode,
            slots_per_rank=int(problem.cluster.slots_of_rank.max()),
            has_replicas=problem.cluster.num_slots > self.train.num_experts,
            index_order_seconds=float(before[0]),
            fitted_seconds=problem.evaluate(placement).predicted_seconds,
            seconds=float(after[0]),
            gain=self.held_out.gain(before, after),
            over_baseline=self.held_out.gain(self.before[self.baseline], after),
            over_plain=None if judged.plain_seconds is None else self.held_out.gain(judged.plain_seconds, after),
            ranks_per_token=figures.ranks_per_token,
            imbalance=figures.imbalance_mean,
            move_seconds=move,
            payback_steps=move / saved if move is not None and saved > 0 else None,
            extra_bytes=_extra_bytes(self.train, self.plain, problem.cluster),
            status=status,
            placement=placement,
        )


def _better(problem: Problem, placement: Placement, plain: Placement) -> Placement:
    """Of a placement with redundant slots and one without, that with the shorter step on the fitted tokens.

    A search for replicas that is cut short may not even find what each expert once achieves.
    """
    if (plain.slots_of_rank > problem.cluster.slots_of_rank).any():
        return placement
    widened = with_slots(plain, problem.cluster.slots_of_rank)
    return min((placement, widened), key=lambda choice: problem.evaluate(choice).predicted_seconds)


def _choose(options: list[Option]) -> Option:
    """The shortest step on the train side; replicas only where they are worth their memory on the held-out side."""
    plain = [option for option in options if option.over_plain is None]
    best = min(plain, key=lambda option: option.fitted_seconds)
    for option in options:
        extra = option.over_plain
        if option.mode == best.mode and extra is not None and extra.is_beyond_noise and extra.share >= WORTH_HAVING:
            return option
    return best


def _sentences(options: list[Option], chosen: Option, baseline: Mode, worth: bool) -> Iterator[str]:
    best = chosen.over_baseline
    figures = f"{best.share:.1%} (95 % interval {best.span})"
    if not worth:
        why = f"less than {WORTH_HAVING:.0%}" if best.is_beyond_noise else "within noise"
        yield (
            f"Leave the experts as they are and run {baseline}: the placement found for {chosen.mode} would change a "
            f"step by {figures}, which is {why}."
        )
        return
    yield f"Run {chosen.mode} with a solved placement: a step is predicted to be {figures} shorter than in {baseline} "\
          "with experts in index order, the best mode without a placement."  # fmt: skip
    wide = next((o for o in options if o.mode == chosen.mode and o.over_plain is not None), None)
    if wide is not None and wide.over_plain is not None:
        memory = "" if wide.extra_bytes is None else f", {wide.extra_bytes / 2**20:,.4g} MiB more on a rank,"
        use = "are used" if chosen.has_replicas else "are not worth it"
        extra = wide.over_plain
        yield (
            f"Replicas in {wide.slots_per_rank} slots per rank{memory} change it by {extra.share:.1%} "
            f"({extra.span}) and {use}."
        )
    if chosen.move_seconds is not None and chosen.payback_steps is not None:
        yield (
            f"Moving there from index order takes about {chosen.move_seconds:.3g} s, paid back after "
            f"{np.ceil(chosen.payback_steps):,.0f} steps; do not move for less."
        )


def _move_seconds(
    terms: Terms, train: RoutingTrace, problem: Problem, placement: Placement, plain: Cluster
) -> float | None:
    if train.expert_bytes is None:
        return None
    start = terms.index_order(replace(problem, cluster=plain))
    return plan_migration(start, placement, cluster=terms.cluster, expert_bytes=train.expert_bytes).seconds


def _extra_bytes(train: RoutingTrace, plain: Cluster, cluster: Cluster) -> int | None:
    """Of the rank that gets most slots beyond `plain`, at the mean size of an expert."""
    if train.expert_bytes is None:
        return None
    extra = int((cluster.slots_of_rank - plain.slots_of_rank).max())
    real_LE = np.arange(train.num_experts) < train.experts_per_layer[:, None]
    return int(extra * sum(size[real].mean() for size, real in zip(train.expert_bytes, real_LE, strict=True)))
