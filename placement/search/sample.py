"""Tokens on which drafts are compared while the clock runs: all of them, or as many as the time limit can pay for.

A search replays whole placements some dozens of times. Each replay may cost a hundredth of the limit, so that a trace
of any length keeps it; what is handed in is measured on all tokens.
"""

from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

_ASSIGNMENT_SECONDS = 30e-9
"""Replaying one expert of one token in one layer (two unshared cores of 2024)."""
_CHOICE_SECONDS, _PER_RANK_SECONDS, _RANKS_AT_MOST = 15e-9, 0.9e-9, 128
"""What choosing among replicas takes beyond that: 50 ns in all on 8 ranks, 95 on 64, 155 on 128, 160 on 320."""
_SHARE = 0.01
_FEWEST = 256


def judging_trace(problem: Problem, seconds: float) -> RoutingTrace:
    """Evenly thinned tokens of the problem's trace whose replay takes at most a hundredth of `seconds`."""
    trace = problem.trace
    assert trace is not None
    each = _ASSIGNMENT_SECONDS
    if (problem.redundant_slots > 0).any():
        each += _CHOICE_SECONDS + _PER_RANK_SECONDS * min(problem.num_ranks, _RANKS_AT_MOST)
    affordable = _SHARE * seconds / (each * trace.num_layers * trace.top_k)
    stride = -(-trace.num_tokens // max(int(affordable), _FEWEST))
    return trace if stride <= 1 else trace.select(slice(None, None, stride))
