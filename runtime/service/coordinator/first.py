"""What a service begins with: the placement and the options of its members."""

from dataclasses import replace
from typing import Any

import numpy as np

from moeplace.placement.cluster import even_slots
from moeplace.placement.cost.evaluation import require_same_model
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.modes import RecordedRouting, choose_mode_rule
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.coordinator.membership import require_ranks
from moeplace.runtime.service.options import ServiceOptions


def first_placement(checkpoint: Checkpoint, placement: Placement | None, ranks: int) -> Placement:
    """The placement of the start, with the layers of the checkpoint.

    Raises:
        InputError: it is for another model or number of ranks, or a rank would be without an expert.
    """
    if ranks < 1:
        raise InputError(f"ranks ({ranks}) must be at least 1")
    fields: dict[str, Any] = {
        "layer_ids": checkpoint.layer_ids,
        "num_hidden_layers": checkpoint.num_hidden_layers,
    }
    experts = int(checkpoint.experts_per_layer.max())
    if placement is None:
        if ranks > experts:
            raise InputError(f"ranks ({ranks}) must be at most {experts}, so that each holds an expert of some layer")
        nodes = np.zeros(ranks, np.int64)
        return index_order(checkpoint.experts_per_layer, even_slots(experts, ranks), nodes, **fields)
    if placement.num_ranks != ranks:
        raise InputError(f"the placement is for {placement.num_ranks} ranks, but {ranks} are to be started")
    require_ranks(ranks, placement)
    checkpoint.check_placement(placement)
    return placement.replace(**fields)


def check_recorded(options: ServiceOptions, placement: Placement) -> None:
    """Before members start: whether they can read what `auto` is to predict from.

    Raises:
        MoeplaceError: a file is missing or is none.
        InputError: the routing is of another model.
    """
    if options.trace is not None:
        require_same_model(RecordedRouting.load(options.trace, options.calibration).trace, placement)


def member_options(options: ServiceOptions, placement: Placement, ranks: int) -> ServiceOptions:
    """Options whose K/V memory per rank does not depend on how many ranks there are."""
    limits, is_predicted = options.limits, options.mode == "auto" and options.trace is not None
    may_be_coherent = is_predicted or choose_mode_rule(options.mode, placement).may_be_coherent
    if may_be_coherent or limits.rank_sequences is not None:
        return options
    return replace(options, limits=replace(limits, rank_sequences=-(-limits.max_sequences // ranks)))
