"""Raw answers of engines saved one a line, in all forms that they take, against the ids that were put in."""

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.profiling.builders import random_ids

pytestmark = pytest.mark.filterwarnings("ignore::moeplace.profiling.errors.MoeplaceWarning")
PROMPT, TOKENS, LAYERS, TOP_K = 12, 20, 5, 3


def answers(number: int = 4) -> list[np.ndarray]:
    """(tokens, L*, K) ids, the first layer dense: id 0 throughout."""
    rng = np.random.default_rng(number)
    made = [random_ids(rng, TOKENS, LAYERS, 16, TOP_K) for _ in range(number)]
    for ids in made:
        ids[:, 0] = 0
    return made


def int32(ids: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(ids, "<i4").tobytes()).decode()


def npy(ids: np.ndarray, dtype: str = "uint8", order: Any = "C") -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ids, dtype, order=order))
    return base64.b64encode(buffer.getvalue()).decode()


def envelope(ids: np.ndarray, dtype: str) -> dict[str, Any]:
    data = base64.b64encode(ids.astype(dtype.removeprefix("torch.").removeprefix("numpy.")).tobytes()).decode()
    return {"data": data, "shape": list(ids.shape), "dtype": dtype}


USAGE = {"prompt_tokens": PROMPT, "completion_tokens": TOKENS - PROMPT + 1}
FORMS: dict[str, tuple[str, Callable[[np.ndarray], dict[str, Any]]]] = {
    "generate": ("sglang", lambda x: {"text": "x", "meta_info": {"id": "r", **USAGE, "routed_experts": int32(x)}}),
    "chat": ("sglang", lambda x: {"choices": [{"index": 0, "sgl_ext": {"routed_experts": int32(x)}}], "usage": USAGE}),
    "chat, top": ("sglang", lambda x: {"choices": [{}], "sglext": {"routed_experts": int32(x)}, "usage": USAGE}),
    "vllm": ("vllm", lambda x: {"choices": [{"text": "x", "routed_experts": npy(x)}], "usage": USAGE}),
    "vllm, uint16": ("vllm", lambda x: {"choices": [{"routed_experts": npy(x, "uint16", "F")}], "usage": USAGE}),
    "npy of sglang": ("sglang", lambda x: {"meta_info": {"routed_experts": npy(x, "int32"), **USAGE}}),
    "envelope": ("vllm", lambda x: {"routed_experts": envelope(x, "uint8"), "usage": USAGE}),
    "envelope, torch": ("sglang", lambda x: {"output": {"routed_experts": envelope(x, "torch.int64"), **USAGE}}),
    "lists": ("vllm", lambda x: {"routed_experts": x.tolist(), "prompt_tokens": PROMPT}),
    "envelope of lists": ("vllm", lambda x: {"routed_experts": {"data": x.tolist(), "shape": list(x.shape)},
                                             "prompt_tokens": PROMPT}),
    "ours": ("sglang", lambda x: {"routed_experts": int32(x), "encoding": "sglang-int32", "num_layers": LAYERS,
                                  "top_k": TOP_K, "prompt_tokens": PROMPT}),
}  # fmt: skip


def read(path: Path, source_format: str, **options: Any) -> RoutingTrace:
    import_from(source_format, path, path.parent / "out", ImportOptions(**options))
    return load_trace(path.parent / "out")


@pytest.mark.parametrize("layout", ["lines", "list", "one document", "gzip"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, layout: str, tmp_path: Path) -> None:
    """The same ids, sequences and decode marks from every form; K follows from the token counts where it must."""
    source_format, make = FORMS[form]
    made = answers(1 if layout == "one document" else 4)
    records = [make(ids) for ids in made]
    path = tmp_path / "answers.jsonl"
    if layout == "list":
        path.write_text(json.dumps(records, indent=1))
    elif layout == "one document":
        path.write_text(json.dumps(records[0], indent=2))
    else:
        lines = "\n\n".join(json.dumps(record) for record in records)
        path.write_bytes(gzip.compress(lines.encode()) if layout == "gzip" else b"\xef\xbb\xbf" + lines.encode())
    trace = read(path, source_format, num_hidden_layers=LAYERS)
    assert trace.topk_ids.tolist() == np.concatenate(made)[:, 1:].tolist()
    assert np.array_equal(trace.layer_ids, [1, 2, 3, 4])
    assert np.array_equal(trace.sequence_ids, np.repeat(np.arange(len(made)), TOKENS))
    assert trace.is_decode is not None
    assert trace.is_decode.sum() == len(made) * (TOKENS - PROMPT)


@pytest.mark.parametrize("dtype", ["uint8", "|u1", "int16", "<i2", ">i4", "torch.int32", "numpy.uint16", "u1", None])
def test_types_of_envelopes(dtype: str | None, tmp_path: Path) -> None:
    """Names of torch and numpy, codes with a byte order; without any, the size tells."""
    made = answers(1)[0]
    record = {"routed_experts": envelope(made, dtype or "int16")}
    if dtype is None:
        del record["routed_experts"]["dtype"]
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert read(tmp_path / "a.jsonl", "vllm").topk_ids.tolist() == made[:, 1:].tolist()


def test_several_choices_are_several_sequences(tmp_path: Path) -> None:
    """n = 2: two sequences from one answer; an answer without the field is counted, not fatal."""
    one, two = answers(2)
    record = {"choices": [{"index": 0, "routed_experts": npy(one)}, {"index": 1, "routed_experts": npy(two)}]}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in (record, {"error": "busy"}, record)))
    trace = read(tmp_path / "a.jsonl", "vllm")
    assert trace.topk_ids.tolist() == np.concatenate([one, two, one, two])[:, 1:].tolist()
    assert any(
        "33.3 % of the answers (1 of 3)" in note or "20.0 % of the answers (1 of 5)" in note for note in trace.notes
    )


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"meta_info": {"routed_experts": "AAAA"}}, {}, "line 1: raw int32 ids do not say how many decoder layers"),
        ({"choices": [{"sgl_ext": {"routed_experts": "AAAA"}}]}, {"num_hidden_layers": 2}, r"choices\[0\]: .*--top-k"),
        (
            {"meta_info": {"routed_experts": "AAAA"}},
            {"num_hidden_layers": 2, "top_k": 2},
            "no multiple of 4 x num_layers",
        ),
        ({"meta_info": {"routed_experts": "%"}}, {"num_hidden_layers": 2, "top_k": 2}, "is not base64"),
        ({"routed_experts": {"data": "AAAA", "shape": [1, 2], "dtype": "int32"}}, {}, "needs a shape"),
        ({"routed_experts": {"data": "AAAA", "shape": [1, 2, 3], "dtype": "float32"}}, {}, "dtype 'float32' must be"),
        ({"routed_experts": {"data": "AAAA", "shape": [9, 9, 9], "dtype": "uint8"}}, {}, "do not fill the shape"),
        ({"routed_experts": [[1, 2], [3]]}, {}, "lists"),
        ({"text": "x"}, {}, "no answer of 1 has routed experts: looked for routed_experts, meta_info.routed_experts"),
    ],
)
def test_answers_that_break_a_rule(
    record: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The file, the line, the place in the answer, and the flag."""
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(FormatError, match=message) as error:
        read(tmp_path / "a.jsonl", "sglang", **options)
    assert str(tmp_path / "a.jsonl") in str(error.value)
    assert not (tmp_path / "out").exists()
