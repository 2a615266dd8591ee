"""Quick measurements on the running ranks: what a collective, a byte, a token and an activated expert cost here.

All ranks measure at the same time, as they compete for the same cores while they serve.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine

_REPEATS, _WARM_UP = 30, 5
_ROWS = 512  # per peer in a large exchange
_TOKENS = (8, 32)


def measure_links(group: RankGroup, *, width: int) -> dict[str, float]:
    """`latency` of an all-to-all of one row per peer, in seconds, and `bandwidth` of a rank, in bytes per second."""
    latency = _timed_exchange(group, rows=1, width=width)
    seconds = _timed_exchange(group, rows=_ROWS, width=width)
    sent = (group.size - 1) * _ROWS * width * torch.float32.itemsize
    return {"latency": latency, "bandwidth": sent / max(seconds - latency, 1e-9)}


def measure_experts(engine: Engine) -> dict[str, float]:
    """Seconds of one layer's experts: `fixed` + `per_token` x tokens + `per_activated` x activated experts."""
    slots = int(engine.placement.slots_of_rank[engine.group.rank])
    rows, seconds = [], []
    for activated in sorted({1, slots}):
        for tokens in _TOKENS:
            rows.append([1.0, float(tokens), float(activated)])
            seconds.append(_timed_experts(engine, tokens=tokens, activated=activated))
    fit = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64))
    fixed, per_token, per_activated = (max(float(value), 0.0) for value in fit.solution)
    return {"fixed": fixed, "per_token": per_token, "per_activated": per_activated}


def _timed_exchange(group: RankGroup, *, rows: int, width: int) -> float:
    splits = [rows] * group.size
    sent = torch.zeros(rows * group.size, width)
    received = torch.empty_like(sent)
    return _median_seconds(lambda: group.all_to_all(received, sent, splits, splits, kind="calibration"))


def _timed_experts(engine: Engine, *, tokens: int, activated: int) -> float:
    computation, decoder = engine.executor.runtime.computation, engine.executor.decoder
    x = torch.randn(tokens, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device)
    slots = (torch.arange(tokens, device=decoder.device) % activated)[:, None]
    weights = torch.ones(tokens, 1, dtype=decoder.dtype, device=decoder.device)
    with torch.inference_mode():
        return _median_seconds(lambda: computation.compute(0, x, slots, weights))


def _median_seconds(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_WARM_UP + _REPEATS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return median(seconds[_WARM_UP:])
