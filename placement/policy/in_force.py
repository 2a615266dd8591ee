"""Maps of engines: the one in force in the width that is asked for, and one from a placement file.

Shape letters: L MoE layers, S slots per layer.
"""

import numpy as np

from moeplace.placement.policy.answer import Answer, keep, why_not


def of_width(slots_LS: np.ndarray, slots: int) -> np.ndarray:
    """(L, slots) map of an engine whose ranks have become more or fewer: the first ones stay, new slots are empty."""
    wide_LS = np.full((len(slots_LS), slots), -1, np.int64)
    width = min(slots, slots_LS.shape[1])
    wide_LS[:, :width] = slots_LS[:, :width]
    return wide_LS


def of_file(path: str, *, layers: int, experts: int, ranks: int, slots_per_rank: int, previous: object) -> Answer:
    """The map that a placement file says, as it is; the previous one, with the reason, where it does not fit.

    Where the file leaves slots empty they repeat an expert of their rank, as engines need one in each.

    Never raises. Figures of the answer are those of a map that is not judged: NaN.
    """
    from moeplace.placement.placement_file import load_placement  # not light: SciPy is behind it
    from moeplace.placement.repeats import repeat_experts, without_bare_ranks

    shape = (layers, experts, ranks * slots_per_rank)
    try:
        placement = load_placement(path)
        if placement.num_ranks != ranks:
            return keep(previous, shape, f"{path} is for {placement.num_ranks} ranks, not {ranks}")
        if (placement.slots_of_rank != slots_per_rank).any():
            return keep(previous, shape, f"{path} has other slots per rank than {slots_per_rank}")
        table, repeated = repeat_experts(without_bare_ranks(placement))
        slots_LS = np.asarray(table, np.int32)
        wrong = why_not(slots_LS, shape, slots_per_rank, twice=repeated > 0)
    except Exception as error:  # an engine goes on with the map it has
        wrong = str(error)
    if wrong is not None:
        return keep(previous, shape, f"{path}: {wrong}")
    answer = keep(slots_LS, shape, "")
    moved_L = (
        np.zeros(layers, np.int64) if previous is None else fetched(np.asarray(previous), slots_LS, slots_per_rank)
    )
    return Answer(answer.map, moved_L, answer.bound, answer.imbalance, answer.across)


def fetched(before_LS: np.ndarray, after_LS: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """(L,) experts that a rank has after and had not before."""
    counts = [
        sum(
            len(set(after_S[start : start + slots_per_rank]) - set(before_S[start : start + slots_per_rank]))
            for start in range(0, len(after_S), slots_per_rank)
        )
        for before_S, after_S in zip(before_LS.tolist(), after_LS.tolist(), strict=True)
    ]
    return np.array(counts, np.int64)
