"""What a placement file claims, claim by claim, each beside what is found when everything is computed again.

Shape letters: L MoE layers, S slots.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.verification.closed_forms import least_imbalance
from moeplace.placement.verification.costs import least_seconds, least_traffic
from moeplace.placement.verification.legality import broken_caps, broken_rules, slots_of
from moeplace.placement.verification.proofs import Prover
from moeplace.placement.verification.statement import Statement
from moeplace.placement.verification.values import values_of
from moeplace.profiling.errors import FormatError
from moeplace.profiling.traces.trace import RoutingTrace

AGREEMENT = 1e-7
"""Relative difference up to which two computations of one value agree."""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        about: what it is about.
        stated: what the file says.
        found: what was found.
        holds: whether that confirms it; None = nothing here can tell.
    """

    about: str
    stated: str | float
    found: str | float
    holds: bool | None


def statement_of(document: Any) -> Statement:
    """The problem that a placement file states.

    Raises:
        FormatError: it states none, or one that cannot be read.
    """
    if not isinstance(document, dict) or not isinstance(document.get("solver"), dict):
        raise FormatError("not a placement file with the run that made it")
    if "problem" not in document:
        raise FormatError(
            "the file does not state its problem: it was not written by `moeplace solve`, or by an old one"
        )
    return Statement.from_document(document["problem"])


def check_claims(document: Any, tokens: RoutingTrace | np.ndarray) -> list[Claim]:
    """All claims of a placement file.

    Args:
        document: the file's JSON.
        tokens: the trace (the side that was fitted to), or (L, E) loads.

    Raises:
        FormatError: the file cannot be read as such.
    """
    statement = statement_of(document)
    slots_LS, slots_R = slots_of(document)
    digest = tokens_digest(tokens)
    claims = [Claim("tokens", statement.tokens_digest[:18], digest[:18], digest == statement.tokens_digest)]
    broken = broken_rules(statement, slots_LS, slots_R)
    claims.append(Claim("placement", "legal", "; ".join(broken) or "legal", not broken))
    if broken or not claims[0].holds:
        return claims
    solver = document["solver"]
    values = values_of(statement, tokens, slots_LS, slots_R)
    if statement.objective not in values.by_name:
        raise FormatError(f"the objective {statement.objective!r} cannot be computed from loads")
    over = broken_caps(statement, values.imbalance_L)
    if statement.caps_L is not None:
        claims.append(Claim("load caps", "kept", over[0] if over else "kept", not over))
    elif statement.max_imbalance is not None:
        said = any("cap on imbalance" in str(note) for note in solver.get("notes", []))
        claims.append(Claim("load caps", "not kept, as a note says" if said else "not stated", "-", said or None))
    name = statement.objective
    claims.append(_same(f"objective ({name})", solver.get("objective"), values.by_name[name]))
    for other, stated in _table(solver, "values", dict).items():
        if other in values.by_name:
            claims.append(_same(other, stated, values.by_name[other]))
    return claims + _bounds(document, statement, tokens, slots_R)


def _bounds(document: Any, statement: Statement, tokens: RoutingTrace | np.ndarray, slots_R: np.ndarray) -> list[Claim]:
    solver, certificate = document["solver"], _table(document, "certificate", dict)
    found = proven(statement, tokens, slots_R, _table(certificate, "proofs", list))
    listed = [(name, stated) for name, stated in _table(solver, "bounds", dict).items() if name in found]
    claims = [_at_most(f"bound on {name}", stated, found[name]) for name, stated in listed]
    stated, bound = solver.get("lower_bound"), found.get(statement.objective, 0.0)
    claim = _at_most("lower bound", stated, bound)
    if not claim.holds and certificate.get("by_search"):
        claim = Claim("lower bound", claim.stated, f"{bound:.9g} (the rest by exhaustive search, not checked)", None)
    objective = _number(solver.get("objective"))
    gap = (objective - _number(stated)) / objective if objective > 0 else 0.0
    agrees = abs(gap - _number(solver.get("gap"))) <= 1e-6
    return [*claims, claim, Claim("gap", _number(solver.get("gap")), gap, agrees)]


def proven(statement: Statement, tokens: RoutingTrace | np.ndarray, slots_R: np.ndarray, proofs: list[Any]
           ) -> dict[str, float]:  # fmt: skip
    """Lower bounds by name that closed forms and the certificates prove.

    Args:
        statement: the problem.
        tokens: the trace, or (L, E) loads.
        slots_R: (R,) slots per rank.
        proofs: of the file's certificate.

    Raises:
        FormatError: a certificate cannot be read.
    """
    if isinstance(tokens, np.ndarray):
        layers = zip(tokens, statement.experts_L, strict=True)
        least = [least_imbalance(row[:e], slots_R, statement.speed_R, whole=bool((row == np.rint(row)).all()))
                 for row, e in layers]  # fmt: skip
        return {"imbalance": float(np.mean(least))}
    prover = Prover(statement, tokens, slots_R)
    ranks, nodes = prover.parted(proofs, nodes=False), prover.parted(proofs, nodes=True)
    return {
        "imbalance": prover.imbalance(),
        "traffic": least_traffic(prover, ranks, nodes),
        "seconds": least_seconds(prover, ranks, nodes),
    }


def tokens_digest(tokens: RoutingTrace | np.ndarray) -> str:
    """`sha256:...` of expert ids (T, L, K) as little-endian int32, or of loads (L, E) as float64, with their shape."""
    dtype, content = ("<f8", tokens) if isinstance(tokens, np.ndarray) else ("<i4", tokens.topk_ids)
    digest = hashlib.sha256(f"{dtype} {content.shape}".encode())
    for start in range(0, len(content), 4096):
        digest.update(content[start : start + 4096].astype(dtype).tobytes())
    return "sha256:" + digest.hexdigest()


def _table(document: dict[str, Any], name: str, kind: type) -> Any:
    """An entry that is a table or a list; an empty one where there is none.

    Raises:
        FormatError: it is something else.
    """
    found = document.get(name)
    if not isinstance(found, kind | None):
        raise FormatError(f"the entry {name!r} must be a {'table' if kind is dict else 'list'}")
    return kind() if found is None else found


def _same(about: str, stated: Any, found: float) -> Claim:
    value = _number(stated)
    return Claim(about, value, found, abs(value - found) <= AGREEMENT * max(abs(found), 1e-9))


def _at_most(about: str, stated: Any, found: float) -> Claim:
    """A stated bound holds if what is proven is no lower."""
    value = _number(stated)
    return Claim(about, value, found, value <= found + AGREEMENT * max(abs(found), 1e-9))


def _number(value: Any) -> float:
    """A number, not-a-number where there is none."""
    return float(value) if isinstance(value, int | float) else float("nan")
