"""Small, valid files of every format that `moeplace import` reads: three decoder layers, the first one dense.

The model of all of them: 3 decoder layers, MoE layers 1 and 2, 4 experts, top-2, 2 ranks.
"""

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SLOTS = [[0, 1, 2, 3, 0, 1], [0, 3, 1, 2, 1, 0], [1, 2, 0, 3, 0, 2]]  # (L*, S) slot -> expert


def interchange(folder: Path) -> Path:
    """npz with all companions."""
    path = folder / "trace.npz"
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 2, 4)), axis=2)[:, :, :2].astype(np.int16)
    np.savez_compressed(
        path,
        experts=ids,
        weights=-np.sort(-rng.random((40, 2, 2)).astype(np.float16)),
        sequence_ids=np.arange(40, dtype=np.int32) // 10,
        positions=np.arange(40, dtype=np.int32) % 10,
        task=(np.arange(40) // 20).astype(np.int8),
        adapter=(np.arange(40) // 10 % 3 - 1).astype(np.int16),
        adapter_names=np.array(["law", "code"]),
    )
    return path


def interchange_stored(folder: Path) -> Path:
    """npz without compression, as our own traces are stored."""
    path = folder / "stored.npz"
    np.savez(path, **np.load(interchange(folder)))
    return path


def sglang_stat(folder: Path) -> Path:
    """Four steps of a ring buffer, two in use and rotated."""
    import torch

    counts = torch.zeros(4, 3, 4, dtype=torch.int32)
    counts[2:, 1:] = torch.tensor([[4, 3, 2, 1], [1, 2, 3, 4]], dtype=torch.int32)
    path = folder / "stat.pt"
    torch.save({"rank": 0, "average_utilization_rate_over_window": None, "logical_count": counts}, path)
    return path


def sglang_per_pass(folder: Path) -> Path:
    """One rank, two passes, counts per slot."""
    import torch

    counts = torch.tensor([[0] * 6, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], dtype=torch.int32)
    records = [
        {"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "global_physical_count": counts} for i in (1, 2)
    ]
    path = folder / "per_pass.pt"
    torch.save({"last_physical_to_logical_map": torch.tensor(SLOTS), "records": records}, path)
    return path


def sglang_per_token(folder: Path) -> Path:
    """A prefill of two sequences (3 and 2 tokens), a decode pass of both, an idle pass."""
    import torch

    slots = torch.full((3, 5, 8), -1, dtype=torch.int32)
    slots[1, :, :2] = torch.tensor([[0, 1], [2, 3], [4, 5], [1, 3], [5, 2]])
    slots[2, :, :2] = torch.tensor([[3, 4], [0, 1], [1, 2], [2, 3], [5, 3]])
    common: dict[str, Any] = {"rank": 0, "gatherer_key": "primary", "misc_objects": []}
    prefill = common | {
        "forward_pass_id": 1,
        "input_ids": [5, 6, 7, 8, 9],
        "positions": [0, 1, 2, 0, 1],
        "extend_seq_lens": [3, 2],
        "forward_mode": 1,
        "topk_ids_of_layer": slots,
    }
    decode = common | {
        "forward_pass_id": 2,
        "input_ids": [10, 11],
        "positions": [3, 2],
        "extend_seq_lens": None,
        "forward_mode": 2,
        "topk_ids_of_layer": slots[:, :2].clone(),
    }
    idle = decode | {"forward_pass_id": 3, "forward_mode": 4, "input_ids": [], "positions": []}
    path = folder / "per_token.pt"
    torch.save({"last_physical_to_logical_map": torch.tensor(SLOTS), "records": [decode, prefill, idle]}, path)
    return path


def requests_sglang(folder: Path) -> Path:
    """Two requests in SGLang's encoding; layer 0 is dense: the same id twice."""
    path = folder / "requests.jsonl"
    text = "AAAAAAAAAAAAAAAAAQAAAAIAAAABAAAAAAAAAAAAAAADAAAAAAAAAAEAAAACAAAA"
    line = {"routed_experts": text, "encoding": "sglang-int32", "num_layers": 3, "top_k": 2, "prompt_tokens": 1}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line | {"request_id": "b"}) + "\n")
    return path


def requests_vllm(folder: Path) -> Path:
    """One request in vLLM's encoding."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([[[0, 0], [0, 1], [2, 1]], [[0, 0], [3, 0], [1, 2]]], dtype=np.uint8))
    path = folder / "requests_vllm.jsonl"
    path.write_text(json.dumps({"routed_experts": base64.b64encode(buffer.getvalue()).decode()}) + "\n")
    return path


def loads_vllm(folder: Path) -> Path:
    """Meta, mapping, and two load records."""
    stats = {"record_type": "eplb_load_stats", "version": 1, "step": 7, "num_ranks": 2}
    stats |= {"expert_load": [[10, 1, 5, 2, 1, 1], [2, 8, 1, 3, 0, 0]], "p2l_map": SLOTS[1:]}
    mapping = {"record_type": "eplb_initial_mapping", "initial_global_assignments": {"0": SLOTS[1]}}
    path = folder / "loads.jsonl"
    lines = [{"record_type": "eplb_load_meta", "model": "toy", "num_layers": 2}, mapping, stats, stats]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trtllm_counts(folder: Path) -> Path:
    """Counts of two ranks and two iterations."""
    from safetensors.numpy import save_file

    path = folder / "trtllm"
    path.mkdir(exist_ok=True)
    (path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank in range(2):
        arrays = {f"{i}_{layer}": np.array([1, 2, 0, 1 + rank]) for i in (100, 101) for layer in (1, 2)}
        save_file(arrays, path / f"rank{rank}.safetensors")
    return path


def trtllm_raw(folder: Path) -> Path:
    """Counts and selected experts of two ranks and two iterations."""
    from safetensors.numpy import save_file

    path = folder / "trtllm_raw"
    path.mkdir(exist_ok=True)
    (path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank in range(2):
        raw = {
            f"{i}_{layer}": np.array([[0, 1], [2, (layer + rank) % 2]], dtype=np.int32)
            for i in (100, 101)
            for layer in (1, 2)
        }
        save_file(raw, path / f"rank{rank}_raw.safetensors")
        counts = {key: np.bincount(ids.ravel(), minlength=4).astype(np.int64) for key, ids in raw.items()}
        save_file(counts, path / f"rank{rank}.safetensors")
    return path


def exflow(folder: Path) -> Path:
    """(tokens, layers) of random experts."""
    path = folder / "trace.npy"
    np.save(path, np.random.default_rng(0).integers(0, 4, (300, 2), dtype=np.int32))
    return path


def matrix_npy(folder: Path) -> Path:
    """Loads with a dense row in front."""
    path = folder / "load.npy"
    np.save(path, np.array([[0, 0, 0, 0], [4, 3, 2, 1], [1, 2, 3, 4]]))
    return path


def matrix_json(folder: Path) -> Path:
    """Loads as nested lists."""
    path = folder / "load.json"
    path.write_text("[[4, 3, 2, 1], [1, 2, 3, 4]]")
    return path


def csv_matrix(folder: Path) -> Path:
    """A layer a line, with a header of numbers."""
    path = folder / "matrix.csv"
    path.write_text("0,1,2,3\n4,3,2,1\n1,2,3,4\n")
    return path


def csv_cells(folder: Path) -> Path:
    """layer, expert, count, with a byte-order mark, a comment and a blank line."""
    path = folder / "cells.csv"
    cells = [(layer, expert, 4 - expert) for layer in (1, 2) for expert in range(4)]
    lines = ["layer_id,expert_id,count", "# a comment", "", *(",".join(map(str, cell)) for cell in cells)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


def csv_gzip(folder: Path) -> Path:
    """A line a token, gzipped."""
    path = folder / "tokens.csv.gz"
    lines = ["layer,expert", *(f"{layer};{expert}".replace(";", ",") for layer in (1, 2) for expert in (0, 1, 1, 3))]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return path


def csv_ranks(folder: Path) -> Path:
    """A folder with the counts of two ranks."""
    path = folder / "ranks"
    path.mkdir(exist_ok=True)
    for rank in range(2):
        cells = [f"{layer},{expert},{1 + rank}" for layer in (1, 2) for expert in range(rank, 4)]
        (path / f"rank{rank}.csv").write_text("\n".join(["layer,expert,count", *cells]))
    return path


def json_history(folder: Path) -> Path:
    """A table for each of three steps."""
    path = folder / "history.json"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": [[4, 3, 2, 1], [1, 2, 3, 4]]}] * 3}))
    return path


def json_sparse(folder: Path) -> Path:
    """layer -> expert -> count, as statistics endpoints answer."""
    path = folder / "sparse.json"
    table = {"1": {"0": 4, "3": 1}, "2": {"1": 2, "2": 3}}
    document = {"num_experts": 4, "num_layers": 3, "model": "m", "layer_expert_activation_counts": table}
    path.write_text(json.dumps(document))
    return path


def json_ragged(folder: Path) -> Path:
    """Layers with different numbers of experts."""
    path = folder / "ragged.json"
    path.write_text("[[4, 3, 2, 1], [1, 2], [5, 0.0, 3]]")
    return path


def tensor(folder: Path) -> Path:
    """A bare tensor, a view that is not contiguous."""
    import torch

    path = folder / "weight.pt"
    torch.save(torch.tensor([[4, 1], [3, 2], [2, 3], [1, 4]]).T, path)
    return path


def tensor_named(folder: Path) -> Path:
    """A dictionary with one table in bfloat16."""
    import torch

    path = folder / "named.pt"
    table = torch.tensor([[4, 3, 2, 1], [1, 2, 3, 4]], dtype=torch.bfloat16)
    torch.save({"activation_freq": table, "steps": 3, "names": ["a", "b"]}, path)
    return path


_IDS = np.array([[[0, 0], [0, 1], [2, 1]], [[0, 0], [3, 0], [1, 2]]])


def answers_sglang(folder: Path) -> Path:
    """Raw answers of /generate; K follows from the token counts."""
    path = folder / "generate.jsonl"
    text = base64.b64encode(_IDS.astype("<i4").tobytes()).decode()
    meta = {"prompt_tokens": 1, "completion_tokens": 2, "routed_experts": text, "num_layers": 3}
    path.write_text("".join(json.dumps({"text": "x", "meta_info": meta}) + "\n" for _ in range(3)))
    return path


def answers_vllm(folder: Path) -> Path:
    """Raw answers with two choices, and one in an envelope."""
    path = folder / "choices.jsonl"
    buffer = io.BytesIO()
    np.save(buffer, _IDS.astype(np.uint8))
    choices = [{"index": i, "routed_experts": base64.b64encode(buffer.getvalue()).decode()} for i in range(2)]
    data = base64.b64encode(_IDS.astype(np.uint8).tobytes()).decode()
    envelope = {"routed_experts": {"data": data, "shape": [2, 3, 2], "dtype": "uint8"}}
    path.write_text(
        json.dumps({"choices": choices, "usage": {"prompt_tokens": 1}}) + "\n" + json.dumps(envelope) + "\n"
    )
    return path


SOURCES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "interchange": ("npz", interchange),
    "interchange_stored": ("npz", interchange_stored),
    "sglang_stat": ("sglang", sglang_stat),
    "sglang_per_pass": ("sglang", sglang_per_pass),
    "sglang_per_token": ("sglang", sglang_per_token),
    "requests_sglang": ("sglang", requests_sglang),
    "requests_vllm": ("vllm", requests_vllm),
    "loads_vllm": ("vllm", loads_vllm),
    "trtllm_counts": ("trtllm", trtllm_counts),
    "trtllm_raw": ("trtllm", trtllm_raw),
    "exflow": ("exflow", exflow),
    "matrix_npy": ("load", matrix_npy),
    "matrix_json": ("load", matrix_json),
    "csv_matrix": ("load", csv_matrix),
    "csv_cells": ("sglang", csv_cells),
    "csv_gzip": ("load", csv_gzip),
    "csv_ranks": ("load", csv_ranks),
    "json_history": ("load", json_history),
    "json_sparse": ("vllm", json_sparse),
    "json_ragged": ("load", json_ragged),
    "tensor": ("load", tensor),
    "tensor_named": ("sglang", tensor_named),
    "answers_sglang": ("sglang", answers_sglang),
    "answers_vllm": ("vllm", answers_vllm),
}
"""name -> (value of --from, writer of a valid source into a folder)."""
