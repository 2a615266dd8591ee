"""What can go wrong between ranks (the tree's trunk is in `moeplace.profiling.errors`):

MoeplaceError
├── DisagreementError   ranks would run with different placements, checkpoints or modes
├── MigrationError      a re-placement failed its check; the placement before it serves on
└── PeerLostError       a rank died, hung or lost its connection
"""

from moeplace.profiling.errors import MoeplaceError


class DisagreementError(MoeplaceError):
    """Ranks hold different inputs; every rank raises it, before the first collective."""


class MigrationError(MoeplaceError):
    """A re-placement failed its check and was taken back; every rank raises it."""


class PeerLostError(MoeplaceError):
    """A collective failed or timed out: another rank is gone. The process group cannot be used any more."""
