"""Agreements of ranks that are threads of this process: what differs is said, and one that failed costs no other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moeplace.runtime.comm.agreement import Agreement
from moeplace.runtime.errors import DisagreementError, PeerLostError
from tests.runtime.thread_ranks import WAIT, run_threads


@contextmanager
def guard(doing: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"during {doing}") from error


def agreements(size: int) -> tuple[dist.HashStore, list[Agreement]]:
    store = dist.HashStore()
    return store, [Agreement(store, rank=rank, size=size, guard=guard) for rank in range(size)]


def run_ranks(act: Callable[[int], Any], size: int) -> list[Any]:
    """What `act(rank)` gives, or its error as a sentence, of ranks side by side."""

    def tell(rank: int) -> Any:
        try:
            return act(rank)
        except (DisagreementError, PeerLostError) as error:
            return f"{type(error).__name__}: {error}"

    return run_threads(tell, size)


@pytest.mark.parametrize("size", [2, 4])
def test_what_failed_once_can_be_agreed_upon_later(size: int, dated_seed: int) -> None:
    """In any order of successes, differences and ranks that give up: each agreement ends on all as it must, and the
    store keeps a few keys, however many there were."""
    rng = np.random.default_rng(dated_seed)
    store, ranks = agreements(size)
    for turn in range(30):
        what, odd = rng.choice(["agree", "differ", "give up"]), int(rng.integers(size))

        def act(rank: int, turn: int = turn, what: str = what, odd: int = odd) -> str:
            if rank == odd and what == "give up":
                ranks[rank].give_up(f"no  file\nin turn {turn}")
                return "gave up"
            value = "x" if rank == odd and what == "differ" else "y"
            ranks[rank].reach({"turn": str(turn), "value": value}, timeout=WAIT)
            return "agreed"

        found = run_ranks(act, size)
        if what == "agree":
            assert found == ["agreed"] * size, turn
        elif what == "give up":
            others = {told for rank, told in enumerate(found) if rank != odd}
            assert others == {f"DisagreementError: rank {odd} gave up: no file in turn {turn}"}, turn
        else:
            assert all("disagree about the value: " in told for told in found), turn
            peer = 0 if odd else 1
            first, second = sorted((odd, peer))
            said = f"ranks {first} and {second} disagree about the value: x on rank {odd}, y on rank {peer}; all ranks"
            assert said in found[odd]
    for _ in range(2):
        assert run_ranks(lambda rank: ranks[rank].reach({"end": "1"}, timeout=WAIT), size) == [None] * size
    # Of agreements that succeeded nothing is left but the last one; failed ones leave what nobody waits for.
    before = store.num_keys()
    for _ in range(5):
        assert run_ranks(lambda rank: ranks[rank].reach({"end": "1"}, timeout=WAIT), size) == [None] * size
    assert store.num_keys() == before


def test_other_things_are_no_difference_of_a_value() -> None:
    """One rank compares more than the other, or the other way round: said by both."""
    _, ranks = agreements(2)
    told = [{"a": "1", "b": "2"}, {"a": "1"}]
    found = run_ranks(lambda rank: ranks[rank].reach(told[rank], timeout=WAIT), 2)
    assert set(found) == {"DisagreementError: ranks 0 and 1 compare different things"} | {
        "DisagreementError: ranks 1 and 0 compare different things"
    }


def test_a_silent_rank_is_waited_for_as_long_as_was_said() -> None:
    """And named; alone there is nobody to wait for, and nothing to tell."""
    store, ranks = agreements(2)
    with pytest.raises(PeerLostError, match="waiting for rank 1"):
        ranks[0].reach({"a": "1"}, timeout=0.05)
    alone = Agreement(store, rank=0, size=1, guard=guard)
    before = store.num_keys()
    alone.reach({"a": "1"}, timeout=0.05)
    alone.give_up("why not")
    assert store.num_keys() == before


@pytest.mark.parametrize("size", [2, 3])
def test_of_agreements_the_last_one_stays(size: int) -> None:
    """A key of each rank, however many there were."""
    store, ranks = agreements(size)
    for _ in range(4):
        assert run_ranks(lambda rank: ranks[rank].reach({"a": "1"}, timeout=WAIT), size) == [None] * size
        assert store.num_keys() == size


def test_who_waits_can_be_told_that_it_is_in_vain() -> None:
    """As often as it looks up; who need not wait does not look."""
    _, ranks = agreements(2)
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise PeerLostError("rank 1 has died")

    with pytest.raises(PeerLostError, match="has died"):
        ranks[0].reach({"a": "1"}, timeout=WAIT, look=look)
    ranks[1].reach({"a": "1"}, timeout=WAIT, look=look)  # rank 0 has said what it has
    assert len(looks) == 3
