"""vLLM's real parser, configuration and own policy in one process: run as a program, says what it found as JSON.

python -m tests.policy.engines.vllm_process FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.policy.engines.stand_ins import admit


def refusal(call: Any) -> str | None:
    """What a call says when it refuses; None if it does not."""
    try:
        call()
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> dict[str, Any]:
    """Try configurations before and after the plug-in, through vLLM's own loader of plug-ins."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()  # the wheel is one for cards
    from vllm.config.parallel import EPLBConfig, ParallelConfig

    refused = refusal(lambda: EPLBConfig(policy="moeplace"))
    from vllm.plugins import load_general_plugins

    from moeplace.runtime.plugins import vllm as plugin

    load_general_plugins()  # finds the entry point where moeplace is installed
    plugin.register()
    from vllm.distributed.eplb.policy import EPLB_POLICIES
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    def chosen(text: str) -> list[Any]:
        told = parser.parse_args(["--eplb-config", text]).eplb_config
        config = told if isinstance(told, EPLBConfig) else EPLBConfig(**told)
        return [config.policy, config.use_async, ParallelConfig(eplb_config=config).eplb_config.policy]

    nccl = {"policy": "moeplace", "communicator": "torch_nccl"}
    return {
        "before": refused,
        "asynchronous": chosen('{"policy": "moeplace"}'),
        "synchronous": chosen('{"policy": "moeplace-file", "use_async": false}'),
        "default": chosen("{}"),
        "unknown": refusal(lambda: EPLBConfig(policy="other")),
        "still checked": refusal(lambda: EPLBConfig(**nccl)),
        "policies": {name: policy.__name__ for name, policy in EPLB_POLICIES.items()},
        "elastic": elastic(EPLB_POLICIES["moeplace"]),
        "repeated": repeated(EPLB_POLICIES["moeplace"]),
        "hopeless": hopeless(EPLB_POLICIES["moeplace"]),
    }


def elastic(policy: Any) -> dict[str, Any]:
    """Two ranks become three and one."""
    import torch

    load = torch.tensor([[90, 10, 20, 30, 40, 50]], dtype=torch.int32)
    old = torch.tensor([[0, 1, 2, 3, 0, 5, 4, 0]])
    more = torch.tensor([[0, 1, 2, 3, 0, 5, 4, 0, -1, -1, -1, -1]])
    return {
        "grown": policy.rebalance_experts(load, 12, 1, 1, 3, more).tolist(),
        "shrunk": policy.rebalance_experts(load, 8, 1, 1, 2, more).tolist(),
        "first": policy.rebalance_experts(load, 8, 1, 1, 2, None).tolist(),
        "same": policy.rebalance_experts(load, 8, 1, 1, 2, old).tolist(),
    }


def repeated(policy: Any) -> list[Any]:
    """[a map of vLLM's own policy, which has experts twice on a rank; ours from there, for other loads]."""
    import torch
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    load = torch.tensor([[900, 400, 30, 20, 10, 5], [5, 10, 900, 20, 30, 800]], dtype=torch.int32)
    own = DefaultEplbPolicy.rebalance_experts(load, 12, 1, 1, 2, None)
    return [own.tolist(), policy.rebalance_experts(load.flip(1), 12, 1, 1, 2, own).tolist()]


def hopeless(policy: Any) -> bool:
    """Loads that nobody can balance, in a width that cannot go on: vLLM's own policy answers."""
    import torch
    from vllm.distributed.eplb.policy import DefaultEplbPolicy

    load, old = torch.tensor([[float("nan"), 1.0, 2.0, 3.0]]), torch.tensor([[0, 1, -1, -1]])
    ours = policy.rebalance_experts(load, 4, 1, 1, 2, old)
    return bool(torch.equal(ours, DefaultEplbPolicy.rebalance_experts(load, 4, 1, 1, 2, old)))


if __name__ == "__main__":
    admit(Path(sys.argv[1]))
    print(json.dumps(main()))
