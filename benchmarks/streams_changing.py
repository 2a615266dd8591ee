"""Many streams while experts move and long prompts arrive: the time between a stream's tokens, 99 % against the median.

    python benchmarks/streams_changing.py [--streams 200] [--long 2] [--prompt 3000] [--budgets 512 8192] [--json F]

Starts `moeplace serve --http --admin` on several ranks with the shipped model, whose positions are extended (what it
says beyond does not matter here). Three runs a budget: the streams alone; while two placements that differ in every
expert follow each other; and while, besides, clients send one long prompt after the other. Every stream must end with
the tokens that its prompt gets alone. Servers with the budgets run one after the other, `--repeats` times.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from http_streams import PATIENCE, SHIPPED, Server, Streams, add_stream_arguments, answers_alone, run_streams

from moeplace.placement.cluster import even_slots
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import save_placement
from moeplace.runtime.models.checkpoint import Checkpoint

ADMIN_KEY = "benchmark"


def extended(folder: Path, positions: int) -> Path:
    """The shipped model with more positions, in a folder."""
    for path in SHIPPED.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((SHIPPED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return folder


def opposite_placements(model: Path, ranks: int, folder: Path) -> list[bytes]:
    """Files of two placements: in each, a rank has what its neighbour has in the other."""
    checkpoint = Checkpoint(model)
    slots = even_slots(int(checkpoint.experts_per_layer.max()), ranks)
    first = index_order(
        checkpoint.experts_per_layer,
        slots,
        np.zeros(ranks, dtype=np.int64),
        layer_ids=checkpoint.layer_ids,
        num_hidden_layers=checkpoint.num_hidden_layers,
    )
    files = []
    for number in range(2):
        rolled: Placement = first.replace(slot_to_expert=np.roll(first.slot_to_expert, number * int(slots[0]), axis=1))
        save_placement(path := folder / f"placement-{number}.json", rolled)
        files.append(path.read_bytes())
    return files


async def _keep_placing(server: Server, files: list[bytes], stop: asyncio.Event, done: list[int]) -> None:
    """One placement after the other, each asked for when the one before is in force."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, headers=headers) as client:
        while not stop.is_set():
            with suppress(httpx.TransportError):  # of a server that is too busy to keep a connection
                answer = await client.post("/admin/place", content=files[(len(done) + 1) % 2])
                if answer.status_code == 202:
                    done.append(answer.json()["placement_version"])
                elif "another" not in answer.text:
                    raise RuntimeError(answer.text)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.1)


async def _keep_asking(server: Server, index: int, tokens: int, stop: asyncio.Event, done: list[int]) -> None:
    """One long prompt after the other, no two alike."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
        while not stop.is_set():
            first = 1 + len(done) + 1000 * index
            prompt = [(first + 37 * position) % 4000 + 1 for position in range(tokens)]
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            (await client.post("/v1/completions", json=body)).raise_for_status()
            done.append(index)


def _figures(seen: Streams, **counts: int) -> dict[str, Any]:
    figures = seen.figures()
    gaps = figures["seconds_between_pieces"]
    return {**figures, **counts, "p99_to_median": gaps["p99"] / gaps["median"]}


async def _measure(server: Server, args: argparse.Namespace, files: list[bytes]) -> dict[str, Any]:
    expected = await answers_alone(server, args.streams, args.max_tokens)
    found = {"alone": _figures(await run_streams(server, expected, args.max_tokens, args.rounds, [], asyncio.Event()))}
    for name, long in (("changing", 0), ("changing, long prompts", args.long)):
        stop, placed, asked = asyncio.Event(), [], []  # type: ignore[var-annotated]
        beside = [_keep_placing(server, files, stop, placed)]
        beside += [_keep_asking(server, index, args.prompt, stop, asked) for index in range(long)]
        seen = await run_streams(server, expected, args.max_tokens, args.rounds, beside, stop)
        found[name] = _figures(seen, placements_asked=len(placed), long_prompts=len(asked))
    return found


def _measure_budget(budget: int, args: argparse.Namespace, model: Path, files: list[bytes]) -> dict[str, Any]:
    options = ["--admin", "--max-length", str(args.prompt + args.max_tokens + 64)]
    options += ["--max-prefill-tokens", str(budget)] if budget else []
    server = Server(str(model), args.streams + args.long, args.ranks, *options)
    try:
        figures = asyncio.run(_measure(server, args, files))
        return {**figures, "placement_version": server.samples()["moeplace_placement_version{}"]}
    finally:
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams while experts move and long prompts arrive.")
    add_stream_arguments(parser, ranks=2, rounds=1)
    parser.add_argument("--long", type=int, default=2, metavar="N", help="clients with long prompts")
    parser.add_argument("--prompt", type=int, default=3000, metavar="N", help="tokens of a long prompt")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[512, 8192], metavar="N", help="--max-prefill-tokens; 0 = not given"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="how often each budget is measured, in turn"
    )
    args = parser.parse_args()
    os.environ["MOEPLACE_ADMIN_KEY"] = ADMIN_KEY
    runs: dict[str, list[dict[str, Any]]] = {str(budget): [] for budget in args.budgets}
    with tempfile.TemporaryDirectory(prefix="moeplace-") as name:
        (folder := Path(name) / "model").mkdir()
        model = extended(folder, args.prompt + args.max_tokens + 1000)
        files = opposite_placements(model, args.ranks, Path(name))
        for _ in range(args.repeats):
            for budget in args.budgets:
                runs[str(budget)].append(_measure_budget(budget, args, model, files))
    conditions = {name: getattr(args, name) for name in vars(args) if name != "json"}
    conditions |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    result = {"runs": runs, "conditions": {**conditions, "load_average": os.getloadavg()[0]}}
    text = json.dumps(result, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    wrong = 0
    for budget, measured in runs.items():
        for name in ("alone", "changing", "changing, long prompts"):
            ratio = statistics.median(one[name]["p99_to_median"] for one in measured)
            wrong += sum(one[name]["errors"] + one[name]["changed"] for one in measured)
            print(f"budget {budget:>5}  {name:24} p99 / median between pieces {ratio:.2f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
