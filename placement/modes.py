"""The execution modes by name. Nothing is imported here, so that the command line can list them at once."""

from typing import Literal, get_args

Mode = Literal["dispatch-combine", "coherent", "allgather"]
MODES: tuple[Mode, ...] = get_args(Mode)
