"""Engine: serve a Mixture-of-Experts checkpoint on the ranks of a group, under a placement.

    engine = Engine("checkpoint", placement, mode="coherent", group=RankGroup.from_environment(timeout=60))
    completions = engine.generate([Request("a", (1, 2, 3), max_new_tokens=8)])

Every rank makes the same engine and calls the same methods; `generate` takes the requests of rank 0. A serving loop
calls `add_request` (the same on every rank) and `step`. A step is one pass: one token for every running sequence, and
chunks of prompts beside them while there are any.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.admission.forecast import ExpertForecast
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.construction import EngineChoices, EngineParts, prepare_engine
from moeplace.runtime.engine.executor import Executor
from moeplace.runtime.engine.limits import DEFAULT_LIMITS, EngineLimits
from moeplace.runtime.engine.loading import load_experts
from moeplace.runtime.engine.logprobs import TokenLogprob, WantedLogprobs
from moeplace.runtime.engine.modes import ModeChooser, ModeRule, Phase, RecordedRouting
from moeplace.runtime.engine.requests import Completion, Request, RunningSequence
from moeplace.runtime.engine.sampler import Draw, draw_tokens
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.engine.scoring import Scorer
from moeplace.runtime.engine.whole_executor import SequenceStates, WholeExecutor
from moeplace.runtime.engine.windows.load import LoadWindow
from moeplace.runtime.exchange.dispatcher import TokenRows
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.views import rotates_by_length
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import ServedModel
from moeplace.runtime.models.whole import WholeModel

LOCAL_TIMEOUT = 60.0


class Stepped(NamedTuple):
    """What a step did.

    Attributes:
        completions: requests that it finished.
        drawn: (request, index among its added tokens, token) of every token it added.
        note: what rank 0 told.
        phase: of the pass, None = there was nothing to do; "prefill" = it ran tokens of prompts, whatever else.
        logprobs: request -> of its token, where it wants that.
    """

    completions: list[Completion]
    drawn: list[tuple[str, int, int]]
    note: int
    phase: Phase | None
    logprobs: dict[str, TokenLogprob] = {}  # noqa: RUF012 (never changed)


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
        mode: str | ModeRule = "auto",
        group: RankGroup | None = None,
        dtype: torch.dtype | None = None,
        limits: EngineLimits = DEFAULT_LIMITS,
        node_aware: bool | None = None,
        recorded: RecordedRouting | None = None,
        decoder: ServedModel | None = None,
        replica_rule: str = "moeplace",
    ) -> None:
        """Open the checkpoint, agree with the other ranks, and read this rank's share.

        Args:
            placement: None = experts in index order.
            mode: auto, dispatch-combine, coherent, allgather, or a rule of one's own that chooses alike on every rank.
            group: None = this process alone.
            dtype: None = the checkpoint's.
            node_aware: dispatch-combine sends one copy per node, forwarded inside it, as `evaluate` prices it; None =
                where tokens have several experts (and there are several nodes).
            recorded: routing from which `auto` predicts every mode; None = `auto` follows the placement.
            decoder: that of the checkpoint, read already; its number type counts, not `dtype`.
            replica_rule: who serves an expert with several slots, `moeplace` or `balanced`.

        Raises:
            InputError: the model is dense, the placement is for another model or number of ranks, or the replica rule
                is that of an engine.
            FormatError: the checkpoint is incomplete or foreign.
            DisagreementError: ranks were given different things.
        """
        if group is None:
            group = RankGroup(dist.HashStore(), rank=0, size=1, timeout=LOCAL_TIMEOUT)
        choices = EngineChoices(mode, dtype, limits, node_aware, recorded, replica_rule)
        try:
            parts = prepare_engine(
                checkpoint, placement, choices, decoder=decoder, size=group.size, device=group.device
            )
        except BaseException as error:  # whatever it is, the others must hear of it
            group.give_up(str(error) or type(error).__name__)
            raise
        self.checkpoint, self.limits = parts.checkpoint, limits
        self._agreed = parts.agreed
        self.agree(group, parts.placement)
        self.group = group.with_nodes(parts.placement.node_of_rank)
        self._modes = ModeChooser(parts.modes, parts.placement, self.group)
        try:
            self.executor = self._make_executor(parts)
        except BaseException:
            self.group.close()  # the others must not wait in a collective for a rank that never comes
            group.close()
            raise
        self.window, self._pages, self._spare_rows = self.executor.window, parts.cache_pages, parts.spare_rows
        self.scheduler = self._make_scheduler()
        self.stop_ids = frozenset(self.checkpoint.stop_ids)
        self._forecast: ExpertForecast | None = None

    def _make_executor(self, parts: EngineParts) -> Executor | WholeExecutor:
        placement, model = parts.placement, parts.decoder
        experts = load_experts(parts.checkpoint, placement, self.group.rank, self.limits, model.dtype, model.device)
        options: dict[str, Any] = {
            "activation": parts.checkpoint.family.forms[0].activation,
            "window": LoadWindow(parts.checkpoint.num_layers, placement.num_experts, keep=self.limits.recent_ids),
            "node_aware": parts.node_aware,
            "replica_rule": parts.replica_rule,
        }
        room = {"rows": parts.cache_rows, "positions": parts.cache_positions}
        if isinstance(model, WholeModel):
            return WholeExecutor(model, experts, SequenceStates(**room), self.group, placement, **options)
        fixed_shapes, replicated = self.limits.fixed_shapes, parts.modes.may_be_coherent
        cache = KvCache(model, **room, replicated=replicated, seats_nobody=fixed_shapes and replicated)
        return Executor(model, experts, cache, self.group, placement, fixed_shapes=fixed_shapes, **options)

    def agree(self, group: RankGroup, placement: Placement) -> None:
        """Compare with the other ranks of a group what must be the same on all.

        Raises:
            DisagreementError: something differs.
        """
        group.agree({"placement": placement.digest, **self._agreed})

    def _make_scheduler(self) -> Scheduler:
        executor = self.executor
        is_cut = isinstance(executor, Executor)
        return Scheduler(
            num_ranks=self.group.size,
            rows=executor.cache.rows,
            positions=executor.cache.positions,
            replicated=self._modes.rule.may_be_coherent,
            max_prefill_tokens=self.limits.max_prefill_tokens,
            cuts_prompts=is_cut,
            pages=self._pages,
            spare_rows=self._spare_rows,
            most_overtaken=self.limits.alike,
            reuses_prefixes=self.limits.reuses_prefixes and is_cut and not rotates_by_length(executor.decoder),
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
        request.require_tokens(self.executor.decoder.vocabulary)
        self.scheduler.check(request)

    def step(self) -> list[Completion]:
        """One pass on all ranks; what it finished. Nothing happens when no request is in flight."""
        return self.step_with_note(0).completions

    def foresee(self) -> Batch:
        """What the next step is going to run, unless a sequence goes before. On all ranks together: where requests may
        overtake others, rank 0 tells what it takes to choose.

        Raises:
            PeerLostError: a rank is gone.
        """
        self._share_forecasts()
        return self.scheduler.foresee()

    def _share_forecasts(self) -> None:
        requests = self.scheduler.unforeseen()
        if not requests:
            return
        if self._forecast is None:
            assert isinstance(self.executor, Executor), "others were refused"
            self._forecast = ExpertForecast(self.executor.decoder, self.placement.num_experts)
        profile_GX = self._forecast.share(self.group, [request.token_ids for request in requests])
        self.scheduler.order.learn([request.request_id for request in requests], profile_GX)

    def step_with_note(self, note: int) -> Stepped:
        """`step`, in which rank 0 tells all ranks a number: it travels with the tokens, in the same collective."""
        self._share_forecasts()
        batch = self.scheduler.next_batch()
        if not batch.sequences:
            return Stepped([], [], self.tell(note), None)
        phase: Phase = "prefill" if batch.has_prompts else "decode"
        mode = self._choose(phase, batch.num_tokens)
        rows = self.executor.run(batch, mode, share=batch.has_prompts and self._shares_kv(len(batch.sequences)))
        complete = [sequence for sequence in batch.sequences if not sequence.num_missing]
        tokens, logprobs, heard = self._sample(batch.last_rows(rows, complete), complete, note)
        drawn, told = [], {}
        for index, (sequence, token) in enumerate(zip(complete, tokens, strict=True)):
            if index in logprobs:
                told[sequence.request.request_id] = sequence.logprobs[sequence.num_added] = logprobs[index]
            drawn.append((sequence.request.request_id, sequence.num_added, token))
            sequence.token_ids.append(token)
        finished = self._finish(batch.sequences)
        if not self.scheduler.running:
            self.executor.settle()  # nobody knows when the next step comes
        return Stepped(finished, drawn, heard, phase, told)

    def tell(self, note: int) -> int:
        """The number of rank 0, on every rank: a collective of its own."""
        number = torch.tensor([note if self.group.rank == 0 else 0], device=self.group.device)
        if self.group.size > 1:
            self.group.all_reduce(number, kind="note")
        heard = int(number.item())
        self.group.raise_if_lost()
        return heard

    def regroup(self, group: RankGroup, placement: Placement, *, version: int) -> None:
        """Go on with the ranks of another group, between two steps and on all of them together.

        They have agreed on it (`agree`), as ranks that begin with it do (`Engine`), and the experts of `placement` are
        in the slots of this rank. No sequence runs afterwards: `scheduler` is a new one, for the caller to fill.
        """
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
        return Scorer(self.executor, self.scheduler, self.group, self._choose).score(sequences, lengths)

    def _shares_kv(self, num_sequences: int) -> bool:
        """Whether passes without prompts will want K/V on every rank: they travel pass by pass, not at once then."""
        return self.scheduler.replicated and self.group.size > 1 and self._choose("decode", num_sequences) == "coherent"

    def flush_counts(self) -> None:
        """Bring counts that wait on a GPU to the counters."""
        self.executor.runtime.computation.flush_counts()

    def counters(self) -> dict[str, Any]:
        """The totals of this rank since the last reset, as data."""
        self.flush_counts()
        return {**self.group.counters.snapshot(), "placement_version": self.executor.version}

    def _choose(self, phase: Phase, num_tokens: int) -> Mode:
        self._modes.follow(self.placement, self.group)
        return self._modes.choose(phase, num_tokens)

    @torch.inference_mode()
    def _sample(
        self, rows: TokenRows, ordered: Sequence[RunningSequence], note: int
    ) -> tuple[list[int], dict[int, TokenLogprob], int]:
        """The next token of each sequence: drawn where its hidden state is, then made known to all ranks; the note.

        The log-probabilities are by sequence, of those that want them.
        """
        count, wanted = len(ordered), WantedLogprobs.of([s.request.logprobs for s in ordered])
        told = torch.zeros(count + 1 + wanted.size, dtype=torch.int64, device=rows.x.device)
        told[count] = note if self.group.rank == 0 else 0
        if len(rows):
            names, logits = rows.token.tolist(), self.executor.decoder.logits(rows.x)
            tokens = draw_tokens(logits, [self._describe_draw(ordered[index]) for index in names])
            told[rows.token] = tokens
            if wanted.size:
                wanted.write(told[count + 1 :], names, logits, tokens)
        if self.group.size > 1:
            self.group.all_reduce(told, kind="tokens")
        numbers = told.tolist()
        self.group.raise_if_lost()
        return numbers[:count], wanted.read(numbers[count + 1 :]), numbers[count]

    def _describe_draw(self, sequence: RunningSequence) -> Draw:
        request, sampling = sequence.request, sequence.request.sampling
        history_counts = sampling.has_penalties or sampling.min_tokens > 0  # else nothing of it is copied
        return Draw(
            sampling,
            position=len(sequence.token_ids),
            prompt=request.token_ids,
            added=sequence.added if history_counts else (),
            stop_ids=self.stop_ids if request.stop_set is None else request.stop_set,
        )

    def _finish(self, ordered: Sequence[RunningSequence]) -> list[Completion]:
        finished = []
        for sequence in ordered:
            reason = sequence.finish_reason(self.stop_ids)
            if reason is not None:
                self.scheduler.release(sequence)
                logprobs: tuple[TokenLogprob | None, ...] = ()
                if sequence.request.logprobs is not None:
                    logprobs = tuple(sequence.logprobs.get(index) for index in range(sequence.num_added))
                finished.append(Completion(sequence.request.request_id, sequence.added, reason, logprobs))
        return finished
