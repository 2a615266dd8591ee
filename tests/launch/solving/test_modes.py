"""Which mode `solve --mode auto` takes, and what it says of the gain."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moeplace.launch.solving.modes import ModeOutcome, choose, mode_table, verdict


def evaluation(seconds: float, copies: float) -> Any:
    return SimpleNamespace(predicted_seconds=seconds, copies_per_token=copies)


def outcome(mode: str, *, seconds: tuple[float, float], copies: tuple[float, float]) -> ModeOutcome:
    """(index order, solved) seconds and copies; the fitted side is as the judging side."""
    solved = evaluation(seconds[1], copies[1])
    problem: Any = SimpleNamespace(mode=mode, evaluate=lambda placement: solved)
    result: Any = SimpleNamespace(values={"seconds": seconds[1]}, placement=None)
    return ModeOutcome(problem, result, solved, evaluation(seconds[0], copies[0]))


def test_the_shortest_step_wins_and_copies_decide_between_equals() -> None:
    """0.4 % more time for half the copies is taken, 0.6 % is not."""
    dispatch = outcome("dispatch-combine", seconds=(1.1, 1.0), copies=(8.0, 6.0))
    for seconds, chosen in ((1.004, "coherent"), (1.006, "dispatch-combine"), (0.9, "coherent")):
        coherent = outcome("coherent", seconds=(1.2, seconds), copies=(5.0, 3.0))
        assert choose([dispatch, coherent]).problem.mode == chosen
    more = replace(dispatch, solved=evaluation(1.004, 9.0))
    assert choose([dispatch, more]) is dispatch


def test_the_verdict_says_what_gains_how_much() -> None:
    """2.0 -> 1.6 by the mode (1.25 times), 1.6 -> 1.28 by the placement (1.25 times)."""
    outcomes = [
        outcome("dispatch-combine", seconds=(2.0, 1.9), copies=(9.0, 8.0)),
        outcome("coherent", seconds=(1.6, 1.28), copies=(4.0, 3.0)),
    ]
    words = verdict(outcomes, outcomes[1], links="calibrated")
    assert "run coherent with this placement: 25.0% faster" in words
    assert "25% fewer copies across ranks (4 -> 3 per token" in words
    assert "the mode makes 1.250 times, the placement 1.250 times" in words
    assert "calibrated links" in words
    assert [line.split()[0] for line in mode_table(outcomes).splitlines()[2:]] == ["dispatch-combine", "coherent"]


@pytest.mark.parametrize(
    ("solved", "copies", "said"),
    [
        (0.99, 5.0, "50% fewer copies across ranks (10 -> 5 per token and MoE layer), which shows in time where links"),
        (0.99, 9.9, "gains 1.0% over the best mode in index order: leave it alone"),
        (0.97, 9.9, "3.1% faster than the best mode in index order\n"),
    ],
)
def test_equal_time_is_not_the_end_of_the_story(solved: float, copies: float, said: str) -> None:
    """A placement that saves copies at the same predicted time is worth telling; one that saves nothing is not."""
    only = outcome("dispatch-combine", seconds=(1.0, solved), copies=(10.0, copies))
    assert said in verdict([only], only, links="nominal")
