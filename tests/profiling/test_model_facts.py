"""What configurations of model families say: K/V, hidden size, experts, against numbers worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.model_facts import facts_of, read_model_facts
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.loads import load_load
from tests.shared_data import tiny_moe_path

FAMILIES = {
    "grouped heads": ({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}, 2 * 8 * 128),
    "head size": ({"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}, 1024),
    "all heads": ({"hidden_size": 128, "num_attention_heads": 4}, 256),
    "latent": ({"hidden_size": 7168, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 576),
    "nested": ({"text_config": {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8,
                                "head_dim": 128}}, 2048),
    "dbrx": ({"d_model": 6144, "n_heads": 48, "attn_config": {"kv_n_heads": 8}}, 2 * 8 * 128),
    "hybrid by names": ({"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
                         "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 256),
    "hybrid by period": ({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                          "attn_layer_period": 8}, 256),
    "nothing": ({"model_type": "x"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_of_a_token(family: str) -> None:
    """Elements in the mean over decoder layers."""
    config, expected = FAMILIES[family]
    assert facts_of(config).kv_dim == expected


def test_experts_and_bytes() -> None:
    """Routed, null and shared experts, and the bytes of one."""
    facts = facts_of({"hidden_size": 100, "moe_intermediate_size": 10, "n_routed_experts": 64, "zero_expert_num": 32,
                      "n_shared_experts": 2, "num_experts_per_tok": 6, "dtype": "bfloat16",
                      "num_hidden_layers": 27})  # fmt: skip
    assert (facts.num_experts, facts.null_experts, facts.shared_experts, facts.top_k) == (64, 32, 2, 6)
    assert (facts.expert_bytes, facts.hidden_size, facts.num_hidden_layers) == (3 * 100 * 10 * 2, 100, 27)
    assert facts_of({"hidden_size": 8, "shared_expert_intermediate_size": 4}).shared_experts == 1
    quantised = {"hidden_size": 8, "moe_intermediate_size": 4, "dtype": "bfloat16"}
    assert facts_of(quantised | {"quantization_config": {"quant_method": "fp8"}}).expert_bytes == 96
    assert facts_of(quantised | {"quantization_config": {"quant_method": "awq"}}).expert_bytes == 0


QUANTISED = {
    # 256 x 192: scales of 4 bytes per 128 x 128, the last blocks cut: 2 x 2
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 3 * (256 * 192 + 4 * 4)),
    "fp8, exponents": ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
                       3 * (256 * 192 + 4)),
    "fp4 experts": ({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
                    3 * (256 * 96 + 256 * 6)),
    "mxfp4": ({"quant_method": "mxfp4"}, 3 * (256 * 96 + 256 * 6)),
    # a group of 64: 192 x 4 or 256 x 3 scales of 2 bytes and zeros of half a byte
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64}, 3 * (256 * 96) + 3 * (256 * 3 * 2 + 256 * 3 // 2)),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64},
             3 * (256 * 96) + 3 * (256 * 3 * 2 + 256 * 3 // 2) + 4 * (2 * 256 + 192)),
    "one group": ({"quant_method": "awq", "bits": 4, "group_size": -1},
                  3 * (256 * 96) + 2 * (192 * 2 + 96) + 256 * 2 + 128),
    "symmetric": ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
        "num_bits": 4, "group_size": 32, "symmetric": True}}}}, 3 * (256 * 96) + 3 * 256 * 6 * 2),
    "rows": ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
        "num_bits": 8, "type": "float", "symmetric": True, "group_size": None}}}}, 3 * 256 * 192 + 2 * (2 * 192 + 256)),
    "unknown": ({"quant_method": "bitsandbytes", "bits": 4}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_bytes_of_quantised_experts(name: str) -> None:
    """Weights, scales and zeros of gate and up (192 x 256) and down (256 x 192), worked out by hand."""
    stated, expected = QUANTISED[name]
    config = {"hidden_size": 256, "moe_intermediate_size": 192, "dtype": "bfloat16", "quantization_config": stated}
    assert facts_of(config).expert_bytes == expected


def test_configurations_on_disk(tmp_path: Path) -> None:
    """A folder or its file; anything else is refused by name."""
    facts = read_model_facts(tiny_moe_path())
    assert facts == read_model_facts(tiny_moe_path() / "config.json")
    assert facts.kv_dim > 0
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match="not a model configuration"):
        read_model_facts(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_model_facts(tmp_path / "absent.json")


def test_facts_travel_with_traces_and_loads(tmp_path: Path) -> None:
    """From an import into the file's metadata and back; files without them, as older ones, say 0."""
    options = ImportOptions(hidden_size=9, kv_dim=7, shared_experts=2, expert_bytes=5, num_experts=4)
    np.savez(tmp_path / "t.npz", experts=np.array([[[0], [3]], [[1], [2]]]))
    import_from("npz", tmp_path / "t.npz", tmp_path / "t.trace", options)
    trace = load_trace(tmp_path / "t.trace")
    assert (trace.hidden_size, trace.kv_dim, trace.shared_experts) == (9, 7, 2)
    np.save(tmp_path / "l.npy", np.array([[1, 2, 3, 4]]))
    import_from("load", tmp_path / "l.npy", tmp_path / "l.load", options)
    loads = load_load(tmp_path / "l.load")
    assert (loads.hidden_size, loads.kv_dim, loads.shared_experts, loads.expert_bytes) == (9, 7, 2, 5)
    arrays = dict(np.load(tmp_path / "t.trace"))
    meta = json.loads(arrays["meta"].tobytes())
    del meta["kv_dim"], meta["shared_experts"]
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    assert load_trace(tmp_path / "old.npz").kv_dim == 0
