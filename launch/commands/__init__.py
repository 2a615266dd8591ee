"""The subcommands of `moeplace`, one module each."""
