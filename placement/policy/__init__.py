"""The policy for engines that re-plan while they serve, imported as `moeplace.policy`; light imports only."""
