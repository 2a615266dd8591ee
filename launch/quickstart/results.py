"""From what the ranks of the quickstart counted to the figures of the comparison, and the predictions beside them.

Shape letters: L MoE layers, R ranks, K top-k, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import mean, median
from typing import Any

import numpy as np

from moeplace.launch.quickstart.job import Job
from moeplace.launch.reports.comparison import Run
from moeplace.placement.cluster import Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import Evaluation, evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.traces.trace import RoutingTrace

TOLERANCE = 1e-6
"""Largest difference of a logit from the plain model's, both in float64."""
SERVED_ALIKE = 0.9
"""Least share of completions that are the plain model's in float32, where rounding may turn a choice between equals."""


@dataclass(frozen=True, eq=False)
class Results:
    """What was served, and what was expected.

    Attributes:
        train: routing that placements were fitted to; the calibration run is among it.
        test: held-out routing, which predictions replay.
        calibrated: the placement of the calibration run.
        placements: one per run of the job.
        job: what the ranks did.
        ranks: what each rank reported.
    """

    train: RoutingTrace
    test: RoutingTrace
    calibrated: Placement
    placements: Sequence[Placement]
    job: Job
    ranks: Sequence[Mapping[str, Any]]

    @cached_property
    def runs(self) -> list[Run]:
        """The columns of the comparison; the first is the baseline."""
        measured = [self._measured(index) for index in range(len(self.job.runs))]
        found = []
        for index, (spec, figures) in enumerate(zip(self.job.runs, measured, strict=True)):
            predicted = self._predicted(index)
            figures |= {f"predicted_{name}": value for name, value in predicted.items()}
            figures["predicted_seconds"] = predicted["seconds_per_step"]
            figures["prediction_error"] = predicted["seconds_per_step"] / figures["seconds_per_step"] - 1
            figures["speedup"] = measured[0]["seconds_per_step"] / figures["seconds_per_step"]
            found.append(Run(spec.placement, spec.mode, figures))
        return found

    @cached_property
    def checks(self) -> list[dict[str, Any]]:
        """Per run: the largest difference of a logit over all ranks, and how many greedy tokens agree."""
        found = []
        for index, spec in enumerate(self.job.runs):
            of_rank = [rank["checks"][index] for rank in self.ranks]
            served = [rank["runs"][index]["completions_identical"] for rank in self.ranks]
            found.append(
                {
                    "placement": spec.placement,
                    "mode": spec.mode,
                    "logits_difference": max(check["logits_difference"] for check in of_rank),
                    "tokens_compared": of_rank[0]["tokens_compared"],
                    "tokens_identical": min(check["tokens_identical"] for check in of_rank),
                    "served_requests": len(self.job.prompts),
                    "served_requests_identical": min(served),
                }
            )
        return found

    @property
    def check_line(self) -> str:
        """The outcome of the checks in one sentence."""
        checks = self.checks
        worst = max(check["logits_difference"] for check in checks)
        same = min(check["tokens_identical"] for check in checks)
        served = min(check["served_requests_identical"] for check in checks)
        word = "equal" if self.equal else "DIFFER FROM"
        return (
            f"Logits {word} the plain model's in all {len(checks)} runs: largest difference {worst:.1e}, tolerance "
            f"{TOLERANCE:.0e} (float64); {same} of {checks[0]['tokens_compared']} greedy tokens agree. "
            f"Served in float32: {served} of {checks[0]['served_requests']} completions are the plain model's."
        )

    @property
    def equal(self) -> bool:
        """Whether every run gave the plain model's logits and tokens, also where it served."""
        return all(
            check["logits_difference"] <= TOLERANCE
            and check["tokens_identical"] == check["tokens_compared"]
            and check["served_requests_identical"] >= SERVED_ALIKE * check["served_requests"]
            for check in self.checks
        )

    def require_equal(self) -> None:
        """Fail unless every run gave the plain model's logits and tokens.

        Raises:
            MoeplaceError: one did not; names the worst.
        """
        if not self.equal:
            worst = min(self.checks, key=lambda one: (one["served_requests_identical"], -one["logits_difference"]))
            raise MoeplaceError(
                f"{worst['mode']} with the {worst['placement']} placement differs from the plain model: logits by "
                f"{worst['logits_difference']:.2e} (tolerance {TOLERANCE:.0e}), {worst['tokens_identical']} of "
                f"{worst['tokens_compared']} tokens agree; served in float32: {worst['served_requests_identical']} of "
                f"{worst['served_requests']} completions, at least {SERVED_ALIKE:.0%} must be the plain model's"
            )

    @cached_property
    def calibration(self) -> Calibration:
        """Links and expert time as the ranks measured them; a layer's rest is what the calibration run takes beyond.

        No run of the comparison has a part in it: other requests, another placement, another time.
        """
        link = Link(**self._mean_over_ranks("links"))
        found = Calibration(link, link, ExpertTime(**self._mean_over_ranks("experts")))
        mode: Any = self.job.calibration.mode
        known = evaluate(self.train, self.calibrated, mode=mode, shape=self.shape, calibration=found)
        rest = median(self.ranks[0]["calibration_step_seconds"]) - known.predicted_seconds
        return replace(found, other_seconds_per_layer=max(rest, 0.0) / self.test.num_layers)

    @cached_property
    def shape(self) -> StepShape:
        """Sizes of a decode step; K/V of all decoder layers, spread over the MoE layers."""
        size = int(self.ranks[0]["dtype_bytes"])
        kv_dim = round(self.ranks[0]["kv_bytes_per_position"] / (size * self.test.num_layers))
        return StepShape(len(self.job.prompts), self.test.hidden_size, size, kv_dim)

    def _evaluate(self, index: int, calibration: Calibration) -> Evaluation:
        """The held-out routing under a run's placement and mode."""
        mode: Any = self.job.runs[index].mode
        return evaluate(self.test, self.placements[index], mode=mode, shape=self.shape, calibration=calibration)

    @property
    def handover_bytes(self) -> float:
        """Bytes that all ranks send once per batch in coherent mode: the K/V of the prompts."""
        coherent = [index for index, spec in enumerate(self.job.runs) if spec.mode == "coherent"]
        return float(sum(rank["runs"][coherent[0]]["handover_bytes"] for rank in self.ranks)) if coherent else 0.0

    def _predicted(self, index: int) -> dict[str, float]:
        found = self._evaluate(index, self.calibration)
        copies = copies_of_all_layers(found, len(self.ranks))
        moved = copies * self.shape.hidden_size * self.shape.dtype_bytes + found.kv_bytes_per_token
        return {
            "collectives_per_layer": found.collectives_per_layer,
            "copies_per_token": copies,
            "bytes_per_token": moved,
            "imbalance": found.imbalance_mean,
            "seconds_per_step": found.predicted_seconds,
            "tokens_per_second": self.shape.batch / found.predicted_seconds,
        }

    def _measured(self, index: int) -> dict[str, float]:
        spec, runs = self.job.runs[index], [rank["runs"][index] for rank in self.ranks]
        counters = [run["counters"] for run in runs]
        steps = counters[0]["steps"]
        tokens = steps * len(self.job.prompts)
        seconds = self._step_seconds(index)
        sent = {tier: sum(c["bytes_sent"][tier] for c in counters) for tier in ("intra_node", "inter_node")}
        load_LR = np.array([run["tokens_L"] for run in runs]).T
        figures = {
            "collectives_per_layer": counters[0]["collectives_per_layer"],
            "bytes_per_token": sum(sent.values()) / tokens,
            "imbalance": float((load_LR.max(axis=1) / load_LR.mean(axis=1)).mean()),
            "seconds_per_step": seconds,
            "tokens_per_second": len(self.job.prompts) / seconds,
            "bytes_intra_node": sent["intra_node"] / steps,
            "bytes_inter_node": sent["inter_node"] / steps,
        }
        dispatched = sum(c["copies_sent"] for c in counters) / tokens
        if spec.mode == "dispatch-combine":
            figures["copies_per_token"] = 2 * dispatched  # every copy is answered
        elif self.test.top_k == 1:
            figures["copies_per_token"] = dispatched  # nothing returns: the token stays where it went
        return figures

    def _step_seconds(self, index: int) -> float:
        return median(self.ranks[0]["runs"][index]["step_seconds"])

    def _mean_over_ranks(self, what: str) -> dict[str, float]:
        return {name: mean(rank[what][name] for rank in self.ranks) for name in self.ranks[0][what]}


def copies_of_all_layers(found: Evaluation, ranks: int) -> float:
    """Hidden vectors that cross ranks per token, over all MoE layers, both directions.

    `coherent` counts its copies per layer boundary; before the first layer a token may be anywhere.
    """
    layers = len(found.ranks_per_token_L)
    if found.mode != "coherent":
        return found.copies_per_token * layers
    d = float(found.ranks_per_token_L[0])
    return found.copies_per_token * (layers - 1) + d * (1 - 1 / ranks) + (d - 1)
