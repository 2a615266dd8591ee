"""A decode pass on kept tensors is that of the engine, step after step, whatever was in the tensors before."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.measure.captured_decode import CapturedDecode, CudaRecorder, EagerRecorder, Recorder
from moeplace.runtime.models.decoder import Decoder
from tests.runtime.checkpoints import VOCABULARY, save_checkpoint

REACH = 24


def check_decode(
    path: Path, seed: int, device: str, recorder: Recorder, *, dtype: torch.dtype, tolerance: float
) -> None:
    """Prompts of several lengths run in the engine, then tokens one by one in the captured pass."""
    rng = np.random.default_rng(seed)
    group = RankGroup.from_environment(timeout=60, device=device)
    engine = Engine(path, dtype=dtype, group=group, limits=EngineLimits(max_sequences=3, max_length=REACH))
    executor = engine.executor
    assert isinstance(executor, Executor)
    assert isinstance(executor.decoder, Decoder)
    shapes = executor.fixed_shapes("dispatch-combine")
    assert shapes is not None
    captured = CapturedDecode(
        executor.decoder, executor.cache, shapes.fixed, sequences=3, reach=REACH, recorder=recorder
    )
    sequences = [rng.integers(0, VOCABULARY, 16).tolist() for _ in range(3)]
    expected = [block.cpu() for block in engine.score(sequences)]
    for sequence, start in zip(sequences, (3, 9, 6), strict=True):
        engine.add_request(Request(str(start), tuple(sequence[:start]), 10, stop_ids=()))
    while engine.scheduler.waiting:
        engine.step()
    running = sorted(engine.scheduler.running, key=lambda sequence: [3, 9, 6].index(int(sequence.request.request_id)))
    rows = torch.tensor([sequence.row for sequence in running], device=device)
    for taken in range(6):
        positions = [start + taken for start in (3, 9, 6)]
        ids = [sequence[position] for sequence, position in zip(sequences, positions, strict=True)]
        logits = captured.step(torch.tensor(ids, device=device), rows, torch.tensor(positions, device=device)).cpu()
        for found, wanted, position in zip(logits, expected, positions, strict=True):
            torch.testing.assert_close(found, wanted[position], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v2"])
def test_kept_tensors_are_all_it_depends_on(tmp_path: Path, family: str, dated_seed: int) -> None:
    """Top-1 and top-2, a sliding window, shared experts, dense layers and latents."""
    save_checkpoint(family, tmp_path)
    check_decode(tmp_path, dated_seed, "cpu", EagerRecorder(), dtype=torch.float64, tolerance=2e-5)


def test_a_reach_beyond_the_cache_is_refused(tmp_path: Path) -> None:
    """It names both numbers."""
    save_checkpoint("olmoe", tmp_path)
    engine = Engine(tmp_path, limits=EngineLimits(max_length=8))
    executor = engine.executor
    assert isinstance(executor, Executor)
    shapes = executor.fixed_shapes("dispatch-combine")
    assert shapes is not None
    with pytest.raises(InputError, match=r"reach \(9\) must lie in 1\.\.8"):
        CapturedDecode(executor.decoder, executor.cache, shapes.fixed, sequences=1, reach=9, recorder=EagerRecorder())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_graph_is_the_same(tmp_path: Path, family: str) -> None:
    """The pass as a CUDA graph; of sizes and a type that grouped products take, others are looped over on the host."""
    save_checkpoint(family, tmp_path, intermediate_size=16)
    check_decode(tmp_path, 5, "cuda:0", CudaRecorder(), dtype=torch.bfloat16, tolerance=0.2)
