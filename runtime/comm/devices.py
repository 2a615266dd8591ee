"""Which device a rank computes on."""

from typing import Protocol

import torch

from moeplace.profiling.errors import InputError

DEVICES = ("auto", "cpu", "cuda")


class Machine(Protocol):
    """What there is to choose from."""

    def gpus(self) -> int:
        """GPUs that this process sees."""


class ThisMachine:
    """The machine that runs this."""

    def gpus(self) -> int:
        """See `Machine`."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_of(wanted: str, place: int, machine: Machine) -> torch.device:
    """The device of the rank that is number `place` among those of its machine.

    Args:
        wanted: cpu, cuda (a GPU for each rank), or auto: cuda where there are GPUs.

    Raises:
        InputError: there is no GPU for it: NCCL takes one rank per GPU.
    """
    if wanted not in DEVICES:
        raise InputError(f"device {wanted!r} must be one of {', '.join(DEVICES)}")
    gpus = 0 if wanted == "cpu" else machine.gpus()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise InputError("device cuda needs a GPU, and this machine has none that torch can use; device cpu needs none")
    if place >= gpus:
        raise InputError(
            f"rank number {place + 1} of this machine has no GPU: there are {gpus}, and each rank needs its own; "
            f"start at most {gpus} ranks here, or choose device cpu"
        )
    return torch.device("cuda", place)
