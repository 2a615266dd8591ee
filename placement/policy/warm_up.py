"""`python -m moeplace.placement.policy.warm_up` compiles the kernels of the policy, and those alone."""

import os

import numpy as np

from moeplace.placement.policy.affinity import Ask, with_affinity
from moeplace.placement.policy.balance import balance
from moeplace.placement.policy.recording import Recording
from moeplace.placement.policy.request import Request
from moeplace.profiling.kernel_cache import NO_WARM_UP, POLICY_WARM_UP, mark_compiled


def use_kernels() -> None:
    """Use every kernel that `balance` may use: from nothing, from a map, from one that lacks experts; with steps."""
    experts, ranks = 8, 4
    load_TLE = np.arange(1.0, 1 + 3 * 2 * experts).reshape(3, 2, experts)
    start_LS = np.tile(np.arange(ranks * 3) % experts, (2, 1))
    short_LS = np.where(np.arange(ranks * 3) < 6, start_LS, -1)
    tokens_LTK = np.arange(2 * 40 * 3).reshape(2, 40, 3) * 3 % experts
    recording = Recording(tokens_LTK.astype(np.int32), np.full(2, experts), np.arange(2), 2)
    for previous in (None, start_LS, short_LS):
        request = Request(load_TLE, ranks, 3, nodes=2, groups=2, previous=previous, max_moves=4)
        with_affinity(request, balance(request.without_limits()), Ask(recording, "nearest-static", 1.1, 0.01))
        balance(request)


if __name__ == "__main__":
    os.environ[NO_WARM_UP] = "1"
    use_kernels()
    mark_compiled(POLICY_WARM_UP)
