"""The names that `transformers` gives to the K/V cache, before and after it renamed them.

Until 5.23 a model, a decoder layer and an attention module take the cache as `past_key_values` (models with a recurrent
state as `cache_params`) and a model returns it by that name; from 5.24 on the name is `cache`, and the old ones are
announced to go in 5.40. What is asked here is the module itself, not the version: a model's own code may lag behind.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Newest first."""


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments, or the results, of a pass; None if it has none."""
    held = (given.get(name) for name in CACHE_NAMES if name in given)
    return next((cache for cache in held if cache is not None), None)


def cache_keyword(forward: Callable[..., Any]) -> str:
    """The name by which a module's `forward` takes the cache; the old one where it only says `**kwargs`."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")
