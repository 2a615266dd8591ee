"""What a block table would cost: decode steps whose attention gathers pages of K/V, beside rows that lie in one piece.

    python benchmarks/kv_pages.py [MODEL ...] [--sequences 1 8 64] [--reach 128 512 1024] [--runs 21] [--json F]

Engines on one rank with the same sequences; tokens are compared. Rows of the cache are neighbours, or apart: somebody
in the middle has left; or scattered: somebody has left between any two. With pages every layer has a pool (pages, 16
positions, heads, dim), so that a page is one piece of memory: one `index_select` by the block table brings the pages of
all sequences together in memory that is kept, and attention reads them by strides. Tables and places are made once per
step. That is the least that pages cost without an attention that reads through the table itself, which torch has not
for CPUs.

Without MODEL: the model that ships, and one layer pair of ordinary width with random weights (hidden 1,024, 8 K/V heads
of 128, 16 experts, top-2). Seconds are processor time of the thread that computes, medians of steps in alternation.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from moeplace.runtime.engine.batch import BatchPart
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.row_pool import PAGE
from moeplace.runtime.models.decoder import AttentionView
from moeplace.runtime.models.token_attention import SeenKv

SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"
WARM_UP = 3
FORMS = ("rows", "apart", "scattered", "pages")


class Pool(NamedTuple):
    """Pages of keys or values of a layer, and memory in which those of a step are brought together."""

    pages: torch.Tensor  # (pages, PAGE, heads, dim)
    gathered: torch.Tensor  # (table entries, PAGE, heads, dim)


class PagedCache:
    """K/V of sequences in pages, dealt out in a random order, as a pool that has been in use for long would."""

    def __init__(self, cache: KvCache) -> None:
        """What the rows of `cache` hold."""
        per_row = -(-cache.positions // PAGE)
        order = torch.randperm(cache.rows * per_row, generator=torch.Generator().manual_seed(0))
        self.table = order.view(cache.rows, per_row)
        self.pools = [
            tuple(self._copy(slab, order) for slab in (k, v)) for k, v in zip(cache.keys, cache.values, strict=True)
        ]

    def _copy(self, slab: torch.Tensor, order: torch.Tensor) -> Pool:
        rows, heads, positions, dim = slab.shape
        whole = slab.new_zeros(rows, heads, self.table.shape[1] * PAGE, dim)
        whole[:, :, :positions] = slab
        pages = slab.new_zeros(len(order), PAGE, heads, dim)
        pages[order] = whole.transpose(1, 2).reshape(len(order), PAGE, heads, dim)
        return Pool(pages, torch.empty_like(pages))


class PagedView:
    """Another view of single tokens, but for where K/V are; see `AttentionView`."""

    def __init__(self, plain: Any, cache: PagedCache, rows: list[int], positions: list[int]) -> None:
        self._plain, self._cache = plain, cache
        self._batch, self._longest = len(rows), max(positions) + 1
        row_B, position_B = torch.tensor(rows), torch.tensor(positions)
        self._page_B, self._offset_B = cache.table[row_B, position_B // PAGE], position_B % PAGE
        self._entries = cache.table[row_B, : -(-self._longest // PAGE)].reshape(-1)
        self.position_embeddings, self.rotation = plain.position_embeddings, plain.rotation
        self.fold, self.unfold, self.mask = plain.fold, plain.unfold, plain.mask

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """See `AttentionView`."""
        return self.store(layer, key[:, :, 0], value[:, :, 0])[0]

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        """See `AttentionView`."""
        keys, values = self._cache.pools[layer]
        return [(self._store(keys, key), self._store(values, value))]

    def _store(self, pool: Pool, new: torch.Tensor) -> torch.Tensor:
        pool.pages[self._page_B, self._offset_B] = new
        gathered = pool.gathered[: len(self._entries)]
        torch.index_select(pool.pages, 0, self._entries, out=gathered)
        positions_first = gathered.view(self._batch, -1, *new.shape[1:])
        return positions_first.transpose(1, 2)[:, :, : self._longest]


class PagedExecutor(Executor):
    """Single tokens see pages, once `pages` are there."""

    pages: PagedCache | None = None

    def _view(self, part: BatchPart) -> AttentionView:
        plain = super()._view(part)
        if self.pages is None or part.kind != "token":
            return plain
        rows = [sequence.row for sequence in part.sequences]
        return PagedView(plain, self.pages, rows, [sequence.cached for sequence in part.sequences])


class Side:
    """An engine whose sequences have their prompts."""

    def __init__(self, path: str, prompts: torch.Tensor, steps: int, *, form: str) -> None:
        count, reach = prompts.shape
        limits = EngineLimits(
            max_sequences=2 * count,
            max_length=reach + steps,
            max_prefill_tokens=count * (reach + 1),
            reuses_prefixes=False,
        )
        self._engine = Engine(path, dtype=torch.float32, limits=limits)
        if form == "pages":
            self._engine.executor.__class__ = PagedExecutor
        for number, prompt in enumerate(prompts.tolist()):
            self._engine.add_request(Request(str(number), tuple(prompt), max_new_tokens=steps, stop_ids=()))
            if form == "scattered" or (form == "apart" and number == count // 2 - 1):  # somebody who leaves soon
                self._engine.add_request(Request(f"hole {number}", (1,), max_new_tokens=steps, stop_ids=()))
        while self._engine.scheduler.waiting or any(s.num_missing > 1 for s in self._engine.scheduler.running):
            self._engine.step()
        for number in range(count):
            self._engine.scheduler.cancel(f"hole {number}")
        if isinstance(self._engine.executor, PagedExecutor):
            self._engine.executor.pages = PagedCache(self._engine.executor.cache)

    def step(self) -> float:
        """One token of every sequence; seconds."""
        start = time.thread_time()
        self._engine.step()
        return time.thread_time() - start

    def tokens(self) -> list[list[int]]:
        """Of every sequence."""
        return [sequence.token_ids for sequence in self._engine.scheduler.running]


def measure(path: str, sequences: int, reach: int, runs: int) -> dict[str, Any]:
    """Median seconds of a step of both sides."""
    vocabulary = json.loads((Path(path) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, vocabulary, (sequences, reach), generator=generator)
    sides = {form: Side(path, prompts, runs + WARM_UP + 40, form=form) for form in FORMS}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UP + runs):
        for name, side in sides.items():
            taken = side.step()
            if number >= WARM_UP:
                seconds[name].append(taken)
    assert all(side.tokens() == sides["rows"].tokens() for side in sides.values())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"sequences": sequences, "reach": reach, "seconds": medians}


def save_ordinary(folder: Path) -> str:
    """A model of two layers of ordinary width, with random weights."""
    config = transformers.OlmoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=16,
        num_experts_per_tok=2,
        eos_token_id=None,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Print a table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--reach", type=int, nargs="+", default=[128, 400], help="tokens before a step (128 400)")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"float32, torch {torch.__version__}, {platform.machine()}, one thread")
    print("model            sequences  reach  ms rows  ms apart  cost  ms scattered  cost  ms pages  cost")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in args.models or [str(SHIPPED), save_ordinary(Path(folder) / "ordinary")]:
            for sequences in args.sequences:
                for reach in args.reach:
                    rows.append({"model": Path(path).name, **measure(path, sequences, reach, args.runs)})
                    tell(rows[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def tell(row: dict[str, Any]) -> None:
    """A line of the table."""
    taken = row["seconds"]
    costs = [f"{taken[form] * 1e3:{len(form) + 3}.2f}  {taken[form] / taken['rows'] - 1:+4.0%}" for form in FORMS[1:]]
    print(
        f"{row['model']:16}  {row['sequences']:8}  {row['reach']:5}  {taken['rows'] * 1e3:7.2f}  {'  '.join(costs)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
