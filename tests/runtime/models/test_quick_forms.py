"""Quick forms of norms and of the attention of single tokens: taken where they are the module's, and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.models import opening
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.models.quick_norm import QuickNorm, quicken_norms
from tests.runtime.checkpoints import save_checkpoint

QUICK = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
OTHERS = ("deepseek_v2", "gpt_oss")
"""Latent attention; attention with sinks."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class Norm(nn.Module):
    """As `transformers` has it, with a twist where one is wanted."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.variance_epsilon, self._twist = 1e-5, twist

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        if self._twist == "centred":
            y = y - y.mean(-1, keepdim=True)
        epsilon = 1e-4 if self._twist == "another epsilon" else self.variance_epsilon
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon)
        weight = 1 + self.weight if self._twist == "one more" else self.weight
        return weight * y.to(x.dtype)


@pytest.mark.parametrize("twist", ["", "centred", "another epsilon", "one more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_differ_keep_their_modules(twist: str, dtype: torch.dtype) -> None:
    """A mean taken off, an epsilon, weights from one on: each shows on the rows that are tried."""
    model = nn.Sequential(Norm(twist), nn.LayerNorm(16), nn.Linear(16, 16)).to(dtype)
    assert quicken_norms(model, dtype) == (not twist)
    assert quicken_norms(nn.Sequential(Norm()).double(), torch.float64) == 0  # the module rounds to float32
    x = torch.randn(3, 16, dtype=dtype)
    expected = Norm.forward(model[0], x)
    torch.testing.assert_close(model[0](x), expected, rtol=TOLERANCES[dtype], atol=1e-5)
    assert isinstance(model[0].forward, QuickNorm) == (not twist)


def open_family(family: str, folder: Path, dtype: torch.dtype, **changes: Any) -> Decoder:
    save_checkpoint(family, folder, **changes)
    decoder = open_model(Checkpoint(folder), dtype=dtype)
    assert isinstance(decoder, Decoder)
    return decoder


@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_which_families_are_quick(tmp_path: Path, family: str) -> None:
    """Those whose attention has four projections, norms at most, and turns halves of heads. No memory twice."""
    decoder = open_family(family, tmp_path, torch.float64)
    assert decoder.is_quick == (family in QUICK)
    if decoder.is_quick:
        attention = decoder._layers[0].self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        assert len({projection.weight.untyped_storage().data_ptr() for projection in projections}) == 1


def test_attention_that_differs_keeps_its_module(tmp_path: Path) -> None:
    """Clipped projections, which no parameter shows."""
    assert not open_family("olmoe", tmp_path, torch.float64, clip_qkv=0.01).is_quick


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_forms_give_what_modules_give(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of sequences of several lengths, decoded together, with and without the quick forms."""
    save_checkpoint(family, tmp_path)
    sequences = [[(3 + 7 * n + 5 * position) % 60 for position in range(9 + 2 * n)] for n in range(4)]
    found = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(opening.Decoder, "quicken", lambda self: None)
        engine = Engine(tmp_path, dtype=dtype, limits=EngineLimits(max_sequences=4, max_length=24))
        assert engine.executor.decoder.is_quick == quick  # type: ignore[union-attr]
        logits = engine.score(sequences, prompt_lengths=[2, 5, 3, 1])
        found.append(torch.cat(logits).float())
    scale = float(found[1].abs().max())
    close = (found[0] - found[1]).abs().amax(1) <= TOLERANCES[dtype] * scale
    assert close.float().mean() >= (1.0 if dtype == torch.float32 else 0.9)  # near-ties of routers may fall otherwise
