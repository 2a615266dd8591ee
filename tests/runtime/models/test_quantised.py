"""Quantised checkpoints: served and profiled as the plain model of what their numbers mean, in the bytes on disk."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.model_facts import read_model_facts
from moeplace.profiling.recording.checkpoint_profile import profile_checkpoint
from moeplace.profiling.recording.stored_tensors import StoredTensors
from moeplace.profiling.traces.file import load_trace
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.verification import verify_engine
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from tests.family_matrix import PUBLISHED_FORMS
from tests.model_families import plain_logits, save_family
from tests.packers import FORMS, quantise_checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import Oracle, ask_plain_model
from tests.runtime.migration.moving import misplaced, placements, plan_for, serve_while_moving
from tests.runtime.placements import random_placement

SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [11, 12, 13, 14, 15]]
SMALL = {"num_hidden_layers": 2, "intermediate_size": 64}


def save(folder: Path, family: str, form: str, *, seed: int = 1, **options: Any) -> tuple[Path, Path]:
    """A small checkpoint of a family in a form, and the plain one that it means."""
    save_family(family, folder / "source", **SMALL)
    packed, plain = folder / "packed", folder / "plain"
    quantise_checkpoint(folder / "source", form, packed, plain, seed=seed, **options)
    return packed, plain


def require_served(packed: Path | Checkpoint, plain: Path) -> Engine:
    """Serve, and compare the logits with those of the plain model."""
    engine = Engine(packed, mode="dispatch-combine", dtype=torch.float64, limits=EngineLimits(max_length=16))
    served = engine.score(SEQUENCES, prompt_lengths=[5, 1, 2])
    for ours, expected in zip(served, plain_logits(plain, SEQUENCES), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    return engine


@pytest.mark.parametrize(
    ("family", "form"), [*(("qwen3_moe", form) for form in FORMS if form != "mxfp4"), ("gpt_oss", "mxfp4")]
)
def test_forms_are_served_exactly_and_stay_packed(tmp_path: Path, family: str, form: str, dated_seed: int) -> None:
    """Logits of the plain model; an expert takes the bytes that it has on disk, in memory, in traces and in facts."""
    packed, plain = save(tmp_path, family, form, seed=dated_seed)
    checkpoint = Checkpoint(packed)
    engine = require_served(checkpoint, plain)
    assert checkpoint.layout is not None
    verify_engine(engine)
    store = engine.executor.runtime.experts
    held = sum(part[0].nbytes for name, part in store.weights[0].parts().items() if not name.endswith("_bias"))
    on_disk = bytes_of_expert(packed, expert=3)
    assert held == on_disk
    assert store.expert_bytes(0) == checkpoint.expert_bytes(torch.float64) == store.weights[0].row_size
    if form in (*PUBLISHED_FORMS, "fp4"):  # with scales of the published types
        assert read_model_facts(packed).expert_bytes == on_disk


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "fp8"), ("qwen3_moe", "awq"), ("gpt_oss", "mxfp4")])
def test_packed_experts_work_in_several_memories(tmp_path: Path, family: str, form: str, dated_seed: int) -> None:
    """Logits of the plain model, whatever fits; what is loaded are the bytes on disk, without and with biases."""
    packed, plain = save(tmp_path, family, form, seed=dated_seed)
    checkpoint, expected = Checkpoint(packed), plain_logits(plain, SEQUENCES)
    for tiers in (
        TierLimits(1, policy="lru", transit=1),
        TierLimits(2, policy="lookahead", host_slots=1, host_computes=True),
        TierLimits(3, policy="score", host_slots=0),
        TierLimits(9, policy="pinned", transit=1),
    ):
        limits = EngineLimits(max_length=16, tiers=tiers)
        engine = Engine(checkpoint, mode="dispatch-combine", dtype=torch.float64, limits=limits)
        store = engine.executor.runtime.experts
        assert isinstance(store, TieredStore)
        assert store.expert_bytes(0) == checkpoint.expert_bytes(torch.float64) == store.pool.row_size
        for ours, theirs in zip(engine.score(SEQUENCES, prompt_lengths=[5, 1, 2]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        found = engine.counters().get("experts_found", {})
        assert bool(found) == (tiers.fast_slots < 9), "with room for all of them nothing is looked for"
        if tiers.policy == "lru":
            assert engine.counters()["bytes_loaded"] == found["loaded"] * store.expert_bytes(0)


def bytes_of_expert(folder: Path, expert: int) -> int:
    """Bytes of the matrices of an expert of the first layer, by what the file's header says."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layers.0." in name and "experts" in name]  # noqa: SIM118
        own = [name for name in names if f"experts.{expert}." in name and "shape" not in name]
        stacked = [name for name in names if name.endswith(("_blocks", "_scales"))]
        return sum(file.get_tensor(name).nbytes for name in own) + sum(
            file.get_tensor(name)[expert].nbytes for name in stacked
        )


def test_experts_stacked_in_fp8_are_cut_from_their_scales_too(tmp_path: Path) -> None:
    """One tensor per layer, (E, in, out), with scales (E, blocks, blocks)."""
    packed, plain = save(tmp_path, "gpt_oss", "fp8")
    engine = require_served(packed, plain)
    assert engine.checkpoint.layout is not None


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("where", ["layers.1.mlp.experts.", "layers.0.mlp.experts.2.", "experts.5.up_proj."])
def test_experts_that_are_stored_in_different_ways_are_unpacked(tmp_path: Path, where: str) -> None:
    """A layer, an expert, or a matrix that the quantiser left out: plain rows for all, and still exact."""
    packed, plain = save(tmp_path, "qwen3_moe", "fp8")
    meant = load_file(plain / "model.safetensors")

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if where in name and name.endswith(".weight")]:
            tensors[name] = meant[name].double()
            del tensors[f"{name}_scale_inv"]

    rewrite(packed, unpack)
    engine = require_served(packed, plain)
    assert engine.checkpoint.layout is None
    assert set(engine.executor.runtime.experts.weights[0].parts()) == {"gate_up", "down"}


def test_all_experts_may_have_one_plain_matrix(tmp_path: Path) -> None:
    """Down projections that are quantised nowhere stay beside packed ones."""
    packed, plain = save(tmp_path, "qwen3_moe", "awq")
    meant = load_file(plain / "model.safetensors")

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts." in name and ".down_proj." in name]:
            del tensors[name]
        tensors.update({name: value for name, value in meant.items() if "experts." in name and "down_proj" in name})

    rewrite(packed, unpack)
    engine = require_served(packed, plain)
    parts = engine.executor.runtime.experts.weights[0].parts()
    assert parts["down.0.weight"].dtype == torch.float64
    assert parts["gate_up.1.weight"].dtype == torch.int32


def test_an_expert_of_other_sizes_is_named(tmp_path: Path) -> None:
    """Its scales have other blocks: one sentence, when it is read."""
    packed, _ = save(tmp_path, "qwen3_moe", "fp8")
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    rewrite(packed, lambda tensors: tensors.update({f"{name}_scale_inv": torch.ones(1, 1)}))
    checkpoint = Checkpoint(packed)
    with pytest.raises(FormatError, match=r"expert 4 of MoE layer 1 is stored in another way than others"):
        checkpoint.expert(1, 4)


def test_what_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    """Serving and profiling give the form, what can be read, and what to do."""
    packed, _ = save(tmp_path, "qwen3_moe", "awq")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (packed / "config.json").write_text(json.dumps(config))
    reason = r"quantised in a form that is not read \(awq of 4 bits in the version gemv\): those of fp8, mxfp4, awq"
    with pytest.raises(InputError, match=rf"family qwen3_moe is not supported \(because its weights are {reason}"):
        Checkpoint(packed)
    with pytest.raises(InputError, match=rf"packed cannot be profiled \(because its weights are {reason}"):
        profile_checkpoint(packed, [packed / "config.json"], tmp_path / "t")


def serve_all_modes(context: RankContext, packed: Path, seed: int) -> list[list[np.ndarray]]:
    """Logits in all modes under a random placement with replicas."""
    checkpoint = Checkpoint(packed)
    placement = random_placement(
        checkpoint.num_layers, 8, context.size, seed=seed, extra_slots=1,
        layer_ids=checkpoint.layer_ids, num_hidden_layers=checkpoint.num_hidden_layers,
    )  # fmt: skip
    answers, group, decoder = [], context.group(), open_model(checkpoint, dtype=torch.float64)
    for mode in ("dispatch-combine", "coherent", "allgather"):
        engine = Engine(
            checkpoint, placement, mode=mode, group=group, decoder=decoder,
            limits=EngineLimits(max_sequences=12, max_length=16),
        )  # fmt: skip
        answers.append([block.numpy() for block in engine.score(SEQUENCES, prompt_lengths=[5, 1, 2])])
    return answers


def test_ranks_agree_in_all_modes(pool: RankPool, tmp_path: Path, dated_seed: int) -> None:
    """Three ranks, replicas, every mode."""
    packed, plain = save(tmp_path, "qwen3_moe", "gptq")
    expected = plain_logits(plain, SEQUENCES)
    for answers in pool.run(serve_all_modes, packed, dated_seed, size=3):
        for logits in answers:
            for ours, theirs in zip(logits, expected, strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


def moved_bytes(context: RankContext, oracle: Oracle) -> tuple[int, int, list[Any]]:
    """What a migration plan says it moves, by the engine's bytes and by counting experts."""
    old, new = placements(Checkpoint(oracle.path), context.size, 2)
    engine = Engine(oracle.path, old, mode="allgather", group=context.group(), dtype=torch.float64)
    plan, size = plan_for(engine, new), engine.executor.runtime.experts.expert_bytes(0)
    moves = sum(a != b for transfers in plan.rounds for a, b in (plan.members(t) for t in transfers))
    return plan.bytes, moves * size, misplaced(engine)


def test_migration_moves_the_bytes_on_disk(pool: RankPool, tmp_path: Path) -> None:
    """Weights, scales and zeros travel together, cut into pieces, while tokens are those of the plain model."""
    packed, plain = save(tmp_path, "qwen3_moe", "compressed-tensors")
    oracle = replace(ask_plain_model(plain), path=packed)
    for worst, tokens, seen, wrong in pool.run(serve_while_moving, oracle, "coherent", 1, 4000, size=2):
        assert wrong == []
        assert worst <= 1e-6
        assert tokens == oracle.completions
        assert seen[-1].bytes_moved == seen[-1].bytes_total
    for planned, counted, wrong in pool.run(moved_bytes, oracle, size=2):
        assert planned == counted
        assert wrong == []


def test_a_profile_knows_the_bytes_on_disk(tmp_path: Path) -> None:
    """The plain model runs, the packed bytes are recorded: ids are those of the plain checkpoint's profile."""
    from tests.shared_data import text_paths, tiny_moe_path

    packed, plain = save(tmp_path, "qwen3_moe", "awq")
    for folder in (packed, plain):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (tiny_moe_path() / name).is_file():
                (folder / name).write_bytes((tiny_moe_path() / name).read_bytes())
    text = text_paths()[0]
    traces = {}
    for folder in (packed, plain):
        _with_vocabulary(folder)
        profile_checkpoint(folder, [text], tmp_path / f"{folder.name}.trace", max_tokens=64)
        traces[folder.name] = load_trace(tmp_path / f"{folder.name}.trace")
    assert traces["packed"].expert_bytes is not None
    assert set(traces["packed"].expert_bytes.flatten().tolist()) == {bytes_of_expert(packed, expert=3)}
    assert np.array_equal(traces["packed"].topk_ids, traces["plain"].topk_ids)


def _with_vocabulary(folder: Path) -> None:
    """Enough embeddings for the tokenizer, alike in both checkpoints."""
    config = json.loads((folder / "config.json").read_text())
    rows = 4096

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                generator = torch.Generator().manual_seed(0)
                tensors[name] = torch.randn(rows, tensors[name].shape[1], generator=generator).to(tensors[name].dtype)

    rewrite(folder, widen)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))


def test_the_layout_is_found_in_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read to learn how experts are stored, and of an expert nothing but its own tensors."""
    packed, _ = save(tmp_path, "qwen3_moe", "gptq")
    checkpoint, read = Checkpoint(packed), []
    plain = StoredTensors._raw

    class Watched:
        def __init__(self, name: str, source: Any) -> None:
            self._name, self._source = name, source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.append(self._name)
            return self._source[index]

    monkeypatch.setattr(StoredTensors, "_raw", lambda self, name: Watched(name, plain(self, name)))
    assert checkpoint.layout is not None
    assert read == []
    checkpoint.expert(1, 5)
    assert len(read) == 3 * 4
    assert all("layers.1.mlp.experts.5." in name for name in read)
