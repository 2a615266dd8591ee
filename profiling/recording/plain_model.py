"""A whole model of `transformers` with the numbers of a checkpoint, quantised or not, in plain matrices."""

import copy
from pathlib import Path
from typing import Any

import torch

from moeplace.profiling.recording.quantised.quantisation import Quantisation
from moeplace.profiling.recording.stored_tensors import StoredTensors


def plain_config(config: Any) -> Any:
    """A copy of a configuration that does not speak of quantisation."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        part.__dict__.pop("quantization_config", None)
    return config


def load_plain_model(folder: Path, config: Any, *, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """The model and what `from_pretrained` says of the loading; nothing is downloaded, and no code of the folder runs.

    Quantised matrices are unpacked here, one after the other, whatever packages `transformers` wants for them.

    Args:
        config: of the model.
        dtype: "auto" = as the configuration states.
        **options: of `from_pretrained`.

    Raises:
        NotReadableError: weights are quantised in a form that is not read.
    """
    import transformers

    quantisation = Quantisation.of(config)
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, **options}
    auto = transformers.AutoModelForCausalLM
    if not quantisation.method:
        return auto.from_pretrained(
            folder, config=copy.deepcopy(config), dtype=dtype, trust_remote_code=False, **options
        )
    config = plain_config(config)
    with torch.device("meta"):
        family = type(auto.from_config(config, trust_remote_code=False))
    stored = StoredTensors(folder, quantisation)
    stated = getattr(config, "dtype", None) or config.get_text_config(decoder=True).dtype or torch.bfloat16
    return family.from_pretrained(
        None,
        config=config,
        state_dict={name: stored.slice_of(name) for name in stored.names},
        dtype=stated if dtype == "auto" else dtype,
        **options,
    )
