"""Which dispatcher carries a mode out."""

from moeplace.placement.modes import Mode
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.allgather import AllGatherDispatcher
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatch_combine import DispatchCombineDispatcher
from moeplace.runtime.exchange.dispatcher import MoeRuntime
from moeplace.runtime.exchange.local import LocalDispatcher

Dispatcher = LocalDispatcher | CoherentDispatcher | AllGatherDispatcher | DispatchCombineDispatcher


def make_dispatcher(mode: Mode, runtime: MoeRuntime, group: RankGroup, *, node_aware: bool) -> Dispatcher:
    """The dispatcher of a mode for this rank; every rank of the group must make the same.

    Args:
        node_aware: dispatch-combine sends one copy per node.
    """
    if group.size == 1:
        return LocalDispatcher(runtime)
    if mode == "coherent":
        return CoherentDispatcher(runtime, group)
    if mode == "allgather":
        return AllGatherDispatcher(runtime, group)
    return DispatchCombineDispatcher(runtime, group, node_aware=node_aware)
