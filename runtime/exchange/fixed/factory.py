"""Which dispatchers carry a mode out in fixed shapes."""

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatch_combine import DispatchCombineDispatcher
from moeplace.runtime.exchange.dispatcher import MoeRuntime
from moeplace.runtime.exchange.factory import Dispatcher
from moeplace.runtime.exchange.fixed.coherent import FixedCoherent
from moeplace.runtime.exchange.fixed.dispatch_combine import FixedDispatchCombine
from moeplace.runtime.exchange.fixed.local import FixedLocal
from moeplace.runtime.exchange.fixed.step import FixedShapes
from moeplace.runtime.exchange.local import LocalDispatcher


def make_fixed_shapes(exact: Dispatcher, runtime: MoeRuntime, group: RankGroup) -> FixedShapes | None:
    """The mode of an exact dispatcher in fixed shapes, None = it has none (allgather)."""
    if isinstance(exact, LocalDispatcher):
        return FixedShapes(FixedLocal(runtime, group), exact)
    if isinstance(exact, CoherentDispatcher):
        return FixedShapes(FixedCoherent(exact), exact)
    if isinstance(exact, DispatchCombineDispatcher):
        return FixedShapes(FixedDispatchCombine(exact), exact)
    return None
