"""Checkpoints: every layout on disk, lazily; damaged and foreign ones are refused with one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moeplace.profiling.errors import FormatError, InputError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from tests.runtime.checkpoints import FAMILIES, save_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_those_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    """Expert 1 of the last MoE layer as `transformers` holds it in memory, from one file and from shards."""
    model = save_checkpoint(family, tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    for folder in ("one", "shards"):
        checkpoint = Checkpoint(tmp_path / folder)
        loaded = model.model.layers[int(checkpoint.layer_ids[-1])].mlp.experts
        gate_up, down = loaded.gate_up_proj[1], loaded.down_proj[1]
        if family == "gpt_oss":
            gate_up, down = gate_up.t(), down.t()
        parts = checkpoint.expert(checkpoint.num_layers - 1, 1)
        torch.testing.assert_close(parts["gate_up"], gate_up.detach(), rtol=0, atol=0)
        torch.testing.assert_close(parts["down"], down.detach(), rtol=0, atol=0)
        assert ("down_bias" in parts) == (family == "gpt_oss")
        assert len(checkpoint.experts_per_layer) == len(checkpoint.layer_ids)
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()


def test_a_rank_opens_only_what_it_asks_for(tmp_path: Path) -> None:
    """With an expert's shard gone after the headers were read, the other experts can still be read."""
    save_checkpoint("olmoe", tmp_path, shard_size="4KB")
    checkpoint = Checkpoint(tmp_path)
    names = [name for name in checkpoint.other_names() if "experts" in name]
    assert not names
    assert set(checkpoint.expert(0, 0)) == {"gate_up", "down"}


def edit(folder: Path, change: Any) -> Path:
    """Rewrite the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop(f"{EXPERTS}.2.up_proj.weight"), rf"lacks the tensor {EXPERTS}.2.up_proj.weight"),
        (
            lambda t: [t.pop(f"{EXPERTS}.5.{part}_proj.weight") for part in ("gate", "up", "down")],
            "lacks expert 5 of decoder layer 1; its layers have 6",
        ),
        (drop("model.layers.0.self_attn.q_proj.weight"), r"lacks the tensor model.layers.0.self_attn.q_proj.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \[3\], its config.json says \[16\]",
        ),
    ],
)
def test_incomplete_checkpoints_are_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    """A missing expert, part of one, another tensor, or a tensor of another shape."""
    save_checkpoint("olmoe", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(FormatError, match=sentence):
        Decoder(Checkpoint(tmp_path))


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    """No folder, no weights, a truncated file, a missing shard, a dense model, quantised experts."""
    save_checkpoint("olmoe", tmp_path / "good", shard_size="4KB")
    with pytest.raises(InputError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "none")
    shutil.copytree(tmp_path / "good", tmp_path / "shardless")
    next((tmp_path / "shardless").glob("model-00002*")).unlink()
    with pytest.raises(FormatError, match="missing"):
        Checkpoint(tmp_path / "shardless")
    shutil.copytree(tmp_path / "good", tmp_path / "short")
    shard = next((tmp_path / "short").glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(FormatError, match="truncated"):
        Checkpoint(tmp_path / "short")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"is a dense model \(LlamaForCausalLM\): it has no experts"):
        Checkpoint(tmp_path / "dense")
    save_checkpoint("gpt_oss", tmp_path / "quantised")

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name and "experts" in name]:
            tensors[f"{name}_blocks"] = tensors.pop(name)

    with pytest.raises(FormatError, match="quantised experts must be converted"):
        Checkpoint(edit(tmp_path / "quantised", quantise))


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    """config.json says dense where the weights have experts, or an unknown model."""
    save_checkpoint("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_only_layers": [1]}))
    with pytest.raises(FormatError, match=r"experts in decoder layer 1, which its config.json makes dense"):
        Decoder(Checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "model_type": "unheard_of", "architectures": ["Unheard"]})
    )
    with pytest.raises(FormatError, match="does not describe a causal language model"):
        Decoder(Checkpoint(tmp_path))


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    """Same content, same fingerprint; one changed value, another."""
    save_checkpoint("olmoe", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Checkpoint(tmp_path / "a").fingerprint == Checkpoint(tmp_path / "b").fingerprint
    edit(tmp_path / "b", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Checkpoint(tmp_path / "a").fingerprint != Checkpoint(tmp_path / "b").fingerprint
