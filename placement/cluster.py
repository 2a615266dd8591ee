"""Cluster: nodes, ranks, slots, speeds and links.

Shape letters: R ranks, N nodes, C slots per rank, S slots per layer.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import networkx as nx
import numpy as np

from moeplace.placement.memory import Memory
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file


@dataclass(frozen=True)
class Link:
    """One class of link, seen from one rank.

    Attributes:
        latency: seconds a collective over this link costs, whatever it carries.
        bandwidth: bytes per second that one rank can send (and, at the same time, receive).
        node_bandwidth: bytes per second that all ranks of a node share in each direction; infinite when each rank
            has its own port.
    """

    latency: float
    bandwidth: float
    node_bandwidth: float = float("inf")

    def __post_init__(self) -> None:
        if self.latency < 0:
            raise InputError(f"link latency ({self.latency} s) must not be negative")
        if not self.bandwidth > 0 or not self.node_bandwidth > 0:
            raise InputError(f"link bandwidth ({self.bandwidth} B/s) must be positive")

    def slower(self, times: float) -> Self:
        """A link of so much less bandwidth."""
        return replace(self, bandwidth=self.bandwidth / times, node_bandwidth=self.node_bandwidth / times)


INTRA_NODE = Link(latency=15e-6, bandwidth=300e9)
"""Default inside a node: an NVLink generation's order of magnitude."""
INTER_NODE = Link(latency=30e-6, bandwidth=40e9)
"""Default between nodes: a 400 Gbit/s port per rank at realistic efficiency."""


@dataclass(frozen=True, eq=False)
class Cluster:
    """Where experts can sit, and what distance costs.

    Attributes:
        node_of_rank: (R,) int64, node of each rank; nodes are consecutive blocks of ranks, numbered from 0.
        slots_of_rank: (R,) int64, slots per layer of each rank; 0 = a rank that joins or leaves.
        speed_of_rank: (R,) float64, relative speed of the expert computation, mean 1.
        intra: link between ranks of a node.
        inter: link between nodes.
        distance_RR: (R, R) float64 cost of moving a byte between ranks, 0 on the diagonal, from a topology; relative
            inside each tier, whose farthest pair has the bandwidth of its link. None means that all pairs of a tier
            are alike.
        memory: tiers for experts that do not fit; None = every slot is in fast memory.

    Raises:
        InputError: a shape or a value breaks a rule.
    """

    node_of_rank: np.ndarray
    slots_of_rank: np.ndarray
    speed_of_rank: np.ndarray
    intra: Link = INTRA_NODE
    inter: Link = INTER_NODE
    distance_RR: np.ndarray | None = None
    memory: Memory | None = None

    def __post_init__(self) -> None:
        node = np.asarray(self.node_of_rank, dtype=np.int64)
        slots = np.asarray(self.slots_of_rank, dtype=np.int64)
        speed = np.asarray(self.speed_of_rank, dtype=np.float64)
        if node.ndim != 1 or not len(node):
            raise InputError("a cluster needs at least one rank")
        steps = np.diff(node)
        if node[0] != 0 or (steps < 0).any() or (steps > 1).any():
            raise InputError(f"nodes must be consecutive blocks of ranks numbered from 0, not {node.tolist()}")
        if slots.shape != node.shape or (slots < 0).any() or not slots.any():
            raise InputError(f"slots per rank must be {len(node)} numbers from 0, not all 0, not {slots.tolist()}")
        if speed.shape != node.shape or not (speed > 0).all():
            raise InputError(f"relative speeds must be {len(node)} positive numbers, not {speed.tolist()}")
        distance = self.distance_RR
        if distance is not None:
            distance = np.asarray(distance, dtype=np.float64)
            if distance.shape != (len(node),) * 2 or (distance < 0).any() or np.diag(distance).any():
                raise InputError("distances must be a non-negative (ranks, ranks) matrix with a zero diagonal")
        if self.memory is not None and self.memory.num_ranks != len(node):
            raise InputError(f"memory is stated for {self.memory.num_ranks} ranks, but there are {len(node)}")
        for name, array in (
            ("node_of_rank", node),
            ("slots_of_rank", slots),
            ("speed_of_rank", speed / speed.mean()),
            ("distance_RR", distance),
        ):
            own = None if array is None else array.copy()  # the caller's array stays writeable, and cannot change ours
            if own is not None:
                own.flags.writeable = False
            object.__setattr__(self, name, own)

    @classmethod
    def uniform(
        cls,
        num_ranks: int,
        *,
        slots_per_rank: int | Sequence[int],
        ranks_per_node: int | None = None,
        intra: Link = INTRA_NODE,
        inter: Link = INTER_NODE,
    ) -> Self:
        """Equal nodes of `ranks_per_node` ranks (all in one node by default).

        Raises:
            InputError: the ranks do not divide into nodes, or the list of slots has another length.
        """
        if num_ranks < 1:
            raise InputError(f"ranks ({num_ranks}) must be at least 1")
        per_node = num_ranks if ranks_per_node is None else ranks_per_node
        if per_node < 1 or num_ranks % per_node:
            raise InputError(
                f"ranks ({num_ranks}) must be a multiple of ranks per node ({per_node}); a cluster file "
                "can list unequal nodes (ranks_per_node = [3, 5])"
            )
        slots = np.asarray(slots_per_rank, dtype=np.int64)
        if slots.ndim and slots.shape != (num_ranks,):
            raise InputError(f"slots per rank lists {slots.size} numbers, but there are {num_ranks} ranks")
        node = np.arange(num_ranks) // per_node
        return cls(node, np.array(np.broadcast_to(slots, (num_ranks,))), np.ones(num_ranks), intra, inter)

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a cluster description.

        ```toml
        ranks_per_node = [4, 4]          # one number a node
        slots_per_rank = 9               # or one number a rank
        speed = [1.0, 1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 0.8]
        [intra]
        latency = 15e-6                  # seconds
        bandwidth = 300e9                # bytes per second and rank
        [inter]
        latency = 30e-6
        bandwidth = 40e9
        node_bandwidth = 80e9            # optional: shared by the ranks of a node
        [fast]                           # optional, with [host]: experts that do not fit
        slots = 8                        # experts per layer in fast memory; or bytes = 20e9; or one number a rank
        transit = 2                      # of these rows over all layers, for what is on its way
        [host]
        latency = 10e-6                  # seconds
        bandwidth = 25e9                 # bytes per second into fast memory
        bytes = 200e9                    # optional: room of a rank
        compute = {per_expert = 1e-3, per_token = 1e-5}  # optional: seconds of an expert on the host
        [disk]                           # optional
        latency = 1e-4
        bandwidth = 3e9
        ```

        Raises:
            InputError: the file is absent or a value breaks a rule.
            FormatError: it is not TOML or has an unknown key.
        """
        try:
            with require_file(path).open("rb") as file:
                document = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is not TOML: {error}") from error
        unknown = set(document) - {
            "ranks_per_node", "slots_per_rank", "speed", "intra", "inter", "fast", "host", "disk",
        }  # fmt: skip
        if unknown:
            raise FormatError(f"{path} has the unknown key {sorted(unknown)[0]!r}")
        try:
            per_node = np.atleast_1d(np.asarray(document["ranks_per_node"], dtype=np.int64))
            node = np.repeat(np.arange(len(per_node)), per_node)
            slots = np.array(np.broadcast_to(np.asarray(document["slots_per_rank"], dtype=np.int64), node.shape))
            speed = np.array(np.broadcast_to(np.asarray(document.get("speed", 1.0), dtype=float), node.shape))
            links = {tier: Link(**document[tier]) for tier in ("intra", "inter") if tier in document}
            memory = Memory.from_document(document, len(node))
            ends = (links.get("intra", INTRA_NODE), links.get("inter", INTER_NODE))
            return cls(node, slots, speed, *ends, memory=memory)
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except KeyError as error:
            raise FormatError(f"{path} lacks the key {error}") from error
        except (TypeError, ValueError) as error:
            raise FormatError(f"{path} is not a cluster description: {error}") from error

    @classmethod
    def from_graph(cls, graph: "nx.Graph[Any]", *, slots_per_rank: int | Sequence[int]) -> Self:
        """A cluster from a graph of GPUs, switches and links.

        A vertex with `kind="gpu"` is a rank, in the graph's order; its `node` attribute names its server (default:
        all in one), its `speed` and `slots` are optional. Every edge has a `bandwidth` in bytes per second (default 1)
        and optionally a `latency` in seconds. The route between two ranks is the one of least sum of inverse
        bandwidths; its cost per byte is that sum.

        Raises:
            InputError: there is no GPU, two are not connected, or the GPUs of a server are not consecutive.
        """
        gpus = [v for v, data in graph.nodes(data=True) if data.get("kind") == "gpu"]
        if not gpus:
            raise InputError('the topology has no vertex with kind="gpu"')
        names = [graph.nodes[v].get("node", 0) for v in gpus]
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        node = np.array([order[name] for name in names])

        def cost(_u: Any, _v: Any, data: dict[str, Any]) -> float:
            return 1.0 / float(data.get("bandwidth", 1.0))

        size = len(gpus)
        distance, latency = np.zeros((size, size)), np.zeros((size, size))
        for i, source in enumerate(gpus):
            reached = nx.single_source_dijkstra(graph, source, weight=cost)
            lengths, paths = cast(tuple[dict[Any, float], dict[Any, list[Any]]], reached)
            for j, target in enumerate(gpus):
                if target not in lengths:
                    raise InputError(f"the topology does not connect {source!r} and {target!r}")
                distance[i, j] = lengths[target]
                hops = zip(paths[target], paths[target][1:], strict=False)
                latency[i, j] = sum(graph.edges[hop].get("latency", 0.0) for hop in hops)
        default = np.broadcast_to(np.asarray(slots_per_rank), (size,))
        slots = np.array([graph.nodes[v].get("slots", default[i]) for i, v in enumerate(gpus)])
        speed = np.array([float(graph.nodes[v].get("speed", 1.0)) for v in gpus])
        same = node[:, None] == node[None, :]
        links: dict[str, Any] = {}
        for tier, mask in (("intra", same & ~np.eye(size, dtype=bool)), ("inter", ~same)):
            if mask.any():
                links[tier] = Link(latency=float(latency[mask].max()), bandwidth=float(1.0 / distance[mask].max()))
        return cls(node, slots, speed, distance_RR=distance, **links)

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank[-1]) + 1

    @property
    def num_slots(self) -> int:
        """S: slots per layer over all ranks."""
        return int(self.slots_of_rank.sum())

    @cached_property
    def ranks_per_node(self) -> np.ndarray:
        """(N,) number of ranks of each node."""
        return np.bincount(self.node_of_rank)

    @cached_property
    def rank_of_slot(self) -> np.ndarray:
        """(S,) int64: the rank that each slot is on."""
        return np.repeat(np.arange(self.num_ranks), self.slots_of_rank)

    @cached_property
    def first_slots(self) -> np.ndarray:
        """(R + 1,) int64: the first slot of each rank, then S."""
        return np.concatenate([[0], np.cumsum(self.slots_of_rank)]).astype(np.int64)

    @cached_property
    def seconds_per_byte_RR(self) -> np.ndarray:
        """(R, R) seconds that a byte from rank to rank keeps a rank's link busy; 0 on the diagonal.

        Distances of a topology hold inside each tier: the farthest pair has the bandwidth of its link.
        """
        same = self.node_of_rank[:, None] == self.node_of_rank[None, :]
        shared = self.inter.node_bandwidth / self.ranks_per_node[self.node_of_rank]
        inter = 1.0 / np.minimum(self.inter.bandwidth, shared)
        seconds = np.where(same, 1.0 / self.intra.bandwidth, inter[:, None]) * ~np.eye(self.num_ranks, dtype=bool)
        if self.distance_RR is not None:
            for tier in (same, ~same):
                farthest = float(self.distance_RR[tier].max(initial=0.0))
                if farthest > 0:
                    seconds[tier] *= self.distance_RR[tier] / farthest
        return seconds

    @cached_property
    def cost_RR(self) -> np.ndarray:
        """(R, R) cost of one byte from rank to rank, relative to the cheapest remote pair; 0 on the diagonal."""
        cost = self.seconds_per_byte_RR
        remote = cost[cost > 0]
        return cost / remote.min() if remote.size else cost

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


def even_slots(num_experts: int, num_ranks: int) -> np.ndarray:
    """(R,) slots per rank that hold `num_experts` experts once, as evenly as possible; the first take the rest."""
    return num_experts // num_ranks + (np.arange(num_ranks) < num_experts % num_ranks).astype(np.int64)
