"""Exceptions and warnings of moeplace, as a tree:

    MoeplaceError
    ├── InputError          an argument, a value in a file or a combination of them breaks a rule
    │   └── FormatError     a file is not what it was said to be (missing part, truncated, foreign)
    ├── InfeasibleError     the constraints of a problem cannot hold together
    └── (moeplace.runtime.errors adds what can go wrong between ranks)

    MoeplaceWarning         the user's configuration was ignored or degraded; the result is still valid

Every message is one sentence that names the thing, its value and the rule. The command line prints it and exits 1.
"""


class MoeplaceError(Exception):
    """Base of every error that a user can cause."""


class InputError(MoeplaceError, ValueError):
    """A value breaks a rule; the message names both."""


class FormatError(InputError):
    """A file is not in the format it was said to be in."""


class InfeasibleError(MoeplaceError):
    """No placement satisfies all constraints; the message says which constraint fails and by how much."""


class MoeplaceWarning(UserWarning):
    """Configuration was ignored or degraded."""
