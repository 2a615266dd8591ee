"""Engine: serve a Mixture-of-Experts checkpoint on the ranks of a group, under a placement.

    engine = Engine("checkpoint", placement, mode="coherent", group=RankGroup.from_environment(timeout=60))
    completions = engine.generate([Request("a", (1, 2, 3), max_new_tokens=8)])

Every rank makes the same engine and calls the same methods; `generate` takes the requests of rank 0. A serving loop
calls `add_request` (the same on every rank) and `step`. A step is one pass: the prefill of newly admitted requests if
there are any, else one token for every running sequence; after a prefill, a token comes first.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from moeplace.placement.cluster import even_slots
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import require_same_model
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Mode, Placement, index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.executor import Executor, by_home, load_experts
from moeplace.runtime.engine.load_window import LoadWindow
from moeplace.runtime.engine.modes import ModeRule, Phase, TracePredictor, choose_mode_rule
from moeplace.runtime.engine.requests import Completion, Request, RunningSequence, Scheduler
from moeplace.runtime.engine.sampling import sample
from moeplace.runtime.exchange.coherent import CapacityRule
from moeplace.runtime.exchange.dispatcher import TokenRows
from moeplace.runtime.kv.cache import KvCache, kv_bytes_per_position
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder

logger = logging.getLogger(__name__)

LOCAL_TIMEOUT = 60.0


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine holds at once.

    Attributes:
        max_sequences: sequences in flight over all ranks.
        max_length: positions of a sequence, prompt and completion together; None = the model's, at most 2048.
        kv_bytes: K/V memory of a rank; lowers `max_sequences` where it does not suffice. None = no limit.
        max_prefill_tokens: prompt tokens of one pass (a longer prompt has a pass of its own).
        staging_rows: experts, of whatever layers, that a rank holds beyond its slots while they arrive.
        recent_ids: tokens of all ranks whose routed ids are kept, beside the loads (`window.recent`).
        rank_sequences: sequences in flight per rank, where the number of ranks may change; None = a share of
            `max_sequences` (all of them where K/V are on every rank).
    """

    max_sequences: int = 64
    max_length: int | None = None
    kv_bytes: int | None = None
    max_prefill_tokens: int = 8192
    staging_rows: int = 0
    recent_ids: int = 0
    rank_sequences: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_prefill_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")


DEFAULT_LIMITS = EngineLimits()


class Stepped(NamedTuple):
    """What a step did.

    Attributes:
        completions: requests that it finished.
        drawn: (request, index among its added tokens, token) of every token it added.
        note: what rank 0 told.
        phase: of the pass, None = there was nothing to do.
    """

    completions: list[Completion]
    drawn: list[tuple[str, int, int]]
    note: int
    phase: Phase | None


class Engine:
    """See the module.

    Attributes:
        checkpoint: what is served.
        group: the ranks; `group.counters` has the totals, `counters()` gives them as data.
        executor: passes of this rank; `executor.install(placement)` changes the placement between steps.
        scheduler: waiting and running requests.
        window: routing seen by this rank.
    """

    def __init__(
        self,
        checkpoint: str | Path | Checkpoint,
        placement: Placement | None = None,
        *,
        mode: str = "auto",
        group: RankGroup | None = None,
        dtype: torch.dtype | None = None,
        limits: EngineLimits = DEFAULT_LIMITS,
        node_aware: bool | None = None,
        capacity: CapacityRule | None = None,
        routing: RoutingTrace | None = None,
        calibration: Calibration | None = None,
        modes: ModeRule | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Open the checkpoint, agree with the other ranks, and read this rank's share.

        Args:
            placement: None = experts in index order.
            mode: auto, dispatch-combine, coherent or allgather.
            group: None = this process alone.
            dtype: None = the checkpoint's.
            node_aware: dispatch-combine sends one copy per node, forwarded inside it, as `evaluate` prices it; None =
                where tokens have several experts (and there are several nodes).
            capacity: room in messages of the coherent mode; None = the whole batch.
            routing: recorded routing, from which `auto` predicts every mode; None = `auto` follows the placement.
            calibration: measured links and expert time for those predictions.
            modes: a rule of one's own instead of `mode`; it must choose alike on every rank.
            decoder: that of the checkpoint, read already; its number type counts, not `dtype`.

        Raises:
            InputError: the model is dense, or the placement is for another model or number of ranks.
            FormatError: the checkpoint is incomplete or foreign.
            DisagreementError: ranks were given different things.
        """
        if group is None:
            group = RankGroup(dist.HashStore(), rank=0, size=1, timeout=LOCAL_TIMEOUT)
        try:
            self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
            placement = _checked_placement(self.checkpoint, placement, group.size)
            if decoder is None:
                decoder = Decoder(self.checkpoint, dtype=dtype, device=group.device)
            predictor = _make_predictor(routing, placement, calibration, decoder) if mode == "auto" else None
            if node_aware is None:
                node_aware = int(self.checkpoint.config.get("num_experts_per_tok") or 1) > 1
            self._modes = choose_mode_rule(mode, placement, predictor) if modes is None else modes
            rows, positions = _cache_size(limits, decoder, group.size, replicated=self._modes.may_be_coherent)
        except MoeplaceError as error:
            group.give_up(str(error))
            raise
        self._agreed = {
            "checkpoint": self.checkpoint.fingerprint,
            "mode": f"{mode}{' node-aware' if node_aware else ''}",
            "recorded routing": "none" if routing is None else f"{routing.num_tokens} tokens",
            "number type": str(decoder.dtype),
            "limits": str(limits),
        }
        self.agree(group, placement)
        self.group = group.with_nodes(placement.node_of_rank)
        experts = load_experts(self.checkpoint, decoder, placement, self.group, staging_rows=limits.staging_rows)
        self.window = LoadWindow(self.checkpoint.num_layers, placement.num_experts, keep=limits.recent_ids)
        self.executor = Executor(
            decoder,
            experts,
            KvCache(decoder, rows=rows, positions=positions),
            self.group,
            placement,
            window=self.window,
            node_aware=node_aware,
            capacity=capacity,
        )
        self._max_prefill_tokens = limits.max_prefill_tokens
        self.scheduler = self._make_scheduler()
        self.stop_ids = self.checkpoint.stop_ids
        self._last_choice: dict[Phase, str] = {}

    def agree(self, group: RankGroup, placement: Placement) -> None:
        """Compare with the other ranks of a group what must be the same on all.

        Raises:
            DisagreementError: something differs.
        """
        group.agree({"placement": placement.digest, **self._agreed})

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(
            num_ranks=self.group.size,
            rows=self.executor.cache.rows,
            positions=self.executor.cache.positions,
            replicated=self._modes.may_be_coherent,
            max_prefill_tokens=self._max_prefill_tokens,
        )

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self.executor.placement

    def generate(self, requests: Sequence[Request] | None) -> list[Completion]:
        """Complete requests; the list of rank 0 counts, other ranks may pass None.

        Returns:
            Completions in the order of the requests, on every rank.

        Raises:
            InputError: a request can never fit.
            PeerLostError: a rank is gone.
        """
        requests = self.share_requests(requests)
        for request in requests:
            self.add_request(request)
        done: dict[str, Completion] = {}
        while not self.scheduler.is_idle:
            done.update({completion.request_id: completion for completion in self.step()})
        return [done[request.request_id] for request in requests]

    def share_requests(self, requests: Sequence[Request] | None) -> list[Request]:
        """The requests of rank 0, on every rank: a collective outside the layers."""
        content = json.dumps([request.to_json() for request in requests or ()]).encode()
        shared = self.group.broadcast_bytes(content, root=0, kind="requests")
        return [Request.from_json(document) for document in json.loads(shared)]

    def add_request(self, request: Request) -> None:
        """Queue a request; every rank must add the same, in the same order.

        Raises:
            InputError: it can never fit, or a token id is out of range.
        """
        self.check_request(request)
        self.scheduler.add(request)

    def check_request(self, request: Request) -> None:
        """Whether a request can be queued; raises as `add_request`."""
        self._check_tokens(request.request_id, request.token_ids)
        self.scheduler.check(request)

    def step(self) -> list[Completion]:
        """One pass on all ranks; what it finished. Nothing happens when no request is in flight."""
        return self.step_with_note(0).completions

    def step_with_note(self, note: int) -> Stepped:
        """`step`, in which rank 0 tells all ranks a number: it travels with the tokens, in the same collective."""
        scheduler = self.scheduler
        sequences = [] if scheduler.owes_token and scheduler.running else scheduler.admit()
        scheduler.owes_token = bool(sequences)
        phase: Phase = "prefill" if sequences else "decode"
        if sequences:
            lengths = [len(sequence.token_ids) for sequence in sequences]
            mode = self._choose("prefill", sum(lengths))
            rows = self.executor.prefill(sequences, mode, lengths=lengths)
            rows = _last_positions(rows, by_home(sequences))
        elif self.scheduler.running:
            sequences = list(self.scheduler.running)
            rows = self.executor.decode(sequences, self._choose("decode", len(sequences)))
        else:
            return Stepped([], [], self.tell(note), None)
        ordered = by_home(sequences)
        tokens, heard = self._sample(rows, ordered, note)
        drawn = []
        for sequence, token in zip(ordered, tokens, strict=True):
            if sequence.cached == len(sequence.token_ids):  # else a known token was decoded once more
                drawn.append((sequence.request.request_id, len(sequence.added), token))
                sequence.token_ids.append(token)
        return Stepped(self._finish(ordered), drawn, heard, phase)

    def tell(self, note: int) -> int:
        """The number of rank 0, on every rank: a collective of its own."""
        number = torch.tensor([note if self.group.rank == 0 else 0], device=self.group.device)
        if self.group.size > 1:
            self.group.all_reduce(number, kind="note")
        return int(number.item())

    def regroup(self, group: RankGroup, placement: Placement, *, version: int) -> None:
        """Go on with the ranks of another group, between two steps and on all of them together.

        The experts of `placement` must be in the slots of this rank. No sequence runs afterwards: `scheduler` is a new
        one, for the caller to fill.

        Raises:
            DisagreementError: ranks were given different placements.
        """
        self.agree(group, placement)
        self.group = group.with_nodes(placement.node_of_rank)
        self.executor.regroup(self.group, placement, version=version)
        self.scheduler = self._make_scheduler()

    def score(
        self, sequences: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Logits of given token sequences, all positions: the first `prompt_lengths` by prefill, the rest by decoding.

        Args:
            sequences: token ids.
            prompt_lengths: None = everything by prefill.

        Returns:
            (length, V) per sequence, on every rank.
        """
        lengths = [len(s) for s in sequences] if prompt_lengths is None else list(prompt_lengths)
        results: list[torch.Tensor] = []
        pending = list(zip(sequences, lengths, strict=True))
        while pending:
            placed: list[tuple[RunningSequence, int]] = []
            while pending and (sequence := self._place_forced(pending[0][0], len(results) + len(placed))) is not None:
                placed.append((sequence, pending.pop(0)[1]))
            if not placed:
                raise InputError("no row of the K/V cache is free for scoring; finish running requests first")
            results += self._score_placed(placed)
        return results

    def counters(self) -> dict[str, Any]:
        """The totals of this rank since the last reset, as data."""
        self.executor.runtime.experts.flush_counts()
        return {**self.group.counters.snapshot(), "placement_version": self.executor.version}

    def total_load(self) -> np.ndarray:
        """(L, E) routed assignments of all ranks since the window's last reset: a collective."""
        load = torch.as_tensor(self.window.load, device=self.group.device).clone()
        if self.group.size > 1:
            self.group.all_reduce(load, kind="load")
        return load.cpu().numpy()

    def _choose(self, phase: Phase, num_tokens: int) -> Mode:
        choice = self._modes.choose(phase, num_tokens)
        if self._last_choice.get(phase) != choice.mode and self.group.rank == 0:
            logger.info("%s runs in mode %s: %s", phase, choice.mode, choice.reason)
        self._last_choice[phase] = choice.mode
        return choice.mode

    @torch.inference_mode()
    def _sample(self, rows: TokenRows, ordered: list[RunningSequence], note: int) -> tuple[list[int], int]:
        """The next token of each sequence: drawn where its hidden state is, then made known to all ranks; the note."""
        logits = self.executor.decoder.logits(rows.x)
        greedy = logits.argmax(1)
        tokens = torch.zeros(len(ordered) + 1, dtype=torch.int64, device=rows.x.device)
        tokens[rows.token] = greedy
        tokens[-1] = note if self.group.rank == 0 else 0
        for row, index in enumerate(rows.token.tolist()):
            parameters = ordered[index].request.sampling
            if parameters.temperature:
                tokens[index] = sample(logits[row], parameters, position=len(ordered[index].token_ids))
        if self.group.size > 1:
            self.group.all_reduce(tokens, kind="tokens")
        *drawn, heard = tokens.tolist()
        return drawn, heard

    def _finish(self, ordered: list[RunningSequence]) -> list[Completion]:
        finished = []
        for sequence in ordered:
            reason = sequence.finish_reason(self.stop_ids)
            if reason is not None:
                self.scheduler.release(sequence)
                finished.append(Completion(sequence.request.request_id, sequence.added, reason))
        return finished

    def _check_tokens(self, name: str, token_ids: Sequence[int]) -> None:
        vocabulary = self.executor.decoder.vocabulary
        wrong = next((token for token in token_ids if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise InputError(f"request {name!r} has the token id {wrong}, which must lie in 0..{vocabulary - 1}")

    def _place_forced(self, token_ids: Sequence[int], index: int) -> RunningSequence | None:
        if len(token_ids) > self.scheduler.positions:
            raise InputError(
                f"sequence {index} has {len(token_ids)} tokens, but the K/V cache holds at most "
                f"{self.scheduler.positions} per sequence"
            )
        request = Request(f"score {index}", tuple(token_ids))
        self._check_tokens(request.request_id, request.token_ids)
        return self.scheduler.place(request)

    def _score_placed(self, placed: list[tuple[RunningSequence, int]]) -> list[torch.Tensor]:
        sequences, lengths = [s for s, _ in placed], [length for _, length in placed]
        mode = self._choose("prefill", sum(lengths))
        rows = self.executor.prefill(sequences, mode, lengths=lengths)
        logits = self._gather_logits(rows, sum(lengths))
        length_of = dict(zip(map(id, sequences), lengths, strict=True))
        ordered = by_home(sequences)
        blocks = logits.split([length_of[id(sequence)] for sequence in ordered])
        parts = {id(sequence): [block] for sequence, block in zip(ordered, blocks, strict=True)}
        while active := [s for s in ordered if s.cached < len(s.token_ids)]:
            rows = self.executor.decode(active, self._choose("decode", len(active)))
            for sequence, row in zip(active, self._gather_logits(rows, len(active)), strict=True):
                parts[id(sequence)].append(row[None])
        for sequence in sequences:
            self.scheduler.release(sequence)
        return [torch.cat(parts[id(sequence)]) for sequence in sequences]

    @torch.inference_mode()
    def _gather_logits(self, rows: TokenRows, num_tokens: int) -> torch.Tensor:
        """(num_tokens, V): every token's logits come from one rank, the others add zero."""
        decoder = self.executor.decoder
        logits = torch.zeros(num_tokens, decoder.vocabulary, dtype=decoder.dtype, device=decoder.device)
        logits[rows.token] = decoder.logits(rows.x)
        if self.group.size > 1:
            self.group.all_reduce(logits, kind="logits")
        return logits


def _checked_placement(checkpoint: Checkpoint, placement: Placement | None, size: int) -> Placement:
    if placement is None:
        slots = even_slots(int(checkpoint.experts_per_layer.max()), size)
        return index_order(
            checkpoint.experts_per_layer,
            slots,
            np.zeros(size, dtype=np.int64),
            layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
        )
    if placement.num_ranks != size:
        raise InputError(f"the placement is for {placement.num_ranks} ranks, but {size} are running")
    checkpoint.check_placement(placement)
    return placement


def _make_predictor(
    routing: RoutingTrace | None, placement: Placement, calibration: Calibration | None, decoder: Decoder
) -> TracePredictor | None:
    if routing is None:
        return None
    require_same_model(routing, placement)
    kv_dim = kv_bytes_per_position(decoder) // (decoder.num_layers * decoder.dtype.itemsize)
    shape = StepShape(hidden_size=decoder.hidden_size, dtype_bytes=decoder.dtype.itemsize, kv_dim=kv_dim)
    return TracePredictor(routing, placement, calibration, shape)


def _cache_size(limits: EngineLimits, decoder: Decoder, ranks: int, *, replicated: bool) -> tuple[int, int]:
    """Rows per rank and positions per row of the K/V cache."""
    positions = min(decoder.max_positions, 2048) if limits.max_length is None else limits.max_length
    if not 1 <= positions <= decoder.max_positions:
        raise InputError(f"max_length ({positions}) must lie in 1..{decoder.max_positions}, the model's own limit")
    rows = limits.max_sequences if replicated else limits.rank_sequences or -(-limits.max_sequences // ranks)
    if limits.kv_bytes is not None:
        row_bytes = kv_bytes_per_position(decoder) * positions
        rows = min(rows, limits.kv_bytes // row_bytes)
        if rows < 1:
            raise InputError(
                f"the K/V budget ({limits.kv_bytes} bytes) must hold at least one sequence of {positions} positions, "
                f"which takes {row_bytes} bytes"
            )
    return rows, positions


def _last_positions(rows: TokenRows, ordered: list[RunningSequence]) -> TokenRows:
    """Of prefilled tokens, the last of each sequence, renamed to the sequence's number."""
    lengths = torch.tensor([sequence.cached for sequence in ordered], device=rows.token.device)
    last = lengths.cumsum(0) - 1
    owner = torch.searchsorted(last, rows.token)
    is_last = rows.token == last[owner]
    return TokenRows(rows.x[is_last], owner[is_last])
