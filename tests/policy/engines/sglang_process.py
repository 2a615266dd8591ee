"""SGLang's real hook registry, balancer and expert locations in one process: a program that says so as JSON.

Stubbed: the packages above these modules (their `__init__` files import kernels of a card) and SGLang's run-time
context (sizes, flags, the map in force), which is a plain object here.

    python -m tests.policy.engines.sglang_process FOLDER
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

LAYERS, EXPERTS, RANKS, SLOTS = 4, 16, 4, 24
"""Decoder layers, of which the first is dense; S."""


def admit(folder: Path) -> Any:
    """Let the real modules be imported without the `__init__` files above them; returns the stubbed context."""
    context = types.SimpleNamespace(
        moe=types.SimpleNamespace(
            ep_num_redundant_experts=SLOTS - EXPERTS,
            eplb_algorithm="auto",
            ep_dispatch_algorithm="static",
            ep_join_mode=None,
        ),
        expert_location_metadata=None,
        device="cpu",
        ep_size=RANKS,
        nnodes=1,
        elastic_ep_initial_size=None,
        tp_size=RANKS,
    )
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb", "sglang.srt.plugins", "sglang.srt.elastic_ep"):
        module = types.ModuleType(name)
        module.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = module
    elastic: Any = types.ModuleType("sglang.srt.elastic_ep.elastic_ep")
    elastic.elastic_expanded_world_enabled = lambda: False
    elastic.ElasticEPStateManager = types.SimpleNamespace(instance=lambda: None)
    runtime: Any = types.ModuleType("sglang.srt.runtime_context")
    runtime.get_device = runtime.get_exec = runtime.get_parallel = runtime.get_resources = lambda: context
    sys.modules[elastic.__name__], sys.modules[runtime.__name__] = elastic, runtime
    return context


def main(folder: Path) -> dict[str, Any]:
    """Plan twice through `init_by_eplb`, as SGLang's manager does, on one rank after the other."""
    context = admit(folder)
    import torch
    from sglang.srt.eplb import expert_location
    from sglang.srt.plugins.hook_registry import HookRegistry

    from moeplace.runtime.plugins.sglang import register

    register()
    HookRegistry.apply_hooks()
    model = types.SimpleNamespace(num_layers=LAYERS, num_logical_experts=EXPERTS, num_groups=None)
    expert_location.ModelConfigForExpertLocation.from_model_config = staticmethod(lambda config: model)
    torch.distributed.get_rank = lambda *group: 0
    generator = torch.Generator().manual_seed(1)
    popularity = 1.0 / torch.arange(1, EXPERTS + 1)
    found: dict[str, Any] = {"rounds": [], "hooks": sorted(HookRegistry._patched)}
    for _ in range(2):
        load = (1000 * popularity * (0.2 * torch.randn(6, LAYERS, EXPERTS, generator=generator)).exp()).int()
        load[:, 0] = 0
        made = expert_location.ExpertLocationMetadata.init_by_eplb(None, load)
        before = context.expert_location_metadata
        found["rounds"].append(
            {
                "load": load.tolist(),
                "before": None if before is None else before.physical_to_logical_map.tolist(),
                "map": made.physical_to_logical_map.tolist(),
                "slots": made.logical_to_all_physical_map.tolist(),
                "counts": made.logical_to_all_physical_map_num_valid.tolist(),
            }
        )
        context.expert_location_metadata = made
    found["repeated"] = repeated(context, expert_location.ExpertLocationMetadata)
    return found


def repeated(context: Any, metadata: Any) -> dict[str, Any]:
    """Serve with a map of SGLang's own balancer, which has experts twice on a rank, and plan from there."""
    import torch
    from sglang.srt.eplb.eplb_algorithms import deepseek

    popularity = 1.0 / torch.arange(1, EXPERTS + 1) ** 2
    load = (1000 * popularity * torch.ones(1, LAYERS, EXPERTS)).int()
    load[:, 0] = 0
    own = deepseek.rebalance_experts(
        weight=load.sum(dim=0), num_replicas=SLOTS, num_groups=None, num_nodes=1, num_gpus=RANKS,
        enable_hierarchical=False,
    )  # fmt: skip
    context.expert_location_metadata = metadata._init_raw(
        ep_size=RANKS, physical_to_logical_map=own[0], logical_to_all_physical_map=own[1]
    )
    made = metadata.init_by_eplb(None, load.flip(2))
    return {
        "before": own[0].tolist(),
        "map": made.physical_to_logical_map.tolist(),
        "slots": made.logical_to_all_physical_map.tolist(),
        "counts": made.logical_to_all_physical_map_num_valid.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
