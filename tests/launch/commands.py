"""Commands as functions of their arguments."""

import argparse
from pathlib import Path
from types import ModuleType


def run(command: ModuleType, *arguments: str | Path) -> int:
    """Parse and run one command module."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return int(command.run(parser.parse_args([str(argument) for argument in arguments])))
