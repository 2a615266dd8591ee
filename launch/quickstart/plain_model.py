"""The plain one-process Hugging Face model: records its routing while it generates, and answers as the oracle.

Shape letters: B prompts, P prompt tokens, G new tokens, N checked prompts, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.cache_names import cache_keyword
from moeplace.profiling.recording.checkpoint_profile import load_model
from moeplace.profiling.recording.corpus import token_sequences
from moeplace.profiling.recording.recorder import Recorder

_BATCH = 128


class Answers(NamedTuple):
    """Greedy completions and logits, computed in float64."""

    completions: list[list[int]]  # (B, G)
    logits: np.ndarray  # (N, P + G - 1, V) float64 of the first N prompts, each fed with its completion


class PlainModel:
    """A checkpoint with the prompts that some texts give: the first P tokens of consecutive sequences.

    Attributes:
        prompts: per text, (B, P) token ids.
    """

    def __init__(
        self,
        folder: Path,
        texts: Sequence[Path],
        *,
        sequence_length: int,
        prompt_tokens: int,
        new_tokens: int,
        sequences_per_text: int | None,
    ) -> None:
        """Load the model and cut the texts.

        Raises:
            InputError: the model is dense, the context too short, or a text has no sequence long enough.
            FormatError: the checkpoint is damaged or foreign.
        """
        loaded, tokenize = load_model(folder)
        self._model: Any = loaded
        self._folder, self._texts, self._new_tokens = folder, texts, new_tokens
        limit = int(self._model.config.max_position_embeddings)
        if prompt_tokens + new_tokens > limit:
            raise InputError(
                f"{prompt_tokens} prompt and {new_tokens} new tokens exceed the {limit} positions of {folder}"
            )
        self.prompts: list[torch.Tensor] = []
        for text in texts:
            limit_tokens = None if sequences_per_text is None else sequences_per_text * sequence_length
            sequences = token_sequences(text, tokenize, length=sequence_length, max_tokens=limit_tokens)
            heads = [sequence[:prompt_tokens] for sequence in sequences if len(sequence) >= prompt_tokens]
            if not heads:
                raise InputError(f"text file {text} has no sequence of {prompt_tokens} tokens")
            self.prompts.append(torch.tensor(np.stack(heads)))

    @property
    def num_prompts(self) -> int:
        """B over all texts; prompt b is sequence b of the recorded trace."""
        return sum(map(len, self.prompts))

    def record(self, out: Path, report: Callable[[float], None]) -> None:
        """Complete every prompt greedily in float32 and record prefill and decoding; every text is a workload tag."""
        self._model.to(torch.float32)
        done, names = 0, [text.stem for text in self._texts]
        with torch.inference_mode(), Recorder(
            self._model, out, workload_names=names, name=self._folder.resolve().name
        ) as recorder:  # fmt: skip
            for recorder.workload, prompts in enumerate(self.prompts):
                for batch in prompts.split(_BATCH):
                    self._complete(batch)
                    done += len(batch)
                    report(done / self.num_prompts)

    def held_out_prompts(self, count: int) -> torch.Tensor:
        """(count, P) prompts of odd sequences, spread evenly over the texts.

        Raises:
            InputError: there are not so many.
        """
        odd = torch.cat(self.prompts)[1::2]
        if len(odd) < count:
            raise InputError(f"the texts have {len(odd)} held-out sequences, {count} requests need as many")
        return odd[torch.linspace(0, len(odd) - 1, count).long()]

    def fitted_prompts(self, count: int) -> torch.Tensor:
        """(count, P) prompts of even sequences, spread evenly over the texts; some twice where there are too few."""
        even = torch.cat(self.prompts)[::2]
        return even[torch.linspace(0, len(even) - 1, count).long()]

    def answer(self, prompts: torch.Tensor, *, checked: int) -> Answers:
        """Complete prompts greedily; logits of the first `checked`."""
        self._model.to(torch.float64)
        self._model.set_experts_implementation("eager")  # the other implementations do not know float64
        with torch.inference_mode():
            added = self._complete(prompts)
            logits = self._model(torch.cat([prompts, added[:, :-1]], dim=1)[:checked]).logits
        return Answers(added.tolist(), logits.numpy())

    def _complete(self, prompts: torch.Tensor) -> torch.Tensor:
        """(B, G) tokens of greatest logit, one after another with a K/V cache."""
        name = cache_keyword(self._model.forward)
        output = self._model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        added = [output.logits[:, -1].argmax(1)]
        while len(added) < self._new_tokens:
            output = self._model(input_ids=added[-1][:, None], **{name: output[name]}, use_cache=True)
            added.append(output.logits[:, -1].argmax(1))
        return torch.stack(added, dim=1)
