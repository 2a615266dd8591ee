"""How alike requests are in the experts they ask for, and which of those that wait suits a batch best.

A request's profile is how often its tokens choose each expert, of length 1 in every layer; likeness is the cosine of
profiles, summed over layers (after ExpertFlow, arXiv 2410.17954). Who batches by it is greedy: again and again the
request that is most alike to those in the batch already.

Shape letters: L MoE layers, E experts per layer, G requests that wait, B requests of a batch.
"""

import numpy as np


def unit_profile(count_LE: np.ndarray) -> np.ndarray:
    """(L x E) how often each expert was chosen, of length 1 in every layer where one was."""
    return np.asarray((count_LE / np.maximum(np.linalg.norm(count_LE, axis=1, keepdims=True), 1e-12)).reshape(-1))


def likeness(profile_GX: np.ndarray, profile_BX: np.ndarray) -> np.ndarray:
    """(G, B) likeness of requests, from their (., L x E) profiles."""
    return np.asarray(profile_GX @ profile_BX.T)


def most_alike(alike_GB: np.ndarray) -> int:
    """Of G requests the one most alike to B others together, the first of equals."""
    return int(alike_GB.sum(axis=1).argmax())
