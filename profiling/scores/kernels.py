"""Compiled loops of the locality scores: segment histograms and priority caches.

Shape letters: T tokens, E experts (of one layer, or of all layers numbered through), K ids per token, Q sequences.
"""

import numpy as np

from moeplace.profiling.kernel_cache import njit

_RECENCY = 1 << 32


@njit(cache=True, nogil=True)
def segment_histogram(
    ids_TK: np.ndarray, starts_Q: np.ndarray, length: int, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many segments of `length` tokens (stride 1, inside a sequence) use an expert c times, c = 1..length.

    A count stays the same until a token with the expert enters or leaves, so only changes are visited. Returns
    (E, length + 1) per expert and (Q, length + 1) per sequence, int64; column 0 is left at zero.
    """
    tokens, top_k = ids_TK.shape
    sequences = len(starts_Q)
    by_expert = np.zeros((num_experts, length + 1), dtype=np.int64)
    by_sequence = np.zeros((sequences, length + 1), dtype=np.int64)
    count = np.zeros(num_experts, dtype=np.int64)
    since = np.zeros(num_experts, dtype=np.int64)
    for q in range(sequences):
        start = starts_Q[q]
        end = starts_Q[q + 1] if q + 1 < sequences else tokens
        if end - start < length:
            continue
        count[:] = 0
        since[:] = 0
        for t in range(start, end):
            segment = t - start - length + 1  # the segment that ends with this token; negative while it fills
            for step in range(2):  # the token that leaves, then the one that enters
                source = t - length if step == 0 else t
                if source < start:
                    continue
                for k in range(top_k):
                    e = ids_TK[source, k]
                    if e < 0 or e >= num_experts:
                        continue
                    if segment > since[e]:
                        if count[e] > 0:
                            by_expert[e, count[e]] += segment - since[e]
                            by_sequence[q, count[e]] += segment - since[e]
                        since[e] = segment
                    count[e] += 1 if step == 1 else -1
        last = end - start - length + 1
        for e in range(num_experts):
            if count[e] > 0:
                by_expert[e, count[e]] += last - since[e]
                by_sequence[q, count[e]] += last - since[e]
    return by_expert, by_sequence


@njit(cache=True, nogil=True)
def _move_to_top(e: int, held: int, priority: np.ndarray, place: np.ndarray, stack: np.ndarray) -> int:
    """Put an expert on top of the stack; what it displaces sinks as far as its priority lets it. The new height."""
    depth, where, carried = len(stack), place[e], e
    end_of_walk = held if where < 0 or where >= depth else where
    for i in range(min(end_of_walk, depth)):
        other = stack[i]
        if i == 0 or priority[carried] > priority[other]:
            stack[i] = carried
            place[carried] = i
            carried = other
    if 0 <= where < depth:
        stack[where] = carried
        place[carried] = where
    elif held < depth:
        stack[held] = carried
        place[carried] = held
        held += 1
    else:
        place[carried] = depth
    return held


@njit(cache=True, nogil=True)
def segment_cache_hits(
    ids_TK: np.ndarray, starts_Q: np.ndarray, horizon: int, num_experts: int, depth: int
) -> np.ndarray:
    """Hits of caches of size 1..depth that evict the lowest (uses within the next `horizon` tokens, recency).

    A stack of the experts in which the first s entries are the contents of the cache of size s (Mattson's inclusion
    property), replayed for each sequence from an empty cache. All experts of a token are looked up before any is
    moved; an expert not seen before is a hit where free slots remain. Returns (Q, depth + 1) int64: hits first
    possible at size column + 1, and the accesses in the last column.
    """
    tokens, top_k = ids_TK.shape
    sequences = len(starts_Q)
    hits = np.zeros((sequences, depth + 1), dtype=np.int64)
    priority = np.zeros(num_experts, dtype=np.int64)
    place = np.empty(num_experts, dtype=np.int64)  # position in the stack; -1 not seen, depth = fell off
    stack = np.empty(depth, dtype=np.int64)
    for q in range(sequences):
        start = starts_Q[q]
        end = starts_Q[q + 1] if q + 1 < sequences else tokens
        priority[:] = 0
        place[:] = -1
        held, seen, clock = 0, 0, 0
        for t in range(start, min(start + horizon, end)):
            for k in range(top_k):
                e = ids_TK[t, k]
                if 0 <= e < num_experts:
                    priority[e] += _RECENCY
        for t in range(start, end):
            for k in range(top_k):
                e = ids_TK[t, k]
                if e < 0 or e >= num_experts:
                    continue
                hits[q, depth] += 1
                where = place[e]
                if where < 0:
                    where = seen
                    seen += 1
                if where < depth:
                    hits[q, where] += 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e < 0 or e >= num_experts:
                    continue
                held = _move_to_top(e, held, priority, place, stack)
                clock += 1
                uses = (priority[e] >> 32) - 1
                priority[e] = (uses << 32) | clock
            following = t + horizon
            if following < end:
                for k in range(top_k):
                    e = ids_TK[following, k]
                    if 0 <= e < num_experts:
                        priority[e] += _RECENCY
    return hits


@njit(cache=True, nogil=True)
def belady_hits(ids_TK: np.ndarray, starts_Q: np.ndarray, num_experts: int, depth: int) -> np.ndarray:
    """As `segment_cache_hits` with the optimal rule: evict the expert whose next use is farthest (Belady 1966)."""
    tokens, top_k = ids_TK.shape
    sequences = len(starts_Q)
    hits = np.zeros((sequences, depth + 1), dtype=np.int64)
    following = np.empty((tokens, top_k), dtype=np.int64)
    priority = np.empty(num_experts, dtype=np.int64)  # minus the next use
    place = np.empty(num_experts, dtype=np.int64)
    stack = np.empty(depth, dtype=np.int64)
    never = np.int64(tokens) * top_k + num_experts
    for q in range(sequences):
        start = starts_Q[q]
        end = starts_Q[q + 1] if q + 1 < sequences else tokens
        for e in range(num_experts):
            priority[e] = -(never + e)  # never again: any fixed order will do
        for t in range(end - 1, start - 1, -1):
            for k in range(top_k - 1, -1, -1):
                e = ids_TK[t, k]
                if 0 <= e < num_experts:
                    following[t, k] = -priority[e]
                    priority[e] = -(np.int64(t) * top_k + k)
        place[:] = -1
        held, seen = 0, 0
        for t in range(start, end):
            for k in range(top_k):
                e = ids_TK[t, k]
                if e < 0 or e >= num_experts:
                    continue
                hits[q, depth] += 1
                where = place[e]
                if where < 0:
                    where = seen
                    seen += 1
                if where < depth:
                    hits[q, where] += 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e < 0 or e >= num_experts:
                    continue
                held = _move_to_top(e, held, priority, place, stack)
                priority[e] = -following[t, k]
    return hits


@njit(cache=True, nogil=True)
def frequency_hits(ids_TK: np.ndarray, starts_Q: np.ndarray, num_experts: int, size: int) -> np.ndarray:
    """(Q, 2) hits and accesses of one cache of `size` that evicts the least frequently used; ties: the older use.

    Frequencies count from the start of the sequence, in the cache or not.
    """
    tokens, top_k = ids_TK.shape
    sequences = len(starts_Q)
    result = np.zeros((sequences, 2), dtype=np.int64)
    priority = np.empty(num_experts, dtype=np.int64)
    inside = np.empty(num_experts, dtype=np.bool_)
    seen = np.empty(num_experts, dtype=np.bool_)
    cache = np.empty(size, dtype=np.int64)
    for q in range(sequences):
        start = starts_Q[q]
        end = starts_Q[q + 1] if q + 1 < sequences else tokens
        priority[:] = 0
        inside[:] = False
        seen[:] = False
        held, distinct, clock = 0, 0, 0
        for t in range(start, end):
            for k in range(top_k):
                e = ids_TK[t, k]
                if 0 <= e < num_experts:
                    result[q, 1] += 1
                    if inside[e]:
                        result[q, 0] += 1
                    elif not seen[e]:
                        result[q, 0] += distinct < size
                        distinct += 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e < 0 or e >= num_experts:
                    continue
                clock += 1
                seen[e] = True
                priority[e] = (((priority[e] >> 32) + 1) << 32) | clock
                if inside[e]:
                    continue
                if held < size:
                    cache[held] = e
                    held += 1
                else:
                    worst = 0
                    for i in range(1, size):
                        if priority[cache[i]] < priority[cache[worst]]:
                            worst = i
                    inside[cache[worst]] = False
                    cache[worst] = e
                inside[e] = True
    return result
