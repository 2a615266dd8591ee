"""The checker: makes an instance anew from its recipe, and computes what a placement of it is worth, trusting nobody.

Figures come from `placement.verification`, which shares no code with solvers and evaluator.

Shape letters: L MoE layers, R ranks, S slots.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.launch.benches.library.instance import Instance
from moeplace.launch.benches.library.table import Entry, Table
from moeplace.placement.problem import Problem
from moeplace.placement.statement import state, tokens_digest
from moeplace.placement.verification.claims import proven
from moeplace.placement.verification.legality import broken_caps, broken_rules, fetched, slots_of
from moeplace.placement.verification.statement import Statement
from moeplace.placement.verification.values import values_of

AGREEMENT = 1e-9


@dataclass(frozen=True)
class Judgement:
    """Value of a placement, and the rules that it breaks."""

    value: float
    broken: tuple[str, ...]


class Checker:
    """Judges placements of one problem.

    Args:
        problem: made from the instance's recipe.
        objective: name of what counts.
        caps_L: (L,) imbalance that layers are held to, None = any.
    """

    def __init__(self, problem: Problem, objective: str, caps_L: np.ndarray | None) -> None:
        self._problem = problem
        stated = {**state(problem, objective=objective, caps_L=caps_L), "tokens_digest": tokens_digest(problem)}
        self._statement = Statement.from_document(stated)

    @property
    def statement(self) -> Statement:
        return self._statement

    def prove(self, proofs: list[Any]) -> float:
        """The bound on the objective that certificates and closed forms prove.

        Raises:
            FormatError: a certificate cannot be read.
        """
        tokens = self._problem.trace if self._problem.trace is not None else self._problem.load_LE
        slots_R = self._problem.layout.slots_of_rank
        return proven(self._statement, tokens, slots_R, proofs)[self._statement.objective]

    def judge(self, slots_LS: np.ndarray, slots_R: np.ndarray) -> Judgement:
        """The objective of a placement, and what is wrong with it; infinite where it is no placement at all."""
        broken = broken_rules(self._statement, slots_LS, slots_R)
        if broken:
            return Judgement(np.inf, tuple(broken))
        tokens = self._problem.trace if self._problem.trace is not None else self._problem.load_LE
        values = values_of(self._statement, tokens, slots_LS, slots_R)
        broken += broken_caps(self._statement, values.imbalance_L)
        broken += self._too_many_moves(slots_LS, slots_R)
        return Judgement(values.by_name[self._statement.objective], tuple(broken))

    def _too_many_moves(self, slots_LS: np.ndarray, slots_R: np.ndarray) -> list[str]:
        previous, most = self._problem.previous, self._statement.max_moves
        if previous is None or most is None:
            return []
        rank_S = np.repeat(np.arange(len(slots_R)), slots_R)
        old_rank_S = np.repeat(np.arange(previous.num_ranks), previous.slots_of_rank)
        moves_L = fetched(slots_LS, rank_S, previous.slot_to_expert, old_rank_S)
        return [f"MoE layer {x}: {moves_L[x]} moves, allowed {most}" for x in np.flatnonzero(moves_L > most)]


def check_entry(instance: Instance, entry: Entry, table: Table, traces: Path | None) -> list[str]:
    """What is wrong with an entry of the table, in sentences; none = all of it is confirmed.

    A bound that a solver has by exhaustive search is the one figure that is only compared with the value.

    Raises:
        AbsentTraceError: the instance needs a recorded trace that is not here.
        MoeplaceError: its description or its solution cannot be read.
    """
    checker = Checker(instance.problem(traces), entry.objective, None if entry.caps is None else np.array(entry.caps))
    if checker.statement.tokens_digest != entry.tokens_digest:
        return ["its recipe makes other tokens here (another version of numpy?): nothing can be confirmed"]
    document: Any = table.solution(instance.name)
    judged = checker.judge(*slots_of(document))
    wrong = list(judged.broken)
    if abs(judged.value - entry.value) > AGREEMENT * max(abs(entry.value), 1e-6):
        wrong.append(f"the placement's {entry.objective} is {judged.value:.12g}, the table says {entry.value:.12g}")
    if entry.bound > entry.value * (1 + 1e-9) + 1e-12:
        wrong.append(f"the bound {entry.bound:.12g} exceeds the value {entry.value:.12g}")
    certificate = table.proofs(instance.name)
    found = checker.prove(certificate.get("proofs", []))
    if found < entry.bound * (1 - 1e-7) - 1e-12 and not certificate.get("by_search"):
        wrong.append(f"the certificate proves {found:.12g}, the table says {entry.bound:.12g}")
    return wrong
