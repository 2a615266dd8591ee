"""Families whose tokens a test has compared with the plain model's, in every mode; see docs/models.md."""

import json
from importlib.resources import files
from typing import Any


def recorded_passes() -> dict[str, Any]:
    """Family -> the modes in which it passed."""
    return json.loads((files("moeplace.runtime.models") / "recorded.json").read_text(encoding="utf-8"))["families"]


def recorded_families() -> list[str]:
    """Families that passed in some mode, by name."""
    return sorted(family for family, modes in recorded_passes().items() if modes)
