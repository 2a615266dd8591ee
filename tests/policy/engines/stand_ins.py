"""Stand-ins for what an engine imports and a machine without a card lacks; and where the engine's own files are.

The engines' wheels are unpacked, not installed: their own modules are the real ones, and every third package of
`ABSENT` that is not installed is replaced by a module whose attributes are empty classes. Only what a test calls must
be real, and that is the engine's own code, torch and pydantic.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "MOEPLACE_ENGINES"
"""Environment variable: the folder that `.ci/engines.py` unpacked the engines' wheels into."""
ABSENT = frozenset(
    [
        "PIL",
        "cachetools",
        "cbor2",
        "cloudpickle",
        "cpuinfo",
        "fastapi",
        "llguidance",
        "msgspec",
        "openai_harmony",
        "partial_json_parser",
        "psutil",
        "pybase64",
        "uvloop",
        "xgrammar",
        "zmq",
    ]
)
COMPILED = ("vllm._C", "vllm._moe_C")
"""Modules of the engines themselves that are compiled for a card."""


def folder_of(engine: str) -> Path | None:
    """The folder with an engine's package; None where it cannot be had."""
    folder = Path(os.environ.get(VARIABLE) or ".engines").absolute()
    return folder if (folder / engine / "__init__.py").is_file() else None


def admit(folder: Path) -> None:
    """Let the engines of a folder be imported in this process."""
    sys.path.insert(0, str(folder))
    sys.meta_path.append(_Finder())


class _Anything(type):
    """A class that has every attribute, stands in type expressions and can be called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return StandIn

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class StandIn(metaclass=_Anything):
    """An object of an absent package: it takes everything, decorates without change and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __init_subclass__(cls, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return StandIn

    def __call__(self, *args: Any, **kwargs: object) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else StandIn()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  # every module may have sub-modules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return StandIn


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last of all finders: what comes here is not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name.split(".")[0] in ABSENT or name.startswith(COMPILED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]
