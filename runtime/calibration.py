"""Calibration of the running ranks: latency and bandwidth per tier, expert time, and what a layer costs beside them.

All ranks call `calibrate` together; the result is the same on every rank. Links are measured by all-to-alls of several
sizes, first inside nodes, then between one rank of each node, then between all ranks of different nodes, which shows
what a node's ranks share. The expert computation runs on all ranks at once, so that processors they share are shared.
What a layer costs beside experts and exchanges is what a replay of uniformly random routing takes beyond the
prediction. Times are medians.

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
from moeplace.placement.cost_model import Calibration, ExpertTime
from moeplace.placement.placement import MODES, index_order
from moeplace.runtime.counters import Counters
from moeplace.runtime.experts import ExpertStore
from moeplace.runtime.group import RankGroup
from moeplace.runtime.replay import RecordedSteps, Replay, ReplayShape, ReplayTensors
from moeplace.runtime.replay_traffic import count_traffic, predict_seconds, run_label

LINK_ROWS = (4, 16, 32, 64)
"""Hidden vectors per message, by which bandwidth is measured."""
REPEATS = 9
STEPS = 2
LAYERS = 6
ROUNDS = 4
"""Steps, layers and rounds of the replays that measure what a layer costs beside experts and exchanges. The modes take
turns in every round, so that other load on the machine meets all of them alike."""


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
    intra, inter = _measure_links(group, shape)
    tensors = ReplayTensors.random(shape, num_experts, seed=seed, device=group.device)
    expert = _measure_experts(group, shape, tensors, num_experts)
    conditions = {
        "ranks": group.size,
        "nodes": group.num_nodes,
        "batch": shape.batch,
        "hidden": shape.hidden,
        "expert_hidden": shape.expert_hidden,
        "experts": num_experts,
        "top_k": top_k,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": group.device.type,
        "torch": torch.__version__,
    }
    links = Calibration(intra, inter, expert, conditions=conditions)
    by_mode = _measure_overheads(group, shape, tensors, links, num_experts, top_k, seed)
    return replace(links, mode_seconds_per_layer=by_mode, other_seconds_per_layer=min(by_mode.values()))


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


def _measure_links(group: RankGroup, shape: ReplayShape) -> tuple[Link, Link]:
    """Links inside nodes and between them; what does not exist keeps its default."""
    if group.size == 1:
        return INTRA_NODE, INTER_NODE
    node = group.node_of_rank
    same = (node[:, None] == node[None, :]) & ~np.eye(group.size, dtype=bool)
    row = shape.hidden * shape.dtype.itemsize
    intra = INTRA_NODE
    if same.any():
        mates = group.node_group()
        latency = _exchange_seconds(mates, np.ones((mates.size, mates.size), bool), 64)
        intra = Link(latency, _bandwidth(group, same, row))
    if group.num_nodes == 1:
        return intra, INTER_NODE
    first = np.zeros(group.size, bool)
    first[np.unique(node, return_index=True)[1]] = True
    latency = _exchange_seconds(group, np.ones((group.size, group.size), bool), 64)
    one = _bandwidth(group, ~same & first[:, None] & first[None, :], row)
    shared = _bandwidth(group, node[:, None] != node[None, :], row, per_node=True)
    return intra, Link(latency, max(one, shared / int(np.bincount(node).max())), shared)


def _bandwidth(group: RankGroup, links_RR: np.ndarray, row: int, *, per_node: bool = False) -> float:
    """Bytes per second that the busiest rank (or node) sends when every link carries the same."""
    sent_R = (links_RR & ~np.eye(group.size, dtype=bool)).sum(axis=1)
    peers = np.bincount(group.node_of_rank, sent_R).max() if per_node else sent_R.max()
    seconds = [_exchange_seconds(group, links_RR, rows * row) for rows in LINK_ROWS]
    slope = fit_line([rows * row * int(peers) for rows in LINK_ROWS], seconds)[1]
    return 1 / max(slope, 1e-15)


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
    store = ExpertStore([tensors.weights], slots=slots, counters=Counters())
    per_rank = max(shape.batch // group.size, 4)
    cases = [(tokens, count) for tokens in (per_rank // 4, per_rank, 4 * per_rank) for count in {1, slots // 2, slots}]
    cases = [(tokens, count) for tokens, count in cases if tokens >= count >= 1]
    seconds = []
    for tokens, count in cases:
        x = tensors.x_BD[:1].expand(tokens, -1).contiguous()
        chosen = (torch.arange(tokens, device=group.device) % count)[:, None]
        weights = torch.ones(tokens, 1, dtype=shape.dtype, device=group.device)

        def compute(x: torch.Tensor = x, slots: torch.Tensor = chosen, weights: torch.Tensor = weights) -> None:
            store.compute(0, x, slots, weights)

        seconds.append(_median_over_ranks(group, compute))
    return fit_expert_time([tokens for tokens, _ in cases], [count for _, count in cases], seconds)


def _measure_overheads(
    group: RankGroup,
    shape: ReplayShape,
    tensors: ReplayTensors,
    links: Calibration,
    num_experts: int,
    top_k: int,
    seed: int,
) -> dict[str, float]:
    """Seconds of a layer beside experts and exchanges, by mode and form."""
    slots = np.full(group.size, -(-num_experts // group.size))
    placement = index_order(np.full(LAYERS, num_experts), slots, group.node_of_rank)
    steps = _random_steps(shape.batch, num_experts, top_k, seed)
    cluster = Cluster(placement.node_of_rank, slots, np.ones(group.size))
    forms = [(mode, False) for mode in MODES]
    if group.num_nodes > 1:
        forms.append(("dispatch-combine", True))
    runs = [
        Replay(steps, placement, mode, shape=shape, tensors=tensors, group=group, node_aware=node_aware, kv_pieces=0)
        for mode, node_aware in forms
    ]
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for times, run in zip(seconds, runs, strict=True):
            times += run.time_steps(1, STEPS)
    overheads = {}
    for times, run in zip(seconds, runs, strict=True):
        traffic = count_traffic(
            steps.ids_SLBK, placement, run.mode, shape.wire_sizes(top_k), node_aware=run.node_aware, kv_pieces=0
        )
        predicted = float(np.median(predict_seconds(traffic, cluster, links)))
        measured = max(_everyones(group, statistics.median(times)))
        overheads[run_label(run.mode, node_aware=run.node_aware)] = max(measured - predicted, 0.0) / LAYERS
    return overheads


def _random_steps(batch: int, num_experts: int, top_k: int, seed: int) -> RecordedSteps:
    """Uniform random routing."""
    score = np.random.default_rng(seed).random((STEPS, LAYERS, batch, num_experts))
    return RecordedSteps(np.argsort(score, axis=3)[..., :top_k], num_experts)
