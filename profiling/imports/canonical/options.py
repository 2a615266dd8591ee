"""What the user knows and a source may not say."""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import MOST_EXPERTS

MOST_LAYERS = 4096
_LEAST = {"top_k": 1, "null_experts": 0, "expert_bytes": 0, "hidden_size": 0, "kv_dim": 0, "shared_experts": 0}


@dataclass(frozen=True)
class ImportOptions:
    """What the user knows and a source may not say; zeros, blanks and None mean unknown.

    Attributes:
        top_k: keep the first `top_k` experts of every token.
        num_experts: experts per layer, one number or one a layer; by default the greatest id + 1.
        null_experts: ids `num_experts` .. `num_experts + null_experts - 1` are null experts.
        layer_ids: decoder-layer index of each MoE layer.
        num_hidden_layers: decoder layers in all.
        model: name of the model.
        expert_bytes: bytes of one expert's weights.
        hidden_size: hidden size of the model.
        kv_dim: K/V elements per token and layer.
        shared_experts: shared experts of a layer.
        workload_names: names of the workload tags.
        fill_value: an id that stands for no expert.
        drop_padding: leave out what looks like padded tokens.
        strict: refuse data that looks wrong instead of mending it.
        progress: show a progress bar on standard error.
    """

    top_k: int | None = None
    num_experts: int | tuple[int, ...] | None = None
    null_experts: int = 0
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int = 0
    model: str = ""
    expert_bytes: int | None = None
    hidden_size: int = 0
    kv_dim: int = 0
    shared_experts: int = 0
    workload_names: tuple[str, ...] = ()
    fill_value: int | None = None
    drop_padding: bool = False
    strict: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} ({value}) must be at least {least}")
        for experts in self._experts():
            if not 1 <= experts <= MOST_EXPERTS:
                bound = f"at most {MOST_EXPERTS}" if experts > 1 else "at least 1"
                raise InputError(f"num-experts ({experts}) must be {bound}")

    def _experts(self) -> tuple[int, ...]:
        given = self.num_experts
        return () if given is None else given if isinstance(given, tuple) else (given,)

    def experts_of_layers(self, layers: int, kept: np.ndarray) -> np.ndarray | None:
        """(len(kept),) experts that the user says for the rows `kept` of a source of `layers` rows, or None.

        Raises:
            InputError: a list of another length than all rows or the kept ones.
        """
        given = self._experts()
        if not given:
            return None
        if len(given) == 1:
            return np.full(len(kept), given[0])
        if len(given) not in (layers, len(kept)):
            counts = f"{len(kept)} MoE layers" + (f" in {layers} rows" if layers > len(kept) else "")
            raise InputError(f"num-experts names {len(given)} layers, the source has {counts}")
        return np.array(given)[kept] if len(given) == layers else np.array(given)

    def layer_ids_of(self, own: np.ndarray | None, layers: int, kept: np.ndarray) -> np.ndarray | None:
        """(len(kept),) decoder layers of the rows `kept`: as the user says, else `own` (layers,), else None.

        Raises:
            InputError: the user names another number of layers than all rows or the kept ones.
        """
        if self.layer_ids is None:
            return None if own is None else own[kept]
        if len(self.layer_ids) not in (layers, len(kept)):
            raise InputError(f"layer-ids name {len(self.layer_ids)} layers, the source has {len(kept)} MoE layers")
        return np.array(self.layer_ids)[kept] if len(self.layer_ids) == layers else np.array(self.layer_ids)
