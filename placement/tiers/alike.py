"""Requests with alike experts side by side (after ExpertFlow, arXiv 2410.17954): what a step then asks for, and costs.

What a request will ask for is told by what its first tokens asked for, its prompt's. Batches are filled greedily: the
first request that waits, then, again and again, the one most alike to those in the batch already (`likeness`). The same
requests in drawn order are the comparison.

Shape letters: T tokens, L MoE layers, E experts per layer, G requests, B requests of a batch.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.tiers.demand import count_demand
from moeplace.placement.tiers.likeness import likeness, most_alike, unit_profile
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace

FIRST = 16
"""Tokens of a request that its profile is made of; they are not served again."""


@dataclass(frozen=True, eq=False)
class Batches:
    """The same requests in two arrangements, as traces whose lanes are served side by side.

    Attributes:
        alike, drawn: tokens of the requests, lane after lane.
        requests: how many.
        active: mean experts of a layer that a step asks for, alike and drawn.
    """

    alike: RoutingTrace
    drawn: RoutingTrace
    requests: int
    active: tuple[float, float]


def batch_alike(trace: RoutingTrace, *, batch: int, steps: int, seed: int = 0) -> Batches:
    """Batches of alike requests, and of drawn ones, of all sequences that are long enough.

    Args:
        trace: tokens with sequences.
        batch: B.
        steps: tokens of each request that are served, behind its first ones.
        seed: of the drawn order.

    Raises:
        InputError: no token is to be served, the trace has no sequences, or fewer than two batches of them have so
            many tokens.
    """
    if steps < 1:
        raise InputError(f"tokens of each request that are served ({steps}) must be at least 1")
    if trace.sequence_ids is None:
        raise InputError("batching alike requests needs a trace that says which sequence a token is of")
    sequence_T = np.asarray(trace.sequence_ids)
    tokens = [np.flatnonzero(sequence_T == one) for one in np.unique(sequence_T)]
    tokens = [own[: FIRST + steps] for own in tokens if len(own) >= FIRST + steps]
    if len(tokens) < 2 * batch:
        raise InputError(
            f"{len(tokens)} sequences have {FIRST} + {steps} tokens, two batches of {batch} need {2 * batch}"
        )
    groups = group_alike(np.stack([_profile(trace, own[:FIRST]) for own in tokens]), batch)
    served = [own[FIRST:] for own in tokens]
    order = np.random.default_rng(seed).permutation(groups.reshape(-1)).reshape(groups.shape)
    both = [_lanes(trace, served, each) for each in (groups, order)]
    alike, drawn = (count_demand(each, batch=batch).active_experts for each in both)
    return Batches(both[0], both[1], groups.size, (alike, drawn))


def group_alike(profile_GX: np.ndarray, batch: int) -> np.ndarray:
    """(groups, B) requests; those that fill no batch are left out.

    Args:
        profile_GX: (G, L x E) profiles, of length 1 in every layer.
        batch: B.
    """
    alike_GG = likeness(profile_GX, profile_GX)
    waiting = list(range(len(profile_GX)))
    groups = []
    while len(waiting) >= batch:
        group = [waiting.pop(0)]
        while len(group) < batch:
            group.append(waiting.pop(most_alike(alike_GG[np.ix_(waiting, group)])))
        groups.append(group)
    return np.array(groups, np.int64).reshape(-1, batch)


def _profile(trace: RoutingTrace, tokens: np.ndarray) -> np.ndarray:
    """(L x E) how often each expert was chosen, of length 1 in every layer."""
    count_LE = np.zeros((trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        chosen = trace.layer(layer)[tokens]
        np.add.at(count_LE[layer], chosen[chosen >= 0], 1.0)
    return unit_profile(count_LE)


def _lanes(trace: RoutingTrace, served: list[np.ndarray], groups: np.ndarray) -> RoutingTrace:
    """One lane for each place of a batch: the tokens of the requests that come to it, one after the other."""
    tokens = np.concatenate([served[request] for lane in groups.T for request in lane.tolist()])
    return trace.select(tokens).replace(sequence_ids=None, positions=None)
