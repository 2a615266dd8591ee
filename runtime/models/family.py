"""Family: the model class that `transformers` has for a checkpoint, and what its experts modules say of the experts.

The model is built on the meta device, where parameters have shapes and no memory. Everything that cannot be served is
refused here, before a tensor is read.

Shape letters: E experts per layer, K top-k, D hidden size, H expert hidden size.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moeplace.profiling.errors import InputError
from moeplace.profiling.recording.experts_modules import ExpertsModule, find_experts
from moeplace.profiling.recording.model_config import foreign_config, no_experts, read_model_config
from moeplace.profiling.recording.quantised.quantisation import NotReadableError, Quantisation, not_readable
from moeplace.runtime.experts.weights import Activation, Part
from moeplace.runtime.models.adapters import adapter_of

_PARTS: dict[str, Part] = {
    "gate_up_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}


@dataclass(frozen=True, eq=False)
class ExpertsForm:
    """The experts of one MoE layer as the runtime holds them.

    Attributes:
        experts: the module of the model.
        transposed: whether matrices are stored (in, out).
        activation: from the first product to the input of the second, the family's own function.
    """

    experts: ExpertsModule
    transposed: bool
    activation: Activation

    @property
    def parts(self) -> dict[str, Part]:
        """Parameter name -> part."""
        return {name: _PARTS[name] for name in self.experts.parameters()}

    @cached_property
    def shapes(self) -> dict[Part, tuple[int, ...]]:
        """Shape of each part of one expert; `gate_up` is (H, D) where experts are not gated."""
        shapes = {self.parts[name]: tuple(p.shape[1:]) for name, p in self.experts.parameters().items()}
        if not self.transposed:
            return shapes
        return {part: shape[::-1] for part, shape in shapes.items()}

    def to_runtime(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """One expert's slice of a parameter in the runtime's layout: matrices are (out, in)."""
        return value.t() if self.transposed and value.ndim == 2 else value


class Family:
    """See the module.

    Attributes:
        name: its `model_type`.
        config: the configuration object.
        model: the model on the meta device.
        quantisation: how weights are stored.
        forms: of each MoE layer, in model order.

    Raises:
        FormatError: config.json does not describe a causal language model that `transformers` knows.
        InputError: the model is dense, or of a family that is not supported.
    """

    def __init__(self, folder: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.config: Any = read_model_config(folder)
        self.name = str(self.config.model_type)
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = transformers.AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        except Exception as error:  # a foreign configuration can fail anywhere in transformers
            raise foreign_config(folder, error) from error
        self.model: Any = model.eval().requires_grad_(False)
        try:
            self.quantisation = Quantisation.of(self.config)
        except NotReadableError as error:
            raise self.refusal(not_readable(error)) from error
        found = find_experts(self.model)
        if not found:
            raise no_experts(str(folder), self.model)
        self.forms = [self._form_of(experts) for experts in found]
        if any(form.shapes != self.forms[0].shapes for form in self.forms):
            raise self.refusal("its MoE layers have experts of different shapes")

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.model.config.get_text_config(decoder=True)

    def refusal(self, reason: str) -> InputError:
        """What is raised where the family cannot be served."""
        return refuse(self.name, reason)

    def _form_of(self, experts: ExpertsModule) -> ExpertsForm:
        module, own = experts.module, experts.parameters()
        if not experts.takes_ids and adapter_of(experts) is None:
            raise self.refusal(f"{experts.name} ({type(module).__name__}) is not told which experts serve which token")
        unknown = sorted({name for name, _ in module.named_parameters()} - set(_PARTS))
        if unknown or "down_proj" not in own:
            what = unknown[0] if unknown else "no down_proj"
            raise self.refusal(
                f"its experts ({type(module).__name__}) have parameters that the engine does not know: {what}"
            )
        transposed = module.is_transposed if experts.is_interface else _looks_transposed(own)
        return ExpertsForm(experts, bool(transposed), _activation(experts))


def import_code(folder: str | Path) -> None:
    """Import what `transformers` has for the family of a checkpoint, so that opening it later need not.

    Raises:
        InputError, FormatError: as `Family`, where the configuration alone says so.
    """
    import transformers

    config = read_model_config(Path(folder))
    transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)


def refuse(family: str, reason: str) -> InputError:
    """The sentence of a family that cannot be served."""
    from moeplace.runtime.models.recorded import recorded_families

    return InputError(
        f"family {family} is not supported (because {reason}); supported: {', '.join(recorded_families())}"
    )


def _looks_transposed(own: dict[str, Any]) -> bool:
    """Whether matrices are (in, out), by the shapes of the first and the second product."""
    first = own["gate_up_proj"] if "gate_up_proj" in own else own["up_proj"]
    factor = 2 if "gate_up_proj" in own else 1
    out_in = first.shape[1] == factor * own["down_proj"].shape[2] and first.shape[2] == own["down_proj"].shape[1]
    return not out_in


def _activation(experts: ExpertsModule) -> Activation:
    module = experts.module
    if experts.is_interface:
        return module._apply_gate if module.has_gate else module.act_fn
    return _ModuleActivation(module.act_fn, gated="gate_up_proj" in experts.parameters())


class _ModuleActivation:
    """act(gate) * up, or act(x), with the function that an experts module holds."""

    def __init__(self, function: Any, *, gated: bool) -> None:
        self._function, self._gated = function, gated

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        if not self._gated:
            return self._function(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._function(gate) * up
