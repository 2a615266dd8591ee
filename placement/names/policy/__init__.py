"""`moeplace.policy`: the public surface for engines under its short name; the code is `placement/policy`."""

from moeplace.placement.policy.answer import Answer
from moeplace.placement.policy.planning import plan

__all__ = ["Answer", "plan"]
