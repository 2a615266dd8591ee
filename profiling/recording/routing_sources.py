"""RoutingSource: where the routing of one MoE layer shows in a forward pass, found by what modules take and return.

    experts   most experts modules are called with (hidden, ids, weights): what they receive is what happens
    router    where experts are not told, the router beside or inside them is asked: by the whole numbers it returns,
              else by the greatest `top_k` of the logits (T, E) that it returns

Shape letters: T tokens of a pass, E experts per layer, K top-k, D width of what experts take.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.experts_modules import ExpertsModule, find_experts


class Routing(NamedTuple):
    """The routing of one layer in one pass, where the model is."""

    ids: Any  # (T, K) whole numbers; beyond the experts with weights = zero-computation ones, or none
    weights: Any  # (T, K)
    width: int  # D


@dataclass(frozen=True, eq=False)
class RoutingSource:
    """One MoE layer and the module that shows its routing.

    Attributes:
        experts: the experts module.
        watched: the module to look at: the experts module, or its router.
    """

    experts: ExpertsModule
    watched: Any

    def attach(self, note: Callable[[Routing], None]) -> Any:
        """Call `note` whenever the layer runs; returns a handle whose `remove` ends it.

        Raises:
            InputError: in a pass, where the module does not show its routing after all.
        """
        if self.experts.takes_ids:
            return self.watched.register_forward_pre_hook(
                lambda module, args, kwargs: note(self._read([*args, *kwargs.values()])), with_kwargs=True
            )
        return self.watched.register_forward_hook(
            lambda module, args, output: note(self._read_router(args[0].shape[-1], output))
        )

    def _read(self, values: list[Any]) -> Routing:
        tensors = [value.detach() for value in values if hasattr(value, "is_floating_point")]
        hidden, routing = tensors[0], _chosen(tensors[1:])
        if routing is None:
            raise self._refusal("does not receive expert ids and weights")
        ids, weights = routing
        return Routing(ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, ids.shape[-1]), hidden.shape[-1])

    def _read_router(self, width: int, output: Any) -> Routing:
        values = output if isinstance(output, tuple) else (output,)
        tensors = [value.detach() for value in values if hasattr(value, "is_floating_point")]
        routing = _chosen(tensors)
        if routing is not None:
            return Routing(*routing, width)
        scores = [
            t for t in tensors if t.is_floating_point() and t.ndim == 2 and t.shape[1] == self.experts.num_experts
        ]
        top_k = getattr(self.watched, "top_k", None)
        if not scores or not top_k:
            raise self._refusal("returns neither expert ids nor scores of all experts")
        weights, ids = scores[-1].topk(int(top_k), dim=1)  # logits are returned last
        return Routing(ids, weights.softmax(1) if len(scores) == 1 else scores[0].gather(1, ids), width)

    def _refusal(self, what: str) -> InputError:
        return InputError(
            f"the routing of decoder layer {self.experts.layer_id} cannot be recorded: its "
            f"{type(self.watched).__name__} {what}"
        )


def find_sources(model: Any) -> list[RoutingSource]:
    """The MoE layers of a model, in model order; empty for a dense one.

    Raises:
        InputError: there are experts, but nothing shows how tokens are routed to them.
    """
    return [_source(experts) for experts in find_experts(model)]


def _source(experts: ExpertsModule) -> RoutingSource:
    if experts.takes_ids:
        return RoutingSource(experts, experts.module)
    for holder in (experts.module, experts.parent):
        children = dict(holder.named_children())
        router = children.get("router", children.get("gate"))
        if router is not None:
            return RoutingSource(experts, router)
    raise InputError(
        f"the routing of {experts.name} ({type(experts.module).__name__}) cannot be recorded: it is not told which "
        "experts serve which token, and there is no router beside it"
    )


def _chosen(tensors: list[Any]) -> tuple[Any, Any] | None:
    """Ids and weights of one shape among tensors, None = there are none."""
    ids = next((t for t in tensors if not t.is_floating_point() and t.ndim >= 2), None)
    if ids is None:
        return None
    weights = [t for t in tensors if t.is_floating_point() and t.shape == ids.shape]
    return (ids, weights[-1]) if weights else None
