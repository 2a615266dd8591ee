"""Affinity: maps that bring the experts of a recorded token together, under an engine's replica rule.

The plan by loads alone comes first. Then, layer by layer, arrangements are tried that serve a token on fewer ranks (and
nodes) and keep the imbalance of the window's loads within a cap, or within what balancing alone reaches where that is
more. Each is judged on the recorded tokens by the rule itself (`cost/in_turn`). Engines draw among an expert's slots,
so replicas save no rank by chance (`solvers/replicas/drawn`): they are kept where balance needs them, and the slots of
the others repeat an expert of their own rank, which changes nothing and leaves ranks free to hold fewer experts.

Work is counted and no sum depends on threads (no product of matrices), so every rank finds the same map.

Shape letters: T tokens, L rows of the engine, E experts, K top-k, R ranks, N nodes, I items = S slots.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.in_turn import InTurn
from moeplace.placement.cost.replica_rule import get_rule, replica_ranks
from moeplace.placement.policy.answer import Answer
from moeplace.placement.policy.balance import imbalance_over_steps
from moeplace.placement.policy.gathering import FORBIDDEN, SWEPT, Bounds, Search, gather
from moeplace.placement.policy.recording import Recording
from moeplace.placement.policy.request import Request
from moeplace.placement.policy.seats import kept_items, needed_slots, row_of
from moeplace.placement.rebalancing.plan import home_nodes
from moeplace.placement.rebalancing.seating import ACROSS_CODE, Floor, across_of, floor_of, moves_of
from moeplace.placement.search.annealing import COOLING_STEPS
from moeplace.placement.search.nets import LayerNets, layer_nets
from moeplace.profiling.errors import InputError

NODE_WEIGHT = 6.5
"""What one more node costs beside one more rank: links of 300 and 40 GB/s, as a cluster has by default."""
ENOUGH = 0.01
"""Of arrangements that cost up to this share more than the best one, the one that moves least is taken."""
MOVE_PRICE = 1e-5
"""Ranks per token that a move must save in any case."""
HEAVY = 0.5
"""Load of a slot, as a share of the most of a rank, above which its expert keeps another one."""
HOT, WARM = 0.1, 0.03
"""First temperatures: anew, and near the map in force."""
SEARCHES = 3
"""Of a layer."""
TABLE_SHARE = 0.3
"""Of the time, for the tables of a search and for judging: it says how many tokens there may be."""
TOKEN_SECONDS, PROPOSAL_SECONDS, SWAP_SECONDS = 1.0e-7, 6e-8, 1.1e-10
"""Tables, per token and expert; a proposal, and on average its swap per token of an item, at each level (64 experts on
8 ranks with 2048 and 6831 tokens, 256 on 32 in 4 nodes with 4300; one core of 2024)."""
SEED = 20
_NO_LIMIT = 1 << 19


class Ask(NamedTuple):
    """What is asked besides a plan by loads.

    Attributes:
        recording: tokens.
        rule: name of the replica rule that serves them.
        max_imbalance: cap, on the loads of the whole window.
        seconds: of one core of 2024, for all layers, turned into a number of proposals.
    """

    recording: Recording
    rule: str
    max_imbalance: float
    seconds: float


class Draft(NamedTuple):
    """A row of slots: imbalance; ranks, nodes and moves per token, by price; moves."""

    row_S: np.ndarray
    imbalance: float
    cost: float
    moves: int


def with_affinity(request: Request, balanced: Answer, ask: Ask) -> Answer:
    """The plan by loads alone, changed where recorded tokens are served on fewer ranks.

    Args:
        request: what `balanced` answers.
        balanced: full rows for every layer.
        ask: see there.

    Raises:
        InputError: the recording is of another model, or no engine follows such a rule.
    """
    if get_rule(ask.rule).share is None:
        raise InputError(f"replica rule {ask.rule!r} is of moeplace's own runtime: no engine follows it")
    layers, experts, _ = request.shape
    own_L = ask.recording.rows_for(layers, experts)
    turn = InTurn(get_rule(ask.rule), _floor(request).rank_S, _floor(request).node_R, experts)
    chosen = []
    for layer, own in enumerate(own_L.tolist()):
        row_S = balanced.map[layer]
        if own >= 0 and request.load_TLE[:, layer].any() and _open(request, layer):
            row_S = _Layer(request, layer, balanced, ask, own, turn).best_row()
        turn.take_row(row_S)
        chosen.append(row_S)
    return _answer(request, balanced, np.stack(chosen))


def _open(request: Request, layer: int) -> bool:
    """Whether a row may be rearranged: not under limits on moves if empty slots must be filled at any price."""
    limits = (request.max_moves, request.max_moves_per_rank, request.max_moves_across_nodes)
    if request.previous is None or all(limit is None for limit in limits):
        return True
    return _is_full(request.previous[layer], request.shape[1])


def _is_full(row_S: np.ndarray, experts: int) -> bool:
    """Whether no slot is empty and every expert has one."""
    return bool((row_S >= 0).all()) and len(np.unique(row_S)) == experts


class _Layer:
    """A layer: what is in force, what balances, what its tokens ask for.

    Args:
        request, balanced, ask, turn: see `with_affinity`; the turn has taken all layers before this one.
        layer: row of the engine.
        own: layer of the recording.
    """

    def __init__(self, request: Request, layer: int, balanced: Answer, ask: Ask, own: int, turn: InTurn) -> None:
        self._layer, self._ask, self._turn, self._floor = layer, ask, turn, _floor(request)
        self._ranks, self._balanced_S = request.ranks, balanced.map[layer].astype(np.int64)
        self._load_E = request.load_TLE[:, layer].sum(axis=0)
        ids_TK = ask.recording.ids_LTK[own]
        self._before_S = None if request.previous is None else request.previous[layer].astype(np.int64)
        self._code_ER = _codes(self._before_S, self._balanced_S, request)
        limits = (request.max_moves, request.max_moves_per_rank, request.max_moves_across_nodes)
        self._limits = [_NO_LIMIT if limit is None or self._before_S is None else int(limit) for limit in limits]
        self._most = max(ask.max_imbalance, self._imbalance(self._balanced_S)) * (1.0 + 1e-9)
        self._price = max(MOVE_PRICE, request.move_price)
        nodes = int(self._floor.node_R[-1]) + 1
        self._node_weight = NODE_WEIGHT if 1 < nodes < self._ranks else 0.0
        seconds = ask.seconds / max(request.shape[0], 1) / SEARCHES
        self._ids_TK = ids_TK[evenly(len(ids_TK), int(seconds * TABLE_SHARE / TOKEN_SECONDS / ids_TK.shape[1]))]
        per_item = self._ids_TK.size / len(self._balanced_S)
        each = (PROPOSAL_SECONDS + per_item * SWAP_SECONDS) * (2 if self._node_weight > 0 else 1)
        self._proposals = int((1.0 - TABLE_SHARE) * seconds / COOLING_STEPS / (1.0 + SWEPT) / each)

    def best_row(self) -> np.ndarray:
        """(S,) the cheapest arrangement that is within the cap and the limits; among near ones what moves least."""
        drafts = [self._draft(row_S) for row_S in self._rows()]
        least = min(draft.cost for draft in drafts if draft.imbalance <= self._most)
        near = [draft for draft in drafts if draft.imbalance <= self._most and draft.cost <= least * (1.0 + ENOUGH)]
        return min(near, key=lambda draft: (draft.moves, draft.cost)).row_S

    def _rows(self) -> Iterator[np.ndarray]:
        """What balances; what is in force, as it is and improved; and what balances with only the slots that it needs,
        improved."""
        yield self._balanced_S
        start_S = self._balanced_S
        if self._before_S is not None and _is_full(self._before_S, len(self._load_E)):
            start_S = self._before_S
            yield start_S
        count_E = np.bincount(self._balanced_S, minlength=len(self._load_E))
        needed_E = needed_slots(self._load_E, count_E, HEAVY * self._most * self._load_E.sum() / self._ranks)
        for row_S, most_E, hot in ((start_S, None, WARM), (start_S, needed_E, HOT), (self._balanced_S, needed_E, HOT)):
            found_S = self._gathered(row_S, most_E, hot)
            if found_S is not None:
                yield found_S

    def _gathered(self, row_S: np.ndarray, most_E: np.ndarray | None, hot: float) -> np.ndarray | None:
        """(S,) a row improved by swaps; None = none within cap and limits was found."""
        slots = len(row_S)
        item_S = row_S if most_E is None else kept_items(row_S, most_E)
        nets, held = _nets(item_S, self._ids_TK, self._load_E, self._layer), item_S >= 0
        code_IR = np.where(held[:, None], self._code_ER[item_S], 0).astype(np.int32)
        mean = float(nets.load_E.sum()) / self._ranks
        bounds = Bounds(np.full(self._ranks, self._most * mean), code_IR, *self._limits)
        price = self._price * len(self._ids_TK)
        state = np.array([SEED + self._layer], np.uint64)
        rank_I = self._floor.rank_S.astype(np.int64)
        own_I = (np.arange(slots), rank_I)
        code_IR[own_I] = code_IR[own_I].clip(0)  # what was filled at any price may stay
        search = Search(hot, self._proposals, self._node_weight, price, state)
        if not gather(nets, rank_I, self._floor.node_R, bounds, search):
            return None
        near_S = row_S if self._before_S is None else self._before_S
        return row_of(item_S, rank_I, near_S, self._ranks)

    def _draft(self, row_S: np.ndarray) -> Draft:
        rank_TK = self._turn.try_row(self._layer, row_S, self._ids_TK)
        cost = _parts(rank_TK, self._ranks)
        if self._node_weight > 0:
            node_TK = np.where(rank_TK >= 0, self._floor.node_R[rank_TK], -1)
            cost += self._node_weight * _parts(node_TK, int(self._floor.node_R[-1]) + 1)
        code = _code(row_S, self._code_ER, self._floor)
        return Draft(row_S, self._imbalance(row_S), cost + self._price * moves_of(code), moves_of(code))

    def _imbalance(self, row_S: np.ndarray) -> float:
        """Busiest rank over mean, by the loads of the whole window, split evenly over an expert's slots."""
        if (row_S < 0).any() or len(np.unique(row_S)) < len(self._load_E):
            return np.inf
        share_E = self._load_E / np.bincount(row_S, minlength=len(self._load_E))
        load_R = np.bincount(self._floor.rank_S, share_E[row_S], minlength=self._ranks)
        return float(load_R.max() * self._ranks / self._load_E.sum())


def evenly(tokens: int, most: int) -> np.ndarray:
    """(min(tokens, most),) tokens spread evenly, at least one."""
    kept = max(min(tokens, most), 1)
    return np.arange(kept) * tokens // kept


def _parts(part_TK: np.ndarray, parts: int) -> float:
    """Distinct parts per token, -1 = none."""
    used_TP = np.zeros((len(part_TK), parts + 1), bool)
    used_TP[np.arange(len(part_TK))[:, None], part_TK] = True  # -1 is the column behind the last
    return float(np.count_nonzero(used_TP[:, :parts])) / len(part_TK)


def _nets(item_S: np.ndarray, ids_TK: np.ndarray, load_E: np.ndarray, layer: int) -> LayerNets:
    """Nets over items: which slot of an expert serves a token is drawn; loads are the window's, as many as tokens'."""
    table_EJ = replica_ranks(item_S, len(load_E), np.arange(len(item_S)))
    count_E = (table_EJ >= 0).sum(axis=1)
    share_TK = np.random.default_rng((SEED, layer)).random(ids_TK.shape)
    drawn_TK = (share_TK * count_E[ids_TK]).astype(np.int64)
    nets = layer_nets(np.where(ids_TK >= 0, table_EJ[ids_TK, drawn_TK], -1), len(item_S))
    share_S = np.where(item_S >= 0, (load_E / count_E)[item_S], 0.0)
    return nets._replace(load_E=share_S * (max(nets.load_E.sum(), 1.0) / load_E.sum()))


def _floor(request: Request) -> Floor:
    ranks = request.ranks
    return floor_of(np.full(ranks, request.slots_per_rank), np.arange(ranks) * request.nodes // ranks)


def _codes(before_S: np.ndarray | None, balanced_S: np.ndarray, request: Request) -> np.ndarray:
    """(E, R) int64 code of the move that brings an expert to a rank; FORBIDDEN where its router group has a home."""
    floor, experts, nodes = _floor(request), request.shape[1], request.nodes
    held_ER = np.zeros((experts, request.ranks), bool)
    held_S = balanced_S if before_S is None else before_S
    held_ER[held_S[held_S >= 0], floor.rank_S[held_S >= 0]] = True
    home_E = home_nodes(held_S, experts, floor, request.groups)
    stray_ER = (home_E[:, None] >= 0) & (home_E[:, None] != floor.node_R)
    if before_S is None:  # nothing is fetched from anywhere
        return np.where(stray_ER & ~held_ER, FORBIDDEN, 0)
    had_EN = np.stack([held_ER[:, floor.node_R == node].any(axis=1) for node in range(nodes)], axis=1)
    code_ER = np.where(had_EN[:, floor.node_R], 1, 1 + ACROSS_CODE)
    return np.where(held_ER, 0, np.where(stray_ER, FORBIDDEN, code_ER))


def _code(row_S: np.ndarray, code_ER: np.ndarray, floor: Floor) -> int:
    """Sum of the codes of what ranks have now, an expert twice on a rank counted once."""
    has_ER = np.zeros(code_ER.shape, bool)
    has_ER[row_S, floor.rank_S] = True
    return int(code_ER[has_ER].clip(0).sum())


def _answer(request: Request, balanced: Answer, slots_LS: np.ndarray) -> Answer:
    """The figures of these slots."""
    floor, moved_ML = _floor(request), np.zeros((2, len(slots_LS)), np.int64)
    if request.previous is not None:
        for layer, row_S in enumerate(slots_LS):
            code = _code(row_S, _codes(request.previous[layer], row_S, request), floor)
            moved_ML[:, layer] = moves_of(code), across_of(code)
    imbalance_L = imbalance_over_steps(request.load_TLE, slots_LS, request.ranks)
    return replace(balanced, map=slots_LS, moves=moved_ML[0], imbalance=imbalance_L, across=moved_ML[1])
