"""How a checkpoint's model is opened: cut at its MoE layers only where the parts are the whole, else run whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.olmoe import modeling_olmoe as olmoe

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.recording.stored_tensors import StoredTensors
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.verification import verify_engine
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.models.whole import WholeModel
from tests.model_families import plain_logits, save_family, small_config
from tests.runtime.checkpoints import FAMILIES, save_checkpoint

PLAIN_BLOCK = olmoe.OlmoeSparseMoeBlock
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [11, 12, 13, 14, 15]]


class LoudBlock(olmoe.OlmoeSparseMoeBlock):
    """An MoE block with a part of its own beside router and experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.megaphone = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * torch.tanh(self.megaphone(hidden))


class SharingBlock(LoudBlock):
    """The same part as a shared expert: this may be cut."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return PLAIN_BLOCK.forward(self, hidden) + self.megaphone(hidden)


class ScaledBlock(olmoe.OlmoeSparseMoeBlock):
    """A factor that no parameter shows."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(hidden)


class ClampedLayer(olmoe.OlmoeDecoderLayer):
    """Something after the second addition."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).clamp(-1, 1)


class NormedLayer(olmoe.OlmoeDecoderLayer):
    """A norm behind the layer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.last_layernorm = olmoe.OlmoeRMSNorm(config.hidden_size)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.last_layernorm(super().forward(*args, **kwargs))


class ScaledHead(olmoe.OlmoeForCausalLM):
    """Logits that are divided, as some families do: the family's own head is run, so this may be cut."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 3
        return out


@pytest.mark.parametrize(
    ("name", "changed", "kind"),
    [
        ("OlmoeSparseMoeBlock", LoudBlock, WholeModel),
        ("OlmoeSparseMoeBlock", SharingBlock, Decoder),
        ("OlmoeSparseMoeBlock", ScaledBlock, WholeModel),
        ("OlmoeDecoderLayer", ClampedLayer, WholeModel),
        ("OlmoeDecoderLayer", NormedLayer, WholeModel),
        ("OlmoeForCausalLM", ScaledHead, Decoder),
    ],
)
def test_a_family_to_come_is_served_exactly_or_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changed: type, kind: type
) -> None:
    """A model that differs from a known one in a module, a norm, a factor or its head gives its own logits."""
    if name == "OlmoeForCausalLM":
        mapping = {**vars(olmoe)}
        changed.__name__, changed.__module__ = name, mapping[name].__module__
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as models

        monkeypatch.setitem(models._extra_content, olmoe.OlmoeConfig, changed)
    else:
        monkeypatch.setattr(olmoe, name, changed)
    save_checkpoint("olmoe", tmp_path, num_experts_per_tok=2)
    engine = Engine(tmp_path, mode="dispatch-combine", dtype=torch.float64, limits=EngineLimits(max_length=16))
    assert type(engine.executor.decoder) is kind
    served = engine.score(SEQUENCES, prompt_lengths=[5, 1, 2])
    for ours, plain in zip(served, plain_logits(tmp_path, SEQUENCES), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_known_families_are_cut_in_every_number_type(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Rounding of 16-bit numbers does not pass for a difference."""
    save_checkpoint(family, tmp_path)
    assert isinstance(open_model(Checkpoint(tmp_path), dtype=dtype), Decoder)


def test_a_whole_model_refuses_coherent_and_auto_avoids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sentence says why; `auto` of a placement that was made for coherent serves in another mode."""
    monkeypatch.setattr(olmoe, "OlmoeSparseMoeBlock", ScaledBlock)
    save_checkpoint("olmoe", tmp_path)
    with pytest.raises(InputError, match=r"olmoe cannot be served in mode coherent \(because decoder layer 0 is"):
        Engine(tmp_path, mode="coherent")
    engine = Engine(tmp_path, mode="auto")
    coherent = engine.placement.replace(mode="coherent")
    served = Engine(tmp_path, coherent, mode="auto", dtype=torch.float64).score(SEQUENCES)
    for ours, plain in zip(served, plain_logits(tmp_path, SEQUENCES), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def failing(fail_at: int) -> Callable[..., torch.Tensor]:
    """A dispatcher's `sum_experts` that breaks at a call."""
    calls = [0]

    def sum_experts(layer: int, tokens: Any, step: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == fail_at:
            raise RuntimeError("a peer is gone")
        return torch.zeros_like(tokens.hidden)

    return sum_experts


def test_a_broken_pass_leaves_no_state_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exchange that fails in the middle, sequences count as unseen: their tokens are run from the first."""
    monkeypatch.setattr(olmoe, "OlmoeSparseMoeBlock", ScaledBlock)
    save_checkpoint("olmoe", tmp_path)
    engine = Engine(tmp_path, mode="allgather", dtype=torch.float64)
    for index, ids in enumerate(SEQUENCES):
        engine.add_request(Request(str(index), tuple(ids), max_new_tokens=4, stop_ids=()))
    engine.step()
    assert [s.cached for s in engine.scheduler.running] == [8, 1, 5]
    dispatcher = engine.executor.dispatcher("allgather")
    with monkeypatch.context() as broken:
        broken.setattr(dispatcher, "sum_experts", failing(2))
        with pytest.raises(RuntimeError, match="a peer is gone"):
            engine.step()
    assert [s.cached for s in engine.scheduler.running] == [0, 0, 0]


def test_an_alias_is_served_by_the_architecture_that_it_states(tmp_path: Path) -> None:
    """Kimi-K2 brings a model type and code of its own, and states DeepSeek-V3's class; a made-up class is refused."""
    save_checkpoint("deepseek_v3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = Engine(tmp_path, mode="coherent", dtype=torch.float64)
    verify_engine(engine)
    assert isinstance(engine.executor.decoder, Decoder)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MadeUpForCausalLM"]}))
    with pytest.raises(FormatError, match="does not describe a causal language model"):
        Checkpoint(tmp_path)


def test_a_language_model_inside_another_model_is_served(tmp_path: Path) -> None:
    """A checkpoint of text and vision: its language model, by the names that `transformers` gives the tensors."""
    text = small_config("qwen3_5_moe_text")
    config = transformers.Qwen3_5MoeConfig(text_config=text.to_dict())
    for name, value in {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2}.items():
        setattr(config.vision_config, name, value)
    config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    engine = Engine(tmp_path, mode="dispatch-combine", dtype=torch.float64)
    verify_engine(engine)
    assert engine.checkpoint.num_hidden_layers == text.num_hidden_layers


@pytest.mark.parametrize("family", ["nemotron_h", "granitemoe", "longcat_flash", "minimax_m2", "gpt_oss"])
def test_a_rank_reads_its_own_experts_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """One tensor per expert: no other's is touched. One per layer: nothing but rows of its own experts is read."""
    save_family(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    own, touched = [1, 2, 5], set()
    plain = StoredTensors.slice_of

    class Watched:
        def __init__(self, name: str, source: Any) -> None:
            self._name, self._source = name, source

        def __getitem__(self, index: Any) -> torch.Tensor:
            rows = range(self._source.get_shape()[0])[index] if isinstance(index, slice) else index
            touched.add((self._name, tuple(rows) if isinstance(rows, range) else rows))
            return self._source[index]

    monkeypatch.setattr(StoredTensors, "slice_of", lambda self, name: Watched(name, plain(self, name)))
    for layer in range(checkpoint.num_layers):
        for expert in own:
            checkpoint.expert(layer, expert)
    assert touched
    for name, rows in touched:
        number = re.search(r"experts\.(\d+)\.", name)
        expert = rows if number is None else int(number.group(1))
        assert expert in own or (isinstance(expert, tuple) and len(expert) == 1 and expert[0] in own), (name, rows)


def test_zero_computation_experts_cost_no_load(tmp_path: Path) -> None:
    """LongCat: the window counts exactly the ids below E that the plain model's experts get, and nothing is sent."""
    save_family("longcat_flash", tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    experts = Checkpoint(tmp_path).family.forms[0].experts
    received: list[torch.Tensor] = []
    for name, module in plain.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _m, args: received.append(args[1]))
    with torch.inference_mode():
        for sequence in SEQUENCES:
            plain(torch.tensor([sequence]), use_cache=False)
    ids = torch.cat([part.flatten() for part in received])
    assert (ids >= experts.num_experts).any()
    engine = Engine(tmp_path, mode="dispatch-combine", dtype=torch.float64, limits=EngineLimits(max_length=16))
    engine.score(SEQUENCES)
    assert int(engine.window.load.sum()) == int((ids < experts.num_experts).sum())
    assert sum(engine.group.counters.tokens.values()) == int((ids < experts.num_experts).sum())


def test_a_model_whose_experts_are_not_found_is_not_called_dense(tmp_path: Path) -> None:
    """Doge's experts are rows of embeddings; what its configuration states is believed."""
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, is_moe=True,
        num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=r"family doge is not supported \(because it has 16 experts a layer, but"):
        Checkpoint(tmp_path / "moe")
    config.is_moe = False
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="is a dense model"):
        Checkpoint(tmp_path / "dense")
