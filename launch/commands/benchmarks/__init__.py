"""The benchmarks of `moeplace bench`, one module each."""
