"""plan(): the slots of all layers for new loads, near the slots in force. For engines that re-plan while they serve.

A pure function: the same arguments give the same plan on every rank, whatever the clock and the cores, because work is
counted in steps. It keeps no state, so threads may call it at once.

Shape letters: L MoE layers, E experts of a layer, R ranks, N nodes, C slots per rank, S = R * C slots per layer.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.rebalancing.bound import busiest_without_replicas, slowest_with_replicas
from moeplace.placement.rebalancing.packing import pack, pack_with_replicas
from moeplace.placement.rebalancing.search import fill_empty, search_layer, seat_missing
from moeplace.placement.rebalancing.seating import Floor, across_of, empty_seating, floor_of, moves_of
from moeplace.placement.rebalancing.steps import Limits
from moeplace.profiling.errors import InfeasibleError, InputError

STEPS_PER_SECOND = 60_000
"""Steps of a descent that one core of 2024 does (256 experts, 288 slots, 32 ranks): what a time limit allows."""
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Plan:
    """Where experts should be.

    Attributes:
        slot_to_expert: (L, S) int32; -1 = empty, only where limits on moves leave a slot of `previous` so.
        moves_L: (L,) int64 experts that a rank fetches because it did not hold them in `previous`; 0 without one.
        across_L: (L,) int64, those of them that no rank of its node held.
        imbalance_L: (L,) float64 busiest rank over mean, loads split evenly over an expert's slots; 1 without load.
        bound_L: (L,) float64, no slots of these ranks have less.
    """

    slot_to_expert: np.ndarray
    moves_L: np.ndarray
    across_L: np.ndarray
    imbalance_L: np.ndarray
    bound_L: np.ndarray


def plan(
    load: np.ndarray,
    *,
    ranks: int,
    slots_per_rank: int,
    nodes: int = 1,
    groups: int = 1,
    previous: np.ndarray | None = None,
    max_moves: int | None = None,
    max_moves_per_rank: int | None = None,
    max_moves_across_nodes: int | None = None,
    move_price: float = 0.0,
    time_limit: float = 0.25,
) -> Plan:
    """The slots that balance these loads best within the limits; among equal ones those that move least.

    Layers without load keep the slots they have, and so does every slot whose change would gain nothing. More than the
    interface of a style allows, because it is one flat call from an engine's configuration.

    Args:
        load: (L, E) assignments of each expert, not negative.
        ranks: R, in blocks of equal size on `nodes`.
        slots_per_rank: C.
        nodes: N, a divisor of R.
        groups: expert groups of the router. Where they divide by several nodes, an expert is fetched only by the node
            that holds most of its group, as hierarchical balancers do.
        previous: (L, S) integer slots in force. An expert may be twice on a rank and slots may be empty (-1): such
            slots can be given to others. None = plan from nothing.
        max_moves: most experts fetched in a layer; None = any number. Experts without any slot are fetched besides.
        max_moves_per_rank: most of them by one rank.
        max_moves_across_nodes: most of them that no rank of the fetching node held.
        move_price: imbalance that one move must save; empty slots are filled at any price, engines want full maps.
        time_limit: seconds for all layers, turned into a number of steps.

    Raises:
        InputError: shapes or values break a rule.
        InfeasibleError: an expert finds no slot.
    """
    load_LE = _checked_load(load, ranks, slots_per_rank, nodes)
    floor = floor_of(np.full(ranks, slots_per_rank), np.arange(ranks) * nodes // ranks)
    layers, experts = load_LE.shape
    start_LS = None if previous is None else _checked_previous(previous, layers, experts, ranks * slots_per_rank)
    limits = Limits(_limit(max_moves), _limit(max_moves_per_rank), _limit(max_moves_across_nodes), 1)
    seating = empty_seating(experts, floor)
    steps = max(int(time_limit * STEPS_PER_SECOND / max(layers, 1)), 1)
    slots_LS = np.empty((layers, len(floor.rank_S)), np.int64)
    figures = np.zeros((4, layers))
    for layer, load_E in enumerate(load_LE):
        if start_LS is None:
            home_E, start_S = _from_nothing(load_E, floor, groups)
            free = limits._replace(moves=_NO_LIMIT, per_rank=_NO_LIMIT, across=_NO_LIMIT)
        else:
            home_E, start_S, free = home_nodes(start_LS[layer], experts, floor, groups), start_LS[layer], limits
            if seat_missing(start_S, load_E, home_E, floor, seating):
                raise InfeasibleError(f"layer {layer} has no slot for some expert")
        bound = least_imbalance_of(load_E, floor)
        imbalance, code = 1.0, 0
        if load_E.any():
            imbalance, code = search_layer(
                start_S, load_E, home_E, bound, float(move_price), floor, seating, free, steps, slots_LS[layer]
            )
            if (slots_LS[layer] < 0).any():
                imbalance, code = fill_empty(start_S, slots_LS[layer], load_E, home_E, floor, seating, free)
        else:
            slots_LS[layer] = start_S
        figures[:, layer] = moves_of(code), across_of(code), imbalance, bound
    if previous is None:
        figures[:2] = 0
    moves_L, across_L = figures[:2].astype(np.int64)
    return Plan(slots_LS.astype(np.int32), moves_L, across_L, figures[2], figures[3])


def least_imbalance_of(load_E: np.ndarray, floor: Floor) -> float:
    """Proven least imbalance of a layer, 1 without load."""
    if not load_E.any():
        return 1.0
    speed_R, slots_R = 1.0 / floor.slow_R, np.diff(floor.start_R)
    slowest = slowest_with_replicas(load_E, len(floor.rank_S), speed_R)
    if len(load_E) == len(floor.rank_S) and np.ptp(speed_R) == 0:
        slowest = max(slowest, busiest_without_replicas(load_E, slots_R) / speed_R[0])
    return max(float(slowest * speed_R.sum() / load_E.sum()), 1.0)


def home_nodes(slots_S: np.ndarray, experts: int, floor: Floor, groups: int) -> np.ndarray:
    """(E,) int64 node that holds most slots of each expert's group, as many groups per node; -1 = any node will do."""
    nodes = int(floor.node_R[-1]) + 1
    if nodes == 1 or groups <= 1 or groups % nodes or experts % groups:
        return np.full(experts, -1)
    size = experts // groups
    held = slots_S >= 0
    count_GN = np.zeros((groups, nodes), np.int64)
    np.add.at(count_GN, (slots_S[held] // size, floor.node_R[floor.rank_S[held]]), 1)
    node_G, room_N = np.full(groups, -1), np.full(nodes, groups // nodes)
    for pair in np.argsort(-count_GN, axis=None, kind="stable"):
        group, node = divmod(int(pair), nodes)
        if node_G[group] < 0 and room_N[node]:
            node_G[group] = node
            room_N[node] -= 1
    return np.repeat(node_G, size)


def _from_nothing(load_E: np.ndarray, floor: Floor, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(home node (E,), slots (S,)) packed from nothing: groups onto nodes where they divide, replicas onto ranks."""
    nodes, experts, slots_R = int(floor.node_R[-1]) + 1, len(load_E), np.diff(floor.start_R)
    if nodes == 1 or groups <= 1 or groups % nodes or experts % groups:
        row_S = pack_with_replicas(load_E, slots_R, 1.0 / floor.slow_R)
        return np.full(experts, -1), row_S.astype(np.int64)
    node_G = pack(load_E.reshape(groups, -1).sum(axis=1), np.full(nodes, groups // nodes))
    home_E = np.repeat(node_G, experts // groups)
    slots_S = np.empty(len(floor.rank_S), np.int64)
    for node in range(nodes):
        own, here_R = np.flatnonzero(home_E == node), floor.node_R == node
        row_S = pack_with_replicas(load_E[own], slots_R[here_R], 1.0 / floor.slow_R[here_R])
        slots_S[here_R[floor.rank_S]] = np.where(row_S >= 0, own[row_S], -1)
    return home_E, slots_S


def _limit(value: int | None) -> int:
    if value is not None and value < 0:
        raise InputError(f"a limit on moves ({value}) must not be negative")
    return _NO_LIMIT if value is None else int(value)


def _checked_load(load: np.ndarray, ranks: int, slots_per_rank: int, nodes: int) -> np.ndarray:
    """(L, E) float64 loads."""
    load_LE = np.atleast_2d(np.ascontiguousarray(load, dtype=np.float64))
    if load_LE.ndim != 2 or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise InputError(f"load must be finite numbers (layers, experts), not negative; its shape is {load_LE.shape}")
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise InputError(f"ranks ({ranks}) must be a multiple of nodes ({nodes})")
    if not slots_per_rank >= 1 or ranks * slots_per_rank < load_LE.shape[1]:
        raise InputError(f"{ranks} ranks with {slots_per_rank} slots do not hold {load_LE.shape[1]} experts")
    return load_LE


def _checked_previous(previous: np.ndarray, layers: int, experts: int, slots: int) -> np.ndarray:
    """(L, S) int64, a copy."""
    before = np.array(previous)
    if before.shape != (layers, slots) or not np.issubdtype(before.dtype, np.integer):
        raise InputError(f"previous must be integers {(layers, slots)}, not {before.dtype} {before.shape}")
    if before.size and (before.min() < -1 or before.max() >= experts):
        raise InputError(f"previous must hold experts 0..{experts - 1} or -1, not {before.min()}..{before.max()}")
    return before.astype(np.int64)
