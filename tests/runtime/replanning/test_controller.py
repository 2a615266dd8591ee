"""The controller: drift moves once, noise and small gains do not, and a review that dies hurts nobody."""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.migration.plan import apply_plan
from moeplace.placement.placement import index_order
from moeplace.placement.replacement.review import Review, ReviewSettings, ReviewTask, review
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.synthetic.traces import planted
from moeplace.runtime.replanning.controller import Controller, ControllerSettings
from moeplace.runtime.replanning.event_log import EventLog, read_events
from moeplace.runtime.replanning.review_process import ReviewFailure, ReviewProcess, _Running
from tests.runtime.replanning.controlled import (
    CLUSTER,
    EXPERTS,
    FIRST,
    LAYERS,
    LINK,
    RANKS,
    REVIEW,
    SECOND,
    SETTINGS,
    ReviewInPlace,
    kinds,
    planned,
    regime,
    serve,
    unplanned,
    watch,
    window,
)

pytestmark = pytest.mark.clock(0.1)


def test_without_drift_nothing_happens() -> None:
    """Ten looks at the routing that the placement was planned on: no search, no move."""
    controller, runner = watch()
    assert not serve(controller, range(1, 1301), lambda step: window(FIRST, step // 100))
    assert len(runner.tasks) == 11  # from step 300 on, every 100 steps
    assert set(kinds(controller)) == {"watching", "review-started", "kept"}
    assert not any("solve_seconds" in event.figures for event in controller.log.events)
    assert controller.placement is planned()[0]


def test_drift_moves_once_and_then_rests() -> None:
    """The blocks change at step 600: one search, one move to what suits them, quiet steps, then content."""
    controller, _ = watch()
    changes = serve(controller, range(1, 1801), lambda step: window(FIRST if step < 600 else SECOND, step // 100))
    assert [step for step, _ in changes] == [600]
    change = changes[0][1]
    assert controller.placement is change.placement
    assert apply_plan(planned()[0], change.plan).digest == change.placement.digest
    ranks = [evaluate(window(SECOND, 3), p, cluster=CLUSTER).ranks_per_token for p in (planned()[0], change.placement)]
    assert ranks[1] < 0.85 * ranks[0]
    log = controller.log.events
    looks = [event.step for event in log if event.kind == "review-started"]
    assert looks == [*range(300, 700, 100), *range(900, 1801, 100)]
    assert sum("solve_seconds" in event.figures for event in log) == 1
    moved = next(event for event in log if event.kind == "move")
    assert moved.figures["drift"] > moved.figures["drift_threshold"]
    assert moved.figures["bytes"] == change.plan.bytes > 0
    assert moved.figures["gain"] == pytest.approx(1 - change.promised_seconds / moved.figures["seconds_per_step"])
    assert f"{moved.figures['migration_seconds']:.3g} s to move" in moved.sentence


def test_noise_does_not_move() -> None:
    """Windows of uniform routing differ, and no placement is better than another: at most a fruitless search."""
    noise = regime(3, epsilon=1.0)
    runner = ReviewInPlace()
    controller = Controller(unplanned(), CLUSTER, runner=runner, log=EventLog(), settings=SETTINGS)
    assert not serve(controller, range(1, 1301), lambda step: window(noise, step // 100))
    assert sum("solve_seconds" in event.figures for event in controller.log.events) == 1  # nobody had planned it
    assert "a search found" in controller.log.events[2].sentence
    assert len(runner.tasks) > 5


def test_a_gain_smaller_than_its_price_waits() -> None:
    """No horizon is known: the candidate is kept without another search until its price is lost."""
    slow = replace(REVIEW, steps_left=None, rule=replace(REVIEW.rule, stall_seconds=0.0))
    price = review(ReviewTask(planned()[0], window(SECOND, 1), 0, CLUSTER, slow)).figures["migration_seconds"]
    loss = evaluate(
        window(SECOND, 1), planned()[0], cluster=CLUSTER, shape=REVIEW.shape, calibration=REVIEW.calibration
    )
    per_step = loss.predicted_seconds - planned()[1]
    assert per_step > 0
    stall = 450 * per_step  # with the price of the plan a little more than four looks
    rule = replace(REVIEW.rule, stall_seconds=max(stall - price, 0.0), quiet_steps=0)
    controller, _ = watch(replace(SETTINGS, review=replace(slow, rule=rule)))
    changes = serve(controller, range(1, 1001), lambda step: window(SECOND, step // 100))
    assert [step for step, _ in changes] == [500]
    assert kinds(controller).count("candidate-kept") == 4
    assert sum("solve_seconds" in event.figures for event in controller.log.events) == 1


def test_a_candidate_is_dropped_when_the_routing_comes_back() -> None:
    """What would have paid in another regime is not moved to in this one."""
    rule = replace(REVIEW.rule, stall_seconds=1e3, quiet_steps=0)
    controller, runner = watch(replace(SETTINGS, review=replace(REVIEW, rule=rule, steps_left=None)))
    assert not serve(controller, range(1, 601), lambda step: window(SECOND if step < 300 else FIRST, step // 100))
    assert [task.candidate is not None for task in runner.tasks] == [False, True, True, False, False, False]
    assert kinds(controller)[-1] == "kept"


def test_a_failed_move_is_tried_later_and_later() -> None:
    """Every failure doubles the time to the next look; what is in force stays."""
    controller, _ = watch()
    changes = serve(controller, range(1, 3000), lambda step: window(SECOND, step // 100), commits=False)
    assert [step for step, _ in changes] == [300, 500, 900, 1700]
    assert controller.placement is planned()[0]
    assert controller.log.events[3].sentence == "not today"


def test_a_change_from_outside_makes_everything_void() -> None:
    """The service was scaled while a change was on its way: the change is forgotten, the new cluster is watched."""
    controller, runner = watch()
    assert serve(controller, range(1, 301), lambda step: window(SECOND, 0), commits=False)
    cluster = Cluster.uniform(2, slots_per_rank=EXPERTS // 2, intra=LINK)
    placement = index_order(np.full(LAYERS, EXPERTS), cluster.slots_of_rank, cluster.node_of_rank)
    controller.installed(310, placement, cluster)
    assert not controller.is_due(609)
    changes = serve(controller, range(609, 1300), lambda step: window(SECOND, 1))
    assert len(changes) == 1
    assert changes[0][1].placement.num_ranks == 2
    assert runner.tasks[1].history is None


def test_a_small_window_decides_nothing() -> None:
    """Too few tokens are noted and not reviewed."""
    controller, runner = watch()
    controller.look(300, FIRST.select(slice(0, 511)))
    assert controller.state == "watching"
    assert not runner.tasks
    assert "511 tokens, fewer than 512" in controller.log.events[-1].sentence


def long_task(seconds: float) -> ReviewTask:
    return ReviewTask(unplanned(), window(SECOND, 0), 1, CLUSTER, replace(REVIEW, time_limit=seconds))


def test_a_review_in_another_process_comes_back_whole() -> None:
    """Task and result survive the way, and what is promised is what `evaluate` says; the process ends."""
    task = long_task(2.0)  # it loads its kernels meanwhile
    process = ReviewProcess()
    process.start(task)
    assert process.pid is not None
    outcome = process.wait(90)
    assert isinstance(outcome, Review)
    assert outcome.decision.action == "move"
    assert outcome.candidate is not None
    assert outcome.plan is not None
    assert apply_plan(task.placement, outcome.plan).digest == outcome.candidate.digest
    judged = evaluate(
        task.routing.split("test"),
        outcome.candidate,
        cluster=CLUSTER,
        shape=REVIEW.shape,
        calibration=REVIEW.calibration,
    )
    assert outcome.promised_seconds == pytest.approx(judged.predicted_seconds)
    assert process.poll() is None
    assert process.pid is None


def test_a_review_that_cannot_be_done_says_why() -> None:
    """Routing of another model: the sentence comes back, no exception."""
    shape = {"num_layers": LAYERS, "num_experts": 8, "top_k": 1, "num_ranks": RANKS}
    foreign, _ = planted(num_tokens=600, epsilon=0.0, seed=0, **shape)
    process = ReviewProcess()
    process.start(replace(long_task(0.3), routing=foreign))
    outcome = process.wait(90)
    assert isinstance(outcome, ReviewFailure)
    assert "another model" in outcome.sentence


def test_a_review_that_dies_or_takes_too_long_hurts_nobody() -> None:
    """SIGKILL, and a clock beyond the limit: the controller notes it, waits longer, and serves on."""
    time = [0.0]
    process = ReviewProcess(timeout=50.0, clock=lambda: time[0])
    slow = replace(SETTINGS, review=long_task(3600.0).settings)
    controller = Controller(unplanned(), CLUSTER, runner=process, log=EventLog(), settings=slow)
    controller.look(300, window(SECOND, 0))
    assert controller.poll(301) is None
    assert controller.state == "reviewing"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert controller.poll(302) is None
    assert "ended by signal 9" in controller.log.events[-1].sentence
    assert not controller.is_due(499)
    assert controller.is_due(500)
    controller.look(500, window(SECOND, 0))
    pid = process.pid
    time[0] = 49.0
    assert controller.poll(501) is None
    assert controller.state == "reviewing"
    time[0] = 50.0
    assert controller.poll(502) is None
    assert controller.log.events[-1].kind == "review-failed"
    assert "too long" in controller.log.events[-1].sentence
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert controller.state == "watching"
    controller.close()


def test_a_result_that_cannot_be_read_is_the_end_of_a_review(tmp_path: Path) -> None:
    """It is told once, as any other failure; then there is nothing under way."""
    ended = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    ended.wait()
    (tmp_path / "result").write_bytes(b"no result")
    process = ReviewProcess()
    with (tmp_path / "result").open("rb") as result, (tmp_path / "result").open("rb") as words:
        process._running = _Running(ended, time.monotonic() + 60, result, words)
        outcome = process.poll()
        assert isinstance(outcome, ReviewFailure)
        assert "could not be read" in outcome.sentence
        assert result.closed
    assert process.poll() is None


class NoProcess(ReviewInPlace):
    """A machine that starts nothing any more."""

    def start(self, task: ReviewTask) -> None:
        """Refuse."""
        raise OSError(11, "Resource temporarily unavailable")


def test_a_review_that_cannot_start_is_an_event() -> None:
    """The machine is out of processes: noted, and tried again later."""
    controller = Controller(unplanned(), CLUSTER, runner=NoProcess(), log=EventLog(), settings=SETTINGS)
    controller.look(300, window(SECOND, 0))
    assert controller.state == "watching"
    assert "could not be started" in controller.log.events[-1].sentence
    assert not controller.is_due(499)


def test_a_full_disk_does_not_end_the_log() -> None:
    """Events go on in memory."""
    with EventLog("/dev/full") as log:
        log.add("kept", "all is well", step=1)
        log.add("kept", "all is still well", step=2)
        assert len(log.events) == 2


ABANDONED = """
import pickle, sys
from moeplace.runtime.replanning.review_process import ReviewProcess
process = ReviewProcess()
process.start(pickle.load(sys.stdin.buffer))
print(process.pid, flush=True)
sys.stdin.buffer.read()
"""


def test_a_review_ends_with_its_parent() -> None:
    """A service that is killed leaves no search behind."""
    parent = subprocess.Popen([sys.executable, "-c", ABANDONED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent, parent.stdin, parent.stdout:
        pickle.dump(long_task(3600.0), parent.stdin)
        parent.stdin.flush()
        review_process = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            ended, _, _ = select.select([review_process], [], [], 60)
        finally:
            os.close(review_process)
        assert ended


def test_events_are_on_disk_at_once(tmp_path: Path) -> None:
    """One JSON object a line, appended; a cut last line is forgiven, other damage is not."""
    path = tmp_path / "events.jsonl"
    for number in range(2):
        with EventLog(path, clock=lambda: 12.5) as log:
            log.add("kept", "all is well", step=number, gain=0.5, gap=float("nan"))
            assert len(read_events(path)) == number + 1  # while it is open
    document = json.loads(path.read_text().splitlines()[1])
    figures = {"gain": 0.5, "gap": None}
    assert document == {"time": 12.5, "step": 1, "kind": "kept", "sentence": "all is well", "figures": figures}
    path.write_text(path.read_text() + '{"time": 13')
    assert [event.step for event in read_events(path)] == [0, 1]
    with EventLog(path) as log:
        log.add("watching", "again", step=2)  # on a line of its own
    assert [event.step for event in read_events(path)] == [0, 1, 2]
    for damage in ("{}", "what?", '{"time": NaN, "kind": "a", "sentence": "b"}'):
        path.write_text(path.read_text() + damage + "\n")
        with pytest.raises(FormatError, match="line 5 is not an event"):
            read_events(path)
        path.write_text("\n".join(path.read_text().splitlines()[:4]) + "\n")
    with pytest.raises(InputError, match="does not exist"):
        EventLog(tmp_path / "no" / "events.jsonl")


def test_values_out_of_range_are_refused() -> None:
    """One sentence with the name and the rule."""
    with pytest.raises(InputError, match=r"every_steps \(0\) must be at least 1"):
        ControllerSettings(every_steps=0)
    with pytest.raises(InputError, match=r"search \(0 s\) must be positive"):
        ReviewSettings(time_limit=0)
    with pytest.raises(InputError, match=r"max_moves \(-1\)"):
        ReviewSettings(max_moves=-1)
    with pytest.raises(InputError, match="reference needs the seconds"):
        Controller(planned()[0], CLUSTER, runner=ReviewInPlace(), log=EventLog(), promised_seconds=1.0)
