"""vLLM: the policies `moeplace` and `moeplace-file` for its expert load balancer (written for 0.33).

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). It adds both names to what
`--eplb-config '{"policy": ...}'` takes, asynchronous balancing included; where the configuration cannot change,
`MOEPLACE_POLICY` puts one in the place of "default". vLLM asks the policy on every rank and carries out what each rank
was told, without comparing: here ranks compare, in one small all-reduce of the group that the weights travel in.

On any doubt the answer is the map in force, or, where that cannot go on because ranks came or went, vLLM's own policy.
"""

import hashlib
import logging
from typing import Any, Literal

import numpy as np
import torch

from moeplace.placement.policy.answer import Answer, keep, why_not
from moeplace.placement.policy.engine_side import Asked, of_the_file, planned
from moeplace.placement.policy.in_force import of_width
from moeplace.placement.policy.settings import BALANCE, FILE, Settings

_log = logging.getLogger("moeplace.policy")
RULE = "hash"
"""Which replica serves a token (`placement/cost/replica_rule`)."""


class Balance:
    """Plans from the loads of the window, near the map in force. The interface is vLLM's `AbstractEplbPolicy`."""

    answer = staticmethod(planned)

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(L, S) int64 expert of every slot, on the CPU.

        Args:
            weight: (L, E) loads of the window.
            num_replicas: S.
            num_groups: expert groups of the router.
            num_nodes: of the ranks.
            num_ranks: R, fewer or more than in the old map under elastic expert parallelism.
            old_global_expert_indices: (L, S) map in force, -1 = a slot of a rank that is new.
        """
        old_LS = _array(old_global_expert_indices)
        steady = old_LS is not None and old_LS.shape[1] == num_replicas and bool((old_LS >= 0).all())
        before = None if old_LS is None else of_width(old_LS, num_replicas)
        load_LE = weight.detach().cpu().numpy()
        asked = Asked(load_LE, num_ranks, num_replicas // num_ranks, num_nodes, num_groups, before, not steady, RULE)
        shape = (*load_LE.shape, num_replicas)
        try:
            answer = cls.answer(asked)
        except Exception as error:  # other ranks wait in the all-reduce: go there, with nothing
            answer = keep(before, shape, str(error))
        if steady and not ranks_agree(answer):
            return torch.from_numpy(old_LS.astype(np.int64))  # type: ignore[union-attr]  # steady: there is one
        wrong = answer.reason and why_not(answer.map, shape, asked.slots_per_rank, twice=True)
        if wrong or (answer.reason and before is None):
            _log.warning("moeplace leaves this map to vLLM's own policy: %s", answer.reason)
            return _own_policy().rebalance_experts(
                weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
            )
        return torch.from_numpy(answer.map.astype(np.int64))


class FromFile(Balance):
    """Loads the placement of `MOEPLACE_PLACEMENT` as it is, at every re-arrangement: after the first nothing moves."""

    answer = staticmethod(of_the_file)


POLICIES: dict[str, type[Balance]] = {BALANCE: Balance, FILE: FromFile}


def register() -> None:
    """Called by vLLM when it loads its plug-ins, possibly more than once.

    Raises:
        ValueError: an environment variable breaks its rule; the server stops before it loads anything.
    """
    settings = Settings.of_environment()
    settings.check_trace()
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # it checks its names against the configuration's: first

    EPLB_POLICIES.update(POLICIES)
    if settings.policy is not None:
        EPLB_POLICIES["default"] = POLICIES[settings.policy]
    _widen_configuration()


def ranks_agree(answer: Answer) -> bool:
    """Whether all ranks have the same plan; where there is only one, or no group yet, it agrees with itself.

    In the group that expert weights travel in, which vLLM uses here and now, in its own thread where that is
    asynchronous.
    """
    try:
        from vllm.distributed.parallel_state import get_eplb_group

        group: Any = get_eplb_group().cpu_group
        if group.size() < 2:
            return True
    except (ImportError, AssertionError, AttributeError):
        return True
    digest = int.from_bytes(hashlib.sha256(answer.map.tobytes()).digest()[:6], "little")
    found = torch.tensor([answer.reason is None, digest, -digest], dtype=torch.int64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN, group=group)
    ready, least, most = found[0].item(), found[1].item(), -found[2].item()
    if ready and least != most:
        _log.error("moeplace keeps the map of experts in force: ranks found different plans")
    return bool(ready) and least == most


def _array(slots: torch.Tensor | None) -> np.ndarray | None:
    return None if slots is None else slots.detach().cpu().numpy()


def _own_policy() -> Any:
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    return DefaultEplbPolicy


def _widen_configuration() -> None:
    """Let `EPLBConfig.policy` be one of ours, with asynchronous balancing too."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import parallel

    option = Literal["default", "moeplace", "moeplace-file"]
    if parallel.EPLBPolicyOption == option:
        return
    parallel.EPLBPolicyOption = option
    config = parallel.EPLBConfig
    config.__annotations__["policy"] = option
    config.__dataclass_fields__["policy"].type = option
    _admit_asynchronous(config)
    rebuild_dataclass(config, force=True)
    rebuild_dataclass(parallel.ParallelConfig, force=True)


def _admit_asynchronous(config: Any) -> None:
    """Have vLLM's check of its configuration see "default" in the place of our names; asynchronous, it refuses others.

    Ours may be asked from any thread, so what the check is about does not concern them.
    """
    decorator = config.__pydantic_decorators__.model_validators["_validate_eplb_config"]
    check = decorator.func

    def checked(self: Any) -> Any:
        chosen = self.policy
        if chosen not in POLICIES:
            return check(self)
        object.__setattr__(self, "policy", "default")
        try:
            return check(self)
        finally:
            object.__setattr__(self, "policy", chosen)

    decorator.func = checked
