"""What tests of reports share: a checker of pages, routing, and two placements of it."""

import re
from html.parser import HTMLParser

import numpy as np

from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.traces.trace import RoutingTrace

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Checker(HTMLParser):
    """Fails on tags that do not close; collects addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One more open tag."""
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        """It must be the last one opened."""
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text that a person sees."""
        self.words.append(data)


def check_page(html: str) -> str:
    """Well formed and self-contained; returns the text."""
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    assert all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    assert not checker.tags & {"script", "link", "iframe", "img"}
    assert not re.search(r"https?://|url\(|@import", html)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html)
    return " ".join(" ".join(checker.words).split())


def make_trace(*, layers: int, experts: int, top_k: int = 1) -> RoutingTrace:
    """Random routing in which an expert is often followed by the one with the same number modulo four."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(experts), (400, layers, 1)), axis=2)[:, :, :top_k]
    return RoutingTrace(ids, np.full(layers, experts), sequence_ids=np.arange(400) // 10, hidden_size=8)


def striped(trace: RoutingTrace, ranks: int) -> Placement:
    """Expert e on rank e mod R."""
    row = np.arange(trace.num_experts).reshape(-1, ranks).T.reshape(-1)
    slots = np.full(ranks, trace.num_experts // ranks)
    return Placement(np.tile(row, (trace.num_layers, 1)), slots, np.zeros(ranks, int), trace.experts_per_layer)


def baseline(trace: RoutingTrace, ranks: int) -> Placement:
    slots = np.full(ranks, trace.num_experts // ranks)
    return index_order(trace.experts_per_layer, slots, np.zeros(ranks, int))
