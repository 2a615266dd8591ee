"""Time between a sequence's tokens while long prompts arrive and experts move, by processor time: other programs do
not count.

    python benchmarks/token_gaps.py [--sequences 200] [--prompt 3000] [--budgets 512 2048] [--json F]

One rank in this process, the shipped model with its positions extended, in float32. Sequences of 64 tokens come and go,
all their places taken; beside them a long prompt follows another. A gap is the processor time of the thread between two
passes that gave a sequence a token. Three runs a budget: without long prompts, with them, and while, besides, a
re-placement that moves every expert follows another. Budgets 0 = as the engine is by default.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streams_changing import extended

from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.placement import Placement
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.migration.live import LiveMigration

SHORT_TOKENS, PROMPTS_SEED = 64, 3


class Load:
    """An engine that is always full.

    Attributes:
        gaps: seconds between two tokens of a sequence.
        prompts: long prompts that have got their token.
    """

    def __init__(self, model: Path, budget: int, args: argparse.Namespace, *, long: bool, moving: bool) -> None:
        options = {"max_prefill_tokens": budget} if budget else {}
        limits = EngineLimits(
            max_sequences=args.sequences + 1, max_length=args.prompt + 1, staging_rows=1 if moving else 0, **options
        )
        self._engine = Engine(model, dtype=torch.float32, limits=limits)
        self._rng, self._names = np.random.default_rng(PROMPTS_SEED), itertools.count()
        self._sequences, self._prompt, self._long, self._moving = args.sequences, args.prompt, long, moving
        self._migration: LiveMigration | None = None
        self._last: dict[str, float] = {}
        self.gaps: list[float] = []
        self.prompts = self.switches = 0

    def run(self, passes: int, warm_up: int) -> None:
        """Some passes, of which the first are not measured."""
        for number in range(warm_up + passes):
            if number == warm_up:
                self.gaps, self.prompts, self.switches = [], 0, 0
            self._fill()
            stepped = self._engine.step_with_note(0)
            self._move()
            now = time.thread_time()
            for name, index, _ in stepped.drawn:
                if index:
                    self.gaps.append(now - self._last[name])
                self._last[name] = now
            self.prompts += sum(completion.request_id.startswith("long") for completion in stepped.completions)

    def _fill(self) -> None:
        scheduler = self._engine.scheduler
        names = [r.request_id for r in scheduler.waiting] + [s.request.request_id for s in scheduler.running]
        short = sum(name.startswith("short") for name in names)
        for _ in range(self._sequences - short):
            number = next(self._names)
            tokens = 1 + number % SHORT_TOKENS if number < self._sequences else SHORT_TOKENS  # they end one by one
            self._ask(f"short {number}", int(self._rng.integers(4, 33)), tokens)
        if self._long and len(names) == short:
            self._ask(f"long {next(self._names)}", self._prompt, 1)

    def _ask(self, name: str, prompt: int, tokens: int) -> None:
        ids = tuple(self._rng.integers(1, 4000, prompt).tolist())
        self._engine.add_request(Request(name, ids, tokens, stop_ids=()))

    def _move(self) -> None:
        if not self._moving:
            return
        if self._migration is None:
            old = self._engine.placement
            new: Placement = old.replace(slot_to_expert=np.roll(old.slot_to_expert, 1, axis=1))
            size = self._engine.executor.runtime.experts.expert_bytes(0)
            plan = plan_migration(old, new, expert_bytes=size, staging_bytes=size)
            self._migration = LiveMigration(self._engine, plan, bytes_per_step=8 << 20)
        self._migration.advance()
        if self._migration.progress.state != "moving":
            self._migration, self.switches = None, self.switches + 1

    def figures(self) -> dict[str, Any]:
        """Of the passes that were measured."""
        ordered = sorted(self.gaps)
        median, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
        figures = {"median": median, "p99": p99, "worst": ordered[-1], "p99_to_median": p99 / median}
        return {**figures, "gaps": len(ordered), "long_prompts": self.prompts, "switches": self.switches}


RUNS = {
    "no long prompts": {"long": False, "moving": False},
    "long prompts": {"long": True, "moving": False},
    "long prompts, experts move": {"long": True, "moving": True},
}


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    spread = "  ".join(f"{name} {1e3 * row[name]:7.1f} ms" for name in ("median", "p99", "worst"))
    counts = f"long prompts {row['long_prompts']:3}  switches {row['switches']:3}"
    return f"{spread}  p99 / median {row['p99_to_median']:5.2f}  {counts}"


def main() -> None:
    """Print a table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200, metavar="N", help="that get tokens")
    parser.add_argument("--prompt", type=int, default=3000, metavar="N", help="tokens of a long prompt")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 2048], metavar="N")
    parser.add_argument("--passes", type=int, default=200, metavar="N", help="that are measured")
    parser.add_argument("--json", metavar="F")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="moeplace-") as folder:
        model = extended(Path(folder), args.prompt + 64)
        for budget, (name, run) in itertools.product(args.budgets, RUNS.items()):
            load = Load(model, budget, args, **run)
            load.run(args.passes, warm_up=2 * SHORT_TOKENS)
            rows.append({"budget": budget, "run": name, **load.figures()})
            print(f"budget {budget:5}  {name:26} {describe(rows[-1])}", flush=True)
    if args.json:
        conditions = {**{name: getattr(args, name) for name in vars(args) if name != "json"}, "threads": 1}
        conditions |= {"torch": torch.__version__, "machine": platform.machine()}
        Path(args.json).write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
