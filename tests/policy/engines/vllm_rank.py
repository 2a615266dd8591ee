"""One rank of vLLM's real `EplbState` on gloo, balanced by moeplace: run as a program, says what it found as JSON.

Stubbed: the groups (two gloo groups instead of vLLM's coordinators), the model (weights that name their expert), the
number of nodes, and for the asynchronous worker the streams and events of a card.

    python -m tests.policy.engines.vllm_rank RANK RANKS STORE sync|async FOLDER
"""

import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

from tests.policy.engines.stand_ins import admit

LAYERS, EXPERTS, REDUNDANT = 3, 8, 4


class Model:
    """What `MixtureOfExperts` promises; a weight is (layer, expert) so that a misplaced one names itself."""

    def __init__(self, rank: int, ranks: int) -> None:
        import torch

        slots = EXPERTS + REDUNDANT
        per_rank = slots // ranks
        mine = [slot % EXPERTS for slot in range(rank * per_rank, (rank + 1) * per_rank)]
        self.num_moe_layers, self.num_expert_groups, self.num_shared_experts = LAYERS, 1, 0
        self.num_logical_experts = self.num_routed_experts = EXPERTS
        self.num_physical_experts, self.num_redundant_experts = slots, REDUNDANT
        self.num_local_physical_experts = per_rank
        self.expert_weights = [[torch.tensor([[1000.0 * layer + e] * 4 for e in mine])] for layer in range(LAYERS)]
        self.moe_layers: list[Any] = []

    def set_eplb_state(self, *args: object) -> None:
        """The layers of a real model take views of the maps; this one has none."""


def rank_main(rank: int, ranks: int, store: str, mode: str) -> dict[str, Any]:
    """Balance three windows of drifting loads; returns maps, weights and moves."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    from moeplace.placement.policy.readiness import kernels
    from moeplace.runtime.plugins.vllm import register

    register()
    register()  # vLLM does so sometimes
    kernels().ready(wait=True)  # in a server they are compiled while the model loads
    state, model = _state(rank, ranks, mode)
    model_state = next(iter(state.model_states.values()))
    state.rearrange(is_profile=True)
    if mode == "async":
        state.start_async_loop()
    generator = torch.Generator().manual_seed(0)
    popularity = 1.0 / torch.arange(1, EXPERTS + 1)
    found = []
    for _ in range(3):
        load = (1000 * popularity * (0.1 * torch.randn(LAYERS, EXPERTS, generator=generator)).exp()).int()
        _record(model_state, load, rank)
        before = model_state.physical_to_logical_map.clone()
        state.rearrange()
        while mode == "async" and model_state.rebalanced:
            if state._all_ranks_result_ready(model_state):
                from vllm.distributed.eplb.eplb_state import _move_to_workspace

                _move_to_workspace(model_state, rank)
            time.sleep(0.001)
        after = model_state.physical_to_logical_map
        weights = [[int(x) for x in layer[0][:, 0].tolist()] for layer in model.expert_weights]
        found.append({"load": load.tolist(), "before": before.tolist(), "map": after.tolist(), "weights": weights})
    dist.barrier()
    return {"policy": state.policy.__name__, "rounds": found}


def _record(model_state: Any, load_LE: Any, rank: int) -> None:
    """As if the window had seen these loads, each expert's in its first slot, half of them on each rank."""
    import torch

    model_state.expert_load_window.zero_()
    for layer, row in enumerate(model_state.physical_to_logical_map.tolist()):
        for expert in range(EXPERTS):
            share = int(load_LE[layer, expert]) * (1 if rank == 0 else 0)
            model_state.expert_load_window[0, layer, row.index(expert)] = torch.tensor(share, dtype=torch.int32)


def _state(rank: int, ranks: int, mode: str) -> tuple[Any, Model]:
    """The real state with stubbed groups."""
    import torch
    import torch.distributed as dist
    from vllm.config.parallel import EPLBConfig
    from vllm.distributed.eplb import async_worker, eplb_communicator, eplb_state, rebalance_execute

    def group() -> Any:
        made = dist.new_group(backend="gloo")
        return types.SimpleNamespace(
            device_group=made, cpu_group=made, world_size=ranks, rank_in_group=rank, device=torch.device("cpu")
        )

    ep, eplb = group(), group()
    from vllm.distributed import parallel_state

    parallel_state._EPLB = eplb  # what `get_eplb_group` returns
    for module in (async_worker, eplb_communicator, eplb_state, rebalance_execute):
        for name, value in (("get_ep_group", lambda: ep), ("get_eplb_group", lambda: eplb)):
            if hasattr(module, name):
                setattr(module, name, value)
        if hasattr(module, "PIN_MEMORY"):
            module.PIN_MEMORY = False
    eplb_state.get_node_count = lambda: 1
    _stub_card(async_worker)
    config = EPLBConfig(
        window_size=2, step_interval=4, num_redundant_experts=REDUNDANT, use_async=mode == "async",
        policy="moeplace", communicator="torch_gloo",
    )  # fmt: skip
    parallel = types.SimpleNamespace(eplb_config=config, num_ubatches=1, enable_elastic_ep=False)
    state, model = eplb_state.EplbState(parallel, torch.device("cpu")), Model(rank, ranks)
    state.device_index = 0
    model_config = types.SimpleNamespace(model="toy", compute_hash=lambda: "toy")
    state.add_model(model, model_config)
    return state, model


def _stub_card(async_worker: Any) -> None:
    """Streams and events that a machine without a card lacks; an event is a plain one."""
    import torch
    from vllm.distributed.eplb import eplb_communicator, eplb_state, eplb_utils, rebalance_execute

    class Event:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.event = threading.Event()

        def record(self, *args: object) -> None:
            self.event.set()

        def wait(self, stream: object = None) -> None:
            self.event.wait(60)
            self.event.clear()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: object) -> float:
            return 0.0

    class Stream:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    torch.Event, torch.Stream = Event, Stream  # type: ignore[misc,assignment]
    torch.accelerator.set_device_index = lambda index: None  # type: ignore[assignment]
    torch.accelerator.current_stream = lambda *a, **k: Stream()  # type: ignore[assignment]
    torch.accelerator.current_accelerator = lambda *a, **k: torch.device("cpu")  # type: ignore[assignment]
    for module in (eplb_state, eplb_utils, eplb_communicator, async_worker, rebalance_execute):
        if hasattr(module, "CpuGpuEvent"):
            module.CpuGpuEvent = Event
        if hasattr(module, "device_stream"):
            module.device_stream = lambda stream: Stream()


if __name__ == "__main__":
    admit(Path(sys.argv[5]))
    print(json.dumps(rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])))
