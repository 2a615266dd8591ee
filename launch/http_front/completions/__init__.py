"""Completion requests: body, run, answer."""
