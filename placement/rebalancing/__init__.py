"""Balance of expert loads in few moves: pure functions on arrays, for engines that re-plan while they serve."""
