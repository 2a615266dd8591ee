"""The problem that was solved, as plain data beside the placement: what `moeplace verify` needs to judge it alone.

Shape letters: L MoE layers.
"""

import hashlib
from typing import Any

import numpy as np

from moeplace.placement.cluster import Link
from moeplace.placement.problem import Problem
from moeplace.profiling.parallel import chunks


def state(problem: Problem, *, objective: str, caps_L: np.ndarray | None) -> dict[str, Any]:
    """The entry `problem` of a placement file.

    Args:
        problem: what was solved.
        objective: name of what was minimised: "seconds", "traffic" or "imbalance".
        caps_L: (L,) imbalance that each layer was held to, or None.
    """
    cluster, shape = problem.cluster, problem.shape
    calibration = {key: value for key, value in problem.calibration.to_json().items() if key != "conditions"}
    ground: dict[str, Any] = {
        "node_of_rank": cluster.node_of_rank.tolist(),
        "slots_of_rank": cluster.slots_of_rank.tolist(),
        "speed_of_rank": cluster.speed_of_rank.tolist(),
        "intra": _link(cluster.intra),
        "inter": _link(cluster.inter),
    }
    if cluster.distance_RR is not None:
        ground["distance"] = cluster.distance_RR.tolist()
    return {
        "mode": problem.mode,
        "objective": objective,
        "experts_per_layer": problem.experts_per_layer.tolist(),
        "max_imbalance": problem.max_imbalance,
        "caps": None if caps_L is None else caps_L.tolist(),
        "survive": problem.survive,
        "max_moves": problem.max_moves,
        "replica_budget": problem.replica_budget,
        "replica_rule": problem.replica_rule.name,
        "cluster": ground,
        "shape": {name: getattr(shape, name) for name in ("batch", "hidden_size", "dtype_bytes", "kv_dim")},
        "calibration": calibration,
    }


def tokens_digest(problem: Problem) -> str:
    """`sha256:...` of what was fitted to: the expert ids of all tokens as little-endian int32, or the loads as float64,
    after their type and shape. It reads every token: seconds where there are millions.
    """
    dtype, content = ("<f8", problem.load_LE) if problem.trace is None else ("<i4", problem.trace.topk_ids)
    digest = hashlib.sha256(f"{dtype} {content.shape}".encode())
    for piece in chunks(content):
        digest.update(np.ascontiguousarray(piece, dtype=dtype).tobytes())
    return "sha256:" + digest.hexdigest()


def _link(link: Link) -> dict[str, float | None]:
    shared = link.node_bandwidth if np.isfinite(link.node_bandwidth) else None
    return {"latency": link.latency, "bandwidth": link.bandwidth, "node_bandwidth": shared}
