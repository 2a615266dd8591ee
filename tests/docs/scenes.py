"""The files that the commands of a page find, and what is put in the place of what a page cannot name.

A scene changes sizes, never a flag: fewer tokens than a user has, a shorter time limit.
"""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.shared_data import text_paths, tiny_moe_path

TIME_LIMIT = 1.0
"""Seconds for each `--time-limit` on a page, and where a page gives none."""


def shipped_model(folder: Path) -> dict[str, str]:
    """MODEL, two texts and a file of requests."""
    for name, text in zip(("a.txt", "b.txt"), text_paths(), strict=False):
        (folder / name).write_text(text.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    (folder / "in.jsonl").write_text('{"prompt": "In the beginning"}\n', encoding="utf-8")
    rng = np.random.default_rng(0)
    sglang_requests(folder / "routed.jsonl", rng.standard_normal((6, 16)), dense=1, top_k=1, rng=rng)
    return {"MODEL": str(tiny_moe_path()), "launch/data/tiny-moe": str(tiny_moe_path())}


def deepseek_v3_recordings(folder: Path) -> dict[str, str]:
    """Requests of DeepSeek-V3's shape: 61 decoder layers, the first three dense, 256 experts, top-8."""
    bias_LE = 0.8 * np.random.default_rng(9).standard_normal((58, 256))
    for seed, name in enumerate(("routed.jsonl", "routed-new.jsonl")):
        sglang_requests(folder / name, bias_LE, dense=3, top_k=8, rng=np.random.default_rng(seed))
    return {}


def sglang_requests(path: Path, bias_LE: np.ndarray, *, dense: int, top_k: int, rng: np.random.Generator) -> None:
    """Twelve recorded requests of 40 tokens; experts are drawn with odds exp(bias), dense layers are zeros."""
    layers, experts = bias_LE.shape
    lines = []
    for request in range(12):
        ids = np.zeros((40, dense + layers, top_k), np.int32)
        ids[:, dense:] = np.argsort(-(bias_LE + rng.gumbel(size=(40, layers, experts))), axis=2)[:, :, :top_k]
        routed = base64.b64encode(ids.tobytes()).decode()
        lines.append({"request_id": str(request), "encoding": "sglang-int32", "num_layers": dense + layers,
                      "top_k": top_k, "routed_experts": routed, "prompt_tokens": 30})  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def qwen3_answers(folder: Path) -> dict[str, str]:
    """vLLM's answers for a model of Qwen3-30B-A3B's shape: 48 MoE layers of 128 experts, top-8."""
    bias_LE = 0.8 * np.random.default_rng(9).standard_normal((48, 128))
    for seed, name in enumerate(("routed.jsonl", "routed-new.jsonl")):
        vllm_answers(folder / name, bias_LE, dense=0, rng=np.random.default_rng(seed))
    return {}


def deepseek_v3_answers(folder: Path) -> dict[str, str]:
    """vLLM's answers for a model of DeepSeek-V3's shape."""
    bias_LE = 0.8 * np.random.default_rng(9).standard_normal((58, 256))
    vllm_answers(folder / "routed.jsonl", bias_LE, dense=3, rng=np.random.default_rng(0))
    return {}


def vllm_answers(path: Path, bias_LE: np.ndarray, *, dense: int, rng: np.random.Generator) -> None:
    """Twelve completions of 40 tokens, top-8, as the HTTP server sends them."""
    layers, experts = bias_LE.shape
    lines = []
    for number in range(12):
        ids = np.zeros((40, dense + layers, 8), np.uint8)
        ids[:, dense:] = np.argsort(-(bias_LE + rng.gumbel(size=(40, layers, experts))), axis=2)[:, :, :8]
        data = io.BytesIO()
        np.save(data, ids)
        choice = {"index": 0, "text": "", "routed_experts": base64.b64encode(data.getvalue()).decode()}
        usage = {"prompt_tokens": 30, "completion_tokens": 11, "total_tokens": 41}
        lines.append({"id": f"cmpl-{number}", "object": "text_completion", "choices": [choice], "usage": usage})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trtllm_statistics(folder: Path) -> dict[str, str]:
    """Counts of two ranks over three iterations, DeepSeek-V3's shape."""
    from safetensors.numpy import save_file

    rng, statistics = np.random.default_rng(0), folder / "statistics"
    statistics.mkdir()
    (statistics / "meta_info.json").write_text('{"num_experts": 256, "num_experts_per_token": 8}')
    share_LE = rng.dirichlet(np.full(256, 2.0), size=58)
    for rank in range(2):
        counts = {f"{100 + i}_{3 + x}": rng.multinomial(8 * 256, share_LE[x]) for i in range(3) for x in range(58)}
        save_file(
            {name: count.astype(np.int64) for name, count in counts.items()}, statistics / f"rank{rank}.safetensors"
        )
    return {}


def interchange(folder: Path) -> dict[str, str]:
    """`routing.npz` of 26 layers, as in `docs/benchmarks.md`."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((240, 26, 64)), axis=2)[:, :, :6].astype(np.int16)
    np.savez(folder / "routing.npz", experts=ids, sequence_ids=np.arange(240, dtype=np.int32) // 10)
    return {}


SCENES: dict[str, Callable[[Path], dict[str, str]]] = {
    "README.md": shipped_model,
    "concepts.md": shipped_model,
    "guide-sglang-deepseek-v3.md": deepseek_v3_recordings,
    "guide-vllm.md": qwen3_answers,
    "guide-vllm-ascend.md": deepseek_v3_answers,
    "guide-tensorrt-llm.md": trtllm_statistics,
    "guide-two-hosts.md": shipped_model,
    "benchmarks.md": interchange,
}
"""By page; a page without one has no command that runs here."""
ELSEWHERE = {
    "torchrun": "tests/launch/serving runs this form",
    "make": "the suite itself runs through it",
    "moeplace serve": "tests/launch/http_front and tests/launch/serving run it",
}
"""Commands that other tests run."""
