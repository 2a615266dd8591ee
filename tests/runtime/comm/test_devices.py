"""The device of a rank, on machines that are made up."""

from dataclasses import dataclass

import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm import group
from moeplace.runtime.comm.devices import device_of


@dataclass(frozen=True)
class MadeUp:
    """A machine with so many GPUs."""

    count: int

    def gpus(self) -> int:
        return self.count


def test_auto_takes_gpus_where_there_are_any() -> None:
    """One for each rank of the machine; a machine without any computes on its CPUs."""
    assert [device_of("auto", place, MadeUp(3)) for place in range(3)] == [torch.device("cuda", n) for n in range(3)]
    assert device_of("auto", 7, MadeUp(0)) == torch.device("cpu")


@pytest.mark.parametrize("gpus", [0, 2])
def test_cpu_is_taken_at_its_word(gpus: int) -> None:
    """Also beside GPUs, by any number of ranks."""
    assert device_of("cpu", 9, MadeUp(gpus)) == torch.device("cpu")


@pytest.mark.parametrize(
    ("wanted", "place", "gpus", "sentence"),
    [
        ("cuda", 0, 0, "needs a GPU, and this machine has none"),
        ("cuda", 2, 2, "rank number 3 of this machine has no GPU: there are 2"),
        ("auto", 1, 1, "start at most 1 ranks here"),
        ("tpu", 0, 1, "device 'tpu' must be one of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_is_said(wanted: str, place: int, gpus: int, sentence: str) -> None:
    """No rank shares the GPU of another: NCCL would not have it."""
    with pytest.raises(InputError, match=sentence):
        device_of(wanted, place, MadeUp(gpus))


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_group_of_torchrun_asks_for_its_own_gpu(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of the process on its machine, before anything connects."""
    monkeypatch.setattr(group, "ThisMachine", lambda: MadeUp(2))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="rank number 3 of this machine has no GPU"):
        group.RankGroup.from_environment(timeout=20, device=wanted)
    alone = group.RankGroup.from_environment(timeout=20, device="cpu")
    assert alone.device == torch.device("cpu")
    alone.close()
