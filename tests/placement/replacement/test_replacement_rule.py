"""When to re-place: each threshold at its limit, and the price of not knowing the future."""

import numpy as np
import pytest

from moeplace.placement.replacement.review import Review
from moeplace.placement.replacement.rule import Decision, ReplacementRule, ServiceHistory
from moeplace.profiling.errors import InputError

RULE = ReplacementRule(least_gain=0.125, quiet_steps=100, stall_seconds=1.0)
SETTLED = ServiceHistory(promised_seconds=0.875, steps=100)


def test_a_candidate_is_sought_only_after_drift_loss_and_quiet() -> None:
    """All three at the limit pass; one beyond fails and says which."""
    assert RULE.consider(SETTLED, seconds_per_step=1.0, has_drifted=True).action == "solve"
    cases = [
        (ServiceHistory(0.875, steps=99), 1.0, True, "99 of 100 quiet steps"),
        (SETTLED, 1.0, False, "no more than chance"),
        (SETTLED, 0.99, True, "loses 11.6% against the promise, less than 12.5%"),
    ]
    for history, seconds, has_drifted, reason in cases:
        decision = RULE.consider(history, seconds_per_step=seconds, has_drifted=has_drifted)
        assert decision.action == "keep"
        assert reason in decision.reason


@pytest.mark.parametrize(("steps_left", "action"), [(59, "keep"), (60, "move")])
def test_a_known_horizon_must_pay_the_move(steps_left: int, action: str) -> None:
    """A quarter of a second saved in each of 60 steps pay 14 s of migration and 1 s of stall."""
    figures = {"seconds_per_step": 1.0, "candidate_seconds": 0.75, "migration_seconds": 14.0}
    decision = RULE.weigh(SETTLED, **figures, steps_left=steps_left)
    assert decision.action == action
    assert "15 s to move, 25.0% less per step" in decision.reason


def test_an_unknown_horizon_moves_when_the_loss_equals_the_price() -> None:
    """An eighth of a second lost per step; a small gain never moves, whatever was lost."""
    figures = {"seconds_per_step": 1.0, "migration_seconds": 4.0}
    for steps, action in ((39, "keep"), (40, "move")):
        history = SETTLED.observe(seconds_per_step=1.0, steps=steps)
        assert RULE.weigh(history, candidate_seconds=0.875, **figures).action == action
        assert RULE.weigh(history, candidate_seconds=0.95, **figures).action == "keep"
    assert SETTLED.observe(seconds_per_step=0.5, steps=10).regret == 0


@pytest.mark.parametrize("seed", range(5))
def test_not_knowing_the_future_costs_at_most_twice(seed: int) -> None:
    """Ski rental: over any length of the new regime, loss and price stay within twice the best single decision."""
    rng = np.random.default_rng(seed)
    promised, price = 1.0, float(rng.uniform(1, 50))
    rule = ReplacementRule(least_gain=0.0, quiet_steps=0)
    loss = float(rng.uniform(0.01, 0.5))
    for length in rng.integers(1, 400, 20).tolist():
        history, paid = ServiceHistory(promised), 0.0
        for _ in range(length):
            history = history.observe(seconds_per_step=promised + loss, steps=1)
            paid += loss
            figures = {"seconds_per_step": promised + loss, "candidate_seconds": promised}
            if rule.weigh(history, migration_seconds=price, **figures).action == "move":
                paid += price
                break
        best = min(length * loss, price)
        assert paid <= 2 * best + loss  # a step is the grain of the decision


def test_values_out_of_range_are_refused() -> None:
    """One sentence with the name and the rule."""
    for name, value in (("least_gain", 1.0), ("least_gain", -0.1), ("quiet_steps", -1), ("stall_seconds", -1.0)):
        with pytest.raises(InputError, match=rf"{name} \({value}\) must"):
            ReplacementRule(**{name: value})  # type: ignore[arg-type]


def test_a_review_that_keeps_promises_nothing() -> None:
    review = Review(Decision("keep", "within noise"), {}, None, None)
    assert (review.candidate, review.promised_seconds, review.plan) == (None, 0.0, None)
