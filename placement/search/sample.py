"""Tokens on which drafts are compared while the clock runs: all of them, or as many as the time limit can pay for.

A search replays whole placements some dozens of times. Each replay may cost a hundredth of the limit, so that a trace
of any length keeps it; what is handed in is measured on all tokens.
"""

from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

_ASSIGNMENT_SECONDS = 30e-9
"""Replaying one expert of one token in one layer: `bench evaluate` on two unshared cores."""
_SHARE = 0.01
_FEWEST = 256


def judging_trace(problem: Problem, seconds: float) -> RoutingTrace:
    """Evenly thinned tokens of the problem's trace whose replay takes at most a hundredth of `seconds`."""
    trace = problem.trace
    assert trace is not None
    affordable = _SHARE * seconds / (_ASSIGNMENT_SECONDS * trace.num_layers * trace.top_k)
    stride = -(-trace.num_tokens // max(int(affordable), _FEWEST))
    return trace if stride <= 1 else trace.select(slice(None, None, stride))
