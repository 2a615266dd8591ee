"""Reports: what a report must have for the conductor to look at it.

From members: ready, alive, prepared, loaded, serving, pass, step, queue, counters, routing, refused, replaced, lost,
failed, stopped. From those who watch over them: died, late, linger, deadline, look, rested, planned. From callers:
wish.
"""

from contextlib import suppress
from typing import Any

from moeplace.runtime.engine.logprobs import TokenLogprob

FIELDS: dict[str, dict[str, Any]] = {
    "ready": {"member": int, "limits": dict},
    "alive": {"member": int, "turn": int, "state": str},
    "prepared": {"member": int, "generation": int, "error": str},
    "loaded": {"member": int, "generation": int},
    "serving": {
        "generation": int,
        "applied": int,
        "known": dict,
        "seated": list,
        "running": int,
        "waiting": int,
        "adopted": int,
        "slots": list,
        "version": int,
    },
    "pass": {"generation": int, "tickets": list},
    "step": {"generation": int, "applied": int, "tokens": list, "waiting": int, "running": int},
    "queue": {"generation": int, "waiting": int, "running": int},
    "counters": {"member": int, "counters": dict, "tokens_per_layer": list, "load": list},
    "routing": {"member": int, "number": int, "rows": str},
    "refused": {"request_id": str, "error": str},
    "replaced": {"number": int, "error": str, "slots": list, "version": int},
    "lost": {"member": int, "generation": int, "error": str},
    "failed": {"member": int, "error": str, "final": bool},
    "stopped": {"member": int},
    "died": {"member": int},
    "late": {"generation": int},
    "linger": {"member": int},
    "deadline": {"member": int, "started": bool},
    "look": {},
    "rested": {"pause": int},
    "planned": {"number": int},
    "wish": {},
}
"""Kind -> what it must have, and of which type."""


def find_fault(report: Any) -> str:
    """Why a report cannot be used, "" = it can."""
    if not isinstance(report, dict) or report.get("kind") not in FIELDS:
        return "it is of no kind that is known"
    for name, kind in FIELDS[report["kind"]].items():
        value = report.get(name)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < -1)):
            return f"its {name} is {value!r:.50}"
    logprobs = report.get("logprobs", {})
    return "" if isinstance(logprobs, dict) else f"its logprobs are {logprobs!r:.50}"


def is_token(told: Any) -> bool:
    """Whether an entry of a step is (ticket, index, token, finish reason)."""
    if not isinstance(told, list) or len(told) != 4:
        return False
    ticket, index, token, reason = told
    numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in (index, token))
    return isinstance(ticket, str) and numbers and token >= 0 and reason in (None, "stop", "length")


def read_logprobs(told: Any) -> dict[int, TokenLogprob]:
    """Log-probabilities by index of the token, of those entries that can be read: tokens do not depend on them."""
    found: dict[int, TokenLogprob] = {}
    for entry in told if isinstance(told, list) else ():
        with suppress(ValueError, TypeError):
            index, document = entry
            found[int(index)] = TokenLogprob.from_json(document)
    return found
