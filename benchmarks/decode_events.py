"""Operator events of a decode step, and its seconds beside the plain model with a static cache: what a layer wastes.

    python benchmarks/decode_events.py [MODEL] [--dtype float32] [--sequences 1 8 64] [--runs 31] [--json F]
    python benchmarks/decode_events.py [MODEL] --ranks 4 --modes coherent dispatch-combine

With several ranks there is no plain model beside them; host reads are counted instead (see `HostReads`): where a GPU
would have to wait for the host, means over the ranks.

Events are those that `torch.profiler` records for one step on one rank: operators, those inside operators too. Their
number does not depend on the machine. Seconds are processor time of the thread that computes (other programs do not
count), medians of runs in alternation; the plain model is `transformers`' own with its static cache.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.profiler import ProfilerActivity, profile

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.measure.host_reads import HostReads

SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"
PROMPT, ROOM = 32, 256


def prompts(sequences: int, vocabulary: int) -> torch.Tensor:
    """(sequences, PROMPT) token ids."""
    return torch.randint(vocabulary, (sequences, PROMPT), generator=torch.Generator().manual_seed(1))


class Ours:
    """An engine on one rank (or on this rank of several), its sequences running."""

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        sequences: int,
        steps: int,
        *,
        mode: str = "auto",
        group: RankGroup | None = None,
    ) -> None:
        limits = EngineLimits(
            max_sequences=sequences, max_length=PROMPT + steps + 1, max_prefill_tokens=sequences * PROMPT
        )
        self._engine = Engine(path, dtype=dtype, limits=limits, mode=mode, group=group)
        for number in range(sequences):
            prompt = tuple(prompts(sequences, self._engine.executor.decoder.vocabulary)[number].tolist())
            self._engine.add_request(Request(str(number), prompt, max_new_tokens=steps, stop_ids=()))
        while self._engine.scheduler.waiting:
            self._engine.step()

    def step(self) -> None:
        """One token for every sequence, sampled."""
        self._engine.step()

    def count_events(self) -> int:
        """Of one step."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self._engine.step()
        return len(found.events())

    def count_host_reads(self) -> int:
        """Of one step."""
        with HostReads() as reads:
            self._engine.step()
        return reads.total


class Plain:
    """The model of `transformers` with a static cache."""

    def __init__(self, path: str, dtype: torch.dtype, sequences: int) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._cache: Any = transformers.StaticCache(config=self._model.config, max_cache_len=ROOM)
        ids = prompts(sequences, self._model.config.vocab_size)
        with torch.inference_mode():
            self._model(ids, past_key_values=self._cache, use_cache=True)
        self._new, self._position = ids[:, :1], PROMPT

    @torch.inference_mode()
    def step(self) -> None:
        """One token for every sequence, the likeliest."""
        positions = torch.full((len(self._new), 1), self._position)
        logits = self._model(self._new, past_key_values=self._cache, position_ids=positions, use_cache=True).logits
        self._new, self._position = logits[:, -1:].argmax(-1), self._position + 1

    def count_events(self) -> int:
        """Of one step."""
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.step()
        return len(found.events())


def measure(path: str, dtype: torch.dtype, sequences: int, runs: int) -> dict[str, Any]:
    """Events and median seconds of both."""
    ours, plain = Ours(path, dtype, sequences, runs + 8), Plain(path, dtype, sequences)
    for _ in range(3):
        ours.step()
        plain.step()
    events = {"ours": ours.count_events(), "plain": plain.count_events()}
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(runs):
        for name, side in (("ours", ours.step), ("plain", plain.step)):
            seconds[name].append(_time(side))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"sequences": sequences, "events": events, "seconds": medians, "ratio": medians["ours"] / medians["plain"]}


def measure_ranks(path: str, dtype: torch.dtype, ranks: int, modes: list[str], sequences: list[int], runs: int) -> Any:
    """Of every mode and number of sequences: means over the ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(ranks) as pool:
        jobs = [(folder, rank, ranks, path, dtype, modes, sequences, runs) for rank in range(ranks)]
        by_rank = pool.starmap(_measure_rank, jobs, chunksize=1)
    return [
        {**rows[0], **{name: statistics.mean(row[name] for row in rows) for name in ("events", "reads", "seconds")}}
        for rows in zip(*by_rank, strict=True)
    ]


def _measure_rank(
    folder: str,
    rank: int,
    ranks: int,
    path: str,
    dtype: torch.dtype,
    modes: list[str],
    sequences: list[int],
    runs: int,
) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    for mode in modes:
        for count in sequences:
            store = dist.FileStore(f"{folder}/{mode}-{count}", ranks)
            group = RankGroup(store, rank=rank, size=ranks, timeout=300)
            ours = Ours(path, dtype, count, runs + 8, mode=mode, group=group)
            for _ in range(3):
                ours.step()
            row: dict[str, Any] = {"mode": mode, "sequences": count}
            row["events"], row["reads"] = ours.count_events(), ours.count_host_reads()
            row["seconds"] = statistics.median(_time(ours.step) for _ in range(runs))
            found.append(row)
    return found


def _time(step: Callable[[], None]) -> float:
    start = time.thread_time()
    step()
    return time.thread_time() - start


def main() -> None:
    """Print a table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--ranks", type=int, default=1, help="ranks (1)")
    parser.add_argument("--modes", nargs="+", default=["coherent", "dispatch-combine"], help="of several ranks")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.ranks > 1:
        tell_ranks(args)
        return
    rows = [measure(args.model, getattr(torch, args.dtype), count, args.runs) for count in args.sequences]
    print(f"{args.dtype}, torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}")
    print("sequences  events ours  events plain  ms ours  ms plain  ours / plain")
    for row in rows:
        events, seconds = row["events"], row["seconds"]
        print(
            f"{row['sequences']:9}  {events['ours']:11}  {events['plain']:12}  {seconds['ours'] * 1e3:7.2f}  "
            f"{seconds['plain'] * 1e3:8.2f}  {row['ratio']:12.2f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def tell_ranks(args: argparse.Namespace) -> None:
    """The table of several ranks."""
    dtype = getattr(torch, args.dtype)
    rows = measure_ranks(args.model, dtype, args.ranks, args.modes, args.sequences, args.runs)
    print(f"{args.ranks} ranks, {args.dtype}, torch {torch.__version__}, {platform.machine()}")
    print("mode              sequences  events  host reads  ms")
    for row in rows:
        print(
            f"{row['mode']:16}  {row['sequences']:9}  {row['events']:6.0f}  {row['reads']:10.1f}  "
            f"{row['seconds'] * 1e3:.2f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
