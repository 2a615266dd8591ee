"""Live migration: experts end where the placement says, and every step sees one placement, the old or the new."""

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.migration.copies import CHECKPOINT
from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.placement import EMPTY_SLOT
from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.errors import DisagreementError, MigrationError
from moeplace.runtime.experts.row_contents import checksum
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.migration.pieces import Arrival, cut_pieces, list_commits
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import Oracle, make_oracle
from tests.runtime.migration.moving import misplaced, placements, plan_for, rows_in_use, serve_while_moving, start

TOLERANCE = 1e-7
"""Absolute, for logits around 1 in float64."""


DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]


@pytest.mark.parametrize(
    ("family", "size", "mode", "rows", "bytes_per_step"),
    [
        ("gpt_oss", 2, "dispatch-combine", 1, 1 << 20),
        ("mixtral", 3, "coherent", 1, 3000),
        ("gpt_oss", 4, "coherent", 3, 3500),
    ],
)
def test_every_step_sees_one_placement(
    pool: RankPool, tmp_path: Path, family: str, size: int, mode: str, rows: int, bytes_per_step: int
) -> None:
    """Logits and tokens are the plain model's at every step: with replicas, biases cycles, whole and cut experts."""
    oracle = make_oracle(family, tmp_path)
    results = pool.run(serve_while_moving, oracle, mode, rows, bytes_per_step, size=size)
    for worst, tokens, _, wrong in results:
        assert wrong == []
        assert worst <= TOLERANCE
        assert tokens == oracle.completions
    steps = results[0][2]
    assert all(seen == steps for _, _, seen, _ in results)
    moved = [(step.bytes_moved, step.rounds_done, step.commits) for step in steps]
    ends = [index for index, step in enumerate(steps) if step.state == "done"]
    assert len(ends) == 2
    for first, last in pairwise([-1, *ends]):
        assert moved[first + 1 : last + 1] == sorted(moved[first + 1 : last + 1])
        assert steps[last].bytes_moved == steps[last].bytes_total
        growth = np.diff([0, *(bytes_moved for bytes_moved, _, _ in moved[first + 1 : last + 1])])
        assert growth.max() <= size * bytes_per_step


def commit_at_once(context: RankContext, oracle: Oracle) -> tuple[list[int], list[str], Any]:
    """Versions and digests seen with enough staging rows for the whole plan; every third expert is read from disk."""
    old, new = placements(Checkpoint(oracle.path), context.size, 2)
    engine = start(context, oracle.path, old, rows=6)
    plan = plan_for(engine, new)
    rounds = [[t._replace(source=CHECKPOINT) if t.expert % 3 == 0 else t for t in r] for r in plan.rounds]
    migration = LiveMigration(engine, replace(plan, rounds=tuple(map(tuple, rounds))), bytes_per_step=2000)
    versions, digests = [], []
    while migration.is_moving:
        versions.append(migration.advance().version)
        digests.append(engine.placement.digest)
    return versions, [old.digest, new.digest, *digests], misplaced(engine)


def test_one_commit_where_the_rows_suffice(pool: RankPool, olmoe: Oracle) -> None:
    """Nothing is visible before the last piece has come, everything after; the checkpoint is a source like a rank."""
    for versions, (old, new, *digests), wrong in pool.run(commit_at_once, olmoe, size=3):
        assert wrong == []
        assert len(versions) > 3
        assert versions == [0] * (len(versions) - 1) + [1]
        assert digests == [old] * (len(digests) - 1) + [new]


def abort_half_way(context: RankContext, oracle: Oracle, rows: int) -> tuple[str, bool, Any, int, str]:
    """Abort in the middle, go on serving, then carry out a new plan from where it stands."""
    old, new = placements(Checkpoint(oracle.path), context.size, 2)
    engine = start(context, oracle.path, old, rows=rows)
    migration = LiveMigration(engine, plan_for(engine, new), bytes_per_step=700)
    for _ in range(4):
        migration.advance()
    with pytest.raises(InputError, match="another migration is under way"):
        LiveMigration(engine, plan_for(engine, new), bytes_per_step=700)
    state = migration.abort().state
    stays, wrong, rows_left = engine.placement.equals(old), misplaced(engine), rows_in_use(engine)
    assert migration.advance().state == "aborted"
    tokens = [completion.token_ids for completion in engine.generate(oracle.requests)]
    assert tokens == oracle.completions
    again = LiveMigration(engine, plan_for(engine, new), bytes_per_step=1 << 20)
    while again.is_moving:
        again.advance()
    return state, stays, wrong + misplaced(engine), rows_left, engine.placement.digest


def test_abort_leaves_the_old_placement_serving(pool: RankPool, olmoe: Oracle) -> None:
    """Aborted half way: nothing has changed, staging rows are free, and the next migration works."""
    new = placements(Checkpoint(olmoe.path), 2, 2)[1]
    for result in pool.run(abort_half_way, olmoe, 6, size=2):
        assert result == ("aborted", True, [], 0, new.digest)


def spoil_resting_layers(engine: Engine) -> None:
    """Change all layers but the first, the only one that moves: the logits show it, checksums of what moves do not."""
    for weights in engine.executor.runtime.experts.weights[1:]:
        weights.down.mul_(-3)


def break_something(context: RankContext, oracle: Oracle, what: str) -> tuple[str, bool, int, str]:
    """The sentence with which this rank ends when something is wrong at the switch."""
    old, new = placements(Checkpoint(oracle.path), context.size, 2)
    if what == "probe":
        new = new.replace(slot_to_expert=np.concatenate([new.slot_to_expert[:1], old.slot_to_expert[1:]]))
    engine = start(context, oracle.path, old, rows=6)
    plan, store = plan_for(engine, new), engine.executor.runtime.experts
    probe = oracle.sequences[:1] if what == "probe" else ()
    migration = LiveMigration(engine, plan, bytes_per_step=4000, probe=probe)
    if what == "bytes":
        transfer = next(t for t in plan.transfers if len({*plan.members(t)}) == 2)
        if plan.members(transfer)[0] == context.rank:
            store.row_bytes(transfer.layer, store.contents.row_of(transfer.layer, transfer.expert) or 0)[0][5] ^= 4
    elif what == "probe":
        migration.advance()  # the logits from before the switch are taken here
        spoil_resting_layers(engine)
    elif context.rank == 1:
        last = migration.commits[-1]
        slots_LS = last.placement.slot_to_expert[:, ::-1]
        migration.commits[-1] = replace(last, slots=slots_LS)
    try:
        while migration.is_moving:
            migration.advance()
    except (MigrationError, DisagreementError) as error:
        sentence = f"{type(error).__name__}: {error}"
        serves_old = engine.placement.equals(old) and not (what == "digest" and misplaced(engine))
        return sentence, serves_old, engine.executor.version, migration.progress.state
    return "no error", False, 0, ""


@pytest.mark.parametrize("what", ["bytes", "probe", "digest"])
def test_a_failed_check_takes_the_switch_back(pool: RankPool, olmoe: Oracle, what: str) -> None:
    """Damaged bytes, changed logits, another placement on one rank: every rank says so and serves the old placement."""
    results = pool.run(break_something, olmoe, what, size=2)
    sentences = {sentence for sentence, *_ in results}
    assert len(sentences) == 1
    expected = {
        "bytes": r"MigrationError: expert \d of MoE layer \d is damaged on rank \d: its bytes are not those of the",
        "probe": "MigrationError: the logits of the probe changed by",
        "digest": "DisagreementError: ranks would switch to different placements",
    }[what]
    assert re.match(expected, sentences.pop())
    for _, serves_old, version, state in results:
        assert (serves_old, version, state) == (True, 0, "failed")


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_every_probe_counts(spoiled: int) -> None:
    """Logits that are no numbers are a change, whichever of the probes they are of, and so is one beyond the limit."""
    logits = [torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.5]]), torch.tensor([[3.0, 1.0]])]
    migration = LiveMigration.__new__(LiveMigration)
    migration._logits, migration._probe, migration._tolerance = logits, [[1], [2], [3]], 0.01
    for change, passes in ((0.0, True), (0.009, True), (0.011, False), (torch.inf, False), (torch.nan, False)):
        after = [one.clone() for one in logits]
        after[spoiled] += change * logits[spoiled].abs().max()
        migration._engine = SimpleNamespace(score=lambda probe, after=after: after)  # type: ignore[assignment]
        with nullcontext() if passes else pytest.raises(MigrationError, match="logits of the probe changed by"):
            migration._check_probe()


def disagree_about_the_plan(context: RankContext, oracle: Oracle) -> str:
    old, new, other = placements(Checkpoint(oracle.path), context.size, 3)
    engine = start(context, oracle.path, old, rows=6)
    try:
        LiveMigration(engine, plan_for(engine, other if context.rank else new), bytes_per_step=1000)
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_plans_do_not_start(pool: RankPool, olmoe: Oracle) -> None:
    """Before anything is sent, every rank says so."""
    assert all("disagree about the migration plan" in s for s in pool.run(disagree_about_the_plan, olmoe, size=2))


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_renames_its_rows(olmoe: Oracle, device: str) -> None:
    """Slots of a rank exchange their rows without a copy, and the logits stay."""
    old, new = placements(Checkpoint(olmoe.path), 1, 2, extra_slots=0)
    group = RankGroup.from_environment(timeout=60, device=device)
    engine = Engine(olmoe.path, old, group=group, dtype=torch.float32, limits=EngineLimits(staging_rows=1))
    plan = plan_for(engine, new)
    migration = LiveMigration(engine, plan, bytes_per_step=1, probe=olmoe.sequences[:2])
    progress = migration.advance()
    assert (progress.state, progress.bytes_total, progress.commits, progress.version) == ("done", 0, 1, 1)
    assert progress.rounds_done == len(plan.rounds)
    assert misplaced(engine) == []


def test_plans_that_do_not_fit_are_refused(olmoe: Oracle) -> None:
    """Without staging rows, from another placement, onto other ranks; exactly enough rows pass."""
    checkpoint = Checkpoint(olmoe.path)
    old, new, other = placements(checkpoint, 3, 3)
    wider = placements(checkpoint, 4, 1)[0]
    plan = plan_migration(old, new, staging_bytes=1)
    list_commits(old, plan, staging_rows=1, expert_bytes=lambda layer, expert: 1)
    with pytest.raises(InputError, match=r"stages 1 experts on rank \d at a time, .* 0 staging rows"):
        list_commits(old, plan, staging_rows=0, expert_bytes=lambda layer, expert: 1)
    with pytest.raises(InputError, match="starts from the placement sha256"):
        list_commits(other, plan, staging_rows=1, expert_bytes=lambda layer, expert: 1)
    with pytest.raises(InputError, match="changes the ranks or their slots"):
        list_commits(old, plan_migration(old, wider), staging_rows=1, expert_bytes=lambda layer, expert: 1)
    engine = Engine(checkpoint, dtype=torch.float64)
    with pytest.raises(InputError, match=r"bytes per step \(0\)"):
        LiveMigration(engine, plan_migration(engine.placement, engine.placement), bytes_per_step=0)


@pytest.mark.parametrize("staging_rows", [1, 2, 5])
def test_commits_keep_within_the_rows(olmoe: Oracle, staging_rows: int) -> None:
    """Random plans: beyond the rows of empty slots, no rank ever needs more than the staging rows, over all layers."""
    tables = placements(Checkpoint(olmoe.path), 4, 12, extra_slots=2)
    for old, new in pairwise(tables):
        plan = plan_migration(old, new, staging_bytes=staging_rows)
        commits = list_commits(old, plan, staging_rows=staging_rows, expert_bytes=lambda layer, expert: 1)
        assert commits[-1].placement.equals(new)
        assert commits[-1].end == len(plan.rounds)
        lands = {(t.layer, t.expert, plan.members(t)[1]): t.lands for t in plan.transfers}
        staged: list[Arrival] = []
        in_force = old
        for commit in commits:
            staged += commit.arrivals
            for rank in range(4):
                empty_L = (in_force.slot_to_expert[:, in_force.slots_on(rank)] == EMPTY_SLOT).sum(axis=1)
                places = Counter(arrival.layer for arrival in staged if arrival.receiver == rank)
                assert sum(max(count - empty_L[layer], 0) for layer, count in places.items()) <= staging_rows
            in_force = commit.placement
            staged = [a for a in staged if lands[a.layer, a.expert, a.receiver] >= commit.end]
        assert not staged


def test_pieces_cover_everything_within_the_budget() -> None:
    """Every byte travels once and in order; no rank sends or receives more than the budget, a read from disk apart."""
    rng = np.random.default_rng(0)
    arrivals = [
        Arrival(0, number, int(sender), int(receiver), int(size), number)
        for number, (sender, receiver, size) in enumerate(
            zip(rng.integers(-1, 4, 40), rng.integers(4, 8, 40), rng.integers(1, 50, 40), strict=True)
        )
    ]
    budget, position = 20, dict.fromkeys(arrivals, 0)
    for pieces in cut_pieces(arrivals, num_ranks=8, bytes_per_step=budget):
        assert pieces
        for rank in range(8):
            sent = [p.stop - p.start for p in pieces if p.arrival.sender == rank]
            got = [p.stop - p.start for p in pieces if p.arrival.receiver == rank]
            assert sum(sent) <= budget
            assert sum(got) <= budget or len(got) == 1
        for piece in pieces:
            assert piece.start == position[piece.arrival]
            position[piece.arrival] = piece.stop
    assert all(position[arrival] == arrival.size for arrival in arrivals)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_sees_every_bit_and_misplaced_pieces(dtype: torch.dtype) -> None:
    """One flipped bit anywhere, or two exchanged pieces of a page, change it; equal bytes do not."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, 5000, generator=generator).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    for position in (0, 4095, 4096, 17001, tensor.numel() * tensor.element_size() - 1):
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[position] ^= 128
        assert checksum(changed) != checksum(tensor)
    swapped = tensor.clone().view(-1).view(torch.uint8)
    first, second = swapped[:4096].clone(), swapped[4096:8192].clone()
    swapped[:4096], swapped[4096:8192] = second, first
    assert checksum(swapped) != checksum(tensor)
