"""Experts modules: where the routed experts of a `transformers` model are, found by what its modules say.

    interface   the class takes back ends for experts (`ALL_EXPERTS_FUNCTIONS`): it states whether experts are gated,
                have biases and are stored transposed, and its `forward` takes (hidden, ids, weights)
    parameters  a class of its own with `down_proj` and `gate_up_proj` or `up_proj`, one matrix per expert
    name        any module called `experts` that is no single feed-forward: found, so that nothing with experts is
                called dense; others must know how its tokens are routed
    router      a module that holds a router with `top_k` beside stacked weights (JetMoE); experts of an attention are
                part of it and are not placed

Zero-computation experts (MoE++, LongCat) are ids beyond the experts that have weights: their output is their input.

Shape letters: E experts with weights.
"""

import re
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"\.(\d+)\.")
_GATED, _PLAIN, _DOWN = "gate_up_proj", "up_proj", "down_proj"


@dataclass(frozen=True, eq=False)
class ExpertsModule:
    """The routed experts of one layer.

    Attributes:
        name: path of the module in its model.
        layer_id: decoder-layer index, the first number of the path.
        module: the module itself.
        parent: the module that it is part of: the MoE layer, or the decoder layer.
        num_experts: E.
        num_null: zero-computation experts, whose ids follow the others'.
        takes_ids: whether `forward` is called with (hidden, ids, weights).
    """

    name: str
    layer_id: int
    module: Any
    parent: Any
    num_experts: int
    num_null: int
    takes_ids: bool

    @property
    def is_interface(self) -> bool:
        """Whether the class takes back ends."""
        return hasattr(self.module, "_apply_gate") and hasattr(self.module, "is_transposed")

    def parameters(self) -> dict[str, Any]:
        """Its own parameters by name."""
        return dict(self.module.named_parameters(recurse=False))

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, in the number type that the module has now."""
        held = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return held // max(self.num_experts, 1)


def find_experts(model: Any) -> list[ExpertsModule]:
    """The experts modules of a model, in the order of its modules."""
    modules = dict(model.named_modules())
    found: list[ExpertsModule] = []
    for name, module in modules.items():
        layer = _LAYER.search(f"{name}.")
        if layer is None or any(name.startswith(f"{other.name}.") for other in found):
            continue
        parent = modules[name.rpartition(".")[0]]
        experts = _read(name, int(layer.group(1)), module, parent)
        if experts is not None:
            found.append(experts)
    told = {id(experts.parent) for experts in found if experts.takes_ids}
    return [e for e in found if e.takes_ids or id(e.parent) not in told]  # beside routed experts, untold: shared ones


def _read(name: str, layer: int, module: Any, parent: Any) -> ExpertsModule | None:
    own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    up = _GATED if _GATED in own else _PLAIN
    if up in own and _DOWN in own and len(own[up]) == len(own[_DOWN]) == 3:
        total, experts = max(own[up][0], own[_DOWN][0]), min(own[up][0], own[_DOWN][0])
        null = int(getattr(module, "zero_expert_num", 0) or 0) or total - experts
        return ExpertsModule(name, layer, module, parent, experts, null, _takes_ids(module))
    if "attention" in name.rpartition(".")[0].rpartition(".")[2]:
        return None
    is_called_so = name.rpartition(".")[2] == "experts" and not hasattr(module, _DOWN)
    if is_called_so or _holds_router(module):
        return ExpertsModule(name, layer, module, parent, _stated_experts(module, parent), 0, _takes_ids(module))
    return None


def _holds_router(module: Any) -> bool:
    """Whether a module routes by itself into stacked weights that it holds."""
    children = dict(module.named_children())
    router = children.get("router", children.get("gate"))
    plain = [child for child in children.values() if not hasattr(child, _DOWN)]
    stacked = [child for child in plain if any(p.ndim == 3 for p in child.parameters(recurse=False))]
    return hasattr(router, "top_k") and len(stacked) > 1


def _takes_ids(module: Any) -> bool:
    import inspect

    return len(inspect.signature(type(module).forward).parameters) >= 4  # self, hidden, ids, weights


def _stated_experts(module: Any, parent: Any) -> int:
    """E as an attribute of the module or of its router says, else the rows of the router's weight."""
    routers = [getattr(holder, name, None) for holder in (module, parent) for name in ("router", "gate")]
    for holder in (module, *routers):
        for key in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"):
            if isinstance(getattr(holder, key, None), int):
                return int(getattr(holder, key))
    weights = [getattr(router, "weight", None) for router in routers]
    return next((len(weight) for weight in weights if weight is not None), len(list(module.children())))
