"""SGLang: a hook around its expert balancer, in its plug-in frame (written for 0.5.23).

SGLang calls `register` in each of its processes (entry point `sglang.srt.plugins`). Where `MOEPLACE_POLICY` is set, it
puts `rebalance_experts` around SGLang's function of that name; `--eplb-algorithm` stays `auto`. SGLang gives the loads
of every recorded step, which are used: an expert whose load varies gets some room for it. The map in force is SGLang's
own and the plan stays near it.

Ranks are not asked whether they agree: after a change of width SGLang asks one of them alone. They agree because they
plan the same from the same loads; each waits for the compiler, once per installation, instead of answering differently.
A trace is a file, which a node may lack: with one they compare, in the group that SGLang has just summed the loads in,
and plan by loads alone where they differ, and after a change of width.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moeplace.placement.policy.answer import Answer, why_not
from moeplace.placement.policy.engine_side import Asked, planned
from moeplace.placement.policy.in_force import of_width
from moeplace.placement.policy.settings import FILE, POLICY_VARIABLE, Settings

_log = logging.getLogger("moeplace.policy")
TARGET = "sglang.srt.eplb.eplb_algorithms.rebalance_experts"
Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(L, S) expert of every slot; (L, E, X) slots of every expert, -1 behind them; (L, E) their numbers."""


def register() -> None:
    """Called by SGLang when it loads its plug-ins.

    Raises:
        ValueError: an environment variable breaks its rule; SGLang logs it and goes on with its own balancer.
    """
    policy = Settings.of_environment().policy
    if policy is None:
        return
    if policy == FILE:
        raise ValueError(f"{POLICY_VARIABLE}={FILE} is for vLLM; SGLang reads a file by --init-expert-location")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, rebalance_experts, HookType.AROUND)


def rebalance_experts(
    own: Callable[..., Maps],
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> Maps:
    """What SGLang's function returns, planned by moeplace; its own answer on any doubt that has no map in force.

    Args:
        own: SGLang's function.
        tokens_per_expert: (steps, L*, E) loads; dense layers are rows of zeros.
        num_physical_experts: S.
        num_local_physical_experts: C.
        num_groups: expert groups of the router, or None.
        num_nodes: of the ranks.
        algorithm: SGLang's choice. The ones that leave out dead ranks are left to SGLang.
    """

    def by_engine() -> Maps:
        return own(
            tokens_per_expert=tokens_per_expert,
            num_physical_experts=num_physical_experts,
            num_local_physical_experts=num_local_physical_experts,
            num_groups=num_groups,
            num_nodes=num_nodes,
            algorithm=algorithm,
        )

    if str(getattr(algorithm, "name", algorithm)).startswith("elasticity_aware"):
        return by_engine()
    try:
        load_TLE = tokens_per_expert.detach().cpu().numpy()
        before = _map_in_force(num_physical_experts)
        ranks = num_physical_experts // num_local_physical_experts
        asked = Asked(load_TLE, ranks, num_local_physical_experts, num_nodes, num_groups or 1, before, True, _rule())
        answer = _planned_alike(asked, tokens_per_expert.device)
        if answer.reason is not None and (before is None or _unfit(answer, load_TLE, num_local_physical_experts)):
            _log.warning("moeplace leaves this map to SGLang's own balancer: %s", answer.reason)
            return by_engine()
        return _maps(answer.map, load_TLE.shape[-1], tokens_per_expert.device)
    except Exception:
        _log.exception("moeplace leaves this map to SGLang's own balancer")
        return by_engine()


def _planned_alike(asked: Asked, device: torch.device) -> Answer:
    """The same plan on all ranks: with the trace where all find the same with it, else by loads alone."""
    by_loads = replace(asked, use_trace=False)
    if Settings.of_environment().trace is None or not _all_are_asked():
        return planned(by_loads)
    answer = planned(asked)
    if ranks_agree(answer, device):
        return answer
    _log.error("moeplace plans by loads alone: ranks found different plans with their files of MOEPLACE_TRACE")
    return planned(by_loads)


def ranks_agree(answer: Answer, device: torch.device) -> bool:
    """Whether all ranks have the same plan; a rank that is alone agrees with itself."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        return True
    digest = int.from_bytes(hashlib.sha256(answer.map.tobytes()).digest()[:6], "little")
    found = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
    return found[0].item() == -found[1].item()


def _all_are_asked() -> bool:
    """Whether SGLang asks every rank now, as it does until it has scaled."""
    try:
        from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager
    except ImportError:
        return False
    state = ElasticEPStateManager.instance()
    return state is None or not state.has_scaled


def _rule() -> str:
    """Name of the replica rule that SGLang follows (`placement/cost/replica_rule`)."""
    from sglang.srt.runtime_context import get_exec

    return "nearest-static" if get_exec().moe.ep_dispatch_algorithm in (None, "static") else "random"


def _unfit(answer: Answer, load_TLE: np.ndarray, slots_per_rank: int) -> bool:
    """Whether a map that is kept cannot go on."""
    shape = (load_TLE.shape[-2], load_TLE.shape[-1], answer.map.shape[1])
    return why_not(answer.map, shape, slots_per_rank, twice=True) is not None


def _map_in_force(slots: int) -> np.ndarray | None:
    """(L*, S) map that SGLang serves with, in the width that it asks for; None before it has one."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:
        return None
    return of_width(metadata.physical_to_logical_map_cpu.cpu().numpy(), slots)


def _maps(slots_LS: np.ndarray, experts: int, device: torch.device) -> Maps:
    """The three tensors that SGLang takes."""
    layers, slots = slots_LS.shape
    counts_LE = np.zeros((layers, experts), np.int64)
    np.add.at(counts_LE, (np.arange(layers)[:, None], slots_LS), 1)
    where_LEX = np.full((layers, experts, int(counts_LE.max(initial=1))), -1, np.int64)
    order_LS = np.argsort(slots_LS, axis=1, kind="stable")
    expert_LS = np.take_along_axis(slots_LS, order_LS, axis=1)
    starts_LE = np.cumsum(counts_LE, axis=1) - counts_LE
    index_LS = np.arange(slots) - np.take_along_axis(starts_LE, expert_LS, axis=1)
    where_LEX[np.arange(layers)[:, None], expert_LS, index_LS] = order_LS
    tensors = [torch.from_numpy(each).to(device) for each in (slots_LS.astype(np.int64), where_LEX, counts_LE)]
    return tensors[0], tensors[1], tensors[2]
