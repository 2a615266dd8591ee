"""Counts per expert that cannot be what a model does: of one rank only, of padded tokens, of experts never chosen.

Shape letters: L MoE layers, E experts per layer.
"""

import numpy as np

from moeplace.profiling.imports.canonical.findings import Findings, ranges, share

_UNUSED_SHARE = 0.1
_FEWEST_LAYERS = 4
"""Layers from which the same experts in all of them are no accident."""
_MOST_LAYERS_APART = 0.1
_STEP = 1.2
"""How far the least loaded padded expert lies above the most loaded other one, on average over layers."""
_EVEN = 0.2
_SAMPLED = 20
"""Assignments per expert from which an expert without any is no accident."""
_SHOWN = 8
_MOST_PADDED = 64


def report_use(load_LE: np.ndarray, experts_L: np.ndarray, findings: Findings, *, complete: bool = True) -> None:
    """Warn of experts that nobody chose, and of counts that look like those of one rank.

    Args:
        load_LE: (L, M) counts; columns may be fewer or more than experts.
        experts_L: (L,) experts of each layer.
        findings: gets the sentences.
        complete: the counts are known.
    """
    if not complete:
        return
    total = int(experts_L.sum())
    used_LE = load_LE[:, : int(experts_L.max())] > 0
    block = one_rank_block(used_LE, int(experts_L.min()))
    if block is not None and (experts_L == experts_L[0]).all():
        low, high = block
        findings.warn(
            f"{share(high - low, total / len(experts_L))} of the experts ({low}-{high - 1} of {experts_L[0]}) have all "
            "the load, the same in every layer: counts of one rank, it seems; import the folder with the files of all "
            "ranks, which are added up"
        )
        return
    unused = total - int(used_LE.sum())
    if not unused:
        return
    what = f"{share(unused, total)} of the experts ({unused} of {total} in {len(experts_L)} layers) were never chosen"
    if load_LE.sum() < _SAMPLED * total:
        findings.remark(f"{what}: too few tokens to tell, it may be chance")
    elif unused > _UNUSED_SHARE * total:
        ends_L = used_LE.shape[1] - used_LE[:, ::-1].argmax(axis=1)
        is_padded = unused == int((experts_L - ends_L).sum())
        sizes = ",".join(str(end) for end in ends_L[:_SHOWN].tolist()) + (",..." if len(ends_L) > _SHOWN else "")
        cause = (
            f"if layers keep fewer experts give --num-experts {sizes}" if is_padded else "is --num-experts too great?"
        )
        findings.warn(f"{what}, in spite of {int(load_LE.sum())} assignments: {cause}")
    else:
        findings.remark(what)


def one_rank_block(used_LE: np.ndarray, experts: int) -> tuple[int, int] | None:
    """[low, high) of the aligned block of E / R experts that holds all that is in use, None where there is none.

    The block must be a whole rank's for some number of ranks, in use in all layers, and mostly in use.
    """
    used_E = np.flatnonzero(used_LE.any(axis=0))
    if not len(used_E) or len(used_LE) < 2 or experts < 8:
        return None
    low, high = int(used_E[0]), int(used_E[-1]) + 1
    for size in range(max(high - low, 2), experts // 2 + 1):
        if experts % size == 0 and low // size == (high - 1) // size:
            start = low // size * size
            inside_LE = used_LE[:, start : start + size]
            return (start, start + size) if inside_LE.mean() > 0.5 else None
    return None


def padded_experts(load_LE: np.ndarray) -> tuple[np.ndarray, int] | None:
    """(experts, tokens a layer) of padded tokens: the same experts hottest in nearly all layers, by one amount.

    None where there is no such set. The tokens are the least excess of the set over the median of the other experts.
    """
    layers, experts = load_LE.shape
    if layers < _FEWEST_LAYERS or experts < 4:
        return None
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    for size in range(min(experts // 4, _MOST_PADDED), 0, -1):
        top_LE = np.sort(order_LE[:, :size], axis=1)
        candidate, votes = np.unique(top_LE, axis=0, return_counts=True)
        chosen = candidate[votes.argmax()]
        if votes.max() < (1 - _MOST_LAYERS_APART) * layers:
            continue
        inside_LE = load_LE[:, chosen]
        outside_LE = np.delete(load_LE, chosen, axis=1)
        above_L = inside_LE.mean(axis=1) - np.median(outside_LE, axis=1)
        steps_L = inside_LE.min(axis=1) / np.maximum(outside_LE.max(axis=1), 1)
        is_even = above_L.std() < _EVEN * above_L.mean()
        spread = (inside_LE.max(axis=1) - inside_LE.min(axis=1)).mean()
        is_used = np.median(outside_LE) > 0  # else these are the counts of one rank, or of a small model
        if is_used and is_even and steps_L.mean() > _STEP and spread < above_L.mean():
            return chosen, max(int(above_L.min()), 0)
    return None


def report_padding(load_LE: np.ndarray, findings: Findings, *, drop: bool) -> np.ndarray:
    """The loads, without those of padded tokens where `drop` says so; a warning where they are seen."""
    found = padded_experts(load_LE)
    if found is None:
        return load_LE
    experts, tokens = found
    part = share(tokens * len(experts) * len(load_LE), int(load_LE.sum()))
    what = (
        f"experts {ranges(experts)} are the hottest in every layer, by nearly the same {tokens} tokens ({part} of the "
        "load): padded rows, it seems"
    )
    if not drop:
        findings.warn(f"{what} (--drop-padding takes them off)")
        return load_LE
    findings.warn(f"{what}; they were taken off")
    findings.dropped.append(f"{tokens} tokens a layer of experts {ranges(experts)}")
    without_LE = load_LE.copy()
    without_LE[:, experts] = np.maximum(without_LE[:, experts] - tokens, 0)
    return without_LE
