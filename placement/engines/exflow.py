"""ExFlow: the solution CSV of its solver, `Expert,Node` with Expert = layer * E + e and Node = GPU."""

from pathlib import Path

import numpy as np

from moeplace.placement.engines.form import Export, Facts, Rows, check_form
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write, require_file

HEADER = "Expert,Node"
NOTE = "ExFlow takes no file name on its command line: its scripts name the solution in a constant that the user edits"


def write(placement: Placement, path: Path) -> Export:
    """Write the rows by rising id, with CRLF line ends as its solver does."""
    check_form(placement, "ExFlow")
    if placement.has_replicas:
        layer, expert = np.argwhere(placement.replica_counts > 1)[0]
        raise InputError(
            f"ExFlow has no replicas, but expert {expert} of MoE layer {layer} has "
            f"{placement.replica_counts[layer, expert]} slots"
        )
    lines = [f"{index},{rank}" for index, rank in enumerate(placement.rank_of_expert.ravel().tolist())]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\r\n" for line in (HEADER, *lines)).encode())
    inside, nodes = int(np.bincount(placement.node_of_rank).max()), placement.num_nodes
    start = f"name it solution_intra{inside}_inter{nodes}_cost*.csv, the name that its scripts give a solution"
    return Export((str(path),), start, (NOTE, "ExFlow knows no slots: their order inside ranks is not kept"))


def read(path: Path, known: Facts) -> Rows:
    """Read rows in any order; the number of experts per layer must be known, the slots of a rank go by rising id."""
    experts = known.num_experts
    if experts is None:
        raise InputError(f"{path} does not say where layers end: give the number of experts per layer (--num-experts)")
    try:
        lines = require_file(path).read_text().split()
        table = np.array([[int(cell) for cell in line.split(",")] for line in lines[1:]], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{path} is not an ExFlow solution: {error}") from error
    if lines[:1] != [HEADER] or table.ndim != 2 or table.shape[1] != 2:
        raise FormatError(f"{path} is not an ExFlow solution: it must have the columns {HEADER}")
    ids, rank_I = table.T
    if experts < 1 or len(ids) % experts or not np.array_equal(np.sort(ids), np.arange(len(ids))):
        raise FormatError(f"{path} must name each of layer * {experts} + expert exactly once, it has {len(ids)} rows")
    ranks = int(rank_I.max()) + 1 if known.num_ranks is None else known.num_ranks
    rank_LE = rank_I[np.argsort(ids)].reshape(-1, experts)
    for layer, rank_E in enumerate(rank_LE):
        if (
            rank_E.min() < 0
            or rank_E.max() >= ranks
            or experts % ranks
            or (np.bincount(rank_E) * ranks != experts).any()
        ):
            raise FormatError(f"{path}: MoE layer {layer} does not put {experts} experts evenly on {ranks} ranks")
    rows = np.argsort(rank_LE, axis=1, kind="stable")
    return Rows(rows.tolist(), Facts(num_ranks=ranks, num_experts=experts))
