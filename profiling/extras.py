"""What is installed only on request: which extra of moeplace brings a package, and the sentence when it is missing.

`pip install moeplace` brings the planner: traces, scores, placements, bounds, plans, engine files. The packages below
are imported where they are needed and nowhere else, so that the planner works without them.
"""

from moeplace.profiling.errors import InputError

EXTRA_OF = {  # package -> extra that brings it
    "torch": "runtime",
    "transformers": "runtime",
    "safetensors": "runtime",
    "ortools": "exact",
    "pulp": "exact",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "ray": "ray",
}


class MissingPackageError(InputError):
    """Something needs a package that is not installed; the message says what to install."""


def missing_package(what: str, error: ModuleNotFoundError) -> MissingPackageError | None:
    """The error to show for an import that failed; None if no extra would bring the package.

    Args:
        what: a command, a solver or an option, as the user wrote it.
        error: of the import.
    """
    package = (error.name or "").split(".")[0]
    if package not in EXTRA_OF:
        return None
    extra = EXTRA_OF[package]
    return MissingPackageError(f"{what} needs {package}, which is not installed: pip install 'moeplace[{extra}]'")
