"""The recorder against the decisions that the models themselves execute."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.recording.checkpoint_profile import load_model, profile_checkpoint
from moeplace.profiling.recording.recorder import Recorder
from moeplace.profiling.traces.file import load_trace
from tests.profiling.models import CONFIGS, tiny_model
from tests.shared_data import text_paths, tiny_moe_path


def executed_experts(model: Any, tokens: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, weights) that every MoE layer's experts module was called with: what the model really does."""
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, weights = args[1], args[2] if len(args) > 2 else kwargs["routing_weights"]
        calls.append((ids.detach().numpy().copy(), weights.detach().float().numpy().copy()))

    handles = [
        m.register_forward_pre_hook(spy, with_kwargs=True) for n, m in model.named_modules() if n.endswith(".experts")
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", CONFIGS)
def test_trace_equals_what_the_model_executes(family: str, tmp_path: Path) -> None:
    """In every family the recorded ids and weights are those its experts were called with, by falling weight."""
    model = tiny_model(family)
    tokens = torch.randint(1, 97, (3, 10), generator=torch.Generator().manual_seed(1))
    calls = executed_experts(model, tokens)
    with torch.no_grad(), Recorder(model, tmp_path / "t"):
        model(input_ids=tokens)
    trace = load_trace(tmp_path / "t")
    assert trace.num_layers == len(calls)
    for layer, (ids_TK, weights_TK) in enumerate(calls):
        order = np.argsort(-weights_TK, axis=1, kind="stable")
        assert np.array_equal(trace.topk_ids[:, layer], np.take_along_axis(ids_TK, order, 1))
        assert trace.topk_weights is not None
        np.testing.assert_allclose(
            trace.topk_weights[:, layer], np.take_along_axis(weights_TK, order, 1), rtol=2e-3, atol=1e-4
        )
    dense = {"deepseek_v2": [1, 2], "deepseek_v3": [1, 2], "qwen3_moe": [0, 2]}
    assert trace.layer_ids is not None
    assert trace.layer_ids.tolist() == dense.get(family, [0, 1, 2])
    assert (trace.num_hidden_layers, trace.hidden_size) == (3, 32)
    assert trace.sequence_ids is not None
    assert trace.positions is not None
    assert trace.sequence_ids.tolist() == np.repeat(range(3), 10).tolist()
    assert trace.positions.tolist() == np.tile(range(10), 3).tolist()


def test_expert_bytes_are_those_of_the_parameters(tmp_path: Path) -> None:
    """Mixtral expert: three matrices of 32 x 16 float32."""
    model = tiny_model("mixtral")
    with torch.no_grad(), Recorder(model, tmp_path / "t"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    trace = load_trace(tmp_path / "t")
    assert trace.expert_bytes is not None
    assert (trace.expert_bytes == 3 * 32 * 16 * 4).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_continues_sequences_and_marks_decode(family: str, dated_seed: int, tmp_path: Path) -> None:
    """With a KV cache, generated tokens get the next position of their own row and `is_decode`, in every family."""
    model = tiny_model(family)
    rng = np.random.default_rng(dated_seed)
    rows, length, added = (int(n) for n in rng.integers((1, 2, 2), (5, 8, 6)))
    prompt = torch.from_numpy(rng.integers(1, 97, (rows, length)))
    with Recorder(model, tmp_path / "t"):
        model.generate(prompt, max_new_tokens=added, do_sample=False, eos_token_id=None)
        model(input_ids=prompt)
    trace = load_trace(tmp_path / "t")
    assert trace.sequence_ids is not None
    assert trace.positions is not None
    assert trace.is_decode is not None
    steps = added - 1  # the last new token is never fed
    first = np.repeat(range(rows), length)
    assert trace.sequence_ids.tolist() == [*first, *np.tile(range(rows), steps), *(first + rows)]
    at_start = np.tile(range(length), rows)
    assert trace.positions.tolist() == [*at_start, *np.repeat(range(length, length + steps), rows), *at_start]
    assert trace.is_decode.tolist() == [False] * rows * length + [True] * rows * steps + [False] * rows * length


def test_padding_is_left_out(tmp_path: Path) -> None:
    """Tokens whose attention mask is 0 leave no row; the others are the same as without padding."""
    model = tiny_model("mixtral")
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    with torch.no_grad(), Recorder(model, tmp_path / "padded"):
        model(input_ids=torch.tensor([[3, 4, 0, 0], [5, 6, 7, 8]]), attention_mask=mask)
    with torch.no_grad(), Recorder(model, tmp_path / "alone"):
        model(input_ids=torch.tensor([[3, 4]]))
    padded, alone = load_trace(tmp_path / "padded"), load_trace(tmp_path / "alone")
    assert padded.num_tokens == 6
    assert np.array_equal(padded.topk_ids[:2], alone.topk_ids)


def test_hooks_are_removed_and_failures_leave_no_file(tmp_path: Path) -> None:
    """After the block the model is as before; an exception inside it leaves no trace file behind."""
    model = tiny_model("olmoe")

    def fail_inside() -> None:
        with Recorder(model, tmp_path / "t"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert list(tmp_path.iterdir()) == []
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(InputError, match="no forward pass was recorded"), Recorder(model, tmp_path / "t"):
        pass


def test_profile_command_core(tmp_path: Path) -> None:
    """Sequences are consecutive pieces of each file; the trace of the shipped model has its shape; gates are scored."""
    texts = [str(path) for path in text_paths()[:2]]
    out, gates = tmp_path / "t", tmp_path / "gates.json"
    tokens = profile_checkpoint(
        tiny_moe_path(), texts, out, sequence_length=32, batch_size=3, max_tokens=330, gate_accuracy=gates
    )
    trace = load_trace(out)
    assert tokens == trace.num_tokens == 660
    assert trace.workload_names == ("kjv", "python-docs")
    assert np.bincount(trace.workload).tolist() == [330, 330]
    assert np.bincount(trace.sequence_ids).tolist() == ([32] * 10 + [10]) * 2
    document = json.loads(gates.read_text())
    assert document["tokens"] == 660
    assert len(document["layers"]) == 5
    assert 1 / 16 < document["mean"]["1"] < document["mean"]["4"] <= 1


def test_gate_accuracy_matches_its_definition(tmp_path: Path) -> None:
    """acc@K equals the share of true experts that gate l + 1 picks on the input of gate l."""
    model = tiny_model("qwen2_moe")
    inputs: list[torch.Tensor] = []
    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    handles = [g.register_forward_hook(lambda _m, args, _out: inputs.append(args[0].detach())) for g in gates]
    tokens = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), Recorder(model, tmp_path / "t", gate_accuracy=True) as recorder:
        model(input_ids=tokens)
    assert recorder.gate_accuracy is not None
    rates = [layer["accuracy"]["2"] for layer in recorder.gate_accuracy.document("")["layers"]]
    with torch.no_grad():
        for boundary in range(2):
            true, guess = gates[boundary + 1](inputs[boundary + 1])[2], gates[boundary + 1](inputs[boundary])[2]
            expected = (true[:, :, None] == guess[:, None, :]).sum() / true.numel()
            assert rates[boundary] == pytest.approx(float(expected))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny_moe_path(), tmp_path / "model"))


def test_missing_and_foreign_checkpoints_are_named(checkpoint: Path, tmp_path: Path) -> None:
    """No folder, no config, a configuration of something else: one sentence with the path."""
    with pytest.raises(InputError, match=r"no such checkpoint folder: .*absent"):
        load_model(tmp_path / "absent")
    (checkpoint / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"model"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="names no model_type"):
        load_model(checkpoint)


def test_truncated_weights_are_named(checkpoint: Path) -> None:
    """A cut file is found by its header before anything is loaded."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"model.safetensors has \d+ bytes, its header says"):
        load_model(checkpoint)


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    """Missing parameters are an error, not random numbers."""
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(FormatError, match=r"do not fit its config.json: .* missing"):
        load_model(checkpoint)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    """A folder with pickles only is refused without opening them."""
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle is refused"):
        load_model(checkpoint)


def test_dense_models_are_refused(tmp_path: Path) -> None:
    """A dense model is named as such, before its weights are loaded."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="is a dense model"):
        load_model(tmp_path / "dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, r"sequence length \(1\)"),
        ({"batch_size": 0}, r"batch size \(0\)"),
        ({"sequence_length": 1024}, r"must not exceed the 512 positions"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_arguments_that_break_a_rule(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Each is one sentence with the value, and no file is written."""
    with pytest.raises(InputError, match=message):
        profile_checkpoint(tiny_moe_path(), text_paths()[:1], tmp_path / "t", **options)
    assert list(tmp_path.iterdir()) == []


def test_empty_text_is_named(tmp_path: Path) -> None:
    """An empty file, and one of too few tokens."""
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty.txt is empty"):
        profile_checkpoint(tiny_moe_path(), [tmp_path / "empty.txt"], tmp_path / "t")
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(InputError, match="no forward pass was recorded"):
        profile_checkpoint(tiny_moe_path(), [tmp_path / "one.txt"], tmp_path / "t")
