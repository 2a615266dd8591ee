"""Seeded synthetic traces: skew, affinity, planted partitions, drift, and enlarged copies of a real trace.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, R ranks.
"""

import numpy as np
from scipy.optimize import brentq

from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.affinity import affinity, load_entropy, primary_experts
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace

SEQUENCE_LENGTH = 128
"""Tokens per sequence of every generated trace."""

_COHESION = (
    0.5  # keeps the distance of co-activation from chance near the real one (DeepSeek-V2-Lite, 64 to 256 experts)
)


def zipf_shares(num_layers: int, num_experts: int, *, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """(L, E) shares proportional to i^-exponent, permuted afresh in every layer; 0 = uniform."""
    share_E = np.arange(1, num_experts + 1) ** -float(exponent)
    return np.stack([rng.permutation(share_E / share_E.sum()) for _ in range(num_layers)])


def lognormal_shares(num_layers: int, num_experts: int, *, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """(L, E) shares proportional to exp(sigma x standard normal), every layer normalised."""
    share_LE = np.exp(sigma * rng.standard_normal((num_layers, num_experts)))
    return share_LE / share_LE.sum(axis=1, keepdims=True)


def markov(shares_LE: np.ndarray, *, num_tokens: int, top_k: int, stickiness: float, seed: int) -> RoutingTrace:
    """Primary experts that form a chain: with probability `stickiness` the next one is the partner of this one, a fixed
    random permutation per boundary, else it is drawn by the layer's shares. The other K - 1 are drawn by the shares.

    Raises:
        InputError: `top_k` or `stickiness` is out of range.
    """
    layers, experts = shares_LE.shape
    _check(top_k, experts, stickiness=stickiness)
    rng = np.random.default_rng(seed)
    ids_TLK = np.empty((num_tokens, layers, top_k), dtype=np.int32)
    primary_T = np.zeros(num_tokens, dtype=np.int64)
    for layer in range(layers):
        drawn_T = rng.choice(experts, size=num_tokens, p=shares_LE[layer])
        if layer:
            partner_E = rng.permutation(experts)
            follows_T = rng.random(num_tokens) < stickiness
            drawn_T = np.where(follows_T, partner_E[primary_T], drawn_T)
        primary_T = drawn_T
        ids_TLK[:, layer] = _complete(primary_T, shares_LE[layer], top_k, rng)
    return _trace(ids_TLK, experts)


def identity_path(*, num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int) -> RoutingTrace:
    """One routing decision for all layers, relabelled by a random permutation in each.

    A placement equal in all layers up to these permutations has stay rate 1 and no traffic at K = 1; a solver has to
    undo the relabelling exactly.
    """
    _check(top_k, num_experts)
    rng = np.random.default_rng(seed)
    base_TK = _complete(rng.integers(0, num_experts, num_tokens), np.full(num_experts, 1 / num_experts), top_k, rng)
    labels_LE = np.stack([rng.permutation(num_experts) for _ in range(num_layers)])
    return _trace(labels_LE[:, base_TK].transpose(1, 0, 2).astype(np.int32), num_experts)


def planted(
    *, num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_ranks: int, epsilon: float, seed: int
) -> tuple[RoutingTrace, np.ndarray]:
    """Hidden blocks of E / R experts per layer, chained over layers: a token keeps its block, and with probability
    `epsilon` per layer draws its experts from all instead. At 0 the optimum is one rank per token and stay rate 1.

    Returns:
        the trace, and (L, E) int64 the hidden block of each expert: an optimal rank of it at epsilon 0.

    Raises:
        InputError: the experts do not divide, K exceeds a block, or epsilon is not a probability.
    """
    if num_experts % num_ranks:
        raise InputError(f"experts ({num_experts}) must be a multiple of ranks ({num_ranks})")
    size = num_experts // num_ranks
    _check(top_k, size, epsilon=epsilon)
    rng = np.random.default_rng(seed)
    block_T = rng.integers(0, num_ranks, num_tokens)
    ids_TLK = np.empty((num_tokens, num_layers, top_k), dtype=np.int32)
    block_LE = np.empty((num_layers, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        hidden_E = rng.permutation(num_experts)  # position -> expert; positions r x size .. are block r
        block_LE[layer, hidden_E] = np.arange(num_experts) // size
        inside_TK = block_T[:, None] * size + _distinct(num_tokens, size, top_k, rng)
        outside_TK = _distinct(num_tokens, num_experts, top_k, rng)
        strays_T = rng.random(num_tokens) < epsilon
        ids_TLK[:, layer] = hidden_E[np.where(strays_T[:, None], outside_TK, inside_TK)]
    return _trace(ids_TLK, num_experts), block_LE


def topics(
    *, num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_topics: int, contrast: float, seed: int
) -> RoutingTrace:
    """Sequences about topics: every topic has a taste for experts in each layer, so that load, co-activation and
    transitions are all uneven, as in real routing.

    A token's experts are the K greatest of contrast x taste + Gumbel noise; contrast 0 is uniform routing. Tokens of a
    sequence share two topics and each token has one of them.

    Raises:
        InputError: top-k or the contrast is out of range, or there is no topic.
    """
    _check(top_k, num_experts)
    if num_topics < 1 or not contrast >= 0:
        raise InputError(f"topics ({num_topics}) must be at least 1, and contrast ({contrast}) not negative")
    rng = np.random.default_rng(seed)
    sequence_T = np.arange(num_tokens) // SEQUENCE_LENGTH
    pair_Q2 = rng.integers(0, num_topics, (int(sequence_T[-1]) + 1 if num_tokens else 0, 2))
    topic_T = pair_Q2[sequence_T, rng.integers(0, 2, num_tokens)]
    ids_TLK = np.empty((num_tokens, num_layers, top_k), dtype=np.int32)
    for layer in range(num_layers):
        taste_XE = contrast * rng.standard_normal((num_topics, num_experts))
        score_TE = taste_XE[topic_T] + rng.gumbel(size=(num_tokens, num_experts))
        ids_TLK[:, layer] = np.argsort(-score_TE, axis=1)[:, :top_k]
    return _trace(ids_TLK, num_experts)


def ragged(trace: RoutingTrace, share: float, *, seed: int) -> RoutingTrace:
    """The trace with each expert of a token dropped with probability `share`, from the last one on (top-p routing).

    Raises:
        InputError: `share` is not a probability.
    """
    _check(1, trace.num_experts, share=share)
    keep_TLK = np.random.default_rng(seed).random(trace.topk_ids.shape) >= share
    return trace.replace(topk_ids=np.where(np.logical_and.accumulate(keep_TLK, axis=2), trace.topk_ids, -1))


def drifting(
    *, num_tokens: int, num_layers: int, num_experts: int, top_k: int, stickiness: float, seed: int
) -> RoutingTrace:
    """Two regimes of Zipf shares and of partners; the share of the second grows linearly from none to all tokens."""
    rng = np.random.default_rng(seed)
    regimes = [
        markov(
            zipf_shares(num_layers, num_experts, exponent=1.0, rng=rng),
            num_tokens=num_tokens,
            top_k=top_k,
            stickiness=stickiness,
            seed=int(rng.integers(2**31)),
        )
        for _ in range(2)
    ]
    sequences_T = np.arange(num_tokens) // SEQUENCE_LENGTH
    later = rng.random(int(sequences_T[-1]) + 1) < np.linspace(0, 1, int(sequences_T[-1]) + 1)
    chosen_T = later[sequences_T]
    ids_TLK = np.where(chosen_T[:, None, None], regimes[1].topk_ids, regimes[0].topk_ids)
    return regimes[0].replace(topk_ids=ids_TLK)


def like(
    trace: RoutingTrace, *, num_layers: int, num_experts: int, top_k: int, num_tokens: int, seed: int
) -> RoutingTrace:
    """A larger trace with the skew, the affinity between layers and the co-activation of a real one.

    Tokens are those of the real trace (sequences drawn with replacement where they do not suffice), layers are its
    layers in turn. An expert becomes num_experts / E experts of equal popularity; which of them serves a token follows
    a class of the token that persists from layer to layer, as often as keeps the ratio of mutual information to
    entropy that the real trace has. A top-k beyond the real one is filled from the neighbouring token of the sequence.

    Raises:
        InputError: the experts are no multiple of the trace's, or its layers are unequal.
    """
    source = trace.num_experts
    if (trace.experts_per_layer != source).any():
        raise InputError("a trace with unequal experts per layer cannot be enlarged")
    if num_experts % source:
        raise InputError(f"num_experts ({num_experts}) must be a multiple of the trace's {source}")
    _check(top_k, num_experts)
    rng = np.random.default_rng(seed)
    copies = num_experts // source
    rows_T, following_T, sequence_T = _draw_tokens(trace, num_tokens, rng)
    persistence = _persistence(trace, copies, seed)
    class_T = rng.integers(0, copies, num_tokens)
    dtype = np.int16 if num_experts < 2**15 else np.int32
    ids_TLK = np.empty((num_tokens, num_layers, top_k), dtype=dtype)
    for layer in range(num_layers):
        real_TK = trace.layer(layer % trace.num_layers).astype(np.int64)
        moves_T = rng.random(num_tokens) >= persistence
        class_T = np.where(moves_T, rng.integers(0, copies, num_tokens), class_T)
        offset_E = rng.integers(0, copies, source)
        label_E = rng.permutation(num_experts)
        wide_TK = np.concatenate([real_TK[rows_T], real_TK[following_T]], axis=1)
        kept_TK = _first_distinct(wide_TK, top_k, source, copies)
        leaves_TK = rng.random(kept_TK.shape) >= _COHESION
        leaves_TK[:, 0] = False  # the primary expert always follows: affinity is defined on it
        leaves_TK[(kept_TK >= source).any(axis=1)] = False  # copies of one expert must stay apart
        stray_TK = np.where(leaves_TK, rng.integers(0, copies, (num_tokens, 1)), 0)
        copy_TK = (class_T[:, None] + offset_E[kept_TK % source] + kept_TK // source + stray_TK) % copies
        ids_TLK[:, layer] = np.where(kept_TK >= 0, label_E[(kept_TK % source) * copies + copy_TK], -1)
    return _trace(ids_TLK, num_experts, sequence_T=sequence_T, model=f"enlarged from {trace.model or 'a trace'}")


def _draw_tokens(
    trace: RoutingTrace, num_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, row of the neighbour in its sequence, new sequence id) of every token, by whole sequences."""
    ids_T = np.zeros(trace.num_tokens, np.int64) if trace.sequence_ids is None else np.asarray(trace.sequence_ids)
    order = np.argsort(ids_T, kind="stable")
    starts = np.flatnonzero(np.diff(ids_T[order], prepend=ids_T[order][0] - 1))
    ends = np.append(starts[1:], len(order))
    rows, following, sequences = [], [], []
    total, number = 0, 0
    while total < num_tokens:
        for sequence in rng.permutation(len(starts)):
            positions = np.arange(starts[sequence], ends[sequence])
            rows.append(order[positions])
            neighbours = np.append(positions[1:], positions[-2] if len(positions) > 1 else positions[-1])
            following.append(order[neighbours])
            sequences.append(np.full(len(positions), number))
            total, number = total + len(positions), number + 1
            if total >= num_tokens:
                break
    return tuple(np.concatenate(parts)[:num_tokens] for parts in (rows, following, sequences))  # type: ignore[return-value]


def _persistence(trace: RoutingTrace, copies: int, seed: int) -> float:
    """Probability that a token keeps its class, from the share of entropy that neighbouring layers explain."""
    if copies == 1 or trace.num_layers == 1:
        return 0.0
    score = affinity(primary_experts(trace), trace.num_experts, seed=seed)
    primary_LE = RoutingStats.from_trace(trace.primary()).load
    entropy = float(load_entropy(primary_LE, trace.experts_per_layer).mean()) * np.log2(trace.num_experts)
    wanted = np.clip(score.excess_bits / max(entropy, 1e-9), 0.0, 0.99) * np.log2(copies)

    def missing(keep: float) -> float:
        same = keep + (1 - keep) / copies
        other = (1 - same) / (copies - 1)
        entropy_after = -same * np.log2(same) - (copies - 1) * (other * np.log2(other) if other > 0 else 0.0)
        return np.log2(copies) - entropy_after - wanted

    return float(brentq(missing, 0.0, 1.0))


def _first_distinct(wide_TK: np.ndarray, top_k: int, source: int, copies: int) -> np.ndarray:
    """(T, top_k) the first different ids of every row; where they run out, their other copies (id + source x n).

    What is left over is -1. A row that has any -1 is ragged: it keeps its own length at most.
    """
    tokens, width = wide_TK.shape
    own = width // 2
    repeated_TK = np.zeros((tokens, width), dtype=bool)
    for k in range(1, width):
        repeated_TK[:, k] = (wide_TK[:, :k] == wide_TK[:, k : k + 1]).any(axis=1)
    usable_TK = ~repeated_TK & (wide_TK >= 0)
    ragged_T = (wide_TK[:, :own] < 0).any(axis=1)
    usable_TK[ragged_T, own:] = False
    order_TK = np.argsort(~usable_TK, axis=1, kind="stable")
    sorted_TK = np.take_along_axis(wide_TK, order_TK, axis=1)
    count_T = usable_TK.sum(axis=1)
    column_K = np.arange(top_k)
    turn_TK = column_K // np.maximum(count_T, 1)[:, None]  # 0 for the first round, then the copies
    picked_TK = np.take_along_axis(sorted_TK, np.minimum(column_K % np.maximum(count_T, 1)[:, None], width - 1), axis=1)
    result_TK = picked_TK + source * turn_TK
    limit_T = np.where(ragged_T, count_T, np.minimum(count_T * copies, top_k))
    return np.where((column_K < limit_T[:, None]) & (count_T > 0)[:, None], result_TK, -1)


def _complete(primary_T: np.ndarray, share_E: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """(T, K) with the given primary expert and K - 1 others drawn by share without repetition (Gumbel top-k)."""
    if top_k == 1:
        return primary_T[:, None]
    key_TE = rng.gumbel(size=(len(primary_T), len(share_E))) + np.log(np.maximum(share_E, 1e-300))
    key_TE[np.arange(len(primary_T)), primary_T] = np.inf
    return np.argsort(-key_TE, axis=1)[:, :top_k]


def _distinct(tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]


def _check(top_k: int, experts: int, **probabilities: float) -> None:
    if not 1 <= top_k <= experts:
        raise InputError(f"top-k ({top_k}) must lie in 1..{experts}, the experts to choose from")
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} ({value}) must lie in 0..1")


def _trace(
    ids_TLK: np.ndarray, num_experts: int, *, sequence_T: np.ndarray | None = None, model: str = "synthetic"
) -> RoutingTrace:
    tokens, layers, _ = ids_TLK.shape
    sequences = np.arange(tokens) // SEQUENCE_LENGTH if sequence_T is None else sequence_T
    return RoutingTrace(ids_TLK, np.full(layers, num_experts), sequence_ids=sequences, model=model)
