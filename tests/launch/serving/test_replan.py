"""The flags of re-placement, and the controller that comes of them."""

import argparse
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeplace.launch.cli import FAILED, main
from moeplace.launch.options.replanning import add_replan_arguments, build_controller, replan_window, replanning
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.profiling.synthetic.traces import planted
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.event_log import read_events
from moeplace.runtime.replanning.replanner import Replanner

PLACEMENT = index_order(np.full(2, 8), np.array([4, 4]), np.zeros(2, int))
SHAPE = StepShape(batch=16)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_replan_arguments(parser)
    return parser.parse_args(arguments)


def test_without_the_flag_nothing_is_watched() -> None:
    """No controller, no ids kept; a flag that would be ignored is refused."""
    assert build_controller(parse(), PLACEMENT, shape=SHAPE) is None
    assert replan_window(parse()) == 0
    with pytest.raises(InputError, match=r"--replan-gain \(0.1\) needs --replan"):
        build_controller(parse("--replan-gain", "0.1"), PLACEMENT, shape=SHAPE)


def test_flags_reach_the_controller(tmp_path: Path) -> None:
    """Looks, quiet steps, window, log; a reference becomes a promise."""
    reference, _ = planted(num_tokens=600, num_layers=2, num_experts=8, top_k=2, num_ranks=2, epsilon=0.0, seed=0)
    log = tmp_path / "events.jsonl"
    args = parse(
        *("--replan", "--replan-every", "7", "--replan-quiet", "9", "--replan-window", "800", "--replan-log", str(log))
    )
    assert replan_window(args) == 800
    controller = build_controller(args, PLACEMENT, shape=SHAPE, reference=reference, step=100)
    assert controller is not None
    assert not controller.is_due(108)
    assert controller.is_due(109)
    controller.look(109, reference.select(slice(0, 99)))
    controller.log.close()
    events = read_events(log)
    assert [event.kind for event in events] == ["watching", "window-too-small"]
    assert "planned on 600 tokens" in events[0].sentence


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--replan-window", "0", "--replan-window (0) must be at least 1"),
        ("--replan-every", "0", "every_steps (0) must be at least 1"),
        ("--replan-gain", "1.5", "least_gain (1.5) must lie in 0..1"),
        ("--replan-time-limit", "0", "must be positive"),
        ("--replan-log", "/no/such/folder/log", "does not exist"),
    ],
)
def test_values_out_of_range_are_refused(flag: str, value: str, words: str) -> None:
    """One sentence with the name and the rule."""
    with pytest.raises(InputError) as caught:
        build_controller(parse("--replan", flag, value), PLACEMENT, shape=SHAPE)
    assert words in str(caught.value)


@dataclass
class StillService:
    """A service at step 50 that is told when it is asked."""

    placement: Placement = PLACEMENT
    asked: threading.Event = field(default_factory=threading.Event)
    fails: bool = False

    def status(self) -> Any:
        """Always the same."""
        return SimpleNamespace(steps=50, placement_digest=self.placement.digest, changing=False, reason="")

    def recent_routing(self) -> RoutingTrace | None:
        """Not there."""
        self.asked.set()
        if self.fails:
            raise InputError("nothing is kept")
        return None

    def replace(self, placement: Placement) -> None:
        """Not asked for here."""
        raise AssertionError


def test_the_background_looks_and_survives_failures(caplog: pytest.LogCaptureFixture) -> None:
    """A look is due at once; a turn that fails is logged, and the next one comes."""
    service = StillService(fails=True)
    args = parse("--replan", "--replan-every", "1", "--replan-quiet", "0")
    controller = build_controller(args, PLACEMENT, shape=SHAPE)
    assert controller is not None
    with Replanner(controller, service).in_background(every=0.01):
        for _ in range(2):
            assert service.asked.wait(30)
            service.asked.clear()
    assert "a turn of the replanner failed" in caplog.text
    assert controller.state == "watching"


def test_without_the_flag_a_service_is_left_alone() -> None:
    """No thread and no question; with it, the controller begins at the step of the service."""
    service = StillService()
    with replanning(parse(), service, shape=SHAPE) as replanner:
        assert replanner is None
    with replanning(parse("--replan"), service, shape=SHAPE, seed=3) as replanner:
        assert replanner is not None
        assert replanner.controller.log.events[0].step == 50
    assert not service.asked.is_set()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--requests", "r", "--out", "o", "--replan"], "--replan works with --http"),
        (["--requests", "r", "--out", "o", "--replan-gain", "0.1"], "--replan-gain (0.1) needs --replan"),
        (["--http", "127.0.0.1:0", "--replan"], "--replan needs several ranks"),
        (
            ["--http", "127.0.0.1:0", "--ranks", "2", "--mode", "coherent", "--trace", "t"],
            "--trace t needs --mode auto",
        ),
        (["--requests", "r", "--out", "o", "--mode", "allgather", "--trace", "t"], "--trace t needs --mode auto"),
        (["--http", "127.0.0.1:0", "--ranks", "2", "--calibration", "c"], "--calibration c needs --trace"),
    ],
)
def test_serve_refuses_what_it_would_ignore(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, before anything is read or started."""
    assert main(["serve", "no-such-model", *flags]) == FAILED
    assert words in capsys.readouterr().err
