"""A member at work, alone and with a coordinator that is a list of commands: what each command does, and when."""

import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.migration.file import plan_to_json
from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width_plan import plan_width
from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Generation
from moeplace.runtime.service.member import heartbeat as heartbeat_module
from moeplace.runtime.service.member import serving as serving_module
from moeplace.runtime.service.member.heartbeat import Heartbeat
from moeplace.runtime.service.member.serving import Outcome, Serving
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.routing_text import from_text
from moeplace.runtime.service.store import ServiceEndedError
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.placements import placement_for
from tests.runtime.thread_ranks import WAIT, run_groups

LIMITS = EngineLimits(max_sequences=2, max_length=32, staging_rows=1, recent_ids=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("olmoe")
    save_checkpoint("olmoe", folder)
    checkpoint = Checkpoint(folder)
    return checkpoint, open_model(checkpoint, dtype=torch.float64)


class Commands:
    """A store that holds a log and takes reports."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []

    def log_length(self) -> int:
        return len(self.log)

    def read(self, key: str) -> Any:
        kind, index = key.split("/")
        assert kind == "log"
        return json.loads(json.dumps(self.log[int(index)]))  # IndexError: it would wait for ever

    def report(self, document: dict[str, Any]) -> None:
        self.reports.append(json.loads(json.dumps(document)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [document for document in self.reports if document["kind"] == kind]

    def add(self, request: Request, added: tuple[int, ...] = ()) -> None:
        self.log.append({"kind": "add", "request": request.to_json(), "added": list(added)})


class Signs:
    """A heartbeat that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self) -> None:
        self.told.append("begin")

    def rest(self) -> None:
        self.told.append("rest")


def make_serving(
    model: Any, group: RankGroup | None = None, placement: Placement | None = None, **options: Any
) -> tuple[Serving, Commands, Signs, list[Generation]]:
    checkpoint, decoder = model
    engine = Engine(checkpoint, placement, group=group, limits=LIMITS, decoder=decoder)
    engine.executor.runtime.experts.contents.share_reference(engine.group, engine.placement)
    store, signs, prepared = Commands(), Signs(), list[Generation]()
    serving = Serving(
        engine,
        store,  # type: ignore[arg-type]
        member=5,
        options=ServiceOptions(limits=LIMITS, check_steps=True, **options),
        prepare=prepared.append,
        faults=FaultPlan(()),
        heartbeat=signs,  # type: ignore[arg-type]
    )
    serving.take_over(3, applied=0, progress=10)
    return serving, store, signs, prepared


def request(number: int, tokens: int = 5) -> Request:
    sampling = SamplingParameters(0.9, seed=number) if number % 2 else SamplingParameters()
    return Request(f"{number}:r", (number, 3, 9), tokens, sampling, (), logprobs=number % 3)


def serve(serving: Serving, until: Callable[[], bool]) -> None:
    while not until():
        assert serving.run() is None


def test_a_member_with_nothing_to_do_says_so_and_waits(model: Any) -> None:
    """It rests until a command comes; counters are told once, as long as nothing is done."""
    serving, store, signs, _ = make_serving(model)
    store.log.append({"kind": "cancel", "request_id": "nobody"})
    assert serving.run() is None
    assert (serving.applied, serving.progress) == (1, 11)
    assert signs.told == ["rest", "begin"]
    assert store.reports == [{"kind": "queue", "generation": 3, "waiting": 0, "running": 0}]
    store.log.append({"kind": "stop"})
    assert serving.run() == Outcome("stop")
    assert not store.of("counters")
    with pytest.raises(IndexError):  # it waits for the next one
        serving.run()


def test_tokens_are_those_of_an_engine_and_told_step_by_step(model: Any) -> None:
    """Each step's report says what was drawn, why requests ended, and which commands all ranks had applied before."""
    serving, store, signs, _ = make_serving(model)
    requests = [request(number, 3 + number) for number in range(4)]
    expected = Engine(model[0], limits=LIMITS, decoder=model[1]).generate(requests)
    store.add(requests[0])
    assert serving.run() is None
    for other in requests[1:]:
        store.add(other)
    told: dict[str, list[int]] = {}
    reasons, steps = {}, 0
    serve(serving, lambda: serving.engine.scheduler.is_idle)
    for step in store.of("step"):
        assert step["applied"] == (1 if steps == 0 else 4)
        assert (step["generation"], step["ranks"], step["moving"], step["migration"]) == (3, 1, False, None)
        assert step["seconds"] > 0
        assert step["kv"][0] <= step["kv"][1] == 2 * 32
        assert step["phase"] in ("prefill", "decode")
        assert step["running"] <= 2
        for ticket, index, token, reason in step["tokens"]:
            assert index == len(told.setdefault(ticket, []))
            told[ticket].append(token)
            reasons[ticket] = reason
        steps += 1
    assert told == {completion.request_id: list(completion.token_ids) for completion in expected}
    assert set(reasons.values()) == {"length"}
    assert (serving.applied, serving.progress) == (4, 10 + 4 + steps)
    assert signs.told == ["rest", "begin"] + ["begin"] * steps
    assert max(step["waiting"] for step in store.of("step")) == 2
    passes = [document["tickets"] for document in store.of("pass")]
    assert [ticket for tickets in passes for ticket in tickets] == [r.request_id for r in requests]
    assert store.of("pass")[0] == {"kind": "pass", "generation": 3, "tickets": ["0:r"]}
    with pytest.raises(IndexError):
        serving.run()
    assert len(store.of("counters")) >= 1
    last = store.of("counters")[-1]
    assert (last["member"], last["counters"]["passes"]) == (5, steps)
    assert sum(map(sum, last["load"])) == sum(last["tokens_per_layer"])


def test_counters_are_told_now_and_then(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock while there is work, and at once when there is none; what is known is not told again."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(serving_module, "time", clock)
    serving, store, _, _ = make_serving(model)
    store.add(request(0, 20))
    serving.run()
    for moment, count in ((100.0, 1), (100.9, 1), (101.0, 2), (101.5, 2), (102.1, 3)):
        now[0] = moment
        serving.run()
        assert len(store.of("counters")) == count, moment
    serving.report_counters()
    assert len(store.of("counters")) == 3
    # From the end of a step to the end of the next one, waiting for nothing in between.
    assert [round(step["seconds"], 6) for step in store.of("step")] == [0.0, 0.9, 0.1, 0.5, 0.6]
    store.log.append({"kind": "cancel", "request_id": "0:r"})
    now[0] = 103.0
    serving.run()
    assert serving.engine.scheduler.is_idle
    store.add(request(1, 3))
    now[0] = 150.0
    serving.run()  # the command
    now[0] = 151.0
    serving.run()
    assert store.of("step")[-1]["seconds"] == 0.0  # the pause is nobody's


def test_commands_come_after_the_step_that_told_of_them(model: Any) -> None:
    """In their order; those for ranks that are no more are passed over, a change of ranks ends the generation."""
    serving, store, _, prepared = make_serving(model)
    store.add(request(0, 12))
    serving.run()
    following = Generation.of(4, {5: 0, 6: 0})
    store.log += [
        {"kind": "prepare", "generation": Generation.of(3, {5: 0}).to_json()},
        {"kind": "prepare", "generation": following.to_json()},
        {"kind": "lost", "generation": 3},
        {"kind": "switch", "generation": 2},
        {"kind": "routing", "number": 8},
        {"kind": "replace", "generation": 2, "number": 1, "plan": {}, "slots_of_rank": []},
        {"kind": "switch", "generation": 4},
        {"kind": "cancel", "request_id": "0:r"},
    ]
    assert serving.run() == Outcome("switch", 4)
    assert serving.applied == 8
    assert len(serving.engine.scheduler.running) == 1  # what follows the switch is for the next generation
    assert [generation.to_json() for generation in prepared] == [following.to_json()]
    (routing,) = store.of("routing")
    assert (routing["member"], routing["number"]) == (5, 8)
    assert len(from_text(routing["rows"]).batch_keys) == 3
    assert not store.of("replaced")
    serving.take_over(4, applied=8, progress=50)
    assert len(serving.engine.window.recent.snapshot().batch_keys) == 0  # type: ignore[union-attr]
    assert serving.run() is None
    assert (serving.applied, serving.progress, serving.engine.scheduler.is_idle) == (9, 52, True)
    store.log.append({"kind": "lost", "generation": 5})
    assert serving.run() == Outcome("lost", 5)


def test_a_request_that_cannot_be_served_fails_alone(model: Any) -> None:
    """It is told of, and the others go on; one that had tokens before goes on behind them."""
    serving, store, _, _ = make_serving(model)
    expected = Engine(model[0], limits=LIMITS, decoder=model[1]).generate([request(2, 6)])
    store.add(Request("1:long", (1,) * 30, 10))
    serving.run()
    (refused,) = store.of("refused")
    assert refused["request_id"] == "1:long"
    assert "needs 40 positions" in refused["error"]
    store.add(request(2, 6), expected[0].token_ids[:4])
    serving.run()
    serve(serving, lambda: serving.engine.scheduler.is_idle)
    told = [entry for step in store.of("step") for entry in step["tokens"]]
    assert [(index, token) for _, index, token, _ in told] == list(enumerate(expected[0].token_ids))[4:]


def wider(model: Any, seed: int, extra_slots: int) -> Placement:
    return placement_for(model[0], 1, seed=seed, extra_slots=extra_slots)


def replace_command(serving: Serving, goal: Placement, number: int) -> dict[str, Any]:
    size = serving.engine.executor.runtime.experts.expert_bytes(0)
    plan = plan_width(serving.engine.placement, goal, expert_bytes=size, staging_bytes=size)
    slots = goal.slots_of_rank.tolist()
    return {
        "kind": "replace",
        "generation": 3,
        "number": number,
        "plan": plan_to_json(plan.plan),
        "slots_of_rank": slots,
    }


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0)])
def test_a_replacement_ends_with_the_slots_that_were_wanted(model: Any, before: int, after: int) -> None:
    """More of them, or fewer; while it moves a member says how far it is, and it is no idle one."""
    serving, store, _, _ = make_serving(model, placement=wider(model, 1, before), bytes_per_step=100)
    goal = wider(model, 2, after)
    store.log.append(replace_command(serving, goal, 6))
    assert serving.run() is None
    assert not store.of("replaced")
    assert serving.engine.placement.num_slots == 6 + max(before, after)
    assert len(serving.own_slots()[0]) == 6 + before
    serve(serving, lambda: bool(store.of("replaced")))
    (replaced,) = store.of("replaced")
    assert (replaced["number"], replaced["error"], replaced["version"]) == (6, "", 1)
    assert replaced["digest"] == serving.engine.placement.digest
    assert replaced["slots"] == [goal.slot_to_expert.tolist()]
    assert (replaced["bytes_moved"], replaced["commits"]) == (0, 1)
    assert 0 < replaced["seconds"] < WAIT
    step = store.of("step")[-1]
    assert step["moving"]
    assert step["phase"] is None
    assert np.array_equal(serving.own_slots(), goal.slot_to_expert)
    with pytest.raises(IndexError):
        serving.run()


def test_a_replacement_that_cannot_begin_leaves_everything(model: Any) -> None:
    """Why not is told, with the placement in force; the next one is carried out."""
    serving, store, _, _ = make_serving(model, placement=wider(model, 1, 0))
    slots, digest = serving.own_slots(), serving.engine.placement.digest
    foreign, _, _, _ = make_serving(model, placement=wider(model, 3, 0))
    store.log.append(replace_command(foreign, wider(model, 2, 2), 6))
    serving.run()
    (replaced,) = store.of("replaced")
    assert replaced["number"] == 6
    assert "starts from the placement" in replaced["error"]
    assert (replaced["digest"], serving.own_slots()) == (digest, slots)
    store.log.append(replace_command(serving, wider(model, 2, 1), 7))
    serving.run()
    serve(serving, lambda: len(store.of("replaced")) == 2)
    assert store.of("replaced")[1]["error"] == ""


@pytest.mark.parametrize("advances", [0, 1, 2, 4, 7])
def test_who_loses_a_rank_while_experts_move_has_what_it_says(model: Any, advances: int, dated_seed: int) -> None:
    """Whenever the other rank goes, a member still has, whole, every expert that it claims, in the slots from before or
    after a switch; and it can begin another generation."""
    old = placement_for(model[0], 2, seed=dated_seed % 999, extra_slots=0)
    new = placement_for(model[0], 2, seed=dated_seed % 997, extra_slots=2)

    def act(group: RankGroup) -> Any:
        serving, store, _, _ = make_serving(model, group, old, bytes_per_step=700, probe_tokens=advances % 2)
        store.log.append(replace_command(serving, new.replace(mode=old.mode), 1))
        assert serving.run() is None
        try:
            for advance in range(100):
                if group.rank == 1 and advance == advances:
                    group.close()
                    return None
                serving.run()
        except PeerLostError:
            pass
        except IndexError:
            return None  # it had ended before
        serving.drop_replacement()
        experts, own = serving.engine.executor.runtime.experts, serving.own_slots()
        for layer, claimed in enumerate(own):
            for slot, expert in enumerate(claimed):
                assert expert < 0 or experts.contents.is_intact(layer, int(experts.row_of_slot[layer, slot]), expert)
        placement = serving.engine.placement
        here = placement.slot_to_expert[:, placement.slots_on(0)]
        assert [set(claimed) | {-1} for claimed in own] == [set(row) | {-1} for row in here.tolist()]
        assert not experts.is_migrating
        serving.take_over(4, applied=1, progress=20)
        assert serving.generation == 4
        return own

    assert run_groups(act, [0, 0])[0] is not None or advances > 2


class Beats:
    """A connection for signs of life; `ends` when the coordinator is gone."""

    def __init__(self) -> None:
        self.documents: list[dict[str, Any]] = []
        self.ends, self.changed = False, threading.Condition()

    def report(self, document: dict[str, Any]) -> None:
        if self.ends:
            raise ServiceEndedError("the coordinator is gone")
        with self.changed:
            self.documents.append(document)
            self.changed.notify_all()


def await_signs(beats: Beats, **wanted: Any) -> None:
    """Until such a sign has come."""
    with beats.changed:
        has_come = beats.changed.wait_for(
            lambda: any(wanted.items() <= document.items() for document in beats.documents), 30
        )
    assert has_come, f"no sign of {wanted}"


def test_signs_of_life_say_what_a_member_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at which turn. Who finds nobody to tell ends its process, unless it stops anyway."""
    left: list[int] = []
    monkeypatch.setattr(heartbeat_module, "os", SimpleNamespace(_exit=left.append))
    beats = Beats()
    heartbeat = Heartbeat(lambda: beats, 7, every=0.002)  # type: ignore[arg-type, return-value]
    await_signs(beats, kind="alive", member=7, turn=0, state="idle")
    heartbeat.begin()
    await_signs(beats, turn=1, state="busy")
    heartbeat.load()
    await_signs(beats, turn=2, state="loading")
    heartbeat.rest()
    await_signs(beats, turn=2, state="idle")
    heartbeat.stop()
    assert not heartbeat._thread.is_alive()
    assert not left
    gone = Beats()
    gone.ends = True
    alone = Heartbeat(lambda: gone, 7, every=0.002)  # type: ignore[arg-type, return-value]
    alone._thread.join(30)
    assert left == [1]
    alone.stop()
    assert left == [1]


def test_a_member_without_routing_tells_none(model: Any) -> None:
    """Where none is kept, nobody is told anything."""
    serving, store, _, _ = make_serving(model)
    serving.engine.window.recent = None
    store.log.append({"kind": "routing", "number": 8})
    serving.run()
    assert not store.of("routing")
    serving.take_over(4, applied=1, progress=20)
    with pytest.raises(InputError):
        serving.engine.check_request(Request("a", (99,)))
