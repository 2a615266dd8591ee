"""What the annealing kernels share: random numbers, acceptance, overload, temperatures.

Each kernel owns a generator state of one uint64 (splitmix64), so that threads do not share random numbers and a seed
gives the same run everywhere.
"""

import numpy as np

from moeplace.profiling.kernel_cache import njit

COOLING_STEPS = 120
"""Temperatures of one annealing run, falling geometrically."""
FIRST_PULL = 5.0
"""First price of a move where moves are limited, in first temperatures."""
PULL_STEP = 1.1
"""Factor by which that price rises or falls from one temperature to the next."""
WALLED = 0.7
"""Share of the temperatures after which moves above their cap are also priced like load above its limit."""


@njit(cache=True, nogil=True, inline="always")
def next_random(state: np.ndarray) -> np.uint64:
    """Next uint64 of splitmix64 (Steele, Lea, Flood 2014); `state` is (1,) uint64 and is advanced."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, nogil=True, inline="always")
def random_below(state: np.ndarray, limit: int) -> int:
    """Uniform integer in 0..limit-1 (the bias of the modulus is below 2**-50 here)."""
    return int(next_random(state) >> np.uint64(11)) % limit


@njit(cache=True, nogil=True, inline="always")
def accepts(delta: float, temperature: float, state: np.ndarray) -> bool:
    """Metropolis rule."""
    if delta <= 0.0:
        return True
    if temperature <= 0.0 or delta > 30.0 * temperature:
        return False
    return float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0) < np.exp(-delta / temperature)


@njit(cache=True, nogil=True, inline="always")
def overload_change(load_R: np.ndarray, limit_R: np.ndarray, g: int, h: int, amount: float) -> float:
    """Change of the total load above `limit_R` when `amount` moves from rank g to rank h."""
    before = max(load_R[g] - limit_R[g], 0.0) + max(load_R[h] - limit_R[h], 0.0)
    after = max(load_R[g] - amount - limit_R[g], 0.0) + max(load_R[h] + amount - limit_R[h], 0.0)
    return after - before


@njit(cache=True, nogil=True, inline="always")
def more_moves(a: int, b: int, g: int, h: int, new_ER: np.ndarray) -> int:
    """Change of the number of moves when expert a on rank g and b on h change places; new_ER says which are moves."""
    more = np.int64(new_ER[a, h]) - np.int64(new_ER[a, g]) + np.int64(new_ER[b, g]) - np.int64(new_ER[b, h])
    return int(more)


@njit(cache=True, nogil=True, inline="always")
def next_pull(pull: float, moves: int, most_moves: float) -> float:
    """Price of a move at the next temperature: higher after too many of them, lower after few enough.

    A price that finds its own height lets a search pass through arrangements above the cap on moves. Behind a wall at
    the cap it would be stuck with its first moves, because most swaps need two.
    """
    return pull * PULL_STEP if moves > most_moves else pull / PULL_STEP


def seed_state(rng: np.random.Generator) -> np.ndarray:
    """(1,) uint64 state for the kernels, drawn from `rng`."""
    return rng.integers(0, 2**63, size=1, dtype=np.uint64)
