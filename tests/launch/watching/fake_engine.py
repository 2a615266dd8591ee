"""A server that answers as the HTTP handlers of SGLang 0.5.23 and vLLM 0.33.0 do, with routing drawn from a seed."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

EXPERTS, TOP_K, DENSE = 8, 2, 1


class FakeEngine:
    """What the server knows.

    Attributes:
        bias_LE: odds of experts per MoE layer are exp(bias); tests change it while the server runs.
        requests: bodies received, in order.
        failing: answers 500 while it is set.
        recordings: where dumps go.
        key: bearer token that is asked for; "" = none.
    """

    def __init__(self, bias_LE: np.ndarray, recordings: Path | None = None, key: str = "") -> None:
        self.bias_LE, self.recordings, self.key = bias_LE, recordings, key
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.failing = threading.Event()
        self._recording = False
        self._rng = np.random.default_rng(0)
        self._lock = threading.Lock()

    def ids(self, tokens: int) -> np.ndarray:
        """(T, L*, K): zeros in the dense layers, as the engines' buffers start."""
        layers = len(self.bias_LE)
        ids = np.zeros((tokens, DENSE + layers, TOP_K), np.int32)
        noise = self._rng.gumbel(size=(tokens, layers, EXPERTS))
        ids[:, DENSE:] = np.argsort(-(self.bias_LE + noise), axis=2)[:, :, :TOP_K]
        return ids

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | str:
        """The document of a route."""
        with self._lock:
            self.requests.append((path, body))
            if path == "/generate":
                return self._generate(body)
            if path == "/v1/completions":
                return self._complete(body)
            return self._record(path)

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        new = body["sampling_params"]["max_new_tokens"]
        meta: dict[str, Any] = {"id": str(len(self.requests)), "prompt_tokens": 12, "completion_tokens": new}
        if body.get("return_routed_experts"):
            meta["routed_experts"] = base64.b64encode(self.ids(12 + new - 1).tobytes()).decode()
        return {"text": "...", "meta_info": meta}

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        new, data = body["max_tokens"], io.BytesIO()
        np.save(data, self.ids(12 + new - 1).astype(np.uint8))
        choice = {"index": 0, "text": "...", "routed_experts": base64.b64encode(data.getvalue()).decode()}
        usage = {"prompt_tokens": 12, "completion_tokens": new, "total_tokens": 12 + new}
        return {"id": "cmpl", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def _record(self, path: str) -> str:
        assert self.recordings is not None
        if path == "/start_expert_distribution_record":
            self._recording = True
        elif path == "/stop_expert_distribution_record":
            assert self._recording
            self._recording = False
        else:
            import torch

            ids = self.ids(400)[:, DENSE:]
            counts = np.zeros((DENSE + ids.shape[1], EXPERTS), np.int32)
            for layer in range(ids.shape[1]):
                counts[DENSE + layer] = np.bincount(ids[:, layer].reshape(-1), minlength=EXPERTS)
            name = f"expert_distribution_recorder_{time.time()}.pt"
            dump = {"rank": 0, "logical_count": torch.from_numpy(np.stack([counts, 0 * counts]))}
            torch.save({**dump, "average_utilization_rate_over_window": None}, self.recordings / name)
        return "Success"


@contextmanager
def serving(engine: FakeEngine) -> Iterator[str]:
    """The address of the running server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
            if engine.key and self.headers["Authorization"] != f"Bearer {engine.key}":
                return self._send(401, {"error": "Unauthorized"})
            if engine.failing.is_set():
                return self._send(500, {"error": {"message": "the model is loading"}})
            return self._send(200, engine.answer(self.path, body))

        def _send(self, status: int, document: object) -> None:
            content = (document if isinstance(document, str) else json.dumps(document)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing on the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
