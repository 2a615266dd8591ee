"""`moeplace verify`: what a placement file claims, computed again from files alone."""

import argparse
from typing import Any

HELP = "recompute what a placement file claims: objective, rules, caps, proven bound"
EXAMPLE = "moeplace verify p.json --trace t.trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("placement", metavar="PLACEMENT", help="placement file that `moeplace solve` wrote")
    parser.add_argument("--trace", required=True, metavar="T", help="the trace (or load file) that it was solved for")
    parser.add_argument("--json", metavar="FILE", help="write the claims for machines")


def run(args: argparse.Namespace) -> int:
    """Check, print; 1 if any claim is refuted."""
    from moeplace.launch.tables import format_table
    from moeplace.placement.verification.claims import check_claims, statement_of
    from moeplace.profiling.errors import FormatError
    from moeplace.profiling.files import read_json, require_folder_of, write_json

    require_folder_of(args.json)
    document = read_json(args.placement)
    try:
        statement = statement_of(document)
        claims = check_claims(document, _tokens(args.trace, statement))
    except FormatError as error:
        raise FormatError(f"{args.placement}: {error}") from error
    words = {True: "confirmed", False: "REFUTED", None: "not checked"}
    rows = [[claim.about, _text(claim.stated), _text(claim.found), words[claim.holds]] for claim in claims]
    print(format_table(["claim", "the file says", "found", ""], rows))
    refuted = sum(claim.holds is False for claim in claims)
    if args.json:
        listed = [{"claim": c.about, "stated": _plain(c.stated), "found": _plain(c.found), "holds": c.holds}
                  for c in claims]  # fmt: skip
        write_json(args.json, {"placement": args.placement, "verified": not refuted, "claims": listed})
    print("every claim that can be checked holds" if not refuted else f"{refuted} of {len(claims)} claims are refuted")
    return 1 if refuted else 0


def _tokens(path: str, statement: Any) -> Any:
    """The tokens of the trace that the file says were fitted to; the loads of a load file."""
    import numpy as np

    from moeplace.launch.options.problem import split_sides
    from moeplace.profiling.errors import FormatError
    from moeplace.profiling.traces.file import load_trace
    from moeplace.profiling.traces.loads import load_load

    try:
        trace = load_trace(path)
    except FormatError as no_trace:
        try:
            return np.asarray(load_load(path).load, dtype=np.float64)
        except FormatError:
            raise no_trace from None
    return split_sides(trace, statement.split, mix_text=statement.mix, seed=statement.seed).train


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.9g}"


def _plain(value: str | float) -> str | float | None:
    return None if isinstance(value, float) and value != value else value
