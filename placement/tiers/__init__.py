"""Experts that do not fit: who keeps which expert in which memory, what a step waits for, and what to do about it."""
