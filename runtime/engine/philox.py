"""Random numbers without state: Philox4x32-10, a function from a key and a counter to 128 bits.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Whoever knows the key and the
counter of a draw has its number, on any rank and in any order.

Shape letters: N draws.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(N, 4) uint32 random words of counters (N, 4) under keys (N, 2), both uint32."""
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64).T
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits fit into 64
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(seed: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """(N,) float64 in [0, 1), 53 random bits each.

    Args:
        seed: (N,) uint64.
        counter: (N, 4) uint32; what tells draws of one seed apart.
    """
    seed = np.asarray(seed, np.uint64)
    key = np.stack([seed & _LOW, seed >> _HALF], axis=1)
    high, low = philox(np.asarray(counter), key)[:, :2].astype(np.uint64).T
    bits = (high >> np.uint64(5) << np.uint64(26)) | (low >> np.uint64(6))
    return bits.astype(np.float64) / 2.0**53
