"""plan(): a map for an engine that re-plans while it serves; the previous one on any doubt.

The work is that of `placement/rebalancing`; this is its public edge: no compiler pause, no exception, light imports.
"""

import functools
import logging
from dataclasses import replace

import numpy as np

from moeplace.placement.policy.answer import Answer, keep, why_not
from moeplace.placement.policy.readiness import kernels
from moeplace.placement.policy.request import Request, finite, steps_of

_log = logging.getLogger("moeplace.policy")
MAX_IMBALANCE = 1.1
"""Cap where a trace is given: what a step loses at the busiest rank, ranks that are spared must bring."""
TRACE_TIME_LIMIT = 2.0
"""Seconds of one core that a trace may cost in a call."""


def plan(
    load: object,
    *,
    ranks: int,
    slots_per_rank: int,
    nodes: int = 1,
    groups: int = 1,
    previous: object = None,
    max_moves: int | None = None,
    max_moves_per_rank: int | None = None,
    max_moves_across_nodes: int | None = None,
    move_price: float = 0.0,
    time_limit: float = 0.25,
    wait: bool = False,
    trace: object = None,
    replica_rule: str = "random",
    max_imbalance: float = MAX_IMBALANCE,
    trace_time_limit: float = TRACE_TIME_LIMIT,
) -> Answer:
    """The map of slots that balances these loads best within the limits; among equals the one that moves least.

    Deterministic: the same arguments give the same map on every rank, because work is counted and not timed. Threads
    may call it at once. It never raises: on any doubt it returns the previous map (without one, experts in index order)
    and says why, in `reason` and in the log. More arguments than the interface of a style allows, because it is one
    flat call from an engine's configuration.

    Args:
        load: (L, E) assignments of each expert, or (steps, L, E) of several steps: then what is balanced is the sum
            over steps of the busiest rank's load, for which an engine waits. Numbers, or what numpy makes an array of.
        ranks: R, in blocks of equal size on `nodes`.
        slots_per_rank: C; slot p is on rank p // C.
        nodes: N, a divisor of R.
        groups: expert groups of the router. Where they divide by several nodes, an expert is fetched only by the node
            that holds most of its group.
        previous: (L, S) map in force. -1 is an empty slot; an expert twice on a rank is a slot that may be re-used.
        max_moves: most experts that the ranks fetch in a layer; None = any number. Empty slots and experts without a
            slot are filled whatever it says.
        max_moves_per_rank: most of them by one rank.
        max_moves_across_nodes: most of them that no rank of the fetching node held.
        move_price: imbalance that one move must save.
        time_limit: seconds for all layers on one core of 2024, turned into a number of steps.
        wait: for the compiler, once per installation. Without it a first call returns the previous map until kernels
            are compiled; whether they are may differ between ranks, so ranks that do not compare answers must wait.
        trace: recorded routing of the same model: a path, read once per process, or a `RoutingTrace`. With it the map
            serves a token on few ranks and nodes first, and balances within `max_imbalance`. Where it does not fit,
            loads alone decide and `note` says why. A slot that is not needed repeats an expert of its rank.
        replica_rule: who serves an expert with several slots: `hash` in vLLM, `nearest-static` or `random` in SGLang.
        max_imbalance: with a trace, most imbalance of a layer by the loads of all steps together, or what loads alone
            reach where that is more.
        trace_time_limit: what a trace may cost besides, as `time_limit`.
    """
    shape = (0, 0, 0)
    try:
        load_TLE = steps_of(load)
        shape = (load_TLE.shape[1], load_TLE.shape[2], int(ranks) * int(slots_per_rank))
        request = Request(
            load_TLE,
            int(ranks),
            int(slots_per_rank),
            int(nodes),
            int(groups),
            None if previous is None else np.atleast_2d(np.array(previous)),
            max_moves,
            max_moves_per_rank,
            max_moves_across_nodes,
            finite("move_price", move_price),
            finite("time_limit", time_limit),
        )
        answer = _answer(request, wait=wait)
        if trace is None or answer.reason is not None:
            return answer
        return _with_trace(request, answer, trace, replica_rule, max_imbalance, trace_time_limit)
    except Exception as error:  # an engine that serves must go on serving, whatever this is
        return _kept(previous, shape, f"{error or type(error).__name__}")


def _answer(request: Request, *, wait: bool) -> Answer:
    """A plan, or the previous map with the reason."""
    if not kernels().ready(wait=wait):
        failure = kernels().failure
        reason = f"kernels cannot be compiled: {failure}" if failure else "kernels are being compiled"
        return _kept(request.previous, request.shape, reason)
    from moeplace.placement.policy.balance import balance

    before = request.previous
    runs = before is not None and why_not(before, request.shape, request.slots_per_rank, twice=True) is None
    if runs and not request.load_TLE.any():
        return _kept(before, request.shape, "there is no load")
    answer = balance(request)
    if (answer.map < 0).any():  # limits on moves left slots empty, which no engine takes
        answer = balance(request.without_limits())
    clean = before is None or why_not(before, request.shape, request.slots_per_rank) is None
    wrong = why_not(answer.map, request.shape, request.slots_per_rank, twice=not clean)
    return answer if wrong is None else _kept(before, request.shape, wrong)


def _with_trace(
    request: Request, answer: Answer, trace: object, rule: str, max_imbalance: float, seconds: float
) -> Answer:
    """The plan with affinity; on any doubt the one by loads alone, with a note."""
    from moeplace.placement.policy.affinity import Ask, with_affinity
    from moeplace.placement.policy.recording import recording_of

    try:
        if not 1 <= float(max_imbalance) < float("inf"):
            raise ValueError(f"max_imbalance ({max_imbalance}) must be a number of at least 1")
        ask = Ask(recording_of(trace), rule, float(max_imbalance), finite("trace_time_limit", seconds))
        found = with_affinity(request, answer, ask)
        wrong = why_not(found.map, request.shape, request.slots_per_rank, twice=True)
        if wrong is None:
            return found
    except Exception as error:  # an engine goes on with the plan by loads
        wrong = f"{error or type(error).__name__}"
    _say_once(f"moeplace plans by loads alone, without the trace: {wrong}")
    return replace(answer, note=wrong)


@functools.lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    """An engine asks every few minutes."""
    _log.warning(text)


def _kept(previous: object, shape: tuple[int, int, int], reason: str) -> Answer:
    _log.warning("moeplace keeps the map of experts in force: %s", reason)
    return keep(previous, shape, reason)
