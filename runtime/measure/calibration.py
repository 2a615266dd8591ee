"""Calibration of the running ranks: latency and bandwidth per tier, expert time, and what a layer costs beside them.

All ranks call `calibrate` together; the result is the same on every rank. Links are measured by all-to-alls of several
sizes, first inside nodes, then between one rank of each node, then between all ranks of different nodes, which shows
what a node's ranks share. The expert computation runs on all ranks at once, so that processors they share are shared.
What a layer costs beside experts and exchanges is what a replay of random routing takes beyond the prediction; what the
K/V exchange of the coherent mode costs is what such a step takes longer with it. Times are medians.

Shape letters: R ranks, N nodes.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import nnls

from moeplace.placement.cluster import INTER_NODE, INTRA_NODE, Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import Placement, index_order
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.kv.stream import default_pieces
from moeplace.runtime.measure.replay import RecordedSteps, Replay, ReplayShape, ReplayTensors
from moeplace.runtime.measure.traffic import (
    ReplayTraffic,
    count_traffic,
    kv_link_seconds,
    latency_seconds,
    predict_seconds,
    run_label,
)

LINK_BYTES = (1 << 14, 1 << 15, 1 << 16, 1 << 17)
"""Bytes per message, by which bandwidth is measured: those of 4 to 32 hidden vectors of a large model. Longer ones that
cross each other on a slow link hinder each other, and would measure that."""
LEAST_SHARE = 0.05
"""Share of the largest message's time that is taken for its transfer, at least."""
REPEATS = 9
STEPS = 2
LAYERS = 6
ROUNDS = 4
"""Steps, layers and rounds of the replays that measure what a layer costs beside experts and exchanges. The modes take
turns in every round, so that other load on the machine meets all of them alike."""
STAY_RATE = 0.6
"""Share of tokens that stay on their rank while the coherent mode is measured; others stay by chance."""


def calibrate(group: RankGroup, shape: ReplayShape, *, num_experts: int, top_k: int, seed: int = 0) -> Calibration:
    """Measure these ranks with messages and experts of the given sizes.

    Args:
        group: the ranks, with their nodes.
        shape: sizes of a step.
        num_experts: experts per layer.
        top_k: experts per token.
        seed: of routing and weights.

    Raises:
        PeerLostError: a rank is gone.
    """
    intra, inter = _measure_links(group)
    tensors = ReplayTensors.random(shape, num_experts, seed=seed, device=group.device)
    expert = _measure_experts(group, shape, tensors, num_experts)
    conditions = {
        "ranks": group.size,
        "nodes": group.num_nodes,
        "batch": shape.batch,
        "hidden": shape.hidden,
        "expert_hidden": shape.expert_hidden,
        "expert_bytes": shape.expert_bytes,
        "kv_dim": shape.kv_dim,
        "experts": num_experts,
        "top_k": top_k,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": group.device.type,
        "torch": torch.__version__,
        "not measured": _missing_links(group),
    }
    links = Calibration(intra, inter, expert, conditions=conditions)
    return _measure_modes(group, shape, tensors, links, num_experts, top_k, seed)


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(seconds at nothing, seconds per unit) of the line that fits best relative to each time, neither negative."""
    weight = 1 / np.asarray(seconds)
    rows = np.stack([np.ones(len(amounts)), np.asarray(amounts, float)], axis=1)
    scale = np.abs(rows).max(axis=0)
    solution, _ = nnls(rows / scale * weight[:, None], np.ones(len(amounts)))
    fixed, slope = solution / scale
    return float(fixed), float(slope)


def fit_expert_time(tokens: Sequence[int], activated: Sequence[int], seconds: Sequence[float]) -> ExpertTime:
    """The affine function that fits best relative to each time, no term negative."""
    weight = 1 / np.asarray(seconds)
    rows = np.stack([np.ones(len(tokens)), np.asarray(tokens, float), np.asarray(activated, float)], axis=1)
    scale = rows.max(axis=0)
    solution, _ = nnls(rows / scale * weight[:, None], np.ones(len(tokens)))
    return ExpertTime(*(float(value) for value in solution / scale))


def _measure_links(group: RankGroup) -> tuple[Link, Link]:
    """Links inside nodes and between them; what does not exist keeps its default."""
    if group.size == 1:
        return INTRA_NODE, INTER_NODE
    node = group.node_of_rank
    same = (node[:, None] == node[None, :]) & ~np.eye(group.size, dtype=bool)
    intra = INTRA_NODE
    if same.any():
        mates = group.node_group()
        latency = _exchange_seconds(mates, np.ones((mates.size, mates.size), bool), 64)
        intra = Link(latency, _bandwidth(group, same))
    if group.num_nodes == 1:
        return intra, INTER_NODE
    first = np.zeros(group.size, bool)
    first[np.unique(node, return_index=True)[1]] = True
    latency = _exchange_seconds(group, np.ones((group.size, group.size), bool), 64)
    one = _bandwidth(group, ~same & first[:, None] & first[None, :])
    shared = _bandwidth(group, node[:, None] != node[None, :], per_node=True)
    return intra, Link(latency, max(one, shared / int(np.bincount(node).max())), shared)


def _missing_links(group: RankGroup) -> list[str]:
    """Links that do not exist here, for which the calibration has the defaults."""
    between = [] if group.num_nodes > 1 else ["links between nodes"]
    return between if len(group.node_ranks) > 1 else [*between, "links inside nodes"]


def _bandwidth(group: RankGroup, links_RR: np.ndarray, *, per_node: bool = False) -> float:
    """Bytes per second that the busiest rank (or node) sends when every link carries the same."""
    sent_R = (links_RR & ~np.eye(group.size, dtype=bool)).sum(axis=1)
    peers = np.bincount(group.node_of_rank, sent_R).max() if per_node else sent_R.max()
    seconds = [_exchange_seconds(group, links_RR, size) for size in LINK_BYTES]
    slope = fit_line([size * int(peers) for size in LINK_BYTES], seconds)[1]
    # Where size makes no difference that noise does not hide, the largest message bounds the bandwidth from below.
    return 1 / max(slope, LEAST_SHARE * seconds[-1] / (LINK_BYTES[-1] * int(peers)))


def _exchange_seconds(group: RankGroup, links_RR: np.ndarray, size: int) -> float:
    """Median seconds of an all-to-all with `size` bytes on every link."""
    links_RR = links_RR & ~np.eye(group.size, dtype=bool)
    outgoing = [size if linked else 0 for linked in links_RR[group.rank]]
    incoming = [size if linked else 0 for linked in links_RR[:, group.rank]]
    data = torch.zeros(sum(outgoing), dtype=torch.uint8, device=group.device)
    room = torch.zeros(sum(incoming), dtype=torch.uint8, device=group.device)

    def exchange() -> None:
        group.all_to_all(room, data, incoming, outgoing, kind="calibration")

    return _median_over_ranks(group, exchange)


def _median_over_ranks(group: RankGroup, run: Callable[[], None], *, inner: int = 3) -> float:
    """Median seconds of `run`, called on all ranks at the same time: the slowest rank's."""
    run()
    seconds = []
    for _ in range(REPEATS):
        _meet(group)
        start = time.perf_counter()
        for _ in range(inner):
            run()
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        seconds.append((time.perf_counter() - start) / inner)
    return max(_everyones(group, statistics.median(seconds)))


def _meet(group: RankGroup) -> None:
    if group.size > 1:
        group.all_reduce(torch.zeros(1, device=group.device), kind="calibration")


def _everyones(group: RankGroup, value: float) -> list[float]:
    """A number of every rank, on every rank."""
    mine = torch.tensor([value], dtype=torch.float64, device=group.device)
    if group.size == 1:
        return mine.tolist()
    everyone = mine.new_empty(group.size)
    group.all_gather(everyone, mine, kind="calibration")
    return everyone.tolist()


def _measure_experts(group: RankGroup, shape: ReplayShape, tensors: ReplayTensors, num_experts: int) -> ExpertTime:
    """Time of one layer's experts, over tokens and activated experts."""
    slots = -(-num_experts // group.size)
    computation = ExpertComputation(ExpertStore([tensors.weights], slots=slots), counters=Counters())
    per_rank = max(shape.batch // group.size, 4)
    cases = [(tokens, count) for tokens in (per_rank // 4, per_rank, 4 * per_rank) for count in {1, slots // 2, slots}]
    cases = [(tokens, count) for tokens, count in cases if tokens >= count >= 1]
    seconds = []
    for tokens, count in cases:
        x = tensors.x_BD[:1].expand(tokens, -1).contiguous()
        chosen = (torch.arange(tokens, device=group.device) % count)[:, None]
        weights = torch.ones(tokens, 1, dtype=shape.dtype, device=group.device)

        def compute(x: torch.Tensor = x, slots: torch.Tensor = chosen, weights: torch.Tensor = weights) -> None:
            computation.compute(0, x, slots, weights)

        seconds.append(_median_over_ranks(group, compute))
    return fit_expert_time([tokens for tokens, _ in cases], [count for _, count in cases], seconds)


def _measure_modes(
    group: RankGroup,
    shape: ReplayShape,
    tensors: ReplayTensors,
    links: Calibration,
    num_experts: int,
    top_k: int,
    seed: int,
) -> Calibration:
    """`links`, completed by what a layer costs beside experts and exchanges in every mode, and by `kv_exposed`.

    Tokens of the coherent mode mostly stay where they are, as under a placement that is worth that mode; others are
    routed uniformly.
    """
    slots = np.full(group.size, -(-num_experts // group.size))
    placement = index_order(np.full(LAYERS, num_experts), slots, group.node_of_rank)
    cluster = links.apply(Cluster(placement.node_of_rank, slots, np.ones(group.size)))
    uniform = _random_steps(shape.batch, num_experts, top_k, seed)
    staying = _staying_steps(shape.batch, placement, top_k, seed)

    def make(mode: Mode, *, node_aware: bool = False, kv_pieces: int = 0) -> Replay:
        return Replay(
            staying if mode == "coherent" else uniform,
            placement,
            mode,
            shape=shape,
            tensors=tensors,
            group=group,
            node_aware=node_aware,
            kv_pieces=kv_pieces,
        )

    runs = {run_label(mode, node_aware=False): make(mode) for mode in MODES}
    if group.num_nodes > 1:
        runs[run_label("dispatch-combine", node_aware=True)] = make("dispatch-combine", node_aware=True)
    with_kv = make("coherent", kv_pieces=default_pieces(LAYERS, group.num_nodes)) if group.size > 1 else None
    seconds = _alternate(group, [*runs.values(), *([] if with_kv is None else [with_kv])])

    overheads = {}
    for (label, run), measured in zip(runs.items(), seconds, strict=False):
        traffic = _traffic(run, shape)
        predicted = float(np.median(predict_seconds(traffic, cluster, links)))
        # Beside work, latency can be hidden, and only latency: what remains is not below the rest.
        hidden = float(np.median(latency_seconds(traffic, cluster)))
        overheads[label] = max(measured - predicted, -hidden) / LAYERS
    exposed = None
    if with_kv is not None:
        beside = seconds[-1] - seconds[list(runs).index("coherent")]
        exposed = max(beside, 0.0) / float(np.median(kv_link_seconds(_traffic(with_kv, shape), cluster)))
    return replace(
        links,
        mode_seconds_per_layer=overheads,
        other_seconds_per_layer=max(min(overheads.values()), 0.0),
        kv_exposed=exposed,
    )


def _alternate(group: RankGroup, runs: Sequence[Replay]) -> list[float]:
    """Median seconds per step of each run, which take turns: the slowest rank's."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for times, run in zip(seconds, runs, strict=True):
            times += run.time_steps(1, STEPS)
    return [max(_everyones(group, statistics.median(times))) for times in seconds]


def _traffic(run: Replay, shape: ReplayShape) -> ReplayTraffic:
    return count_traffic(
        run.steps.ids_SLBK,
        run.placement,
        run.mode,
        shape.wire_sizes(run.steps.top_k),
        node_aware=run.node_aware,
        kv_pieces=run.kv_pieces,
    )


def _staying_steps(batch: int, placement: Placement, top_k: int, seed: int) -> RecordedSteps:
    """Random routing that prefers, with `STAY_RATE`, experts of the rank where the token's last ones were."""
    rng = np.random.default_rng(seed)
    experts = placement.num_experts
    rank_E = placement.copies_LER[0].argmax(axis=1)
    ids = np.empty((STEPS, LAYERS, batch, top_k), np.int64)
    for step in range(STEPS):
        rank_B = rng.integers(placement.num_ranks, size=batch)
        for layer in range(LAYERS):
            stays_B = rng.random(batch) < STAY_RATE
            rank_B = np.where(stays_B, rank_B, rng.integers(placement.num_ranks, size=batch))
            score_BE = rng.random((batch, experts)) + (rank_E == rank_B[:, None])
            ids[step, layer] = np.argsort(-score_BE, axis=1)[:, :top_k]
    return RecordedSteps(ids, experts)


def _random_steps(batch: int, num_experts: int, top_k: int, seed: int) -> RecordedSteps:
    """Uniform random routing."""
    score = np.random.default_rng(seed).random((STEPS, LAYERS, batch, num_experts))
    return RecordedSteps(np.argsort(score, axis=3)[..., :top_k], num_experts)
