"""The loader: what is asked for goes first, even between the pieces of what is fetched ahead; what is dropped ends."""

import threading
from collections.abc import Iterator

import pytest

from moeplace.runtime.experts.loader import Load, Loader

PATIENCE = 60.0
"""Seconds after which a test has failed."""


class Copies:
    """Copies that go on when they are told to, and the order in which their pieces came."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int]] = []  # (row, piece)
        self.goes_on = threading.Semaphore(0)
        self.has_begun = threading.Event()

    def __call__(self, layer: int, row: int, target: int, pieces: int) -> Iterator[float]:
        for piece in range(pieces):
            self.pieces.append((row, piece))
            if pieces > 1:
                self.has_begun.set()
                assert self.goes_on.acquire(timeout=PATIENCE)
            yield (piece + 1) / pieces


@pytest.fixture
def copies() -> Copies:
    return Copies()


@pytest.fixture
def loader(copies: Copies) -> Iterator[Loader]:
    made = Loader(
        copies, wanted=lambda load: True, take_row=lambda load: 0, pieces=3,
        size=lambda load: 10 * load.row, least_seconds=lambda size: 0.0,
    )  # fmt: skip
    yield made
    made.close()


def test_what_is_asked_for_passes_between_two_pieces(loader: Loader, copies: Copies) -> None:
    """And what was under way goes on behind it."""
    ahead, asked = Load(1, 7), [Load(0, row, target=1) for row in (3, 4)]
    loader.ask_ahead(ahead)
    assert copies.has_begun.wait(PATIENCE)
    for load in asked:
        loader.ask(load)
    copies.goes_on.release(3)
    assert ahead.done.wait(PATIENCE)
    assert all(load.done.is_set() for load in asked)
    assert copies.pieces == [(7, 0), (3, 0), (4, 0), (7, 1), (7, 2)]
    assert (loader.loads, loader.broken) == (3, 0.0)


def test_what_is_dropped_ends_after_its_piece(loader: Loader, copies: Copies) -> None:
    """The share that was loaded is counted, and the next load follows."""
    vain, other = Load(1, 7), Load(0, 3, target=0)
    loader.ask_ahead(vain)
    assert copies.has_begun.wait(PATIENCE)
    loader.drop([vain])
    copies.goes_on.release(1)
    assert vain.done.wait(PATIENCE)
    loader.ask(other)
    assert other.done.wait(PATIENCE)
    assert copies.pieces == [(7, 0), (3, 0)]
    assert (loader.loads, loader.broken) == (1, pytest.approx(1 / 3))


def test_an_emulated_link_is_left_before_its_time() -> None:
    """A load that would take far longer than the test may: dropped, it ends; asked for behind it, others come."""
    begun = threading.Event()

    def copy(layer: int, row: int, target: int, pieces: int) -> Iterator[float]:
        begun.set()
        yield 1.0

    loader = Loader(
        copy, wanted=lambda load: True, take_row=lambda load: 0, pieces=100_000,
        size=lambda load: load.layer, least_seconds=lambda size: 100.0 * PATIENCE * size,
    )  # fmt: skip
    vain, asked = Load(1, 7), Load(0, 3, target=0)
    loader.ask_ahead(vain)
    assert begun.wait(PATIENCE)
    loader.ask(asked)
    assert asked.done.wait(PATIENCE)
    assert not vain.done.is_set()
    loader.drop([vain])
    assert vain.done.wait(PATIENCE)
    assert loader.loads == 1
    assert 0 < loader.broken_bytes == loader.broken < 1
    loader.close()


def test_pauses_are_not_counted_as_loading(loader: Loader, copies: Copies) -> None:
    """`seconds` is of finished loads alone: the mean that hosts decide by."""
    load = Load(1, 7)
    loader.ask_ahead(load)
    assert copies.has_begun.wait(PATIENCE)
    loader.drop([load])
    copies.goes_on.release(1)
    assert load.done.wait(PATIENCE)
    assert (loader.loads, loader.bytes, loader.seconds) == (0, 0, 0.0)
    assert loader.broken_bytes == 70 * loader.broken > 0
