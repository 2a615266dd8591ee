"""The configuration of a checkpoint as `transformers` reads it, aliases of architectures included.

Kimi-K2 calls itself `kimi_k2` and brings code of its own, but states the architecture `DeepseekV3ForCausalLM`, which
`transformers` has: what a configuration states counts where its model type is not known, and no code of it runs.
"""

from pathlib import Path
from typing import Any

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import read_json

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def read_model_config(folder: Path) -> Any:
    """The configuration object.

    Raises:
        FormatError: it does not describe a causal language model that `transformers` has.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # a foreign configuration can fail anywhere in transformers
        stated = _stated_class(folder)
        if stated is None:
            raise foreign_config(folder, error) from error
        config = stated.config_class.from_pretrained(folder, local_files_only=True)
        config.model_type = stated.config_class.model_type  # the tables of `transformers` go by it
        return config


def foreign_config(folder: Path, error: Exception) -> FormatError:
    """What is raised where a configuration is not understood."""
    reason = " ".join(str(error).split())[:200]
    return FormatError(f"{folder / 'config.json'} does not describe a causal language model: {reason}")


def no_experts(name: str, model: Any) -> InputError:
    """What is raised where no experts are found: only a model whose configuration states none is called dense."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    stated = next((key for key in _EXPERT_COUNTS if _count(getattr(text, key, 0)) > 1), None)
    if stated is None or not getattr(text, "is_moe", True):
        return InputError(f"{name} is a dense model ({type(model).__name__}): it has no experts")
    count = _count(getattr(text, stated))
    return InputError(
        f"family {text.model_type} is not supported (because it has {count} experts a layer, but in no module of "
        f"{type(model).__name__} of a known kind)"
    )


def _count(value: Any) -> int:
    return max(map(_count, value), default=0) if isinstance(value, list | tuple) else int(value or 0)


def _stated_class(folder: Path) -> Any:
    """The class of `transformers` that config.json names as its architecture, unless its model type is known."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(folder / "config.json")
    names = config.get("architectures") or []
    if config.get("model_type") in CONFIG_MAPPING_NAMES or len(names) != 1 or not isinstance(names[0], str):
        return None
    found = getattr(transformers, names[0], None) if names[0].endswith("ForCausalLM") else None
    return found if hasattr(found, "config_class") else None
