"""Plans replayed step by step: where the copies come from, what waits for what, what is staged."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.file import load_plan, save_plan
from moeplace.placement.migration.layout import default_origin
from moeplace.placement.migration.plan import MigrationPlan, apply_plan, plan_migration, replay
from moeplace.placement.migration.relabel import moved_bytes
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError
from tests.placement.random_placements import random_placement


@st.composite
def changes(draw: st.DrawFn) -> tuple[Placement, Placement, tuple[int, ...], np.ndarray]:
    """(old, new, lost ranks, expert bytes): any widths, replicas, empty slots, tight memory, unequal experts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    experts, widths = draw(st.integers(1, 12)), draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    spare, fill = draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    old, new = (
        random_placement(
            rng,
            layers=2,
            experts=experts,
            slots_of_rank=[-(-experts // width) + spare] * width,
            node_of_rank=np.sort(np.arange(width) * 2 // width).tolist(),
            fill=fill,
        )
        for width in widths
    )
    lost = draw(st.sets(st.integers(0, widths[0] - 1), max_size=2)) if draw(st.booleans()) else set()
    size_LE = rng.integers(1, 5, (2, experts)) if draw(st.booleans()) else np.full((2, experts), 3)
    return old, new, tuple(sorted(lost)), size_LE


def slot_place(plan: MigrationPlan, old_slot: int) -> int:
    return int(plan.layout.place_of_old[old_slot])


@given(changes(), st.integers(1, 3))
def test_a_plan_does_what_it_says(
    change: tuple[Placement, Placement, tuple[int, ...], np.ndarray], budget: int
) -> None:
    """Ends in new; fetches exactly what is missing, at least the bound; one peer a round; staging within the budget;
    every expert that was not lost is served after every round."""
    old, new, lost, size_LE = change
    staging = int(size_LE.max()) * budget
    plan = plan_migration(old, new, expert_bytes=size_LE, staging_bytes=staging, lost_ranks=lost)
    assert apply_plan(old, plan).equals(new)
    assert plan.bytes == moved_bytes(old, new, expert_bytes=size_LE, origin=plan.layout.origin)
    assert plan.bytes >= plan.least_bytes
    _check_rounds(plan, size_LE, staging)
    served = list(replay(old, plan))
    for layer in range(old.num_layers):
        alive = set(served[0][layer]) - {-1}
        for table in served:
            assert alive <= set(table[layer])


@st.composite
def crowded(draw: st.DrawFn) -> tuple[Placement, Placement, tuple[int, ...], np.ndarray]:
    """Full ranks whose experts change places at random: long cycles, which a tight budget must split."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    ranks, slots = draw(st.integers(2, 4)), draw(st.integers(2, 6))
    cells = ranks * slots
    old, new = (
        Placement(rng.permutation(cells)[None], np.full(ranks, slots), np.zeros(ranks, int), np.full(1, cells))
        for _ in range(2)
    )
    size_LE = rng.integers(1, 5, (1, cells)) if draw(st.booleans()) else np.full((1, cells), 3)
    return old, new, (), size_LE


@given(crowded(), st.integers(1, 2))
def test_split_cycles_do_what_they_say(
    change: tuple[Placement, Placement, tuple[int, ...], np.ndarray], budget: int
) -> None:
    """Where a rank may stage one expert or two, exchanges inside ranks come before what reads their places."""
    old, new, _, size_LE = change
    staging = int(size_LE.max()) * budget
    plan = plan_migration(old, new, expert_bytes=size_LE, staging_bytes=staging)
    assert apply_plan(old, plan).equals(new)
    _check_rounds(plan, size_LE, staging)
    _check_writing(plan, old, new)


def _check_rounds(plan: MigrationPlan, size_LE: np.ndarray, staging: int) -> None:
    """One peer and one expert per direction; bytes staged by any rank during any round; no idle round."""
    waiting: list[tuple[int, int, int]] = []  # (lands, receiver, bytes)
    for index, transfers in enumerate(plan.rounds):
        assert transfers
        peers: dict[int, set[int]] = {}
        directions = []
        for transfer in transfers:
            sender, receiver = plan.members(transfer)
            if sender != receiver:
                waiting.append((transfer.lands, receiver, int(size_LE[transfer.layer, transfer.expert])))
            if sender not in (receiver, -1):
                directions.append((sender, receiver))
                peers.setdefault(sender, set()).add(receiver)
                peers.setdefault(receiver, set()).add(sender)
        assert all(len(others) == 1 for others in peers.values())
        assert len(directions) == len(set(directions))
        for member in range(plan.layout.num_members):
            assert sum(size for _, receiver, size in waiting if receiver == member) <= staging
        waiting = [item for item in waiting if item[0] > index]
    assert not waiting


@given(changes(), st.integers(1, 3))
def test_local_copies_can_be_written_one_after_the_other(
    change: tuple[Placement, Placement, tuple[int, ...], np.ndarray], budget: int
) -> None:
    """Executed naively, in place, in the listed order, what was staged written last: every place ends as planned."""
    old, new, lost, size_LE = change
    plan = plan_migration(old, new, expert_bytes=size_LE, staging_bytes=int(size_LE.max()) * budget, lost_ranks=lost)
    _check_writing(plan, old, new)


def _check_writing(plan: MigrationPlan, old: Placement, new: Placement) -> None:
    """See the test above."""
    memory = next(iter(replay(old, plan)))
    staged: list[tuple[int, int, int, int]] = []
    for index, transfers in enumerate(plan.rounds):
        local = []
        for transfer in transfers:
            sender, receiver = plan.members(transfer)
            place = int(plan.layout.place_of_new[transfer.target])
            if sender == receiver:
                local.append((transfer.layer, transfer.expert, slot_place(plan, transfer.source), place))
            else:
                value = transfer.expert if sender < 0 else memory[transfer.layer, slot_place(plan, transfer.source)]
                assert value == transfer.expert
                staged.append((transfer.lands, transfer.layer, transfer.expert, place))
        for layer, expert, source, place in _with_buffer(local, memory):
            assert source is None or memory[layer, source] == expert
            memory[layer, place] = expert
        for lands, layer, expert, place in staged:
            if lands == index:
                memory[layer, place] = expert
        staged = [item for item in staged if item[0] > index]
    kept = new.slot_to_expert >= 0
    assert np.array_equal(memory[:, plan.layout.place_of_new][kept], new.slot_to_expert[kept])


def _with_buffer(local: list[tuple[int, int, int, int]], memory: np.ndarray) -> list[tuple[int, int, int | None, int]]:
    """The local copies; the last of a closed cycle reads the buffer into which its source went first (None)."""
    written: set[tuple[int, int]] = set()
    ordered: list[tuple[int, int, int | None, int]] = []
    for layer, expert, source, place in local:
        from_buffer = (layer, source) in written
        assert memory[layer, source] == expert
        ordered.append((layer, expert, None if from_buffer else source, place))
        written.add((layer, place))
    return ordered


@given(changes())
def test_equal_placements_need_nothing(change: tuple[Placement, Placement, tuple[int, ...], np.ndarray]) -> None:
    """From a placement to itself: no round, no byte, no second."""
    plan = plan_migration(change[0], change[0])
    assert plan.is_empty
    assert (plan.bytes, plan.local_bytes, plan.seconds, plan.emptied) == (0, 0, 0.0, ())
    assert apply_plan(change[0], plan).equals(change[0])


@given(changes())
def test_files_round_trip(tmp_path_factory: pytest.TempPathFactory, change: tuple) -> None:
    """A plan file read back has the same rounds and ends in the same placement."""
    old, new, lost, size_LE = change
    plan = plan_migration(old, new, expert_bytes=size_LE, lost_ranks=lost)
    path = tmp_path_factory.mktemp("plan") / "m.json"
    save_plan(path, plan)
    again = load_plan(path)
    assert again.rounds == plan.rounds
    assert (again.bytes, again.seconds, again.staging_bytes) == (plan.bytes, plan.seconds, plan.staging_bytes)
    assert apply_plan(old, again).equals(new)
    save_plan(path.with_name("again.json"), again)
    assert path.read_bytes() == path.with_name("again.json").read_bytes()


def one_layer(rows: list[int], slots: list[int], experts: int, nodes: list[int] | None = None) -> Placement:
    return Placement(np.array([rows]), np.array(slots), np.array(nodes or [0] * len(slots)), np.array([experts]))


def test_sources_are_near_then_spread() -> None:
    """Same rank (a local copy), then same node, then the rank with the least to do."""
    old = one_layer([0, 1, 0, 2, 0, -1, -1, -1, -1, -1], [2] * 5, 3, [0, 0, 1, 1, 1])
    new = one_layer([1, 0, 0, 2, 0, -1, 0, -1, 0, -1], [2] * 5, 3, [0, 0, 1, 1, 1])
    plan = plan_migration(old, new)
    remote = [plan.members(t) for t in plan.transfers if len(set(plan.members(t))) == 2]
    assert sorted(remote) == [(2, 3), (2, 4)]
    assert plan.inter_node_bytes == 0
    assert plan.local_bytes == 2
    old = one_layer([0, 0, -1, -1], [1] * 4, 1)
    spread = plan_migration(old, one_layer([0, 0, 0, 0], [1] * 4, 1))
    assert sorted(spread.members(t)[0] for t in spread.transfers) == [0, 1]
    assert len(spread.rounds) == 1


def test_a_cycle_of_three_ranks_lands_at_once() -> None:
    """0 -> 1 -> 2 -> 0 with full memory takes three rounds of one peer each and lands in the last."""
    plan = plan_migration(one_layer([0, 1, 2], [1] * 3, 3), one_layer([2, 0, 1], [1] * 3, 3))
    assert [len(transfers) for transfers in plan.rounds] == [1, 1, 1]
    assert {transfer.lands for transfer in plan.transfers} == {2}


def test_an_exchange_takes_one_round() -> None:
    """Two full ranks exchange an expert in both directions at once."""
    plan = plan_migration(one_layer([0, 1], [1] * 2, 2), one_layer([1, 0], [1] * 2, 2))
    assert [len(transfers) for transfers in plan.rounds] == [2]


def test_a_move_inside_a_rank_takes_no_buffer() -> None:
    """Expert 0 makes room in its rank and 1 arrives through the one buffer: one round."""
    old, new = one_layer([0, -1, 1, -1], [2, 2], 2), one_layer([1, 0, 1, -1], [2, 2], 2)
    plan = plan_migration(old, new, staging_bytes=1)
    assert (plan.local_bytes, plan.bytes, len(plan.rounds)) == (1, 1, 1)


def test_a_cycle_beyond_the_budget_is_split() -> None:
    """0,1 | 2,3 -> 2,3 | 1,0 is one cycle of four; with one buffer it becomes two exchanges after a local one."""
    old, new = one_layer([0, 1, 2, 3], [2, 2], 4), one_layer([2, 3, 1, 0], [2, 2], 4)
    roomy = plan_migration(old, new, staging_bytes=2)
    assert (roomy.local_bytes, roomy.bytes, len(roomy.rounds)) == (0, 4, 2)
    tight = plan_migration(old, new, staging_bytes=1)
    assert (tight.local_bytes, tight.bytes, len(tight.rounds)) == (2, 4, 3)


def test_predicted_seconds_by_hand() -> None:
    """A round costs the latency of its farthest tier and its slowest rank or shared port; disks read in parallel."""
    nodes = [0, 0, 1, 1]
    cluster = Cluster.uniform(4, slots_per_rank=2, ranks_per_node=2)
    intra, inter = cluster.intra, cluster.inter
    old = one_layer([0, -1, 1, -1, 2, -1, 3, -1], [2] * 4, 4, nodes)
    inside = plan_migration(old, one_layer([0, 1, 1, -1, 2, -1, 3, -1], [2] * 4, 4, nodes), expert_bytes=10**6)
    assert inside.seconds == pytest.approx(intra.latency + 1e6 / intra.bandwidth)
    both = one_layer([0, 2, 1, 3, 2, -1, 3, -1], [2] * 4, 4, nodes)
    across = plan_migration(old, both, expert_bytes=10**6)
    assert across.seconds == pytest.approx(inter.latency + 1e6 / inter.bandwidth)
    assert across.inter_node_bytes == 2 * 10**6
    shared = cluster.replace(inter=type(inter)(inter.latency, inter.bandwidth, inter.bandwidth))
    slow = plan_migration(old, both, expert_bytes=10**6, cluster=shared)
    assert slow.seconds == pytest.approx(inter.latency + 2e6 / inter.bandwidth)
    lost = plan_migration(old, old, expert_bytes=10**6, lost_ranks=(0, 2), checkpoint_bandwidth=1e6)
    assert lost.seconds == pytest.approx(1.0)
    assert lost.checkpoint_bytes == lost.bytes == 2 * 10**6


def test_lost_and_leaving_ranks() -> None:
    """A lost rank is no source, a leaving one is; who is who follows from the width or from `origin`."""
    assert default_origin(4, 4, (1,)).tolist() == [0, -1, 2, 3]
    assert default_origin(4, 3, (1,)).tolist() == [0, 2, 3]
    assert default_origin(4, 5, (0,)).tolist() == [1, 2, 3, -1, -1]
    assert default_origin(4, 2, ()).tolist() == [0, 1]
    old = one_layer([0, 1, 2, 0], [2, 2], 3)
    left = plan_migration(old, one_layer([2, 0, 1], [3], 3), origin=np.array([1]))
    assert [(t.source, t.target) for t in left.transfers] == [(1, 2)]
    lost = plan_migration(old, one_layer([2, 0, 1], [3], 3), lost_ranks=(0,))
    assert [(t.source, t.target) for t in lost.transfers] == [(-1, 2)]
    assert (lost.bytes, lost.checkpoint_bytes, lost.least_bytes) == (1, 1, 1)


def test_width_changes_stay_near_the_bound() -> None:
    """4 -> 5 -> 4 ranks where only what must move moves: planned bytes equal the bound."""
    old = one_layer(list(range(8)), [2] * 4, 8)
    wide = one_layer([0, 1, 2, 3, 4, 5, 6, 7, 0, 3], [2] * 5, 8)
    up, down = plan_migration(old, wide), plan_migration(wide, old)
    assert (up.bytes, up.least_bytes) == (2, 2)
    assert (down.bytes, down.least_bytes) == (0, 0)


def test_bad_arguments_are_named() -> None:
    """Other models, budgets below an expert, ranks that are not there."""
    old = one_layer([0, 1, 2, 3], [2, 2], 4)
    with pytest.raises(InputError, match="different models"):
        plan_migration(old, one_layer([0, 1, 2, -1], [2, 2], 3))
    with pytest.raises(InputError, match=r"staging \(4 bytes\) must hold expert 2 of MoE layer 0 \(5 bytes\)"):
        plan_migration(old, one_layer([2, 3, 0, 1], [2, 2], 4), expert_bytes=5, staging_bytes=4)
    with pytest.raises(InputError, match=r"lost rank 2 must lie in 0..1"):
        plan_migration(old, old, lost_ranks=(2,))
    with pytest.raises(InputError, match="rank 1 is lost and cannot stay"):
        plan_migration(old, old, lost_ranks=(1,), origin=np.array([0, 1]))
    with pytest.raises(InputError, match="checkpoint bandwidth"):
        plan_migration(old, old, checkpoint_bandwidth=0)


def test_a_plan_fits_one_placement_only(tmp_path: Path) -> None:
    """Another start, a wrong source or a damaged file is refused."""
    old, new = one_layer([0, 1, 2, 3], [2, 2], 4), one_layer([2, 3, 0, 1], [2, 2], 4)
    plan = plan_migration(old, new, staging_bytes=2)
    with pytest.raises(InputError, match="the plan starts from the placement"):
        apply_plan(new, plan)
    path = tmp_path / "m.json"
    save_plan(path, plan)
    text = path.read_text()
    path.write_text(text.replace("[0, 2, 2, 0, ", "[0, 2, 3, 0, "))
    with pytest.raises(InputError, match="reads expert 2 of MoE layer 0 from slot 3, which holds 1"):
        apply_plan(old, load_plan(path))
    for damaged in (
        text.replace("moeplace.plan/1", "other"),
        text.replace('"emptied"', '"x"'),
        text.replace("[0, 2, 2, 0, ", "[0, 2, 99, 0, "),
        text.replace("[0, 2, 2, 0, ", "[7, 2, 2, 0, "),
        text.replace("[0, 2, 2, 0, 1]", "[0, 2, 2, 0, 9]"),
        text.replace("[0, 2, 2, 0, ", '[0, 2, "x", 0, '),
        text.replace('"origin": [0, 1]', '"origin": [0, 0]'),
        text[:-20],
    ):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(FormatError, match=r"m\.json"):
            load_plan(path)


def test_sources_take_turns() -> None:
    """Two ranks hold what two others want: each sends once, the least busy one first."""
    old = Placement(np.array([[0, 1, 0, 2, 3, -1, 4, -1]]), np.full(4, 2), np.zeros(4, int), np.full(1, 5))
    new = old.replace(slot_to_expert=np.array([[0, 1, 0, 2, 3, 0, 4, 0]]))
    plan = plan_migration(old, new)
    assert sorted(plan.members(transfer)[0] for transfer in plan.transfers) == [0, 1]
    assert len(plan.rounds) == 1
