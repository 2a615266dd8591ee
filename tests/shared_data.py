"""Data beside the repository that tests use where it is present."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder(variable: str, name: str) -> Path:
    """Folder named by the environment variable, or `../shared/<name>` beside the repository."""
    return Path(os.environ.get(variable) or ROOT.parent / "shared" / name)


def deepseek_trace_path() -> Path:
    """`routing.npz` of DeepSeek-V2-Lite; skips the test where it is absent."""
    return _or_skip(shared_folder("MOEPLACE_TRACES", "traces") / "deepseek-v2-lite" / "routing.npz")


def tiny_moe_top2_path() -> Path:
    """Checkpoint folder of the trained top-2 model; skips the test where it is absent."""
    return _or_skip(shared_folder("MOEPLACE_TINY_MOE", "tiny-moe") / "top2")


def tiny_moe_path() -> Path:
    """Checkpoint folder of the trained top-1 model that ships with the package."""
    return ROOT / "launch" / "data" / "tiny-moe"


def text_paths() -> list[Path]:
    """The texts that ship with the package."""
    return sorted((ROOT / "launch" / "data" / "text").glob("*.txt"))


def _or_skip(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not present")
    return path
