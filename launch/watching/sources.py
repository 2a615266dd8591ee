"""Where a watcher gets an engine's routing from: answers to its own probes, or the recorder of SGLang.

A probe is a request that asks for the experts of its tokens (`routed_experts`): exact sequences and positions, from
SGLang and from vLLM, without touching other people's requests. The recorder sees all traffic, but writes files on the
server's machine: its folder must be visible here.
"""

import json
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from moeplace.launch.watching.client import EngineClient, EngineUnreachableError
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file
from moeplace.profiling.imports.canonical import Imported, ImportOptions
from moeplace.profiling.imports.routed_experts import import_requests
from moeplace.profiling.imports.sglang import import_sglang

_PROBES = {  # engine -> (path, body of a request, encoding of its experts)
    "sglang": ("/generate", "sglang-int32"),
    "vllm": ("/v1/completions", "npy"),
}


class RoutingSource(Protocol):
    """Gathers routing of a running engine."""

    def gather(self, folder: Path, stop: threading.Event) -> Imported:
        """Fetch once more; what is known lately, as a trace or load file in `folder`.

        Raises:
            EngineUnreachableError: the engine does not answer.
            FormatError: what it answers is no routing.
        """


class ProbeSource:
    """Sends prompts and keeps the routing of the latest answers."""

    def __init__(
        self,
        client: EngineClient,
        engine: str,
        prompts: Sequence[str],
        *,
        options: ImportOptions,
        model: str = "",
        new_tokens: int,
        requests: int,
        window: int,
    ) -> None:
        """
        Args:
            client: of the engine.
            engine: "sglang" or "vllm".
            prompts: sent in turn.
            options: what the answers do not say (experts, decoder layers).
            model: name that vLLM's server wants in a request.
            new_tokens: generated per request.
            requests: sent in each round.
            window: answers kept.
        """
        self._client, self._prompts, self._options = client, prompts, options
        self._path, self._encoding = _PROBES[engine]
        self._engine, self._model, self._new_tokens, self._requests = engine, model, new_tokens, requests
        self._answers: deque[bytes] = deque(maxlen=window)
        self._next = 0

    def gather(self, folder: Path, stop: threading.Event) -> Imported:
        """See `RoutingSource`."""
        for _ in range(self._requests):
            if stop.is_set():
                break
            answer = self._client.post(self._path, self._body(self._prompts[self._next % len(self._prompts)]))
            self._next += 1
            self._answers.append(b" ".join(answer.split(b"\n")))
        if not self._answers:
            raise EngineUnreachableError("stopped before the first answer")
        source = folder / "answers.jsonl"
        source.write_bytes(b"".join(answer + b"\n" for answer in self._answers))
        return import_requests(source, folder / "window.trace", self._options, encoding=self._encoding)

    def _body(self, prompt: str) -> dict[str, Any]:
        if self._engine == "vllm":
            return {"model": self._model, "prompt": prompt, "max_tokens": self._new_tokens}
        sampling = {"max_new_tokens": self._new_tokens}
        return {"text": prompt, "sampling_params": sampling, "return_routed_experts": True}


class RecorderSource:
    """Lets SGLang's expert-distribution recorder run for a while, and reads what it wrote."""

    def __init__(self, client: EngineClient, recordings: Path, *, options: ImportOptions, seconds: float) -> None:
        """
        Args:
            client: of the engine.
            recordings: the server's `SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR`, as seen from here.
            options: what the dump does not say.
            seconds: that the recorder runs.

        Raises:
            InputError: there is no such folder.
        """
        if not recordings.is_dir():
            raise InputError(f"recordings ({recordings}) must be the folder that the server writes its dumps to")
        self._client, self._recordings, self._options, self._seconds = client, recordings, options, seconds

    def gather(self, folder: Path, stop: threading.Event) -> Imported:
        """See `RoutingSource`."""
        before = self._dumps()
        self._client.post("/start_expert_distribution_record")
        try:
            stop.wait(self._seconds)
        finally:
            self._client.post("/stop_expert_distribution_record")
        self._client.post("/dump_expert_distribution_record")
        found = self._dumps() - before
        if not found:
            raise EngineUnreachableError(f"the server wrote no dump to {self._recordings}: is it the right folder?")
        dumps = folder / "dumps"
        dumps.mkdir(exist_ok=True)
        for old in dumps.iterdir():
            old.unlink()
        for path in found:
            (dumps / path.name).write_bytes(path.read_bytes())
        return import_sglang(dumps, folder / "window.trace", replace(self._options, top_k=None))

    def _dumps(self) -> set[Path]:
        return set(self._recordings.glob("expert_distribution_recorder_*.pt"))


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: JSON lines with `prompt`, or one text a line.

    Raises:
        InputError: there is no such file, or nothing in it.
        FormatError: a line of JSON has no prompt.
    """
    prompts = []
    for number, line in enumerate(require_file(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}, line {number} is no JSON object with a prompt") from error
        prompts.append(str(prompt))
    if not prompts:
        raise InputError(f"{path} has no prompts")
    return prompts
