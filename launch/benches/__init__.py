"""Benchmarks of the runtime that are commands."""
