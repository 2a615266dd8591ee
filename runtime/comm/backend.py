"""The back end of a process group: how it is made, and what of its errors means that a peer is gone."""

import re
from datetime import timedelta

import torch
import torch.distributed as dist

from moeplace.runtime.comm.watch import CollectiveWatch

_SIGNS = ("gloo/transport", "gloo/rendezvous", "connect", "timed out", "timeout", "broken pipe", "reset by peer")
"""What gloo and the stores say, in lower case, when a peer cannot be heard any more."""
_ENFORCED = "enforce fail"
"""How gloo and torch begin what is wrong on this side: sizes that do not fit, memory that does not suffice."""


def make_process_group(
    store: dist.Store, rank: int, size: int, timeout: float, device: torch.device
) -> "dist.ProcessGroup":
    """A raw process group, NCCL's for CUDA devices and gloo's else; returns once all ranks have come."""
    limit = timedelta(seconds=timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        torch.cuda.set_device(device)
        return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
    return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, limit)


def watch_over(group: "dist.ProcessGroup", device: torch.device, timeout: float) -> CollectiveWatch | None:
    """Who gives up collectives of a group that do not end; None = its own `wait` does."""
    return None if device.type == "cpu" else CollectiveWatch(group.abort, timeout=timeout)


def tells_of_lost_peer(error: Exception) -> bool:
    """Whether an error of a collective or a store means that a peer is gone, and not that this rank is at fault."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return _ENFORCED not in text and any(sign in text for sign in _SIGNS)


def first_sentence(text: str) -> str:
    """gloo's message without the source file in front and the advice behind."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(text.split()))
    return text.split(". ")[0][:160]
