"""ExpertForecast: which experts a prompt will probably ask for, before it has run and without its experts.

The end of the prompt goes through everything of the model but the routed experts: attention, dense layers, shared
experts, and each layer's router, which is what tells. In the first MoE layer that is what will be chosen; in later ones
what the routed experts would have added is missing, which changes many choices of single tokens and few of the
likeness between requests (docs/memory-tiers.md has both measured). It loads no expert, works for every model that is
cut at its MoE layers, and needs no recording.

Rank 0 works it out and tells the others: arithmetic of different processors need not agree to the last bit.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, G prompts, X = L x E.
"""

from collections.abc import Sequence

import numpy as np
import torch

from moeplace.placement.tiers.likeness import unit_profile
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.views import PromptView
from moeplace.runtime.models.decoder import Decoder

MOST_TOKENS = 64
"""Tokens of a prompt's end that are looked at: what a forecast may cost, and for how long it holds up a step."""
_UNIT = 1 << 10
"""Profiles are whole multiples of 1 / this."""


class ExpertForecast:
    """See the module.

    Args:
        decoder: the model without routed experts.
        num_experts: E, of the layer that has most.
    """

    def __init__(self, decoder: Decoder, num_experts: int) -> None:
        self._decoder, self._num_experts = decoder, num_experts
        self._cache: KvCache | None = None

    def share(self, group: RankGroup, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """(G, X) int32 profiles of prompts, on every rank those of rank 0: a collective outside the layers.

        Raises:
            PeerLostError: a rank is gone.
        """
        profile_GX = np.zeros((len(prompts), len(self._decoder.blocks) * self._num_experts), np.int32)
        if group.rank == 0:
            for profile_X, token_ids in zip(profile_GX, prompts, strict=True):
                profile_X[:] = np.rint(_UNIT * unit_profile(self.count(token_ids)))
        if group.size > 1:
            group.broadcast(torch.from_numpy(profile_GX), root=0, kind="forecasts")
        return profile_GX

    def count(self, token_ids: Sequence[int]) -> np.ndarray:
        """(L, E) how often each expert will probably be chosen by the end of a prompt."""
        count_LE = np.zeros((len(self._decoder.blocks), self._num_experts), np.int64)
        for counts_E, chosen_TK in zip(count_LE, self._route(token_ids[-MOST_TOKENS:]), strict=True):
            np.add.at(counts_E, chosen_TK[chosen_TK >= 0], 1)
        return count_LE

    @torch.inference_mode()
    def _route(self, token_ids: Sequence[int]) -> list[np.ndarray]:
        """Per MoE layer (T, K) what its router chooses."""
        decoder, length = self._decoder, len(token_ids)
        if self._cache is None:
            self._cache = KvCache(decoder, rows=1, positions=min(MOST_TOKENS, decoder.max_positions))
        self._cache.claim(0, length)
        view = PromptView(decoder, self._cache, rows=[0], starts=[0], lengths=[length], known=length)
        token_T = torch.arange(length, device=decoder.device)
        x = decoder.embed(torch.tensor(token_ids, dtype=torch.int64, device=decoder.device))
        chosen: list[np.ndarray] = []
        for layer in range(decoder.num_layers):
            x = decoder.attend(layer, x, view)
            moe_layer = decoder.moe_index.get(layer)
            if moe_layer is None:
                x = decoder.feed_forward(layer, x)
                continue
            block = decoder.blocks[moe_layer]
            hidden = block.normalise(x)
            chosen.append(block.route(hidden, token_T)[0].cpu().numpy())
            shared = block.shared(hidden)
            x = x if shared is None else x + shared
        return chosen
