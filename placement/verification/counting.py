"""What a placement does to tokens, counted again: whole arrays at a time, layer by layer.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, N nodes, S slots.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.verification.serving import server
from moeplace.placement.verification.statement import Statement
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Counts:
    """Attributes:
    tokens: T.
    served_LR, served_LN: tokens that a rank, a node serves.
    load_LR: assignments that a rank computes.
    first_LRR, second_LRR: copies per token from rank to rank of both exchanges, before gateways.
    entering_LRN: copies per token from a rank to a node (`dispatch-combine`).
    busiest_L: mean over steps of the slowest rank's expert seconds, without the fixed part.
    spread_L: share of steps in which a token has several ranks.
    attended_R: tokens that a rank attends, over all layers, per token (`coherent`).
    """

    tokens: int
    served_LR: np.ndarray
    served_LN: np.ndarray
    load_LR: np.ndarray
    first_LRR: np.ndarray
    second_LRR: np.ndarray
    entering_LRN: np.ndarray
    busiest_L: np.ndarray
    spread_L: np.ndarray
    attended_R: np.ndarray


def count(statement: Statement, trace: RoutingTrace, slots_LS: np.ndarray, slots_R: np.ndarray) -> Counts:
    """Replay the trace.

    Args:
        statement: mode, cluster, rule, sizes of a step.
        trace: the tokens.
        slots_LS: (L, S) expert in each slot, -1 = empty.
        slots_R: (R,) slots of each rank.
    """
    tokens, layers, ranks, nodes = trace.num_tokens, len(slots_LS), statement.num_ranks, statement.num_nodes
    rank_S, node_R = np.repeat(np.arange(ranks), slots_R), statement.node_R
    serve = server(statement.rule, slots_LS, rank_S, node_R, int(statement.experts_L.max()), statement.batch)
    replicated = any(np.bincount(row[row >= 0]).max() > 1 for row in slots_LS)
    coherent, homes_T = statement.mode == "coherent", np.arange(tokens) % ranks
    owner_T = homes_T if replicated and not coherent else np.full(tokens, -1)
    zeros = np.zeros
    served_LR, served_LN, load_LR = zeros((layers, ranks)), zeros((layers, nodes)), zeros((layers, ranks))
    first_LRR, second_LRR = zeros((layers, ranks, ranks)), zeros((layers, ranks, ranks))
    entering_LRN, busiest_L, spread_L = zeros((layers, ranks, nodes)), zeros(layers), zeros(layers)
    attended_R = np.full(ranks, 1.0 / ranks)
    for layer in range(layers):
        ids_TK = trace.layer(layer).astype(np.int64)
        rank_TK = serve(layer, ids_TK, owner_T)
        held_TR = _per_token(rank_TK, ranks)
        used_TR = held_TR > 0
        node_TN = np.stack([used_TR[:, node_R == node].any(axis=1) for node in range(nodes)], axis=1)
        served_LR[layer], served_LN[layer] = used_TR.sum(axis=0), node_TN.sum(axis=0)
        load_LR[layer] = held_TR.sum(axis=0)
        busiest_L[layer], spread_L[layer] = _steps(statement, ids_TK, rank_TK, used_TR)
        if not coherent:
            home_TR = homes_T[:, None] == np.arange(ranks) if replicated else np.full((tokens, ranks), 1.0 / ranks)
            first_LRR[layer] = home_TR.T.astype(float) @ used_TR / tokens
            entering_LRN[layer] = home_TR.T.astype(float) @ node_TN / tokens
            continue
        known_TR = (owner_T[:, None] == np.arange(ranks)).astype(float)
        if layer == 0:
            known_TR[:] = 1.0 / ranks
        else:
            attended_R += known_TR.sum(axis=0) / tokens
        first_LRR[layer] = known_TR.T @ used_TR / tokens
        next_T = (2 * held_TR + (owner_T[:, None] == np.arange(ranks))).argmax(axis=1)
        owner_T = np.where(used_TR.any(axis=1), next_T, owner_T)
        now_TR = (owner_T[:, None] == np.arange(ranks)).astype(float)
        second_LRR[layer] = used_TR.T.astype(float) @ now_TR / tokens
    return Counts(tokens, served_LR, served_LN, load_LR, first_LRR, second_LRR, entering_LRN, busiest_L, spread_L,
                  attended_R)  # fmt: skip


def _per_token(rank_TK: np.ndarray, ranks: int) -> np.ndarray:
    """(T, R) experts of each token on each rank."""
    held_TR = np.zeros((len(rank_TK), ranks), np.int64)
    token, slot = np.nonzero(rank_TK >= 0)
    np.add.at(held_TR, (token, rank_TK[token, slot]), 1)
    return held_TR


def _steps(statement: Statement, ids_TK: np.ndarray, rank_TK: np.ndarray, used_TR: np.ndarray) -> tuple[float, float]:
    """(mean over steps of the slowest rank's seconds, share of steps with a token on several ranks) of a layer.

    Lane i of a batch takes the i-th of equal pieces of the trace, and step s the s-th token of each.
    """
    tokens, ranks = len(ids_TK), statement.num_ranks
    lanes = min(statement.batch, tokens)
    length = tokens // lanes
    step_T = np.where(np.arange(tokens) < lanes * length, np.arange(tokens) % length, -1)
    token, slot = np.nonzero((rank_TK >= 0) & (step_T >= 0)[:, None])
    step, rank, expert = step_T[token], rank_TK[token, slot], ids_TK[token, slot]
    tokens_SR = np.bincount(step * ranks + rank, minlength=length * ranks).reshape(length, ranks)
    experts = int(ids_TK.max(initial=0)) + 1
    active = np.unique((step * ranks + rank) * experts + expert) // experts
    active_SR = np.bincount(active, minlength=length * ranks).reshape(length, ranks)
    _, per_token, per_activated = statement.expert
    work_SR = (per_token * statement.batch / lanes * tokens_SR + per_activated * active_SR) / statement.speed_R
    several = step_T[(used_TR.sum(axis=1) > 1) & (step_T >= 0)]
    return float(work_SR.max(axis=1).mean()), len(np.unique(several)) / length
