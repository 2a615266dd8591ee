"""The K/V cache and its exchange between ranks, without a model: what is where, and how often it travels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import OUTSIDE
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv import lazy_zeros
from moeplace.runtime.kv.cache import KvCache, kv_bytes_per_position, kv_bytes_per_sequence
from moeplace.runtime.kv.exchange import relay_links, share_kv
from moeplace.runtime.kv.hand_over import KvPlaces, give_kv, hand_over
from tests.runtime.thread_ranks import run_groups

LAYERS, ROWS, POSITIONS = 3, 4, 9
NODES = [[0], [0, 0, 0], [0, 1], [0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 2]]


class Shapes:
    """A decoder as a cache sees it: attention that keeps keys and values of these (heads, dim)."""

    def __init__(self, key: tuple[int, int] = (2, 3), value: tuple[int, int] = (1, 4), dtype: Any = torch.float32):
        self.key, self.value = key, value
        self.num_layers, self.dtype, self.device = LAYERS, dtype, torch.device("cpu")

    def position_embeddings(self, position: torch.Tensor) -> None:
        assert position.shape == (1, 1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(ids), 5)

    def attend(self, layer: int, x: torch.Tensor, view: Any) -> torch.Tensor:
        assert view.mask(None, additive=None) is None
        folded = view.fold(x)
        (heads, dim), (others, width) = self.key, self.value
        view.update(torch.zeros(len(folded), heads, 1, dim), torch.zeros(len(folded), others, 1, width), layer)
        return view.unfold(folded)


def make_cache(**options: Any) -> KvCache:
    return KvCache(Shapes(), rows=ROWS, positions=POSITIONS, **options)  # type: ignore[arg-type]


def content(cache: KvCache) -> torch.Tensor:
    """(layers, rows, positions, c)."""
    parts = [slab.permute(0, 1, 3, 2, 4).flatten(3) for slab in (cache.all_keys, cache.all_values)]
    return torch.cat(parts, dim=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("key", "value"), [((2, 3), (2, 3)), ((1, 7), (1, 2))])
def test_bytes_are_those_of_the_memory(key: tuple[int, int], value: tuple[int, int], dtype: torch.dtype) -> None:
    """What budgets are reckoned with is what the tensors take, also where keys and values differ (MLA)."""
    model: Any = Shapes(key, value, dtype)
    one, several = (KvCache(model, rows=1, positions=positions) for positions in (1, 6))
    taken = [sum(slab.nbytes for slab in (cache.all_keys, cache.all_values)) for cache in (one, several)]
    assert kv_bytes_per_position(model) == taken[0]
    assert kv_bytes_per_sequence(model, 6) == taken[1]
    assert kv_bytes_per_sequence(model, 0) == 1
    assert one.row_width == taken[0] // (LAYERS * dtype.itemsize)


@pytest.mark.parametrize("mapped", [False, True])
def test_rows_hold_what_was_put_there(mapped: bool, dated_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims, writes, copies and trims at random, beside an array that does the same; what lies behind the last
    position that a tenant has claimed is zero."""
    monkeypatch.setattr(lazy_zeros, "_LEAST_BYTES", 0 if mapped else 1 << 40)
    rng, cache = np.random.default_rng(dated_seed), make_cache()
    width, used = cache.row_width, [0] * ROWS
    expected = torch.zeros(LAYERS, ROWS, POSITIONS, width)

    def integers(high: int, count: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, high, count))

    def draw(count: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(count, width))).float()

    for _ in range(200):
        what, row, end = rng.integers(5), int(rng.integers(ROWS)), int(rng.integers(1, POSITIONS + 1))
        if what == 0:
            cache.claim(row, end)
            expected[:, row, end:], used[row] = 0, end
        elif what == 1 and used[row]:
            position, layer = torch.randperm(used[row])[: rng.integers(1, used[row] + 1)], int(rng.integers(LAYERS))
            rows, kv = torch.full_like(position, row), draw(len(position))
            cache.write(layer, rows, position, kv)
            expected[layer, row, position] = kv
        elif what == 2 and used[row]:
            place = torch.randperm(LAYERS * used[row])[:5]
            layer, position = place // used[row], place % used[row]
            kv = draw(len(place))
            cache.write_layers(layer, torch.full_like(place, row), position, kv)
            expected[layer, row, position] = kv
        elif what == 3:
            source = int(rng.integers(ROWS))
            if source != row:
                cache.copy(source, row, end)
                expected[:, row, :end], used[row] = expected[:, source, :end], max(used[row], end)
            else:
                cache.copy(row, row, end)
        else:
            cache.trim(row, end - 1)
            if used[row] >= end:
                expected[:, row, end - 1 :], used[row] = 0, end - 1
        assert torch.equal(content(cache), expected)
        layer, row_n, position_n = int(rng.integers(LAYERS)), integers(ROWS, 6), integers(POSITIONS, 6)
        assert torch.equal(cache.read(layer, row_n, position_n), expected[layer, row_n, position_n])


def value_of(rank: int, layer: int, row: int, position: int) -> float:
    return 1000.0 * (rank + 1) + 100 * layer + 10 * row + position


def filled(rank: int) -> KvCache:
    """Of a rank that has something of its own everywhere."""
    cache = make_cache(replicated=True)
    places = torch.cartesian_prod(torch.arange(LAYERS), torch.arange(ROWS), torch.arange(POSITIONS))
    kv = torch.tensor([value_of(rank, *place.tolist()) for place in places])[:, None].expand(-1, cache.row_width)
    cache.write_layers(*places.unbind(1), kv)
    return cache


def counted(group: RankGroup) -> dict[str, int]:
    return {kind: count for (layer, kind), count in group.counters.collectives.items() if layer == OUTSIDE}


@pytest.mark.parametrize("nodes", NODES)
def test_what_one_rank_has_all_get(nodes: list[int], dated_seed: int) -> None:
    """K/V of tokens at their homes, everywhere afterwards and nothing else changed; one exchange, two where there are
    nodes, and each row once to every other node."""
    rng, size = np.random.default_rng(dated_seed), len(nodes)
    places = [divmod(int(place), POSITIONS) for place in rng.permutation(ROWS * POSITIONS)[:11]]
    home = torch.from_numpy(rng.integers(0, size, len(places)))

    def act(group: RankGroup) -> tuple[torch.Tensor, dict[str, int], int]:
        cache = filled(group.rank)
        rows, positions = map(list, zip(*places, strict=True))
        hand_over(cache, group, KvPlaces.of(rows, positions, cache.all_keys.device), home)
        return content(cache)[..., 0], counted(group), group.counters.bytes_sent["inter_node"]

    found = run_groups(act, nodes)
    for rank, (after, kinds, _) in enumerate(found):
        expected = content(filled(rank))[..., 0]
        for (row, position), owner in zip(places, home.tolist(), strict=True):
            expected[:, row, position] = torch.tensor(
                [value_of(owner, layer, row, position) for layer in range(LAYERS)]
            )
        assert torch.equal(after, expected)
        assert kinds == {"kv": 1 if nodes[-1] == 0 else 2}
    row_bytes = 16 + 10 * 4  # header, K/V
    assert sum(crossing for *_, crossing in found) == len(places) * LAYERS * nodes[-1] * row_bytes


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("announced", [True, False])
def test_ledgers_are_shared(nodes: list[int], announced: bool, dated_seed: int) -> None:
    """Any number of rows of any layer on each rank, also none; sizes are asked for only where nobody announced them,
    or where rows followed."""
    size = len(nodes)
    rows_RL = np.random.default_rng(dated_seed).integers(0, 4, (size, 2))
    rows_RL[0] = 0

    def act(group: RankGroup) -> tuple[list[Any], dict[str, int]]:
        ledger = KvLedger()
        for layer, count in enumerate(rows_RL[group.rank].tolist()):
            token = torch.arange(count) + 10 * group.rank
            ledger.add(layer, token, (100.0 * layer + token)[:, None].expand(-1, 3))
        if announced:
            ledger.announce(rows_RL.sum(1).tolist())
        shared = share_kv(group, ledger)
        assert torch.equal(shared.kv, (100.0 * shared.layer + shared.token)[:, None].expand(-1, 3))
        return sorted(zip(shared.layer.tolist(), shared.token.tolist(), strict=True)), counted(group)

    every = {
        (layer, 10 * rank + number, rank)
        for rank in range(size)
        for layer in range(2)
        for number in range(rows_RL[rank, layer])
    }
    for rank, (shared, kinds) in enumerate(run_groups(act, nodes)):
        assert shared == sorted((layer, token) for layer, token, owner in every if owner != rank)
        assert kinds == {"kv": 1 if nodes[-1] == 0 else 2} | ({} if announced else {"kv sizes": 1})


@pytest.mark.parametrize("receivers", [[2], [0, 2], [1]])
def test_newcomers_get_what_others_have(receivers: list[int], dated_seed: int) -> None:
    """Each rank sends its part to those that have none, and to nobody else."""
    rng, size = np.random.default_rng(dated_seed), 3
    order = [divmod(int(place), POSITIONS) for place in rng.permutation(ROWS * POSITIONS)]
    parts = [order[:4], [] if 1 in receivers else order[4:9], order[9:10] if 2 not in receivers else []]
    if 0 in receivers:
        parts[0] = []

    def act(group: RankGroup) -> tuple[torch.Tensor, dict[str, int]]:
        cache = filled(group.rank)
        places = [KvPlaces.of([r for r, _ in part], [p for _, p in part], torch.device("cpu")) for part in parts]
        assert [len(one) for one in places] == [len(part) for part in parts]
        give_kv(cache, group, places, receivers)
        return content(cache), counted(group)

    for rank, (after, kinds) in enumerate(run_groups(act, [0] * size)):
        expected = content(filled(rank))
        for sender, part in enumerate(parts if rank in receivers else []):
            for row, position in part:
                for layer in range(LAYERS):
                    expected[layer, row, position] = value_of(sender, layer, row, position)
        assert torch.equal(after, expected)
        assert kinds == {"kv": 1}


@pytest.mark.parametrize("nodes", [[0], [0, 0], *NODES, [0, 0, 0, 1, 1, 2, 2, 2, 2]])
def test_links_between_nodes_share_the_work(nodes: list[int]) -> None:
    """Each rank sends to one rank of every other node; of a node no rank hears more than one round oftener."""
    links, node_R = relay_links(np.array(nodes)), np.array(nodes)
    with pytest.raises(ValueError, match="read-only"):
        links[0, 0] = True
    for rank, node in enumerate(nodes):
        for other in range(nodes[-1] + 1):
            assert links[rank, node_R == other].sum() == (other != node)
    for sender in range(nodes[-1] + 1):
        for receiver in range(nodes[-1] + 1):
            heard = links[node_R == sender][:, node_R == receiver].sum(axis=0)
            assert heard.max() - heard.min() <= 1


def test_a_ledger_knows_what_came_after_the_announcement() -> None:
    """Rows that are added later were not announced; who waits for the announcement is called then."""
    ledger, called = KvLedger(), []
    ledger.on_announced = lambda: called.append(ledger.num_rows)
    assert (ledger.late, ledger.announced) == (True, None)
    ledger.add(0, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    assert not called
    ledger.announce([2, 0])
    assert (ledger.late, called, ledger.num_rows) == (False, [2], 2)
    ledger.add(1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3))
    assert (ledger.late, ledger.num_rows, ledger.announced) == (True, 3, [2, 0])


def test_whole_models_say_what_their_states_take() -> None:
    """Recurrent states are as large for any length."""
    from moeplace.runtime.models.whole import WholeModel

    model = WholeModel.__new__(WholeModel)
    model.__dict__.update(SimpleNamespace(state_bytes_per_position=7, fixed_state_bytes=100).__dict__)
    assert kv_bytes_per_position(model) == 7
    assert [kv_bytes_per_sequence(model, positions) for positions in (0, 3)] == [100, 121]
