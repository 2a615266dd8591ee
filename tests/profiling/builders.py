"""Small instances for tests."""

import numpy as np


def random_ids(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int) -> np.ndarray:
    """(T, L, K) ids drawn without repetition inside a row."""
    return np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
